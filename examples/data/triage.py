"""Customer message -> one of six labels: billing, shipping, login, refund, bug, praise.

A message is an optional greeting, one sentence that carries the label, and sometimes a neutral
sentence on either side. Held-out rows use label sentences, greetings and products that training
never shows.

    python examples/data/triage.py --out DIR [--train N] [--heldout N] [--seed N]
"""

from random import Random

from rows import Row, Split, run

# Label -> (training sentences, held-out sentences).
# {p} is a product, {d} one with software, {n} a number of days, {m} an amount.
SENTENCES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "billing": (
        (
            "I was charged twice for the {p}.",
            "My invoice shows {m} dollars but we agreed on less.",
            "Why did my monthly price go up to {m} dollars?",
            "Please send me the invoice for the {p}.",
            "The tax on my last bill looks wrong.",
            "How do I change the credit card you charge each month?",
            "My card was declined when I tried to pay for the {p}.",
            "You billed my old card instead of the new one.",
            "There is a charge of {m} dollars that I do not recognize.",
            "Can I pay once a year instead of every month?",
            "I need a receipt with our company address for the {p}.",
            "The discount code was not applied to my bill.",
            "When is my next payment due?",
            "I paid {m} dollars by bank transfer, but my account still says unpaid.",
            "What does the extra fee of {m} dollars on my statement stand for?",
            "Do you accept PayPal for the {d} subscription?",
            "Our VAT number is missing on the invoice.",
            "I see two payments of {m} dollars in my bank account.",
            "The amount on the invoice is not the amount I paid.",
            "I got a payment reminder although I already paid.",
            "Is the {d} plan billed per user or per team?",
            "How much will I pay after the trial of the {d} ends?",
        ),
        (
            "My credit card statement lists your company two times this month.",
            "Could I get a copy of last month's invoice?",
            "I would like to switch from monthly to yearly payment.",
            "The price on my bill is {m} dollars too high.",
            "Which payment methods do you take?",
            "You have charged {m} dollars to the wrong card.",
            "My coupon did not lower the amount on the invoice.",
            "I have been overcharged by {m} dollars.",
        ),
    ),
    "shipping": (
        (
            "Where is my {p}? I ordered it {n} days ago.",
            "The parcel has been stuck in customs for {n} days.",
            "My package says delivered, but nothing is here.",
            "Can you send the {p} to another address?",
            "The tracking number for the {p} does not work.",
            "How long does delivery to Norway take?",
            "The courier left my {p} with the wrong neighbor.",
            "Only one of the two boxes arrived.",
            "When will the {p} be shipped?",
            "The box was crushed when the driver dropped it off.",
            "Do you ship to Canada?",
            "My delivery is {n} days late.",
            "I will not be home, please deliver the {p} on Friday.",
            "You sent a {p} in the wrong size, I ordered a large one.",
            "The tracking page has not changed for {n} days.",
            "I got somebody else's parcel.",
            "Is express delivery possible for the {p}?",
            "The {p} never arrived.",
            "I typed the wrong street for my order, can you correct it before it leaves?",
            "The postman says he has no package for me.",
            "Has my order left the warehouse yet?",
            "How much is postage for the {p} to Spain?",
        ),
        (
            "My order was supposed to arrive {n} days ago.",
            "The driver could not find my house and took the {p} back.",
            "Can I pick the parcel up at the post office?",
            "According to the tracking my {p} is in another country.",
            "Please change the delivery address of my order.",
            "I am still waiting for the {p} to be delivered.",
            "One item was missing from the package.",
            "What does overnight shipping cost?",
        ),
    ),
    "login": (
        (
            "I forgot my password.",
            "The reset email never arrives.",
            "It says my username does not exist.",
            "My account is locked after too many attempts.",
            "I cannot log in to the {d} since this morning.",
            "The verification code for signing in is not accepted.",
            "I lost my phone and with it the two-factor codes.",
            "How do I change the email address I sign in with?",
            "The password reset link has expired.",
            "I keep getting 'wrong password' although it is right.",
            "Somebody else seems to have signed in to my account.",
            "I can't get into my account any more.",
            "Please unlock my account.",
            "Signing in with Google no longer works for me.",
            "I no longer have the email address of my account, how do I get in?",
            "My colleague needs a username and password for the {d}.",
            "I am asked for a code from an app I do not have.",
            "The sign-in page of the {d} sends me back to the start.",
            "How can I reset my password?",
            "My credentials stopped working {n} days ago.",
            "I was logged out and now I cannot sign back in.",
            "The SMS code to log in does not come.",
        ),
        (
            "The system does not accept my password.",
            "I am locked out of my account.",
            "I never received the link to set a new password.",
            "What was my username again?",
            "Please turn off two-factor for me, I have a new phone.",
            "I have not been able to sign in for {n} days.",
            "My login for the {d} is rejected every time.",
            "I think my account was hacked, the password has changed.",
        ),
    ),
    "refund": (
        (
            "I want my money back for the {p}.",
            "Please refund the {m} dollars.",
            "I sent the {p} back {n} days ago, where is my refund?",
            "How do I return the {p} and get my money?",
            "I cancelled within {n} days and expect a full refund.",
            "The {p} is not what I expected, I would like to return it.",
            "Can I get a refund if I already opened the box?",
            "You promised to pay back {m} dollars, nothing has come.",
            "I no longer need the {p}, please take it back and refund me.",
            "Is it possible to return the {p} after {n} days?",
            "Cancel my order and give me my money back.",
            "I only got part of my refund.",
            "I would like to be reimbursed for the {p}.",
            "Refund me, please, the {p} is useless to me.",
            "My return was accepted, but the {m} dollars are still missing.",
            "Please give me the {m} dollars back.",
            "I want to send the {p} back.",
            "When do I get my money for the {p} I returned?",
            "The {p} was a present she already has, can we return it for cash?",
            "Do I get my money back if I cancel today?",
            "What is your return policy for the {p}?",
            "I ask you to repay the {m} dollars.",
        ),
        (
            "Kindly return my {m} dollars.",
            "I am returning the {p} and would like a refund.",
            "How many days do I have to send the {p} back for a full refund?",
            "I still have not got my money back.",
            "The {p} does not suit me, can you refund it?",
            "Please reimburse me for the {p}.",
            "I changed my mind and want my {m} dollars back.",
            "Where can I see the status of my refund?",
        ),
    ),
    "bug": (
        (
            "The app crashes when I open the {d}.",
            "The save button does nothing.",
            "The {d} freezes after {n} minutes.",
            "I get error {m} whenever I upload a photo.",
            "Since the update the {d} no longer starts.",
            "The page stays blank in Firefox.",
            "The search shows results in the wrong order.",
            "Exporting to PDF gives an empty file.",
            "The {d} shows the wrong time zone.",
            "Notifications come twice for every message.",
            "The chart on the dashboard does not load.",
            "Dark mode makes the text unreadable.",
            "My notes disappear after I close the app.",
            "The {d} turns itself off without a reason.",
            "The screen flickers when I scroll.",
            "The {d} does not connect to the wifi since version {n}.",
            "Sorting by date mixes up the months.",
            "An error message pops up when I click on settings.",
            "The {d} stopped syncing with my phone.",
            "The sound cuts out after a few seconds.",
            "Pictures are upside down after I upload them.",
            "The website is terribly slow and times out.",
        ),
        (
            "The {d} keeps crashing.",
            "Nothing happens when I press the print button.",
            "After the last update the menu is gone.",
            "I get a blank screen when the {d} starts.",
            "The calendar in the app shows the wrong month.",
            "The {d} hangs as soon as I open a large file.",
            "There is an error whenever I try to export my data.",
            "Bluetooth disconnects every {n} minutes.",
        ),
    ),
    "praise": (
        (
            "I love the {p}!",
            "Thank you, your support team solved everything in minutes.",
            "The {p} is the best thing I bought this year.",
            "Great work on the new version.",
            "My kids adore the {p}.",
            "Just wanted to say that the {p} is fantastic.",
            "Your service is excellent, keep it up!",
            "The {p} works perfectly and looks beautiful.",
            "I have recommended the {p} to all my friends.",
            "Five stars from me.",
            "What a lovely surprise, the {p} is even better than in the pictures.",
            "The lady on the phone was so kind and helpful.",
            "I am really happy with the {p}.",
            "Everything went smoothly, thanks a lot!",
            "You made my day.",
            "After {n} days with the {p} I am impressed.",
            "Superb quality, I will order again.",
            "Wow, that was quick, well done!",
            "Your team is amazing.",
            "No complaints, only compliments for the {p}.",
            "The {p} arrived early and works like a charm, thank you!",
            "I enjoy using the {p} every day.",
        ),
        (
            "The {p} is wonderful, thank you so much!",
            "Hats off to your designers.",
            "I could not be happier with my {p}.",
            "This is the best customer service I have ever had.",
            "My whole family is delighted with the {p}.",
            "Keep up the good work!",
            "The {p} is simply brilliant.",
            "I am very pleased with how you helped me.",
        ),
    ),
}
PRODUCTS = (
    (
        "toaster",
        "headset",
        "desk lamp",
        "backpack",
        "coffee maker",
        "keyboard",
        "bike light",
        "speaker",
        "vacuum cleaner",
        "rain jacket",
        "smart watch",
        "camera",
        "tablet",
    ),
    ("blender", "monitor", "drone", "electric kettle", "office chair", "tent"),
)
SOFTWARE = (  # products that one signs in to and that crash
    (
        "photo app",
        "smart watch",
        "tablet",
        "game console",
        "fitness tracker",
        "calendar app",
        "web shop",
        "music player",
    ),
    ("notes app", "robot mower", "baby monitor", "budget planner"),
)
GREETINGS = (
    (
        "",
        "",
        "",
        "Hi, ",
        "Hello, ",
        "Hi there! ",
        "Hey. ",
        "Good morning. ",
        "Dear team, ",
        "Dear support, ",
    ),
    ("", "", "Good evening. ", "Hello support team, ", "Hey guys, "),
)
NEUTRAL = (
    (
        "I have been a customer since 2019.",
        "My customer number is {id}.",
        "I am writing about my order {id}.",
        "This is about the {p}.",
        "I bought the {p} last month.",
        "I hope you are well.",
        "It is my second message.",
        "Sorry to bother you.",
        "Ticket {id}.",
    ),
    (
        "I am new here.",
        "My reference is {id}.",
        "I use the {p} at work.",
        "I tried to call you first.",
        "We are a small firm.",
    ),
)
CLOSINGS = (
    (
        "Please help.",
        "Thanks.",
        "Regards, Tom",
        "Best, Lena",
        "Can you look into it?",
        "I look forward to your reply.",
        "Please answer soon.",
        "What should I do?",
        "Thank you in advance.",
    ),
    ("Please advise.", "Cheers, Ana", "Please get back to me.", "Yours, Mr. Lee"),
)


def draw(rng: Random, split: Split) -> Row:
    half = 0 if split is Split.TRAIN else 1
    label = rng.choice(tuple(SENTENCES))
    parts = [rng.choice(SENTENCES[label][half])]
    if rng.random() < 0.35:
        parts.insert(0, rng.choice(NEUTRAL[half]))
    if label != "praise" and rng.random() < 0.35:
        parts.append(rng.choice(CLOSINGS[half]))
    message = rng.choice(GREETINGS[half]) + " ".join(parts)
    message = message.format(
        p=rng.choice(PRODUCTS[half]),
        d=rng.choice(SOFTWARE[half]),
        n=rng.randint(2, 30),
        m=rng.randint(5, 400),
        id=rng.randint(10000, 99999),
    )
    if rng.random() < 0.15:
        message = message.lower().rstrip(".")
    return {"prompt": message, "completion": label}


if __name__ == "__main__":
    run("triage", draw)
