"""Exact match of answers."""


def after_trigger(text: str, trigger: str) -> str:
    """Return what follows the last trigger in a text, such as "the correct answer is".

    Without a trigger in the text, or with an empty trigger, this is the whole text. White space at
    the ends of the trigger does not count.
    """
    words = trigger.strip()
    return text.rpartition(words)[2] if words else text


def exact_match(text: str, right: str) -> bool:
    """Return whether a text is the right answer, apart from white space at its ends."""
    return text.strip() == right.strip()
