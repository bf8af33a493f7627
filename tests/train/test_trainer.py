"""Training: gradients, the base left as it was, and the adapter folder that comes out."""

import json

import pytest
import torch

from neuroada_serve.adapters.format import CONFIG_FILE
from neuroada_serve.adapters.reader import load_adapter
from neuroada_serve.adapters.select import Selection
from neuroada_serve.config import TrainConfig
from neuroada_serve.errors import DataError, UsageError
from neuroada_serve.model.loader import adaptable_modules, is_transposed, load_base
from neuroada_serve.model.source import ModelSource
from neuroada_serve.ops import matrix
from neuroada_serve.train import inplace, trainer
from neuroada_serve.train.batches import collate, predict
from neuroada_serve.train.data import load_data
from neuroada_serve.train.examples import Example
from neuroada_serve.train.inplace import inplace_training, magnitude_selections
from neuroada_serve.train.objectives import WriteText
from neuroada_serve.train.score import score
from neuroada_serve.train.trainer import LOSS_FILE, train_adapter
from tests.support.training import QUICK, ROWS, _model, make_base, write_rows


@pytest.fixture(params=["llama"])
def base(request, tmp_path):
    return make_base(tmp_path / "tiny", request.param)


both_kinds = pytest.mark.parametrize("base", ["llama", "gpt2"], indirect=True)


@pytest.fixture
def data(tmp_path):
    return write_rows(tmp_path / "rows.jsonl", ROWS)


def _bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _same_bits(model, bits):
    now = model.state_dict()
    return now.keys() == bits.keys() and all(torch.equal(now[n], bits[n]) for n in bits)


def _training(model, modules, k):
    return inplace_training(model, modules, magnitude_selections(modules, k))


def _randomise(layers, scale=0.1):
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in layers.values():
            layer.value.copy_(torch.randn_like(layer.value) * scale)


# --- inside the weights ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_weights_hold_the_rounded_sum_while_attached(kind):
    model = _model(kind).bfloat16().eval()
    bits, ids = _bits(model), torch.randint(48, (1, 5))
    modules = adaptable_modules(model)
    with _training(model, modules, 3) as layers:
        _randomise(layers)
        model(ids)
        for name, layer in layers.items():
            old, new = bits[f"{name}.weight"], layer.weight
            if is_transposed(modules[name]):
                old, new = old.t(), new.t()
            at = layer.index.long()
            assert torch.equal(new.gather(1, at), (old.gather(1, at) + layer.value).bfloat16())
            untouched = torch.ones_like(new, dtype=torch.bool).scatter(1, at, False)
            assert torch.equal(new[untouched], old[untouched])
    assert _same_bits(model, bits)


def test_values_of_zero_change_no_logit():
    model = _model("llama").eval()
    ids = torch.randint(48, (1, 5))
    expected = model(ids).logits
    with _training(model, adaptable_modules(model), 2):
        assert torch.equal(model(ids).logits, expected)


def test_a_change_of_values_reaches_the_next_forward():
    model = _model("llama").eval()
    ids = torch.randint(48, (1, 5))
    with _training(model, adaptable_modules(model), 2) as layers:
        first = model(ids).logits
        _randomise(layers)
        assert not torch.equal(model(ids).logits, first)
        _randomise(layers, scale=0)
        assert torch.equal(model(ids).logits, first)


def test_gradient_checkpointing_gives_the_same_gradients():
    model = _model("llama").train()
    ids = torch.randint(48, (2, 7))
    with _training(model, adaptable_modules(model), 2) as layers:
        _randomise(layers)
        model(ids, labels=ids, use_cache=False).loss.backward()
        plain = [layer.value.grad.clone() for layer in layers.values()]
        model.zero_grad()
        model.activation_checkpointing_enable()
        model(ids, labels=ids, use_cache=False).loss.backward()
        for layer, expected in zip(layers.values(), plain, strict=True):
            torch.testing.assert_close(layer.value.grad, expected)


def test_gradients_accumulate_over_forwards_and_steps():
    model = _model("llama").eval()
    ids = torch.randint(48, (2, 7))
    with _training(model, adaptable_modules(model), 2) as layers:
        for scale in (0.1, 0.2):  # the second round runs on changed values
            model.zero_grad()
            _randomise(layers, scale)
            model(ids, labels=ids).loss.backward()
            once = [layer.value.grad.clone() for layer in layers.values()]
            model(ids, labels=ids).loss.backward()
            for layer, expected in zip(layers.values(), once, strict=True):
                torch.testing.assert_close(layer.value.grad, expected * 2)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_exception_leaves_the_model_as_it_was(kind):
    model = _model(kind).bfloat16().eval()
    bits, modules = _bits(model), adaptable_modules(model)

    def fail_in_training():
        with _training(model, modules, 2) as layers:
            model.train()
            _randomise(layers, scale=float("inf"))
            model(torch.randint(48, (1, 5)))
            raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        fail_in_training()
    assert _same_bits(model, bits)
    assert adaptable_modules(model) == modules
    assert not model.training


def test_the_head_multiplies_like_the_layers_while_training(monkeypatch):
    """On machines without fast bf16, the head is the widest layer that must not wait for it."""
    monkeypatch.setattr(matrix, "_onednn_has_bf16", lambda: False)
    multiplied = set()

    def recording(x, weight, bias=None):
        multiplied.add(weight.data_ptr())
        return matrix.linear(x, weight, bias)

    monkeypatch.setattr(inplace, "linear", recording)
    model = _model("llama").bfloat16().eval()
    head, ids = model.get_output_embeddings(), torch.randint(48, (2, 5))
    with _training(model, adaptable_modules(model), 2) as layers:
        hidden = model.model(ids).last_hidden_state
        expected = (hidden.float() @ head.weight.float().t()).bfloat16()
        assert torch.equal(model(ids).logits, expected)
        assert head.weight.data_ptr() in multiplied
        model(ids, labels=ids).loss.backward()
        assert all(layer.value.grad.abs().sum() > 0 for layer in layers.values())
    assert model.get_output_embeddings() is head


def test_entries_that_are_not_selected_keep_value_0():
    model = _model("llama")
    modules = adaptable_modules(model)
    found = magnitude_selections(modules, 3)
    trained = {name: torch.rand(s.index.shape) < 0.5 for name, s in found.items()}
    selections = {name: Selection(s.index, trained[name]) for name, s in found.items()}
    with inplace_training(model, modules, selections) as layers:
        model(torch.arange(12)[None]).logits.square().sum().backward()
        for name, layer in layers.items():
            assert layer.value.grad[~trained[name]].eq(0).all()
            assert layer.value.grad[trained[name]].ne(0).any()


EXAMPLES = [Example((5, 6, 7), (8, 1)), Example((9,), (4, 5, 6, 7, 1)), Example((3, 2), (1,))]


# --- batches and scores ---------------------------------------------------------------------------


def test_only_answer_tokens_count():
    model = _model("llama").eval()
    example = EXAMPLES[0]
    ids = torch.tensor([example.prompt_ids + example.answer_ids])
    expected = model(ids, labels=torch.tensor([[-100, -100, -100, 8, 1]])).loss.item()
    assert score(model, [example], 1, WriteText()).loss == pytest.approx(expected, rel=1e-5)
    logits, targets, is_answer = predict(model, collate(EXAMPLES))
    assert logits.shape == (8, 48)
    assert targets.tolist() == [8, 1, 4, 5, 6, 7, 1, 1]
    assert is_answer.sum(dim=1).tolist() == [2, 5, 1]


def test_padding_changes_no_score():
    model = _model("gpt2").eval()
    alone = [score(model, [example], 1, WriteText()).loss for example in EXAMPLES]
    weighted = sum(loss * len(e.answer_ids) for loss, e in zip(alone, EXAMPLES, strict=True)) / sum(
        len(e.answer_ids) for e in EXAMPLES
    )
    assert score(model, EXAMPLES, 3, WriteText()).loss == pytest.approx(weighted, rel=1e-5)


def test_exact_match_wants_every_token_of_the_answer():
    model = _model("llama").eval()

    def greedy(prompt, count):
        ids = list(prompt)
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        return tuple(ids[len(prompt) :])

    right = greedy((5, 6), 3)
    wrong = (*right[:2], (right[2] + 1) % 48)
    examples = [Example((5, 6), right), Example((5, 6), wrong), Example((7,), greedy((7,), 2))]
    assert score(model, examples, 2, WriteText()).figure == pytest.approx(2 / 3)


# --- a whole run ----------------------------------------------------------------------------------


@both_kinds
def test_training_lowers_the_loss_and_leaves_the_base_as_it_was(base, data, tmp_path):
    bits, use_cache = _bits(base.model), base.model.config.use_cache
    config = TrainConfig(k=4, max_steps=30, eval_fraction=0.25)
    report = train_adapter(base, data, tmp_path / "out", config)
    assert report.after.loss < report.before.loss - 0.5
    assert sum(report.losses[-5:]) < sum(report.losses[:5])
    assert report.steps == len(report.losses) == 30
    assert _same_bits(base.model, bits)
    assert base.model.config.use_cache == use_cache
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())


@both_kinds
def test_the_folder_holds_what_was_scored(base, data, tmp_path):
    out = tmp_path / "out"
    report = train_adapter(base, data, out, QUICK)
    adapter = load_adapter(out, base.spec)
    assert adapter.digest == report.adapter.digest
    assert (out / LOSS_FILE).read_bytes().startswith(b"\x89PNG")
    loaded = load_data(base, data, QUICK)
    with _training(base.model, adaptable_modules(base.model), QUICK.k) as layers:
        with torch.no_grad():
            for name, layer in layers.items():
                assert torch.equal(layer.index, adapter.modules[name].index)
                layer.value.copy_(adapter.modules[name].bypass)
        assert score(base.model, loaded.heldout, QUICK.batch_size, loaded.objective) == report.after


def test_the_config_tells_how_it_was_made(base, data, tmp_path):
    report = train_adapter(base, data, tmp_path / "out", QUICK)
    config = json.loads((tmp_path / "out" / CONFIG_FILE).read_text())
    recipe, scores = config["metadata"]["recipe"], config["metadata"]["scores"]
    assert config["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    assert (recipe["k"], recipe["steps"], recipe["epochs"], recipe["rows"]) == (2, 6, 2.0, 24)
    assert recipe["lr"] == QUICK.peak_lr
    assert set(recipe["versions"]) == {"neuroada-serve", "torch", "transformers"}
    assert scores == {
        "heldout_rows": 6,
        "before": {"loss": report.before.loss, "exact_match": report.before.figure},
        "after": {"loss": report.after.loss, "exact_match": report.after.figure},
        "exact_match_by": "teacher forcing",
    }


@pytest.mark.parametrize("base", ["gpt2"], indirect=True)
def test_gpt2_targets_are_its_three_names(base, data, tmp_path):
    report = train_adapter(base, data, tmp_path / "out", QUICK)
    assert report.adapter.config.target_modules == ("c_attn", "c_fc", "c_proj")


@both_kinds
def test_same_seed_same_adapter(base, data, tmp_path):
    digests = [
        train_adapter(base, data, tmp_path / name, config).adapter.digest
        for name, config in (
            ("a", QUICK),
            ("b", QUICK),
            ("c", TrainConfig(k=2, max_steps=6, eval_fraction=0.25, seed=1)),
        )
    ]
    assert digests[0] == digests[1] != digests[2]


def test_epochs_become_steps(base, data, tmp_path):
    config = TrainConfig(k=1, epochs=2, batch_size=10, eval_fraction=0)
    report = train_adapter(base, data, tmp_path / "out", config)
    assert report.steps == 6
    assert report.before is report.after is None
    assert report.adapter.config.metadata["scores"] == {"heldout_rows": 0}


def test_nothing_is_printed_and_notify_hears_the_story(base, data, tmp_path, capfd):
    told = []
    train_adapter(base, data, tmp_path / "out", QUICK, told.append)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
    assert told[0].startswith("24 rows: 18 to train on, 6 held out")
    assert any(sentence.startswith("Step 6 of 6, loss ") for sentence in told)


def _diverging(max_steps):
    """A rate that TrainConfig itself would refuse: the loss overflows at once."""
    config = TrainConfig(k=2, max_steps=max_steps)
    object.__setattr__(config, "lr", 1e30)
    return config


def test_a_loss_that_is_no_number_stops_and_leaves_nothing(base, data, tmp_path):
    bits = _bits(base.model)
    config = _diverging(max_steps=6)
    with pytest.raises(UsageError, match=r"not a number after step 1; try a --lr below 1e\+30"):
        train_adapter(base, data, tmp_path / "out", config)
    assert _same_bits(base.model, bits)
    assert not (tmp_path / "out").exists()


def test_a_base_that_gives_no_number_is_not_blamed_on_the_learning_rate(base, data, tmp_path):
    with torch.no_grad():
        base.model.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(UsageError, match="the base's own loss is not a number"):
        train_adapter(base, data, tmp_path / "out", QUICK)


def test_a_last_step_that_diverges_is_not_saved(base, data, tmp_path):
    config = _diverging(max_steps=1)
    with pytest.raises(UsageError, match="training diverged: .* after step 1"):
        train_adapter(base, data, tmp_path / "out", config)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def no_training(monkeypatch):
    def run_steps(*args):
        raise AssertionError("it trained")

    monkeypatch.setattr(trainer, "Loop", run_steps)


# --- what is refused beforehand -------------------------------------------------------------------


@pytest.mark.usefixtures("no_training")
def test_broken_data_leaves_no_folder(base, data, tmp_path):
    data.write_text('{"prompt": "a"}\n')
    with pytest.raises(DataError, match="has the columns prompt;"):
        train_adapter(base, data, tmp_path / "out", QUICK)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize("peft_type", [None, "LORA"])
def test_a_folder_of_other_things_is_refused(base, data, tmp_path, peft_type):
    (tmp_path / CONFIG_FILE).write_text(json.dumps({"peft_type": peft_type}))
    with pytest.raises(UsageError, match="not empty and holds no NeuroAda adapter"):
        train_adapter(base, data, tmp_path, QUICK)


@pytest.mark.usefixtures("no_training")
def test_an_out_that_is_no_folder_is_refused(base, data):
    with pytest.raises(UsageError, match="is a file"):
        train_adapter(base, data, data, QUICK)
    with pytest.raises(UsageError, match="cannot be written"):
        train_adapter(base, data, data / "below" / "a file", QUICK)


def test_an_adapter_folder_is_replaced(base, data, tmp_path):
    out = tmp_path / "out"
    first = train_adapter(base, data, out, QUICK).adapter.digest
    second = train_adapter(base, data, out, TrainConfig(k=1, max_steps=2)).adapter
    assert load_adapter(out, base.spec).digest == second.digest != first


@pytest.mark.usefixtures("no_training")
def test_k_above_the_narrowest_layer_is_refused(base, data, tmp_path):
    with pytest.raises(UsageError, match=r"k=33 is above d_in=32 of model\.layers"):
        train_adapter(base, data, tmp_path / "out", TrainConfig(k=33))


@pytest.mark.usefixtures("no_training")
def test_float16_is_refused(base, data, tmp_path):
    half = load_base(ModelSource("tiny", base.path), dtype="float16", device="cpu")
    with pytest.raises(UsageError, match="--dtype bfloat16"):
        train_adapter(half, data, tmp_path / "out", QUICK)


@pytest.mark.usefixtures("no_training")
def test_a_missing_extra_is_named_with_its_install(base, data, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "find_spec", lambda name: None if name == "accelerate" else 1)
    with pytest.raises(
        UsageError, match=r'needs accelerate: .*pip install "neuroada-serve\[train\]"'
    ):
        train_adapter(base, data, tmp_path / "out", QUICK)
