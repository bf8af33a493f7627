"""Settings, frozen. Each field is also a flag, a variable and a key, see `options`."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from neuroada_serve.errors import UsageError
from neuroada_serve.options import (
    above_0,
    at_least,
    check_words,
    columns,
    k_by_module,
    number_or_auto,
    one_of,
    option,
    parse_bytes,
    redefined,
    weights,
    words,
)
from neuroada_serve.row_source import RowSource
from neuroada_serve.tasks import TaskType, task_of

LOG_LEVELS = ("debug", "info", "warning", "error", "critical")
PROMPT_BLOCK = 32  # tokens of a prompt that are computed together where shapes are fixed
DTYPES = ("auto", "float32", "bfloat16", "float16")
AUTO_DTYPE = "auto"  # as stored
DEMO = "demo"  # MODEL of the base that needs no hub
DEMO_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


@dataclass(frozen=True)
class EngineConfig:
    """Settings for loading one base model and scheduling its requests."""

    dtype: str = option(
        AUTO_DTYPE, "Weight dtype: auto (as stored), float32, bfloat16 or float16.", "Model"
    )
    device: str = option("auto", "Torch device; auto takes cuda where there is one.", "Model")
    chat_template: str | None = option(
        None,
        "Chat template, for a base that has none, several without a default, or one that fails: "
        "the name of one of the base's, or a Jinja file. An adapter is served with the one that it "
        "was trained with.",
        "Model",
        metavar="NAME|FILE",
    )
    max_num_seqs: int = option(16, "Maximum number of sequences that run at once.", "Scheduling")
    max_model_len: int | None = option(
        None,
        "Maximum number of tokens, prompt and answer together; default: what the model allows. It "
        "also chooses how a base with longrope or dynamic rotary scaling turns positions: "
        "longrope's long factors where it is above original_max_position_embeddings, else the "
        "short ones.",
        "Model",
    )
    max_num_batched_tokens: int | None = option(
        None,
        "Maximum number of tokens computed in one step; longer prompts are prefilled in chunks. "
        "Default: 512 on the CPU, 2048 on a GPU.",
        "Scheduling",
    )
    target_itl_ms: float | None = option(
        None,
        "Milliseconds between two tokens of an answer to keep while prompts are prefilled beside "
        "it: chunks get smaller until steps take less. Default: a step with prompts may take twice "
        "as long as one without.",
        "Scheduling",
    )
    enforce_eager: bool = option(
        False,
        "Run transformers' own forward. On CUDA, neither record decode steps as CUDA graphs nor "
        "compile elementwise parts; on the CPU, do not run whole steps as one kernel.",
        "Model",
    )
    deterministic: bool = option(
        False,
        "Answer a request with the same bits alone, in a batch and from the prefix cache, in "
        "bfloat16 too, by computing every token in products of fixed shapes. CPU only; slower.",
        "Model",
    )
    merge: str = option(
        "never",
        "never; the NAME of an adapter to keep merged into the weights; or auto: merge whichever "
        "adapter saves the most time.",
        "Adapters",
        metavar="never|NAME|auto",
    )
    adapter_memory: int | None = option(
        None,
        "Device memory for adapters, such as 512MiB; the least recently used are evicted first. "
        "Default: a tenth of a GPU's memory; 2GiB on the CPU, allocated as it is needed.",
        "Memory",
        metavar="SIZE",
        read=parse_bytes,
    )
    adapter_host_memory: int | None = option(
        None,
        "Host memory for copies of adapters, from which the device gets them without reading "
        "files. Default: 4GiB with a GPU, 256MiB on the CPU.",
        "Memory",
        metavar="SIZE",
        read=parse_bytes,
    )
    gpu_memory_utilization: float = option(
        0.9,
        "Share of a GPU's memory that the server may use: weights, adapters, the largest step, and "
        "the KV cache with all that is left.",
        "Memory",
    )
    kv_cache_memory: int | None = option(
        None,
        "Memory for the keys and values of all sequences, such as 4GiB. Default: what "
        "--gpu-memory-utilization leaves on a GPU; on the CPU a quarter of the free memory, at "
        "most 8GiB, taken as it is needed.",
        "Memory",
        metavar="SIZE",
        read=parse_bytes,
    )
    prefix_cache_memory: int | None = option(
        None,
        "Part of the KV cache that may keep the beginnings of prompts while no request uses them; "
        "0 shares nothing between requests. Default: all of it on a GPU; 512MiB on the CPU.",
        "Memory",
        metavar="SIZE",
        read=parse_bytes,
    )
    tenant_weights: Mapping[str, float] = option(
        {},
        "Shares of tenants under load, NAME=WEIGHT; 1 for all others.",
        "Scheduling",
        flag="tenant-weight",
        metavar="NAME=WEIGHT",
        read=weights,
        repeated=True,
    )
    adapter_weights: Mapping[str, float] = option(
        {},
        "Shares of adapters under load, within a tenant, NAME=WEIGHT; 1 for all others.",
        "Scheduling",
        flag="adapter-weight",
        metavar="NAME=WEIGHT",
        read=weights,
        repeated=True,
    )
    allow_other_base: bool = option(
        False,
        "Load adapters whose base_fingerprint differs from this base's; shapes must agree.",
        "Adapters",
    )

    def __post_init__(self) -> None:
        one_of(self, dtype=DTYPES)
        at_least(self, max_num_seqs=1, max_model_len=1, max_num_batched_tokens=1)
        at_least(self, adapter_memory=1, adapter_host_memory=0)
        at_least(self, kv_cache_memory=1, prefix_cache_memory=0)
        above_0(self, target_itl_ms=None, gpu_memory_utilization=1)
        if self.deterministic and self.merge == "auto":
            raise UsageError(
                "deterministic and merge=auto exclude each other: answers would depend on the load"
            )
        most = self.max_num_batched_tokens
        if self.deterministic and most is not None and most < self.max_num_seqs + PROMPT_BLOCK:
            raise UsageError(
                f"deterministic needs max_num_batched_tokens of at least max_num_seqs + "
                f"{PROMPT_BLOCK} ({self.max_num_seqs + PROMPT_BLOCK}): prompts are computed in "
                f"blocks of {PROMPT_BLOCK}"
            )
        for name, weight in {**self.tenant_weights, **self.adapter_weights}.items():
            if not isinstance(weight, int | float) or not 0 < weight < math.inf:
                raise UsageError(f"the weight of {name!r} must be above 0, got {weight}")
        if most is not None and most < self.max_num_seqs:
            raise UsageError(
                f"max_num_batched_tokens ({most}) must be at least "
                f"max_num_seqs ({self.max_num_seqs}): every running sequence needs one token a step"
            )


@dataclass(frozen=True)
class ServerConfig:
    """Settings of the HTTP endpoint: where it listens, and what clients may do."""

    host: str = option("127.0.0.1", "Address to listen on.", "HTTP")
    port: int = option(8000, "TCP port to listen on; 0 takes a free one.", "HTTP")
    adapter_dir: Path | None = option(
        None, "Directory of adapter folders; each is served under its folder's name.", "Adapters"
    )
    preload: bool = option(
        False,
        "Read the adapters of --adapter-dir before serving, as many as fit in memory. By default "
        "each is read when it is first requested.",
        "Adapters",
    )
    tenant_header: str | None = option(
        None,
        "HTTP header that names the tenant of a request, for fair shares and separate caches. Use "
        "it only behind a proxy that sets it: clients could name any tenant.",
        "Scheduling",
    )
    allow_runtime_adapters: bool = option(
        False,
        "Let clients load, unload, pin and merge adapters over HTTP. Only folders under "
        "--adapter-dir can be loaded.",
        "Adapters",
    )
    max_waiting: int = option(
        256,
        "Requests that may wait; further ones get HTTP 503, except from tenants, adapters or "
        "clients that hold less than their share of the queue.",
        "HTTP",
    )
    max_connections: int | None = option(
        None,
        "Maximum number of open connections. For a new one beyond it, the connection that has sent "
        "no whole request for longest is closed. Default: as many as the limit on open files "
        "allows, up to 8192.",
        "HTTP",
    )
    allowed_hosts: tuple[str, ...] = option(
        (),
        "Name to accept as Host and, from web pages, as Origin, besides localhost and addresses. "
        "Repeatable. '*' accepts all, for a server behind a proxy that checks them.",
        "HTTP",
        flag="allowed-host",
        metavar="NAME",
        repeated=True,
    )
    served_model_name: tuple[str, ...] = option(
        (),
        "Model name of the base, instead of its own. Repeatable: requests may use any of them, "
        "and answers show the first.",
        "HTTP",
        metavar="NAME",
        repeated=True,
    )
    log_level: str = option("info", "debug, info, warning, error or critical.", "Log")
    enable_log_requests: bool = option(
        False, "Log a line for a request: client, status, time, model, tokens; no prompts.", "Log"
    )
    drain_timeout_s: float = option(
        10.0, "Seconds that running requests may take to finish after a stop signal.", "HTTP"
    )
    step_timeout_s: float = option(  # as in vLLM and SGLang: a first step may compile for minutes
        300.0, "Seconds after which a step hangs: /health and new requests get HTTP 503.", "HTTP"
    )

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise UsageError(f"port must be within 0..65535, got {self.port}")
        at_least(self, max_waiting=1, drain_timeout_s=0, max_connections=1, step_timeout_s=1)
        one_of(self, log_level=LOG_LEVELS)
        if not all(self.served_model_name):
            raise UsageError("served_model_name must not be empty")
        if self.preload and self.adapter_dir is None:
            raise UsageError("--preload needs --adapter-dir, whose adapters it reads")


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one training run."""

    variables: ClassVar[str] = "NEUROADA_TRAIN_"

    k: int = option(
        1,
        "Inputs kept per neuron: trainable values per row of each weight matrix. By modules: "
        "'q_proj|v_proj=8,1' gives these two 8 and the others 1, 'q_proj|v_proj=8' trains them "
        "alone.",
        "What is trained",
        metavar="K|PATTERN=K,...,K",
        read=k_by_module,
        sets=("k", "k_pattern"),
    )
    k_pattern: Mapping[str, int] = option(
        {},
        "k by regular expression of a module's name, or of its end; the first match counts.",
        "What is trained",
        flag="",
    )
    selection: Literal["magnitude", "reverse", "random", "gradient", "matrix", "custom"] = option(
        "magnitude",
        "Inputs to keep: magnitude (largest weights), reverse (smallest), random, gradient "
        "(largest, over training rows), matrix (largest weights of the whole matrix, k per neuron "
        "on average and at most 4 k in one) or custom (--index-file).",
        "What is trained",
    )
    index_file: Path | None = option(
        None,
        "Safetensors file with M.index [d_out, k] for every module M trained, for --selection "
        "custom.",
        "What is trained",
    )
    selection_rows: int = option(256, "Training rows whose gradient selects.", "What is trained")
    coverage: float = option(
        1.0, "Share of the neurons, drawn by the seed, that get values.", "What is trained"
    )
    tune_bias: bool = option(
        False,
        "Train the biases of the layers that have some (GPT-2, Qwen2) as well.",
        "What is trained",
    )
    lr: float | Literal["auto"] | None = option(
        None,
        "Peak learning rate; default 0.02 / sqrt(k): 0.02 at k=1, 0.007 at k=8. auto tries a few "
        "for some steps each and draws lr.png.",
        "Steps",
        read=number_or_auto,
    )
    epochs: float | None = option(
        None,
        "Passes over the training rows. Default: while the held-out loss falls, at most 20 or 400 "
        "steps, and at least one; 6 where no rows are held out.",
        "Steps",
    )
    max_steps: int | None = option(None, "Optimizer steps; instead of --epochs.", "Steps")
    batch_size: int = option(8, "Rows per batch.", "Steps")
    gradient_accumulation: int = option(
        1,
        "Batches per optimizer step; equals one batch of so many times the rows, in less memory.",
        "Steps",
    )
    max_length: int = option(512, "Maximum number of tokens per row.", "Rows")
    max_model_len: int | None = option(
        None,
        "The --max-model-len that the adapter will be served with, where the base's rotary scaling "
        "depends on it (longrope, dynamic).",
        "Memory and speed",
    )
    too_long: Literal["skip", "cut"] = option(
        "skip",
        "Longer rows: skip leaves them out, cut removes their prompt's beginning; both counted.",
        "Rows",
    )
    task_type: TaskType = option(
        "CAUSAL_LM",
        "CAUSAL_LM learns to write answers; SEQ_CLS to classify plain texts, with a head of its "
        "own: a row's label is its class, or a number (see --labels).",
        "Task",
    )
    labels: tuple[str, ...] = option(
        (),
        "A classifier's labels, in order: bad,good. Default: the data set's own, else those of the "
        "rows, sorted, numbers by value. A single one names the number to learn: score.",
        "Task",
        metavar="A,B,...",
        read=words,
    )
    head_lr: float = option(1e-2, "Peak learning rate of a classifier's head.", "Task")
    columns: Mapping[str, str] = option(
        {},
        "Our keys for the data's columns, such as prompt=question,completion=reply.",
        "Rows",
        metavar="KEY=COLUMN,...",
        read=columns,
    )
    eval_fraction: float = option(
        0.1, "Share of the rows held out and scored before and after; 0 holds out none.", "Rows"
    )
    eval_data: Path | RowSource | None = option(
        None, "Held-out rows, as --data has them; instead of --eval-fraction.", "Rows", read=str
    )
    eval_steps: int | None = option(
        None,
        "Optimizer steps between scores of the held-out rows; the best values are kept. Default: "
        "after each pass, and up to four times within one of more than 250 steps.",
        "Steps",
    )
    patience: int | None = option(
        None,
        "Stop after this many scores without a fall of the held-out loss by a thousandth of the "
        "base's. Default: never with --epochs or --max-steps; else 3, followed by some steps with "
        "a falling learning rate.",
        "Steps",
    )
    samples: int = option(
        3,
        "Held-out rows that the adapter answers at the end. They are shown, and kept with their "
        "answers in its config and model card; 0: none.",
        "Results",
    )
    save_steps: int = option(
        50,
        "Optimizer steps between checkpoints, from which the same command resumes; 0: none.",
        "Results",
    )
    seed: int = option(0, "Seed of the split and of the order of rows.", "Steps")
    warmup_ratio: float = option(
        0.1, "Share of the steps in which the learning rate rises.", "Steps"
    )
    schedule: Literal["linear", "cosine", "constant"] = option(
        "linear",
        "Learning rate after the warm-up: falling to 0, linear or cosine, or constant. Without "
        "--epochs and --max-steps it falls only once the held-out loss no longer does.",
        "Steps",
    )
    weight_decay: float = option(
        0.0, "AdamW's weight decay, which pulls the values back to the base.", "Steps"
    )
    max_grad_norm: float = option(1.0, "Scale gradients down to this norm; 0: never.", "Steps")
    dtype: str = redefined(
        EngineConfig,
        "dtype",
        help="Weight dtype while training: auto (as stored), float32 or bfloat16.",
        group="Memory and speed",
    )
    bf16: bool = option(
        False, "Compute in bfloat16 (autocast) on weights of float32.", "Memory and speed"
    )
    recompute: Literal["nothing", "cheap", "all"] = option(
        "nothing",
        "Parts that the backward pass computes again to save memory: nothing, cheap (all but "
        "products and attention) or all (whole layers).",
        "Memory and speed",
    )
    recompute_share: float = option(
        1.0,
        "Share of the decoder layers that compute again; the last ones keep everything.",
        "Memory and speed",
    )
    compile: bool = option(
        False, "Compile each decoder layer with torch.compile.", "Memory and speed"
    )
    packing: bool = option(
        False, "Concatenate a batch's rows instead of padding them to one length.", "Rows"
    )
    bypass: bool = option(
        False,
        "Keep the trained values beside the weights, not in them: slower, but the base is never "
        "written.",
        "What is trained",
    )
    quantize: Literal["none", "int8", "nf4"] = option(
        "none", "Train beside a base in 8 or 4 bits (bitsandbytes).", "Memory and speed"
    )
    prompt_format: Literal["chat", "plain"] = option(
        "chat",
        "chat: rows go through the base's chat template; plain: prompt and answer as they are.",
        "Rows",
        flag="",
    )

    def __post_init__(self) -> None:
        if self.epochs is not None and self.max_steps is not None:
            raise UsageError("give --epochs or --max-steps, not both")
        one_of(self, dtype=DTYPES)
        check_words(self)
        for pattern, k in self.k_pattern.items():
            try:
                re.compile(pattern)
            except re.error as error:
                raise UsageError(f"k of {pattern!r}: no regular expression: {error}") from error
            if k < 0:
                raise UsageError(f"k of {pattern!r} must be at least 0, got {k}")
        at_least(self, k=0 if self.k_pattern else 1, max_steps=1, max_model_len=1, batch_size=1)
        at_least(self, max_length=2, seed=0, warmup_ratio=0, weight_decay=0, max_grad_norm=0)
        if (self.selection == "custom") != (self.index_file is not None):
            raise UsageError("--selection custom and --index-file belong together")
        if self.selection == "gradient" and self.quantize != "none":
            raise UsageError(
                "a quantized base has no gradient to select by; take another selection"
            )
        above_0(self, coverage=1, recompute_share=1, head_lr=1, epochs=None)
        at_least(self, gradient_accumulation=1, eval_steps=1, patience=1, save_steps=0, samples=0)
        at_least(self, selection_rows=1)
        if self.seed >= 2**32:
            raise UsageError(f"seed must be below 2**32, got {self.seed}")
        if self.warmup_ratio >= 1:
            raise UsageError(f"warmup_ratio must be below 1, got {self.warmup_ratio}")
        if self.labels and not task_of(self.task_type, self.labels).pools:
            raise UsageError("labels are a classifier's; give --task-type SEQ_CLS too")
        if isinstance(self.lr, str) and self.lr != "auto":
            raise UsageError(f"lr must be a number or auto, got {self.lr!r}")
        if self.lr != "auto":
            above_0(self, lr=1)
        if not 0 <= self.eval_fraction < 1:
            raise UsageError(f"eval_fraction must be within [0, 1), got {self.eval_fraction}")

    @property
    def most_k(self) -> int:
        """The largest k of any module."""
        return max(self.k, *self.k_pattern.values(), 1)

    @property
    def k_words(self) -> str:
        """k in the form that --k takes."""
        return ",".join([*(f"{p}={k}" for p, k in self.k_pattern.items()), str(self.k)])

    @property
    def peak_lr(self) -> float:
        """`lr`; with auto or none, the default for the largest k, which falls as k rises."""
        return self.lr if isinstance(self.lr, float | int) else 0.02 / self.most_k**0.5
