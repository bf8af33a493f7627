"""`neuroada bench throughput` and `latency`: cases on engines, in interleaved rounds.

Every round runs each case once, ours and the peers' in turn, so that drift of the machine affects
all alike. Ratios compare a case with the base, or the peer, of the same round. report.py describes
the result.
"""

import gc
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from neuroada_serve.benchmark.adapters import save_random_lora
from neuroada_serve.benchmark.cases import (
    Case,
    Work,
    Workload,
    latency_cases,
    num_adapters_needed,
    throughput_cases,
)
from neuroada_serve.benchmark.check import CaseCheck, Checker
from neuroada_serve.benchmark.measure import OurEngine, Runner, Timeline, percentile
from neuroada_serve.benchmark.peers import Peer, peer_command, peer_environment
from neuroada_serve.benchmark.report import environment, progress_bar
from neuroada_serve.benchmark.settings import OfflineConfig
from neuroada_serve.benchmark.workload import MERGED
from neuroada_serve.model.source import ModelSource, resolve_model

_WARM_UP_TOKENS = 8
_SWITCHES = 20

# phase -> figure -> function of the calls of one case in one round
FIGURES: dict[str, dict[str, Callable[[Sequence[Timeline]], float]]] = {
    "decode": {
        "decode_tokens_per_s": lambda calls: calls[0].decode_tokens_per_s,
        "tokens_per_s": lambda calls: calls[0].tokens_per_s,
    },
    "prefill": {"prefill_tokens_per_s": lambda calls: calls[0].prefill_tokens_per_s},
    "latency": {
        "ttft_ms": lambda calls: statistics.median(t for call in calls for t in call.ttft_ms),
        "tpot_ms": lambda calls: statistics.median(t for call in calls for t in call.tpot_ms),
    },
}
# phase -> distribution, its samples in one call, the percentiles to report
DISTRIBUTIONS: dict[str, dict[str, tuple[Callable[[Timeline], list[float]], tuple[int, ...]]]] = {
    "decode": {"step_ms": (lambda call: call.step_ms, (50, 99))},
    "prefill": {},
    "latency": {
        "ttft_ms": (lambda call: call.ttft_ms, (50, 90, 99)),
        "tpot_ms": (lambda call: call.tpot_ms, (50, 90, 99)),
    },
}


@dataclass
class Series:
    """All rounds of one case on one engine; a round is one call, or several (latency)."""

    runner: Runner
    case: Case
    rounds: list[list[Timeline]] = field(default_factory=list)

    def figures(self, name: str) -> list[float]:
        """One value per round."""
        return [FIGURES[self.case.phase][name](calls) for calls in self.rounds]


def bench_throughput(model: str, config: OfflineConfig, console: Console) -> dict[str, Any]:
    """Measure decode, whole-call and prefill throughput; report.py describes the result.

    Raises:
        UsageError: the model is not available, or a length does not fit it.
        EngineError: an engine or a peer failed.
    """
    return _bench("throughput", throughput_cases(config), model, config, console)


def bench_latency(model: str, config: OfflineConfig, console: Console) -> dict[str, Any]:
    """Measure time to first token and per output token; report.py describes the result.

    Raises: as bench_throughput.
    """
    return _bench("latency", latency_cases(config), model, config, console)


def _bench(
    benchmark: str, cases: Sequence[Case], model: str, config: OfflineConfig, console: Console
) -> dict[str, Any]:
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    source = resolve_model(model, lambda line: console.print(line, markup=False))
    num_adapters = num_adapters_needed(config)

    # 1. The check, in float32 and then in the dtype that is timed.
    checks: list[CaseCheck] = []
    if config.check:
        exact = OurEngine(source, config, "float32", num_adapters)
        checks += run_checks(exact, cases, config, config.output_len, console)
        del exact
        gc.collect()  # before the next copy of the weights is loaded
    ours = OurEngine(source, config, config.dtype, num_adapters)
    dtype = str(ours.base.dtype).removeprefix("torch.")
    if config.check and dtype != "float32":
        checks += run_checks(ours, cases, config, 2, console)
    result: dict[str, Any] = {
        "schema": "neuroada-bench/1",
        "benchmark": benchmark,
        **environment(),
        "settings": {
            "model": model,
            **asdict(config),
            "dtype": dtype,
            "device": str(ours.base.device),
            "threads": torch.get_num_threads(),
        },
        "check": [{**asdict(check), "ok": check.ok} for check in checks] if config.check else None,
        "peers": {},
        "cases": [],
    }
    if not all(check.ok for check in checks):
        return result  # times of wrong answers are useless

    # 2. The rounds.
    workload = _workload(ours, config)
    with _peers(source, ours, config, num_adapters, console) as peers:
        result["peers"] = {peer.name: peer.facts for peer in peers}
        series = plan(ours, peers, cases)
        run_rounds(series, workload.works, config.rounds, console)
        result["cases"] = [summary(one, series) for one in series]
    if not MERGED.isdisjoint(config.popularity):
        result["switch_ms"] = {f"k={k}": ours.switch_times_ms(k, _SWITCHES) for k in config.k}
    return result


def run_checks(
    engine: OurEngine, cases: Sequence[Case], config: OfflineConfig, steps: int, console: Console
) -> list[CaseCheck]:
    """Check every case on the first `steps` tokens of its first round."""
    workload, checker = _workload(engine, config), Checker(engine, steps)
    checks = []
    with progress_bar(console) as progress:
        for case in progress.track(cases, description=f"checking in {engine.base.dtype}"):
            checks.append(checker.check(case, workload.works(case, 0)))
    return checks


def plan(ours: OurEngine, peers: Sequence[Peer], cases: Sequence[Case]) -> list[Series]:
    """Order a round: each case on our engine, and on peers after the last of its ks."""
    series: list[Series] = []
    for position, case in enumerate(cases):
        series.append(Series(ours, case))
        following = cases[position + 1] if position + 1 < len(cases) else None
        if following is None or following.on_peer != case.on_peer:
            series += [Series(peer, case.on_peer) for peer in peers if peer.can(case)]
    return series


def run_rounds(
    series: Sequence[Series],
    works: Callable[[Case, int], list[Work]],
    num_rounds: int,
    console: Console,
) -> None:
    """Fill the series, after running each of them once to warm up.

    Args:
        works: returns the calls of one case in one round.
    """
    with progress_bar(console) as progress:
        for one in progress.track(series, description="warming up"):
            for work in works(one.case, num_rounds)[:1]:  # prompts of no other round
                one.runner.run(replace(work, output_len=min(work.output_len, _WARM_UP_TOKENS)))
        task = progress.add_task("measuring", total=num_rounds * len(series))
        for number in range(num_rounds):
            for one in series:
                one.rounds.append([one.runner.run(work) for work in works(one.case, number)])
                progress.advance(task)


def summary(one: Series, series: Sequence[Series]) -> dict[str, Any]:
    """Return the entry of one series in the `cases` of the result; see report.py."""
    case, name = one.case, one.runner.name
    figures = {figure: one.figures(figure) for figure in FIGURES[case.phase]}

    def ratios(other: Series | None) -> dict[str, float] | None:
        """Return the median over the rounds of the ratio to another series in the same round."""
        if other is None:
            return None
        return {
            figure: statistics.median(
                a / b for a, b in zip(values, other.figures(figure), strict=True)
            )
            for figure, values in figures.items()
        }

    def find(runner: str, wanted: Case) -> Series | None:
        return next((s for s in series if s.runner.name == runner and s.case == wanted), None)

    peers = {s.runner.name for s in series} - {OurEngine.name} if name == OurEngine.name else set()
    entry: dict[str, Any] = {
        "engine": name,
        "phase": case.phase,
        "concurrency": case.concurrency,
        "popularity": case.popularity,
        "k": case.k,
        "samples": figures,
        "median": {figure: statistics.median(values) for figure, values in figures.items()},
        "ratio_to_base": ratios(find(name, case.base)),
        "ratio_to_peer": {
            peer: ratio
            for peer in sorted(peers)
            if (ratio := ratios(find(peer, case.on_peer))) is not None
        },
        "distributions": {},
    }
    for distribution, (samples_of, percents) in DISTRIBUTIONS[case.phase].items():
        rounds = [[s for call in calls for s in samples_of(call)] for calls in one.rounds]
        pooled = [sample for samples in rounds for sample in samples]
        entry["distributions"][distribution] = {
            **{f"p{percent}": percentile(pooled, percent) for percent in percents},
            "rounds": [[round(sample, 4) for sample in samples] for samples in rounds],
        }
    return entry


def _workload(engine: OurEngine, config: OfflineConfig) -> Workload:
    tokenizer = engine.base.tokenizer
    specials = set(tokenizer.all_special_ids)
    vocab = int(engine.base.model.config.get_text_config().vocab_size)
    ids = [i for i in range(min(vocab, len(tokenizer))) if i not in specials]
    text = None
    if config.text_file is not None:
        text = list(tokenizer(config.text_file.read_text(), add_special_tokens=False).input_ids)
    return Workload(config, ids, text)


@contextmanager
def _peers(
    source: ModelSource,
    ours: OurEngine,
    config: OfflineConfig,
    num_adapters: int,
    console: Console,
) -> Iterator[list[Peer]]:
    """Start the requested peers, with LoRA adapters in a temporary folder, for the block."""
    if not config.peers:
        yield []
        return
    threads = torch.get_num_threads()
    setup = {
        "model": str(source.path),
        "dtype": str(ours.base.dtype).removeprefix("torch."),
        "device": str(ours.base.device),
        "lora_rank": config.lora_rank,
        "max_num_seqs": max(config.concurrency),
        "max_model_len": ours.engine.max_model_len,
        "threads": threads,
        "eager": config.peer_eager,
    }
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="neuroada-bench-")))
        loras = [folder / f"lora-{number}" for number in range(num_adapters)]
        for number, lora in enumerate(loras):
            save_random_lora(ours.base.spec, config.lora_rank, config.seed + number, lora)
        peers = []
        for name in dict.fromkeys(config.peers):
            with console.status(f"starting {name}"):
                command = peer_command(name, config.peer_python)
                peer = Peer(
                    name, command, setup, loras, peer_environment(name, threads, os.environ)
                )
            stack.callback(peer.close)
            peers.append(peer)
        yield peers
