"""Steps on the CPU as one kernel, instead of a transformers forward.

A decode step of a small model is some thousand short operators and calls of Python; together they
take as long as reading the weights. For models of the known form, steps of up to MAX_TOKENS tokens
run as one kernel (`ops/cpu_forward.py`) on the same packed weights, KV cache and adapters.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from neuroada_serve.adapters.bank import AdapterBank, ResidentAdapter
from neuroada_serve.engine.known_code import Family, family_of
from neuroada_serve.engine.kv_cache import KVCache
from neuroada_serve.model.bypass_linear import BypassLinear, PackedLinear
from neuroada_serve.ops import cpu_forward
from neuroada_serve.ops.cpu_forward import (
    Attention,
    Caches,
    CpuForward,
    Decoder,
    Layer,
    Norm,
    Product,
    Tokens,
)
from neuroada_serve.ops.matrix import PackedMatrix

# By `bench/choices.py`: steps of up to so many tokens, the most that was measured, are faster than
# through the modules; so many consecutive tokens of one adapter repay writing its values into the
# weights, tile by tile.
MAX_TOKENS = 1024
RUN_TOKENS = 96

_TILE = 32  # rows of a matrix that are computed together


class CpuDecoder:
    """Runs steps of one model.

    Args:
        decoder: what `known_decoder` made of the model.
        cache: has the layers of the decoder.
    """

    def __init__(self, decoder: Decoder, bank: AdapterBank, cache: KVCache) -> None:
        self._bank = bank
        # One for all steps: the kernels' arguments are set by it once.
        self._caches = Caches(cache.tables, cache.block_tokens, cache.layer)
        self._forward = CpuForward(decoder, MAX_TOKENS)

    def takes(self, num_tokens: int) -> bool:
        """Tell if a step of so many tokens should come here."""
        return num_tokens <= MAX_TOKENS

    def run(
        self,
        tokens: Tokens,
        kept: Tensor,
        residents: Sequence[ResidentAdapter | None],
        merged: ResidentAdapter | None,
    ) -> Tensor:
        """Compute one forward.

        Args:
            tokens: with room in the cache.
            kept: [n] int64, the tokens whose logits are wanted.
            residents: per token its adapter, None for the base.
            merged: the adapter that is in the weights just now.

        Returns:
            [n, vocab] float32, valid until the next step.
        """
        plan = self._bank.plan(residents, merged, shortest=RUN_TOKENS)
        return self._forward(tokens, kept, self._caches, plan)

    def release(self) -> None:
        """Release memory that grows with requests."""
        self._forward.release()

    def seen_by_head(self, num_kept: int) -> Tensor:
        """[num_kept, hidden], the head's input in the last run; valid until the next step."""
        return self._forward.seen_by_head(num_kept)


def cpu_decoder(model: nn.Module, bank: AdapterBank, cache: KVCache) -> CpuDecoder | None:
    """A decoder for the model and its cache; None where there is no kernel."""
    decoder = known_decoder(model) if cpu_forward.available() else None
    if decoder is None:
        return None
    return CpuDecoder(decoder, bank, cache)


def known_decoder(model: Any) -> Decoder | None:
    """Parts of a model as the kernel takes them; None for a model that it does not compute."""
    family = family_of(model)
    if family is None:
        return None
    inner, head = model.model, model.lm_head
    norm = _norm(inner.norm)
    layers = [_layer(layer, model.config, family) for layer in inner.layers]
    matrix = head.matrix if isinstance(head, PackedLinear) else None
    if norm is None or not isinstance(matrix, PackedMatrix) or not _fits(matrix):
        return None
    known = [layer for layer in layers if layer is not None]
    shapes = {tuple((p.weight.d_out, p.weight.d_in) for p in layer.products) for layer in known}
    if len(known) != len(layers) or len(shapes) != 1:
        return None
    embedding = inner.embed_tokens.weight.detach()
    if embedding.dtype != torch.bfloat16 or not embedding.is_contiguous():
        return None

    def rotary(positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = inner.rotary_emb(embedding, position_ids=positions)
        return cos, sin

    return Decoder(embedding, rotary, known, norm, Product(matrix, _bias(head.bias)))


def _layer(layer: Any, config: Any, family: Family) -> Layer | None:
    attention, mlp = layer.self_attn, layer.mlp
    qkv = _product([getattr(attention, name) for name in family.qkv])
    gate_up = _product([getattr(mlp, name) for name in family.gate_up])
    o, down = _product([attention.o_proj]), _product([mlp.down_proj])
    attention_norm, mlp_norm = _norm(layer.input_layernorm), _norm(layer.post_attention_layernorm)
    if qkv is None or o is None or gate_up is None or down is None or attention.head_dim % _TILE:
        return None
    if attention_norm is None or mlp_norm is None:
        return None
    q_norm = k_norm = None
    if family.head_norms:
        q_norm, k_norm = _norm(attention.q_norm), _norm(attention.k_norm)
        if q_norm is None or k_norm is None:
            return None
    window = {"config": config, "attention": attention, None: None}[family.window]
    heads = config.num_attention_heads
    return Layer(
        attention_norm=attention_norm,
        qkv=qkv,
        attention=Attention(
            layer=attention.layer_idx,
            heads=heads,
            kv_heads=config.num_key_value_heads,
            head_dim=attention.head_dim,
            scaling=attention.scaling,
            window=getattr(window, "sliding_window", None),
            q_norm=q_norm,
            k_norm=k_norm,
        ),
        o=o,
        mlp_norm=mlp_norm,
        gate_up=gate_up,
        down=down,
    )


def _norm(norm: Any) -> Norm | None:
    weight = norm.weight.detach()
    return Norm(weight, norm.variance_epsilon) if weight.dtype == torch.bfloat16 else None


def _product(members: Sequence[Any]) -> Product | None:
    """Layers that are all the members of one site, in this order, as one product."""
    if not all(isinstance(member, BypassLinear) for member in members):
        return None
    site = members[0].site
    if list(site.rows) != [member.name for member in members] or not _fits(site.matrix):
        return None
    if any(rows.start % _TILE or rows.stop % _TILE for rows in site.rows.values()):
        return None
    return Product(site.matrix, _bias(site.bias), site.name)


def _fits(matrix: Any) -> bool:
    return isinstance(matrix, PackedMatrix) and matrix.d_in % _TILE == 0 and matrix.in_blocks_of_64


def _bias(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach().contiguous()
