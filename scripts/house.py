"""The house, measured and drawn: rooms, the imports between them, and what imports in a circle.

    python scripts/house.py 19a5f23 HEAD      # two commits side by side, and docs/decisions/figures

A room is a folder of the package or a file at its top; an arrow from A to B says that a file of A
imports one of B, at its top, in a function or for types alone. Nothing is run.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from drawing import BLUE, FAINT, ORANGE, Drawing

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "src/nmflow/"
FIGURE = ROOT / "docs" / "decisions" / "figures" / "house.svg"
LONG = 300  # lines of a file

Graph = dict[str, set[str]]


def sources(commit: str = "") -> dict[str, str]:
    """The package's Python files by path, of a commit or of the working tree."""
    if not commit:
        files = sorted((ROOT / PACKAGE).rglob("*.py"))
        return {f.relative_to(ROOT).as_posix(): f.read_text("utf-8") for f in files}
    names = _git("ls-tree", "-r", "--name-only", commit, PACKAGE).split()
    return {name: _git("show", f"{commit}:{name}") for name in names if name.endswith(".py")}


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout


def module_of(path: str) -> str:
    """`src/nmflow/flow/attach.py` is `nmflow.flow.attach`; a package is its folder."""
    parts = PurePosixPath(path.removeprefix("src/")).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(files: Mapping[str, str]) -> Graph:
    """Each module to the modules of the package that it imports."""
    modules = {module_of(path) for path in files}
    return {module_of(p): set(_imported(module_of(p), text, modules)) for p, text in files.items()}


def _imported(me: str, text: str, modules: set[str]) -> Iterable[str]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name in modules and a.name != me)
        if isinstance(node, ast.ImportFrom) and node.module in modules:
            for name in node.names:
                whole = f"{node.module}.{name.name}"
                found = whole if whole in modules else node.module
                if found != me:
                    yield found


def room_of(module: str) -> str:
    """The folder or file at the top of the package that a module lies in."""
    return [*module.split("."), "nmflow"][1]


def between_rooms(graph: Graph) -> Graph:
    """Each room to the rooms that it imports; the package's own face is no room."""
    rooms: Graph = {room_of(m): set() for m in graph if m != "nmflow"}
    for module, others in graph.items():
        if module != "nmflow":
            rooms[room_of(module)] |= {room_of(o) for o in others if o != "nmflow"}
    return {room: others - {room} for room, others in rooms.items()}


def circles(graph: Graph) -> list[set[str]]:
    """The sets of nodes that all reach one another (Tarjan's algorithm)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[set[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph.get(node, ())):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            at = stack.index(node)
            found.append(set(stack[at:]))
            del stack[at:]

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return [one for one in found if len(one) > 1]


def floors(graph: Graph) -> dict[str, int]:
    """Each room one floor above the highest that it imports; those of a circle stand together."""
    circle = {node: frozenset(one) for one in circles(graph) for node in one}
    known: dict[str, int] = {}

    def floor(node: str) -> int:
        if node not in known:
            mine = circle.get(node, frozenset([node]))
            below = {other for one in mine for other in graph.get(one, ())} - mine
            known.update(dict.fromkeys(mine, 1 + max(map(floor, sorted(below)), default=0)))
        return known[node]

    return {node: floor(node) for node in sorted(graph)}


@dataclass(frozen=True)
class House:
    """The figures of one tree."""

    lines: dict[str, int]  # of each room
    rooms: Graph
    loose: frozenset[str]  # rooms that are one file at the top
    files: int
    long: int
    in_circles: int
    chain: int

    @classmethod
    def of(cls, files: Mapping[str, str]) -> House:
        """Measure the files of a package."""
        graph = imports(files)
        lines: dict[str, int] = {}
        for path, text in files.items():
            room = room_of(module_of(path))
            lines[room] = lines.get(room, 0) + text.count("\n")
        top = [p for p in files if p.count("/") == 2 and not p.endswith("__init__.py")]
        loose = frozenset(room_of(module_of(path)) for path in top)
        inner = {m: others - {"nmflow"} for m, others in graph.items() if m != "nmflow"}
        return cls(
            lines, between_rooms(graph), loose, len(files),
            sum(text.count("\n") > LONG for text in files.values()),
            sum(map(len, circles(inner))), max(floors(inner).values()),
        )  # fmt: skip

    def rows(self) -> list[tuple[str, str]]:
        """What is counted, and the count."""
        arrows = sum(map(len, self.rooms.values()))
        return [
            ("files, lines", f"{self.files}, {sum(self.lines.values()):,}"),
            ("files that lie loose at the top", str(len(self.loose))),
            ("rooms, arrows between them", f"{len(self.rooms)}, {arrows}"),
            ("arrows a room", f"{arrows / len(self.rooms):.1f}"),
            ("files that import one another in a circle", str(self.in_circles)),
            ("longest chain of imports, in files", str(self.chain)),
            (f"files of more than {LONG} lines", str(self.long)),
        ]


def paint(drawing: Drawing, house: House, ground: float, title: str) -> None:
    """Draw a house: floors from the ground up, boxes as wide as their lines, arrows behind them."""
    at = floors(house.rooms)
    left, width, step, tall = 6, drawing.width - 12, 42, 16
    where: dict[str, tuple[float, float, float]] = {}
    for level in range(1, max(at.values()) + 1):
        here = sorted(room for room, floor in at.items() if floor == level)
        sizes = {room: max(10.0, house.lines[room] / 14_000 * width) for room in here}
        gap = (width - sum(sizes.values())) / (len(here) + 1)
        x = left + gap
        for room in here:
            where[room] = (x, ground - level * step, sizes[room])
            x += sizes[room] + gap
    drawing.text(left, ground - max(at.values()) * step - 8, title, size=14, bold=True)
    for room, others in house.rooms.items():
        x, y, size = where[room]
        for other in sorted(others):
            to, low, wide = where[other]
            drawing.line([(x + size / 2, y + tall), (to + wide / 2, low)], color=FAINT)
    for room, (x, y, size) in where.items():
        color = ORANGE if room in house.loose else BLUE
        drawing.box(x, y, size, tall, fill=color, radius=3, opacity=0.85)
        drawing.text(x + size / 2, y - 4, room, size=10.5, anchor="middle", bold=True)


def main() -> None:
    """Print the two tables and draw the two houses."""
    if len(sys.argv) != 3:
        sys.exit(f"give two commits: {__doc__}")
    houses = [House.of(sources(commit)) for commit in sys.argv[1:]]
    for one, other in zip(*(house.rows() for house in houses), strict=True):
        sys.stdout.write(f"| {one[0]} | {one[1]} | {other[1]} |\n")
    heights = [40 + 42 * max(floors(house.rooms).values()) for house in houses]
    drawing = Drawing(700, sum(heights), "The rooms of nmflow and their imports, before and after")
    paint(drawing, houses[0], heights[0] + 8, "before")
    paint(drawing, houses[1], sum(heights) + 8, "after")
    FIGURE.parent.mkdir(exist_ok=True)
    FIGURE.write_text(str(drawing), encoding="utf-8")


if __name__ == "__main__":
    main()
