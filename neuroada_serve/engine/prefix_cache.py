"""The prefix cache's index: which beginnings of prompts have their KV kept, block by block. Pure
Python.

A block is known by a chain of sha256: what the KV depends on besides the tokens (the base, the
adapter's digest, the tenant's salt) first, then each block's tokens. So a hit is the same tokens at
the same positions on the same adapter version for the same tenant, whatever names point to.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from neuroada_serve.config import PROMPT_BLOCK

BLOCK_TOKENS = PROMPT_BLOCK


@dataclass(eq=False)
class _Block:
    number: int
    num_readers: int = 0  # sequences that it is about to be copied to


class PrefixCache:
    """An index of `num_blocks` blocks of KV. It says which to copy from and to, and copies
    nothing."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.num_queries = 0  # tokens that were looked up
        self.num_hits = 0  # of them, those found
        self.num_evictions = 0
        self._blocks: OrderedDict[bytes, _Block] = OrderedDict()  # least recently used first
        self._free = list(range(num_blocks - 1, -1, -1))

    def __len__(self) -> int:
        return len(self._blocks)

    def find(self, root: bytes, token_ids: Sequence[int]) -> list[int]:
        """Return the numbers of the blocks that hold the beginning of these tokens, as many as
        there are.

        They stay until `release`d. At least one token is left to compute.
        """
        found = []
        keys = _chain(root, token_ids, (len(token_ids) - 1) // BLOCK_TOKENS)
        for key in keys:
            block = self._blocks.get(key)
            if block is None:
                break
            block.num_readers += 1
            found.append(block.number)
        self._touch(keys[: len(found)])
        self.num_queries += len(token_ids)
        self.num_hits += len(found) * BLOCK_TOKENS
        return found

    def release(self, root: bytes, token_ids: Sequence[int], num_blocks: int) -> None:
        """Release the blocks that `find` returned, once they are copied."""
        for key in _chain(root, token_ids, num_blocks):
            self._blocks[key].num_readers -= 1

    def keep(self, root: bytes, token_ids: Sequence[int]) -> list[tuple[int, int]]:
        """Keep all whole blocks of these tokens; return (place among them, number) of the new
        ones, which the caller fills before any other request is served."""
        keys = _chain(root, token_ids, len(token_ids) // BLOCK_TOKENS)
        new = []
        for place, key in enumerate(keys):
            if key in self._blocks:
                continue
            number = self._free.pop() if self._free else self._evict(set(keys))
            if number is None:
                keys = keys[:place]
                break
            self._blocks[key] = _Block(number)
            new.append((place, number))
        self._touch(keys)
        return new

    def discard(self, numbers: Collection[int]) -> None:
        """Remove blocks that `keep` returned and that could not be filled."""
        for key in [key for key, block in self._blocks.items() if block.number in numbers]:
            self._free.append(self._blocks.pop(key).number)

    def _touch(self, keys: Sequence[bytes]) -> None:
        # The last first, so that a block is always older than the one before it in its chain, and
        # eviction begins at the ends.
        for key in reversed(keys):
            self._blocks.move_to_end(key)

    def _evict(self, besides: set[bytes]) -> int | None:
        for key, block in self._blocks.items():
            if not block.num_readers and key not in besides:
                del self._blocks[key]
                self.num_evictions += 1
                return block.number
        return None


def prefix_root(fingerprint: str, adapter_digest: str | None, salt: str) -> bytes:
    """Return a digest of everything that a request's KV depends on except its tokens."""
    said = f"{fingerprint} {adapter_digest or 'base'} {len(salt)} {salt}"
    return hashlib.sha256(said.encode()).digest()


def _chain(root: bytes, token_ids: Sequence[int], num_blocks: int) -> list[bytes]:
    keys, key = [], root
    for place in range(num_blocks):
        tokens = array("q", token_ids[place * BLOCK_TOKENS : (place + 1) * BLOCK_TOKENS])
        key = hashlib.sha256(key + tokens.tobytes()).digest()
        keys.append(key)
    return keys
