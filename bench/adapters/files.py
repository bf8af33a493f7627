"""Folders of many adapters, and engines that serve them."""

import os
from pathlib import Path
from typing import Any

from rich.console import Console

from neuroada_serve.adapters.format import CONFIG_FILE, WEIGHTS_FILE, adapter_files
from neuroada_serve.benchmark.adapters import magnitude_indices, random_adapter
from neuroada_serve.benchmark.report import progress_bar
from neuroada_serve.config import EngineConfig
from neuroada_serve.engine.engine import Engine
from neuroada_serve.model.loader import load_base
from neuroada_serve.model.source import ModelSource

BATCH = 16
PROMPT_LEN = 32
DEVICE_BYTES = 4 << 30


def make_adapters(source: ModelSource, root: Path, count: int, console: Console) -> None:
    """Make adapters 0..count - 1 in root/all that are not there yet."""
    missing = [n for n in range(count) if not (root / "all" / name_of(n) / CONFIG_FILE).exists()]
    if not missing:
        return
    base = load_base(source)
    indices = magnitude_indices(base, [1])[1]
    with progress_bar(console) as progress:
        task = progress.add_task("making adapters", total=len(missing))
        for done, number in enumerate(missing):
            folder = root / "all" / name_of(number)
            folder.mkdir(parents=True, exist_ok=True)
            weights, config = adapter_files(random_adapter(base.spec, indices, number))
            (folder / WEIGHTS_FILE).write_bytes(weights)  # in haste: save_adapter waits for disk
            (folder / CONFIG_FILE).write_bytes(config)
            progress.update(task, completed=done + 1, refresh=done % 100 == 0)


def subset(root: Path, count: int) -> Path:
    """Make a folder of the first `count` adapters: links to the same files."""
    folder = root / str(count)
    for number in range(count):
        own = folder / name_of(number)
        own.mkdir(parents=True, exist_ok=True)
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            if not (own / file).exists():
                os.link(root / "all" / name_of(number) / file, own / file)
    return folder


def name_of(number: int) -> str:
    """Name of an adapter, and of its folder."""
    return f"a{number:05}"


def new_engine(source: ModelSource, folder: Path, **config: Any) -> Engine:
    """Engine that has registered all adapters of a folder."""
    settings = {"adapter_memory": DEVICE_BYTES, "prefix_cache_memory": 0} | config
    engine = Engine(load_base(source), EngineConfig(max_num_seqs=BATCH, **settings))
    failed = engine.adapters.open_directory(folder).failed
    assert not failed, failed
    return engine
