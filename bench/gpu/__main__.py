"""Measure adapters on a GPU: Llama-3-8B's shape with random bf16 weights, in the real engine.

First the kernels are checked against the reference, replayed decode steps against eager ones and
unmerging against the bits it must restore. Then, each beside the floor (bytes that must move over
the measured copy bandwidth): decode steps by batch, distinct adapters and k; the same steps with a
batched LoRA r=16; chunks of prompts beside decodes, launches a layer and the warm-up; prefill by
gather and with the values written into the weights; the swap of a merged adapter; batches drawn
from 10,000 adapters on the device; the attention kernels beside a contiguous cache and SDPA; a card
filled with requests; and the tiles of the op. Every part stops at the time limit and says what it
left out. Needs torch, transformers, triton and rich.

    python -m bench.gpu [--minutes 8.5] [--out FILE] [--tiny --device cpu]

Not measured: HTTP, sampling other than greedy, other models.
"""

import gc
import time
from collections.abc import Sequence
from dataclasses import asdict

import torch
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM

from bench.gpu.attention import LLAMA_ATTENTION, TINY_ATTENTION, measure_attention
from bench.gpu.checks import check_classifier, check_engine, check_entries, check_kernels
from bench.gpu.model import (
    LLAMA_8B,
    NO_RUNS,
    TINY,
    Shape,
    add_adapters,
    cache_bytes,
    new_runner,
    random_base,
    run_tokens,
)
from bench.gpu.report import Report, copy_bandwidth, met_targets, show
from bench.gpu.serving import measure_filled, measure_mixed, measure_warm_up
from bench.gpu.steps import (
    measure_decode,
    measure_lora,
    measure_prefill,
    measure_residents,
    measure_swap,
)
from bench.gpu.tiles import check_early, measure_tiles
from bench.harness import new_parser, result_of, write
from neuroada_serve.config import EngineConfig
from neuroada_serve.engine.engine import Engine
from neuroada_serve.model.loader import adaptable_modules, matrix_shape


def adapter_bytes(shape: Shape) -> int:
    """Device memory for the adapters of the mixes, or for the many of k=1 if that is more."""
    config = AutoConfig.for_model("llama", **shape.model)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    rows = sum(matrix_shape(module)[0] for module in adaptable_modules(model).values())
    mixes = max(4, *shape.distinct) * sum(shape.ks)
    indexes = 2 * sum(shape.ks)  # an index takes what two adapters do
    return int(1.02 * 2 * rows * (max(mixes, shape.residents[1]) + indexes)) + (1 << 20)


def measure(report: Report, shape: Shape) -> None:
    """Run all parts: checks, steps of the engine, tiles."""
    device = report.device
    on_gpu = device.type == "cuda"

    # 1. Is it right?
    with report.part("check kernels"):
        check_kernels(report)
    if on_gpu:
        with report.part("check entries"):
            check_entries(report)
    with report.part("check engine"):
        check_engine(report)
    with report.part("check classifier"):
        check_classifier(report)
    torch._dynamo.reset()  # a process serves one model: nothing is compiled for two sizes

    # 2. Is it fast, in the engine?
    report.floors_ms["one millisecond"] = 1.0
    if on_gpu:
        chip = torch.cuda.get_device_properties(device)
        report.facts["multiprocessors"] = chip.multi_processor_count
    bandwidth = copy_bandwidth(device, shape.copy_bytes)
    report.facts["copy_bytes_per_s"] = bandwidth * 1000
    with report.part("attention kernels"):
        measure_attention(report, LLAMA_ATTENTION if shape is LLAMA_8B else TINY_ATTENTION)
    with report.part("steps"):
        measure_steps(report, shape, bandwidth)
    release_memory(device)
    with report.part("filled card"):
        measure_filled(report, shape)
    release_memory(device)

    # 3. Which tiles?
    if on_gpu:
        with report.part("check early launches"):
            check_early(report)
        with report.part("tiles"):
            measure_tiles(report)


def measure_steps(report: Report, shape: Shape, bandwidth: float) -> None:
    """Run the parts that take steps of one engine."""
    largest = max(shape.batches)
    config = EngineConfig(
        max_num_seqs=largest,
        max_num_batched_tokens=shape.prefill_tokens,
        adapter_memory=adapter_bytes(shape),
        adapter_host_memory=1 << 30,
        kv_cache_memory=cache_bytes(shape),
        prefix_cache_memory=0,
    )
    with run_tokens(NO_RUNS):
        engine = Engine(random_base(shape, report.device, torch.bfloat16), config)
        add_adapters(engine, shape.ks, max(4, *shape.distinct))
    try:
        runner = new_runner(engine, largest, shape.context)
        for batch in shape.batches:
            with report.part(f"decode, batch {batch}"), run_tokens(NO_RUNS):
                measure_decode(report, engine, shape, bandwidth, runner, batch)
        with report.part("mixed steps"):
            measure_mixed(report, engine, shape, runner)
        with report.part("warm-up"):
            measure_warm_up(report, engine, shape)
        with report.part("prefill"):
            measure_prefill(report, engine, shape)
        with report.part("swap"):
            measure_swap(report, engine, shape)
        runner = new_runner(engine, largest, shape.context)
        with report.part("residents"), run_tokens(NO_RUNS):
            measure_residents(report, engine, shape, runner)
        with report.part("lora"), run_tokens(NO_RUNS):
            measure_lora(report, engine, shape, runner)
    finally:
        engine.adapters.tiers.close()


def release_memory(device: torch.device) -> None:
    """Give the memory of an engine that is gone back to the device."""
    gc.collect()
    torch._dynamo.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; return 1 where a check failed or a part broke."""
    parser = new_parser("gpu", __doc__, model=None, rounds=None)
    parser.add_argument("--minutes", type=float, default=8.5, help="stop starting parts then")
    parser.add_argument("--tiny", action="store_true", help="a toy model, to try the script")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args(argv)

    torch.manual_seed(int(time.time()))
    report = Report(time.monotonic() + args.minutes * 60, torch.device(args.device))
    shape = TINY if args.tiny else LLAMA_8B
    measure(report, shape)
    targets = met_targets(report)
    show(report, targets, Console(stderr=True, width=110))
    found = {
        "shape": asdict(shape),
        "targets": targets,
        "checks": report.checks,
        "samples_ms": report.samples_ms,
        "floors_ms": report.floors_ms,
        "facts": report.facts,
        "skipped": report.skipped,
        "errors": report.errors,
        "not_measured": ["HTTP", "sampling other than greedy", "other models"],
    }
    write(result_of("gpu", {"minutes": args.minutes, "device": args.device}, found), args.out)
    return 0 if all(report.checks.values()) and not report.errors else 1


if __name__ == "__main__":
    raise SystemExit(main())
