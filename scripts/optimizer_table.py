"""Writes docs/optimizers.md: every optimizer that is installed here, and what a recipe makes of it.

    python scripts/optimizer_table.py [PACKAGE …]

Packages that are named are tried anew, all of them by default; one that is missing keeps its lines.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "support"))

import optimizer_zoo as zoo  # noqa: E402 - it lies with the tests

PAGE = ROOT / "docs" / "optimizers.md"
HEAD = "## "
LOST = "| optimizer | | why, and what to do |\n| --- | --- | --- |\n"


def section(source: str) -> str:
    """The lines of one package: which optimizers work, and what is said of the others."""
    found = {name: zoo.verdict(make) for name, make in zoo.SOURCES[source]().items()}
    works = [name for name, (verdict, _) in found.items() if verdict == "works"]
    others = [
        f"| `{name}` | {verdict} | {said.replace('|', '/')} |\n"
        for name, (verdict, said) in found.items()
        if verdict != "works"
    ]
    package = source.split(".")[0].replace("_", "-")
    version = importlib.metadata.version(package).split("+")[0]
    lines = f"{HEAD}{source}\n\nTried with {package} {version}. Works: "
    lines += ", ".join(f"`{name}`" for name in works) + ".\n\n"
    return lines + (LOST + "".join(others) + "\n" if others else "")


def sections(page: str) -> dict[str, str]:
    """The sections of the page by their package."""
    parts = page.split(f"\n{HEAD}")[1:]
    return {part.partition("\n")[0]: f"{HEAD}{part.rstrip()}\n\n" for part in parts}


def main(asked: list[str]) -> None:
    """Write the page."""
    logging.disable(logging.WARNING)
    page = PAGE.read_text(encoding="utf-8")
    kept = sections(page)
    for source in zoo.SOURCES:
        there = importlib.util.find_spec(source.split(".")[0]) is not None
        if there and (not asked or source in asked):
            kept[source] = section(source)
    head = page.partition(f"\n{HEAD}")[0]
    body = "".join(kept[source] for source in zoo.SOURCES if source in kept)
    PAGE.write_text(f"{head}\n{body.rstrip()}\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
