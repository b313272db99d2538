"""A small drawing as SVG: the same bytes every time, legible on a white and on a dark page."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

INK = "#757c87"
"""Text and lines: a contrast of about 4 on white and on near-black alike."""
FAINT = "#9aa4b155"
BLUE, ORANGE, GREEN, PINK, TEAL = "#3b82f6", "#e0701a", "#17976a", "#d0559c", "#1f9bb5"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif"


def number(value: float) -> str:
    """A coordinate with two digits at most."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


@dataclass
class Drawing:
    """Shapes one after the other; `str` is the file."""

    width: float
    height: float
    title: str
    parts: list[str] = field(default_factory=list)

    def text(
        self, x: float, y: float, said: str, *, size: float = 12, color: str = INK,
        anchor: str = "start", bold: bool = False, turned: bool = False,
    ) -> None:  # fmt: skip
        """A line of text, `y` its base line."""
        turn = f' transform="rotate(-90 {number(x)} {number(y)})"' if turned else ""
        weight = ' font-weight="600"' if bold else ""
        safe = said.replace("&", "&amp;").replace("<", "&lt;")
        self.parts.append(
            f'<text x="{number(x)}" y="{number(y)}" font-size="{number(size)}" fill="{color}" '
            f'text-anchor="{anchor}"{weight}{turn}>{safe}</text>'
        )

    def line(
        self, points: Iterable[tuple[float, float]], *, color: str = INK, width: float = 1.0,
        dash: str = "",
    ) -> None:  # fmt: skip
        """A line through points."""
        path = " ".join(f"{number(x)},{number(y)}" for x, y in points)
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        self.parts.append(
            f'<polyline points="{path}" fill="none" stroke="{color}" '
            f'stroke-width="{number(width)}" stroke-linejoin="round"{dashed}/>'
        )

    def box(
        self, x: float, y: float, width: float, height: float, *, fill: str = "none",
        edge: str = "none", radius: float = 0.0, opacity: float = 1.0,
    ) -> None:  # fmt: skip
        """A rectangle."""
        self.parts.append(
            f'<rect x="{number(x)}" y="{number(y)}" width="{number(width)}" '
            f'height="{number(height)}" rx="{number(radius)}" fill="{fill}" stroke="{edge}"'
            + (f' fill-opacity="{number(opacity)}"' if opacity < 1 else "")
            + "/>"
        )

    def dot(self, x: float, y: float, *, color: str, shape: str = "o", size: float = 4.5) -> None:
        """A marker: `o`, `s` (square), `d` (diamond) or `^`."""
        corners = {"s": (45, 4), "d": (0, 4), "^": (-90, 3)}
        if shape == "o":
            self.parts.append(
                f'<circle cx="{number(x)}" cy="{number(y)}" r="{number(size)}" fill="{color}"/>'
            )
            return
        start, count = corners[shape]
        radius = size * 1.25
        angles = [math.radians(start + 360 * i / count) for i in range(count)]
        points = " ".join(
            f"{number(x + radius * math.cos(a))},{number(y + radius * math.sin(a))}" for a in angles
        )
        self.parts.append(f'<polygon points="{points}" fill="{color}"/>')

    def arrow(
        self, x0: float, y0: float, x1: float, y1: float, *, color: str = INK, width: float = 1.6
    ) -> None:
        """A straight arrow, its head at the second point."""
        angle = math.atan2(y1 - y0, x1 - x0)
        back = [(x1 - 8 * math.cos(angle + s), y1 - 8 * math.sin(angle + s)) for s in (0.4, -0.4)]
        stop = (x1 - 6 * math.cos(angle), y1 - 6 * math.sin(angle))
        self.line([(x0, y0), stop], color=color, width=width)
        head = " ".join(f"{number(x)},{number(y)}" for x, y in [(x1, y1), *back])
        self.parts.append(f'<polygon points="{head}" fill="{color}"/>')

    def __str__(self) -> str:
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {number(self.width)} '
            f'{number(self.height)}" width="{number(self.width)}" height="{number(self.height)}" '
            f'role="img" font-family="{FONT}">\n<title>{self.title}</title>\n'
            + "\n".join(self.parts)
            + "\n</svg>\n"
        )


@dataclass(frozen=True)
class Axes:
    """A frame that turns values into places; `logarithmic` of x alone."""

    drawing: Drawing
    left: float
    top: float
    width: float
    height: float
    xs: tuple[float, float]
    ys: tuple[float, float]
    logarithmic: bool = False

    def at(self, x: float, y: float) -> tuple[float, float]:
        """The place of a pair of values."""
        low, high = self.xs
        share = (
            math.log(x / low) / math.log(high / low)
            if self.logarithmic
            else (x - low) / (high - low)
        )
        return (
            self.left + share * self.width,
            self.top + (self.ys[1] - y) / (self.ys[1] - self.ys[0]) * self.height,
        )

    def grid(
        self,
        x_ticks: Iterable[tuple[float, str]],
        y_ticks: Iterable[tuple[float, str]],
        size: float = 11,
    ) -> None:
        """The frame's lines and the numbers beside them."""
        bottom, right = self.top + self.height, self.left + self.width
        for value, said in y_ticks:
            y = self.at(self.xs[0], value)[1]
            self.drawing.line([(self.left, y), (right, y)], color=FAINT)
            self.drawing.text(self.left - 6, y + 4, said, size=size, anchor="end")
        for value, said in x_ticks:
            x = self.at(value, self.ys[0])[0]
            self.drawing.line([(x, bottom), (x, bottom + 4)])
            self.drawing.text(x, bottom + 17, said, size=size, anchor="middle")
        self.drawing.line([(self.left, self.top), (self.left, bottom), (right, bottom)])

    def plot(self, values: Iterable[tuple[float, float]], **style: object) -> None:
        """A line through values."""
        self.drawing.line([self.at(x, y) for x, y in values], **style)  # type: ignore[arg-type]
