"""Free text -> one compact JSON record: a person, an order, a meeting or a trip.

Every record type has fixed keys; a key the text says nothing about is null. Number words become
numbers ("three" -> 3), everything else is copied. Some training values are made up, so that copying
is what is learnt. Held-out rows use real values (weekdays and vehicles aside) and sentence
templates that training never shows.

    python examples/data/json_record.py --out DIR [--train N] [--heldout N] [--seed N]
"""

import json
from collections.abc import Callable
from random import Random
from typing import NamedTuple

from rows import Row, Split, made_name, run


class Words(NamedTuple):
    """One vocabulary with its two halves."""

    train: tuple[str, ...]
    heldout: tuple[str, ...]

    def pick_or_make(self, rng: Random, split: Split) -> str:
        """`pick`, or in training sometimes a made-up name."""
        made = split is Split.TRAIN and rng.random() < 0.3
        return made_name(rng) if made else self.pick(rng, split)

    def pick(self, rng: Random, split: Split) -> str:
        return rng.choice(self.train if split is Split.TRAIN else self.heldout)


def _words(train: str, heldout: str) -> Words:
    return Words(tuple(train.split("|")), tuple(heldout.split("|")))


FIRST = _words(
    "Anna|Ben|Carla|Dmitri|Elif|Farid|Grace|Hugo|Ines|Jonas|Keiko|Liam|Maya|Nadia|Otto|Paula|"
    "Quentin|Rosa|Samir|Tessa|Umar|Vera|Walt|Ximena|Yusuf|Zoe|Amara|Bruno|Chidi|Dolores|Albert|"
    "Beatrice|Cedric|Diana|Edgar|Fiona|Gustav|Helena|Ibrahim|Joanna|Karim|Leonie|Magnus|Natalie|"
    "Oscar|Philip|Rebecca|Stefan|Teresa|Ursula|Victor|Wendy|Simon|Judith|Patrick|Louise|Marcus|"
    "Ruth|Theo|Agnes",
    "Maria|Kofi|Henrik|Priya|Lucas|Sofia|Tomas|Aisha|Oliver|Irina|Mateo|Hana|Martin|Elena|George|"
    "Clara|Viktor|Laura|Daniel|Emma|Peter|Julia|Ahmed|Olga",
)
LAST = _words(
    "Albers|Brandt|Cole|Dixon|Ekman|Fischer|Gallo|Haddad|Ivanov|Jensen|Kaya|Lund|Moreau|Novak|"
    "Okafor|Petrov|Quinn|Reyes|Sato|Turner|Ueda|Vogel|Weber|Xu|Young|Zeman|Osei|Silva|Adams|"
    "Bergmann|Carter|Delgado|Evans|Foster|Garcia|Hansen|Iqbal|Jackson|Keller|Lopez|Morgan|Nielsen|"
    "Ortega|Parker|Richter|Schmidt|Torres|Unger|Valdez|Walker|Becker|Fontaine|Gomez|Hughes|Kruger|"
    "Lambert",
    "Duarte|Mensah|Larsen|Sharma|Costa|Rossi|Marek|Bello|Grant|Popova|Vargas|Kimura|Taylor|"
    "Hoffman|Mendes|Clark|Nguyen|Bauer|Ferrari|Olsen|Murphy|Tanaka|Romero|Wagner",
)
JOB = _words(
    "teacher|nurse|plumber|painter|baker|pilot|lawyer|farmer|singer|chef|dentist|driver|writer|"
    "engineer|florist|tailor|judge|barber|librarian|electrician|midwife|beekeeper|geologist|"
    "roofer|auditor|optician|janitor|goldsmith|sculptor|cashier|detective|shepherd|biologist|"
    "violinist|mechanic|taxi driver|tour guide|bus conductor|data analyst|piano tuner|dog trainer|"
    "locksmith|firefighter|accountant|pharmacist|journalist|butcher|sailor|actor|banker|jeweler|"
    "chemist|astronomer|historian|bricklayer|receptionist|interpreter|psychologist|veterinarian",
    "welder|architect|gardener|waiter|carpenter|photographer|surgeon|translator|secretary|"
    "musician|soldier|fisherman|economist|dancer|miner|cook",
)
CITY = _words(
    "Lisbon|Oslo|Kyoto|Boston|Lyon|Graz|Porto|Turin|Accra|Lima|Cork|Bergen|Austin|Delhi|Cairo|"
    "Malmo|Ghent|Bristol|Tallinn|Quito|Hanoi|Nairobi|Leeds|San Diego|New York|Cape Town|Amsterdam|"
    "Athens|Bangkok|Barcelona|Beirut|Bogota|Brussels|Bucharest|Calgary|Chennai|Chicago|Cologne|"
    "Dallas|Denver|Dresden|Edinburgh|Florence|Geneva|Glasgow|Havana|Helsinki|Istanbul|Jakarta|"
    "Krakow|Kampala|Liverpool|Ljubljana|Lucknow|Manila|Marseille|Melbourne|Memphis|Milan|Montreal|"
    "Munich|Naples|Odessa|Palermo|Phoenix|Rotterdam|Salzburg|Santiago|Sapporo|Seattle|Sheffield|"
    "Stuttgart|Sydney|Tampere|Tbilisi|Utrecht|Valencia|Vilnius|Warsaw|Wellington|Yerevan|Zagreb",
    "Vienna|Seville|Dublin|Toronto|Osaka|Prague|Lagos|Santa Fe|Zurich|Hamburg|Rome|Madrid|Berlin|"
    "London|Stockholm|Budapest|Houston|Singapore|Tokyo|Lahore|Nantes|Split|Perth|Basel",
)
ITEM = _words(
    "lamps|chairs|notebooks|mugs|pencils|blankets|batteries|towels|candles|bottles|keyboards|"
    "umbrellas|socks|plates|headphones|garden hoses|desk fans|phone cases|paint brushes|tea pots|"
    "wool scarves|ladders|zippers|violins|bird feeders|door mats|soap dispensers|lanterns|hammers|"
    "salad bowls|postcards|rain boots|usb cables|envelopes|tripods|canvas bags|flower pots|"
    "carpets|mirrors|suitcases|wardrobes|kettles|teaspoons|calculators|cushions|printers|sandals|"
    "gloves|bracelets|telescopes|wheelbarrows|sunglasses|magnets|staplers|cupboards|necklaces|"
    "raincoats|saucepans|bookshelves",
    "pillows|backpacks|curtains|screwdrivers|yoga mats|picture frames|helmets|water jugs|tables|"
    "cameras|sweaters|clocks|wallets|radios|shovels|baskets",
)
TOPIC = _words(
    "budget review|design sync|sales call|team lunch|hiring talk|sprint planning|safety briefing|"
    "press interview|client demo|status update|board meeting|code review|kickoff|training session|"
    "vendor check|fire drill|book club|parents evening|tax workshop|choir practice|"
    "quarterly report|retrospective|onboarding|photo shoot|risk assessment|menu tasting|town hall|"
    "garden committee",
    "contract talk|yearly review|product launch|roadmap meeting|job interview|staff party",
)
DAY = _words(
    "Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday",
    "Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday",
)
ROOM = _words(
    "Room 4|Room 12|Room 21|Room 7|the library|the canteen|Hall B|Hall C|Studio 2|the lobby|Lab 3|"
    "Suite 5|the basement|Office 9|Room 33|the terrace|the gym|the workshop|the attic|the cafe|"
    "Tower 6|Annex D|the chapel|the archive|Cabin 14",
    "Room 16|Room 8|Hall A|Studio 6|the kitchen|Lab 1|the garden|Office 30",
)
VEHICLE = _words("train|bus|ferry|plane|tram|taxi", "train|bus|ferry|plane|car|boat")
NUMBERS = (
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
)

# A template names keys of its record; a key that it leaves out is null.
# First tuple: training; second: held-out.
PERSON = (
    (
        "{name} is a {age}-year-old {job} from {city}.",
        "{name}, {age}, works as a {job} in {city}.",
        "My neighbour {name} is {age} and lives in {city}. Job: {job}.",
        "Hi, I'm {name}, I'm {age} years old and I work as a {job} here in {city}.",
        "In {city} I met {name}, a {job} of {age}.",
        "The {job} {name} ({age}) moved to {city} last year.",
        "Name: {name}. Age: {age}. City: {city}. Occupation: {job}.",
        "{name} turned {age} this week; she is a {job} and lives in {city}.",
        "Our new {job} is {name} from {city}, aged {age}.",
        "{name} from {city} has been a {job} for years and is now {age}.",
        "{city}: {job} {name}, {age}, wins the local prize.",
        "{name} is a {job} in {city}.",
        "{name} lives in {city} and is {age} years old.",
        "I am {name}, a {age}-year-old {job}.",
        "A {job} named {name} called from {city}.",
        "At {age}, {name} still works as a {job} in {city}.",
        "Please add {name}, {job}, {age} years, {city}.",
    ),
    (
        "Yesterday {age}-year-old {job} {name} arrived from {city}.",
        "Meet {name}: {job}, {age} years old, based in {city}.",
        "{name} ({age}) is employed as a {job} in {city}.",
        "I grew up in {city}, I am {age}, and my job is {job}. My name is {name}.",
        "The patient, {name}, is {age} years of age, a {job}, and comes from {city}.",
        "My cousin {name} lives in {city} and works as a {job}.",
    ),
)
ORDER = (
    (
        "{customer} ordered {quantity} {item} for ${price}.",
        "Please send {quantity} {item} to {customer}, total ${price}.",
        "{customer} bought {quantity} {item} and paid {price} dollars.",
        "Order from {customer}: {quantity} x {item}, ${price}.",
        "I'd like {quantity} {item}. Price as agreed ${price}. Regards, {customer}",
        "We sold {quantity} {item} to {customer} at ${price}.",
        "{quantity} {item} went out to {customer} today for {price} dollars.",
        "For ${price}, {customer} gets {quantity} {item}.",
        "{customer} wants {quantity} {item}.",
        "Invoice {customer} ${price} for the {quantity} {item}.",
        "New order! {item}, {quantity} pieces, ${price}, buyer {customer}.",
        "The bill for {quantity} {item} comes to ${price}.",
        "Customer {customer} asked for {quantity} {item} at a price of ${price}.",
        "{customer} took {item} worth ${price}.",
        "Hello, this is {customer}. I need {quantity} {item}, and I will pay ${price}.",
    ),
    (
        "{customer} has just purchased {quantity} {item}, paying ${price}.",
        "Could you ship {quantity} {item} to {customer}? The total is ${price}.",
        "A purchase of {quantity} {item} was made by {customer} for ${price}.",
        "{quantity} {item} for {customer}, please. They cost ${price}.",
        "Hi, {customer} here, can I get {quantity} {item}?",
        "We received ${price} from {customer} for {quantity} {item}.",
    ),
)
MEETING = (
    (
        "{title} on {day} at {time} in {room}.",
        "The {title} is on {day} at {time} in {room}.",
        "Let's have the {title} {day} at {time}, {room}.",
        "Reminder: {title}, {day}, {time}, {room}.",
        "We meet in {room} on {day} at {time} for the {title}.",
        "Can we move the {title} to {day} at {time}? I booked {room}.",
        "{day} {time}: {title} in {room}",
        "At {time} on {day} there is a {title} in {room}.",
        "The {title} moves to {room}, {day} at {time}.",
        "See you {day} at {time} for the {title}.",
        "Please come to {room} for the {title} on {day}.",
        "I have put the {title} in the calendar for {day}, {time}, in {room}.",
        "{room} is reserved on {day} from {time} for our {title}.",
        "There will be a {title} at {time} in {room}.",
        "Don't forget the {title} on {day}!",
    ),
    (
        "Everybody is invited to the {title} in {room} on {day} at {time}.",
        "Our {title} starts at {time} on {day}; the place is {room}.",
        "On {day} we hold the {title} at {time} in {room}.",
        "Calendar: {day}, {time}, {title}, place: {room}.",
        "The {title} was shifted to {day} at {time}.",
        "Come to {room} at {time} this {day}, the {title} is about to start.",
    ),
)
TRIP = (
    (
        "{traveler} takes the {by} from {from} to {to} on {day}.",
        "On {day} {traveler} travels from {from} to {to} by {by}.",
        "Book a {by} for {traveler}: {from} to {to}, {day}.",
        "{traveler} is going to {to} by {by} on {day}, leaving from {from}.",
        "{day}: {from} - {to}, {by}, passenger {traveler}.",
        "The {by} to {to} leaves {from} on {day} with {traveler} on board.",
        "{traveler} needs a {by} ticket from {from} to {to} for {day}.",
        "By {by} from {from} to {to}: {traveler}, next {day}.",
        "I'm {traveler} and I want to go from {from} to {to} on {day}.",
        "{traveler} arrives in {to} on {day}; the {by} starts in {from}.",
        "{traveler} left {from} for {to} on {day} by {by}.",
        "{traveler} will go to {to} on {day}.",
        "Can you get {traveler} on the {by} from {from} to {to}?",
    ),
    (
        "{traveler} would like to travel by {by} from {from} to {to} this {day}.",
        "There is a {by} on {day} that brings {traveler} from {from} to {to}.",
        "Reserve one seat for {traveler} on the {by} from {from} to {to} on {day}.",
        "This {day}, {traveler} goes from {from} to {to} with the {by}.",
        "From {from} to {to} by {by} on {day}, name of traveler: {traveler}.",
    ),
)
ASK = (
    "",
    "",
    "JSON: ",
    "Extract a record: ",
    "Turn this into JSON: ",
    "Make a JSON record of this text. ",
)
Fields = dict[str, tuple[str, str | int]]  # key -> (as written, as recorded)


def _same(text: str) -> tuple[str, str]:
    return text, text


def _full_name(rng: Random, split: Split) -> tuple[str, str]:
    return _same(f"{FIRST.pick_or_make(rng, split)} {LAST.pick_or_make(rng, split)}")


def _time(rng: Random) -> tuple[str, str]:
    """A time of day, recorded as it is written: "14:30", "3 pm" or "9 am"."""
    hour = rng.randint(7, 19)
    if rng.random() < 0.6:
        return _same(f"{hour:02d}:{rng.choice((0, 15, 30, 45)):02d}")
    return _same(f"{hour if hour <= 12 else hour - 12} {'am' if hour < 12 else 'pm'}")


def _person(rng: Random, split: Split) -> Fields:
    age = rng.randint(18, 80)
    return {
        "name": _full_name(rng, split),
        "age": (str(age), age),
        "job": _same(JOB.pick(rng, split)),
        "city": _same(CITY.pick_or_make(rng, split)),
    }


def _order(rng: Random, split: Split) -> Fields:
    quantity = rng.randint(2, 12) if rng.random() < 0.5 else rng.randint(2, 90)
    written = NUMBERS[quantity - 2] if quantity <= 12 and rng.random() < 0.7 else str(quantity)
    price = rng.randint(5, 900)
    return {
        "customer": _full_name(rng, split),
        "item": _same(ITEM.pick(rng, split)),
        "quantity": (written, quantity),
        "price": (str(price), price),
    }


def _meeting(rng: Random, split: Split) -> Fields:
    return {
        "title": _same(TOPIC.pick(rng, split)),
        "day": _same(DAY.pick(rng, split)),
        "time": _time(rng),
        "room": _same(ROOM.pick(rng, split)),
    }


def _trip(rng: Random, split: Split) -> Fields:
    start = end = CITY.pick_or_make(rng, split)
    while end == start:
        end = CITY.pick_or_make(rng, split)
    return {
        "traveler": _full_name(rng, split),
        "from": _same(start),
        "to": _same(end),
        "by": _same(VEHICLE.pick(rng, split)),
        "day": _same(DAY.pick(rng, split)),
    }


Templates = tuple[tuple[str, ...], tuple[str, ...]]
TYPES: dict[str, tuple[Callable[[Random, Split], Fields], Templates]] = {
    "person": (_person, PERSON),
    "order": (_order, ORDER),
    "meeting": (_meeting, MEETING),
    "trip": (_trip, TRIP),
}


def draw(rng: Random, split: Split) -> Row:
    kind = rng.choice(tuple(TYPES))
    make_fields, (train, heldout) = TYPES[kind]
    fields = make_fields(rng, split)
    template = rng.choice(train if split is Split.TRAIN else heldout)
    text = template.format(**{key: written for key, (written, _) in fields.items()})
    record = {"type": kind} | {
        key: value if f"{{{key}}}" in template else None for key, (_, value) in fields.items()
    }
    return {
        "prompt": rng.choice(ASK) + text[0].upper() + text[1:],
        "completion": json.dumps(record, ensure_ascii=False, separators=(",", ":")),
    }


if __name__ == "__main__":
    run("json_record", draw)
