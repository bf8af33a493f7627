"""Prefix reuse: copies what earlier sequences have computed into the slots of later ones."""

import logging
from collections.abc import Iterable

import torch

from neuroada_serve.config import EngineConfig
from neuroada_serve.engine.kv_cache import KVBlocks, KVCache
from neuroada_serve.engine.memory import is_out_of_memory, prefix_cache_bytes
from neuroada_serve.engine.prefix_cache import BLOCK_TOKENS, PrefixCache, prefix_root
from neuroada_serve.engine.scheduler import Chunk
from neuroada_serve.engine.sequence import Sequence
from neuroada_serve.metrics import EngineMetrics

logger = logging.getLogger(__name__)


class Prefixes:
    """Find, restore and keep the prefixes of sequences in blocks beside the KV cache.

    Args:
        fingerprint: of the base.

    cache: which prefixes there are; None until the size of a token's KV is known, and where there
        is no memory for any.
    """

    def __init__(
        self,
        config: EngineConfig,
        device: torch.device,
        fingerprint: str,
        kv_cache: KVCache,
        metrics: EngineMetrics,
    ) -> None:
        self.cache: PrefixCache | None = None
        self._blocks: KVBlocks | None = None
        self._config = config
        self._device = device
        self._fingerprint = fingerprint
        self._kv_cache = kv_cache
        self._metrics = metrics

    def find(self, sequence: Sequence) -> int:
        """Find the prefix of a sequence that gets a slot; `restore` copies it.

        Returns:
            How many of the tokens to compute are known.
        """
        is_new = not sequence.num_preempted
        if self.cache is None or (is_new and sequence.params.prompt_logprobs is not None):
            return 0
        sequence.prefix_root = self._root(sequence)
        sequence.prefix_blocks = self.cache.find(sequence.prefix_root, sequence.token_ids)
        num_cached = len(sequence.prefix_blocks) * BLOCK_TOKENS
        if is_new:
            sequence.num_cached = num_cached
            self._metrics.num_cached_tokens += num_cached
        return num_cached

    def restore(self, prefills: Iterable[Chunk]) -> None:
        """Copy the prefixes of sequences that are about to be computed into their slots."""
        for chunk in prefills:
            sequence = chunk.sequence
            if not sequence.prefix_blocks:
                continue
            assert self._blocks is not None
            assert sequence.slot is not None
            self._kv_cache.reserve(sequence.slot + 1, sequence.num_computed)
            self._blocks.restore(sequence.slot, sequence.prefix_blocks)
            self.release(sequence)

    def release(self, sequence: Sequence) -> None:
        """Release the blocks that a sequence has found."""
        if sequence.prefix_blocks and self.cache is not None:
            blocks, sequence.prefix_blocks = sequence.prefix_blocks, []
            self.cache.release(sequence.prefix_root, sequence.token_ids, len(blocks))

    def keep(self, sequence: Sequence) -> None:
        """Keep what a sequence has computed, for others that begin alike."""
        if self.cache is None:
            self._make_cache()
        if self.cache is None or self._blocks is None or sequence.slot is None:
            return
        root = sequence.prefix_root or self._root(sequence)
        ids = sequence.token_ids[: sequence.num_computed]
        if self._config.deterministic:  # as a prompt, an answer is computed in other shapes
            ids = ids[: len(sequence.prompt_token_ids)]
        new = self.cache.keep(root, ids)
        try:
            self._blocks.keep(sequence.slot, new)
        except Exception as error:
            self.cache.discard({number for _, number in new})
            if not is_out_of_memory(error):
                raise

    def _root(self, sequence: Sequence) -> bytes:
        version = sequence.version
        salt = f"{len(sequence.tenant)} {sequence.tenant} {sequence.cache_salt}"
        digest = None if version is None else version.digest
        return prefix_root(self._fingerprint, digest, salt)

    def _make_cache(self) -> None:
        size_bytes = prefix_cache_bytes(self._config, self._device)
        block_bytes = self._kv_cache.bytes_per_token * BLOCK_TOKENS
        num_blocks = size_bytes // block_bytes if block_bytes else 0
        if num_blocks:
            try:
                self._blocks = KVBlocks(self._kv_cache, num_blocks, BLOCK_TOKENS)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                logger.warning("no memory for a prefix cache of %d bytes just now", size_bytes)
                return
            self.cache = PrefixCache(num_blocks)
