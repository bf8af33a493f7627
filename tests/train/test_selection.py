"""Selections of inputs per neuron, and that training keeps to them."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from neuroada_serve import LLM, SamplingParams
from neuroada_serve.adapters.reader import load_adapter
from neuroada_serve.adapters.select import magnitude_index, random_index, smallest_index
from neuroada_serve.config import TrainConfig
from neuroada_serve.errors import DataError, ShapeError, UsageError
from neuroada_serve.model.loader import adaptable_modules, is_transposed
from neuroada_serve.train import trainer
from neuroada_serve.train.examples import Example
from neuroada_serve.train.objectives import WriteText
from neuroada_serve.train.selection import entries_by_row, gradient_indices, select
from neuroada_serve.train.trainer import train_adapter
from tests.support.gradients import random_model
from tests.support.training import QUICK, ROWS, make_base, write_rows

EXAMPLES = [Example((3, n, 7), (n + 1, 1)) for n in range(10)]
replace = trainer.replace


def selected(model, **options):
    modules = adaptable_modules(model)
    config = TrainConfig(k=3, **options)
    return select(model, modules, EXAMPLES, WriteText(), config, lambda message: None)


def test_the_smallest_weights_come_first_and_ties_to_the_lower_column():
    weight = torch.tensor([[3.0, -1.0, 0.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0, -1.0]])
    assert smallest_index(weight, 3).tolist() == [[2, 4, 1], [0, 1, 2]]
    with pytest.raises(ShapeError, match="k=6"):
        smallest_index(weight, 6)


def test_random_columns_are_distinct_reproducible_and_even():
    index = random_index(4000, 8, 3, seed=1)
    assert index.dtype == torch.int32
    assert torch.equal(index, random_index(4000, 8, 3, seed=1))
    assert not torch.equal(index, random_index(4000, 8, 3, seed=2))
    assert all(len(set(row)) == 3 for row in index.tolist())
    share = index.flatten().bincount(minlength=8) / index.numel()
    assert float((share - 1 / 8).abs().max()) < 0.02


def test_modules_draw_apart():
    found = selected(random_model("llama"), selection="random")
    same = [found[f"model.layers.{i}.self_attn.q_proj"].index for i in (0, 1)]
    assert not torch.equal(*same)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradients_select_what_a_dense_gradient_would(family):
    model = random_model(family)
    modules = adaptable_modules(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    whole = gradient_indices(model, modules, EXAMPLES, WriteText(), 3, batch_size=4)
    by_one = gradient_indices(model, modules, EXAMPLES, WriteText(), 3, batch_size=4, sum_bytes=1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    sums = dict.fromkeys(modules, 0.0)
    for start in (0, 4, 8):
        model.zero_grad()
        rows = EXAMPLES[start : start + 4]
        ids = torch.tensor([[*e.prompt_ids, *e.answer_ids] for e in rows])
        logits = model(ids, use_cache=False).logits[:, 2:4]  # predict the two answer tokens
        F.cross_entropy(logits.flatten(0, 1), ids[:, 3:].flatten()).backward()
        for name, module in modules.items():
            sums[name] = sums[name] + module.weight.grad
    for name, module in modules.items():
        dense = sums[name].t() if is_transposed(module) else sums[name]
        assert torch.equal(whole[name], magnitude_index(dense, 3)), name
        assert torch.equal(by_one[name], whole[name]), name


def test_coverage_leaves_a_share_of_neurons_all_their_entries():
    found = selected(random_model("llama"), coverage=0.25)
    for selection in found.values():
        rows = selection.trained.float().mean(dim=1)
        assert set(rows.tolist()) == {0.0, 1.0}
        assert abs(float(rows.mean()) - 0.25) < 0.02
        assert selection.nnz == int(rows.sum()) * 3


@pytest.mark.parametrize("selection", ["magnitude", "reverse", "random", "gradient"])
def test_modules_get_the_k_of_their_pattern(selection):
    pattern = {r"layers\.1\..*": 1, "q_proj|v_proj": 5, "down_proj": 0}
    found = selected(random_model("llama"), selection=selection, k_pattern=pattern)
    for name, part in found.items():
        k = 1 if ".layers.1." in name else 5 if name.endswith(("q_proj", "v_proj")) else 3
        assert part.index.shape[1] == 5
        trained = torch.ones(part.index.shape, dtype=bool) if part.trained is None else part.trained
        assert torch.equal(trained, (torch.arange(5) < k).expand_as(trained)), name
    assert "model.layers.0.mlp.down_proj" not in found
    assert "model.layers.1.mlp.down_proj" in found  # the first pattern that matches counts


def test_the_largest_of_the_matrix_are_selected_and_few_of_one_row():
    weight = torch.tensor([[9.0, -8.0, 7.0, 6.0], [1.0, -5.0, 0.0, 2.0], [3.0, 3.0, 3.0, 0.0]])
    assert entries_by_row(weight, 2, most=4).tolist() == [4, 1, 1]  # a tie, to the lower column
    assert entries_by_row(weight, 2, most=3).tolist() == [3, 1, 2]
    model = random_model("llama")
    modules = adaptable_modules(model)
    for name, part in selected(model, selection="matrix").items():
        size = modules[name].weight.abs()
        assert part.nnz == 3 * len(size)
        chosen = torch.zeros_like(size, dtype=bool).scatter(1, part.index.long(), part.trained)
        others = size.masked_fill(chosen, 0)[chosen.sum(dim=1) < 12]  # of rows that are not full
        assert size[chosen].min() >= others.max()


@pytest.fixture
def base(tmp_path):
    return make_base(tmp_path / "tiny", "llama")


@pytest.fixture
def rows(tmp_path):
    return write_rows(tmp_path / "rows.jsonl", ROWS)


@pytest.mark.parametrize("selection", ["magnitude", "reverse", "random", "gradient", "matrix"])
def test_every_selection_trains_and_loads(base, rows, tmp_path, selection):
    config = replace(QUICK, selection=selection, coverage=0.5)
    report = train_adapter(base, rows, tmp_path / "out", config)
    adapter = load_adapter(tmp_path / "out", base.spec)
    assert adapter.config.selection == selection
    assert report.after.loss < report.before.loss
    expected = selected_for(base, config, rows)
    for name, part in adapter.modules.items():
        assert torch.equal(part.index, expected[name].index)
        assert part.bypass[~expected[name].trained].eq(0).all()
        assert part.bypass[expected[name].trained].ne(0).any()


def selected_for(base, config, rows):
    loaded = trainer.load_data(base, rows, config)
    modules = adaptable_modules(base.model)
    return select(base.model, modules, loaded.train, loaded.objective, config, lambda message: None)


@pytest.mark.parametrize(
    ("k", "targets"),
    [
        ((0, {"q_proj|v_proj": 4}), ("q_proj", "v_proj")),
        (
            (0, {r"layers\.1\.self_attn\.(q|o)_proj": 4}),
            ("model.layers.1.self_attn.o_proj", "model.layers.1.self_attn.q_proj"),
        ),
    ],
)
def test_adapters_of_some_modules_name_them_and_are_served(base, rows, tmp_path, k, targets):
    config = replace(QUICK, k=k[0], k_pattern=k[1])
    train_adapter(base, rows, tmp_path / "out", config)
    adapter = load_adapter(tmp_path / "out", base.spec)
    assert adapter.config.target_modules == targets
    llm = LLM(str(tmp_path / "tiny"), {"out": str(tmp_path / "out")}, dtype="float32")
    [output] = llm.generate([[5, 6, 7]], SamplingParams(temperature=0, max_tokens=4), "out")
    expected = logits_of(base, adapter, [5, 6, 7])
    assert output.token_ids[0] == int(expected.argmax())


def logits_of(base, adapter, ids):
    """Return the logits of the last position, with the values added to the weights."""
    modules = adaptable_modules(base.model)
    with torch.no_grad():
        for name, part in adapter.modules.items():
            modules[name].weight.scatter_add_(1, part.index.long(), part.bypass.float())
        return base.model(torch.tensor([ids]), use_cache=False).logits[0, -1]


@pytest.mark.parametrize(
    ("pattern", "fault"),
    [
        ({"query": 8}, "k of 'query': no such module; the base has down_proj, .*q_proj"),
        ({".*": 0}, "--k .*=0,2 leaves no module to train"),
        ({"down_proj": 999}, "k=999 is above d_in"),
    ],
)
def test_patterns_that_fit_no_module_are_refused(base, rows, tmp_path, pattern, fault):
    with pytest.raises(UsageError, match=fault):
        train_adapter(base, rows, tmp_path / "out", replace(QUICK, k_pattern=pattern))


def test_a_file_selects(base, rows, tmp_path):
    wanted = {
        f"{name}.index": random_index(d_out, d_in, 2, seed=3)
        for name, (d_out, d_in) in base.spec.shapes.items()
    }
    save_file(wanted, tmp_path / "index.safetensors")
    config = replace(QUICK, selection="custom", index_file=tmp_path / "index.safetensors")
    report = train_adapter(base, rows, tmp_path / "out", config)
    for name, part in report.adapter.modules.items():
        assert torch.equal(part.index, wanted[f"{name}.index"])


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (lambda index: index[:, :1], r"is torch.int32 \[\d+, 1\], expected integers \[\d+, k=2\]"),
        (lambda index: index.float(), "torch.float32"),
        (lambda index: index * 0, "repeats a column"),
        (lambda index: index + 10_000, "has column 100"),
        (lambda index: None, "is missing"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(base, rows, tmp_path, spoil, fault):
    tensors = {
        f"{name}.index": spoil(random_index(d_out, d_in, 2, seed=3))
        for name, (d_out, d_in) in base.spec.shapes.items()
    }
    path = tmp_path / "index.safetensors"
    kept = {name: t.contiguous() for name, t in tensors.items() if t is not None}
    save_file(kept or {"other": torch.ones(1)}, path)
    config = replace(QUICK, selection="custom", index_file=path)
    with pytest.raises(DataError, match=fault):
        train_adapter(base, rows, tmp_path / "out", config)
    path.write_bytes(b"no")
    with pytest.raises(DataError, match="is not a safetensors file"):
        train_adapter(base, rows, tmp_path / "out", config)


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"selection": "custom"}, "--index-file belong together"),
        ({"selection": "largest"}, "selection must be one of magnitude"),
        ({"selection": "gradient", "quantize": "nf4"}, "no gradient to select by"),
        ({"coverage": 0.0}, "coverage must be above 0"),
        ({"k": 0}, "k must be at least 1"),
        ({"k_pattern": {"q_proj": -1}}, "k of 'q_proj' must be at least 0"),
        ({"k_pattern": {"(": 1}}, "no regular expression"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, fault):
    with pytest.raises(UsageError, match=fault):
        TrainConfig(**options)
