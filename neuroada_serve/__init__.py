"""NeuroAda Serve: many sparse adapters, one frozen base model, one process."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neuroada_serve.adapters.format import Adapter, save_adapter
    from neuroada_serve.adapters.reader import load_adapter
    from neuroada_serve.engine.llm import LLM
    from neuroada_serve.errors import NeuroAdaError
    from neuroada_serve.request import SamplingParams

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "Adapter",
    "NeuroAdaError",
    "SamplingParams",
    "__version__",
    "load_adapter",
    "save_adapter",
]

# Imported on first use: `neuroada --help` should not wait three seconds for torch.
_HOME = {
    "LLM": "engine.llm",
    "Adapter": "adapters.format",
    "NeuroAdaError": "errors",
    "SamplingParams": "request",
    "load_adapter": "adapters.reader",
    "save_adapter": "adapters.format",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with uncollected():
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


@contextmanager
def uncollected() -> Iterator[None]:
    """Pause garbage collection. Importing torch and transformers makes very many objects, all of
    which stay; scanning them again and again takes a good part of a start (bench/LOG.md)."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
