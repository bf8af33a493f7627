"""Text out of tokens, one at a time: nothing lost, nothing early, nothing held for long."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.convert_slow_tokenizer import bytes_to_unicode

from neuroada_serve.engine.detokenizer import Detokenizer, _StopString
from neuroada_serve.request import MAX_STOP_CHARS
from tests.support.tiny import tiny_tokenizer


class PieceTokenizer:
    """Each id is a piece of bytes; the last id is a special token."""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = list(pieces)

    def decode(self, ids, skip_special_tokens=True) -> str:
        special = b"" if skip_special_tokens else b"<end>"
        pieces = [self.pieces[i] if i < len(self.pieces) else special for i in ids]
        return b"".join(pieces).decode("utf-8", errors="replace")


class SpaceTokenizer:
    """Like SentencePiece: words carry their space in front, and decoding drops the first one."""

    words = (" Hello", " world", ",", " again")

    def decode(self, ids, skip_special_tokens=True) -> str:
        return "".join(self.words[i] for i in ids).removeprefix(" ")


BYTES = PieceTokenizer(*(bytes([i]) for i in range(256)))


def pieces_of(text: str, *sizes: int) -> list[bytes]:
    """The text's bytes in pieces of these sizes, the rest one by one."""
    data, pieces = text.encode(), []
    for size in sizes:
        pieces.append(data[:size])
        data = data[size:]
    return pieces + [data[i : i + 1] for i in range(len(data))]


def run(detokenizer: Detokenizer, ids, may_stop=lambda n: True) -> list[str]:
    """Return the text after each token, and at the end, as the engine asks for it."""
    given_out = []
    for n, token_id in enumerate(ids):
        if detokenizer.add(token_id, may_stop(n)):
            return [*given_out, detokenizer.take(final=True)]
        given_out.append(detokenizer.take(final=False))
    return [*given_out, detokenizer.take(final=True)]


# --- characters ------------------------------------------------------------------------------


def test_character_comes_out_with_its_last_byte():
    assert run(Detokenizer(BYTES, []), "aé€😀z".encode()) == [
        *("a", "", "é", "", "", "€", "", "", "", "😀", "z", "")
    ]


def test_unfinished_character_comes_out_at_the_end():
    assert run(Detokenizer(BYTES, []), b"ab\xf0\x9f") == ["a", "b", "", "", "�"]


def test_character_in_pieces_with_its_neighbours():
    tokenizer = PieceTokenizer(b"x\xf0", b"\x9f\x98", b"\x80y", b"\xe2\x82", b"\xac")
    assert run(Detokenizer(tokenizer, []), range(5)) == ["", "", "x😀y", "", "€", ""]


def test_genuine_replacement_character_waits_for_the_next_token():
    assert "".join(run(Detokenizer(BYTES, []), "a\ufffdb\ufffd".encode())) == "a\ufffdb\ufffd"


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.binary(min_size=1, max_size=4), max_size=30), st.text("ab ", max_size=9))
def test_given_texts_join_to_the_whole(pieces, prompt):
    tokenizer = PieceTokenizer(*pieces, prompt.encode() or b" ")
    ids, prompt_ids = list(range(len(pieces))), [len(pieces)]
    whole = tokenizer.decode(prompt_ids + ids)
    texts = run(Detokenizer(tokenizer, prompt_ids), ids)
    assert "".join(texts) == whole[len(tokenizer.decode(prompt_ids)) :]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 259), max_size=24), st.booleans())
def test_given_texts_join_to_what_a_real_tokenizer_decodes(ids, skip):
    detokenizer = Detokenizer(TINY, TINY("Hello")["input_ids"], skip_special_tokens=skip)
    assert "".join(run(detokenizer, ids)) == TINY.decode(ids, skip_special_tokens=skip)


TINY = tiny_tokenizer()
BYTE_TOKENS = bytes_to_unicode()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.text(max_size=20), st.lists(st.integers(1, 5), max_size=6))
def test_whole_characters_are_never_held(text, sizes):
    """After each token everything up to the last unfinished character has been given out."""
    pieces = [piece for piece in pieces_of(text, *sizes) if piece]
    detokenizer = Detokenizer(PieceTokenizer(*pieces), [])
    given_out = ""
    for i in range(len(pieces)):
        detokenizer.add(i)
        given_out += detokenizer.take(final=False)
        whole = b"".join(pieces[: i + 1]).decode("utf-8", errors="replace")
        assert given_out == whole or whole.endswith("�")


def test_long_answer_is_decoded_in_small_parts():
    """Work per token does not grow with the answer."""
    lengths = []

    class Counting(PieceTokenizer):
        def decode(self, ids, skip_special_tokens=True):
            lengths.append(len(ids))
            return super().decode(ids, skip_special_tokens)

    run(Detokenizer(Counting(b"word "), [0] * 500), [0] * 2000)
    assert max(lengths) <= 8


def decoded_lengths(pieces: list[bytes], ids) -> tuple[list[int], str]:
    """Return how many tokens each decoding looked at, and the text."""
    lengths = []

    class Counting(PieceTokenizer):
        def decode(self, ids, skip_special_tokens=True):
            lengths.append(len(ids))
            return super().decode(ids, skip_special_tokens)

    return lengths, "".join(run(Detokenizer(Counting(*pieces), []), ids))


@pytest.mark.parametrize("piece", [b"\x80", b"\xf0", b"\xf0\x9f", b"\xff\xfe"])
def test_answer_of_bytes_that_make_no_character_is_decoded_in_small_parts(piece):
    lengths, text = decoded_lengths([piece, b"a"], [0] * 500 + [1])
    assert max(lengths) <= 40
    assert text == (piece * 500 + b"a").decode("utf-8", errors="replace")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(list("é€😀".encode()) + [65]), min_size=30, max_size=150))
def test_any_bytes_join_to_the_whole(ids):
    text = bytes(ids).decode(errors="replace")
    assert "".join(run(Detokenizer(BYTES, []), ids)) == text
    tiny_ids = TINY.convert_tokens_to_ids([BYTE_TOKENS[i] for i in ids])
    assert "".join(run(Detokenizer(TINY, []), tiny_ids)) == text


# --- spaces and special tokens ---------------------------------------------------------------


def test_first_space_of_the_answer_stays_behind_a_prompt():
    assert run(Detokenizer(SpaceTokenizer(), [0, 2]), [1, 2, 3]) == [" world", ",", " again", ""]


def test_special_tokens_are_skipped_or_shown():
    tokenizer = PieceTokenizer(b"a", b"b")
    assert run(Detokenizer(tokenizer, []), [0, 2, 1]) == ["a", "", "b", ""]
    shown = Detokenizer(tokenizer, [], skip_special_tokens=False)
    assert run(shown, [0, 2, 1]) == ["a", "<end>", "b", ""]


def test_special_token_inside_a_character_is_skipped():
    tokenizer = PieceTokenizer(b"\xc3", b"\xa9")
    assert run(Detokenizer(tokenizer, []), [0, 2, 1]) == ["", "", "é", ""]


# --- stop strings ----------------------------------------------------------------------------


def stopped(text: str, *stops: str, sizes=(), **options) -> tuple[list[str], str | None]:
    pieces = pieces_of(text, *sizes)
    detokenizer = Detokenizer(PieceTokenizer(*pieces), [], stops, **options)
    return run(detokenizer, range(len(pieces))), detokenizer.stop_reason


def test_stop_string_over_several_tokens_is_cut():
    assert stopped("Hi ENDmore", "END") == (["H", "i", " ", "", "", ""], "END")
    assert stopped("Hi ENDmore", "END", sizes=(4, 4)) == (["Hi ", ""], "END")


def test_beginning_of_a_stop_string_is_given_out_once_it_is_none():
    assert stopped("aENbEc", "END") == (["a", "", "", "ENb", "", "Ec", ""], None)


def test_stop_string_that_restarts_within_itself():
    assert stopped("aaab", "aab") == (["", "", "a", ""], "aab")


def test_unfinished_stop_string_is_given_out_at_the_end():
    assert stopped("xEN", "END") == (["x", "", "", "EN"], None)


def test_include_stop_keeps_the_stop_string_but_nothing_behind_it():
    assert stopped("Hi ENDmore", "END", sizes=(5, 5), include_stop=True) == (
        ["Hi ", "ENDm"[:3]],
        "END",
    )


def test_first_of_several_stop_strings_wins():
    assert stopped("one two three", "three", "two", sizes=(13,)) == (["one "], "two")
    assert stopped("one two three", "three", "two")[1] == "two"


def test_stop_string_of_characters_of_several_bytes():
    texts, reason = stopped("día€fin", "€")
    assert ("".join(texts), reason) == ("día", "€")


def test_stop_string_at_the_very_beginning_gives_no_text():
    assert stopped("\n\nHi", "\n\n") == (["", ""], "\n\n")


def test_stop_string_in_the_prompt_does_not_count():
    detokenizer = Detokenizer(PieceTokenizer(b"EN", b"D!", b"END"), [2, 0], ("END",))
    assert run(detokenizer, [1]) == ["D!", ""]


def test_stop_strings_do_not_count_before_they_may():
    pieces = PieceTokenizer(b"END ", b"and END", b" x")
    detokenizer = Detokenizer(pieces, [], ("END",))
    texts = run(detokenizer, [0, 1, 2], may_stop=lambda n: n >= 1)
    assert ("".join(texts), detokenizer.stop_reason) == ("END and ", "END")


def test_stop_string_before_an_unfinished_character_still_stops():
    """The text is cut at the stop string although the token behind it is only half there."""
    detokenizer = Detokenizer(PieceTokenizer(b"a", b"END\xe2", b"\x82\xac"), [], ("END",))
    assert "".join(run(detokenizer, [0, 1])) == "a"


def first_stop(pieces: list[str], stops: list[str], include: bool) -> tuple[str, str | None]:
    """The definition: after each piece, the stop string that begins first ends the text."""
    text = ""
    for piece in pieces:
        text += piece
        found = [(text.find(stop), stop) for stop in stops if stop in text]
        if found:
            at, stop = min(found)
            return text[: at + len(stop) if include else at], stop
    return text, None


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.lists(st.text("abé", min_size=1, max_size=4), max_size=15),
    st.lists(st.text("abé", min_size=1, max_size=5), max_size=3),
    st.booleans(),
)
def test_text_ends_at_the_first_stop_string(pieces, stops, include):
    tokenizer = PieceTokenizer(*(piece.encode() for piece in pieces))
    detokenizer = Detokenizer(tokenizer, [], tuple(stops), include)
    texts = run(detokenizer, range(len(pieces)))
    assert ("".join(texts), detokenizer.stop_reason) == first_stop(pieces, stops, include)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(st.text("ab", min_size=1, max_size=3), max_size=15),
    st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=3),
)
def test_only_a_possible_stop_string_is_held_and_no_longer(pieces, stops):
    tokenizer = PieceTokenizer(*(piece.encode() for piece in pieces))
    detokenizer = Detokenizer(tokenizer, [], tuple(stops))
    text, given_out = "", ""
    for i, piece in enumerate(pieces):
        text += piece
        if detokenizer.add(i):
            return
        given_out += detokenizer.take(final=False)
        assert text.startswith(given_out)
        held = text[len(given_out) :]
        longest = max(
            (n for stop in stops for n in range(len(stop)) if text.endswith(stop[:n])), default=0
        )
        assert len(held) == longest


def test_long_stop_string_that_almost_comes_again_and_again():
    stop = "a" * 500 + "b"
    texts, reason = stopped("a" * 1500 + "c" + "a" * 600 + "bz", stop)
    assert ("".join(texts), reason) == ("a" * 1500 + "c" + "a" * 100, stop)


def test_stop_strings_cost_the_same_however_long_text_and_strings_are(monkeypatch):
    """Steps back in a stop string are at most as many as characters were read; text that is given
    out is not kept."""
    steps = []
    shorter = _StopString._shorter
    monkeypatch.setattr(_StopString, "_shorter", lambda self: steps.append(1) or shorter(self))
    stops = tuple("ab" * (500 + i) + "c" for i in range(16))
    detokenizer = Detokenizer(PieceTokenizer(b"ab", b"abab", b"x"), [], stops)
    for i in range(4000):
        detokenizer.add(i % 7 % 3)
        detokenizer.take(final=False)
        assert len(detokenizer._text) <= MAX_STOP_CHARS + 4
        assert len(detokenizer._ids) <= 8
    assert len(steps) <= 16 * 4 * 4000


def test_stop_string_makes_no_table_before_it_is_met():
    stop = _StopString("ab" * 512)
    assert stop.read("xyz" * 100) is None
    assert len(stop._borders) == 1
