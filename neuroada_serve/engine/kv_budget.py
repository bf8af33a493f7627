"""The size of the KV cache: what a token needs, and how many tokens the memory has room for."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from neuroada_serve.config import EngineConfig
from neuroada_serve.engine.block_manager import BlockManager
from neuroada_serve.engine.kv_cache import KVCache, KVLayout, LayerLayout, block_bytes
from neuroada_serve.engine.step_size import step_tokens
from neuroada_serve.errors import ModelError, UsageError
from neuroada_serve.model.loader import BaseModel

CPU_BLOCK_TOKENS = 32
GPU_BLOCK_TOKENS = 16

_MOST_BYTES_CPU = 8 << 30
_CPU_SHARE = 4  # of the free memory, one part in so many
_IDLE_BYTES_CPU = 512 << 20  # of known blocks without a user
_PROBE = "neuroada-probe"


@dataclass(frozen=True)
class KVBudget:
    """The room in the KV cache of one engine.

    block_tokens: positions of a block.
    idle_blocks: known blocks that may stay without a user.
    """

    layout: KVLayout
    block_tokens: int
    num_blocks: int
    idle_blocks: int

    @property
    def num_tokens(self) -> int:
        return self.num_blocks * self.block_tokens

    def describe(self, max_model_len: int) -> str:
        """Say in a sentence what there is room for."""
        size = self.num_tokens * self.layout.bytes_per_token
        whole = self.num_tokens / max_model_len
        return (
            f"KV cache: {self.num_tokens:,} tokens in {size / 2**30:,.2f} GiB, "
            f"or {whole:,.1f} sequences of {max_model_len:,} tokens"
        )

    def new_cache(self, max_slots: int, max_tokens: int, device: torch.device) -> KVCache:
        """Make the cache.

        Raises:
            UsageError: there is no memory for it after all.
        """
        sizes = self.num_blocks, self.block_tokens, max_slots, max_tokens
        try:
            return KVCache(self.layout, *sizes, device)
        except (MemoryError, RuntimeError) as error:
            flags = "--kv-cache-memory or --gpu-memory-utilization"
            size = self.num_tokens * self.layout.bytes_per_token / 2**30
            raise UsageError(
                f"there is no memory for a KV cache of {size:,.2f} GiB: {error}; lower {flags}"
            ) from error

    def new_blocks(self) -> BlockManager:
        """Make the manager of the cache's blocks."""
        return BlockManager(self.num_blocks, self.block_tokens, self.idle_blocks)


def kv_budget(base: BaseModel, config: EngineConfig, max_model_len: int) -> KVBudget:
    """Measure what is left for a KV cache, once everything else has its memory.

    Raises:
        UsageError: there is no room for a sequence of the configured max_model_len, or for any.
    """
    device = base.device
    is_cpu = device.type == "cpu"
    block_tokens = CPU_BLOCK_TOKENS if is_cpu else GPU_BLOCK_TOKENS
    layout = kv_layout(base)
    size = block_bytes(layout, block_tokens, device)
    num_bytes = config.kv_cache_memory
    if num_bytes is None:
        num_bytes = _free_on_cpu() if is_cpu else _free_on_gpu(base, config)
    idle_bytes = config.prefix_cache_memory
    if idle_bytes is None:
        idle_bytes = _IDLE_BYTES_CPU if is_cpu else num_bytes
    # More than all sequences and all known blocks could use is of no use.
    idle_blocks = idle_bytes // size
    most = config.max_num_seqs * -(-max_model_len // block_tokens) + idle_blocks
    num_blocks = min(max(num_bytes, 0) // size, most)
    needed = -(-(max_model_len if config.max_model_len else 1) // block_tokens)
    if num_blocks < needed:
        needed_bytes = needed * size
        larger = "--kv-cache-memory" if is_cpu else "--gpu-memory-utilization or --kv-cache-memory"
        raise UsageError(
            f"one sequence of {needed * block_tokens:,} tokens needs {needed_bytes / 2**20:,.0f} "
            f"MiB of keys and values, and there is room for {max(num_bytes, 0) / 2**20:,.0f} MiB; "
            f"lower --max-model-len, or raise {larger}"
        )
    return KVBudget(layout, block_tokens, num_blocks, min(idle_blocks, num_blocks))


# --- what a token needs ----------------------------------------------------------------------


def kv_layout(base: BaseModel) -> KVLayout:
    """Find the keys and values of a token, by a forward over one.

    Raises:
        ModelError: its layers differ in dtype.
    """
    layers: dict[int, LayerLayout] = {}
    dtypes: set[torch.dtype] = set()
    with _probing(base.model):
        _forward(base, 1, layers, dtypes)
    if len(dtypes) != 1:
        raise ModelError(f"keys and values have several dtypes: {sorted(map(str, dtypes))}")
    return KVLayout(dict(sorted(layers.items())), dtypes.pop())


def _probe(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layers: dict[int, LayerLayout],
    dtypes: set[torch.dtype],
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Note what a layer keeps of a token, in place of its attention."""
    _, kv_heads, _, key_dim = key.shape
    layers[module.layer_idx] = LayerLayout(kv_heads, key_dim, value.shape[3])
    dtypes |= {key.dtype, value.dtype}
    _, heads, num_tokens, _ = query.shape
    return query.new_zeros(1, num_tokens, heads, value.shape[3]), None


AttentionInterface.register(_PROBE, _probe)


@contextmanager
def _probing(model: Any) -> Iterator[None]:
    attention = model.config._attn_implementation
    model.set_attn_implementation(_PROBE)
    try:
        yield
    finally:
        model.set_attn_implementation(attention)


@torch.inference_mode()
def _forward(
    base: BaseModel, num_tokens: int, layers: dict[int, LayerLayout], dtypes: set[torch.dtype]
) -> Any:
    positions = torch.arange(num_tokens, device=base.device)[None]
    ids = torch.zeros_like(positions)
    kept = min(num_tokens, 64)
    return base.model(
        input_ids=ids,
        position_ids=positions,
        use_cache=False,
        logits_to_keep=kept,
        layers=layers,
        dtypes=dtypes,
    ).logits


# --- what memory there is --------------------------------------------------------------------


def _free_on_gpu(base: BaseModel, config: EngineConfig) -> int:
    """Bytes that the weights, the adapters' memory and the largest step leave of a GPU's share."""
    device = base.device
    free, total = torch.cuda.mem_get_info(device)
    return int(free - total * (1 - config.gpu_memory_utilization)) - _step_bytes(base, config)


def _step_bytes(base: BaseModel, config: EngineConfig) -> int:
    """Bytes that the largest step takes on a GPU for the moment, and its logits."""
    torch.cuda.synchronize(base.device)
    torch.cuda.reset_peak_memory_stats(base.device)
    before = torch.cuda.memory_allocated(base.device)
    with _probing(base.model):
        logits = _forward(base, step_tokens(config, base.device), {}, set())
    torch.cuda.synchronize(base.device)
    peak = torch.cuda.max_memory_allocated(base.device) - before
    # Of every sequence, in float32, with what the sampler makes of them.
    return peak + 4 * config.max_num_seqs * int(logits.shape[-1]) * 4


def _free_on_cpu() -> int:
    return min(_MOST_BYTES_CPU, free_bytes() // _CPU_SHARE)


def free_bytes() -> int:
    """Bytes that this process can still take: of the machine, its container, and its own limit."""
    bounds = [_meminfo("MemAvailable")]
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        (
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        ),
    ):
        most, now = _number_in(Path(limit)), _number_in(Path(used))
        if most is not None and now is not None:
            bounds.append(most - now)
    most_addresses, _ = resource.getrlimit(resource.RLIMIT_AS)
    pages = _number_in(Path("/proc/self/statm"))
    if most_addresses != resource.RLIM_INFINITY and pages is not None:
        bounds.append(most_addresses - pages * resource.getpagesize())
    known = [bound for bound in bounds if bound is not None]
    return max(0, min(known)) if known else _CPU_SHARE * (1 << 30)


def _meminfo(name: str) -> int | None:
    """Bytes of a line of /proc/meminfo; None on other systems."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(name)), None)


def _number_in(file: Path) -> int | None:
    """Return the first number of a file; None where there is none."""
    try:
        return int(file.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None
