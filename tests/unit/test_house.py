"""The house is as docs/design.md says: rooms import rooms above them in its list, in no circle."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
house = importlib.import_module("house")


def listed() -> dict[str, int]:
    """Each room of the page to its row."""
    page = (ROOT / "docs" / "design.md").read_text("utf-8")
    rows = re.findall(r"^\| (`.*?`) \|", page.partition("## Rooms")[2], re.MULTILINE)
    return {
        name.partition(".")[0].rstrip("/"): place
        for place, row in enumerate(rows)
        for name in re.findall(r"`([\w./]+)`", row)
    }


def test_every_room_is_on_the_page_and_imports_none_below():
    rooms, place = house.between_rooms(house.imports(house.sources())), listed()
    assert set(rooms) == set(place)
    for room, others in rooms.items():
        below = {other for other in others if place[other] > place[room]}
        assert not below, f"{room} imports {sorted(below)}, which stand below it"


def test_no_files_import_one_another_in_a_circle():
    graph = house.imports(house.sources())
    inner = {m: others - {"nmflow"} for m, others in graph.items() if m != "nmflow"}
    assert [sorted(one) for one in house.circles(inner)] == []


@pytest.mark.parametrize(
    ("arrows", "found"),
    [
        ({"a": {"b"}, "b": {"c"}, "c": set()}, []),
        ({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}, [{"a", "b", "c"}]),
        ({"a": {"b"}, "b": {"a"}, "c": {"d", "a"}, "d": {"c"}}, [{"a", "b"}, {"c", "d"}]),
    ],
)
def test_circles_and_floors_of_small_graphs(arrows, found):
    assert sorted(map(sorted, house.circles(arrows))) == sorted(map(sorted, found))
    at = house.floors(arrows)
    for node, others in arrows.items():
        for other in others:
            together = any({node, other} <= one for one in found)
            assert at[other] < at[node] or (together and at[other] == at[node])


def test_imports_are_found_wherever_they_stand():
    files = {
        "src/nmflow/__init__.py": "",
        "src/nmflow/a.py": "from nmflow import b\ndef f():\n    from nmflow.c import d\n",
        "src/nmflow/b.py": "if TYPE_CHECKING:\n    from nmflow.c.d import e\n",
        "src/nmflow/c/__init__.py": "import nmflow.a",
        "src/nmflow/c/d.py": "",
    }
    graph = house.imports(files)
    assert graph["nmflow.a"] == {"nmflow.b", "nmflow.c.d"}
    assert graph["nmflow.b"] == {"nmflow.c.d"}
    assert graph["nmflow.c"] == {"nmflow.a"}
    assert house.between_rooms(graph) == {"a": {"b", "c"}, "b": {"c"}, "c": {"a"}}
