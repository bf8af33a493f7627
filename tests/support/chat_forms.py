"""Chat templates in the form of public models, with their special tokens and ends, on tiny models.

Each writes what its model's own template writes for conversations of text.
"""

from dataclasses import dataclass, field
from pathlib import Path

from transformers import AddedToken, GenerationConfig

from neuroada_serve.model.loader import BaseModel, load_base
from neuroada_serve.model.source import ModelSource
from tests.support.tiny import save_tiny_model, tiny_tokenizer

_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_LLAMA_3 = (
    "{% for m in messages %}"
    "{% set turn = '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n'"
    " + m.content | trim + '<|eot_id|>' %}"
    "{% if loop.first %}{% set turn = bos_token + turn %}{% endif %}{{ turn }}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
_LLAMA_32 = (  # a system turn of its own, with the date
    "{% set date = strftime_now('%d %b %Y') %}{{ bos_token }}"
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content | trim %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "<|start_header_id|>system<|end_header_id|>\n\nToday Date: {{ date }}\n\n"
    "{{ system }}<|eot_id|>{% for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
_ALTERNATE = (
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/...') }}{% endif %}"
)
_GEMMA_2 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
    + _ALTERNATE
    + "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_GEMMA_3 = (  # the system's text begins the first turn
    "{{ bos_token }}{% set first = '' %}{% if messages[0].role == 'system' %}"
    "{% set first = messages[0].content + '\n\n' %}{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}"
    + _ALTERNATE
    + "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ (first if loop.first else '') + m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_QWEN_25 = (
    "{% if messages[0].role != 'system' %}"
    "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud.<|im_end|>\n{% endif %}" + _CHATML
)
_QWEN_3 = (  # the last answer has a block of thoughts, be it an empty one; the prompt has none
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
_MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    + _ALTERNATE
    + "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %}{{ m.content }}{{ eos_token }} "
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}"
    "{% endfor %}"
)
_MISTRAL_3 = (  # an answer begins with a space
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
    "{% else %} {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
_LLAMA_2 = (  # and ends with one
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{{ bos_token }}[INST] {{ m.content | trim }} [/INST]"
    "{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)
_PHI_3 = (  # a conversation that is over has the end of the text behind the end of the turn
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
_GLM_4 = (  # no end: the next turn's beginning is one, by the generation config
    "[gMASK]{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
_PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@dataclass(frozen=True)
class Form:
    """A template and its tokens. end: the text of the token that ends an answer; generation_ends:
    of those that the generation config names."""

    template: str
    special: tuple[str, ...]
    eos: str
    end: str
    bos: str | None = None
    generation_ends: tuple[str, ...] = ()
    system: bool = True
    rstrip: tuple[str, ...] = field(default=())


_HEADERS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_TURNS = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
_IM = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
_ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
FORMS = {
    "chatml": Form(_CHATML, _IM, "<|im_end|>", "<|im_end|>"),
    "chatml on a pretrained model": Form(_CHATML, _IM, "<|endoftext|>", "<|im_end|>"),
    "llama 3": Form(
        _LLAMA_3,
        (*_HEADERS, "<|end_of_text|>"),
        "<|end_of_text|>",
        "<|eot_id|>",
        bos="<|begin_of_text|>",
    ),
    "llama 3.2": Form(
        _LLAMA_32,
        (*_HEADERS, "<|end_of_text|>", "<|eom_id|>"),
        "<|end_of_text|>",
        "<|eot_id|>",
        bos="<|begin_of_text|>",
        generation_ends=("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
    ),
    "gemma 2": Form(_GEMMA_2, _TURNS, "<eos>", "<end_of_turn>", bos="<bos>", system=False),
    "gemma 3": Form(
        _GEMMA_3,
        _TURNS,
        "<eos>",
        "<end_of_turn>",
        bos="<bos>",
        generation_ends=("<eos>", "<end_of_turn>"),
    ),
    "qwen 2.5": Form(
        _QWEN_25,
        _IM,
        "<|im_end|>",
        "<|im_end|>",
        generation_ends=("<|im_end|>", "<|endoftext|>"),
    ),
    "qwen 3": Form(_QWEN_3, (*_IM, "<think>", "</think>"), "<|im_end|>", "<|im_end|>"),
    "mistral": Form(_MISTRAL, (), "</s>", "</s>", bos="<s>", system=False),
    "mistral 3": Form(_MISTRAL_3, ("[INST]", "[/INST]"), "</s>", "</s>", bos="<s>", system=False),
    "llama 2": Form(_LLAMA_2, (), "</s>", "</s>", bos="<s>", system=False),
    "phi 3": Form(
        _PHI_3,
        (*_ROLES, "<|end|>", "<|endoftext|>"),
        "<|endoftext|>",
        "<|end|>",
        rstrip=(*_ROLES, "<|end|>"),
    ),
    "glm 4": Form(
        _GLM_4,
        ("[gMASK]", *_ROLES, "<|endoftext|>"),
        "<|endoftext|>",
        "<|user|>",
        generation_ends=("<|endoftext|>", "<|user|>"),
    ),
    "no end": Form(_PLAIN, (), "</s>", "</s>"),
}


Template = str | dict[str, str]


def save_form(folder: Path, form: Form, template: Template | None = None) -> ModelSource:
    """A tiny random model that speaks in a form, or by another template of the same tokens."""
    tokenizer = tiny_tokenizer(chat=False)
    tokenizer.add_tokens(
        [AddedToken(t, special=True, rstrip=t in form.rstrip) for t in form.special],
        special_tokens=True,
    )
    tokenizer.eos_token, tokenizer.bos_token = form.eos, form.bos
    tokenizer.chat_template = template or form.template
    ends = [tokenizer.convert_tokens_to_ids(t) for t in form.generation_ends or (form.eos,)]
    source = save_tiny_model(folder, chat=False, vocab_size=len(tokenizer), eos_token_id=ends[0])
    tokenizer.save_pretrained(folder)
    GenerationConfig(eos_token_id=ends).save_pretrained(folder)
    return source


def load_form(folder: Path, form: Form, template: Template | None = None) -> BaseModel:
    return load_base(save_form(folder, form, template))
