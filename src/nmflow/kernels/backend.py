"""The interface of a backend, and the call that the registry asks it about.

A backend is a module of this package with four names:

* `why_not(call: Call) -> str | None`: None if it serves the call, else the reason in words;
* `kernel(call: Call) -> str`: the name of the kernel inside it that would run;
* `bind(values, codes, shape: Shape) -> run`: prepares one tiled weight. `run(x, bias, y, tokens,
  epilogue)` writes `y = epilogue(x Wᵀ + bias)`, where `x (tokens, inputs)` and `y (tokens, out)`
  have unit stride along their last axis and any row stride (`y` may be a slice of a wider output),
  `bias` is None or contiguous, with the weight's dtype, and epilogue is a number of
  `reference.EPILOGUES`. `run.turned`, if there is one, is a `run` for an x and a y that may each
  have their unit stride along the first axis; it returns False if no kernel takes them that way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nmflow.kernels.layout import Shape


@dataclass(frozen=True)
class Call:
    """What a backend needs to know to decide whether it serves a call."""

    shape: Shape
    dtype: torch.dtype
    device: str
    tokens: int
    threads: int = 1
    epilogue: int = 0
    values: str = ""  # "int8", or "int8, activations too", where the weight has 8-bit values

    @property
    def rounds(self) -> int:
        """1 if each token is rounded to 8 bits, else 0."""
        return int(self.values.endswith("too"))


class Backend(Protocol):
    """The interface of a backend; see the module's docstring."""

    def why_not(self, call: Call) -> str | None: ...  # noqa: D102

    def kernel(self, call: Call) -> str: ...  # noqa: D102

    def bind(self, values: Tensor, codes: Tensor, shape: Shape) -> Callable[..., None]: ...  # noqa: D102
