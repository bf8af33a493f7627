"""Time a decode step against one thing at a time, to see how the cost of adapters grows.

    adapters   distinct adapters in a batch of --max-batch requests, k=1
    k          kept inputs per neuron, a quarter of that batch, all adapters distinct
    batch      requests, all adapters distinct, k=1
    context    tokens before the decode steps, a quarter of the batch, all adapters distinct, k=1
    nnz        adapters of some of the modules and several k, and the points of k: the sparse part
               alone, which is the step less the base's step of the same round, against the values
               used in a step, with a linear fit

Every round runs each point between two runs of its base, since the machine drifts by more than an
adapter costs; the base's step is the mean of the two, a point the median over the rounds of the
median step. Writes scaling.json and one scaling_NAME.png per series; of one series alone,
scaling_NAME.json. Not measured: prefill, HTTP.

    python -m bench.scaling [MODEL] [--series NAME] [--rounds 7] [--steps 24] [--max-batch 64]
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from bench.harness import new_parser, ratio, result_of, settings_of, write
from neuroada_serve.benchmark.adapters import magnitude_indices, random_adapter
from neuroada_serve.benchmark.measure import run_requests
from neuroada_serve.benchmark.report import progress_bar
from neuroada_serve.benchmark.workload import random_prompts
from neuroada_serve.config import EngineConfig
from neuroada_serve.engine.engine import Engine
from neuroada_serve.model.loader import load_base
from neuroada_serve.model.source import resolve_model
from neuroada_serve.plots import BLUE, GREY, RED, new_figure, png

PROMPT_LEN = 16
CONTEXTS = (16, 64, 256, 1024)
KS = (1, 2, 4, 8, 16, 32)
NNZ_KS = (1, 4, 8)
LABELS = {
    "adapters": "distinct adapters in the batch",
    "k": "k, values per neuron",
    "batch": "requests in the batch",
    "context": "tokens of context",
    "nnz": "values used in a step (requests x nnz), millions",
}


@dataclass(frozen=True)
class Point:
    """One batch to time, at place `x` of its series."""

    series: str
    x: float
    adapters: tuple[str | None, ...]  # one per request
    context: int = PROMPT_LEN

    @property
    def base(self) -> "Point":
        """Same batch without adapters."""
        return Point("base", 0, (None,) * len(self.adapters), self.context)


class Measured:
    """Median step of every round, per point and for its base."""

    def __init__(self, points: Sequence[Point]) -> None:
        self.step_ms: dict[Point, list[float]] = {point: [] for point in points}
        self.base_ms: dict[Point, list[float]] = {point: [] for point in points}

    def entry(self, point: Point) -> dict[str, Any]:
        """Medians of one point; the sparse part and the ratio within each round."""
        ours, base = self.step_ms[point], self.base_ms[point]
        return {
            "x": point.x,
            "requests": len(point.adapters),
            "step_ms": statistics.median(ours),
            "base_step_ms": statistics.median(base),
            "sparse_ms": statistics.median(a - b for a, b in zip(ours, base, strict=True)),
            "ratio_to_base": ratio(base, ours),
            "rounds": {"step_ms": ours, "base_step_ms": base},
        }


def main(argv: Sequence[str] | None = None) -> None:
    """Make the points, run the rounds, fit and draw."""
    parser = new_parser("scaling", __doc__)
    parser.add_argument("--series", choices=list(LABELS), help="default: all")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--max-batch", type=int, default=64)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(argv)
    console = Console(stderr=True)

    base = load_base(resolve_model(args.model), args.dtype, args.device)
    longest = min(max(CONTEXTS), base.max_model_len - args.steps - args.max_batch - 2)
    contexts = [c for c in CONTEXTS if c <= longest]
    ks = [k for k in KS if k <= min(d_in for _, d_in in base.spec.shapes.values())]
    indices = magnitude_indices(base, ks)
    config = EngineConfig(
        dtype=args.dtype,
        device=args.device,
        max_num_seqs=args.max_batch,
        max_num_batched_tokens=512 + args.max_batch,
        max_model_len=base.max_model_len,
        prefix_cache_memory=0,
    )
    engine = Engine(base, config)

    def add(name: str, k: int, count: int, modules: Sequence[str]) -> tuple[int, list[str]]:
        """Serve new adapters of these modules: (nnz of one, names)."""
        names = [f"{name}-{number}" for number in range(count)]
        for seed, each in enumerate(names):
            adapter = random_adapter(base.spec, {m: indices[k][m] for m in modules}, seed)
            engine.adapters.add_resident(each, adapter)
        return adapter.nnz, names

    # 1. The points.
    modules, quarter = list(base.spec.shapes), max(1, args.max_batch // 4)
    _, first = add("k1", 1, args.max_batch, modules)
    of_k = {1: first[:quarter]}
    with console.status("making adapters"):
        for k in ks[1:]:
            of_k[k] = add(f"k{k}", k, quarter, modules)[1]
    points = [
        Point("adapters", n, tuple(first[i % n] for i in range(args.max_batch)))
        for n in powers_of_two(args.max_batch)
    ]
    points += [Point("k", k, tuple(names)) for k, names in of_k.items()]
    points += [Point("batch", n, tuple(first[:n])) for n in powers_of_two(args.max_batch)]
    points += [Point("context", c, tuple(first[:quarter]), c) for c in contexts]
    for ending in sorted({module.rpartition(".")[2] for module in modules}):
        part = [module for module in modules if module.endswith(f".{ending}")]
        for k in NNZ_KS:
            nnz, names = add(f"{ending}-k{k}", k, quarter, part)
            points.append(Point("nnz", quarter * nnz / 1e6, tuple(names)))
    if args.series is not None:
        wanted = {args.series} | ({"k"} if args.series == "nnz" else set())
        points = [point for point in points if point.series in wanted]

    # 2. The rounds.
    measured = Measured(points)
    vocab = range(int(base.model.config.get_text_config().vocab_size))

    def measure(point: Point, number: int, steps: int) -> float:
        prompts = random_prompts(len(point.adapters), point.context, vocab, number)
        # The first ones decode while the last ones' prompts are computed, and must not end yet.
        a_step = engine.pace.most_tokens - len(prompts)
        more = -(-len(prompts) * point.context // a_step)
        timeline = run_requests(engine, prompts, point.adapters, steps + more + 1)
        return statistics.median(timeline.step_ms[:steps])

    with progress_bar(console) as progress:
        for point in progress.track(points, description="warming up"):
            measure(point, args.rounds, 2)
        task = progress.add_task("measuring", total=args.rounds * len(points))
        for number in range(args.rounds):
            for point in points:
                before = measure(point.base, number, args.steps)
                measured.step_ms[point].append(measure(point, number, args.steps))
                after = measure(point.base, number, args.steps)
                measured.base_ms[point].append((before + after) / 2)
                progress.advance(task)

    # 3. The result.
    series: dict[str, Any] = {}
    for point in points:
        series.setdefault(point.series, []).append(measured.entry(point))
    found = {"series": series, "not_measured": ["prefill", "HTTP"]}
    if "nnz" in series:
        all_nnz = sum(d_out for d_out, _ in base.spec.shapes.values())
        series["nnz"] += [each | {"x": quarter * each["x"] * all_nnz / 1e6} for each in series["k"]]
        x, sparse_ms = ([each[name] for each in series["nnz"]] for name in ("x", "sparse_ms"))
        found["nnz_fit"] = linear_fit(x, sparse_ms)
    if args.series is not None:
        found["series"] = {args.series: series[args.series]}
    settings = settings_of(args, dtype=str(base.dtype), device=str(base.device))
    out = args.out
    if args.series is not None:
        out = out.with_stem(f"{out.stem}_{args.series}")
    write(result_of("scaling", settings, found), out, plot)


def powers_of_two(most: int) -> list[int]:
    """Powers of two up to `most`."""
    return [n for n in (2**i for i in range(most.bit_length())) if n <= most]


def linear_fit(x: Sequence[float], y: Sequence[float]) -> dict[str, float]:
    """Fit y = slope * x + intercept by least squares; r2 is the share of variance it explains."""
    slope, intercept = np.polyfit(x, y, 1)
    residual = np.asarray(y) - (slope * np.asarray(x) + intercept)
    return {
        "slope_ms_per_million": float(slope),
        "intercept_ms": float(intercept),
        "r2": float(1 - residual.var() / np.var(y)),
    }


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Draw every series into a PNG file of its own: PATH's stem, then the series if there are
    several."""
    for name, entries in result["series"].items():
        drawn = plot_series(name, entries, result.get("nnz_fit"))
        only = len(result["series"]) == 1
        target = path if only else path.with_name(f"{path.stem}_{name}.png")
        target.write_bytes(drawn)


def plot_series(
    name: str, entries: Sequence[dict[str, Any]], fit: Mapping[str, float] | None
) -> bytes:
    """PNG of one series: steps with and without adapters, or the sparse part and its fit."""
    figure, axes = new_figure(6, 4)
    x = [each["x"] for each in entries]
    if name == "nnz":
        assert fit is not None
        axes.plot(x, [each["sparse_ms"] for each in entries], "o", color=BLUE)
        ends = [0, max(x)]
        line = [fit["slope_ms_per_million"] * each + fit["intercept_ms"] for each in ends]
        label = f"{fit['slope_ms_per_million']:.2f} ms per million, R2 = {fit['r2']:.3f}"
        axes.plot(ends, line, color=RED, label=label)
        axes.set_ylabel("sparse part of a step (ms)")
    else:
        axes.plot(x, [each["step_ms"] for each in entries], "o-", color=BLUE, label="adapters")
        base = [each["base_step_ms"] for each in entries]
        axes.plot(x, base, "o--", color=GREY, label="base")
        axes.set_xscale("log", base=2)
        axes.set_ylabel("decode step (ms)")
    axes.set_ylim(bottom=min(0, *axes.get_ylim()))
    axes.set_xlabel(LABELS[name])
    axes.legend(frameon=False)
    return png(figure)


if __name__ == "__main__":
    main()
