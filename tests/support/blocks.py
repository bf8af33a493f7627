"""A KV cache of blocks that remembers what was written, and checks it."""

from collections import Counter
from collections.abc import Iterable
from functools import lru_cache

from neuroada_serve.engine.block_manager import BlockManager, chain_key, prefix_root
from neuroada_serve.engine.block_tables import BlockTables, Changes
from neuroada_serve.engine.sequence import Sequence

# What the KV of a token depends on: the root, and all tokens up to its own.
Cell = tuple[bytes, tuple[int, ...]]
JUNK: Cell = (b"junk", ())


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
        self._cells: dict[int, dict[int, Cell]] = {}  # block -> place -> what was written
        self._entries: dict[tuple[int, int], int] = {}  # (slot, place) -> block

    def change(self, num_made: int | None = None) -> None:
        """Make the changes that the tables ask for.

        Args:
            num_made: so many copies are made, and then it fails.
        """
        changes = self.tables.changes
        for source, target in changes.copies[:num_made]:
            assert source != target
            self._cells[target] = dict(self._cells.get(source, {}))
        if num_made is not None:
            return
        self.num_copies += len(changes.copies)
        self._entries = self._entries_after(changes)
        self.tables.made()
        assert self.tables.changes == Changes()

    def write(self, sequence: Sequence, num_tokens: int, junk: bool = False) -> None:
        """Compute the next tokens of a sequence, after the changes have been made."""
        assert self.tables.changes == Changes()
        ids = tuple(sequence.token_ids)
        for position in range(sequence.num_computed, sequence.num_computed + num_tokens):
            at, within = divmod(position, self._size)
            number = self._entries[sequence.slot, at]
            assert number == sequence.blocks[at]
            assert not self.tables.blocks.is_shared(number), "whoever writes is its only user"
            known = self.tables.blocks._blocks[number].token_ids
            assert within >= len(known), "what others find stays"
            cell = (self._root(sequence), ids[: position + 1])
            self._cells.setdefault(number, {})[within] = JUNK if junk else cell

    def check(self, sequence: Sequence) -> None:
        """Check that a running sequence has all its computed tokens at their positions, once the
        changes have been made."""
        changes = self.tables.changes
        cells, entries = self._cells_after(changes), self._entries_after(changes)
        ids = tuple(sequence.token_ids)
        assert sequence.num_computed <= len(sequence.blocks) * self._size
        for at, number in enumerate(sequence.blocks):
            assert entries[sequence.slot, at] == number
        for position in range(sequence.num_computed):
            at, within = divmod(position, self._size)
            cell = (self._root(sequence), ids[: position + 1])
            assert cells[sequence.blocks[at]][within] == cell

    def check_blocks(self, running: Iterable[Sequence]) -> None:
        """Check that each block is used by those that have it, is otherwise known or free, and
        holds what it is known for."""
        blocks, copies = self.tables.blocks, self.tables.changes.copies
        users = Counter(number for s in running for number in s.blocks)
        users.update(source for source, _ in copies)
        used = {n: b.num_users for n, b in blocks._blocks.items() if b.num_users}
        assert used == users
        assert set(blocks._idle) == set(blocks._blocks) - set(used)
        assert blocks.num_used == len(used)
        assert blocks.num_free + len(used) == blocks.num_blocks
        others = [*blocks._blocks, *blocks._dirty, *blocks._clean]
        assert sorted(others) == list(range(blocks._num_fresh))
        assert blocks._num_fresh <= blocks.num_blocks
        cells = self._cells_after(self.tables.changes)
        for number, block in blocks._blocks.items():
            if block.token_ids:
                num = len(block.token_ids)
                root, ids = cells[number][num - 1]
                assert ids[-num:] == block.token_ids
                assert block.parent == _key(root, ids[:-num], self._size)
            else:
                assert block.num_users, "an unknown block is kept for nobody"

    def give_back(self) -> None:
        """Lose what is in the blocks that hold nothing."""
        for number in self.tables.blocks.take_unused():
            self._cells.pop(number, None)

    def _root(self, sequence: Sequence) -> bytes:
        return b"" if self.tables._root_of is None else self.tables._root_of(sequence)

    def _entries_after(self, changes: Changes) -> dict[tuple[int, int], int]:
        new = {(slot, at): number for slot, at, number in changes.entries}
        assert len(new) == len(changes.entries), "the order of two for one place would not be known"
        return self._entries | new

    def _cells_after(self, changes: Changes) -> dict[int, dict[int, Cell]]:
        cells = dict(self._cells)
        for source, target in changes.copies:
            cells[target] = cells.get(source, {})
        return cells


@lru_cache(maxsize=10_000)
def _key(root: bytes, ids: tuple[int, ...], size: int) -> bytes:
    """Return the key of the last of these whole blocks."""
    key = root
    for start in range(0, len(ids), size):
        key = chain_key(key, ids[start : start + size])
    return key
