"""Send a prompt whose steps find little memory, again and again, and check all other answers.

One process for each path (the one-kernel step in bfloat16, the modules in float32) runs --tries
rounds: it gives itself a limit on its address space (RLIMIT_AS), the KV cache's pool within it;
then a prompt as long as the model takes runs beside three short streams until it ends, and after it
--requests short requests, whose tokens are compared with those of the same requests before there
was a limit. The room for steps differs from try to try, so that memory is missing in other places.
A step that finds none runs in parts; the number of those is told. A process that crashes is
counted. Not measured: HTTP, a limit of a control group, where the kernel kills instead of refusing.

    python -m bench.memory [MODEL] [--tries 20] [--requests 200]
"""

import argparse
import json
import random
import resource
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from bench.harness import ROOT, new_parser, result_of, settings_of, write
from neuroada_serve.config import EngineConfig
from neuroada_serve.engine import step_executor
from neuroada_serve.engine.engine import Engine
from neuroada_serve.engine.memory import is_out_of_memory
from neuroada_serve.model.loader import load_base
from neuroada_serve.model.source import resolve_model
from neuroada_serve.ops import matrix
from neuroada_serve.request import FinishReason, Output, SamplingParams

PATHS = {"kernel": "bfloat16", "modules": "float32"}
LEAST_ROOM, MOST_ROOM = 2 << 20, 64 << 20  # bytes beyond what the process has before
_SHORT = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
_STREAM = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Start a process for each path and read what it says of every try."""
    parser = new_parser("memory", __doc__, rounds=None)
    parser.add_argument("--tries", type=int, default=20)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--path", choices=PATHS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.path:
        _run_path(args.model, args.path, args.tries, args.requests)
        return
    del args.path
    paths: dict[str, Any] = {}
    for path in PATHS:
        command = [sys.executable, "-m", "bench.memory", args.model, "--path", path]
        command += ["--tries", str(args.tries), "--requests", str(args.requests)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        tries = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        paths[path] = {"exit_code": done.returncode, "tries": tries}
        good = sum(t["alone"] and t["right"] == args.requests for t in tries)
        promised = f"{good} of {args.tries} tries as promised"
        refused = f"{sum(t['refused'] for t in tries)} steps without memory"
        print(f"{path}: exit code {done.returncode}, {refused}, {promised}", flush=True)
    write(result_of("memory", settings_of(args), {"paths": paths}), args.out)


def _run_path(model: str, path: str, tries: int, num_requests: int) -> None:
    """Print a line of JSON for every try."""
    # With AMX, oneDNN packs weights in blocks that the kernel does not read.
    with patch.object(matrix, "_onednn_packs", lambda: False):
        base = load_base(resolve_model(model), PATHS[path])
        engine = Engine(base, EngineConfig(prefix_cache_memory=0))
    assert (engine._runner._cpu_decoder is not None) == (path == "kernel")
    expected = _short_requests(engine, num_requests)
    streams = _streams(engine, long=False)
    draw = random.Random(0)
    for number in range(tries):
        share = (number + draw.random()) / tries
        room = int(LEAST_ROOM * (MOST_ROOM / LEAST_ROOM) ** share)
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (_address_space() + room, hard))
        with _refusals() as refused:
            found = _streams(engine, long=True)
            long = found.pop("long")
            again = _short_requests(engine, num_requests)
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        said = {
            "room_mb": room >> 20,
            "refused": sum(refused),
            "long_ended": str(long[0]),
            "long_error": long[2],
            "alone": all(found[name][0] is not FinishReason.ERROR for name in found),
            "streams_right": sum(found[name][1] == streams[name][1] for name in found),
            "right": sum(again[name] == tokens for name, tokens in expected.items()),
        }
        print(json.dumps(said), flush=True)


@contextmanager
def _refusals() -> Iterator[list[bool]]:
    """Note of every step that fails whether it found no memory."""
    refused: list[bool] = []

    def judge(error: BaseException) -> bool:
        refused.append(is_out_of_memory(error))
        return refused[-1]

    with patch.object(step_executor, "is_out_of_memory", judge):
        yield refused


def _streams(engine: Engine, long: bool) -> dict[str, tuple[FinishReason, list[int], str | None]]:
    """Ending of each of three streams, and of the long prompt beside them."""
    for i in range(3):
        engine.add_request(f"stream{i}", [40 + i, 8, 9], _STREAM)
    engine.step()
    if long:
        engine.add_request("long", [7] * (engine.max_model_len - 10), _SHORT)
    return {name: _ending(outputs) for name, outputs in _run(engine).items()}


def _short_requests(engine: Engine, num: int) -> dict[str, list[int]]:
    """Tokens of each of some short requests."""
    for i in range(num):
        engine.add_request(f"r{i}", [100 + i, 5, 300 + i, 11], _SHORT)
    return {name: _ending(outputs)[1] for name, outputs in _run(engine).items()}


def _run(engine: Engine) -> dict[str, list[Output]]:
    """Outputs of each request, once all have ended."""
    outputs: dict[str, list[Output]] = {}
    while engine.has_unfinished:
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
    return outputs


def _ending(outputs: list[Output]) -> tuple[FinishReason, list[int], str | None]:
    """Reason, tokens and error of one request."""
    assert outputs[-1].finish_reason is not None
    return (
        outputs[-1].finish_reason,
        [token for output in outputs for token in output.token_ids],
        outputs[-1].error,
    )


def _address_space() -> int:
    """Size of this process's address space in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


if __name__ == "__main__":
    main()
