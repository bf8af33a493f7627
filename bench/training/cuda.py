"""Training steps on one GPU: one method after the other, memory by the allocator's peak."""

import argparse
import gc
import time
from contextlib import ExitStack
from typing import Any

import torch
from rich.console import Console

from bench.gpu.model import LLAMA_8B, TINY, random_base
from bench.training.methods import Job, Method, random_batch


def measure_cuda(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measure each method until the time is up; those left out say why."""
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
