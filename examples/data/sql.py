"""Question + schema -> one SQL SELECT statement.

A question is composed: an opening, what to select, a condition, an order. Held-out rows use tables and columns that
training never shows, and half of their phrasings are new too.

    python examples/data/sql.py --out DIR [--train N] [--heldout N] [--seed N]
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from rows import Row, Split, run


@dataclass(frozen=True)
class Text:
    """A TEXT column: its name and values it may hold."""

    name: str
    values: tuple[str, ...]

    @property
    def words(self) -> str:
        return self.name.replace("_", " ")


@dataclass(frozen=True)
class Number:
    """An INTEGER or REAL column: its name, value range, and the words for its largest and smallest values."""

    name: str
    low: int
    high: int
    most: str | None = None
    least: str | None = None
    type: str = "INTEGER"

    @property
    def words(self) -> str:
        return self.name.replace("_", " ")


@dataclass(frozen=True)
class Table:
    """A table: its name (a plural), the column that names a row, and the columns questions are about."""

    name: str
    title: str
    texts: tuple[Text, ...]
    numbers: tuple[Number, ...]

    @property
    def words(self) -> str:
        return self.name.replace("_", " ")


def _text(name: str, values: str) -> Text:
    return Text(name, tuple(values.split("|")))


TRAIN_TABLES = (
    Table("hotels", "name", (_text("city", "Lisbon|Oslo|Kyoto|New York"), _text("chain", "Astoria|Blue Door|Hilltop")),
          (Number("stars", 1, 5), Number("rooms", 20, 400), Number("price", 40, 300, "most expensive", "cheapest"))),
    Table("books", "title", (_text("author", "Borges|Woolf|Achebe|Murakami"), _text("genre", "horror|poetry|crime|travel")),
          (Number("pages", 80, 900, "longest", "shortest"), Number("year", 1900, 2024, "newest", "oldest"))),
    Table("employees", "name", (_text("department", "sales|legal|support|research"), _text("office", "Berlin|Austin|Lyon")),
          (Number("salary", 20000, 120000, "best paid", "worst paid"), Number("age", 18, 66, "oldest", "youngest"))),
    Table("cars", "model", (_text("maker", "Fiat|Volvo|Honda|Skoda"), _text("color", "red|black|white|silver")),
          (Number("horsepower", 60, 400, "most powerful", "weakest"), Number("mileage", 1000, 200000),
           Number("price", 900, 60000, "most expensive", "cheapest"))),
    Table("students", "name", (_text("major", "physics|history|music|law"), _text("country", "Peru|Ghana|Italy|Japan")),
          (Number("grade", 1, 10, "best", "worst"), Number("credits", 10, 240), Number("age", 17, 40, "oldest", "youngest"))),
    Table("orders", "order_id", (_text("status", "open|shipped|cancelled"), _text("customer", "Acme|Nordwind|Lopez Ltd")),
          (Number("total", 5, 900, "largest", "smallest"), Number("items", 1, 30))),
    Table("films", "title", (_text("director", "Varda|Kubrick|Ozu|Leone"), _text("language", "French|Korean|English")),
          (Number("minutes", 60, 210, "longest", "shortest"), Number("rating", 1, 10, "best", "worst", "REAL"))),
    Table("cities", "name", (_text("country", "Peru|Ghana|Italy|Japan"), _text("region", "north|coast|highlands")),
          (Number("population", 5000, 9000000, "biggest", "smallest"), Number("altitude", 1, 3600, "highest", "lowest"))),
    Table("players", "name", (_text("team", "Lions|Rovers|United|Comets"), _text("position", "goalkeeper|striker|defender")),
          (Number("goals", 0, 60), Number("height", 160, 210, "tallest", "shortest"))),
    Table("recipes", "title", (_text("cuisine", "Thai|Mexican|Greek|Indian"), _text("course", "starter|main|dessert")),
          (Number("calories", 90, 1200), Number("servings", 1, 12), Number("cooking_time", 5, 180, "slowest", "quickest"))),
    Table("flights", "flight_no", (_text("airline", "Iberia|Delta|Finnair"), _text("destination", "Rome|Cairo|Tokyo|Boston")),
          (Number("seats", 50, 400), Number("delay", 0, 240), Number("duration", 40, 900, "longest", "shortest"))),
    Table("products", "name", (_text("category", "toys|garden|kitchen|audio"), _text("brand", "Zeno|Kappa|Mirel")),
          (Number("stock", 0, 500), Number("weight", 1, 90, "heaviest", "lightest"),
           Number("price", 2, 900, "most expensive", "cheapest", "REAL"))),
    Table("patients", "name", (_text("doctor", "Dr. Novak|Dr. Silva|Dr. Chen"), _text("ward", "surgery|maternity|cardiology")),
          (Number("age", 1, 95, "oldest", "youngest"), Number("visits", 1, 30))),
    Table("houses", "address", (_text("street", "Elm Street|Mill Lane|High Street"), _text("owner", "Baker|Kovacs|Diaz")),
          (Number("bedrooms", 1, 8), Number("area", 40, 500, "largest", "smallest"), Number("rent", 300, 4000))),
    Table("songs", "title", (_text("artist", "Nina Simone|Björk|Fela Kuti"), _text("album", "Homogenic|Zombie|Pastel Blues")),
          (Number("plays", 10, 90000, "most played", "least played"), Number("seconds", 60, 600, "longest", "shortest"))),
    Table("sales", "sale_id", (_text("store", "Centre|Harbour|Airport"), _text("seller", "Ines|Omar|Petra")),
          (Number("amount", 5, 2000, "largest", "smallest"), Number("discount", 0, 60))),
)

HELDOUT_TABLES = (
    Table("boats", "boat_name", (_text("harbor", "Split|Bergen|Cadiz"), _text("skipper", "Anders|Lucia|Tom")),
          (Number("cabins", 1, 9), Number("length", 5, 40, "longest", "shortest"))),
    Table("museums", "label", (_text("town", "Ghent|Porto|Leeds"), _text("theme", "trains|sculpture|science")),
          (Number("visitors", 500, 900000), Number("ticket_fee", 2, 40, "most expensive", "cheapest"))),
    Table("dogs", "nickname", (_text("breed", "beagle|poodle|collie"), _text("shelter", "Northside|Riverbank")),
          (Number("kilos", 2, 70, "heaviest", "lightest"), Number("months", 2, 180, "oldest", "youngest"))),
    Table("invoices", "invoice_no", (_text("client", "Globex|Initech|Hooli"), _text("currency", "EUR|USD|JPY")),
          (Number("balance", 10, 5000, "largest", "smallest"), Number("days_late", 0, 90))),
    Table("concerts", "headliner", (_text("venue", "Arena|Opera House|Old Barn"), _text("style", "jazz|techno|folk")),
          (Number("audience", 50, 20000, "biggest", "smallest"), Number("encores", 0, 5))),
    Table("mountains", "peak", (_text("range", "Alps|Andes|Rockies"), _text("nation", "Chile|Nepal|Austria")),
          (Number("elevation", 900, 8800, "highest", "lowest"), Number("climbers", 5, 900))),
    Table("laptops", "sku", (_text("vendor", "Lenovo|Apple|Asus"), _text("screen", "matte|glossy")),
          (Number("memory_gb", 4, 128), Number("cost", 200, 4000, "most expensive", "cheapest", "REAL"))),
)

# Phrasings. The first tuple is for training; held-out rows take from the second one half of the time.
Phrases = tuple[tuple[str, ...], tuple[str, ...]]

ALL: Phrases = (
    ("Show all {t}.", "List every row in {t}.", "Give me all the {t}.", "I want to see all {t}", "all {t}",
     "What {t} are there?", "Display the whole {t} table.", "Get all {t} please", "Return every column of all {t}."),
    ("Print all the {t}.", "Let me look at all {t}.", "Fetch every one of the {t}."),
)
FIND: Phrases = (  # + condition
    ("Show {t} {w}.", "List the {t} {w}.", "Which {t} are there {w}?", "Find all {t} {w}", "Give me every row of {t} {w}.",
     "I need a query for {t} {w}.", "get {t} {w}", "Can you show me the {t} {w}?", "Write a SQL query that lists {t} {w}.",
     "What are the {t} {w}?", "I'm looking for {t} {w}.", "{t} {w}"),
    ("Fetch the {t} {w}.", "Please find me {t} {w}.", "Tell me which {t} exist {w}.", "I would like to see {t} {w}."),
)
COLUMNS: Phrases = (
    ("Show the {c} of all {t}.", "List the {c} of every row in {t}.", "What is the {c} of the {t}?", "Give me {c} for all {t}.",
     "I only want the {c} from {t}.", "get {c} from {t}", "Select {c} of the {t}.", "Return just {c} for each of the {t}."),
    ("Print the {c} for the {t}.", "I would like the {c} of all {t}.", "Fetch {c} for every one of the {t}."),
)
COLUMNS_FIND: Phrases = (
    ("Show the {c} of {t} {w}.", "What is the {c} of the {t} {w}?", "Give me {c} for {t} {w}.", "List {c} of all {t} {w}.",
     "get the {c} of {t} {w}", "I need the {c} of {t} {w}.", "Find the {c} of every row in {t} {w}."),
    ("Print the {c} for {t} {w}.", "I would like the {c} of {t} {w}.", "Tell me the {c} of the {t} {w}."),
)
COUNT: Phrases = (
    ("How many {t} are there?", "Count the {t}.", "What is the number of {t}?", "Give me the total number of {t}.",
     "how many {t} do we have", "Number of rows in {t}?"),
    ("Tell me how many {t} there are.", "I need a count of {t}."),
)
COUNT_FIND: Phrases = (
    ("How many {t} are there {w}?", "Count the {t} {w}.", "What is the number of {t} {w}?", "how many {t} do we have {w}",
     "Give me the number of {t} {w}.", "Number of {t} {w}?"),
    ("Tell me how many {t} there are {w}.", "I need a count of {t} {w}."),
)
SORT: Phrases = (
    ("{f} sorted by {c}{d}.", "{f} ordered by {c}{d}.", "{f}, sort by {c}{d}", "{f} in order of {c}{d}.", "{f} by {c}{d}"),
    ("{f} arranged by {c}{d}.", "{f}, order them by {c}{d}."),
)
UP: Phrases = (("", " ascending", ", lowest first", " from low to high", ", smallest first"), (" in ascending order", ", from lowest to highest"))
DOWN: Phrases = ((" descending", ", highest first", " from high to low", ", largest first"), (" in descending order", ", from highest to lowest"))
SORTED_WHAT: Phrases = (("Show {t}", "List all {t}", "{t}", "Give me the {t}", "I want the {t}"), ("Print the {t}", "Fetch all {t}"))
TOP: Phrases = (
    ("Top {n} {t} by {c}.", "Show the {n} {t} with the highest {c}.", "Which {n} {t} have the most {c}?", "The {n} {t} with the largest {c}",
     "Give me the first {n} {t} by {c}, highest first."),
    ("Find the {n} {t} that have the highest {c}.", "List the top {n} {t} in terms of {c}."),
)
BOTTOM: Phrases = (
    ("Bottom {n} {t} by {c}.", "Show the {n} {t} with the lowest {c}.", "Which {n} {t} have the least {c}?", "The {n} {t} with the smallest {c}",
     "Give me the first {n} {t} by {c}, lowest first."),
    ("Find the {n} {t} that have the lowest {c}.", "List the bottom {n} {t} in terms of {c}."),
)
SUPERLATIVE: Phrases = (
    ("Show the {n} {s} {t}.", "What are the {n} {s} {t}?", "List the {n} {s} {t} by {c}.", "the {n} {s} {t}", "Which {t} are the {n} {s}?",
     "Find the {n} {s} {t}."),
    ("Tell me the {n} {s} {t}.", "I would like the {n} {s} {t}."),
)
AGGREGATE: Phrases = (
    ("What is the {a} {c} of {t}?", "Show the {a} {c} of all {t}.", "{a} {c} of the {t}", "Compute the {a} {c} for {t}.", "Find the {a} {c} in {t}.",
     "Give me the {a} {c} across all {t}."),
    ("Tell me the {a} {c} of the {t}.", "Calculate the {a} {c} over all {t}."),
)
AGGREGATE_FIND: Phrases = (
    ("What is the {a} {c} of {t} {w}?", "Show the {a} {c} of all {t} {w}.", "{a} {c} of the {t} {w}", "Compute the {a} {c} for {t} {w}.",
     "Find the {a} {c} of {t} {w}."),
    ("Tell me the {a} {c} of the {t} {w}.", "Calculate the {a} {c} over {t} {w}."),
)
COUNT_BY: Phrases = (
    ("How many {t} are there per {g}?", "Count the {t} in each {g}.", "Number of {t} by {g}", "For each {g}, how many {t} are there?",
     "Show the number of {t} for every {g}."),
    ("Tell me how many {t} each {g} has.", "Give a count of {t} grouped by {g}."),
)
AGGREGATE_BY: Phrases = (
    ("What is the {a} {c} of {t} per {g}?", "{a} {c} of {t} by {g}", "Show the {a} {c} for each {g} in {t}.", "For every {g}, give the {a} {c} of the {t}.",
     "Compute the {a} {c} of {t} for each {g}."),
    ("Tell me the {a} {c} of {t} in each {g}.", "Calculate the {a} {c} of {t} grouped by {g}."),
)
HAVING: Phrases = (
    ("Which {g} has more than {n} {t}?", "Show each {g} with more than {n} {t}.", "List every {g} that has over {n} {t}."),
    ("Find any {g} with more than {n} {t}.",),
)
DISTINCT: Phrases = (
    ("List the different {g} values of {t}.", "What are the distinct {g} values in {t}?", "Show each {g} of {t} only once.",
     "Which unique {g} values do the {t} have?", "all {g} values in {t} without duplicates"),
    ("Tell me the unique {g} values of {t}.", "Print the {g} values of {t} without repeats."),
)

# Conditions: phrasing of one comparison on a number ({c} column, {v} value) or a text column.
COMPARE: dict[str, Phrases] = {
    ">": (("with {c} above {v}", "with more than {v} {c}", "whose {c} is greater than {v}", "where {c} is over {v}", "that have more than {v} {c}",
           "with {c} > {v}", "having {c} bigger than {v}", "with {c} higher than {v}"), ("with {c} exceeding {v}", "whose {c} is above {v}")),
    "<": (("with {c} below {v}", "with less than {v} {c}", "whose {c} is less than {v}", "where {c} is under {v}", "that have fewer than {v} {c}",
           "with {c} < {v}", "having {c} smaller than {v}", "with {c} lower than {v}"), ("with {c} under {v}", "whose {c} is below {v}")),
    ">=": (("with at least {v} {c}", "with {c} of at least {v}", "whose {c} is {v} or more", "with {c} >= {v}"), ("that have at least {v} {c}", "where {c} is {v} or more")),
    "<=": (("with at most {v} {c}", "with {c} of at most {v}", "whose {c} is {v} or less", "with {c} <= {v}"), ("that have at most {v} {c}", "where {c} is {v} or less")),
    "=": (("with exactly {v} {c}", "whose {c} is {v}", "where {c} equals {v}", "with {c} = {v}", "with a {c} of {v}"), ("that have exactly {v} {c}", "where {c} is equal to {v}")),
}
BETWEEN: Phrases = (("with {c} between {v} and {u}", "whose {c} is between {v} and {u}", "with {c} from {v} to {u}", "where {c} is in the range {v} to {u}"),
                    ("that have between {v} and {u} {c}", "with {c} ranging from {v} to {u}"))
EQUALS: Phrases = (("with {c} {v}", "where {c} is {v}", "whose {c} is {v}", "where the {c} is '{v}'", "with {v} as {c}", "that have {c} {v}", "with {c} = '{v}'"),
                   ("with {c} equal to {v}", "whose {c} is '{v}'", "having {v} as {c}"))
DIFFERS: Phrases = (("where {c} is not {v}", "whose {c} is not {v}", "with {c} other than {v}", "except those with {c} {v}"), ("with a {c} different from {v}",))
EITHER: Phrases = (("with {c} {v} or {u}", "whose {c} is {v} or {u}", "where {c} is either {v} or {u}"), ("with {c} in {v} or {u}",))
STARTS: Phrases = (("whose {c} starts with {v}", "with {c} starting with '{v}'", "where {c} begins with {v}"), ("with a {c} that begins with {v}",))
ENDS: Phrases = (("whose {c} ends with {v}", "with {c} ending in '{v}'", "where {c} ends in {v}"), ("with a {c} that ends with {v}",))
HOLDS: Phrases = (("whose {c} contains {v}", "with '{v}' in the {c}", "where {c} includes {v}"), ("with a {c} that contains {v}",))
MISSING: Phrases = (("without a {c}", "where {c} is missing", "that have no {c}", "where {c} is null"), ("with a missing {c}",))

AGGREGATES = {"AVG": ("average", "mean"), "MAX": ("maximum", "highest"), "MIN": ("minimum", "lowest"), "SUM": ("total", "sum of the")}
FRAGMENTS = {Split.TRAIN: "A B C D E G H L M N P S T an ca de el in la mar on or ri st".split(),
             Split.HELDOUT: "F K O R V W ba en gu lo ne sa ti vo".split()}


class Question:
    """One table, one split and one random stream: the parts that every kind of query draws from."""

    def __init__(self, rng: Random, split: Split) -> None:
        self.rng, self.split = rng, split
        self.table = rng.choice(TRAIN_TABLES if split is Split.TRAIN else HELDOUT_TABLES)
        self.words = self.table.words
        numbers = rng.sample(self.table.numbers, 2)
        self.number, self.number2 = numbers
        self.text, self.text2 = rng.sample(self.table.texts, 2)

    def phrase(self, phrases: Phrases) -> str:
        train, heldout = phrases
        fresh = self.split is Split.HELDOUT and self.rng.random() < 0.5
        return self.rng.choice(heldout if fresh else train)

    def value(self, number: Number) -> int:
        """A round value inside the column's range, as people ask for."""
        value = self.rng.randint(number.low, number.high)
        step = 1 if number.high <= 60 else 5 if number.high <= 500 else 50 if number.high <= 9000 else 1000
        return value if "year" in number.name else max(number.low, value // step * step)

    def compare(self, number: Number) -> tuple[str, str]:
        sign = self.rng.choice((">", ">", "<", "<", ">=", "<=", "="))
        value = self.value(number)
        return self.phrase(COMPARE[sign]).format(c=number.words, v=value), f"{number.name} {sign} {value}"

    def between(self) -> tuple[str, str]:
        low, high = sorted((self.value(self.number), self.value(self.number)))
        high += low == high
        words = self.phrase(BETWEEN).format(c=self.number.words, v=low, u=high)
        return words, f"{self.number.name} BETWEEN {low} AND {high}"

    def equals(self, text: Text) -> tuple[str, str]:
        value = self.rng.choice(text.values)
        return self.phrase(EQUALS).format(c=text.words, v=value), f"{text.name} = '{value}'"

    def differs(self) -> tuple[str, str]:
        value = self.rng.choice(self.text.values)
        return self.phrase(DIFFERS).format(c=self.text.words, v=value), f"{self.text.name} != '{value}'"

    def either(self) -> tuple[str, str]:
        first, second = self.rng.sample(self.text.values, 2)
        words = self.phrase(EITHER).format(c=self.text.words, v=first, u=second)
        return words, f"{self.text.name} IN ('{first}', '{second}')"

    def like(self) -> tuple[str, str]:
        part = self.rng.choice(FRAGMENTS[self.split])
        phrases, pattern = self.rng.choice(((STARTS, f"{part}%"), (ENDS, f"%{part}"), (HOLDS, f"%{part}%")))
        column = self.rng.choice((self.text.name, self.table.title))
        return self.phrase(phrases).format(c=column.replace("_", " "), v=part), f"{column} LIKE '{pattern}'"

    def missing(self) -> tuple[str, str]:
        column = self.rng.choice((self.text.name, self.number.name))
        return self.phrase(MISSING).format(c=column.replace("_", " ")), f"{column} IS NULL"

    def condition(self) -> tuple[str, str]:
        """Words and SQL of a WHERE clause: mostly one comparison, sometimes two."""
        draw = self.rng.random()
        if draw < 0.30:
            return self.compare(self.number)
        if draw < 0.52:
            return self.equals(self.text)
        if draw < 0.72:
            pair = [self.equals(self.text), self.rng.choice((self.compare(self.number), self.equals(self.text2)))]
            self.rng.shuffle(pair)
            (words, sql), (words2, sql2) = pair
            joiner, sign = self.rng.choice((("and", "AND"), ("and", "AND"), ("or", "OR")))
            return f"{words} {joiner} {words2}", f"{sql} {sign} {sql2}"
        return self.rng.choice((self.between, self.like, self.differs, self.either, self.missing))()

    def columns(self) -> tuple[str, str]:
        """Words and SQL of one or two selected columns."""
        names = [self.table.title, self.text2.name, self.number2.name]
        picked = self.rng.sample(names, self.rng.choice((1, 1, 2)))
        return " and ".join(name.replace("_", " ") for name in picked), ", ".join(picked)

    def schema(self) -> str:
        """The table's columns in random order, in one of three notations."""
        columns = [(self.table.title, "TEXT"), (self.text.name, "TEXT"), (self.text2.name, "TEXT"),
                   (self.number.name, self.number.type), (self.number2.name, self.number2.type)]
        self.rng.shuffle(columns)
        names = ", ".join(name for name, _ in columns)
        style = self.rng.random()
        if style < 0.6:
            return f"CREATE TABLE {self.table.name} ({', '.join(f'{name} {kind}' for name, kind in columns)})"
        return f"{self.table.name}({names})" if style < 0.8 else f"Table {self.table.name}, columns: {names}"


def ask_all(q: Question) -> tuple[str, str]:
    return q.phrase(ALL).format(t=q.words), f"SELECT * FROM {q.table.name}"


def ask_find(q: Question) -> tuple[str, str]:
    words, where = q.condition()
    return q.phrase(FIND).format(t=q.words, w=words), f"SELECT * FROM {q.table.name} WHERE {where}"


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
    return q.phrase(COUNT_FIND).format(t=q.words, w=words), f"SELECT COUNT(*) FROM {q.table.name} WHERE {where}"


def ask_sorted(q: Question) -> tuple[str, str]:
    column = q.rng.choice((q.number.name, q.number.name, q.table.title))
    down = column == q.number.name and q.rng.random() < 0.5
    what, where = q.phrase(SORTED_WHAT).format(t=q.words), ""
    if q.rng.random() < 0.35:
        words, sql = q.equals(q.text)
        what, where = f"{what} {words}", f" WHERE {sql}"
    direction = q.phrase(DOWN if down else UP) if column == q.number.name else ""
    question = q.phrase(SORT).format(f=what, c=column.replace("_", " "), d=direction)
    return question, f"SELECT * FROM {q.table.name}{where} ORDER BY {column}{' DESC' if down else ''}"


def ask_top(q: Question) -> tuple[str, str]:
    down, count = q.rng.random() < 0.6, q.rng.randint(2, 20)
    number = q.number
    superlative = number.most if down else number.least
    if superlative is not None and q.rng.random() < 0.5:
        question = q.phrase(SUPERLATIVE).format(n=count, s=superlative, t=q.words, c=number.words)
        if number.name == "year":
            down = superlative == "newest"
    else:
        question = q.phrase(TOP if down else BOTTOM).format(n=count, t=q.words, c=number.words)
    return question, f"SELECT * FROM {q.table.name} ORDER BY {number.name}{' DESC' if down else ''} LIMIT {count}"


def ask_aggregate(q: Question) -> tuple[str, str]:
    function = q.rng.choice(tuple(AGGREGATES))
    name = q.rng.choice(AGGREGATES[function])
    words, sql = q.number.words, f"SELECT {function}({q.number.name})"
    style = q.rng.random()
    if style < 0.35:
        return q.phrase(AGGREGATE).format(a=name, c=words, t=q.words), f"{sql} FROM {q.table.name}"
    if style < 0.65:
        condition, where = q.equals(q.text)
        question = q.phrase(AGGREGATE_FIND).format(a=name, c=words, t=q.words, w=condition)
        return question, f"{sql} FROM {q.table.name} WHERE {where}"
    group = q.text
    question = q.phrase(AGGREGATE_BY).format(a=name, c=words, t=q.words, g=group.words)
    return question, f"SELECT {group.name}, {function}({q.number.name}) FROM {q.table.name} GROUP BY {group.name}"


def ask_count_by(q: Question) -> tuple[str, str]:
    group = q.text
    sql = f"SELECT {group.name}, COUNT(*) FROM {q.table.name} GROUP BY {group.name}"
    if q.rng.random() < 0.35:
        limit = q.rng.randint(2, 50)
        return q.phrase(HAVING).format(g=group.words, n=limit, t=q.words), f"{sql} HAVING COUNT(*) > {limit}"
    return q.phrase(COUNT_BY).format(g=group.words, t=q.words), sql


def ask_distinct(q: Question) -> tuple[str, str]:
    return q.phrase(DISTINCT).format(g=q.text.words, t=q.words), f"SELECT DISTINCT {q.text.name} FROM {q.table.name}"


KINDS: dict[Callable[[Question], tuple[str, str]], int] = {
    ask_all: 2, ask_find: 8, ask_columns: 2, ask_columns_find: 4, ask_count: 4, ask_sorted: 4, ask_top: 5,
    ask_aggregate: 5, ask_count_by: 3, ask_distinct: 1,
}  # kind -> weight


def draw(rng: Random, split: Split) -> Row:
    question = Question(rng, split)
    kind = rng.choices(tuple(KINDS), tuple(KINDS.values()))[0]
    words, sql = kind(question)
    return {"instruction": words[0].upper() + words[1:] if rng.random() < 0.8 else words, "input": question.schema(), "output": f"{sql};"}


if __name__ == "__main__":
    run("sql", draw)
