"""Checks of kernels, steps, merges and classifiers on the device that is measured."""

import copy

import torch

from bench.gpu.model import (
    NO_RUNS,
    TINY,
    add_adapters,
    generate,
    new_runner,
    random_base,
    run_tokens,
    sequences,
)
from bench.gpu.report import Report
from neuroada_serve.adapters.format import Adapter
from neuroada_serve.adapters.select import magnitude_index
from neuroada_serve.config import EngineConfig
from neuroada_serve.engine.batcher import Chunk
from neuroada_serve.engine.engine import Engine
from neuroada_serve.engine.scheduler import Schedule
from neuroada_serve.ops.bypass import (
    BypassTable,
    TokenSlots,
    bypass_add_,
    bypass_add_reference,
)
from neuroada_serve.ops.triton_bypass import (
    BypassTile,
    add_entries_,
    bypass_add_triton_,
    restore_entries_,
    swap_entries_,
)
from neuroada_serve.tasks import Classify


def check_kernels(report: Report) -> None:
    """Compare the op, way by way, with its reference on fresh random shapes."""
    device = report.device
    tiles: list[BypassTile | None] = [None]
    if device.type == "cuda":
        tiles += [BypassTile("direct", 128), BypassTile("staged", 256, warps=8)]
        tiles += [BypassTile("lanes", 64, lanes=32)]
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 6e-3)):
        for tile in tiles:
            name = f"kernel {tile.way if tile else 'table'} {dtype}"
            errors = []
            for d_out, d_in, k, num in ((133, 17, 3, 7), (576, 576, 8, 64), (1000, 4096, 20, 133)):
                slots = TokenSlots(tuple(torch.randint(-1, 9, (num,)).tolist()), device, 4)
                y, x = (torch.randn(num, d, device=device).to(dtype) for d in (d_out, d_in))
                index = torch.rand(d_out, d_in, device=device).topk(k).indices.int()
                bypass = torch.randn(9, d_out, k, device=device).to(dtype)
                table = BypassTable(index, bypass)
                expected = bypass_add_reference(y.float(), x, table, slots)
                if device.type == "cuda":
                    bypass_add_triton_(y, x, index, bypass, *slots.on_device, tile)
                else:
                    bypass_add_(y, x, table, slots)
                errors.append(float((y.float() - expected).norm() / expected.norm()))
            report.facts.setdefault("relative_error", {})[name] = max(errors)
            report.checks[name] = all(error < bound for error in errors)  # nan never passes
        slots = TokenSlots((0, -1, 4, 7, 4), device, 4)
        y = torch.randn(5, 33, device=device).to(dtype)
        bias = torch.randn(9, 33, device=device).to(dtype)
        expected = y.float() - bias[4].float()
        for token in (0, 2, 3, 4):
            expected[token] += bias[slots.slots[token]].float()
        x = torch.zeros(5, 1, device=device, dtype=dtype)
        bypass_add_(y, x, BypassTable(None, bias.unsqueeze(2)), slots)
        error = float((y.float() - expected).norm() / expected.norm())
        report.checks[f"biases {dtype}"] = error < bound


def check_entries(report: Report) -> None:
    """Check that values written into a weight equal rounded sums, and come out exactly."""
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.randn(1000, 512, device=report.device).to(dtype)
        before, index = weight.clone(), magnitude_index(weight, 8)
        values = torch.randn(index.shape, device=report.device).to(dtype)
        originals = before.gather(1, index.long())
        merged = (originals.float() + values.float()).to(dtype)
        saved = add_entries_(weight, index, values)
        right = torch.equal(weight, before.scatter(1, index.long(), merged))
        swap_entries_(weight, index, -values, saved)
        merged = (originals.float() - values.float()).to(dtype)
        right &= torch.equal(weight, before.scatter(1, index.long(), merged))
        restore_entries_(weight, index, saved)
        report.checks[f"entries {dtype}"] = right and torch.equal(weight, before)


def check_engine(report: Report) -> None:
    """Check in float32 that replayed tokens are eager tokens, merged or not."""
    engine = Engine(random_base(TINY, report.device, torch.float32), EngineConfig(max_num_seqs=8))
    digest = engine.base_digest()
    add_adapters(engine, TINY.ks, 4)
    names = [None, "k1-0", "k2-1", "k1-3", "k2-0", "k1-0"]
    with run_tokens(NO_RUNS):
        eager = generate(engine, new_runner(engine, 8, 64, enforce_eager=True), names, 12)
        runner = new_runner(engine, 8, 64)
        report.checks["replayed tokens equal eager ones"] = (
            generate(engine, runner, names, 12) == eager
        )
        report.facts["graphs of the tiny engine"] = (
            0 if runner.graphs is None else len(runner.graphs)
        )
        for name in ("k1-0", "k2-1", "k1-1"):
            engine.adapters.merging.merge(name)
            same = generate(engine, runner, names, 12) == eager
            report.checks[f"tokens with {name} merged"] = same
    with run_tokens(2):
        engine.adapters.merging.unmerge()
        written = generate(engine, new_runner(engine, 8, 64, enforce_eager=True), names, 12)
        report.checks["tokens with values written into the weights"] = written == eager
    report.checks["unmerging restores every bit"] = engine.base_digest() == digest
    report.checks["steps were replayed"] = report.device.type != "cuda" or (
        runner.graphs is not None and len(runner.graphs) > 0
    )


@torch.no_grad()
def check_classifier(report: Report) -> None:
    """Check a classifier's hidden state in a mixed batch against a plain float32 model.

    The plain model's weights hold the adapter. Texts beside the classifier must stay the same.
    """
    base = random_base(TINY, report.device, torch.float32)
    plain = copy.deepcopy(base.model)
    engine = Engine(base, EngineConfig(max_num_seqs=8))
    add_adapters(engine, TINY.ks, 2)
    names = [None, "k1-0", "k2-1", "k1-1"]
    torch.manual_seed(1)
    running = sequences(engine, names, 7, int(plain.config.vocab_size))
    chunks = tuple(Chunk(s, len(s.prompt_token_ids)) for s in running)
    schedule = Schedule(tuple(running), (), chunks)
    texts = new_runner(engine, 8, 64).run(schedule, None).logits.clone()
    for sequence in running:
        sequence.num_computed = 0
    running[2].task = Classify(("no", "yes"))
    step = new_runner(engine, 8, 64).run(schedule, None)
    assert step.hidden is not None
    source = engine.adapters.store.get("k2-1").source
    assert isinstance(source, Adapter)
    for name, part in source.modules.items():
        weight = plain.get_submodule(name).weight
        index = part.index.long().to(report.device)
        weight.scatter_add_(1, index, part.bypass.float().to(report.device))
    ids = torch.tensor([running[2].prompt_token_ids], device=report.device)
    expected = plain.base_model(ids).last_hidden_state[0, -1]
    error = float((step.hidden[2].float() - expected).norm() / expected.norm())
    report.facts.setdefault("relative_error", {})["classifier"] = error
    report.checks["what a classifier's head sees"] = error < 1e-3  # TF32 where it is allowed
    report.checks["texts beside a classifier"] = torch.equal(step.logits, texts)
