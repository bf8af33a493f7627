"""A KV cache of blocks that remembers what was written, and checks it."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from neuroada_serve.engine.block_manager import BlockManager, chain_key, prefix_root
from neuroada_serve.engine.block_tables import BlockTables, Changes
from neuroada_serve.engine.sequence import Sequence


@dataclass(eq=False)
class Cell:
    """All that the KV of a token depends on: the root, and all tokens up to its own. There is one
    cell for each, so that cells are compared by identity.

    before: of the token before; None for the root's own, before all tokens.
    key: of the block that ends here, once it is known; the root's own.
    """

    before: "Cell | None" = None
    token: int = -1
    key: bytes | None = None
    _after: "dict[int, Cell]" = field(default_factory=dict)

    def after(self, token: int) -> "Cell":
        if token not in self._after:
            self._after[token] = Cell(self, token)
        return self._after[token]

    def last(self, num: int) -> "tuple[tuple[int, ...], Cell]":
        """Return the last tokens up to this one, and the cell before them."""
        cell, ids = self, []
        for _ in range(num):
            ids.append(cell.token)
            cell = cell.before
        return tuple(ids[::-1]), cell

    def key_of_blocks(self, size: int) -> bytes:
        """Return the key of the last of the whole blocks that end here."""
        if self.key is None:
            ids, before = self.last(size)
            self.key = chain_key(before.key_of_blocks(size), ids)
        return self.key


JUNK = Cell()


def root_of(sequence: Sequence) -> bytes:
    """Return the root of a sequence as the engine does: its tenant, salt and adapter version."""
    version = sequence.version
    salt = f"{len(sequence.tenant)} {sequence.tenant} {sequence.cache_salt}"
    return prefix_root("base", None if version is None else version.name, salt)


def new_tables(
    num_blocks: int, block_tokens: int, most_idle: int | None = None, **options
) -> BlockTables:
    """Make the tables of a small pool in which sequences share blocks."""
    blocks = BlockManager(num_blocks, block_tokens, most_idle)
    return BlockTables(blocks, **{"root_of": root_of} | options)


class FakeCache:
    """A pool of blocks and the tables of the slots, as the steps see them."""

    def __init__(self, tables: BlockTables) -> None:
        self.tables = tables
        self.num_copies = 0
        self._size = tables.blocks.block_tokens
        self._blocks: dict[int, list[Cell]] = {}  # what is written from each block's beginning on
        self._entries: dict[tuple[int, int], int] = {}  # (slot, place) -> block
        self._roots: dict[bytes, Cell] = {}
        self._lines: dict[Sequence, list[Cell]] = {}  # the cells of a sequence's tokens

    # --- what a step does --------------------------------------------------------------------

    def change(self, num_made: int | None = None) -> None:
        """Make the changes that the tables ask for.

        Args:
            num_made: so many copies are made, and then it fails.
        """
        changes = self.tables.changes
        for source, target in changes.copies[:num_made]:
            assert source != target
            self._blocks[target] = list(self._blocks.get(source, []))
        if num_made is not None:
            return
        self.num_copies += len(changes.copies)
        self._entries = self._entries_after(changes)
        self.tables.made()
        assert self.tables.changes == Changes()

    def write(self, sequence: Sequence, num_tokens: int, junk: bool = False) -> None:
        """Compute the next tokens of a sequence, after the changes have been made."""
        assert self.tables.changes == Changes()
        line, start = self._line(sequence), sequence.num_computed
        for position in range(start, start + num_tokens):
            at, within = divmod(position, self._size)
            number = self._entries[sequence.slot, at]
            assert number == sequence.blocks[at]
            assert not self.tables.blocks.is_shared(number), "whoever writes is its only user"
            known = self.tables.blocks._blocks[number].token_ids
            assert within >= len(known), "what others find stays"
            block = self._blocks.setdefault(number, [])
            block[within:] = [JUNK if junk else line[position]]

    def give_back(self) -> None:
        """Lose what is in the blocks that hold nothing."""
        for number in self.tables.blocks.take_unused():
            self._blocks.pop(number, None)

    # --- what holds between any two operations -----------------------------------------------

    def check(self, running: Iterable[Sequence]) -> None:
        """Check that each block is used by those that have it, is otherwise known or free, and
        holds what it is known for; and that running sequences have their own tokens at their
        positions. All this once the changes are made."""
        running = list(running)
        self._check_use(running)
        self._check_changes(running)
        blocks, entries = self._blocks_after(), self._entries_after(self.tables.changes)
        for sequence in running:
            line, left = self._line(sequence), sequence.num_computed
            for at, number in enumerate(sequence.blocks):
                assert entries[sequence.slot, at] == number
                num = min(max(left, 0), self._size)
                first = at * self._size
                if num:
                    assert blocks[number][:num] == line[first : first + num]
                left -= self._size
            assert left <= 0
        for number, block in self.tables.blocks._blocks.items():
            if block.token_ids:
                num = len(block.token_ids)
                ids, before = blocks[number][num - 1].last(num)
                assert ids == block.token_ids
                assert before.key_of_blocks(self._size) == block.parent

    def _check_use(self, running: list[Sequence]) -> None:
        blocks = self.tables.blocks
        users = Counter(number for sequence in running for number in sequence.blocks)
        users.update(source for source, _ in self.tables.changes.copies)
        assert users == {n: b.num_users for n, b in blocks._blocks.items() if b.num_users}
        assert set(blocks._idle) == set(blocks._blocks) - set(users)
        assert all(blocks._blocks[number].token_ids for number in blocks._idle)
        assert blocks.num_used == len(users)
        assert blocks.num_used + blocks.num_free == blocks.num_blocks
        assert blocks.num_shared == sum(num > 1 for num in users.values())
        parts = [*blocks._blocks, *blocks._dirty, *blocks._clean]
        assert sorted(parts) == list(range(blocks._num_fresh))
        assert blocks._num_fresh <= blocks.num_blocks

    def _check_changes(self, running: list[Sequence]) -> None:
        """Check that all that is to be changed belongs to running sequences."""
        changes, by_slot = self.tables.changes, {s.slot: s for s in running}
        assert all(by_slot[slot].blocks[at] == number for slot, at, number in changes.entries)
        own = {number for sequence in running for number in sequence.blocks}
        assert {target for _, target in changes.copies} <= own

    # --- parts -------------------------------------------------------------------------------

    def _line(self, sequence: Sequence) -> list[Cell]:
        """Return the cells of all tokens of a sequence."""
        line = self._lines.setdefault(sequence, [])
        if len(line) < sequence.num_tokens:
            key = root_of(sequence)
            root = self._roots.setdefault(key, Cell(key=key))
            for token in sequence.token_ids[len(line) :]:
                line.append((line[-1] if line else root).after(token))
        return line

    def _entries_after(self, changes: Changes) -> dict[tuple[int, int], int]:
        new = {(slot, at): number for slot, at, number in changes.entries}
        assert len(new) == len(changes.entries), "the order of two for one place would not be known"
        return self._entries | new if new else self._entries

    def _blocks_after(self) -> dict[int, list[Cell]]:
        if not self.tables.changes.copies:
            return self._blocks
        blocks = dict(self._blocks)
        for source, target in self.tables.changes.copies:
            blocks[target] = blocks.get(source, [])
        return blocks
