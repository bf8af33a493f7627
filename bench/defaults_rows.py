"""Made-up spreadsheets in five classes, as small as those of somebody who tries the defaults.

Every row is a text and its label, put together from an opening, what it is about and a close. Rows
are all different, but held-out rows share their parts with training rows, so the scores say that
training went on for long enough, and nothing about real questions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True)
class Task:
    """One spreadsheet. cores: what a row says, by label; `{}` takes one of `details`."""

    name: str
    openings: Sequence[str]
    cores: Mapping[str, Sequence[str]]
    details: Sequence[str]
    closes: Sequence[str]

    def rows(self, count: int, seed: int, without: frozenset[str] = frozenset()) -> list[list[str]]:
        """Draw `count` different rows [text, label], about as many of each label.

        Args:
            without: texts that no row may have.
        """
        random = Random(f"{self.name} {seed}")
        labels = list(self.cores)
        texts: dict[str, str] = {}
        while len(texts) < count:
            label = labels[len(texts) % len(labels)]
            core = random.choice(self.cores[label]).format(random.choice(self.details))
            parts = random.choice(self.openings), core, random.choice(self.closes)
            text = " ".join(part for part in parts if part)
            if text not in texts and text not in without:
                texts[text] = label
        found = [[text, label] for text, label in texts.items()]
        random.shuffle(found)
        return found


ROUTING = Task(
    "routing",
    ("", "Hi,", "Hello team,", "Good morning.", "Dear support,", "Quick question:"),
    {
        "billing": (
            "I was charged twice for {} this month.",
            "The invoice for {} shows the wrong amount.",
            "Please send the receipt for {} to my accountant.",
            "My card was declined when I paid for {}.",
            "Why does the bill list a fee for {}?",
            "I would like to pay for {} by bank transfer.",
        ),
        "shipping": (
            "The parcel with {} has not arrived yet.",
            "Tracking says {} is still in the depot.",
            "Can {} be delivered to another address?",
            "The courier left {} at the wrong door.",
            "When will {} be sent out?",
            "The box of {} came wet and torn.",
        ),
        "technical": (
            "I get an error message when I start {}.",
            "After the update {} crashes all the time.",
            "{} no longer connects to the network.",
            "The screen of {} stays black.",
            "I cannot install the driver for {}.",
            "{} freezes as soon as I open the settings.",
        ),
        "account": (
            "I forgot the password that goes with {}.",
            "Please change the email address I registered {} with.",
            "My login for {} is locked after three attempts.",
            "How do I add a second user to {}?",
            "Delete my profile and everything about {}.",
            "The code to verify my sign-in for {} never comes.",
        ),
        "sales": (
            "Do you offer a discount on twenty pieces of {}?",
            "Which version of {} would suit a school?",
            "Could I get a quote for {}?",
            "Is {} available in blue?",
            "I would like to see a demonstration of {} before buying.",
            "How does {} compare with the cheaper model?",
        ),
    },
    (
        "the laser printer",
        "the tablet",
        "the office chair",
        "the photo app",
        "the router",
        "the headset",
        "the coffee machine",
        "the yearly plan",
        "the webcam",
        "the standing desk",
        "order 5521",
        "the smart lock",
    ),
    ("", "Thanks.", "Please help.", "Best, Mara", "It is rather urgent.", "Kind regards"),
)

GRADES = Task(
    "grades",
    ("", "We were here on Sunday.", "My honest opinion:", "Second visit.", "So,", "To be clear:"),
    {
        "terrible": (
            "{} was disgusting, I felt sick all night.",
            "worst experience ever, {} made us leave at once.",
            "an absolute disaster, {} was beyond awful.",
            "never again, {} was a complete nightmare.",
            "{} was horrible and they laughed at our complaint.",
            "I want all my money back, {} was revolting.",
        ),
        "bad": (
            "{} was disappointing and a bit too expensive.",
            "I did not like {} very much.",
            "{} was below what we had hoped for.",
            "sadly {} was rather poor this time.",
            "{} left us somewhat unhappy.",
            "not good, {} needs to improve.",
        ),
        "mixed": (
            "{} was okay, nothing more and nothing less.",
            "some things were fine, others not, {} was average.",
            "{} was neither good nor bad.",
            "I am undecided about {}, half of it worked.",
            "{} was acceptable, so so.",
            "{} had its ups and downs.",
        ),
        "good": (
            "{} was nice and we will probably return.",
            "I liked {}, a pleasant evening.",
            "{} was well done with only small flaws.",
            "quite happy with {}.",
            "{} was tasty and fairly priced.",
            "a solid place, {} was enjoyable.",
        ),
        "excellent": (
            "{} was absolutely perfect, the best I have ever had.",
            "simply outstanding, {} blew us away.",
            "{} was a dream, ten out of ten.",
            "flawless from start to end, {} was magnificent.",
            "I cannot praise {} enough, pure bliss.",
            "world class, {} was unforgettable.",
        ),
    },
    (
        "the soup",
        "the service",
        "the breakfast",
        "the view from the terrace",
        "the dessert",
        "the room",
        "the wine list",
        "the music",
        "the fish",
        "the waiter",
        "the tasting menu",
        "the pool",
    ),
    (
        "",
        "That is all.",
        "Parking is behind the house.",
        "We were four.",
        "Paid by card.",
        "Cheers!",
    ),
)

HOME = Task(
    "home",
    ("", "hey,", "please", "computer,", "could you", "right now"),
    {
        "lights": (
            "switch on the lamp in {}",
            "make it brighter in {}",
            "dim the lights in {} to thirty percent",
            "it is too dark in {}",
            "turn the bulbs in {} blue",
            "lights out in {}",
        ),
        "heating": (
            "set {} to twenty one degrees",
            "it is freezing in {}",
            "turn the radiator in {} down",
            "make {} two degrees warmer",
            "how warm is it in {}",
            "stop heating {}",
        ),
        "music": (
            "play some jazz in {}",
            "skip this song in {}",
            "turn the volume up in {}",
            "put on my running playlist in {}",
            "pause the album in {}",
            "who sings what is on in {}",
        ),
        "security": (
            "lock the door of {}",
            "arm the alarm for {}",
            "show me the camera in {}",
            "did anyone enter {} today",
            "is the window in {} closed",
            "who rang at {}",
        ),
        "timer": (
            "remind me of {} in ten minutes",
            "wake me at seven in {}",
            "count down five minutes in {}",
            "how long until the alarm clock rings in {}",
            "cancel the timer in {}",
            "start a stopwatch in {}",
        ),
    },
    (
        "the kitchen",
        "the bathroom",
        "the garage",
        "the hall",
        "the bedroom",
        "the nursery",
        "the cellar",
        "the study",
        "the attic",
        "the living room",
        "the guest room",
        "the workshop",
    ),
    ("", "thanks", "before dinner", "if you can", "for the kids", "as always"),
)

# For choosing defaults; never reported.
LANGUAGE = Task(
    "language",
    ("", "1.", "-", "...", "(a)", "No. 7:"),
    {
        "English": ("The train to {} is late.", "We live near {}.", "Have you ever been to {}?"),
        "German": ("Der Zug nach {} kommt spät.", "Wir wohnen bei {}.", "Warst du schon in {}?"),
        "French": ("Le train pour {} est en retard.", "Nous vivons à {}.", "Tu connais {} ?"),
        "Spanish": ("El tren a {} llega tarde.", "Vivimos cerca de {}.", "¿Has estado en {}?"),
        "Italian": ("Il treno per {} è in ritardo.", "Viviamo a {}.", "Sei mai stato a {}?"),
    },
    (
        "Bern",
        "Lima",
        "Oslo",
        "Rom",
        "Paris",
        "Bonn",
        "Porto",
        "Prag",
        "Genf",
        "Quito",
        "Riga",
        "Turin",
    ),
    ("", "!", "(ok)", "--", "*", "#"),
)
PRIORITY = Task(
    "priority",
    ("", "Note:", "From the floor:", "Ticket.", "FYI", "Again:"),
    {
        "critical": (
            "{} is on fire.",
            "{} has stopped and nobody can work.",
            "people are hurt near {}.",
        ),
        "high": ("{} fails every few minutes.", "{} leaks badly.", "{} lost half of its power."),
        "normal": (
            "{} makes a strange noise.",
            "{} needs a new filter.",
            "{} is slower than last week.",
        ),
        "low": (
            "the paint of {} is scratched.",
            "{} could be cleaned some day.",
            "the label on {} fades.",
        ),
        "none": ("{} works well.", "nothing to report on {}.", "{} was checked, all fine."),
    },
    ("pump 3", "the crane", "line B", "the oven", "the press", "the lift", "robot 12", "the gate"),
    ("", "Over.", "Seen at noon.", "Jo", "Shift two.", "Thanks."),
)

REPORTED = (ROUTING, GRADES, HOME)
FOR_CHOICES = (LANGUAGE, PRIORITY)
