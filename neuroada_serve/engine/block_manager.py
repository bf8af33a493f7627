"""The block manager: which blocks of the KV pool are in use, and which hold known tokens. Pure
Python.

A block is `block_tokens` consecutive positions of a sequence, in all layers. Sequences share blocks
by reference. A block whose tokens are known stays findable when nobody uses it any more, until its
place is needed: then the longest unused goes first.

What a block holds is known by a chain of sha256: what the KV depends on besides the tokens (the
base, the adapter's digest, the tenant's salt) first, then each block's tokens. So a hit is the same
tokens at the same positions on the same adapter version for the same tenant, whatever names point
to.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from neuroada_serve.metrics import KVUsage

_MOST_CANDIDATES = 8  # blocks that are compared for tokens in common


@dataclass(eq=False, slots=True)
class _Block:
    """parent, token_ids: what it is known to hold; empty if that is not known."""

    num_users: int = 0
    parent: bytes = b""
    token_ids: tuple[int, ...] = ()


class BlockManager:
    """The use of `num_blocks` blocks.

    Args:
        num_blocks: their number.
        block_tokens: positions of a block.
        most_idle: known blocks that may stay without a user; default: all.
    """

    def __init__(self, num_blocks: int, block_tokens: int, most_idle: int | None = None) -> None:
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self.num_evictions = 0  # of known blocks, for lack of room
        self.num_shared = 0  # blocks that several sequences use
        self._most_idle = num_blocks if most_idle is None else most_idle
        self._blocks: dict[int, _Block] = {}  # in use or known
        self._idle: OrderedDict[int, None] = OrderedDict()  # known and unused, longest first
        self._dirty: list[int] = []  # neither, but they were used; the last was used last
        self._clean: list[int] = []  # neither, their memory given back
        self._num_fresh = 0  # blocks from this number on were never used
        self._full: dict[bytes, int] = {}  # key -> known block of block_tokens tokens
        self._following: dict[bytes, dict[int, None]] = {}  # key -> known blocks after it

    # --- figures -----------------------------------------------------------------------------

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated."""
        return self.num_blocks - self.num_used

    @property
    def num_used(self) -> int:
        """Blocks that sequences use."""
        return len(self._blocks) - len(self._idle)

    @property
    def num_idle(self) -> int:
        """Known blocks that nobody uses."""
        return len(self._idle)

    @property
    def usage(self) -> KVUsage:
        return KVUsage(
            self.block_tokens, self.num_blocks, self.num_used, self.num_shared, self.num_idle
        )

    def is_idle(self, number: int) -> bool:
        """Return whether a block is known and nobody uses it."""
        return number in self._idle

    def is_shared(self, number: int) -> bool:
        """Return whether several sequences use a block."""
        return self._blocks[number].num_users > 1

    # --- use ---------------------------------------------------------------------------------

    def allocate(self, num: int) -> list[int] | None:
        """Allocate blocks, each with one user; None if there are not as many, and none is then."""
        if num > self.num_free:
            return None
        return [self._allocate() for _ in range(num)]

    def share(self, numbers: Iterable[int]) -> None:
        """Add a user to each of these blocks."""
        for number in numbers:
            block = self._blocks[number]
            block.num_users += 1
            self.num_shared += block.num_users == 2
            self._idle.pop(number, None)

    def release(self, numbers: Sequence[int]) -> None:
        """Remove a user from each of these blocks of one sequence, in the order of their
        positions."""
        # The last first: eviction begins at the ends of chains.
        for number in reversed(numbers):
            block = self._blocks[number]
            block.num_users -= 1
            assert block.num_users >= 0
            self.num_shared -= block.num_users == 1
            if block.num_users:
                continue
            if block.token_ids and self._most_idle:
                self._idle[number] = None
            else:
                self._free_up(number)
        while len(self._idle) > self._most_idle:
            self._free_up(next(iter(self._idle)))
            self.num_evictions += 1

    def take_unused(self) -> list[int]:
        """Return the blocks that hold nothing but still have the memory that they were given when
        they were used. The caller gives it back."""
        unused, self._dirty = self._dirty, []
        self._clean += unused
        return unused

    # --- what they hold ----------------------------------------------------------------------

    def find(self, key: bytes) -> int | None:
        """Return the full block that is known by this key."""
        return self._full.get(key)

    def find_common(self, parent: bytes, token_ids: Sequence[int]) -> tuple[int, int] | None:
        """Return the block after `parent` whose first tokens are most of these, and how many."""
        following = self._following.get(parent, {})
        best: tuple[int, int] | None = None
        for number in islice(reversed(following), _MOST_CANDIDATES):
            num = _num_common(self._blocks[number].token_ids, token_ids)
            if num and (best is None or num > best[1]):
                best = number, num
        return best

    def register(self, number: int, parent: bytes, token_ids: Sequence[int]) -> None:
        """Make a used block findable by its tokens, at most block_tokens. If another block is
        known to hold the same, this one stays unknown."""
        block = self._blocks[number]
        assert block.num_users
        assert 0 < len(token_ids) <= self.block_tokens
        if len(token_ids) <= len(block.token_ids):
            return
        is_full = len(token_ids) == self.block_tokens
        key = chain_key(parent, token_ids) if is_full else b""
        if is_full and key in self._full:
            self._forget(number)
            return
        block.parent, block.token_ids = parent, tuple(token_ids)
        self._following.setdefault(parent, {})[number] = None
        if is_full:
            self._full[key] = number

    def forget(self, numbers: Iterable[int]) -> None:
        """Make blocks in use unfindable, as what they hold may be wrong."""
        for number in numbers:
            self._forget(number)

    # --- parts -------------------------------------------------------------------------------

    def _allocate(self) -> int:
        if not self._dirty and not self._clean and self._num_fresh == self.num_blocks:
            self._free_up(next(iter(self._idle)))
            self.num_evictions += 1
        if self._dirty or self._clean:
            number = (self._dirty or self._clean).pop()
        else:
            number = self._num_fresh
            self._num_fresh += 1
        self._blocks[number] = _Block(num_users=1)
        return number

    def _free_up(self, number: int) -> None:
        self._forget(number)
        self._idle.pop(number, None)
        del self._blocks[number]
        self._dirty.append(number)

    def _forget(self, number: int) -> None:
        block = self._blocks[number]
        if not block.token_ids:
            return
        following = self._following[block.parent]
        del following[number]
        if not following:
            del self._following[block.parent]
        if len(block.token_ids) == self.block_tokens:
            del self._full[chain_key(block.parent, block.token_ids)]
        block.parent, block.token_ids = b"", ()


def prefix_root(fingerprint: str, adapter_digest: str | None, salt: str) -> bytes:
    """Return a digest of everything that a request's KV depends on except its tokens."""
    said = f"{fingerprint} {adapter_digest or 'base'} {len(salt)} {salt}"
    return hashlib.sha256(said.encode()).digest()


def chain_key(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Return the key of the block with these tokens after the one with the key `parent`."""
    return hashlib.sha256(parent + array("q", token_ids).tobytes()).digest()


def _num_common(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many of the first tokens agree."""
    num = 0
    for one, other in zip(a, b, strict=False):
        if one != other:
            break
        num += 1
    return num
