"""CUDA graphs on a CPU: what torch and Triton are asked for is recorded, and asked for again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

KERNELS = ("project_all", "hold_all", "fingerprints")


class Recorder(TorchDispatchMode):
    """Captures what torch and Triton are asked for, as a CUDA graph does: by address, once for all.

    A capture runs nothing. Here it does, and what it wrote is put back. Memory that a capture gave
    is its graph's, which has it for several tensors in turn: a replay begins with garbage in it.

    Args:
        state: what the step writes that lives on.
        fill: puts into tables what is put there after the capture, which the run here needs.
    """

    def __init__(
        self, state: Callable[[], list[Tensor]], fill: Callable[[], None] = lambda: None
    ) -> None:
        super().__init__()
        self._state, self.fill = state, fill
        self._calls: list[Any] = []
        self._given: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        assert func not in (torch.ops.aten._local_scalar_dense.default,), "read on the host"
        # Where memory lies now: parameters trade theirs in the course of a step.
        here = tree_map_only(Tensor, lambda x: x.data, (args, kwargs))
        out = func(*args, **kwargs)
        known = {_place(x) for x in tree_leaves(here) if isinstance(x, Tensor)}
        found = [x.data for x in tree_leaves(out) if isinstance(x, Tensor)]
        self._given += [x for x in found if _place(x) not in known]
        self._calls.append((func, *here, tree_map_only(Tensor, lambda x: x.data, out)))
        return out

    def launched(self, kernel: Any, grid: Any, kwargs: dict[str, Any]) -> None:
        """A launch of Triton's, among torch's calls."""
        given = {_place(x) for x in self._given}
        for name in ("jobs_ptr", "owner_ptr"):
            assert _place(kwargs[name]) not in given, f"{name} is in memory of the graph"
        self._calls.append((lambda: kernel[grid](**kwargs), (), {}, None))

    def warm(self, step: Callable[[], Any]) -> Any:
        """A step as it is."""
        return step()

    def capture(self, step: Callable[[], Any]) -> tuple[Callable[[], object], Any]:
        """What replays a step, and what it returned."""
        self._calls = calls = []
        self._given = given = []
        before = [(x, x.clone()) for x in self._state()]
        _ACTIVE.append(self)
        try:
            with self:
                out = step()
        finally:
            _ACTIVE.clear()
            with torch.no_grad():
                for x, was in before:
                    x.copy_(was)
        return lambda: _replay(calls, given), out


_ACTIVE: list[Recorder] = []


def _place(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


@torch.no_grad()
def _replay(calls: list[Any], given: list[Tensor]) -> None:
    for x in given:
        x.fill_(float("nan") if x.is_floating_point() else 0)
    for func, args, kwargs, out in calls:
        found = func(*args, **kwargs)
        known = [out] if isinstance(out, Tensor) else out
        again = [found] if isinstance(found, Tensor) else found
        if not isinstance(known, list | tuple):
            continue
        for a, b in zip(known, again, strict=True):
            if isinstance(a, Tensor) and a.data_ptr() != b.data_ptr():
                a.copy_(b)


class Kernel:
    """A Triton kernel whose launches a recorder sees: only of what was compiled before."""

    def __init__(self, kernel: Any) -> None:
        self._kernel, self._compiled = kernel, set()

    def _variant(self, kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """What Triton compiles once for."""

        def kind(name: str, x: Any) -> Any:
            if isinstance(x, Tensor):
                return x.dtype, x.data_ptr() % 16 == 0
            special = (x == 1, x % 16 == 0) if isinstance(x, int) else None
            return x if name.isupper() or x is None else (type(x), special)

        return tuple((name, kind(name, x)) for name, x in kwargs.items())

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def run(**kwargs: Any) -> None:
            active = _ACTIVE[:]
            _ACTIVE.clear()
            variant = self._variant(kwargs)
            assert not active or variant in self._compiled, "compiled in a capture"
            self._compiled.add(variant)
            with _disable_current_modes():
                if active:
                    active[0].fill()
                self._kernel[grid](**kwargs)
            if active:
                active[0].launched(self._kernel, grid, kwargs)
                _ACTIVE[:] = active

        return run
