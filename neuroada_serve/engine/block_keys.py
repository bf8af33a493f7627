"""The keys of sequences' blocks, and who is just computing which. Pure Python."""

from collections.abc import Callable

from neuroada_serve.engine.block_manager import BlockManager, chain_key, prefix_root
from neuroada_serve.engine.sequence import Sequence


def roots(fingerprint: str) -> Callable[[Sequence], bytes]:
    """Return what gives a digest of everything that a sequence's KV depends on except its tokens.

    Args:
        fingerprint: of the base.
    """

    def root_of(sequence: Sequence) -> bytes:
        version = sequence.version
        salt = f"{len(sequence.tenant)} {sequence.tenant} {sequence.cache_salt}"
        return prefix_root(fingerprint, None if version is None else version.digest, salt)

    return root_of


class BlockKeys:
    """The chain of keys of each sequence, kept with it.

    Args:
        root_of: gives the key of what comes before a sequence's tokens; None where there are no
            keys.
        block_tokens: positions of a block.
    """

    def __init__(self, root_of: Callable[[Sequence], bytes] | None, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self._root_of = root_of

    def parent(self, sequence: Sequence, at: int) -> bytes:
        """Return the key of what comes before a sequence's block."""
        return self.key(sequence, at - 1)

    def key(self, sequence: Sequence, at: int) -> bytes:
        """Return the key of a sequence's block; -1 stands for what comes before its tokens. The
        last block may have fewer tokens than others."""
        assert self._root_of is not None
        chain = sequence.chain
        if not chain:
            chain.append(self._root_of(sequence))
        if at + 1 < len(chain):
            return chain[at + 1]
        token_ids, size = sequence.token_ids, self.block_tokens
        while len(chain) <= at + 1:
            start = (len(chain) - 1) * size
            key = chain_key(chain[-1], token_ids[start : start + size])
            if start + size > len(token_ids):
                return key
            chain.append(key)
        return chain[at + 1]


class Announcements:
    """The blocks that running sequences are going to compute, so that others wait for them.

    Args:
        deterministic: only whole blocks can be shared.
    """

    def __init__(self, blocks: BlockManager, keys: BlockKeys, deterministic: bool) -> None:
        self._blocks = blocks
        self._keys = keys
        self._deterministic = deterministic
        self._owners: dict[bytes, Sequence] = {}  # key -> who is computing that block
        self._announced: dict[Sequence, list[bytes]] = {}

    def open(self, sequence: Sequence) -> None:
        """Let a sequence announce blocks until it is closed."""
        self._announced[sequence] = []

    def is_open(self, sequence: Sequence) -> bool:
        return sequence in self._announced

    def close(self, sequence: Sequence) -> None:
        """Retract what a sequence has announced."""
        for key in self._announced.pop(sequence, ()):
            del self._owners[key]

    def announce(self, sequence: Sequence, first: int) -> None:
        """Say which blocks from one on a sequence is going to compute that nobody else does."""
        is_last_token = sequence.num_computed >= sequence.num_prefill - 1
        if is_last_token or self._keys.key(sequence, first) in self._owners:
            return
        for at in range(first, -(-sequence.num_prefill // self._keys.block_tokens)):
            key = self._keys.key(sequence, at)
            if key not in self._owners and self._blocks.find(key) is None:
                self._owners[key] = sequence
                self._announced[sequence].append(key)

    def is_coming(self, sequence: Sequence) -> bool:
        """Return whether another sequence is computing the block that comes next."""
        size = self._keys.block_tokens
        at, within = divmod(sequence.num_computed, size)
        least = size if self._deterministic else 1  # tokens that could be shared
        if within or sequence.num_computed + least >= sequence.num_prefill:
            return False
        owner = self._owners.get(self._keys.key(sequence, at))
        if owner is None or owner is sequence:
            return False
        # It may have computed the block, and others have made it unfindable since.
        return owner.num_computed < sequence.num_computed + size
