"""Plain-text tables, for everything that prints itself."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def printable(text: str) -> str:
    """A text without what moves a terminal's cursor or breaks a line: such characters are escaped.

    Example:
        >>> print(printable("fc1\\n\\x1b[2J"))
        fc1\\n\\x1b[2J
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shown(text: str, most: int = 80) -> str:
    """A name out of a file for a sentence: printable, and cut to `most` characters."""
    made = printable(text)
    return made if len(made) <= most else made[: most - 3] + "..."


def one_line(error: BaseException, most: int = 200) -> str:
    """What the error of another package says, on a line of at most `most` characters.

    A longer text keeps both ends, since a compiler's reason comes last.

    Example:
        >>> one_line(ValueError("no\\n  such file")), one_line(KeyboardInterrupt())
        ('no such file', 'KeyboardInterrupt')
    """
    said = printable(" ".join(str(error).split())) or type(error).__name__
    head = most // 3
    return said if len(said) <= most else f"{said[:head]} ... {said[head + 5 - most :]}"


def table(rows: Sequence[Sequence[str]], right: Iterable[int] = ()) -> str:
    """Lay rows out in columns.

    Args:
        rows: cells; the first row is the head.
        right: columns that are aligned right.

    Example:
        >>> print(table([["weight", "kept"], ["fc1", "6"]], right=[1]))
        weight  kept
        ------------
        fc1        6
    """
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    aligned = set(right)
    laid = [
        "  ".join(
            cell.rjust(width) if i in aligned else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([laid[0], "-" * (sum(widths) + 2 * (len(widths) - 1)), *laid[1:]])
