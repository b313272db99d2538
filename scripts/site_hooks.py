"""Hooks of mkdocs: the page of the command line is made from the commands themselves."""

from __future__ import annotations

from typing import Any

COMMANDS = "<!-- commands -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the commands, their arguments and options in the place of the marker."""
    return markdown.replace(COMMANDS, commands()) if COMMANDS in markdown else markdown


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
        out += ["| | | default |", "| --- | --- | --- |"]
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
