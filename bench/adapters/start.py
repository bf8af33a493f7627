"""Start of a server with many adapters, and the memory that they take."""

import ctypes
import gc
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.adapters.files import DEVICE_BYTES, name_of
from neuroada_serve.benchmark.report import progress_bar
from neuroada_serve.config import EngineConfig
from neuroada_serve.engine.engine import Engine
from neuroada_serve.model.loader import load_base
from neuroada_serve.model.source import ModelSource


def start(model: str, folder: Path, count: int) -> dict[str, float]:
    """Seconds until a server listens, and until it has given a token of its last adapter."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "neuroada_serve", "serve", model, "--port", "0"]
    command += ["--adapter-dir", str(folder)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if found := re.search(r"Serving .* on (http://\S+)/v1", line):
                break
        else:
            raise SystemExit("the server did not start: " + "".join(said[-5:]))
        listening_s = time.perf_counter() - started
        body = {"model": name_of(count - 1), "prompt": "Hello", "max_tokens": 1}
        request = urllib.request.Request(
            f"{found[1]}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            assert reply.status == 200
        answered_s = time.perf_counter() - started
        process.terminate()
    return {"adapters": count, "listening_s": listening_s, "first_token_s": answered_s}


def memory(source: ModelSource, folder: Path, count: int, console: Console) -> dict[str, Any]:
    """Measure this process's memory as adapters are registered, and then loaded."""
    engine = Engine(
        load_base(source),
        EngineConfig(adapter_memory=DEVICE_BYTES, adapter_host_memory=0, prefix_cache_memory=0),
    )
    before = resident_bytes()
    engine.adapters.open_directory(folder)
    registered = resident_bytes()
    first = min(count // 10, 100)
    at_first = registered
    nnz = 0
    with progress_bar(console) as progress:
        task = progress.add_task("bringing adapters in", total=count)
        for number in range(count):
            if number == first:
                at_first = resident_bytes()
            engine.adapters.bring_in(name_of(number))
            progress.update(task, completed=number + 1, refresh=number % 100 == 0)
    end = resident_bytes()
    assert engine.adapters.bank.num_resident == count
    nnz = engine.adapters.store.get(name_of(0)).nnz
    each = (end - at_first) / max(1, count - first)
    header = (registered - before) / count
    return {
        "adapters": count,
        "nnz": nnz,
        "values_bytes": 2 * nnz,
        "process_bytes_per_registered_adapter": header,
        "process_bytes_per_resident_adapter": each + header,
        "overhead_bytes_per_resident_adapter": each + header - 2 * nnz,
        "device_used_bytes": engine.adapters.bank.memory.used_bytes,
    }


def resident_bytes() -> int:
    """Resident bytes of this process, without what it has freed."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
