"""The parts of a report: plain blocks that the HTML and the Markdown template both show."""

from __future__ import annotations

from dataclasses import dataclass, field

from nmflow.experiments.report.statistics import Paired, Summary


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    kind: str = "text"


@dataclass(frozen=True)
class Points:
    """A list of sentences."""

    items: list[str]
    kind: str = "points"


@dataclass(frozen=True)
class Table:
    """A table; the first `left` columns are words, the others figures."""

    caption: str
    head: list[str]
    rows: list[list[str]]
    left: int = 1
    kind: str = "table"


@dataclass(frozen=True)
class Figure:
    """A drawing as SVG, with a text alternative."""

    name: str
    svg: str
    alt: str
    caption: str
    kind: str = "figure"


@dataclass(frozen=True)
class Code:
    """A command to type."""

    text: str
    kind: str = "code"


Block = Text | Points | Table | Figure | Code


@dataclass
class Section:
    """A heading with its blocks."""

    title: str
    blocks: list[Block] = field(default_factory=list)


def markdown(text: str) -> str:
    """A text for Markdown that shows names as they are: no HTML, no link, no image, no new line.

    Example:
        >>> markdown("<b> [a](http://b) & c")
        '&lt;b&gt; [a]\\\\(http://b) &amp; c'
    """
    made = " ".join(text.splitlines())
    for mark, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):
        made = made.replace(mark, entity)
    # A link or an image needs a bracket here, and its definition a colon; a code span hides both.
    for mark in ("](", "][", "]:"):
        made = made.replace(mark, f"]\\{mark[1]}")
    return made.replace("`", "\\`")


def number(value: float | None, digits: int = 3, sign: bool = False) -> str:
    """A figure with a real minus sign, or a dash for None.

    Example:
        >>> number(-0.0314, 3), number(0.5, 1, sign=True), number(None)
        ('−0.031', '+0.5', '–')
    """
    if value is None:
        return "–"
    text = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    if not text.strip("+-0."):
        text = text.lstrip("+-")
    return text.replace("-", "−")


def threads(count: int) -> str:
    """`1 thread`, `2 threads`."""
    return f"{count} thread{'' if count == 1 else 's'}"


def quantity(value: float) -> str:
    """A count with a prefix: `1.23 G`.

    Example:
        >>> quantity(1_234_000_000), quantity(512)
        ('1.23 G', '512')
    """
    for limit, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g} {prefix}" if abs(value) < 1e18 else f"{value:.3g}"
    return f"{value:g}"


def mean_sd(s: Summary) -> str:
    """Mean and deviation, or the figure alone for one seed.

    Example:
        >>> mean_sd(Summary(2, 0.5, 0.01)), mean_sd(Summary(1, 0.5, None))
        ('0.500 ± 0.010', '0.500')
    """
    return f"{number(s.mean)} ± {number(s.sd)}" if s.sd is not None else number(s.mean)


def difference(d: Paired) -> str:
    """A paired difference with its interval, or "one seed" if there is none."""
    if d.low is None or d.high is None:
        return f"{number(d.mean, 4, True)} (one seed)"
    return f"{number(d.mean, 4, True)} [{number(d.low, 4, True)}, {number(d.high, 4, True)}]"
