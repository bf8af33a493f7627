"""Flags made from dataclasses of settings, with environment variables and a file beside them.

A parameter of a command that is annotated with a dataclass becomes one flag for each of its fields.
The command line beats environment variables, and these beat the file of --config. Only given values
are set, so that each default stands in its dataclass alone.
"""

import re
from collections.abc import Callable
from dataclasses import Field, fields
from difflib import get_close_matches
from functools import wraps
from inspect import Parameter, signature
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from neuroada_serve.errors import UsageError
from neuroada_serve.options import default_of

_FILE = "neuroada_serve.file"  # key of the --config file in a context's `meta`


class Only:
    """Selects the fields of a dataclass that become flags of a command."""

    def __init__(self, *names: str) -> None:
        self.names = names


def long_name(described: Field[Any]) -> str:
    """Return a field's flag: --max-num-seqs for max_num_seqs."""
    return "--" + (described.metadata["flag"] or described.name.replace("_", "-"))


def variable(config: type, described: Field[Any]) -> str:
    """Return a field's environment variable: NEUROADA_MAX_NUM_SEQS for max_num_seqs."""
    name = long_name(described).removeprefix("--").replace("-", "_").upper()
    return _prefix(config) + name


def _prefix(config: type) -> str:
    return str(getattr(config, "variables", "NEUROADA_"))


def shown_default(described: Field[Any]) -> Any:
    """Return a field's default in the form of its flag; None if there is none to show."""
    default = default_of(described)
    if isinstance(default, tuple | dict):
        return ",".join(map(str, default)) or None
    return str(default) if described.metadata["read"] and default is not None else default


def flags_of(config: type, only: Only | None = None) -> list[Field[Any]]:
    """Return the fields of a dataclass that are flags, all or `only` some."""
    found = [f for f in fields(config) if f.metadata["flag"] != ""]
    return found if only is None else [f for f in found if f.name in only.names]


def with_flags(function: Callable[..., None]) -> Callable[..., None]:
    """Replace dataclass parameters of a command by flags for their fields."""
    parameters = [Parameter("context", Parameter.KEYWORD_ONLY, annotation=typer.Context)]
    configs: dict[str, tuple[type, list[Field[Any]]]] = {}
    for name, parameter in signature(function).parameters.items():
        hint = parameter.annotation
        config, *extras = get_args(hint) if get_origin(hint) is Annotated else [hint]
        if hasattr(config, "__dataclass_fields__"):
            configs[name] = config, flags_of(config, *extras)
            parameters += [_parameter(config, f) for f in configs[name][1]]
        else:
            parameters.append(parameter.replace(kind=Parameter.KEYWORD_ONLY))

    @wraps(function)
    def run(context: typer.Context, **values: Any) -> None:
        for name, (config, flags) in configs.items():
            given = {f.name: values.pop(f.name) for f in flags}
            values[name] = _built(context, config, flags, given)
        function(**values)

    run.__signature__ = signature(function).replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


def _parameter(config: type, described: Field[Any]) -> Parameter:
    meta = described.metadata
    of_flag: Any = list[str] if meta["repeated"] else str if meta["read"] else _plain(described)
    name = long_name(described)
    if of_flag is bool and shown_default(described) is not False:
        name = f"{name}/--no-{name[2:]}"
    flag = typer.Option(
        shown_default(described),
        name,
        help=meta["help"],
        metavar=meta["metavar"],
        rich_help_panel=meta["group"],
        envvar=variable(config, described),
        show_envvar=False,
    )
    kind = Parameter.KEYWORD_ONLY
    return Parameter(described.name, kind, default=flag, annotation=of_flag | None)


def _plain(described: Field[Any]) -> Any:
    """Return the type of a field for its flag, None left out."""
    kinds = [kind for kind in get_args(described.type) if kind is not type(None)]
    if get_origin(described.type) is Literal:
        return str  # the dataclass checks the words
    return kinds[0] if kinds else described.type


def _built(
    context: typer.Context, config: type, flags: list[Field[Any]], values: dict[str, Any]
) -> Any:
    """Build the dataclass from the given values.

    Raises:
        UsageError: names the flag, the variable, or the file and key that a wrong value comes from.
    """
    given: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for described in flags:
        name, meta = described.name, described.metadata
        origin = origin_of(context, name, long_name(described), variable(config, described))
        if origin is None:
            continue
        origins[name] = origins[long_name(described)] = origin
        value = tuple(values[name]) if meta["repeated"] else values[name]
        if meta["read"]:
            try:
                value = meta["read"](value)
            except UsageError as error:
                colon = "" if str(error).startswith("takes ") else ":"
                raise UsageError(f"{origin}{colon} {error}") from None
        given |= zip(meta["sets"], value, strict=True) if meta["sets"] else {name: value}
    try:
        return config(**given)
    except UsageError as error:
        words = r"(?<![\w-])--\w[\w-]*|(?<![\w-])\w+(?![\w-])"
        named = re.sub(words, lambda word: origins.get(word[0], word[0]), str(error))
        raise UsageError(named) from None


def origin_of(context: typer.Context, name: str, flag: str, envvar: str) -> str | None:
    """Return the flag, variable or file key that set a parameter; None for its default."""
    source = context.get_parameter_source(name)
    match source.name if source else "":
        case "COMMANDLINE":
            return flag
        case "ENVIRONMENT":
            return envvar
        case "DEFAULT_MAP":
            return f"{context.meta[_FILE]}: {flag.removeprefix('--')}"
    return None


def _read_file(context: typer.Context, path: Path | None) -> Path | None:
    """Use the values of a YAML file as defaults of the command's flags."""
    if path is None or context.resilient_parsing:
        return path
    import yaml

    try:
        found = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise typer.BadParameter(f"{path} cannot be read: {error}") from None
    if found is None:
        return path
    if not isinstance(found, dict):
        raise typer.BadParameter(f"{path} must have a line KEY: VALUE for each flag")
    known = {}
    for parameter in context.command.params:
        is_flag = parameter.param_type_name == "option"
        longest = max(parameter.opts, key=len) if is_flag else parameter.name or ""
        known[longest.removeprefix("--")] = parameter
    del known["config"]
    values = {}
    for key, value in found.items():
        named = known.get(str(key).replace("_", "-"))
        if named is None:
            near = get_close_matches(str(key), known, 1, cutoff=0)
            raise typer.BadParameter(
                f"{path} has an unknown key {key!r}; did you mean {near[0]!r}?"
            )
        is_switch = getattr(named, "is_flag", False)
        if isinstance(value, bool) != is_switch and value is not None:
            wanted = "true or false" if is_switch else "no true or false; quote a text"
            raise typer.BadParameter(f"{path}: {key} takes {wanted}, got {value!r}")
        if named.name in values:
            raise typer.BadParameter(f"{path} has {key!r} in two spellings")
        many = getattr(named, "multiple", False)
        values[named.name] = value if is_switch else _as_text(f"{path}: {key}", value, many)
    context.meta[_FILE] = path
    context.default_map = {name: value for name, value in values.items() if value is not None}
    return path


def _as_text(origin: str, value: Any, is_list: bool) -> Any:
    """Convert a value of a file to the form of the command line."""
    if is_list and isinstance(value, dict):
        return [f"{key}={each}" for key, each in value.items()]
    if is_list and value is not None:
        return [str(each) for each in (value if isinstance(value, list) else [value])]
    if isinstance(value, dict | list):
        raise typer.BadParameter(f"{origin} takes one value, got {value!r}")
    return None if value is None else str(value)


def config_file(config: type) -> Any:
    """Make the flag --config of a command whose settings are mostly those of `config`."""
    prefix = _prefix(config)
    return typer.Option(
        "--config",
        metavar="FILE",
        is_eager=True,
        callback=_read_file,
        envvar=f"{prefix}CONFIG",
        show_envvar=False,
        help="YAML file with flags' long names as keys. Flags beat environment variables "
        f"({prefix}... and the flag's name), and these the file.",
    )
