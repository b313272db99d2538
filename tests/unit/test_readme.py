"""Pages do what they say: Python blocks run, commands exist, links hold, drawings are current."""

from __future__ import annotations

import functools
import importlib
import json
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOTEBOOKS = sorted((ROOT / "docs").rglob("*.ipynb"))
TEXT = {page: page.read_text("utf-8") for page in PAGES}
LINKS = [
    pytest.param(page, link, id=f"{page.stem}-{link}")
    for page in PAGES
    for link in re.findall(r"\]\((?!http|#)([^)#]+)", TEXT[page])
]


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def fenced(text: str, language: str) -> list[str]:
    """Blocks of a language, without the indentation of a list or a tab around them."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```$", text, re.DOTALL | re.MULTILINE)
    return [re.sub(rf"^{indent}", "", block, flags=re.MULTILINE) for indent, block in found]


PYTHON = {page: blocks for page in PAGES if (blocks := fenced(TEXT[page], "python"))}
SHELL = [
    pytest.param(line, id=f"{named(page)}-{line[:60]}")
    for page in PAGES
    for block in fenced(TEXT[page], "sh")
    for line in re.sub(r"\\\n\s*", "", block).splitlines()
    if line.partition("#")[0].strip()
]


def run(blocks: Iterable[str], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # A dataclass looks its module up, so the blocks run as one that is there.
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    for i, block in enumerate(blocks):
        exec(compile(block, f"{name}, block {i + 1}", "exec"), module.__dict__)


@pytest.mark.parametrize("page", PYTHON, ids=named)
def test_blocks_run(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run(PYTHON[page], named(page), monkeypatch)


def test_most_pages_for_users_have_blocks_that_run():
    shown = {named(page) for page in PYTHON}
    assert {"README.md", "docs/packed.md", "docs/recipes.md", "docs/layout.md"} <= shown
    assert sum(name.startswith(("docs/start/", "docs/howto/")) for name in shown) >= 9


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=named)
def test_notebooks_run(notebook, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cells = json.loads(notebook.read_text("utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert len(code) >= 6
    assert not any(cell.get("outputs") for cell in cells), "keep the outputs out of the commit"
    run(code, named(notebook), monkeypatch)


@pytest.mark.parametrize("line", SHELL)
def test_commands_are_there(line):
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):  # OMP_NUM_THREADS=1 python …
        words = words[1:]
    check(words)


def check(words: list[str]) -> None:
    """Fail unless a command is known, with its files and flags."""
    program, *rest = words
    if program in ("taskset", "torchrun", "/usr/bin/time"):
        start = next(i for i, word in enumerate(rest) if word in ("python", "nmflow"))
        check(rest[start:])
    elif program == "nmflow":
        check_nmflow(rest)
    elif program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(rest) <= set(targets), f"make has no target {rest}"
    elif program == "python":
        check_python(rest)
    elif program == "pip":
        check_pip(rest)
    elif program == "bash":
        assert (ROOT / rest[0]).is_file(), f"there is no {rest[0]}"
    else:
        assert program in ("cd", "git"), f"unknown program {program}"


@functools.cache
def command_line() -> Any:
    import typer

    from nmflow import cli

    return typer.main.get_command(cli.app())


def check_nmflow(words: list[str]) -> None:
    root = command_line()
    name, *rest = words
    assert name in root.commands, f"nmflow has no command {name}"
    options = {
        flag: parameter
        for parameter in root.commands[name].params
        for flag in (*parameter.opts, *parameter.secondary_opts)
    }
    expected = 0
    for word in rest:
        if word.startswith("-"):
            flag = word.partition("=")[0]
            assert flag in options, f"nmflow {name} has no option {flag}"
            expected = 0 if options[flag].is_flag or "=" in word else 1
        elif expected:
            expected -= 1
        elif word.startswith("configs/") and "…" not in word:
            assert (ROOT / word).exists(), f"{word} is not there"


def check_python(words: list[str]) -> None:
    script = next(word for word in words if not word.startswith("-"))
    if words[0] == "-m":
        assert script in ("pytest", "http.server"), f"unknown module {script}"
        return
    file = ROOT / script
    shared = ("many_runs",)  # whose options are those of the scripts that import it
    source = file.read_text("utf-8")
    source += "".join(
        file.with_name(f"{name}.py").read_text("utf-8")
        for name in shared
        if f"from {name} import" in source
    )
    for flag in (word.partition("=")[0] for word in words if word.startswith("--")):
        assert f'"{flag}"' in source, f"{script} has no option {flag}"


def check_pip(words: list[str]) -> None:
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    for word in words:
        found = re.fullmatch(r"(?:\.|nmflow)\[([\w,]+)\]", word)
        if found:
            assert set(found[1].split(",")) <= set(extras), f"{word} names an unknown extra"


@pytest.mark.parametrize(("page", "link"), LINKS)
def test_links_lead_somewhere(page, link):
    assert (page.parent / link).exists()


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_lists_are_lists_and_paragraphs_are_none(page):
    """An item wants a blank line above it; a line that begins with "0. " by chance is an item."""
    text = re.sub(r"^( *)(`{3,}).*?^\1\2$", "", TEXT[page], flags=re.DOTALL | re.MULTILINE)
    above, count = "", 0
    for line in text.splitlines():
        if found := re.match(r" *(\d+)\. ", line):
            assert int(found[1]) in (1, count + 1), f"begins like an item of a list: {line}"
            count = int(found[1])
        if line.startswith(("* ", "- ", "+ ")) and above:
            assert re.match(r"[*+-] | |#|<!--", above), f"no blank line above the item: {line}"
        above = line


def test_every_page_is_in_the_tree_of_the_site():
    tree = (ROOT / "mkdocs.yml").read_text("utf-8").partition("\nnav:")[2]
    docs = ROOT / "docs"
    shown = {file for entry in re.findall(r"[\w/*-]+\.md", tree) for file in docs.glob(entry)}
    missing = [named(page) for page in PAGES[1:] if page not in shown]
    assert not missing, f"in no menu of mkdocs.yml: {missing}"


def test_every_public_name_is_in_the_reference():
    import nmflow
    import nmflow.errors

    reference = "".join(page.read_text("utf-8") for page in (ROOT / "docs/reference").glob("*.md"))
    shown = set(re.findall(r"^::: (\S+)$", reference, re.MULTILINE))
    for name in shown:
        owner, _, last = name.rpartition(".")
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name == "jax":  # an extra, which only nmflow.jax needs
                continue
            assert hasattr(importlib.import_module(owner), last), f"{name} is not there"
    ends = {name.rpartition(".")[2] for name in shown}
    for name in nmflow.__all__:
        shown_whole = name in ("kernels", "__version__") or hasattr(nmflow.errors, name)
        assert name in ends or shown_whole, f"no page shows {name}"


def test_drawings_are_what_their_script_makes(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    figures = importlib.import_module("site_figures")
    assert {f"{name}.svg" for name in figures.DRAWN} == {
        file.name for file in figures.FIGURES.iterdir()
    }
    for name, draw in figures.DRAWN.items():
        drawn = (figures.FIGURES / f"{name}.svg").read_text("utf-8")
        assert drawn == str(draw()), f"run: make figures ({name})"


@pytest.mark.parametrize(
    ("html", "kept"),
    [
        ("<td>62.0 ± 0.2 [−0.5, +0.2]</td>", ["62.0", "±\xa00.2", "[−0.5,\xa0+0.2]"]),
        ('<td style="text-align: right;">100 %</td>', ["100\xa0%"]),
        ("<td><code>[1, 2]</code></td>", ["<code>[1,", "2]</code>"]),
        ("<p>95 % of [1, 2]</p>", ["<p>95", "%", "of", "[1,", "2]</p>"]),
    ],
)
def test_figures_in_tables_stay_on_one_line(html, kept, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    said = importlib.import_module("site_hooks").on_page_content(html)
    assert re.sub("</?td[^>]*>", "", said).split(" ") == kept


def test_every_key_of_a_configuration_is_explained(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    rows = [line.split(" | ") for line in importlib.import_module("site_hooks").keys().splitlines()]
    told = {row[0]: row[1] for row in rows if row[0].startswith("| `")}
    assert told["| `threads`"] == "threads of each; 0 divides the cores among the workers"
    assert len(told) > 50
    assert all(told.values())


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr[-2000:]
    for page in tmp_path.rglob("*.html"):
        fetched = re.findall(r'(?:src|<link[^>]*href)="(?:https?:)?//[^"]+', page.read_text())
        assert not fetched, f"{page.name} would fetch {fetched}"
