"""The prefix cache, against a dictionary of what each block's place holds."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from neuroada_serve.engine.prefix_cache import BLOCK_TOKENS, PrefixCache, prefix_root

ROOT = prefix_root("base", None, "")


def blocks(text: str, tail: int = 1) -> list[int]:
    """Tokens of one block per letter, and a few more."""
    return [ord(letter) for letter in text for _ in range(BLOCK_TOKENS)] + [0] * tail


def find(cache: PrefixCache, text: str, tail: int = 1, root: bytes = ROOT) -> list[int]:
    """Return what is found, and release it."""
    numbers = cache.find(root, blocks(text, tail))
    cache.release(root, blocks(text, tail), len(numbers))
    return numbers


# --- what is found ---------------------------------------------------------------------------


def test_kept_beginning_is_found():
    cache = PrefixCache(8)
    kept = cache.keep(ROOT, blocks("abc"))
    assert [place for place, _ in kept] == [0, 1, 2]
    assert find(cache, "abc") == [number for _, number in kept]


def test_longest_beginning_is_found():
    cache = PrefixCache(8)
    kept = [number for _, number in cache.keep(ROOT, blocks("abcd"))]
    assert find(cache, "abcdef") == kept
    assert find(cache, "abxd") == kept[:2]
    assert find(cache, "xbcd") == []


def test_tokens_count_by_their_position():
    cache = PrefixCache(8)
    cache.keep(ROOT, blocks("ab"))
    assert find(cache, "ba") == []
    assert find(cache, "b") == []


@pytest.mark.parametrize("place", [0, 1, BLOCK_TOKENS - 1, BLOCK_TOKENS, 2 * BLOCK_TOKENS - 1])
def test_one_other_token_ends_the_hit_at_its_block(place):
    cache = PrefixCache(8)
    kept = [number for _, number in cache.keep(ROOT, blocks("abc"))]
    ids = blocks("abc")
    ids[place] += 1
    assert cache.find(ROOT, ids) == kept[: place // BLOCK_TOKENS]


def test_only_whole_blocks_are_kept():
    cache = PrefixCache(8)
    assert cache.keep(ROOT, blocks("", tail=BLOCK_TOKENS - 1)) == []
    assert len(cache.keep(ROOT, blocks("a", tail=BLOCK_TOKENS - 1))) == 1
    assert len(cache) == 1


def test_at_least_one_token_is_left_to_compute():
    cache = PrefixCache(8)
    cache.keep(ROOT, blocks("abc"))
    assert len(find(cache, "abc", tail=0)) == 2
    assert len(find(cache, "abc", tail=1)) == 3
    assert find(cache, "a", tail=0) == []
    assert cache.find(ROOT, []) == []


@pytest.mark.parametrize(
    "other",
    [
        ("other", "sql", "salt"),
        ("base", "json", "salt"),
        ("base", None, "salt"),
        ("base", "sql", "pepper"),
        ("base", "sql", ""),
    ],
)
def test_same_tokens_of_another_root_are_never_found(other):
    """Another base, adapter version or salt."""
    root, cache = prefix_root("base", "sql", "salt"), PrefixCache(8)
    cache.keep(root, blocks("ab"))
    assert find(cache, "ab", root=prefix_root(*other)) == []
    assert len(cache.keep(prefix_root(*other), blocks("ab"))) == 2
    assert len(find(cache, "ab", root=root)) == 2


def test_roots_differ_however_their_parts_are_split():
    said = ["", "a", "b", "a b", "1 a", "base", "0 ", " "]
    roots = [prefix_root(f, d, s) for f in ("f", "g") for d in (None, "d", "e") for s in said]
    assert len(set(roots)) == len(roots)


def test_hits_are_counted_in_tokens():
    cache = PrefixCache(8)
    cache.keep(ROOT, blocks("ab"))
    find(cache, "abc")
    find(cache, "x")
    assert cache.num_queries == 4 * BLOCK_TOKENS + 2
    assert cache.num_hits == 2 * BLOCK_TOKENS


# --- what is kept ----------------------------------------------------------------------------


def test_keep_returns_only_what_is_new():
    cache = PrefixCache(8)
    first = cache.keep(ROOT, blocks("ab"))
    second = cache.keep(ROOT, blocks("abcd"))
    assert [place for place, _ in second] == [2, 3]
    assert cache.keep(ROOT, blocks("abcd")) == []
    assert len({number for _, number in first + second}) == 4


def test_longest_unused_goes_first():
    cache = PrefixCache(3)
    for text in "abc":
        cache.keep(ROOT, blocks(text))
    find(cache, "a")
    cache.keep(ROOT, blocks("d"))
    assert [text for text in "abcd" if find(cache, text)] == ["a", "c", "d"]
    assert cache.num_evictions == 1


def test_kept_again_is_used_again():
    cache = PrefixCache(2)
    for text in ("a", "b", "a", "c"):
        cache.keep(ROOT, blocks(text))
    assert [text for text in "abc" if find(cache, text)] == ["a", "c"]


def test_ends_of_chains_go_before_their_beginnings():
    cache = PrefixCache(4)
    kept = [number for _, number in cache.keep(ROOT, blocks("abcd"))]
    for text, left in (("x", 3), ("xy", 2), ("xyz", 1)):
        cache.keep(ROOT, blocks(text))
        assert find(cache, "abcd") == kept[:left]


def test_common_beginning_outlives_its_ends():
    cache = PrefixCache(4)
    cache.keep(ROOT, blocks("abc"))
    cache.keep(ROOT, blocks("abd"))
    cache.keep(ROOT, blocks("x"))
    assert len(find(cache, "abc")) == 2
    assert len(find(cache, "abd")) == 3


def test_blocks_with_readers_stay():
    cache = PrefixCache(2)
    (number,) = [number for _, number in cache.keep(ROOT, blocks("a"))]
    assert cache.find(ROOT, blocks("a")) == [number]
    for text in "bcd":
        cache.keep(ROOT, blocks(text))
    assert find(cache, "a") == [number]
    cache.release(ROOT, blocks("a"), 1)
    cache.keep(ROOT, blocks("ef"))
    assert find(cache, "a") == []


def test_every_reader_counts():
    cache = PrefixCache(1)
    cache.keep(ROOT, blocks("a"))
    for _ in range(2):
        cache.find(ROOT, blocks("a"))
    cache.release(ROOT, blocks("a"), 1)
    assert cache.keep(ROOT, blocks("b")) == []
    cache.release(ROOT, blocks("a"), 1)
    assert len(cache.keep(ROOT, blocks("b"))) == 1


def test_full_of_blocks_with_readers_keep_stops_early():
    cache = PrefixCache(4)
    cache.keep(ROOT, blocks("abc"))
    cache.find(ROOT, blocks("abc"))
    kept = cache.keep(ROOT, blocks("xyz"))
    assert [place for place, _ in kept] == [0]
    assert len(find(cache, "xyz")) == 1
    assert len(find(cache, "abc")) == 3


def test_chain_longer_than_the_cache_keeps_its_beginning():
    cache = PrefixCache(3)
    cache.keep(ROOT, blocks("zz"))
    assert [place for place, _ in cache.keep(ROOT, blocks("abcdef"))] == [0, 1, 2]
    assert len(find(cache, "abcdef")) == 3


def test_cache_without_room_finds_and_keeps_nothing():
    cache = PrefixCache(0)
    assert cache.keep(ROOT, blocks("ab")) == []
    assert find(cache, "ab") == []


# --- any use ---------------------------------------------------------------------------------

texts = st.text("ab", max_size=5)
roots = st.sampled_from([prefix_root("base", digest, "") for digest in (None, "sql")])


class PrefixCacheMachine(RuleBasedStateMachine):
    """Finds, copies still under way, and keeps; `contents` is what was written to each number."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = PrefixCache(6)
        self.contents: dict[int, tuple[bytes, str]] = {}
        self.reading: list[tuple[bytes, str, list[int]]] = []

    @rule(root=roots, text=texts, tail=st.integers(0, 2))
    def find(self, root: bytes, text: str, tail: int) -> None:
        numbers = self.cache.find(root, blocks(text, tail))
        usable = text if tail else text[:-1]
        assert numbers == self.known(root, usable)
        self.reading.append((root, text, numbers))

    @precondition(lambda self: self.reading)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        which = data.draw(st.integers(0, len(self.reading) - 1))
        root, text, numbers = self.reading.pop(which)
        self.cache.release(root, blocks(text), len(numbers))

    @rule(root=roots, text=texts)
    def keep(self, root: bytes, text: str) -> None:
        before = len(self.known(root, text))
        new = self.cache.keep(root, blocks(text))
        assert [place for place, _ in new] == list(range(before, before + len(new)))
        held = self.held()
        for place, number in new:
            assert number not in held
            self.contents[number] = (root, text[: place + 1])
        if before + len(new) < len(text):  # there was no room that could be had
            own = {number for number, kept in self.contents.items() if is_in(kept, root, text)}
            assert len(self.contents) == self.cache.num_blocks
            assert self.contents.keys() <= held | own

    @invariant()
    def no_more_than_there_is_room_for(self) -> None:
        assert len(self.cache) == len(self.contents) <= self.cache.num_blocks

    @invariant()
    def no_block_lacks_its_beginning(self) -> None:
        kept = set(self.contents.values())
        assert len(kept) == len(self.contents)
        assert all(len(text) == 1 or (root, text[:-1]) in kept for root, text in kept)

    @invariant()
    def what_is_read_stays_what_it_was(self) -> None:
        for root, text, numbers in self.reading:
            for place, number in enumerate(numbers):
                assert self.contents[number] == (root, text[: place + 1])

    def known(self, root: bytes, text: str) -> list[int]:
        """Numbers of the longest beginning that is kept."""
        numbers = {kept: number for number, kept in self.contents.items()}
        found = []
        for stop in range(1, len(text) + 1):
            if (root, text[:stop]) not in numbers:
                break
            found.append(numbers[root, text[:stop]])
        return found

    def held(self) -> set[int]:
        return {number for _, _, numbers in self.reading for number in numbers}


def is_in(kept: tuple[bytes, str], root: bytes, text: str) -> bool:
    return kept[0] == root and text.startswith(kept[1])


PrefixCacheMachine.TestCase.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None, derandomize=True
)
TestPrefixCache = PrefixCacheMachine.TestCase
