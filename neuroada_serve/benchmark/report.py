"""Report a benchmark: a table; with --out or --json one JSON document; with --out a plot.

The document, for `throughput` and `latency` (`schema` is "neuroada-bench/1"):

    benchmark, date, commit, modified   commit of the checkout, and whether files differ from it
    versions, hardware, environment     packages; cpu, cores, gpus; thread settings of OpenMP
    settings                            the flags as used, with dtype, device and threads resolved
    check       null if it was left out, else per case and dtype: {"case", "dtype",
                "num_tokens", "num_ties", "num_wrong", "largest_difference", "tolerance", "ok"};
                see check.py. If any is not ok, there are no cases.
    peers       name -> versions and settings of its two processes; see peers.py
    cases       one per engine and case:
        engine          "neuroada", or the peer's name
        phase           "decode", "prefill" or "latency"
        concurrency, popularity, k      k is null on the base and for peers
        samples         figure -> one value per round
        median          figure -> median of these
        ratio_to_base   figure -> median over the rounds of the ratio to the same engine's base
        ratio_to_peer   peer -> figure -> the same, ours / the peer's, on the same work
        distributions   name -> {"p50", ..., "rounds": every sample, per round}
    switch_ms   only with a merged case: "k=..." -> {"merge", "swap", "unmerge"} -> every sample
    not_measured    claims that these figures do not support

Figures: decode_tokens_per_s (from the first token of the last request on), tokens_per_s (output
tokens per second of the whole call: what can be compared between engines), prefill_tokens_per_s
(prompt tokens up to the first new one), ttft_ms and tpot_ms (median of the round). Of rates a
ratio above 1 is better, of times below 1.

For `serving`, cases are {"popularity", "rounds", "median"}; a round has its figures and, under
"requests", {"sent_s", "model", "ttft_ms", "itl_ms", "e2el_ms", "output_tokens", "error"} each.
"""

import json
import math
import os
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from neuroada_serve.benchmark.plot import case_label, plot

_TABLE_WIDTH = 140
_PACKAGES = ("torch", "transformers", "numpy", "numba", "triton", "safetensors")
_SETTINGS = (
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "GOMP_SPINCOUNT",
    "KMP_BLOCKTIME",
    "MKL_NUM_THREADS",
)


def progress_bar(console: Console) -> Progress:
    """Make a progress bar that draws only in a terminal, and only on progress: a drawing thread
    would take time from the measured work."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(
        *columns,
        TimeElapsedColumn(),
        console=console,
        auto_refresh=False,
        disable=not console.is_terminal,
    )


# --- facts -----------------------------------------------------------------------------------


def environment() -> dict[str, Any]:
    """Return date, commit, versions, hardware and thread settings of this process."""
    import torch

    from neuroada_serve import __version__

    versions = {"neuroada-serve": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    versions["torch"] = torch.__version__  # with its build, which the name of a wheel may lack
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **commit_of(Path(__file__).parent),
        "versions": versions,
        "hardware": hardware(),
        "environment": {name: os.environ.get(name) for name in _SETTINGS},
        "not_measured": ["answers' quality", "energy", "runs on other machines"],
    }


def commit_of(folder: Path) -> dict[str, Any]:
    """Return the commit of a folder's checkout, None outside of one, and whether files differ."""
    return {
        "commit": _git(folder, "rev-parse", "HEAD"),
        "modified": bool(_git(folder, "status", "--porcelain", "--untracked-files=no")),
    }


def _git(folder: Path, *arguments: str) -> str | None:
    """Return the output of git in a folder; None without git, or if it fails or prints nothing."""
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def hardware() -> dict[str, Any]:
    """Return processor, torch's vector instructions, cores of this process, memory and GPUs."""
    import torch

    gpus = []
    if torch.cuda.is_available():
        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": _cpu_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory_bytes / 2**30, 1),
        "gpus": gpus,
        "system": platform.platform(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


# --- output ----------------------------------------------------------------------------------


def write_report(
    result: Mapping[str, Any],
    out: Path | None,
    table_console: Console,
    console: Console,
    print_json: bool,
) -> None:
    """Print tables to one console and messages to the other; write JSON to `out` with a plot beside
    it, and, with `print_json`, as one line to stdout."""
    wide = Console(file=table_console.file, width=max(table_console.width, _TABLE_WIDTH))
    for table in tables(result):
        wide.print(table)  # wide, so that no figure is cut in a narrow terminal or a log
    document = json.dumps(plain(result), allow_nan=False)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(document + "\n")
        console.print(f"Written to {out}", markup=False, highlight=False)
        try:
            png = plot(result)
        except ImportError:
            console.print("no plot without matplotlib: pip install 'neuroada-serve[bench]'")
        else:
            if png is not None:
                out.with_suffix(".png").write_bytes(png)
    if print_json:
        print(document, flush=True)


def plain(value: Any) -> Any:
    """Convert a value for JSON: paths and infinities to text, nan to null."""
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def tables(result: Mapping[str, Any]) -> list[Table]:
    """Make one table per phase, one of the check's failures, or one of the serving cases."""
    if result["benchmark"] == "serving":
        return [_serving_table(result["cases"])]
    found = []
    wrong = [check for check in result["check"] or () if not check["ok"]]
    if wrong:
        table = Table("case", "dtype", "requests wrong", "difference", title="The check failed")
        for check in wrong:
            difference = f"{check['largest_difference']:.3g} (at most {check['tolerance']:g})"
            table.add_row(check["case"], check["dtype"], str(check["num_wrong"]), difference)
        found.append(table)
    for phase in dict.fromkeys(case["phase"] for case in result["cases"]):
        cases = [case for case in result["cases"] if case["phase"] == phase]
        found.append(_phase_table(phase, cases))
    if switches := result.get("switch_ms"):
        table = Table("switching one adapter", *switches, box=box.SIMPLE, title="median ms")
        for action in next(iter(switches.values())):
            medians = (statistics.median(times[action]) for times in switches.values())
            table.add_row(action, *(f"{median:.1f}" for median in medians))
        found.append(table)
    return found


def _phase_table(phase: str, cases: Sequence[Mapping[str, Any]]) -> Table:
    """Tabulate medians, their ratios to the base in brackets, and our ratios to each peer."""
    headline = list(cases[0]["median"])[-1]  # whole-call throughput, or time per output token
    peers = sorted({peer for case in cases for peer in case["ratio_to_peer"]})
    headings = [_HEADINGS[figure] for figure in cases[0]["median"]]
    for name, distribution in cases[0]["distributions"].items():
        headings.append(" ".join([_HEADINGS[name], *_percents(distribution)]))
    title = f"{phase}: medians, in brackets the ratio to the base"
    table = Table(title=title, box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("at once", justify="right")
    table.add_column("case", no_wrap=True)
    for heading in (*headings, *(f"ours / {peer}" for peer in peers)):
        table.add_column(heading, justify="right", no_wrap=True)
    for case in cases:
        row = [str(case["concurrency"]), f"{case['engine']}: {case_label(case)}"]
        for figure, median in case["median"].items():
            ratio = case["ratio_to_base"]
            row.append(f"{median:.4g}" + ("" if ratio is None else f" ({ratio[figure]:.2f})"))
        for distribution in case["distributions"].values():
            row.append(" ".join(f"{distribution[key]:.1f}" for key in _percents(distribution)))
        for peer in peers:
            ratio = case["ratio_to_peer"].get(peer)
            row.append("" if ratio is None else f"{ratio[headline]:.2f}")
        table.add_row(*row)
    return table


_HEADINGS = {
    "decode_tokens_per_s": "decode tok/s",
    "tokens_per_s": "call tok/s",
    "prefill_tokens_per_s": "prompt tok/s",
    "step_ms": "step ms",
    "ttft_ms": "TTFT ms",
    "tpot_ms": "TPOT ms",
}


def _percents(distribution: Mapping[str, Any]) -> list[str]:
    return [key for key in distribution if key != "rounds"]


def _serving_table(cases: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("figure (median over rounds)", *(case["popularity"] for case in cases))
    for figure in cases[0]["median"]:
        table.add_row(figure.replace("_", " "), *(f"{c['median'][figure]:.4g}" for c in cases))
    return table
