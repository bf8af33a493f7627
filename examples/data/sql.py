"""Question + schema -> one SQL SELECT statement.

A question is composed: an opening, what to select, a condition, an order. Held-out rows use tables
and columns that training never shows, and half of their phrasings are new too.

    python examples/data/sql.py --out DIR [--train N] [--heldout N] [--seed N]
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random

from rows import Row, Split, made_name, run


@dataclass(frozen=True)
class Text:
    """A TEXT column: its name, its values, and the words that tie a value to a row ("in")."""

    name: str
    values: tuple[str, ...]
    link: str | None = None

    @property
    def words(self) -> str:
        return self.name.replace("_", " ")


@dataclass(frozen=True)
class Number:
    """An INTEGER column: its name, range, words for its extremes, the verb for its value."""

    name: str
    low: int
    high: int
    most: str | None = None
    least: str | None = None
    verb: str | None = None

    @property
    def words(self) -> str:
        return self.name.replace("_", " ")


@dataclass(frozen=True)
class Table:
    """A table: its name (a plural), the column that names a row, and its other columns."""

    name: str
    title: str
    texts: tuple[Text, ...]
    numbers: tuple[Number, ...]

    @property
    def words(self) -> str:
        return self.name.replace("_", " ")


def _table(name: str, title: str, *columns: str) -> Table:
    """Read columns: "city: Oslo, Kyoto; in" or "price: 40-300; most expensive, cheapest; cost"."""
    texts, numbers = [], []
    for column in columns:
        column_name, _, rest = column.partition(": ")
        values, *notes = rest.split("; ")
        if values[0].isdigit():
            low, _, high = values.partition("-")
            most, least = notes[0].split(", ") if notes and notes[0] else (None, None)
            numbers.append(
                Number(
                    column_name,
                    int(low),
                    int(high),
                    most,
                    least,
                    notes[1] if len(notes) > 1 else None,
                )
            )
        else:
            texts.append(Text(column_name, tuple(values.split(", ")), notes[0] if notes else None))
    return Table(name, title, tuple(texts), tuple(numbers))


TRAIN_TABLES = (
    _table(
        "hotels",
        "name",
        "city: Lisbon, Oslo, Kyoto, New York; in",
        "chain: Astoria, Blue Door, Hilltop",
        "stars: 1-5",
        "rooms: 20-400",
        "price: 40-300; most expensive, cheapest; cost",
    ),
    _table(
        "campsites",
        "site",
        "county: Kent, Devon, Clare; in",
        "owner: Baker, Kovacs, Diaz; owned by",
        "tents: 5-90",
        "fee_per_night: 8-60; most expensive, cheapest; cost",
    ),
    _table(
        "books",
        "title",
        "author: Borges, Woolf, Achebe; by",
        "genre: horror, poetry, crime",
        "pages: 80-900; longest, shortest",
        "year: 1900-2024; newest, oldest",
    ),
    _table(
        "magazines",
        "issue_name",
        "publisher: Omni, Lark Press, Delta; from",
        "subject: sports, food, cinema; about",
        "copies_sold: 100-9000",
        "issue_price: 2-20; most expensive, cheapest; cost",
    ),
    _table(
        "employees",
        "full_name",
        "department: sales, legal, support; in",
        "office: Berlin, Austin, Lyon; in",
        "salary: 20000-120000; best paid, worst paid; earn",
        "age: 18-66; oldest, youngest",
    ),
    _table(
        "workers",
        "badge",
        "shift: night, morning, late",
        "plant: Gdansk, Detroit, Pune; at",
        "hourly_wage: 9-60; best paid, worst paid; earn",
        "overtime: 0-40",
    ),
    _table(
        "cars",
        "model",
        "maker: Fiat, Volvo, Honda; made by",
        "color: red, black, white",
        "horsepower: 60-400; most powerful, weakest",
        "mileage: 1000-90000",
        "price: 900-60000; most expensive, cheapest; cost",
    ),
    _table(
        "trucks",
        "plate",
        "depot: Hull, Essen, Turin; at",
        "driver: Marek, Joao, Sven; driven by",
        "load_kg: 500-9000; heaviest, lightest; carry",
        "axles: 2-6",
    ),
    _table(
        "students",
        "name",
        "major: physics, history, law; in",
        "country: Peru, Ghana, Japan; from",
        "grade: 1-10; best, worst",
        "credits: 10-240",
        "age: 17-40; oldest, youngest",
    ),
    _table(
        "teachers",
        "surname",
        "subject: maths, biology, art; of",
        "school: Westfield, Saint Mary, Parkside; at",
        "years_employed: 1-40",
        "class_size: 8-40; biggest, smallest",
    ),
    _table(
        "orders",
        "order_id",
        "status: open, shipped, cancelled",
        "customer: Acme, Nordwind, Lopez; from",
        "total: 5-900; largest, smallest",
        "item_count: 1-30",
    ),
    _table(
        "tickets",
        "ticket_no",
        "agent: Mona, Idris, Beth; handled by",
        "priority: low, high, urgent",
        "replies: 0-40",
        "hours_open: 1-300; longest, shortest",
    ),
    _table(
        "films",
        "title",
        "director: Varda, Kubrick, Ozu; by",
        "language: French, Korean, English; in",
        "minutes: 60-210; longest, shortest; last",
        "rating: 1-10; best, worst",
    ),
    _table(
        "episodes",
        "episode",
        "series: Dark Bay, Nova, Mill Road; of",
        "writer: Pike, Sorel, Amin; by",
        "viewers: 500-9000",
        "running_time: 15-90; longest, shortest; last",
    ),
    _table(
        "cities",
        "name",
        "country: Peru, Ghana, Japan; in",
        "region: north, coast, highlands; in the",
        "population: 5000-900000; biggest, smallest",
        "altitude: 1-3600; highest, lowest",
    ),
    _table(
        "islands",
        "island",
        "ocean: Pacific, Indian, Arctic; in the",
        "flag: Greek, Danish, Fijian",
        "square_km: 1-900; biggest, smallest",
        "villages: 1-40",
    ),
    _table(
        "players",
        "player",
        "team: Lions, Rovers, Comets; of the",
        "position: goalkeeper, striker, defender",
        "goals: 0-60",
        "height_cm: 160-210; tallest, shortest",
    ),
    _table(
        "races",
        "race",
        "winner: Silva, Odera, Blanc; won by",
        "surface: gravel, asphalt, sand; on",
        "distance: 5-200; longest, shortest",
        "runners: 20-5000",
    ),
    _table(
        "recipes",
        "dish",
        "cuisine: Thai, Mexican, Greek",
        "course: starter, main, dessert",
        "calories: 90-1200",
        "servings: 1-12",
        "cooking_time: 5-180; slowest, quickest; take",
    ),
    _table(
        "wines",
        "bottle",
        "grape: Merlot, Syrah, Riesling; from",
        "cellar: Nord, Castello, Abbey; in",
        "vintage: 1960-2022; newest, oldest",
        "bottle_price: 5-300; most expensive, cheapest; cost",
    ),
    _table(
        "flights",
        "flight_no",
        "airline: Iberia, Delta, Finnair; by",
        "destination: Rome, Cairo, Tokyo; to",
        "seats: 50-400",
        "duration: 40-900; longest, shortest; last",
    ),
    _table(
        "trains",
        "line",
        "operator: Renfe, Amtrak, Trenord; run by",
        "terminus: Milan, Irun, Albany; to",
        "stops: 2-40",
        "top_speed: 80-320; fastest, slowest",
    ),
    _table(
        "products",
        "product",
        "category: toys, garden, kitchen",
        "brand: Zeno, Kappa, Mirel; by",
        "stock: 0-500",
        "weight: 1-90; heaviest, lightest; weigh",
        "price: 2-900; most expensive, cheapest; cost",
    ),
    _table(
        "parcels",
        "barcode",
        "sender: Ruiz, Tanaka, Olsen; from",
        "zone: A1, B2, C3; in",
        "grams: 50-9000; heaviest, lightest; weigh",
        "postage: 1-60; most expensive, cheapest; cost",
    ),
    _table(
        "patients",
        "patient",
        "doctor: Novak, Silva, Chen; of",
        "ward: surgery, maternity, cardiology; in",
        "age: 1-95; oldest, youngest",
        "visits: 1-30",
    ),
    _table(
        "houses",
        "address",
        "street: Elm Street, Mill Lane, High Street; in",
        "landlord: Baker, Kovacs, Diaz; owned by",
        "bedrooms: 1-8",
        "floor_area: 40-500; largest, smallest",
        "rent: 300-4000; most expensive, cheapest; cost",
    ),
    _table(
        "songs",
        "song",
        "artist: Nina Simone, Bono, Fela Kuti; by",
        "album: Homogenic, Zombie, Pastel; on",
        "plays: 10-9000; most played, least played",
        "seconds: 60-600; longest, shortest; last",
    ),
    _table(
        "sales",
        "sale_id",
        "store: Centre, Harbour, Airport; in",
        "seller: Ines, Omar, Petra; by",
        "amount: 5-2000; largest, smallest",
        "discount: 0-60",
    ),
)

HELDOUT_TABLES = (
    _table(
        "boats",
        "boat_name",
        "harbor: Split, Bergen, Cadiz; in",
        "skipper: Anders, Lucia, Tom; sailed by",
        "cabins: 1-9",
        "length: 5-40; longest, shortest",
    ),
    _table(
        "museums",
        "museum",
        "town: Ghent, Porto, Leeds; in",
        "theme: trains, sculpture, science; about",
        "visitors: 500-90000",
        "ticket_cost: 2-40; most expensive, cheapest; cost",
    ),
    _table(
        "dogs",
        "nickname",
        "breed: beagle, poodle, collie",
        "shelter: Northside, Riverbank; from",
        "kilos: 2-70; heaviest, lightest; weigh",
        "months: 2-180; oldest, youngest",
    ),
    _table(
        "invoices",
        "invoice_no",
        "client: Globex, Initech, Hooli; for",
        "currency: EUR, USD, JPY; in",
        "balance: 10-5000; largest, smallest",
        "days_late: 0-90",
    ),
    _table(
        "concerts",
        "headliner",
        "venue: Arena, Opera House, Old Barn; at",
        "style: jazz, techno, folk",
        "audience: 50-20000; biggest, smallest",
        "encores: 0-5",
    ),
    _table(
        "mountains",
        "peak",
        "range: Alps, Andes, Rockies; in the",
        "nation: Chile, Nepal, Austria; in",
        "elevation: 900-8800; highest, lowest",
        "climbers: 5-900",
    ),
    _table(
        "laptops",
        "sku",
        "vendor: Lenovo, Apple, Asus; from",
        "screen: matte, glossy",
        "memory_gb: 4-128",
        "cost: 200-4000; most expensive, cheapest; cost",
    ),
)

# Phrasings: {t} table, {c} columns, {w} condition. The first tuple is for training; held-out rows
# take from the second one half of the time.
Phrases = tuple[tuple[str, ...], tuple[str, ...]]

ALL: Phrases = (
    (
        "Show all {t}.",
        "List every row in {t}.",
        "Give me all the {t}.",
        "I want to see all {t}",
        "all {t}",
        "What {t} are there?",
        "Display the whole {t} table.",
        "Get all {t} please",
        "Return every column of all {t}.",
    ),
    ("Print all the {t}.", "Let me look at all {t}.", "Fetch every one of the {t}."),
)
FIND: Phrases = (
    (
        "Show {t} {w}.",
        "List the {t} {w}.",
        "Which {t} are there {w}?",
        "Find all {t} {w}",
        "Give me every row of {t} {w}.",
        "I need a query for {t} {w}.",
        "get {t} {w}",
        "Can you show me the {t} {w}?",
        "Write a SQL query that lists {t} {w}.",
        "What are the {t} {w}?",
        "I'm looking for {t} {w}.",
        "{t} {w}",
    ),
    (
        "Fetch the {t} {w}.",
        "Please find me {t} {w}.",
        "Tell me which {t} exist {w}.",
        "I would like to see {t} {w}.",
    ),
)
COLUMNS: Phrases = (
    (
        "Show the {c} of all {t}.",
        "List the {c} of every row in {t}.",
        "What is the {c} of the {t}?",
        "Give me {c} for all {t}.",
        "I only want the {c} from {t}.",
        "get {c} from {t}",
        "Select {c} of the {t}.",
        "Return just {c} for each of the {t}.",
    ),
    (
        "Print the {c} for the {t}.",
        "I would like the {c} of all {t}.",
        "Fetch {c} for every one of the {t}.",
    ),
)
COLUMNS_FIND: Phrases = (
    (
        "Show the {c} of {t} {w}.",
        "What is the {c} of the {t} {w}?",
        "Give me {c} for {t} {w}.",
        "List {c} of all {t} {w}.",
        "get the {c} of {t} {w}",
        "I need the {c} of {t} {w}.",
        "Find the {c} of every row in {t} {w}.",
    ),
    (
        "Print the {c} for {t} {w}.",
        "I would like the {c} of {t} {w}.",
        "Tell me the {c} of the {t} {w}.",
    ),
)
COUNT: Phrases = (
    (
        "How many {t} are there?",
        "Count the {t}.",
        "What is the number of {t}?",
        "Give me the total number of {t}.",
        "how many {t} do we have",
        "Number of rows in {t}?",
    ),
    ("Tell me how many {t} there are.", "I need a count of {t}."),
)
COUNT_FIND: Phrases = (
    (
        "How many {t} are there {w}?",
        "Count the {t} {w}.",
        "What is the number of {t} {w}?",
        "how many {t} do we have {w}",
        "Give me the number of {t} {w}.",
        "Number of {t} {w}?",
    ),
    ("Tell me how many {t} there are {w}.", "I need a count of {t} {w}."),
)
SORT: Phrases = (
    (
        "{f} sorted by {c}{d}.",
        "{f} ordered by {c}{d}.",
        "{f}, sort by {c}{d}",
        "{f} in order of {c}{d}.",
        "{f} by {c}{d}",
        "{f} arranged by {c}{d}",
    ),
    ("{f} ranked by {c}{d}.", "{f}, order them by {c}{d}."),
)
UP: Phrases = (
    (
        "",
        " ascending",
        ", lowest first",
        " from low to high",
        ", smallest first",
        " in ascending order",
    ),
    (", ascending", ", from lowest to highest"),
)
DOWN: Phrases = (
    (
        " descending",
        ", highest first",
        " from high to low",
        ", largest first",
        " in descending order",
    ),
    (", descending", ", from highest to lowest"),
)
SORTED_WHAT: Phrases = (
    ("Show {t}", "List all {t}", "{t}", "Give me the {t}", "I want the {t}"),
    ("Print the {t}", "Fetch all {t}"),
)
TOP: Phrases = (
    (
        "Top {n} {t} by {c}.",
        "Show the {n} {t} with the highest {c}.",
        "Which {n} {t} have the most {c}?",
        "The {n} {t} with the largest {c}",
        "Give me the first {n} {t} by {c}, highest first.",
    ),
    ("Find the {n} {t} that have the highest {c}.", "List the top {n} {t} in terms of {c}."),
)
BOTTOM: Phrases = (
    (
        "Bottom {n} {t} by {c}.",
        "Show the {n} {t} with the lowest {c}.",
        "Which {n} {t} have the least {c}?",
        "The {n} {t} with the smallest {c}",
        "Give me the first {n} {t} by {c}, lowest first.",
    ),
    ("Find the {n} {t} that have the lowest {c}.", "List the bottom {n} {t} in terms of {c}."),
)
SUPERLATIVE: Phrases = (
    (
        "Show the {n} {s} {t}.",
        "What are the {n} {s} {t}?",
        "List the {n} {s} {t} by {c}.",
        "the {n} {s} {t}",
        "Which {t} are the {n} {s}?",
        "Find the {n} {s} {t}.",
    ),
    ("Tell me the {n} {s} {t}.", "I would like the {n} {s} {t}."),
)
AGGREGATE: Phrases = (
    (
        "What is the {a} {c} of {t}?",
        "Show the {a} {c} of all {t}.",
        "{a} {c} of the {t}",
        "Compute the {a} {c} for {t}.",
        "Find the {a} {c} in {t}.",
        "Give me the {a} {c} across all {t}.",
        "Calculate the {a} {c} over all {t}.",
    ),
    ("Tell me the {a} {c} of the {t}.", "Work out the {a} {c} over all {t}."),
)
AGGREGATE_FIND: Phrases = (
    (
        "What is the {a} {c} of {t} {w}?",
        "Show the {a} {c} of all {t} {w}.",
        "{a} {c} of the {t} {w}",
        "Compute the {a} {c} for {t} {w}.",
        "Find the {a} {c} of {t} {w}.",
    ),
    ("Tell me the {a} {c} of the {t} {w}.", "Calculate the {a} {c} over {t} {w}."),
)
COUNT_BY: Phrases = (
    (
        "How many {t} are there per {g}?",
        "Count the {t} in each {g}.",
        "Number of {t} by {g}",
        "For each {g}, how many {t} are there?",
        "Show the number of {t} for every {g}.",
        "Give a count of {t} grouped by {g}.",
        "{t} per {g}, counted",
    ),
    ("Tell me how many {t} each {g} has.", "I need the number of {t} per {g}."),
)
AGGREGATE_BY: Phrases = (
    (
        "What is the {a} {c} of {t} per {g}?",
        "{a} {c} of {t} by {g}",
        "Show the {a} {c} for each {g} in {t}.",
        "For every {g}, give the {a} {c} of the {t}.",
        "Compute the {a} {c} of {t} for each {g}.",
        "{a} {c} of {t} grouped by {g}",
        "Calculate the {a} {c} of {t}, grouped by {g}.",
    ),
    ("Tell me the {a} {c} of {t} in each {g}.", "Work out the {a} {c} of {t} by {g}."),
)
DISTINCT: Phrases = (
    (
        "List the different {g} values of {t}.",
        "What are the distinct {g} values in {t}?",
        "Show each {g} of {t} only once.",
        "Which unique {g} values do the {t} have?",
        "all {g} values in {t} without duplicates",
    ),
    ("Tell me the unique {g} values of {t}.", "Print the {g} values of {t} without repeats."),
)

# Conditions: phrasing of one comparison on a number ({c} column, {v} value) or a text column.
COMPARE: dict[str, Phrases] = {
    ">": (
        (
            "with {c} above {v}",
            "with more than {v} {c}",
            "whose {c} is greater than {v}",
            "where {c} is over {v}",
            "that have more than {v} {c}",
            "with {c} > {v}",
            "having {c} bigger than {v}",
            "with {c} higher than {v}",
        ),
        ("with {c} exceeding {v}", "whose {c} is above {v}"),
    ),
    "<": (
        (
            "with {c} below {v}",
            "with less than {v} {c}",
            "whose {c} is less than {v}",
            "where {c} is under {v}",
            "that have fewer than {v} {c}",
            "with {c} < {v}",
            "having {c} smaller than {v}",
            "with {c} lower than {v}",
        ),
        ("with {c} under {v}", "whose {c} is below {v}"),
    ),
    ">=": (
        (
            "with at least {v} {c}",
            "with {c} of at least {v}",
            "whose {c} is {v} or more",
            "with {c} >= {v}",
            "where {c} is {v} or more",
            "with {v} or more {c}",
            "with {c} not below {v}",
        ),
        ("that have at least {v} {c}", "whose {c} is at least {v}"),
    ),
    "<=": (
        (
            "with at most {v} {c}",
            "with {c} of at most {v}",
            "whose {c} is {v} or less",
            "with {c} <= {v}",
            "where {c} is {v} or less",
            "with {v} or less {c}",
            "with {c} not above {v}",
        ),
        ("that have at most {v} {c}", "whose {c} is at most {v}"),
    ),
    "=": (
        (
            "with exactly {v} {c}",
            "whose {c} is {v}",
            "where {c} equals {v}",
            "with {c} = {v}",
            "with a {c} of {v}",
        ),
        ("that have exactly {v} {c}", "where {c} is equal to {v}"),
    ),
}
BETWEEN: Phrases = (
    (
        "with {c} between {v} and {u}",
        "whose {c} is between {v} and {u}",
        "with {c} from {v} to {u}",
        "where {c} is in the range {v} to {u}",
    ),
    ("that have between {v} and {u} {c}", "with {c} ranging from {v} to {u}"),
)
EQUALS: Phrases = (
    (
        "with {c} {v}",
        "where {c} is {v}",
        "whose {c} is {v}",
        "where the {c} is '{v}'",
        "with {v} as {c}",
        "that have {c} {v}",
        "with {c} = '{v}'",
    ),
    ("with {c} equal to {v}", "whose {c} is '{v}'", "having {v} as {c}"),
)
DIFFERS: Phrases = (
    (
        "where {c} is not {v}",
        "whose {c} is not {v}",
        "with {c} other than {v}",
        "where {c} differs from {v}",
    ),
    ("with a {c} different from {v}",),
)
STARTS: Phrases = (
    ("whose {c} starts with {v}", "with {c} starting with '{v}'", "where {c} begins with {v}"),
    ("with a {c} that begins with {v}",),
)
ENDS: Phrases = (
    ("whose {c} ends with {v}", "with {c} ending in '{v}'", "where {c} ends in {v}"),
    ("with a {c} that ends with {v}",),
)
HOLDS: Phrases = (
    ("whose {c} contains {v}", "with '{v}' in the {c}", "where {c} includes {v}"),
    ("with a {c} that contains {v}",),
)

# Whole questions about one number, with "have" or with the column's own verb {z} ("earn").
WHICH: dict[str, Phrases] = {
    ">": (
        (
            "Which {t} have more than {v} {c}?",
            "Which {t} have a {c} above {v}?",
            "What {t} have {c} over {v}?",
            "Do we have {t} with more than {v} {c}?",
        ),
        ("Are there {t} with more than {v} {c}?",),
    ),
    "<": (
        (
            "Which {t} have less than {v} {c}?",
            "Which {t} have a {c} below {v}?",
            "What {t} have {c} under {v}?",
            "Do we have {t} with fewer than {v} {c}?",
        ),
        ("Are there {t} with fewer than {v} {c}?",),
    ),
}
VERB: dict[str, Phrases] = {
    ">": (
        (
            "Which {t} {z} more than {v}?",
            "Show {t} that {z} more than {v}.",
            "List all {t} that {z} over {v}.",
        ),
        ("I need the {t} that {z} more than {v}.",),
    ),
    "<": (
        (
            "Which {t} {z} less than {v}?",
            "Show {t} that {z} less than {v}.",
            "List all {t} that {z} under {v}.",
        ),
        ("I need the {t} that {z} less than {v}.",),
    ),
}
ONE: Phrases = (
    (
        "Which of the {t} is the {s}?",
        "Show the one of the {t} that is {s}.",
        "What is the {s} of all {t}?",
    ),
    ("Tell me which of the {t} is the {s}.",),
)

AGGREGATES = {
    "AVG": ("average", "mean"),
    "MAX": ("maximum", "highest"),
    "MIN": ("minimum", "lowest"),
    "SUM": ("total", "sum of the"),
}
FRAGMENTS = {
    Split.TRAIN: "A|B|C|D|E|G|H|L|M|N|P|S|T|an|ca|de|el|in|la|mar|on|or|ri|st",
    Split.HELDOUT: "F|K|O|R|V|W|ba|en|gu|lo|ne|sa|ti|vo",
}
QUALIFIERS = ("old", "local", "spare", "new", "archived", "foreign", "listed", "public", "rare")
SUFFIXES = ("usd", "now", "2024", "net", "est", "value", "units", "last", "index")
PREFIXES = ("main", "first", "home", "current", "base", "second", "former", "primary", "usual")
STEPS = ((60, 1), (500, 5), (9000, 50))  # highest value, step of the round values asked for


class Question:
    """One table, one split and one random stream: the parts that every kind of query draws from."""

    def __init__(self, rng: Random, split: Split) -> None:
        self.rng, self.split = rng, split
        self.table = rng.choice(TRAIN_TABLES if split is Split.TRAIN else HELDOUT_TABLES)
        self.number, self.number2 = rng.sample(self.table.numbers, 2)
        self.text, self.text2 = rng.sample(self.table.texts, 2)
        if split is Split.TRAIN:
            self._rename()
        self.words = self.table.words

    def _rename(self) -> None:
        """Vary or make up names ("old_hotels", "broudors"), so that the schema has to be read."""
        qualifier, prefix, suffix = map(self.rng.choice, (QUALIFIERS, PREFIXES, SUFFIXES))
        draw = self.rng.random()
        if draw < 0.25:
            self.table = replace(self.table, name=f"{qualifier}_{self.table.name}")
        elif draw < 0.40:
            self.table = replace(self.table, name=f"{made_name(self.rng).lower()}s")
        draw = self.rng.random()
        if draw < 0.25:
            self.text = replace(self.text, name=f"{prefix}_{self.text.name}")
        elif draw < 0.40:
            self.text = Text(made_name(self.rng).lower(), self.text.values)
        draw = self.rng.random()
        if draw < 0.25:
            self.number = replace(self.number, name=f"{self.number.name}_{suffix}")
        elif draw < 0.40:
            made = f"{made_name(self.rng).lower()}s"
            self.number = Number(made, self.number.low, self.number.high)

    def phrase(self, phrases: Phrases) -> str:
        train, heldout = phrases
        fresh = self.split is Split.HELDOUT and self.rng.random() < 0.5
        return self.rng.choice(heldout if fresh else train)

    def value(self, number: Number) -> int:
        """A round value inside the column's range, as people ask for."""
        value = self.rng.randint(number.low, number.high)
        if number.name.startswith(("year", "vintage")):
            return value
        step = next((step for high, step in STEPS if number.high <= high), 1000)
        return max(number.low, value // step * step)

    def text_value(self, text: Text) -> str:
        if self.split is Split.TRAIN and self.rng.random() < 0.4:
            return made_name(self.rng)
        return self.rng.choice(text.values)

    def compare(self, number: Number) -> tuple[str, str]:
        sign = self.rng.choice((">", "<", ">=", ">=", "<=", "<=", "="))
        value = self.value(number)
        words = self.phrase(COMPARE[sign]).format(c=number.words, v=value)
        return words, f"{number.name} {sign} {value}"

    def between(self) -> tuple[str, str]:
        low, high = sorted((self.value(self.number), self.value(self.number)))
        high += low == high
        words = self.phrase(BETWEEN).format(c=self.number.words, v=low, u=high)
        return words, f"{self.number.name} BETWEEN {low} AND {high}"

    def equals(self, text: Text) -> tuple[str, str]:
        value = self.text_value(text)
        # Only a real value tells which column "in Lisbon" means.
        if text.link is not None and value in text.values and self.rng.random() < 0.12:
            return f"{text.link} {value}", f"{text.name} = '{value}'"
        return self.phrase(EQUALS).format(c=text.words, v=value), f"{text.name} = '{value}'"

    def differs(self) -> tuple[str, str]:
        value = self.text_value(self.text)
        words = self.phrase(DIFFERS).format(c=self.text.words, v=value)
        return words, f"{self.text.name} != '{value}'"

    def like(self) -> tuple[str, str]:
        part = self.rng.choice(FRAGMENTS[self.split].split("|"))
        phrases, pattern = self.rng.choice(
            ((STARTS, f"{part}%"), (ENDS, f"%{part}"), (HOLDS, f"%{part}%"))
        )
        column = self.rng.choice((self.text.name, self.table.title))
        words = self.phrase(phrases).format(c=column.replace("_", " "), v=part)
        return words, f"{column} LIKE '{pattern}'"

    def condition(self) -> tuple[str, str]:
        """Words and SQL of a WHERE clause: mostly one comparison, sometimes two."""
        draw = self.rng.random()
        if draw < 0.32:
            return self.compare(self.number)
        if draw < 0.56:
            return self.equals(self.text)
        if draw < 0.70:
            pair = [
                self.equals(self.text),
                self.rng.choice((self.compare(self.number), self.equals(self.text2))),
            ]
            self.rng.shuffle(pair)
            (words, sql), (words2, sql2) = pair
            return f"{words} and {words2}", f"{sql} AND {sql2}"
        return self.rng.choice((self.between, self.between, self.like, self.like, self.differs))()

    def columns(self) -> tuple[str, str]:
        """Words and SQL of one or two selected columns."""
        names = [self.table.title, self.text2.name, self.number2.name]
        picked = self.rng.sample(names, self.rng.choice((1, 1, 2)))
        return " and ".join(name.replace("_", " ") for name in picked), ", ".join(picked)

    def schema(self, sql: str) -> str:
        """Three to five columns, with all that `sql` uses, shuffled, in one of three notations."""
        columns = [
            (self.table.title, "TEXT"),
            (self.text.name, "TEXT"),
            (self.number.name, "INTEGER"),
        ]
        for name, kind in ((self.text2.name, "TEXT"), (self.number2.name, "INTEGER")):
            if name in sql or self.rng.random() < 0.4:
                columns.append((name, kind))
        self.rng.shuffle(columns)
        names = ", ".join(name for name, _ in columns)
        style = self.rng.random()
        if style < 0.6:
            typed = ", ".join(f"{name} {kind}" for name, kind in columns)
            return f"CREATE TABLE {self.table.name} ({typed})"
        if style < 0.8:
            return f"{self.table.name}({names})"
        return f"Table {self.table.name}, columns: {names}"


def ask_all(q: Question) -> tuple[str, str]:
    return q.phrase(ALL).format(t=q.words), f"SELECT * FROM {q.table.name}"


def ask_find(q: Question) -> tuple[str, str]:
    words, where = q.condition()
    return q.phrase(FIND).format(t=q.words, w=words), f"SELECT * FROM {q.table.name} WHERE {where}"


def ask_which(q: Question) -> tuple[str, str]:
    number, sign = q.number, q.rng.choice("<>")
    value = q.value(number)
    phrases = VERB if number.verb is not None and q.rng.random() < 0.6 else WHICH
    question = q.phrase(phrases[sign]).format(t=q.words, c=number.words, v=value, z=number.verb)
    return question, f"SELECT * FROM {q.table.name} WHERE {number.name} {sign} {value}"


def ask_columns(q: Question) -> tuple[str, str]:
    words, names = q.columns()
    return q.phrase(COLUMNS).format(c=words, t=q.words), f"SELECT {names} FROM {q.table.name}"


def ask_columns_find(q: Question) -> tuple[str, str]:
    words, names = q.columns()
    condition, where = q.condition()
    question = q.phrase(COLUMNS_FIND).format(c=words, t=q.words, w=condition)
    return question, f"SELECT {names} FROM {q.table.name} WHERE {where}"


def ask_count(q: Question) -> tuple[str, str]:
    if q.rng.random() < 0.3:
        return q.phrase(COUNT).format(t=q.words), f"SELECT COUNT(*) FROM {q.table.name}"
    words, where = q.condition()
    question = q.phrase(COUNT_FIND).format(t=q.words, w=words)
    return question, f"SELECT COUNT(*) FROM {q.table.name} WHERE {where}"


def ask_sorted(q: Question) -> tuple[str, str]:
    column = q.rng.choice((q.number.name, q.number.name, q.table.title))
    down = column == q.number.name and q.rng.random() < 0.5
    what, where = q.phrase(SORTED_WHAT).format(t=q.words), ""
    if q.rng.random() < 0.35:
        words, sql = q.equals(q.text)
        what, where = f"{what} {words}", f" WHERE {sql}"
    direction = q.phrase(DOWN if down else UP) if column == q.number.name else ""
    question = q.phrase(SORT).format(f=what, c=column.replace("_", " "), d=direction)
    order = f"{column} DESC" if down else column
    return question, f"SELECT * FROM {q.table.name}{where} ORDER BY {order}"


def ask_top(q: Question) -> tuple[str, str]:
    down, count = q.rng.random() < 0.6, q.rng.randint(2, 20)
    number = q.number
    superlative = number.most if down else number.least
    style = q.rng.random()
    if superlative is not None and style < 0.15:
        count = 1
        question = q.phrase(ONE).format(s=superlative, t=q.words)
    elif superlative is not None and style < 0.45:
        question = q.phrase(SUPERLATIVE).format(n=count, s=superlative, t=q.words, c=number.words)
    else:
        question = q.phrase(TOP if down else BOTTOM).format(n=count, t=q.words, c=number.words)
    order = f"{number.name} DESC" if down else number.name
    return question, f"SELECT * FROM {q.table.name} ORDER BY {order} LIMIT {count}"


def ask_aggregate(q: Question) -> tuple[str, str]:
    function = q.rng.choice(tuple(AGGREGATES))
    name = q.rng.choice(AGGREGATES[function])
    words, sql = q.number.words, f"{function}({q.number.name}) FROM {q.table.name}"
    style = q.rng.random()
    if style < 0.40:
        return q.phrase(AGGREGATE).format(a=name, c=words, t=q.words), f"SELECT {sql}"
    if style < 0.65:
        condition, where = q.equals(q.text)
        question = q.phrase(AGGREGATE_FIND).format(a=name, c=words, t=q.words, w=condition)
        return question, f"SELECT {sql} WHERE {where}"
    group = q.text
    question = q.phrase(AGGREGATE_BY).format(a=name, c=words, t=q.words, g=group.words)
    return question, f"SELECT {group.name}, {sql} GROUP BY {group.name}"


def ask_count_by(q: Question) -> tuple[str, str]:
    group = q.text
    sql = f"SELECT {group.name}, COUNT(*) FROM {q.table.name} GROUP BY {group.name}"
    return q.phrase(COUNT_BY).format(g=group.words, t=q.words), sql


def ask_distinct(q: Question) -> tuple[str, str]:
    question = q.phrase(DISTINCT).format(g=q.text.words, t=q.words)
    return question, f"SELECT DISTINCT {q.text.name} FROM {q.table.name}"


KINDS: dict[Callable[[Question], tuple[str, str]], int] = {  # kind -> weight
    ask_all: 2,
    ask_find: 7,
    ask_which: 4,
    ask_columns: 2,
    ask_columns_find: 3,
    ask_count: 4,
    ask_sorted: 5,
    ask_top: 5,
    ask_aggregate: 5,
    ask_count_by: 3,
    ask_distinct: 2,
}


def draw(rng: Random, split: Split) -> Row:
    question = Question(rng, split)
    kind = rng.choices(tuple(KINDS), tuple(KINDS.values()))[0]
    words, sql = kind(question)
    instruction = words[0].upper() + words[1:] if rng.random() < 0.8 else words
    return {"instruction": instruction, "input": question.schema(sql), "output": f"{sql};"}


if __name__ == "__main__":
    run("sql", draw)
