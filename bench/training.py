"""What a training step costs: time and peak memory of ours beside other ways to train.

    neuroada    values inside the weights (train/inplace.py), the output head at the answers alone
    official    the authors' forward: every weight a scatter_add of its values, autograd through it
    mask        the weights themselves are trained, their gradients masked to the same entries
    lora        PEFT, rank by parameters closest to k=8's; and r=1, PEFT's smallest
    shira       PEFT's sparse tuner, r=1
    full        full fine-tuning

All take the same batch of random tokens, of which the last quarter of each row is trained on, and
AdamW. What is not ours takes the loss as transformers computes it from its labels; "all positions"
gives ours that loss too. "recompute" drops what is cheap to compute again (train/recompute.py), and
"compiled" has torch.compile take each decoder layer.

On the CPU, one process per method: methods take their steps in turn, round by round, so that all
see the same machine. The peak is that of the resident set above what was there once model and
method were loaded, over two steps of another process, whose freed memory goes back at once. On
CUDA (--llama-8b: random weights of Llama-3-8B's shape in bf16), one after the other in this
process, by the allocator's peak.

Writes training.json and training.png (training_gpu.*) to --out; the last line of stdout is the
JSON. Not measured: quality (bench/quality.py), several GPUs, quantized bases.

    python -m bench.training [MODEL] [--rounds 9] [--dtype bfloat16]
    python -m bench.training --llama-8b [--minutes 3]
"""

import argparse
import gc
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bench.gpu import LLAMA_8B, TINY, Shape, random_base
from neuroada_serve.adapters.select import magnitude_index
from neuroada_serve.benchmark.report import environment, progress_bar
from neuroada_serve.model.loader import adaptable_modules
from neuroada_serve.plots import BLUE, GREY, new_panels, png
from neuroada_serve.train.batches import predict
from neuroada_serve.train.inplace import inplace_training, magnitude_selections
from neuroada_serve.train.recompute import Recompute, set_recompute

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ROOT = Path(__file__).resolve().parent.parent
ANSWER_SHARE = 0.25
LR = 1e-3


@dataclass(frozen=True)
class Method:
    """One way to train. size: k, or the rank. share: of the layers that recompute."""

    way: str
    size: int = 0
    recompute: Recompute = "nothing"
    share: float = 1.0
    compiled: bool = False
    all_positions: bool = False

    @property
    def name(self) -> str:
        size = {"lora": f" r={self.size}", "shira": f" r={self.size}", "full": ""}
        notes = [f"recompute {self.recompute}"] if self.recompute != "nothing" else []
        notes += [f"{self.share:g} of the layers"] if self.share < 1 else []
        notes += ["compiled"] if self.compiled else []
        notes += ["all positions"] if self.all_positions else []
        note = f" ({', '.join(notes)})" if notes else ""
        return self.way + size.get(self.way, f" k={self.size}") + note


CPU_METHODS = [
    Method("neuroada", 1),
    Method("neuroada", 8),
    Method("neuroada", 20),
    Method("neuroada", 8, all_positions=True),
    Method("neuroada", 8, recompute="cheap"),
    Method("official", 1),
    Method("official", 8),
    Method("official", 20),
    Method("mask", 8),
    Method("lora", 4),
    Method("lora", 1),
    Method("shira", 1),
    Method("full"),
]
GPU_METHODS = [
    Method("neuroada", 8),
    Method("official", 8),
    Method("neuroada", 8, recompute="cheap"),
    Method("neuroada", 8, compiled=True),
    Method("neuroada", 1, compiled=True),
    Method("neuroada", 1),
    Method("lora", 4),
    Method("mask", 8),
    Method("neuroada", 20),
    Method("neuroada", 20, compiled=True),
    Method("neuroada", 8, all_positions=True),
    Method("official", 1),
    Method("official", 20),
    Method("neuroada", 8, recompute="all"),
    Method("neuroada", 1, recompute="cheap", compiled=True),
    Method("neuroada", 8, recompute="cheap", compiled=True),
    Method("neuroada", 1, recompute="all", compiled=True),
    Method("neuroada", 8, recompute="all", compiled=True),
    Method("neuroada", 1, recompute="all", share=0.75, compiled=True),
    Method("neuroada", 8, recompute="all", share=0.75, compiled=True),
    Method("lora", 1),
]


# --- the ways --------------------------------------------------------------------------------


@contextmanager
def prepared(model: Any, method: Method) -> Iterator[tuple[list[nn.Parameter], list[nn.Parameter]]]:
    """A model set up for a method: (parameters that are trained, those with a masked gradient)."""
    model.train()
    model.requires_grad_(False)
    with ExitStack() as stack:
        if method.way == "neuroada":
            modules = adaptable_modules(model)
            selections = magnitude_selections(modules, method.size)
            layers = stack.enter_context(inplace_training(model, modules, selections))
            trained = [layer.value for layer in layers.values()]
        elif method.way == "official":
            trained = _official(model, method.size)
        elif method.way == "mask":
            trained = _masked(model, method.size)
        elif method.way == "full":
            model.requires_grad_(True)
            trained = list(model.parameters())
        else:
            trained = _by_peft(model, method)
        stack.callback(set_recompute(model, method.recompute, method.share))
        if method.compiled:
            for block in model.model.layers:
                block.compile()
        yield trained, trained if method.way == "mask" else []


def _official(model: Any, k: int) -> list[nn.Parameter]:
    """The forward of the authors' code, utils/utils.py:75, with its parameters and positions."""
    trained = []
    for module in adaptable_modules(model).values():
        d_out, d_in = module.weight.shape
        index = magnitude_index(module.weight, k).long()
        starts = torch.arange(d_out, device=index.device)[:, None] * d_in
        module.weight_new = nn.Parameter(torch.zeros(d_out * k).to(module.weight))
        module.at = (starts + index).flatten()
        module.forward = MethodType(_official_forward, module)
        trained.append(module.weight_new)
    return trained


def _official_forward(self: Any, x: Tensor) -> Tensor:
    weight = self.weight.flatten().scatter_add(0, self.at, self.weight_new)
    return F.linear(x, weight.view(self.weight.shape), self.bias)


def _masked(model: Any, k: int) -> list[nn.Parameter]:
    trained = []
    for module in adaptable_modules(model).values():
        mask = torch.zeros_like(module.weight, dtype=torch.bool)
        mask.scatter_(1, magnitude_index(module.weight, k).long(), True)
        module.weight.requires_grad_(True)
        module.weight.mask = mask
        trained.append(module.weight)
    return trained


def _by_peft(model: Any, method: Method) -> list[nn.Parameter]:
    from peft import LoraConfig, ShiraConfig, inject_adapter_in_model

    if method.way == "lora":
        config = LoraConfig(r=method.size, lora_alpha=2 * method.size, target_modules=TARGETS)
    else:
        config = ShiraConfig(r=method.size, mask_type="random", target_modules=TARGETS)
    inject_adapter_in_model(config, model)
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.to(next(model.parameters()).device)
    return trained


class Job:
    """A method's training run: `step` takes one."""

    def __init__(self, model: Any, method: Method, batch: dict[str, Tensor], stack: ExitStack):
        self._model, self._method, self._batch = model, method, batch
        self._trained, self._masked = stack.enter_context(prepared(model, method))
        self.parameters = sum(p.numel() for p in self._trained)
        if method.way == "mask":
            self.parameters = sum(int(p.mask.sum()) for p in self._masked)
        self._optimizer = torch.optim.AdamW(self._trained, lr=LR, weight_decay=0.0)

    def step(self) -> None:
        if self._method.way == "neuroada" and not self._method.all_positions:
            found = predict(self._model, self._batch)
            loss = F.cross_entropy(found.logits, found.targets)
        else:
            loss = self._model(**self._batch, use_cache=False).loss
        loss.backward()
        for parameter in self._masked:
            assert parameter.grad is not None
            parameter.grad.mul_(parameter.mask)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if self._batch["input_ids"].is_cuda:
            torch.cuda.synchronize()


def random_batch(rows: int, width: int, vocabulary: int, device: str) -> dict[str, Tensor]:
    ids = torch.randint(vocabulary, (rows, width), generator=torch.Generator().manual_seed(0))
    labels = torch.full_like(ids, -100)
    answers = int(width * ANSWER_SHARE)
    labels[:, -answers:] = ids[:, -answers:]
    return {"input_ids": ids.to(device), "labels": labels.to(device)}


# --- is it right? ------------------------------------------------------------------------------

CHECKED = Shape(
    {
        "vocab_size": 64,
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "max_position_embeddings": 256,
        "initializer_range": 0.1,
        "tie_word_embeddings": False,
    }
)
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5}


def check(device: str, methods: Sequence[Method]) -> dict[str, Any]:
    """Gradients of ours against the official forward's: norm of the difference, of the norm.

    Compiled ones too, where such a method is to be measured: compiling takes a minute.
    """
    variants: list[dict[str, Any]] = [{}, {"recompute": "cheap"}, {"recompute": "all"}]
    if any(method.compiled for method in methods):
        variants.append({"compiled": True})
    found: dict[str, Any] = {}
    for dtype, bound in BOUNDS.items():
        for k in (1, 8):
            expected = _gradients(Method("official", k), device, dtype)
            for method in (Method("neuroada", k, **variant) for variant in variants):
                pairs = zip(_gradients(method, device, dtype), expected, strict=True)
                error = max(float((a - b).norm() / b.norm()) for a, b in pairs)
                # The compiler reorders norms, which transformers computes in float32 in any case.
                most = BOUNDS[torch.float32] if method.compiled else bound
                found[f"{method.name} {dtype}"] = {
                    "error": error,
                    "bound": most,
                    "ok": error <= most,
                }
    return found


def _gradients(method: Method, device: str, dtype: torch.dtype) -> list[Tensor]:
    """Per layer, at values that are the same for every method."""
    torch._dynamo.reset()
    model = random_base(CHECKED, torch.device(device), dtype).model
    batch = random_batch(4, 96, CHECKED.model["vocab_size"], device)
    draw = torch.Generator().manual_seed(1)
    with prepared(model, method) as (trained, _):
        for value in trained:
            random = torch.randn(value.numel(), generator=draw, dtype=torch.float64) * 0.05
            with torch.no_grad():
                value.copy_(random.view(value.shape))
        model(**batch, use_cache=False).loss.backward()
        return [value.grad.flatten().double() for value in trained if value.grad is not None]


# --- CPU: a process per method -----------------------------------------------------------------


def work(model_name: str, method: Method, dtype: str, rows: int, width: int) -> None:
    """A process of one method: takes a step for every line on stdin, and says how long it took."""
    from neuroada_serve.model.loader import load_base
    from neuroada_serve.model.source import resolve_model

    base = load_base(resolve_model(model_name), dtype=dtype, device="cpu")
    batch = random_batch(rows, width, base.model.config.vocab_size, "cpu")
    with ExitStack() as stack:
        job = Job(base.model, method, batch, stack)
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
        loaded = _memory_bytes("VmRSS")
        print(json.dumps({"parameters": job.parameters, "loaded_bytes": loaded}), flush=True)
        for _ in sys.stdin:
            started, cpu = time.perf_counter(), _cpu_seconds()
            job.step()
            found = {
                "step_s": time.perf_counter() - started,
                "cpu_s": _cpu_seconds() - cpu,
                "extra_bytes": _memory_bytes("VmHWM") - loaded,
            }
            print(json.dumps(found), flush=True)


def _memory_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


class Worker:
    """A method's process, from outside."""

    def __init__(self, method: Method, arguments: list[str], trimmed: bool = False) -> None:
        own = ["--work", json.dumps(asdict(method))]
        trim = {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.training", *arguments, *own],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, **(trim if trimmed else {})},
        )
        self.facts = self._read()

    def step(self) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("step\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # `_read` says what has become of it
        return self._read()

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            hint = "; out of memory? measure fewer with --only" if code == -signal.SIGKILL else ""
            raise RuntimeError(f"a worker ended with code {code}{hint}")
        found: dict[str, Any] = json.loads(line)
        return found


def measure_cpu(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    arguments = [args.model, "--dtype", args.dtype, "--rows", str(args.rows)]
    arguments += ["--width", str(args.width)]
    found: dict[str, Any] = {}
    workers: dict[str, Worker] = {}
    with progress_bar(console) as progress:
        task = progress.add_task("steps", total=(args.rounds + 3) * len(args.methods))

        def taken(worker: Worker) -> dict[str, Any]:
            step = worker.step()
            progress.advance(task)
            progress.refresh()
            return step

        # 1. Memory, one after the other.
        for method in args.methods:
            worker = Worker(method, arguments, trimmed=True)
            peaks = [taken(worker)["extra_bytes"] for _ in range(2)]
            worker.close()
            facts = {**worker.facts, "extra_bytes": max(peaks)}
            found[method.name] = {**facts, "step_s": [], "cpu_s": []}

        # 2. Time, in turn; the first step makes the optimizer's state.
        for method in args.methods:
            workers[method.name] = Worker(method, arguments)
            taken(workers[method.name])
        for _ in range(args.rounds):
            for name, worker in workers.items():
                step = taken(worker)
                found[name]["step_s"].append(step["step_s"])
                found[name]["cpu_s"].append(step["cpu_s"])
        for worker in workers.values():
            worker.close()
    return found


# --- CUDA --------------------------------------------------------------------------------------


def measure_cuda(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    deadline = time.monotonic() + 60 * args.minutes
    found: dict[str, Any] = {}
    for method in args.methods:
        if time.monotonic() > deadline:
            found[method.name] = {"left_out": "no time"}
            continue
        started = time.monotonic()
        try:
            found[method.name] = _measure_one(args, method)
        except Exception as error:  # one that does not fit the card must not end the others
            found[method.name] = {"left_out": f"{type(error).__name__}: {str(error)[:300]}"}
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()
        found[method.name]["seconds"] = round(time.monotonic() - started, 1)
        console.print(method.name, {k: v for k, v in found[method.name].items() if k != "cpu_s"})
    return found


def _measure_one(args: argparse.Namespace, method: Method) -> dict[str, Any]:
    on_gpu = args.device == "cuda"
    shape = TINY if args.tiny else LLAMA_8B
    model = random_base(shape, torch.device(args.device), torch.bfloat16).model
    batch = random_batch(args.rows, args.width, model.config.vocab_size, args.device)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    with ExitStack() as stack:
        torch._dynamo.reset()
        job = Job(model, method, batch, stack)
        for _ in range(2):
            job.step()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        steps = []
        for _ in range(args.rounds):
            started = time.perf_counter()
            job.step()
            steps.append(time.perf_counter() - started)
        peak = torch.cuda.max_memory_allocated() if on_gpu else 0
        return {
            "parameters": job.parameters,
            "step_s": steps,
            "peak_bytes": peak,
            "extra_bytes": max(0, peak - weights),
        }


# --- output ------------------------------------------------------------------------------------


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Per method its medians, and the same as shares of those of other methods.

    A share of time is the median over rounds of the ratio within a round where there are rounds.
    """
    made: dict[str, Any] = {}
    for name, one in found.items():
        if "left_out" in one:
            continue
        made[name] = {"step_s": statistics.median(one["step_s"])}
        made[name]["extra_gib"] = one["extra_bytes"] / 2**30
        if "peak_bytes" in one:
            made[name]["peak_gib"] = one["peak_bytes"] / 2**30
        for other in found:
            beside = found[other]
            if other == name or "left_out" in beside or other.startswith("neuroada"):
                continue
            pairs = zip(one["step_s"], beside["step_s"], strict=True)
            memory = "peak_bytes" if "peak_bytes" in one else "extra_bytes"
            made[name][f"of {other}"] = {
                "step": statistics.median(a / b for a, b in pairs),
                "memory": one[memory] / beside[memory] if beside[memory] else None,
            }
    return made


def show(found: dict[str, Any], made: dict[str, Any], console: Console) -> None:
    table = Table("method", "trained", "step s", "of official k=8", "memory GiB", "of official k=8")
    for name, one in found.items():
        if name not in made:
            table.add_row(name, "", one["left_out"])
            continue
        mine = made[name]
        ratio = mine.get("of official k=8", {})
        memory = mine.get("peak_gib", mine["extra_gib"])
        shares = [f"{ratio[what]:.2f}" if ratio.get(what) else "" for what in ("step", "memory")]
        cells = [f"{one['parameters']:,}", f"{mine['step_s']:.3f}", shares[0], f"{memory:.2f}"]
        table.add_row(name, *cells, shares[1])
    console.print(table)


def title_of(settings: dict[str, Any]) -> str:
    size = f"{settings['rows']} x {settings['width']}"
    return f"{settings['model']}, {settings['dtype']}, batch {size}"


def plot(found: dict[str, Any], made: dict[str, Any], title: str, path: Path) -> None:
    names = list(reversed(list(made)))
    colors = [BLUE if name.startswith("neuroada") else GREY for name in names]
    figure, (left, right) = new_panels(1, 2, 12, 0.9 + 0.3 * len(names), sharey=True)
    left.barh(names, [made[name]["step_s"] for name in names], color=colors)
    for place, name in enumerate(names):
        steps = found[name]["step_s"]
        left.plot(steps, [place] * len(steps), ".", color="black", markersize=3)
    left.set(xlabel="seconds per step; dots: every step")
    whole = "peak_gib" in made[names[0]]
    kind = "peak_gib" if whole else "extra_gib"
    right.barh(names, [made[name][kind] for name in names], color=colors)
    right.set(xlabel="peak GiB" + ("" if whole else " above what was loaded"))
    for side, form in ((left, "%.3g"), (right, "%.2f")):
        side.bar_label(side.containers[0], fmt=form, padding=12, fontsize=8)
        side.grid(visible=False, axis="y")
        side.set_xlim(right=1.15 * side.get_xlim()[1])
    figure.suptitle(title)
    path.write_bytes(png(figure))


def main(argv: list[str] | None = None) -> int:
    """Returns 1 where a gradient is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--dtype", default="auto", help="of the weights: auto, float32, bfloat16")
    parser.add_argument("--rows", type=int, help="rows per batch; 4, or 8 on CUDA")
    parser.add_argument("--width", type=int, help="tokens per row; 128, or 512 on CUDA")
    parser.add_argument("--rounds", type=int, default=7, help="steps measured per method")
    parser.add_argument("--llama-8b", action="store_true", help="that shape, on --device")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="with --llama-8b, to try the script")
    parser.add_argument("--minutes", type=float, default=5, help="with --llama-8b, when to stop")
    parser.add_argument("--no-check", action="store_true", help="leave the gradients unchecked")
    parser.add_argument("--only", default="", help="methods, by name, separated by semicolons")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--name", help="of the files written; default training or training_gpu")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    chosen = GPU_METHODS if args.llama_8b else CPU_METHODS
    wanted = {name for name in args.only.split(";") if name}
    if unknown := wanted - {method.name for method in chosen}:
        parser.error(f"unknown methods {unknown}; known: {[method.name for method in chosen]}")
    args.methods = [method for method in chosen if not wanted or method.name in wanted]
    args.rows = args.rows or (8 if args.llama_8b else 4)
    args.width = args.width or (512 if args.llama_8b else 128)
    if args.work:
        work(args.model, Method(**json.loads(args.work)), args.dtype, args.rows, args.width)
        return 0
    console = Console(stderr=True, width=140)
    checks = {} if args.no_check else check(args.device if args.llama_8b else "cpu", args.methods)
    console.print("errors of gradients", checks)
    measure: Callable[..., dict[str, Any]] = measure_cuda if args.llama_8b else measure_cpu
    found = measure(args, console)
    made = summary(found)
    show(found, made, console)
    settings = {
        "model": "random, Llama-3-8B's shape" if args.llama_8b else args.model,
        "dtype": "bfloat16" if args.llama_8b else args.dtype,
        "rows": args.rows,
        "width": args.width,
        "answer_share": ANSWER_SHARE,
        "threads": torch.get_num_threads(),
    }
    result = {
        "schema": "neuroada-bench/1",
        "benchmark": "training",
        **environment(),
        "settings": settings,
        "checks": checks,
        "methods": found,
        "summary": made,
    }
    name = args.name or ("training_gpu" if args.llama_8b else "training")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(found, made, title_of(settings), args.out / f"{name}.png")
    print(json.dumps(result))
    return 0 if all(one["ok"] for one in checks.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
