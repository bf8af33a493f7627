"""Names of tokens, their bytes, and their places in an answer's text."""

import codecs
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from neuroada_serve import LLM, SamplingParams
from neuroada_serve.engine.detokenizer import Detokenizer
from neuroada_serve.engine.token_names import TokenNames, _bytes_of_char
from neuroada_serve.request import Output, TokenLogprob, bytes_of_name, name_of_bytes
from neuroada_serve.server.answer import ChatAnswer, CompletionAnswer, Echo
from neuroada_serve.server.protocol import ChatCompletionRequest, CompletionRequest
from tests.support.tiny import save_tiny_model, tiny_tokenizer

TEXTS = [
    "Hello 👋🏽 world",
    " 漢字かな and é",
    "🤷\n\n  two  spaces\ttab",
    "plain text only.",
    "�x",
]


def byte_level() -> PreTrainedTokenizerFast:
    """As GPT-2, Llama 3, Qwen and SmolLM have them, trained on few words so that characters are in
    pieces, and some pieces of two tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=alphabet,
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS[:2] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def sentencepiece(decoder: str = "llama") -> PreTrainedTokenizerFast:
    """As Llama 2, Mistral and Gemma have them: words with a space in front, bytes for the rest."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{i:02X}>": 3 + i for i in range(256)}}
    for piece in ["▁", "H", "e", "l", "o", "▁H", "el", "lo", "▁Hel", "▁Hello", "a", "n", "d", "▁a"]:
        vocab.setdefault(piece, len(vocab))
    merges = [("▁", "H"), ("e", "l"), ("l", "o"), ("▁H", "el"), ("▁Hel", "lo"), ("▁", "a")]
    bpe = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if decoder == "llama":
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.add_tokens(["<extra▁one>"])
    return fast


TOKENIZERS = {
    "byte-level": byte_level(),
    "tiny": tiny_tokenizer(),
    "llama": sentencepiece(),
    "gemma": sentencepiece("gemma"),
}


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("text", TEXTS)
def test_bytes_of_an_answers_tokens_are_its_texts(kind, text):
    tokenizer = TOKENIZERS[kind]
    names, prompt = TokenNames(tokenizer), ids_of(tokenizer, "Hello and")
    ids = ids_of(tokenizer, text)
    detokenizer = Detokenizer(tokenizer, prompt)
    for token_id in ids:
        detokenizer.add(token_id)
    assert b"".join(bytes_of_name(names(i)) for i in ids) == detokenizer.take(final=True).encode()


def test_pieces_of_characters_are_called_by_their_bytes():
    names = TokenNames(TOKENIZERS["tiny"])
    called = [names(i) for i in ids_of(TOKENIZERS["tiny"], "a👋")]
    assert called == ["a", "bytes:\\xf0", "bytes:\\x9f", "bytes:\\x91", "bytes:\\x8b"]
    assert [bytes_of_name(name) for name in called] == [b"a", b"\xf0", b"\x9f", b"\x91", b"\x8b"]


def test_words_keep_their_space_and_special_tokens_their_name():
    names, tokenizer = TokenNames(TOKENIZERS["llama"]), TOKENIZERS["llama"]
    for token, name in {
        "▁Hello": " Hello",
        "<0x41>": "A",
        "<0xE2>": "bytes:\\xe2",
        "</s>": "</s>",
        "<extra▁one>": "<extra▁one>",
    }.items():
        assert names(tokenizer.convert_tokens_to_ids(token)) == name


def test_bytes_as_characters_are_those_of_gpt2():
    assert _bytes_of_char() == {char: byte for byte, char in bytes_to_unicode().items()}


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.binary(max_size=6))
def test_names_tell_their_bytes(data):
    assert bytes_of_name(name_of_bytes(data)) == data


# --- where tokens stand ----------------------------------------------------------------------


def placed(tokenizer, ids, **options) -> tuple[list[int], str]:
    """Offsets of an answer's tokens, and its text, as the engine has them."""
    detokenizer, offsets, text = Detokenizer(tokenizer, ids[:0], **options), [], ""
    for token_id in ids:
        offsets.append(detokenizer.num_chars)
        if detokenizer.add(token_id):
            break
        text += detokenizer.take(final=False)
    return offsets, text + detokenizer.take(final=True)


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("text", TEXTS[:4])
def test_offsets_are_where_the_characters_of_tokens_begin(kind, text):
    tokenizer = TOKENIZERS[kind]
    ids = ids_of(tokenizer, text)
    offsets, whole = placed(tokenizer, ids)
    names, decoder = TokenNames(tokenizer), codecs.getincrementaldecoder("utf-8")()
    joined = b"".join(bytes_of_name(names(i)) for i in ids).decode()
    expected, num_chars = [], -(joined != whole)  # without a first word's space
    for token_id in ids:
        expected.append(max(0, num_chars))
        num_chars += len(decoder.decode(bytes_of_name(names(token_id))))
    assert offsets == expected
    assert len(whole) == num_chars


def test_pieces_of_a_character_stand_where_it_does():
    tokenizer = TOKENIZERS["tiny"]
    offsets, _ = placed(tokenizer, ids_of(tokenizer, "a👋é!"))
    assert offsets == [0, 1, 1, 1, 1, 2, 2, 3]


def test_skipped_token_takes_no_place():
    tokenizer = TOKENIZERS["tiny"]
    ids = [*ids_of(tokenizer, "ab"), tokenizer.eos_token_id, *ids_of(tokenizer, "c")]
    assert placed(tokenizer, ids) == ([0, 1, 2, 2], "abc")


# --- what clients get ------------------------------------------------------------------------


def completion(prompt: str = "", *outputs: Output, first: str = "", stream: bool = False):
    request = CompletionRequest(prompt="x", logprobs=2, echo=bool(prompt))
    echoes = [Echo(prompt, first)] if prompt else []
    answer = CompletionAnswer(request, "m", 1, 1, echoes)
    if stream:
        return [chunk["choices"][0] for o in outputs for chunk in answer.chunks(0, o)]
    for output in outputs:
        answer.add(0, output)
    return answer.whole()["choices"][0]


def outputs_of(tokenizer, text: str, prompt: str = "", top=()) -> list[Output]:
    """An answer token by token, its prompt's probabilities with the first."""
    names, ids = TokenNames(tokenizer), ids_of(tokenizer, text)
    offsets, _ = placed(tokenizer, ids)
    prompt_ids = ids_of(tokenizer, prompt)
    before = tuple(TokenLogprob(i, names(i), -1.0) for i in prompt_ids[1:])
    detokenizer, outputs = Detokenizer(tokenizer, prompt_ids), []
    for n, (i, offset) in enumerate(zip(ids, offsets, strict=True)):
        detokenizer.add(i)
        logprob = TokenLogprob(i, names(i), -0.5, top, offset)
        text = detokenizer.take(final=n == len(ids) - 1)
        outputs.append(
            Output("r", 0, text, (i,), (logprob,), prompt_logprobs=before if n == 0 else ())
        )
    return outputs


@pytest.mark.parametrize("stream", [False, True])
def test_offsets_of_echo_and_answer_are_into_the_text(stream):
    tokenizer = TOKENIZERS["tiny"]
    given = completion("né👋 ", *outputs_of(tokenizer, "漢x", "né👋 "), first="n", stream=stream)
    parts = given if stream else [given]
    offsets = [o for part in parts if part["logprobs"] for o in part["logprobs"]["text_offset"]]
    tokens = [t for part in parts if part["logprobs"] for t in part["logprobs"]["tokens"]]
    text = "".join(part["text"] for part in parts)
    assert text == "né👋 漢x"
    assert offsets == [0, 1, 1, 2, 2, 2, 2, 3, 4, 4, 4, 5]
    assert b"".join(map(bytes_of_name, tokens)) == text.encode()


def test_echo_of_words_with_spaces_and_a_first_token_that_is_not_in_the_text():
    tokenizer = TOKENIZERS["llama"]
    names = TokenNames(tokenizer)
    ids = [*ids_of(tokenizer, "Hello and"), *ids_of(tokenizer, "a")[:0]]
    before = tuple(TokenLogprob(i, names(i), -1.0) for i in ids)
    output = Output("r", 0, " o", (5,), (TokenLogprob(5, " o", -0.5),), prompt_logprobs=before)
    given = completion("Hello and", output, first="<s>")
    assert given["logprobs"]["tokens"][:3] == ["<s>", " Hello", " a"]
    assert given["logprobs"]["text_offset"] == [0, 0, 5, 7, 8, 9]


def test_tokens_that_read_alike_are_all_there():
    top = ((7, "A", -0.1), (8, "A", -2.0), (9, "B", -3.0), (10, "A", -4.0))
    (given,) = completion(
        "", Output("r", 0, "A", (8,), (TokenLogprob(8, "A", -2.0, top),)), stream=True
    )
    assert given["logprobs"]["top_logprobs"] == [
        {"token_id:7": -0.1, "A": -2.0, "B": -3.0, "token_id:10": -4.0}
    ]


def test_chat_has_true_bytes_of_pieces():
    tokenizer = TOKENIZERS["tiny"]
    request = ChatCompletionRequest(
        messages=[{"role": "user", "content": "x"}], logprobs=True, top_logprobs=1
    )
    answer = ChatAnswer(request, "m", 1, 1)
    for output in outputs_of(tokenizer, "é👋", top=((300, "bytes:\\xff", -0.5),)):
        answer.add(0, output)
    content = answer.whole()["choices"][0]["logprobs"]["content"]
    assert bytes(b for token in content for b in token["bytes"]).decode() == "é👋"
    assert content[0]["token"] == "bytes:\\xc3"
    assert content[0]["top_logprobs"][0]["bytes"] == [255]


def test_stream_shapes_each_token_once(monkeypatch):
    shaped = []
    shape = CompletionAnswer._shape_logprobs
    monkeypatch.setattr(
        CompletionAnswer,
        "_shape_logprobs",
        lambda self, tokens: shaped.append(len(tokens)) or shape(self, tokens),
    )
    completion("ab", *outputs_of(TOKENIZERS["tiny"], "c" * 40, "ab"), first="a", stream=True)
    assert sum(shaped) == 42


def test_engine_reports_names_bytes_and_places(tmp_path):
    llm = LLM(str(save_tiny_model(tmp_path, dtype=torch.float32).path))
    params = SamplingParams(seed=1, max_tokens=40, ignore_eos=True, logprobs=3, prompt_logprobs=1)
    (answer,) = llm.generate("né", params, use_tqdm=False)
    (choice,) = answer.outputs
    visible = [t for t in choice.logprobs if t.token_id < 256]
    joined = b"".join(t.bytes for t in visible)
    assert joined.decode(errors="replace") == choice.text
    assert [t.token for t in answer.prompt_logprobs] == ["bytes:\\xc3", "bytes:\\xa9"]
    assert any(t.token.startswith("bytes:") for t in visible)
    for token, before in zip(visible, range(len(visible)), strict=True):
        text = b"".join(t.bytes for t in visible[:before]).decode(errors="ignore")
        assert math.isfinite(token.logprob)
        assert token.text_offset >= len(text)
        assert all(bytes_of_name(name) for i, name, _ in token.top if i < 256)
