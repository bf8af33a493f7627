"""Layout of `--help`: flags by group, and examples that run in a clone of the repository."""

from collections.abc import Mapping
from typing import Any

from typer import BadParameter
from typer.core import TyperCommand

from neuroada_serve.cli.flags import origin_of
from neuroada_serve.options import GROUP

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
    """A command whose help shows flags by group, and examples ready to type."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments; an error names the variable or the file that a value comes from."""
        try:
            return super().parse_args(ctx, args)
        except BadParameter as error:
            if (parameter := error.param) is not None and parameter.name:
                flag = max(parameter.opts, key=len)
                origin = origin_of(ctx, parameter.name, flag, str(parameter.envvar))
                if origin not in (None, flag):
                    error.param_hint = repr(origin)
            raise

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments, then flags by group; flags without a group come last."""
        groups: dict[str, list[tuple[str, str]]] = {"Arguments": []}
        for parameter in self.get_params(ctx):
            if (record := parameter.get_help_record(ctx)) is None:
                continue
            is_argument = parameter.param_type_name == "argument"
            group = "Arguments" if is_argument else getattr(parameter, "rich_help_panel", None)
            groups.setdefault(group or GROUP, []).append(record)
        groups[GROUP] = groups.pop(GROUP)  # --help is in it
        for group, found in groups.items():
            if found:
                with formatter.section(group):
                    formatter.write_dl(found)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write one example per line, without wrapping."""
        examples = (self.epilog or "").splitlines()
        if examples:
            with formatter.section("Examples" if len(examples) > 1 else "Example"):
                for line in examples:
                    formatter.write(f"  {line}\n")
