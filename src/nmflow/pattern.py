"""The N:M pattern: parsed once, printed back, validated."""

from __future__ import annotations

import re
from dataclasses import dataclass

from nmflow.errors import PatternError

_GRAMMAR = re.compile(r"([0-9]{1,9}):([0-9]{1,9})(?:@([0-9]{1,9}))?")


@dataclass(frozen=True, init=False, repr=False)
class Pattern:
    r"""N weights kept of every M consecutive ones, `"N:M"`, or `"N:M@V"` for panels.

    N is the number **kept**: `"1:16"` keeps one weight of sixteen. In a panel, V consecutive
    output rows share their kept columns. `density = N / M`, `sparsity = 1 - N / M`.

    Args:
        spec: `"N:M"`, `"N:M@V"`, or a `Pattern`, which is returned as it is.

    Raises:
        PatternError: the text does not read `N:M` or `N:M@V` with `1 <= N <= M` and `V >= 1`.

    Example:
        >>> p = Pattern("1:16@64")
        >>> p.n, p.m, p.panel, p.sparsity
        (1, 16, 64, 0.9375)

    References:
        arXiv 2402.04744, section 2; panels are an addition of nmflow.
    """

    n: int
    m: int
    panel: int = 1

    def __init__(self, spec: str | Pattern) -> None:
        if isinstance(spec, Pattern):
            n, m, panel = spec.n, spec.m, spec.panel
        else:
            found = _GRAMMAR.fullmatch(spec.strip()) if isinstance(spec, str) else None
            if found is None:
                raise PatternError(
                    f"pattern is {spec!r}: write 'N:M' with N the number of weights kept of every "
                    "M, such as '1:16', or 'N:M@V' for panels of V rows"
                )
            n, m, panel = int(found[1]), int(found[2]), int(found[3] or 1)
        if m < 1:
            raise PatternError(
                f"pattern is '{spec}': N weights are kept of every M, so M must be at least 1"
            )
        if not 1 <= n <= m:
            raise PatternError(
                f"pattern is '{n}:{m}': N is the number of weights kept of every M, so it must be "
                f"at least 1 and at most M={m}"
            )
        if panel < 1:
            raise PatternError(f"pattern is '{spec}': a panel has at least 1 row, not {panel}")
        object.__setattr__(self, "n", n)
        object.__setattr__(self, "m", m)
        object.__setattr__(self, "panel", panel)

    @classmethod
    def of(cls, n: int, m: int, panel: int = 1) -> Pattern:
        """Build a pattern from its numbers: `Pattern.of(1, 16) == Pattern("1:16")`."""
        return cls(f"{n}:{m}@{panel}")

    @property
    def density(self) -> float:
        """The share of weights kept, N / M."""
        return self.n / self.m

    @property
    def sparsity(self) -> float:
        """The share of weights pruned, 1 - N / M."""
        return 1.0 - self.n / self.m

    def __str__(self) -> str:
        return f"{self.n}:{self.m}" + (f"@{self.panel}" if self.panel > 1 else "")

    def __repr__(self) -> str:
        return f"Pattern({str(self)!r})"


EVERY = Pattern("1:1")
"""Keeps every weight: the pattern of a dense one, and of a choice that any axis can meet."""
