"""Tiles of the kernels: ways to cut a launch, timed by tokens and k."""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor

from bench.gpu.report import Report, time_ms
from neuroada_serve.adapters.select import magnitude_index
from neuroada_serve.ops.bypass import TokenSlots
from neuroada_serve.ops.triton_bypass import BypassTile, bypass_add_triton_, bypass_tile

SITES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}


def candidates(num_tokens: int) -> list[BypassTile]:
    """Tiles that might be fast for so many tokens."""
    tiles = [BypassTile("direct", rows, warps=4) for rows in (128, 256, 512)]
    if num_tokens > 1:
        for rows, warps in ((256, 4), (512, 4), (512, 8), (1024, 8), (2048, 8)):
            tiles.append(BypassTile("staged", rows, warps=warps))
        for rows, lanes, warps in ((64, 16, 4), (64, 64, 8), (128, 32, 8)):
            tiles.append(BypassTile("lanes", rows, lanes=lanes, warps=warps))
    tiles += [
        BypassTile(t.way, t.rows, warps=t.warps, early=True)
        for t in tiles
        if t.way != "lanes" and t.rows == 512
    ]
    return tiles


class Layer:
    """Four launches of one layer, over `copies` sets of values so that no cache holds them."""

    def __init__(self, num_tokens: int, k: int, device: torch.device) -> None:
        self.k = k
        rows = sum(d_out for d_out, _ in SITES.values())
        self.copies = max(1, min(64, (256 << 20) // (num_tokens * rows * k * 2)))
        size = (num_tokens, self.copies * rows * k)
        self.pool = torch.randn(size, device=device, dtype=torch.bfloat16)
        self.where = TokenSlots(tuple(range(num_tokens)), device).on_device
        self.parts = []  # y, x, index of each site
        for d_out, d_in in SITES.values():
            y, x = (torch.randn(num_tokens, d, device=device).bfloat16() for d in (d_out, d_in))
            index = torch.rand(d_out, d_in, device=device).topk(k).indices.int()
            self.parts.append((y, x, index))

    def run(self, tile: BypassTile) -> None:
        """Launch every site on every set of values."""
        start = 0
        for _ in range(self.copies):
            for y, x, index in self.parts:
                size = index.numel()
                values = self.pool[:, start : start + size].view(-1, *index.shape)
                bypass_add_triton_(y, x, index, values, *self.where, tile)
                start += size


def measure_tiles(report: Report) -> None:
    """Time every tile that might be fast, by tokens and k, in milliseconds per layer."""
    for num_tokens in (64, 16, 256, 1):
        for k in (1, 8, 20):
            layer = Layer(num_tokens, k, report.device)
            chosen = bypass_tile(num_tokens, k, 4096, 2)
            report.facts.setdefault("tiles", {})[f"{num_tokens}/k{k}"] = asdict(chosen)
            for tile in candidates(num_tokens):
                name = f"tile/{num_tokens}/k{k}/{tile.way} {tile.rows}x{tile.lanes} w{tile.warps}"
                name += " early" if tile.early else ""
                if not report.may_start(name, 8):
                    continue
                try:
                    replay = recorded(partial(layer.run, tile))
                    times = [time_ms(replay, report.device) / layer.copies for _ in range(5)]
                except Exception as error:  # a tile that the chip cannot hold
                    report.errors[name] = repr(error)[:300]
                    continue
                report.samples_ms[name] = times


def recorded(launch: Callable[[], None]) -> Callable[[], None]:
    """Record these launches as a CUDA graph."""
    launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    graph.replay()
    return graph.replay


def check_early(report: Report) -> None:
    """Check that launches early after the GEMM that writes y give the same bits as late ones."""
    device = report.device
    x, weight = (torch.randn(n, 4096, device=device).bfloat16() for n in (64, 28672))
    index = magnitude_index(weight, 1)
    bypass = torch.randn(64, 28672, 1, device=device).bfloat16()
    slots = TokenSlots(tuple(range(64)), device).on_device
    results = []
    for early in (False, True):
        y = torch.empty(64, 28672, device=device, dtype=torch.bfloat16)

        def layer(y: Tensor = y, early: bool = early) -> None:
            torch.mm(x, weight.t(), out=y)
            bypass_add_triton_(
                y, x, index, bypass, *slots, BypassTile("staged", 512, warps=8, early=early)
            )

        replay = recorded(layer)
        outputs = []
        for _ in range(20):
            y.fill_(float("nan"))
            replay()
            outputs.append(y.clone())
        results.append(outputs)
        report.samples_ms[f"gate_up GEMM with op, {'early' if early else 'late'}"] = [
            time_ms(replay, device, 10) for _ in range(5)
        ]
    report.checks["early launches"] = all(
        torch.equal(late, early) for late, early in zip(*results, strict=True)
    )
