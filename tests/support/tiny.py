"""Tiny random models, tokenizers and adapters for tests, saved as real folders."""

import zlib
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto import configuration_auto

from neuroada_serve.adapters.format import (
    Adapter,
    AdapterConfig,
    BaseSpec,
    ModuleBypass,
    make_adapter,
)
from neuroada_serve.adapters.select import magnitude_index
from neuroada_serve.model.loader import adaptable_modules, is_transposed, load_base
from neuroada_serve.model.source import ModelSource

CHAT_TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}:{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)
VOCAB = 260  # 256 bytes and four special tokens

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 257,
    "tie_word_embeddings": True,
}
FAMILIES: dict[str, dict[str, object]] = {
    "llama": _COMMON,
    "qwen2": _COMMON,  # biases on q, k, v
    "qwen3": _COMMON,
    "mistral": {**_COMMON, "sliding_window": 7},
    "gemma": {**_COMMON, "hidden_activation": "gelu_pytorch_tanh"},
    "gemma2": {
        **_COMMON,
        "query_pre_attn_scalar": 8,
        "sliding_window": 7,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3_text": {**_COMMON, "query_pre_attn_scalar": 8, "sliding_window": 7},
    "gpt2": {
        "vocab_size": VOCAB,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 256,
        "initializer_range": 0.3,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "resid_pdrop": 0.0,
    },
    "phi3": _COMMON,  # fused qkv_proj and gate_up_proj
}


def tiny_tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """One token a byte, like the byte-level tokenizers of real models."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: i for i, char in enumerate(alphabet)}
    specials = ["<s>", "</s>", "<unk>", "<pad>"]
    vocab |= {special: 256 + i for i, special in enumerate(specials)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
    )
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast


def save_tiny_model(
    folder: Path,
    family: str = "llama",
    dtype: torch.dtype = torch.float32,
    chat: bool = True,
    **changed: object,
) -> ModelSource:
    """A random model of this family, its config changed by keyword, in a Hugging Face folder."""
    settings = FAMILIES[family] | changed
    config = configuration_auto.AutoConfig.for_model(family, **settings)
    config.dtype = dtype
    torch.manual_seed(zlib.crc32(family.encode()))
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    tiny_tokenizer(chat).save_pretrained(folder)
    return ModelSource(f"tiny-{family}", folder)


def random_adapter(
    source: ModelSource,
    seed: int,
    k: int = 2,
    targets: tuple[str, ...] = (),
    scale: float = 0.5,
    biases: bool = False,
) -> Adapter:
    """An adapter with random values at the largest weights; `targets` empty takes all modules."""
    base = load_base(source)
    return adapter_for(base.model, base.spec, seed, k, targets, scale, biases)


def adapter_for(
    model: torch.nn.Module,
    spec: BaseSpec,
    seed: int,
    k: int = 2,
    targets: tuple[str, ...] = (),
    scale: float = 0.5,
    biases: bool = False,
) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    parts = {}
    for name, module in adaptable_modules(model).items():
        ending = name.rpartition(".")[2]
        if targets and ending not in targets:
            continue
        weight = module.weight.t() if is_transposed(module) else module.weight
        index = magnitude_index(weight, k)
        values = torch.randn(index.shape, generator=generator) * scale
        bias = None
        if biases and module.bias is not None:
            bias = torch.randn(len(index), generator=generator).mul(scale).bfloat16()
        parts[name] = ModuleBypass(index, values.to(torch.bfloat16), bias)
    config = AdapterConfig(
        base_model_name_or_path=spec.name,
        base_fingerprint=spec.fingerprint,
        k=k,
        target_modules=tuple(sorted({name.rpartition(".")[2] for name in parts})),
    )
    return make_adapter(config, parts)


@torch.no_grad()
def plain_merged(
    source: ModelSource, adapter: Adapter | None, dtype: str = "float32", onto: Any = None
):
    """The same model in plain transformers with the adapter added to its weights: the reference.

    onto: a model to change instead.
    """
    model = onto or AutoModelForCausalLM.from_pretrained(
        source.path,
        dtype=getattr(torch, dtype),
        attn_implementation="eager",  # the one that no transformers release gets wrong for Gemma 2
    )
    if adapter is not None:
        for name, part in adapter.modules.items():
            module = model.get_submodule(name)
            weight = module.weight.t() if is_transposed(module) else module.weight
            rows = torch.arange(weight.shape[0]).unsqueeze(1)
            columns = part.index.long()
            merged = weight[rows, columns].float() + part.bypass.float()
            weight[rows, columns] = merged.to(weight.dtype)
            if part.bias is not None:
                module.bias.add_(part.bias)
    return model


@torch.no_grad()
def plain_generate(model, prompt: list[int], num_tokens: int, eos: frozenset[int]) -> list[int]:
    """Greedy tokens of a plain transformers model, one full forward per token."""
    ids = list(prompt)
    for _ in range(num_tokens):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in eos:
            break
    return ids[len(prompt) :]
