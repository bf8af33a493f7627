"""`neuroada convert`: other formats to our adapters, and our adapters to PEFT's SHiRA."""

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from neuroada_serve.cli.common import app, command, notify, out
from neuroada_serve.config import AUTO_DTYPE

if TYPE_CHECKING:
    from neuroada_serve.model.convert import Conversion
    from neuroada_serve.model.source import ModelSource

convert_app = typer.Typer(
    name="convert",
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Convert other formats to adapters, and adapters to SHiRA.",
)
app.add_typer(convert_app)

Base = Annotated[
    str,
    typer.Option(
        metavar="MODEL", help="The base: a local folder, a .gguf file, demo, or a hub id."
    ),
]
OutDir = Annotated[Path, typer.Option("--out", help="New folder to write.")]
MostK = Annotated[
    int | None,
    typer.Option("--k", help="Keep the k largest values of each row; default: all of them."),
]
Dtype = Annotated[
    str,
    typer.Option(help="Dtype of the values: auto (as stored), bfloat16, float16 or float32."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]


def _convert_command(function: Callable[..., None]) -> Callable[..., None]:
    """Register a function as `convert NAME`."""
    return command(function, convert_app, function.__name__.replace("_", "-"))


@_convert_command
def official(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN",
            help="Folder with positions.npy and tunable_para/, or a checkpoint's.",
        ),
    ],
    base: Base,
    out_dir: OutDir,
    k: MostK = None,
    dtype: Dtype = AUTO_DTYPE,
    json_output: Json = False,
) -> None:
    """Convert a run of the method's official code. Its pickle is read as data, not executed."""
    from neuroada_serve.model.convert import convert_official

    _show(convert_official(_source(base, out_dir), run, out_dir, k, dtype), out_dir, json_output)


@_convert_command
def shira(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Folder that PEFT wrote.")],
    base: Base,
    out_dir: OutDir,
    k: MostK = None,
    dtype: Dtype = AUTO_DTYPE,
    json_output: Json = False,
) -> None:
    """Convert a SHiRA adapter of PEFT."""
    from neuroada_serve.model.convert import convert_shira

    _show(convert_shira(_source(base, out_dir), adapter, out_dir, k, dtype), out_dir, json_output)


@_convert_command
def supertuning(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Folder that PEFT wrote.")],
    base: Base,
    out_dir: OutDir,
    k: MostK = None,
    dtype: Dtype = AUTO_DTYPE,
    json_output: Json = False,
) -> None:
    """Convert a Super-Tuning adapter of PEFT."""
    from neuroada_serve.model.convert import convert_supertuning

    _show(
        convert_supertuning(_source(base, out_dir), adapter, out_dir, k, dtype),
        out_dir,
        json_output,
    )


@_convert_command
def diff(
    tuned: Annotated[
        str, typer.Argument(metavar="MODEL", help="The fine-tuned model, as --base names one.")
    ],
    base: Base,
    out_dir: OutDir,
    k: Annotated[int, typer.Option(help="Keep the k largest differences of each row.")],
    dtype: Annotated[
        str, typer.Option(help="Dtype of the values: auto (float32), bfloat16, float16 or float32.")
    ] = AUTO_DTYPE,
    json_output: Json = False,
) -> None:
    """Convert the largest differences of a fine-tuned model."""
    from neuroada_serve.model.convert import convert_diff

    result = convert_diff(_source(base, out_dir), _source(tuned, out_dir), out_dir, k, dtype)
    _show(result, out_dir, json_output)


@_convert_command
def to_shira(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Adapter folder.")],
    base: Base,
    out_dir: OutDir,
) -> None:
    """Convert an adapter to SHiRA, which PEFT loads."""
    from neuroada_serve.model.convert import export_shira

    r = export_shira(_source(base, out_dir), adapter, out_dir)
    notify(f"SHiRA adapter with r={r} written to {out_dir}; peft.PeftModel loads it.")


def _source(model: str, out_dir: Path) -> "ModelSource":
    """Fetch a model's files, after checking that the result can be written."""
    from neuroada_serve.adapters.durable import check_new_folder
    from neuroada_serve.model.source import resolve_model

    check_new_folder(out_dir)
    return resolve_model(model, notify)


def _show(result: "Conversion", out_dir: Path, json_output: bool) -> None:
    for warning in result.warnings:
        notify(f"Warning: {warning}.")
    config = result.adapter.config
    if json_output:
        report: dict[str, Any] = {
            "k": config.k,
            "entries": result.num_entries,
            "filled": result.filled,
            "energy_kept": result.kept_in_all,
            "energy_kept_by_module": dict(result.kept),
            "warnings": list(result.warnings),
        }
        print(json.dumps(report))
    else:
        out.print(_table(result))
    notify(
        f"Adapter with k={config.k} written to {out_dir}: {result.num_entries:,} entries changed, "
        f"{result.kept_in_all:.2%} of their energy kept"
        + (f"; {result.filled:.0%} of its values only fill rows up." if result.filled else ".")
    )


def _table(result: "Conversion") -> Table:
    """Tabulate the energy kept by kind of module, with the module that keeps least of it."""
    groups: defaultdict[str, dict[str, float]] = defaultdict(dict)
    for name, kept in result.kept.items():
        groups[name.rpartition(".")[2]][name] = kept
    table = Table("modules", "number", "energy kept: mean", "lowest")
    table.add_column("in", overflow="fold")
    for ending, kept_in in groups.items():
        lowest = min(kept_in, key=lambda name: kept_in[name])
        mean = sum(kept_in.values()) / len(kept_in)
        table.add_row(ending, str(len(kept_in)), f"{mean:.2%}", f"{kept_in[lowest]:.2%}", lowest)
    return table
