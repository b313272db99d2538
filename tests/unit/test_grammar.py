"""The public names speak one grammar: order, defaults, keyword-only flags; so do the commands."""

from __future__ import annotations

import importlib
import inspect
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import pytest

import nmflow

ROOT = Path(__file__).resolve().parents[2]
EMPTY = inspect.Parameter.empty
# What chooses weights stands in this order, side by side, and may be given by position.
CHOOSING = ("recipe", "pattern", "include", "exclude")
# The one first word that says which member of a family is meant.
KINDS = {"decay", "structure", "schedule"}
BY_POSITION = {
    "holds": {"dim"},
    "mask": {"dim"},
    "importance": {"dim"},
    "soft_threshold": {"dim"},
    "wanda_score": {"dim"},
    "project": {"fading", "delta"},
    "matmul": {"epilogue"},  # the ops are called with the numbers of the C ABI
    "matmul_int8": {"activations", "epilogue"},
    "final_masks": {"copy"},
    "Pattern.of": {"panel"},
    "GradientNoise.of": {"part", "target"},
    "load": {"overrides"},
}
# A name has one default wherever it has one at all, but for these.
DEFAULTS: dict[str, dict[Any, str]] = {
    "include": {
        "all": "whatever chooses weights to prune",
        "*": "whatever reads weights that are pruned",
        "ff": "only feed-forward blocks have hidden units to permute",
    },
    "dense": {0.0: "", 0.05: "settling", 0.5: "one-shot and STEP"},
    "finetune": {0.2: "recipes that decay", 0.0: "those that do not"},
    "gradient": {"masked": "", "straight-through": "SDGF and settling, by their papers"},
    "packed": {True: "a decoder is exported to be fast", False: "other runtimes read any other"},
    "rivals": {
        ("int8", "bfloat16", "compile", "onnxruntime"): "of a forward pass",
        ("int8", "bfloat16", "onnxruntime", "llama.cpp"): "of decoding, which is no one graph",
    },
    "rounds": {40: "of an order", 5: "of a measurement"},
    "tokens": {(1, 197): "compress judges by two", (1, 16, 197): "bench measures three"},
}
# What other libraries call a thing that has a name here.
NOT_SAID = {
    "axis": "dim",
    "example": "example_inputs",
    "sample_inputs": "example_inputs",
    "in_place": "inplace",
    "n_steps": "total_steps",
    "num_steps": "total_steps",
}
# Made by the library alone: `track` makes one, `attach` the other, and the third is a protocol.
NOT_CALLED = {"Tracker", "Flow", "Backend"}


def documented() -> list[str]:
    text = "".join(page.read_text("utf-8") for page in (ROOT / "docs/reference").glob("*.md"))
    return sorted(set(re.findall(r"^::: (\S+)", text, re.MULTILINE)) | {
        f"nmflow.{name}" for name in nmflow.__all__
    })  # fmt: skip


def named(dotted: str) -> Any:
    owner, _, last = dotted.rpartition(".")
    try:
        return importlib.import_module(dotted)
    except ImportError:
        return getattr(importlib.import_module(owner), last)


def callables() -> Iterator[tuple[str, Any]]:
    """What a user calls, once each: functions, constructors that take options, and methods."""
    seen: set[int] = set()
    for dotted in documented():
        if dotted.startswith("nmflow.jax"):  # speaks the language of JAX, and is an extra
            continue
        thing = named(dotted)
        if inspect.ismodule(thing):
            things = [v for v in vars(thing).values() if getattr(v, "__module__", "") == dotted]
        else:
            things = [thing]
        for one in things:
            if id(one) in seen or (inspect.isclass(one) and issubclass(one, Exception)):
                continue
            seen.add(id(one))
            if inspect.isfunction(one):
                yield one.__name__, one
            if inspect.isclass(one):
                yield from of_class(one)


def of_class(one: type) -> Iterator[tuple[str, Any]]:
    """The constructor, unless the class is a record that the library makes, and own methods."""
    record = is_dataclass(one) or issubclass(one, list) or hasattr(one, "model_fields")
    if issubclass(one, nmflow.Recipe) or not (record or one.__name__ in NOT_CALLED):
        yield one.__name__, one
    for name, method in vars(one).items():
        inner = getattr(method, "__func__", method)
        foreign = any(name in vars(base) for base in one.__mro__[1:-1])  # the signature is theirs
        if inspect.isfunction(inner) and not name.startswith(("_", "on_")) and not foreign:
            yield f"{one.__name__}.{name}", inner


# `compute_loss` and `save_model` are those of a Trainer, whatever class they are mixed into.
FOREIGN = ("Distillation.", "ExactCheckpoints.")
CALLS = {name: call for name, call in callables() if not name.startswith(FOREIGN)}


def parameters(name: str) -> list[inspect.Parameter]:
    found = inspect.signature(CALLS[name]).parameters.values()
    return [p for p in found if p.name not in ("self", "cls")]


def test_the_table_is_of_what_there_is():
    assert len(CALLS) > 70
    assert {"attach", "compress", "prune", "MDGF", "Flow.finalize"} <= set(CALLS)
    for name in BY_POSITION:
        assert any(call.endswith(name) for call in CALLS), name


@pytest.mark.parametrize("name", CALLS)
def test_options_are_keyword_only(name: str):
    allowed = BY_POSITION.get(name) or BY_POSITION.get(name.rpartition(".")[2], set())
    allowed = allowed | set(CHOOSING) | KINDS
    for p in parameters(name):
        if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is not EMPTY:
            assert p.name in allowed, f"{name}({p.name}=) may be given by position"
        if p.kind is p.POSITIONAL_OR_KEYWORD:
            assert p.annotation not in ("bool", bool), f"{name}({p.name}) is a flag by position"


@pytest.mark.parametrize("name", CALLS)
def test_what_chooses_weights_stands_together(name: str):
    places = [p.name for p in parameters(name) if p.kind is p.POSITIONAL_OR_KEYWORD]
    chosen = [p for p in places if p in CHOOSING]
    assert chosen == sorted(chosen, key=CHOOSING.index), f"{name}{places}"
    if "include" in chosen:
        first = places.index(chosen[0])
        assert places[first:] == chosen, f"{name}{places}: other things stand between or after"
        assert chosen[-2:] == ["include", "exclude"], f"{name} has include and no exclude"


@pytest.mark.parametrize("name", CALLS)
def test_everything_is_annotated_and_nothing_has_another_name(name: str):
    for p in parameters(name):
        assert p.annotation is not EMPTY, f"{name}({p.name}) has no type"
        assert p.name not in NOT_SAID, f"{name}({p.name}): say {NOT_SAID.get(p.name)}"
    if not inspect.isclass(CALLS[name]):
        assert inspect.signature(CALLS[name]).return_annotation is not EMPTY, name


def test_a_name_has_one_default():
    found: dict[str, dict[Any, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in CALLS:
        for p in parameters(name) if not name.startswith("matmul") else ():
            default = p.default
            if default is EMPTY or default is None or callable(default):
                continue
            found[p.name][default].append(name)
    for name, defaults in found.items():
        if len(defaults) > 1:
            assert set(defaults) <= set(DEFAULTS.get(name, {})), f"{name}: {dict(defaults)}"


def test_flags_of_commands_are_the_same_words():
    typer = pytest.importorskip("typer")
    from nmflow.cli import app, commands

    group: Any = typer.main.get_command(app())
    flags: dict[str, dict[tuple[str, ...], list[str]]] = defaultdict(lambda: defaultdict(list))
    for command in commands():
        for p in group.commands[command].params:
            if p.param_type_name == "option":
                words = tuple(sorted([*p.opts, *p.secondary_opts]))
                longest = max(words, key=len).removeprefix("--").removeprefix("no-")
                flags[longest][words].append(command)
            else:
                assert p.name in {"config", "file", "runs", "source", "checkpoint", "model"}
    for name, ways in flags.items():
        assert len(ways) == 1, f"--{name}: {dict(ways)}"
    assert set(flags["output"]) == {("--output", "-o")}
    # What Python and the command line both take has one word.
    assert {"pattern", "include", "exclude", "tokens", "values", "activations", "dtype"} <= set(
        flags
    )
