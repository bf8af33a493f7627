"""The block manager: which blocks are in use, and what the known ones hold."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from neuroada_serve.engine.block_manager import BlockManager, chain_key, prefix_root

ROOT = prefix_root("base", None, "")
SIZE = 4  # tokens of a block


def tokens(text: str) -> list[int]:
    """Tokens of one block per letter."""
    return [ord(letter) for letter in text for _ in range(SIZE)]


def chain(ids: list[int], root: bytes = ROOT) -> list[bytes]:
    """Return what comes before each block of these tokens, and the key of the last one."""
    keys = [root]
    for start in range(0, len(ids), SIZE):
        keys.append(chain_key(keys[-1], ids[start : start + SIZE]))
    return keys


def find(blocks: BlockManager, text: str, root: bytes = ROOT) -> list[int]:
    """Return the known blocks of the longest beginning of a text."""
    found = []
    for key in chain(tokens(text), root)[1:]:
        if (number := blocks.find(key)) is None:
            break
        found.append(number)
    return found


def fill(blocks: BlockManager, text: str, root: bytes = ROOT) -> list[int]:
    """Do what a sequence does: share the known beginning, compute the rest, make it findable."""
    numbers = find(blocks, text, root)
    blocks.share(numbers)
    new = blocks.allocate(len(text) - len(numbers))
    assert new is not None
    numbers += new
    for number, letter, parent in zip(numbers, text, chain(tokens(text), root), strict=False):
        blocks.register(number, parent, tokens(letter))
    return numbers


def keep(blocks: BlockManager, text: str, root: bytes = ROOT) -> list[int]:
    """Fill blocks, and release them."""
    numbers = fill(blocks, text, root)
    blocks.release(numbers)
    return numbers


# --- use -------------------------------------------------------------------------------------


def test_allocated_blocks_are_different_and_in_use():
    blocks = BlockManager(3, SIZE)
    first, second = blocks.allocate(1), blocks.allocate(2)
    assert sorted([*first, *second]) == [0, 1, 2]
    assert (blocks.num_used, blocks.num_free, blocks.num_idle) == (3, 0, 0)


def test_none_is_allocated_where_not_all_can_be():
    blocks = BlockManager(3, SIZE)
    keep(blocks, "a")
    used = blocks.allocate(1)
    assert blocks.allocate(3) is None
    assert len(find(blocks, "a")) == 1
    assert blocks.num_free == 2
    blocks.release(used)
    assert len(blocks.allocate(3)) == 3


def test_every_user_counts():
    blocks = BlockManager(1, SIZE)
    numbers = blocks.allocate(1)
    blocks.share(numbers)
    assert blocks.is_shared(numbers[0])
    assert blocks.num_shared == 1
    blocks.release(numbers)
    assert not blocks.is_shared(numbers[0])
    assert blocks.allocate(1) is None
    blocks.release(numbers)
    assert blocks.allocate(1) == numbers


def test_known_block_without_a_user_is_idle_until_it_is_shared():
    blocks = BlockManager(2, SIZE)
    (number,) = keep(blocks, "a")
    assert blocks.is_idle(number)
    assert (blocks.num_used, blocks.num_free, blocks.num_idle) == (0, 2, 1)
    blocks.share([number])
    assert not blocks.is_idle(number)
    assert (blocks.num_used, blocks.num_free, blocks.num_idle) == (1, 1, 0)


def test_unknown_block_without_a_user_is_free():
    blocks = BlockManager(2, SIZE)
    blocks.release(blocks.allocate(2))
    assert (blocks.num_used, blocks.num_free, blocks.num_idle) == (0, 2, 0)


# --- what is found ---------------------------------------------------------------------------


def test_filled_beginning_is_found_while_in_use_and_after():
    blocks = BlockManager(8, SIZE)
    numbers = fill(blocks, "abc")
    assert find(blocks, "abc") == numbers
    blocks.release(numbers)
    assert find(blocks, "abc") == numbers


def test_longest_beginning_is_found():
    blocks = BlockManager(8, SIZE)
    numbers = keep(blocks, "abcd")
    assert find(blocks, "abcdef") == numbers
    assert find(blocks, "abxd") == numbers[:2]
    assert find(blocks, "xbcd") == []


def test_tokens_count_by_their_position():
    blocks = BlockManager(8, SIZE)
    keep(blocks, "ab")
    assert find(blocks, "ba") == []
    assert find(blocks, "b") == []


@pytest.mark.parametrize("place", [0, 1, SIZE - 1, SIZE, 2 * SIZE - 1, 2 * SIZE])
def test_one_other_token_ends_the_hit_at_its_block(place):
    blocks = BlockManager(8, SIZE)
    numbers = keep(blocks, "abc")
    ids = tokens("abc")
    ids[place] += 1
    found = [blocks.find(key) for key in chain(ids)[1:]]
    num = place // SIZE
    assert found == [*numbers[:num], *[None] * (3 - num)]


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
    root, blocks = prefix_root("base", "sql", "salt"), BlockManager(8, SIZE)
    numbers = keep(blocks, "ab", root)
    assert find(blocks, "ab", prefix_root(*other)) == []
    assert blocks.find_common(prefix_root(*other), tokens("a")) is None
    assert not set(keep(blocks, "ab", prefix_root(*other))) & set(numbers)
    assert find(blocks, "ab", root) == numbers


def test_roots_differ_however_their_parts_are_split():
    said = ["", "a", "b", "a b", "1 a", "base", "0 ", " "]
    roots = [prefix_root(f, d, s) for f in ("f", "g") for d in (None, "d", "e") for s in said]
    assert len(set(roots)) == len(roots)


def test_partly_filled_block_is_found_by_its_first_tokens():
    blocks = BlockManager(2, SIZE)
    (number,) = blocks.allocate(1)
    blocks.register(number, ROOT, [1, 2, 3])
    assert blocks.find(chain_key(ROOT, [1, 2, 3])) is None, "it is not whole"
    assert blocks.find_common(ROOT, [1, 2, 3, 4]) == (number, 3)
    assert blocks.find_common(ROOT, [1, 2, 9]) == (number, 2)
    assert blocks.find_common(ROOT, [2, 2, 3]) is None
    assert blocks.find_common(chain_key(ROOT, [0] * SIZE), [1, 2, 3]) is None
    assert blocks.find_common(ROOT, []) is None


def test_most_tokens_in_common_are_found():
    blocks = BlockManager(4, SIZE)
    numbers = blocks.allocate(3)
    for number, ids in zip(numbers, ([1, 2, 3, 4], [1, 2, 3], [1, 5]), strict=True):
        blocks.register(number, ROOT, ids)
    assert blocks.find_common(ROOT, [1, 2, 3, 4]) == (numbers[0], 4)
    assert blocks.find_common(ROOT, [1, 2, 3, 9])[1] == 3
    assert blocks.find_common(ROOT, [1, 5, 3, 4]) == (numbers[2], 2)


def test_partly_filled_block_becomes_a_whole_one():
    blocks = BlockManager(2, SIZE)
    (number,) = blocks.allocate(1)
    for stop, num_known in ((2, 2), (3, 3), (1, 3), (SIZE, SIZE), (2, SIZE)):
        blocks.register(number, ROOT, tokens("a")[:stop])
        assert blocks.find_common(ROOT, tokens("a")) == (number, num_known)
    assert find(blocks, "a") == [number]
    blocks.release([number])
    assert find(blocks, "a") == [number]


def test_second_block_of_the_same_tokens_stays_unknown():
    blocks = BlockManager(4, SIZE)
    (first,), (second,) = fill(blocks, "a"), blocks.allocate(1)
    blocks.register(second, ROOT, tokens("a")[:3])
    assert blocks.find_common(ROOT, [*tokens("a")[:3], 0]) == (second, 3), "the last one so far"
    blocks.register(second, ROOT, tokens("a"))
    assert find(blocks, "a") == [first]
    blocks.release([second])
    assert not blocks.is_idle(second)
    assert find(blocks, "a") == [first]
    blocks.release([first])
    assert blocks.is_idle(first)


def test_forgotten_blocks_are_not_found():
    blocks = BlockManager(4, SIZE)
    numbers = fill(blocks, "ab")
    (rest,) = blocks.allocate(1)
    blocks.register(rest, chain(tokens("ab"))[-1], [1])
    blocks.forget([*numbers, rest])
    assert find(blocks, "ab") == []
    assert blocks.find_common(chain(tokens("ab"))[-1], [1]) is None
    blocks.release([*numbers, rest])
    assert (blocks.num_idle, blocks.num_free) == (0, 4)
    assert not blocks._following
    assert not blocks._full


def test_forgotten_block_can_be_filled_and_known_again():
    blocks = BlockManager(4, SIZE)
    numbers = fill(blocks, "ab")
    blocks.forget(numbers)
    blocks.register(numbers[0], ROOT, tokens("a"))
    assert find(blocks, "ab") == numbers[:1]


# --- what stays ------------------------------------------------------------------------------


def test_longest_unused_goes_first():
    blocks = BlockManager(3, SIZE)
    for text in "abc":
        keep(blocks, text)
    keep(blocks, "a")
    keep(blocks, "d")
    assert [text for text in "abcd" if find(blocks, text)] == ["a", "c", "d"]
    assert blocks.num_evictions == 1


def test_known_blocks_stay_while_there_are_others():
    blocks = BlockManager(4, SIZE)
    keep(blocks, "ab")
    blocks.release(blocks.allocate(2))
    blocks.release(blocks.allocate(2))
    assert len(find(blocks, "ab")) == 2
    assert not blocks.num_evictions


def test_ends_of_chains_go_before_their_beginnings():
    blocks = BlockManager(4, SIZE)
    numbers = keep(blocks, "abcd")
    for left in (3, 2, 1, 0):
        blocks.allocate(1)
        assert find(blocks, "abcd") == numbers[:left]


def test_common_beginning_outlives_its_ends():
    blocks = BlockManager(4, SIZE)
    keep(blocks, "abc")
    keep(blocks, "abd")
    blocks.allocate(1)
    assert len(find(blocks, "abc")) == 2
    assert len(find(blocks, "abd")) == 3


def test_blocks_in_use_stay():
    blocks = BlockManager(2, SIZE)
    numbers = fill(blocks, "a")
    for text in "bcd":
        keep(blocks, text)
    assert find(blocks, "a") == numbers
    blocks.release(numbers)
    keep(blocks, "ef")
    assert find(blocks, "a") == []


def test_only_so_many_blocks_stay_idle():
    blocks = BlockManager(8, SIZE, most_idle=3)
    keep(blocks, "ab")
    keep(blocks, "xyz")
    assert (blocks.num_idle, blocks.num_evictions) == (3, 2)
    assert find(blocks, "ab") == []
    keep(blocks, "cdef")
    assert len(find(blocks, "cdef")) == 3, "the beginning"
    assert len(blocks.allocate(8)) == 8


def test_nothing_stays_where_nothing_may():
    blocks = BlockManager(4, SIZE, most_idle=0)
    numbers = fill(blocks, "ab")
    assert find(blocks, "ab") == numbers, "while it is in use, it can be shared"
    blocks.release(numbers)
    assert find(blocks, "ab") == []
    assert (blocks.num_idle, blocks.num_evictions) == (0, 0)


# --- memory ----------------------------------------------------------------------------------


def test_memory_of_a_block_is_given_back_once_after_each_use():
    blocks = BlockManager(4, SIZE)
    assert blocks.take_unused() == []
    numbers = blocks.allocate(3)
    blocks.release(numbers[:2])
    assert sorted(blocks.take_unused()) == sorted(numbers[:2])
    assert blocks.take_unused() == []
    blocks.release(numbers[2:])
    (again,) = blocks.allocate(1)
    assert [again] == numbers[2:], "one that still has its memory is used first"
    used = blocks.allocate(3)
    blocks.release([again, *used])
    assert sorted(blocks.take_unused()) == [0, 1, 2, 3]


def test_known_blocks_keep_their_memory():
    blocks = BlockManager(4, SIZE)
    (number,) = keep(blocks, "a")
    assert blocks.take_unused() == []
    blocks.share([number])
    blocks.forget([number])
    blocks.release([number])
    assert blocks.take_unused() == [number]


# --- any use ---------------------------------------------------------------------------------


class Owner:
    """A sequence: its tokens, how many of them are computed, and its blocks."""

    def __init__(self, root: bytes, ids: list[int], numbers: list[int]) -> None:
        self.root, self.ids, self.numbers = root, ids, numbers
        self.num_computed = len(numbers) * SIZE


class BlockManagerMachine(RuleBasedStateMachine):
    """Sequences of two roots come, grow and go. `contents` is what was written to each block: the
    tokens from the beginning on; `idle` and `memory` are what the manager should know."""

    def __init__(self) -> None:
        super().__init__()
        self.most_idle = 4
        self.blocks = BlockManager(7, SIZE, self.most_idle)
        self.contents: dict[int, tuple[bytes, tuple[int, ...]]] = {}
        self.owners: list[Owner] = []
        self.idle: list[int] = []  # longest first
        self.memory: set[int] = set()

    @rule(root=st.sampled_from([ROOT, prefix_root("base", "sql", "")]), text=st.text("ab"))
    def start(self, root: bytes, text: str) -> None:
        text = text[:4]
        found = find(self.blocks, text, root)
        for place, number in enumerate(found):
            assert self.contents[number] == (root, tuple(tokens(text[: place + 1])))
        self.blocks.share(found)
        self.idle = [number for number in self.idle if number not in found]
        self.owners.append(Owner(root, tokens(text), found))

    @precondition(lambda self: self.owners)
    @rule(data=st.data(), num=st.integers(1, 9), token=st.sampled_from([97, 98]))
    def compute(self, data: st.DataObject, num: int, token: int) -> None:
        owner = data.draw(st.sampled_from(self.owners))
        stop = owner.num_computed + num
        owner.ids += [token] * (stop - len(owner.ids))
        num_new = -(-stop // SIZE) - len(owner.numbers)
        new = self.allocate(max(num_new, 0))
        if new is None:
            return
        owner.numbers += new
        for at in range(owner.num_computed // SIZE, -(-stop // SIZE)):
            number = owner.numbers[at]
            assert sum(number in other.numbers for other in self.owners) == 1
            self.contents[number] = owner.root, tuple(owner.ids[: min(stop, (at + 1) * SIZE)])
        owner.num_computed = stop

    def allocate(self, num: int) -> list[int] | None:
        unused = set(range(7)) - self.used() - set(self.idle)
        new = self.blocks.allocate(num)
        if new is None:
            assert num > len(unused) + len(self.idle)
            return None
        evicted = self.idle[: max(0, num - len(unused))]
        assert len(set(new)) == num
        assert set(new) <= unused | set(evicted)
        assert set(evicted) <= set(new)
        self.idle = self.idle[len(evicted) :]
        self.memory |= set(new)
        return new

    @precondition(lambda self: self.owners)
    @rule(data=st.data(), with_rest=st.booleans())
    def register(self, data: st.DataObject, with_rest: bool) -> None:
        owner = data.draw(st.sampled_from(self.owners))
        ids = owner.ids[: owner.num_computed if with_rest else owner.num_computed // SIZE * SIZE]
        for at, parent in enumerate(chain(ids, owner.root)[:-1]):
            self.blocks.register(owner.numbers[at], parent, ids[at * SIZE : (at + 1) * SIZE])

    @precondition(lambda self: self.owners)
    @rule(data=st.data(), forget=st.booleans())
    def end(self, data: st.DataObject, forget: bool) -> None:
        owner = data.draw(st.sampled_from(self.owners))
        self.owners.remove(owner)
        if forget:
            self.blocks.forget(owner.numbers)
            assert not any(self.blocks._blocks[number].token_ids for number in owner.numbers)
        left = [number for number in reversed(owner.numbers) if number not in self.used()]
        self.idle += [number for number in left if self.blocks._blocks[number].token_ids]
        self.idle = self.idle[max(0, len(self.idle) - self.most_idle) :]
        self.blocks.release(owner.numbers)

    @rule()
    def give_back(self) -> None:
        unused = self.memory - self.used() - set(self.idle)
        taken = self.blocks.take_unused()
        assert sorted(taken) == sorted(unused)
        self.memory -= unused

    def used(self) -> set[int]:
        return {number for owner in self.owners for number in owner.numbers}

    @invariant()
    def no_block_is_lost(self) -> None:
        blocks = self.blocks
        assert set(blocks._blocks) - set(blocks._idle) == self.used()
        assert list(blocks._idle) == self.idle
        parts = [*blocks._blocks, *blocks._dirty, *blocks._clean]
        assert sorted([*parts, *range(blocks._num_fresh, 7)]) == list(range(7))
        assert blocks.num_used == len(self.used())
        assert blocks.num_idle == len(self.idle) <= self.most_idle
        assert blocks.num_used + blocks.num_free == 7
        for number in self.used():
            num_users = sum(number in owner.numbers for owner in self.owners)
            assert blocks.is_shared(number) is (num_users > 1)

    @invariant()
    def what_is_known_is_what_was_written(self) -> None:
        num_whole, num_followers = 0, 0
        for number, block in self.blocks._blocks.items():
            if not block.token_ids:
                continue
            root, ids = self.contents[number]
            start = (len(ids) - 1) // SIZE * SIZE
            assert block.parent == chain(list(ids[:start]), root)[-1]
            assert ids[start:][: len(block.token_ids)] == block.token_ids
            assert number in self.blocks._following[block.parent]
            num_followers += 1
            if len(block.token_ids) == SIZE:
                assert self.blocks.find(chain_key(block.parent, block.token_ids)) == number
                num_whole += 1
        assert num_whole == len(self.blocks._full)
        assert num_followers == sum(map(len, self.blocks._following.values()))

    @invariant()
    def what_is_in_use_stays_what_it_was(self) -> None:
        for owner in self.owners:
            for at, number in enumerate(owner.numbers):
                stop = min(owner.num_computed, (at + 1) * SIZE)
                assert self.contents[number] == (owner.root, tuple(owner.ids[:stop]))


BlockManagerMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40)
TestBlockManager = BlockManagerMachine.TestCase
