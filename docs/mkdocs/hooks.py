"""Build hooks: reference tables from the code, and files outside docs/ that pages link to.

Pages are also read in the repository, so they link to its other files by relative paths. The site
gets a copy of each such file.
"""

import posixpath
import re
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # document the code beside these pages, not an installed version

from typer.main import get_command  # noqa: E402

from neuroada_serve.cli.main import app  # noqa: E402
from neuroada_serve.config import EngineConfig  # noqa: E402
from neuroada_serve.options import default_of  # noqa: E402

# Marks on pages that tables take the place of.
COMMANDS = "<!-- commands -->"
SETTINGS = "<!-- settings of the engine -->"
OUTSIDE = re.compile(r"(\]\()((?:\.\./)+[^)#\s]+)")


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in the tables, and take files outside docs/ into the site."""

    def inside(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join("docs", page.file.src_uri, "..", link[2]))
        if target.startswith("docs/") or not (ROOT / target).is_file():
            return link[0]
        name = f"{target}.txt" if target.endswith(".md") else target  # .md would be a page
        if files.get_file_from_path(name) is None:
            files.append(File.generated(config, name, content=(ROOT / target).read_bytes()))
        return link[1] + posixpath.relpath(name, posixpath.dirname(page.file.src_uri) or ".")

    markdown = OUTSIDE.sub(inside, markdown)
    markdown = markdown.replace(COMMANDS, "\n".join(commands()))
    return markdown.replace(SETTINGS, "\n".join(settings()))


def settings() -> Iterator[str]:
    """Markdown of a table of the engine's settings."""
    yield "| argument | default | |\n|---|---|---|"
    for each in fields(EngineConfig):
        default = escape(repr(default_of(each)))
        yield f"| `{each.name}` | {default} | {escape(each.metadata['help'])} |"


def commands() -> Iterator[str]:
    """Markdown of all commands of `neuroada`."""
    for name, command in get_command(app).commands.items():
        nested = getattr(command, "commands", None)
        if nested is None:
            yield from describe(f"neuroada {name}", command)
        else:
            for of_it, each in nested.items():
                yield from describe(f"neuroada {name} {of_it}", each)


def describe(name: str, command: Any) -> Iterator[str]:
    """Markdown of one command: what it does, its arguments and flags by group, its examples."""
    yield f"\n## {name}\n\n{escape(command.help)}\n"
    context = command.make_context(name, [], resilient_parsing=True)
    rows: dict[str, list[str]] = {}
    for parameter in command.params:
        if "--help" not in parameter.opts:
            is_argument = parameter.param_type_name == "argument"
            group = "Arguments" if is_argument else parameter.rich_help_panel or "Options"
            usage, text = parameter.get_help_record(context)  # the text ends with the default
            variable = f"`{parameter.envvar}`" if parameter.envvar else ""
            usage = re.sub("(--[a-z-]+)", r"`\1`", escape(usage))
            row = f"| {usage} | {variable} | {escape(text)} |"
            rows.setdefault(group, []).append(row)
    for group, lines in rows.items():
        yield f"\n**{group}**\n\n| | variable | |\n|---|---|---|"
        yield from lines
    examples = (command.epilog or "").strip()
    if examples:
        yield f"\n```console\n{examples}\n```\n"


def escape(text: str | None) -> str:
    """Keep what Markdown and HTML would read as their own."""
    text = " ".join((text or "").split()).replace("\\", "\\\\").replace("<", "&lt;")
    return re.sub(r"([|*_\[\]`])", r"\\\1", text)
