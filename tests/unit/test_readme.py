"""The Python blocks of the pages run, in order, as a reader would paste them; links hold."""

from __future__ import annotations

import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINKS = [
    pytest.param(page, link, id=f"{page.stem}-{link}")
    for page in PAGES
    for link in re.findall(r"\]\((?!http|#)([^)#]+)", page.read_text("utf-8"))
]


@pytest.mark.parametrize(
    ("page", "least"),
    [("README.md", 7), ("docs/recipes.md", 1), ("docs/guide.md", 3)],
    ids=["readme", "recipes", "guide"],
)
def test_blocks_run(page, least, tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    assert len(blocks) >= least
    # A dataclass looks its module up, so the blocks run as one that is there.
    module = types.ModuleType("readme")
    monkeypatch.setitem(sys.modules, "readme", module)
    for block in blocks:
        exec(compile(block, page, "exec"), module.__dict__)
    assert "1:16" in capsys.readouterr().out


@pytest.mark.parametrize(("page", "link"), LINKS)
def test_links_lead_somewhere(page, link):
    assert (page.parent / link).exists()


def test_importing_needs_torch_and_numpy_only():
    told = "import nmflow, sys; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", told], capture_output=True, text=True, check=True
    ).stdout.split()
    for name in ("safetensors", "transformers", "scipy", "pydantic", "typer", "matplotlib"):
        assert name not in loaded
