"""Tiny bases whose tokens are characters, and rows to train them on."""

import copy
import json

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from neuroada_serve.config import TrainConfig
from neuroada_serve.model.loader import load_base
from neuroada_serve.model.source import ModelSource

CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789 :+=\n"
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
CONFIGS = {
    "llama": LlamaConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=1,
    ),
    "gpt2": GPT2Config(
        vocab_size=48,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=128,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=1,
    ),
}
ROWS = [{"prompt": f"{n}+1=", "completion": f"{n + 1}"} for n in range(24)]
QUICK = TrainConfig(k=2, max_steps=6, eval_fraction=0.25)


def _model(kind, dropout=None):
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS[kind])
    if dropout is not None:
        config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = dropout
    return (LlamaForCausalLM if kind == "llama" else GPT2LMHeadModel)(config)


def make_base(folder, kind, **changed):
    """A tiny random base, loaded from its folder; its tokens are characters."""
    vocabulary = {"<unk>": 0, "<end>": 1} | {c: i for i, c in enumerate(CHARACTERS, start=2)}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=characters, eos_token="<end>", chat_template=CHAT_TEMPLATE
    ).save_pretrained(folder)
    _model(kind, **changed).save_pretrained(folder)
    return load_base(ModelSource("tiny", folder), device="cpu")


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
