"""Settings, frozen. The help text of a field is the help text of its command-line flag."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from neuroada_serve.errors import UsageError

DTYPES = ("auto", "float32", "bfloat16", "float16")


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


def help_of(config: type, name: str) -> str:
    """The help text of one field; also what the command line shows."""
    for f in fields(config):
        if f.name == name:
            return str(f.metadata["help"])
    raise KeyError(f"{config.__name__} has no field {name}")


def _at_least(config: object, **minimums: float) -> None:
    for name, minimum in minimums.items():
        value = getattr(config, name)
        if value is not None and not value >= minimum:  # refuses nan too
            raise UsageError(f"{name} must be at least {minimum}, got {value}")


@dataclass(frozen=True)
class EngineConfig:
    """How one base model is loaded and scheduled."""

    dtype: str = _option("auto", "Weight dtype: auto (as stored), float32, bfloat16 or float16.")
    device: str = _option("auto", "Torch device; auto takes cuda where there is one.")
    max_num_seqs: int = _option(16, "Most sequences that run at once.")
    max_model_len: int | None = _option(
        None, "Most tokens of prompt and answer together; default: what the model allows."
    )
    max_num_batched_tokens: int = _option(
        512, "Most tokens computed in one step; longer prompts are prefilled in chunks."
    )
    enforce_eager: bool = _option(
        False,
        "Run transformers' own forward. On CUDA, neither record decode steps as CUDA graphs nor "
        "compile elementwise parts; on the CPU, do not run whole steps as one kernel.",
    )
    merge: str = _option(
        "never",
        "never; NAME of an adapter to keep merged into the weights; or auto: keep merged "
        "whichever adapter most running requests use.",
    )
    allow_other_base: bool = _option(
        False, "Load adapters whose base_fingerprint differs from this base's; shapes must agree."
    )

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UsageError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        _at_least(self, max_num_seqs=1, max_model_len=1, max_num_batched_tokens=1)
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise UsageError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least "
                f"max_num_seqs ({self.max_num_seqs}): every running sequence needs one token a step"
            )


@dataclass(frozen=True)
class ServerConfig:
    """What the HTTP endpoint listens on and lets its clients do."""

    host: str = _option("127.0.0.1", "Address to listen on.")
    port: int = _option(8000, "TCP port to listen on; 0 takes a free one.")
    adapter_dir: Path | None = _option(
        None, "Directory of adapter folders: each is served under its folder's name."
    )
    allow_runtime_adapters: bool = _option(
        False,
        "Let clients load and unload adapters over HTTP, only from under --adapter-dir.",
    )
    max_waiting: int = _option(256, "Most requests that wait for a place; more get HTTP 503.")
    drain_timeout_s: float = _option(
        10.0, "Seconds that running requests may take to finish after a stop signal."
    )

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise UsageError(f"port must be within 0..65535, got {self.port}")
        _at_least(self, max_waiting=1, drain_timeout_s=0)


@dataclass(frozen=True)
class TrainConfig:
    """One training run."""

    k: int = _option(1, "Inputs kept per neuron: trainable values per row of each weight matrix.")
    lr: float | None = _option(
        None, "Peak learning rate; default 0.02 / sqrt(k): 0.02 at k=1, 0.007 at k=8."
    )
    epochs: float | None = _option(None, "Passes over the training rows; default 1.")
    max_steps: int | None = _option(None, "Optimizer steps; instead of --epochs.")
    batch_size: int = _option(8, "Rows per optimizer step.")
    max_length: int = _option(512, "Most tokens per row; longer rows are left out and counted.")
    eval_fraction: float = _option(
        0.1, "Share of the rows held out and scored before and after; 0 holds out none."
    )
    eval_data: Path | None = _option(
        None, "JSONL file of held-out rows; instead of --eval-fraction."
    )
    seed: int = _option(0, "Seed of the split and of the order of rows.")
    warmup_ratio: float = _option(0.1, "Share of the steps in which the learning rate rises.")
    dtype: str = _option(
        "auto", "Weight dtype while training: auto (as stored), float32 or bfloat16."
    )
    prompt_format: Literal["chat", "plain"] = _option(
        "chat",
        "chat: rows go through the base's chat template; plain: prompt and answer as they are.",
    )

    def __post_init__(self) -> None:
        if self.epochs is not None and self.max_steps is not None:
            raise UsageError("give --epochs or --max-steps, not both")
        if self.dtype not in DTYPES:
            raise UsageError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.prompt_format not in ("chat", "plain"):
            raise UsageError(f"prompt_format must be chat or plain, got {self.prompt_format!r}")
        _at_least(self, k=1, max_steps=1, batch_size=1, max_length=2, seed=0, warmup_ratio=0)
        if self.seed >= 2**32:
            raise UsageError(f"seed must be below 2**32, got {self.seed}")
        if self.warmup_ratio >= 1:
            raise UsageError(f"warmup_ratio must be below 1, got {self.warmup_ratio}")
        if self.lr is not None and not 0 < self.lr <= 1:
            raise UsageError(f"lr must be above 0 and at most 1, got {self.lr}")
        if self.epochs is not None and not self.epochs > 0:
            raise UsageError(f"epochs must be above 0, got {self.epochs}")
        if not 0 <= self.eval_fraction < 1:
            raise UsageError(f"eval_fraction must be within [0, 1), got {self.eval_fraction}")

    @property
    def peak_lr(self) -> float:
        """The learning rate used: `lr`, or the default for this k (method: it falls as k rises)."""
        return self.lr if self.lr is not None else 0.02 / self.k**0.5
