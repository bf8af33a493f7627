"""Attention for packed steps, plugged into unmodified transformers models.

A step's tokens lie in one row [1, T]: first one token of each decoding sequence, by slot, then
chunks of prompts. transformers' public AttentionInterface calls `attend` in every layer with
the step as a keyword; no mask function is registered for its name, so the models build no mask.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from neuroada_serve.engine import triton_prefill
from neuroada_serve.engine.kv_cache import KVCache
from neuroada_serve.engine.triton_attention import decode_attention, fits_decode, runs_on
from neuroada_serve.engine.triton_prefill import Tiles, cut, prefill_attention, tile_tokens
from neuroada_serve.errors import ModelError
from neuroada_serve.ops import cpu_attention

ATTENTION = "neuroada"


@dataclass(frozen=True)
class PrefillSpan:
    """Tokens start..stop-1 of the packed row: the next of a prompt with num_past in the cache."""

    start: int
    stop: int
    slot: int
    num_past: int


@dataclass
class PackedStep:
    """The layout of one forward, read by the attention of every layer."""

    cache: KVCache
    slots: Tensor  # [T] int64, KV slot of each token; int32 in a CUDA graph, -1 for padding
    positions: Tensor  # [T] int64 or int32
    num_decodes: int  # tokens before the chunks of prompts, one of each decoding sequence
    decode_lengths: Sequence[int]  # of their contexts, the new token included; empty in a graph
    prefills: Sequence[PrefillSpan]
    one_by_one: bool = False  # no decode may be computed in a shape that depends on the others
    is_static: bool = False  # recorded in a CUDA graph: lengths are known on the device only
    warms_up: bool = False  # chunks of prompts are not computed; their kernels are compiled
    # made once per step, not per layer
    _masks: dict[Any, Tensor] = field(default_factory=dict)
    _tiles: dict[int, Tiles] = field(default_factory=dict)

    def decode_mask(self, window: int | None) -> Tensor:
        """[num_decodes, 1, 1, longest context] bool, True where a decode may look."""
        if window not in self._masks:
            columns = torch.arange(max(self.decode_lengths), device=self.positions.device)
            own = self.positions[: self.num_decodes, None]
            self._masks[window] = _visible(columns, own, window)[:, None, None]
        return self._masks[window]

    def tiles(self, tokens: int) -> Tiles:
        """Return the chunks of prompts, cut into tiles of so many tokens."""
        if tokens not in self._tiles:
            self._tiles[tokens] = cut(self.prefills, tokens, self.positions.device)
        return self._tiles[tokens]

    def prefill_mask(self, span: PrefillSpan, window: int | None) -> Tensor:
        """[tokens, num_past + tokens] bool."""
        if (span, window) not in self._masks:
            columns = torch.arange(
                span.num_past + span.stop - span.start, device=self.positions.device
            )
            own = self.positions[span.start : span.stop, None]
            self._masks[span, window] = _visible(columns, own, window)
        return self._masks[span, window]


def _visible(columns: Tensor, own: Tensor, window: int | None) -> Tensor:
    causal = columns <= own
    return causal if window is None else causal & (columns > own - window)


@dataclass(frozen=True)
class _Layer:
    """The parameters of one layer's attention.

    window: a token sees this many, itself included; None for all.
    softcap: of the scores (Gemma 2); None for none.
    """

    number: int
    scaling: float | None
    window: int | None
    softcap: float | None


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    step: PackedStep,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute one layer's attention: store the new keys and values, then attend per sequence.

    Args:
        query: [1, heads, T, head_dim]; key, value: [1, kv_heads, T, head_dim].

    Returns:
        [1, T, heads, head_dim]

    Raises:
        ModelError: the model uses attention sinks, or cannot be recorded in a graph.
    """
    if s_aux is not None:
        raise ModelError(f"{type(module).__name__} uses attention sinks, which are not supported")
    layer = _Layer(module.layer_idx, scaling, sliding_window, softcap)
    k, v = key[0].transpose(0, 1), value[0].transpose(0, 1)
    step.cache.write(layer.number, k, v, step.slots, step.positions)
    queries = query[0].transpose(0, 1)
    out = query.new_empty(*queries.shape[:2], value.shape[-1])
    if n := step.num_decodes:
        _decode(module, queries[:n], step, layer, out[:n])
    if step.prefills and _fits_prefill(query, step, layer):
        _prefill_paged(queries[n:], step, layer, out[n:])
    else:
        for span in step.prefills:
            rows = slice(span.start, span.stop)
            new = query[:, :, rows], key[:, :, rows], value[:, :, rows]
            out[rows] = _prefill(*new, step, span, layer)[0].transpose(0, 1)
    return out.unsqueeze(0), None


def _decode(module: Any, query: Tensor, step: PackedStep, layer: _Layer, out: Tensor) -> None:
    """Attention of one token of each sequence, into out [n, heads, head_dim] for query of that
    shape."""
    n, heads, dim = query.shape
    cache = step.cache
    keys, values = cache.layer(layer.number)
    kv_heads = keys.shape[1]
    where = cache.tables, step.slots[:n], step.positions[:n]
    kinds = layer.scaling, layer.window, layer.softcap
    is_alike = keys.shape == values.shape
    if is_alike and runs_on(query) and fits_decode(dim, heads // kv_heads):
        decode_attention(query, keys, values, *where, *kinds, out=out)
        return
    if is_alike and cpu_attention.fits(query):
        cpu_attention.decode_attention(query, keys, values, *where, *kinds, out=out)
        return
    if step.is_static:
        raise ModelError(f"{type(module).__name__} has no decode kernel that a graph can replay")
    # Grouped queries become the query length, so K and V are read once per group.
    grouped = query.reshape(n, kv_heads, heads // kv_heads, dim)
    if step.one_by_one:
        for i, length in enumerate(step.decode_lengths):
            keys, values = cache.gather(layer.number, step.slots[i : i + 1], length)
            first = 0 if layer.window is None else max(0, length - layer.window)
            seen = keys[:, :, first:], values[:, :, first:]
            out[i] = _attention(grouped[i : i + 1], *seen, None, layer).reshape(heads, -1)
        return
    keys, values = cache.gather(layer.number, step.slots[:n], max(step.decode_lengths))
    mask = step.decode_mask(layer.window)
    hidden = ~mask.transpose(2, 3)
    # What nobody has written may be no number: no weight of 0 would hide it.
    keys, values = keys.masked_fill(hidden, 0), values.masked_fill(hidden, 0)
    out.copy_(_attention(grouped, keys, values, mask, layer).reshape(n, heads, -1))


def _fits_prefill(query: Tensor, step: PackedStep, layer: _Layer) -> bool:
    """Return whether chunks of prompts are better computed by the kernel that reads the cache's
    blocks: on a GPU, unless all are beginnings, for which torch's own kernel is faster."""
    _, heads, _, dim = query.shape
    keys, values = step.cache.layer(layer.number)
    if not (
        runs_on(query) and keys.shape == values.shape and fits_decode(dim, heads // keys.shape[1])
    ):
        return False
    is_plain = layer.window is None and layer.softcap is None
    return not is_plain or any(span.num_past for span in step.prefills)


def _prefill_paged(query: Tensor, step: PackedStep, layer: _Layer, out: Tensor) -> None:
    """Attention of all chunks of prompts, into out [tokens, heads, head_dim] for query of that
    shape."""
    keys, values = step.cache.layer(layer.number)
    _, heads, dim = query.shape
    kinds = layer.scaling, layer.window, layer.softcap
    if step.warms_up:
        triton_prefill.warm_up(query[:1], keys, values, step.cache.tables, *kinds)
        out.zero_()
        return
    tokens = tile_tokens(heads, keys.shape[1], dim, query.element_size())
    tiles = step.tiles(tokens)
    prefill_attention(query, keys, values, step.cache.tables, tiles, *kinds, out=out)


def _prefill(
    query: Tensor, key: Tensor, value: Tensor, step: PackedStep, span: PrefillSpan, layer: _Layer
) -> Tensor:
    """Attention of a chunk of a prompt, [1, heads, tokens, head_dim] for query of that shape.

    Args:
        key, value: [1, kv_heads, tokens, head_dim] of the chunk itself.
    """
    repeats = query.shape[1] // key.shape[1]
    if span.num_past:
        slot = step.slots[span.start : span.start + 1]
        key, value = step.cache.gather(layer.number, slot, span.num_past + span.stop - span.start)
    elif layer.window is None and layer.softcap is None:
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=layer.scaling, enable_gqa=repeats > 1
        )
    key = key.repeat_interleave(repeats, 1) if repeats > 1 else key
    value = value.repeat_interleave(repeats, 1) if repeats > 1 else value
    return _attention(query, key, value, step.prefill_mask(span, layer.window), layer)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, layer: _Layer
) -> Tensor:
    """Compute attention [n, heads, q, dim]; with a soft cap on the scores (Gemma 2) written out."""
    scaling, softcap = layer.scaling, layer.softcap
    if softcap is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = (query @ key.transpose(-1, -2)) * scale
    scores = softcap * torch.tanh(scores / softcap)
    scores = scores.float()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = scores.softmax(-1)
    return weights.to(value.dtype) @ value


AttentionInterface.register(ATTENTION, attend)
