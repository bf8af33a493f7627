"""Answers that must be right to the letter."""


def after_trigger(text: str, trigger: str) -> str:
    """What follows the last "the correct answer is" of a text, or whatever the trigger is.

    Where the text lacks it, or the trigger is empty, this is the whole text. White space at the
    ends of the trigger does not count.
    """
    words = trigger.strip()
    return text.rpartition(words)[2] if words else text


def exact_match(text: str, right: str) -> bool:
    """Whether a text is the right answer, but for white space at its ends."""
    return text.strip() == right.strip()
