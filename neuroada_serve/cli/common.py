"""Parts shared by the commands: registration, options, and messages to the user."""

import gc
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from neuroada_serve import __version__, uncollected
from neuroada_serve.cli.flags import with_flags
from neuroada_serve.cli.help import EXAMPLES, Command
from neuroada_serve.config import ADAPTER_NAME, EngineConfig
from neuroada_serve.errors import EngineError, UsageError

if TYPE_CHECKING:
    from neuroada_serve.engine.llm import LLM
    from neuroada_serve.train.rows import Data

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
err = Console(stderr=True)
out = Console()


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"neuroada {__version__}")
        raise typer.Exit


@app.callback(
    help="Train, serve and merge NeuroAda adapters. MODEL is a local Hugging Face folder, a .gguf "
    "file, `demo`, or a hub id."
)
def _before_any_command(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    pass


Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A local folder, a .gguf file, demo, or a hub id.")
]
Plain = Annotated[
    bool,
    typer.Option(
        "--plain",
        help="Use prompts as they are, without the chat template.",
        rich_help_panel="Rows",
    ),
]
MaxTokens = Annotated[int, typer.Option(help="Maximum number of new tokens in an answer.")]
Temperature = Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.")]
GREEDY: Temperature = 0.0
Seed = Annotated[int | None, typer.Option(help="Seed of the sampling; default: a random one.")]
Adapters = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        metavar="[NAME=]PATH",
        help="Adapter folder, under NAME or its own name. Repeatable.",
        rich_help_panel="Adapters",
    ),
]
Adapter = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        metavar="[NAME=]PATH",
        help="Adapter folder, under NAME or its own name. Default: the base alone.",
        rich_help_panel="Adapters",
    ),
]


def command(
    function: Callable[..., None], group: typer.Typer = app, name: str | None = None
) -> Callable[..., None]:
    """Register a command; a user's mistake ends it with one sentence and exit code 2."""
    flagged = with_flags(function)

    @wraps(flagged)
    def run(**kwargs: Any) -> None:
        try:
            flagged(**kwargs)
        except UsageError as error:
            print_error(f"Error: {error}")
            raise typer.Exit(2) from None
        except EngineError as error:
            print_error(f"Engine failure: {error}")
            raise typer.Exit(1) from None
        except KeyboardInterrupt as interrupt:
            notify(f"\nInterrupted{interrupt}.")
            raise typer.Exit(130) from None

    name = name or function.__name__.strip("_")
    examples = EXAMPLES.get(name if group is app else f"{group.info.name} {name}", ())
    group.command(name=name, cls=Command, epilog="\n".join(examples))(run)
    return run


@contextmanager
def interrupted(tell: Callable[[], str]) -> Iterator[None]:
    """Add to the message of a Ctrl-C in the block, such as how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(tell()) from None


@contextmanager
def for_good() -> Iterator[None]:
    """Keep the garbage collector from everything imported and loaded in the block: it stays until
    the process ends, and scanning it would delay loading, a server's steps, and the exit."""
    with uncollected():
        yield
        gc.freeze()


def print_error(message: str) -> None:
    err.print(message, style="red", markup=False, highlight=False, soft_wrap=True)


def notify(message: str) -> None:
    err.print(message, markup=False, highlight=False, soft_wrap=True)


def rows_of(source: str) -> "Data":
    """Open the rows that --data or --eval-data names."""
    if not source.startswith("hub:"):
        if Path(source).is_dir():
            raise UsageError(f"{source!r} is a folder; name the file in it that has the rows")
        if not Path(source).is_file():
            raise UsageError(f"no file {source!r}")
        return Path(source)
    from neuroada_serve.train.hub import open_hub_rows

    notify(f"Reading {source}.")
    return open_hub_rows(source)


def adapters_of(flags: Sequence[str] | None, reserved: Collection[str] = ()) -> dict[str, Path]:
    """Return the folders of --adapter NAME=PATH or PATH, by NAME or the folder's own name.

    Args:
        reserved: names that no adapter may have here.
    """
    folders: dict[str, Path] = {}
    for flag in flags or ():
        name, separator, path = flag.partition("=")
        if not separator or Path(flag).is_dir():
            name, path = Path(flag).resolve().name, flag
        if not path or not Path(path).is_dir():
            raise UsageError(
                f"--adapter {flag}: no folder {path!r}; give NAME=PATH, or PATH to name the "
                "adapter after its folder"
            )
        if not ADAPTER_NAME.fullmatch(name):
            raise UsageError(
                f"--adapter {flag}: {name!r} cannot be a name; give NAME={path}, NAME of letters, "
                "digits, '.', '_' and '-', a letter or digit first, at most 63"
            )
        if name in folders or name in reserved:
            taken = "two adapters are called" if name in folders else "no adapter can be called"
            raise UsageError(f"{taken} {name!r}; give another name, --adapter NAME={path}")
        folders[name] = Path(path)
    return folders


def llm_with(
    model: str, adapter: Sequence[str] | None, config: EngineConfig
) -> "tuple[LLM, str | None]":
    """Load a model with the adapter of --adapter, if any; return it with the adapter's name."""
    adapters = adapters_of(adapter)
    if len(adapters) > 1:
        raise UsageError(f"this command uses one --adapter, got {len(adapters)}")
    with for_good():
        from neuroada_serve.engine.llm import LLM

        llm = LLM(model, adapters, notify=notify, **vars(config))
    return llm, next(iter(adapters), None)
