"""Hooks of mkdocs: commands and keys of a YAML file are shown as the code has them."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

COMMANDS = "<!-- commands -->"
KEYS = "<!-- keys -->"
# A table's cell without code, and the spaces in `± 0.2`, `[−0.5, +0.2]` and `100 %` in it.
CELL = re.compile(r"<td[^>]*>(?:(?!<code|</td>).)*</td>")
INSIDE = re.compile(r"(?<=±) (?=\d)|(?<=\d,) (?=[+−]?[\d.]+\])|(?<=\d) (?=%)")


def on_config(config: Any) -> Any:
    """Put the files of a pattern of the menu, such as `decisions/*.md`, in its place."""
    config.nav = _expanded(config.nav, Path(config.docs_dir))
    return config


def _expanded(item: Any, docs: Path) -> Any:
    if isinstance(item, list):
        return [_expanded(one, docs) for one in item]
    if isinstance(item, dict):
        return {title: _expanded(one, docs) for title, one in item.items()}
    if "*" in item:
        return [str(file.relative_to(docs)) for file in sorted(docs.glob(item))]
    return item


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the commands, or the keys of a YAML file, in the place of their marker."""
    for marker, made in ((COMMANDS, commands), (KEYS, keys)):
        if marker in markdown:
            markdown = markdown.replace(marker, made())
    return markdown


def on_page_content(html: str, **_: Any) -> str:
    """Break no line of a table's cell inside a deviation, an interval or a share."""
    return CELL.sub(lambda cell: INSIDE.sub("\u00a0", cell[0]), html)


def keys() -> str:
    """A table for each mapping of a YAML file: its keys, what they are and take, their defaults."""
    from nmflow.experiments import config

    parts = (
        ("The file", config.Experiment),
        ("`data`", config.Data),
        ("`model`", config.Model),
        ("`distill`", config.Distill),
        ("`training`", config.Training),
    )
    out: list[str] = []
    for title, part in parts:
        schema = part.model_json_schema()
        out += [f"### {title}", "", (part.__doc__ or "").partition("\n")[0], ""]
        out += ["| key | what it is | takes | default |", "| --- | --- | --- | --- |"]
        said = meanings(part)
        for name, field in schema["properties"].items():
            shown = _default(field.get("default"))
            default = "needed" if name in schema.get("required", ()) else shown
            out.append(f"| `{name}` | {said[name].rstrip('.')} | {_takes(field)} | {default} |")
        out.append("")
    return "\n".join(out)


def meanings(part: type) -> dict[str, str]:
    """What the docstrings of a class and of those above it say of each attribute."""
    found: dict[str, str] = {}
    for kind in reversed(part.__mro__):
        section = inspect.cleandoc(kind.__doc__ or "").partition("Attributes:\n")[2]
        for name, words in re.findall(r"^    (\w+): (.*(?:\n     .*)*)", section, re.MULTILINE):
            found[name] = " ".join(words.split())
    return found


def _default(value: Any) -> str:
    """A default as YAML writes it; empty where nothing is the default."""
    return "" if value in (None, "", {}, []) else f"`{json.dumps(value)}`"


def _takes(field: dict[str, Any]) -> str:
    """The type of a key in words."""
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    if "anyOf" in field:
        several = [_takes(one) for one in field["anyOf"] if one.get("type") != "null"]
        return " or ".join(dict.fromkeys(several))
    if "$ref" in field:
        return "a mapping, see below"
    if field.get("type") == "array":
        return f"a list: {_takes(field.get('items', {}))}"
    words = {"integer": "whole number", "number": "number", "string": "text",
             "boolean": "true or false", "object": "a mapping"}  # fmt: skip
    said = words.get(field.get("type", ""), "anything")
    least = field.get("minimum", field.get("exclusiveMinimum"))
    above = "above" if "exclusiveMinimum" in field else "at least"
    return said + (f", {above} {least}" if least is not None else "")


def commands() -> str:
    """A section a command: its sentence, its usage, a table of what it takes."""
    import typer

    from nmflow import cli

    root: Any = typer.main.get_command(cli.app())
    out: list[str] = []
    for name in cli.commands():
        command = root.commands[name]
        taken = [p for p in command.params if p.param_type_name == "argument"]
        usage = " ".join(f"{p.name.upper()}{'...' if p.nargs == -1 else ''}" for p in taken)
        out += [f"## `nmflow {name}`", "", command.help or "", ""]
        out += ["```text", f"nmflow {name} {usage} [OPTIONS]", "```", ""]
        out += ["| option | what it does | default |", "| --- | --- | --- |"]
        out += [_row(p) for p in command.params if p.name != "help"] + [""]
    return "\n".join(out)


def _row(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        said = f"`{parameter.name.upper()}`"
    else:
        said = ", ".join(f"`{flag}`" for flag in (*parameter.opts, *parameter.secondary_opts))
    default = parameter.default
    shown = "" if default in (None, "", False) or parameter.required else f"`{default}`"
    return f"| {said} | {(parameter.help or '').replace('|', '/')} | {shown} |"
