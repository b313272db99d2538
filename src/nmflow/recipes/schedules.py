"""Schedules: pure functions from the optimizer steps done to what a weight goes through.

`k` counts optimizer steps that are done, so `Stage` at `k` describes the network that the forward
pass of step `k + 1` sees. Nothing here counts or remembers.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from nmflow.errors import RecipeError
from nmflow.numbers import is_finite
from nmflow.pattern import Pattern


@dataclass(frozen=True)
class Stage:
    """What one weight goes through at one step.

    The network computes with `W ⊙ (γ · m + (1 - m) ⊙ m' · δ)`.

    Attributes:
        phase: `"dense"`, `"decay"`, `"sparse"`, `"finetune"` or `"final"`.
        pattern: the pattern of m; None while the weight is dense.
        previous: the pattern of m', the weights that may still fade; None lets all of them.
        delta: δ, the value of the mask where m is 0.
        whole: the share of groups, those of the largest Σ|w|, of which m keeps all.
        gain: γ, by which kept weights are multiplied.
        rate: by which the learning rate is multiplied.
        form: what a kept weight becomes, one of `masks.FORMS`; "" leaves it as it is.
        tau: τ of the form `"multi-axis"`.
    """

    phase: str
    pattern: Pattern | None
    previous: Pattern | None = None
    delta: float = 0.0
    whole: float = 0.0
    gain: float = 1.0
    rate: float = 1.0
    form: str = ""
    tau: float = 0.0

    @property
    def masks(self) -> tuple[Pattern | None, Pattern | None]:
        """The two patterns that the weight's masks are of: the second is None unless it matters."""
        return self.pattern, self.previous if self.delta else None

    @property
    def kept(self) -> float:
        """The share of the weights that m keeps: 1 while the weight is dense."""
        density = 1.0 if self.pattern is None else self.pattern.density
        return self.whole + (1.0 - self.whole) * density

    @property
    def sparsity(self) -> float:
        """1 minus the mean value of the mask: 0 while the weight is dense."""
        if self.pattern is None:
            return 0.0
        most = self.previous.density if self.previous is not None else 1.0
        return 1.0 - self.kept - self.delta * (most - self.kept)


DENSE = Stage("dense", None, None, 1.0)


def steps_of(name: str, amount: float, total_steps: int) -> int:
    """Turn a fraction (float) or a number of steps (int) into steps of `total_steps`."""
    check_amount(name, amount)
    return amount if isinstance(amount, int) else round(amount * total_steps)


def check_amount(name: str, amount: float) -> None:
    """Raise unless `amount` is a fraction from 0 to 1 (float) or a number of steps (int)."""
    if not is_finite(amount):
        raise RecipeError(
            f"{name} is {amount!r}: give a fraction of total_steps as a float, or steps as an int"
        )
    if isinstance(amount, float) and not 0.0 <= amount <= 1.0:
        raise RecipeError(f"{name} is {amount}: a fraction of total_steps lies between 0.0 and 1.0")
    if amount < 0:
        raise RecipeError(f"{name} is {amount}: a number of steps is 0 or more")


def linear(t: int, span: int, beta: float | None) -> float:
    """δ = max(0, 1 - β·t), `t` steps into a decay of `span` steps; β defaults to 1 / span."""
    # t / span rather than t · (1 / span), so that δ is exactly 0 at the end.
    return max(0.0, 1.0 - (t / span if beta is None else beta * t))


def exponential(t: int, span: int, beta: float | None) -> float:
    """δ = exp(-β·t), `t` steps into a decay of `span` steps; β defaults to 5 / span."""
    return math.exp(-5.0 * t / span if beta is None else -beta * t)


DECAYS = {"linear": linear, "exponential": exponential}


def cosine_share(t: int, span: int) -> float:
    """cos(½π·t/span): 1 at first, and 0 `span` steps later."""
    return math.cos(0.5 * math.pi * t / span) if t < span else 0.0


SHARES = {"cosine": cosine_share, "linear": lambda t, span: 1.0 - t / span}


# Every weight asks for its stage several times a step, and a pattern is parsed from text.
_of = functools.cache(Pattern.of)


def stepwise_frames(pattern: Pattern, length: int) -> tuple[Pattern, ...]:
    """(M-1):M, ⌈M/2⌉:M, ⌈M/4⌉:M … down to exactly N:M; none twice. `length` is not needed.

    Example:
        >>> [str(p) for p in stepwise_frames(Pattern("3:8"), 8)]
        ['7:8', '4:8', '3:8']
    """
    n, m = pattern.n, pattern.m
    counts = [m - 1, *(math.ceil(m / 2**j) for j in range(1, m.bit_length() + 1))]
    kept = sorted({c for c in counts if c > n} | {n}, reverse=True)
    return tuple(_of(c, m, pattern.panel) for c in kept)


def geometric_frames(pattern: Pattern, length: int) -> tuple[Pattern, ...]:
    """8N:8M, 4N:4M, 2N:2M, N:M: one density, in groups that shrink.

    A frame whose 2^j·M does not divide the axis of `length` uses the largest 2^i, i < j, that does.

    Example:
        >>> [str(p) for p in geometric_frames(Pattern("1:4"), 24)]
        ['2:8', '2:8', '2:8', '1:4']
    """
    frames = []
    for j in (3, 2, 1, 0):
        while j and length % (2**j * pattern.m):
            j -= 1
        frames.append(_of(2**j * pattern.n, 2**j * pattern.m, pattern.panel))
    return tuple(frames)


def panel_frames(pattern: Pattern, length: int) -> tuple[Pattern, ...]:
    """N:M by single rows, then by panels that grow to N:M@V: V is halved while it is even.

    Each frame's panels are cut into whole ones of the frame before. `length` is not needed.

    Example:
        >>> [str(p) for p in panel_frames(Pattern("1:8@16"), 64)]
        ['1:8', '1:8@2', '1:8@4', '1:8@8', '1:8@16']
        >>> [str(p) for p in panel_frames(Pattern("1:8@6"), 64)]
        ['1:8', '1:8@3', '1:8@6']
    """
    widths = [pattern.panel]
    while widths[-1] > 1:
        widths.append(1 if widths[-1] % 2 else widths[-1] // 2)
    return tuple(_of(pattern.n, pattern.m, v) for v in reversed(widths))


FRAMES = {"stepwise": stepwise_frames, "geometric": geometric_frames, "panels": panel_frames}


def frame_at(t: int, span: int, frames: int) -> tuple[int, int, int]:
    """The frame of step `t` when `span` steps are cut into equal frames, with its start and stop.

    Frame i covers the steps from ⌈i·span/frames⌉ to ⌈(i+1)·span/frames⌉, exclusive.
    """
    index = min(t * frames // span, frames - 1)
    return index, -(-index * span // frames), -(-(index + 1) * span // frames)


def stair_at(t: int, span: int, stairs: int) -> tuple[int, int]:
    """The stair of step `t` of `span` steps that are cut into equal stairs, and where it begins.

    Stair i covers the steps from ⌈i·span/stairs⌉ to ⌈(i+1)·span/stairs⌉, exclusive; at `span` and
    after it, i is `stairs`.

    Example:
        >>> [stair_at(t, 8, 3) for t in range(9)]
        [(0, 0), (0, 0), (0, 0), (1, 3), (1, 3), (1, 3), (2, 6), (2, 6), (3, 8)]
    """
    index = min(t * stairs // span, stairs)
    return index, -(-index * span // stairs)


def cubic(t: int, span: int, pattern: Pattern) -> Pattern:
    """n:M with n = ⌈N + (M - N)·(1 - t/span)³⌉, at most M - 1: N exactly at t = span, not before.

    Example:
        >>> [cubic(t, 8, Pattern("1:16")).n for t in range(9)]
        [15, 12, 8, 5, 3, 2, 2, 2, 1]
    """
    n, m = pattern.n, pattern.m
    # In whole numbers, since a float just above N would keep one more at t = span.
    kept = n - (n - m) * (span - t) ** 3 // span**3
    return _of(max(n, min(m - 1, kept)), m, pattern.panel)


def cubic_frames(pattern: Pattern) -> tuple[Pattern, ...]:
    """(M-1):M, (M-2):M … N:M: every pattern that `cubic` may give."""
    n, m = pattern.n, pattern.m
    return tuple(_of(kept, m, pattern.panel) for kept in range(max(n, m - 1), n - 1, -1))
