"""What `--help` shows beside the flags' own words: flags by topic, and examples that run as they
stand in a clone of the repository."""

from collections.abc import Mapping
from typing import Any

from typer.core import TyperCommand

# Command -> topic -> parameters of its function. Those not named here stand under "Options".
TOPICS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "serve": {
        "Adapters": ("adapter", "adapter_dir", "preload", "allow_runtime_adapters", "merge"),
        "HTTP": (
            *("host", "port", "allowed_host", "served_model_name", "max_waiting"),
            *("max_connections", "drain_timeout_s"),
        ),
        "Log": ("log_level", "enable_log_requests"),
        "Fair shares": ("tenant_header", "tenant_weight", "adapter_weight"),
        "Memory": ("adapter_memory", "adapter_host_memory", "prefix_cache_memory"),
        "Engine": (
            *("max_num_seqs", "max_model_len", "max_num_batched_tokens"),
            *("dtype", "device", "chat_template", "enforce_eager", "deterministic"),
        ),
    },
    "train": {
        "Rows": (
            *("data", "columns", "plain", "chat_template", "max_length", "too_long", "packing"),
            *("check", "eval_data", "eval_fraction"),
        ),
        "Task": ("task_type", "labels", "head_lr"),
        "What is trained": (
            *("k", "selection", "index_file", "selection_rows", "coverage", "tune_bias", "bypass"),
        ),
        "Steps": (
            *("epochs", "max_steps", "batch_size", "gradient_accumulation", "lr", "schedule"),
            *("warmup_ratio", "weight_decay", "max_grad_norm", "eval_steps", "patience", "seed"),
        ),
        "Memory and speed": (
            *("dtype", "max_model_len", "bf16", "quantize"),
            *("recompute", "recompute_share", "compile_"),
        ),
        "Results": ("out_dir", "samples", "save_steps", "fresh", "publish", "publish_improved"),
    },
    "eval": {
        "Rows": ("data", "columns", "limit", "plain", "chat_template"),
        "Models": ("adapter", "base", "dtype", "max_model_len"),
        "Scores": ("metric", "choices", "answer_key", "trigger", "pick", "max_tokens"),
        "Results": ("out_file", "save", "json_output"),
    },
}

_TICKETS = "--data examples/data/tickets.csv --columns prompt=ticket,completion=team"
EXAMPLES: Mapping[str, tuple[str, ...]] = {
    "demo": ("neuroada demo",),
    "serve": (
        "neuroada serve demo --adapter sql=examples/adapters/sql --adapter examples/adapters/json",
        "neuroada serve demo --adapter-dir examples/adapters --allow-runtime-adapters",
    ),
    "train": (
        f"neuroada train demo {_TICKETS} --out served/team --check",
        f"neuroada train demo {_TICKETS} --out served/team",
    ),
    "eval": (f"neuroada eval demo {_TICKETS} --adapter served/team --limit 20",),
    "chat": (
        "neuroada chat demo",
        "neuroada chat demo --adapter examples/adapters/pirate --adapter examples/adapters/sql",
    ),
    "generate": (
        'neuroada generate demo --adapter examples/adapters/pirate "How do I clean a window?"',
    ),
    "classify": ('neuroada classify demo --adapter served/mood "Never again."',),
    "merge": ("neuroada merge demo examples/adapters/sql --out merged",),
    "inspect": ("neuroada inspect examples/adapters/sql",),
    "bench throughput": (
        "neuroada bench throughput demo --concurrency 1,16 --k 1 --out throughput.json",
    ),
    "bench latency": ("neuroada bench latency demo --rounds 3",),
    "bench serving": (
        "neuroada bench serving --model demo --request-rate 4",
        "neuroada bench serving --base-url http://127.0.0.1:8000 --lora-modules sql,json",
    ),
    "convert official": ("neuroada convert official RUN --base demo --out my-adapter",),
    "convert shira": ("neuroada convert shira PEFT_FOLDER --base demo --out my-adapter",),
    "convert supertuning": (
        "neuroada convert supertuning PEFT_FOLDER --base demo --out my-adapter",
    ),
    "convert diff": ("neuroada convert diff TUNED --base demo --k 16 --out my-adapter",),
    "convert to-shira": (
        "neuroada convert to-shira examples/adapters/sql --base demo --out sql-shira",
    ),
}


class Command(TyperCommand):
    """A command whose help has its flags by topic, and its examples as they are to be typed."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments, then flags by topic; those of none come last."""
        topic_of = {
            name: topic
            for topic, names in TOPICS.get(self.name or "", {}).items()
            for name in names
        }
        topics = ["Arguments", *dict.fromkeys(topic_of.values()), "Options"]
        records: dict[str, list[tuple[str, str]]] = {topic: [] for topic in topics}
        for parameter in self.get_params(ctx):
            if (record := parameter.get_help_record(ctx)) is None:
                continue
            is_argument = parameter.param_type_name == "argument"
            topic = "Arguments" if is_argument else topic_of.get(parameter.name or "", "Options")
            records[topic].append(record)
        for topic, found in records.items():
            if found:
                with formatter.section(topic):
                    formatter.write_dl(found)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the examples, a line each, however long."""
        examples = (self.epilog or "").splitlines()
        if examples:
            with formatter.section("Examples" if len(examples) > 1 else "Example"):
                for line in examples:
                    formatter.write(f"  {line}\n")
