"""Attention for packed steps, plugged into unmodified transformers models.

A step's tokens lie in one row [1, T]: first one token of each decoding sequence, by slot, then
chunks of prompts. transformers' public AttentionInterface calls `attend` in every layer with
the step as a keyword; no mask function is registered for its name, so the models build no mask.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from neuroada_serve.engine.kv_cache import KVCache
from neuroada_serve.engine.triton_attention import decode_attention, fits_decode, runs_on
from neuroada_serve.errors import ModelError

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
    decode_slots: Sequence[int]  # rising
    decode_length: int  # longest context among the decodes, the new token included
    prefills: Sequence[PrefillSpan]
    decode_lengths: Sequence[int] | None = None  # attend one by one, over so many tokens each
    is_static: bool = False  # recorded in a CUDA graph: lengths are known on the device only
    _masks: dict[Any, Tensor] = field(default_factory=dict)  # made once per step, not per layer

    @property
    def num_decodes(self) -> int:
        return len(self.decode_slots)

    @cached_property
    def decode_range(self) -> tuple[int, int]:
        """The first slot of the decodes, and the one behind the last."""
        return self.decode_slots[0], self.decode_slots[-1] + 1

    @cached_property
    def decode_rows(self) -> Tensor | None:
        """[num_decodes] int64: which rows of the range the decodes are; None if all of them."""
        first, stop = self.decode_range
        if stop - first == self.num_decodes:
            return None
        return self.slots[: self.num_decodes] - first

    def decode_mask(self, window: int | None) -> Tensor:
        """[slots of the range, 1, 1, decode_length] bool, True where a decode may look. A slot that
        does not decode sees its first token, so that no sum is empty."""
        if window not in self._masks:
            first, stop = self.decode_range
            columns = torch.arange(self.decode_length, device=self.positions.device)
            own = self.positions[: self.num_decodes]
            if self.decode_rows is not None:
                own = own.new_zeros(stop - first).index_copy_(0, self.decode_rows, own)
            self._masks[window] = _visible(columns, own[:, None], window)[:, None, None]
        return self._masks[window]

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
    cache, layer = step.cache, module.layer_idx
    cache.write(layer, key[0].transpose(0, 1), value[0].transpose(0, 1), step.slots, step.positions)
    heads, dim = query.shape[1], query.shape[3]
    kv_heads = key.shape[1]
    parts = []

    n = step.num_decodes
    if n and runs_on(query) and fits_decode(dim, heads // kv_heads):
        keys, values = cache.layer(layer)
        decoding = query[0, :, :n].transpose(0, 1)
        where = step.slots[:n], step.positions[:n]
        parts.append(
            decode_attention(decoding, keys, values, *where, scaling, sliding_window, softcap)
        )
    elif n and step.decode_lengths is not None:
        own = zip(step.decode_slots, step.decode_lengths, strict=True)
        for i, (slot, length) in enumerate(own):
            first = 0 if sliding_window is None else max(0, length - sliding_window)
            pair = cache.view(layer, slot, slot + 1, length)
            keys, values = (part[:, :, first:] for part in pair)
            grouped = query[0, :, i].view(1, kv_heads, heads // kv_heads, dim)
            out = _attention(grouped, keys, values, None, scaling, softcap)
            parts.append(out.reshape(1, heads, -1))
    elif n:
        if step.is_static:
            raise ModelError(
                f"{type(module).__name__} has no decode kernel that a graph can replay"
            )
        # Grouped queries become the query length, so K and V are read once per group.
        keys, values = cache.view(layer, *step.decode_range, step.decode_length)
        grouped = query[0, :, :n].transpose(0, 1).reshape(n, kv_heads, heads // kv_heads, dim)
        rows = step.decode_rows
        if rows is not None:  # slots between them do not decode: computed too, for one view
            grouped = grouped.new_zeros(len(keys), *grouped.shape[1:]).index_copy_(0, rows, grouped)
        mask = step.decode_mask(sliding_window)
        out = _attention(grouped, keys, values, mask, scaling, softcap)
        parts.append((out if rows is None else out[rows]).reshape(n, heads, -1))

    for span in step.prefills:
        length = span.num_past + span.stop - span.start
        keys, values = cache.view(layer, span.slot, span.slot + 1, length)
        chunk = query[:, :, span.start : span.stop]
        if span.num_past == 0 and sliding_window is None and softcap is None:
            out = F.scaled_dot_product_attention(
                chunk, keys, values, is_causal=True, scale=scaling, enable_gqa=heads != kv_heads
            )
        else:
            mask = step.prefill_mask(span, sliding_window)
            repeats = heads // kv_heads
            keys = keys.repeat_interleave(repeats, 1) if repeats > 1 else keys
            values = values.repeat_interleave(repeats, 1) if repeats > 1 else values
            out = _attention(chunk, keys, values, mask, scaling, softcap)
        parts.append(out[0].transpose(0, 1))

    return (parts[0] if len(parts) == 1 else torch.cat(parts)).unsqueeze(0), None


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    """Compute attention [n, heads, q, dim]; with a soft cap on the scores (Gemma 2) written out."""
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
