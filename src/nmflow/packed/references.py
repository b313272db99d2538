"""Who holds a module besides its parent: functions, their cells, weak references, globals."""

from __future__ import annotations

import copy
import dis
import functools
import gc
import types
import weakref
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

# Objects that a search skips: they lead to the whole interpreter and hold no network.
_CLOSED = (type, types.ModuleType, types.CodeType, types.FrameType, Tensor, str, bytes, int, float)
# How many objects a search looks at before it gives up.
_MOST = 200_000
_STATE = {"_parameters", "_buffers", "_modules"}


@dataclass
class Held:
    """Holders of a model's modules that `copy.deepcopy` does not copy."""

    own: set[int]
    functions: list[types.FunctionType] = field(default_factory=list)
    weak: list[weakref.ref[nn.Module]] = field(default_factory=list)
    seen: dict[int, bool] = field(default_factory=dict)

    def holds(self, value: Any) -> bool:
        """Whether an object holds a module or tensor of the model; notes the functions that do."""
        if isinstance(value, nn.Module | Tensor):
            return id(value) in self.own
        if id(value) in self.seen:
            return self.seen[id(value)]
        self.seen[id(value)] = False  # for what holds itself
        if isinstance(value, weakref.ref):
            if found := isinstance(value(), nn.Module) and id(value()) in self.own:
                self.weak.append(value)
        else:  # all of them are looked at, since each may hold a function
            found = True in [self.holds(part) for part in _inner(value)]
            if found and isinstance(value, types.FunctionType):
                self.functions.append(value)
        self.seen[id(value)] = found
        return found


def inside(model: nn.Module) -> Held:
    """Functions and weak references in the attributes of a model that hold its own modules."""
    tensors = (*model.parameters(), *model.buffers())
    held = Held({id(one) for one in (*model.modules(), *tensors)})
    for module in model.modules():
        for name, value in module.__dict__.items():
            if name not in _STATE:
                held.holds(value)
    return held


def renew(held: Held, memo: dict[int, Any]) -> None:
    """Put copies into the memo of `copy.deepcopy` for holders that it would not copy.

    Only the cells of a function that hold the model's modules are copied. The others are shared, so
    that a list to which the function appends stays the one that its author reads.
    """
    cells: list[tuple[types.CellType, types.CellType]] = []
    for function in held.functions:
        closure = []
        for cell in function.__closure__ or ():
            if _is_filled(cell) and id(cell) not in memo and held.holds(cell.cell_contents):
                memo[id(cell)] = types.CellType()
                cells.append((cell, memo[id(cell)]))
            closure.append(memo.get(id(cell), cell))
        memo[id(function)] = types.FunctionType(
            function.__code__, function.__globals__, function.__name__, None, tuple(closure) or None
        )

    def again(value: Any) -> Any:
        return copy.deepcopy(value, memo) if held.holds(value) else value

    for ref in held.weak:
        memo[id(ref)] = weakref.ref(copy.deepcopy(ref(), memo))
    for cell, made in cells:
        made.cell_contents = again(cell.cell_contents)
    for function in held.functions:
        made = memo[id(function)]
        made.__defaults__ = function.__defaults__ and tuple(map(again, function.__defaults__))
        keywords = function.__kwdefaults__
        made.__kwdefaults__ = keywords and {k: again(v) for k, v in keywords.items()}
        made.__dict__.update({k: again(v) for k, v in function.__dict__.items()})
        made.__qualname__, made.__doc__ = function.__qualname__, function.__doc__
        made.__module__, made.__annotations__ = function.__module__, function.__annotations__


def outside(forward: Any, modules: Collection[nn.Module]) -> str | None:
    """The name under which a method takes one of the modules from a closure or a global."""
    code = getattr(forward, "__code__", None)
    if not isinstance(forward, types.FunctionType) or code is None:
        return None
    for name, cell in zip(code.co_freevars, forward.__closure__ or (), strict=True):
        if _is_filled(cell) and _is_one_of(cell.cell_contents, modules):
            return name
    for name in _names(code):
        if _is_one_of(forward.__globals__.get(name), modules) and name in _globals(code):
            return name
    return None


def reaches(start: Any, modules: Collection[nn.Module]) -> bool:
    """Whether one of the modules can be reached from an object, by globals that code reads too."""
    left, seen = [start], {id(start)}
    while left and len(seen) < _MOST:
        one = left.pop()
        if isinstance(one, nn.Module) and one in modules:
            return True
        if isinstance(one, types.FunctionType):
            read = [one.__globals__.get(name) for name in _globals(one.__code__)]
            parts = [*_parts(one), *read]
        else:
            parts = gc.get_referents(one)
        for part in parts:
            if id(part) not in seen and not isinstance(part, _CLOSED):
                seen.add(id(part))
                left.append(part)
    return False


def _inner(value: Any) -> Iterable[Any]:
    """What a function, a method or a plain container holds."""
    if isinstance(value, types.FunctionType):
        return _parts(value)
    if isinstance(value, types.MethodType):
        return value.__self__, value.__func__
    if isinstance(value, functools.partial):
        return value.func, *value.args, *value.keywords.values()
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list | tuple | set | frozenset) else ()


def _parts(function: types.FunctionType) -> list[Any]:
    """What a function itself holds; its globals are shared."""
    cells = [c.cell_contents for c in function.__closure__ or () if _is_filled(c)]
    defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    return [*cells, *defaults, *function.__dict__.values()]


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _is_one_of(value: Any, modules: Collection[nn.Module]) -> bool:
    return isinstance(value, nn.Module) and any(part in modules for part in value.modules())


def _globals(code: types.CodeType) -> set[str]:
    """The names of globals that code reads, without those of attributes."""
    inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    own = {i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}
    return own.union(*(_globals(one) for one in inner))


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)
