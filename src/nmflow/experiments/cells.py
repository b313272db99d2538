"""The cells of a sweep: a base, axes over any of its keys, and one run per combination."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from nmflow.errors import ConfigError
from nmflow.experiments import catalog, config
from nmflow.experiments.config import Run
from nmflow.experiments.config_errors import near
from nmflow.experiments.run_folder import RunFolder
from nmflow.experiments.specs import Count, Strict
from nmflow.experiments.yaml_values import plain

KEYS = frozenset(Run.model_fields)
# Keys whose value may be a mapping; for other keys, a mapping sets several keys together.
MAPPINGS = frozenset(("recipe", "pattern", "data", "model", "options", "training", "distill"))
# Keys of `nmflow train` about its list of runs, which the sweep replaces.
NOT_OF_A_RUN = frozenset(("output", "workers", "threads"))
LISTS = {"recipes": "recipe", "seeds": "seed"}


class File(Strict):
    """A sweep's file.

    `base` is a configuration file, relative to this one, a name of the catalog, or its keys;
    `overrides` replaces some of them by dotted key; `axes` gives the values that each dotted key
    takes in turn. The results go to `output`, the runs to `cells`, which several sweeps may share.
    """

    name: str = "sweep"
    base: str | dict[str, Any]
    overrides: dict[str, Any] = Field(default_factory=dict)
    axes: dict[str, list[Any]]
    output: str = "runs/{name}"
    cells: str = "{output}/cells"
    workers: Count = 0
    threads: Count = 0

    @field_validator("axes")
    @classmethod
    def _filled(cls, axes: dict[str, list[Any]]) -> dict[str, list[Any]]:
        if not axes:
            raise ConfigError("it has no axis: give one, such as 'seed: [0, 1]'")
        for name, values in axes.items():
            if not values:
                raise ConfigError(f"axis {name!r} is empty: give it a value or leave it out")
        return axes


@dataclass(frozen=True)
class Cell:
    """One run of a sweep, and its place on each axis as text."""

    run: Run
    place: dict[str, Any]


@dataclass(frozen=True)
class Sweep:
    """A sweep: its checked cells, and the folders of its results and runs."""

    name: str
    axes: tuple[str, ...]
    cells: tuple[Cell, ...]
    folder: Path
    store: Path
    workers: int = 0
    threads: int = 0

    @property
    def runs(self) -> list[Run]:
        """The runs of all cells."""
        return [cell.run for cell in self.cells]

    @property
    def finished(self) -> list[Cell]:
        """The cells that have a result."""
        return [c for c in self.cells if RunFolder(self.store / c.run.id).finished]


def load(path: str | Path, overrides: Sequence[str] = (), output: Path | None = None) -> Sweep:
    """Read a sweep's file and check every cell of it.

    Args:
        path: the YAML file, or a name of the catalog's sweeps.
        overrides: `key=value`; a key of the sweep itself (`axes.seed`, `threads`) or of its base.
        output: the folder of the results, instead of the file's.

    Raises:
        ConfigError: a mistake in the file or in its base, an axis of an unknown key or without a
            value, two axes of one key, or cells that are the same run.
    """
    raw = config.read(path, catalog.SWEEPS)
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"override is {text!r}: write key.path=value")
        value = plain(value, f"override {text!r}")
        key = key.removeprefix("overrides.")
        if key.partition(".")[0] in File.model_fields:
            config.set_key(raw, key, value)
        else:
            raw.setdefault("overrides", {})[key] = value
    file: File = config.parse(File, raw, str(path))
    folder = output or Path(file.output.replace("{name}", file.name))
    store = Path(file.cells.replace("{output}", str(folder)).replace("{name}", file.name))
    base, axes = _base(file, catalog.find(path, catalog.SWEEPS))
    cells = tuple(expand(base, axes, str(path)))
    return Sweep(file.name, tuple(axes), cells, folder, store, file.workers, file.threads)


def expand(base: Mapping[str, Any], axes: Mapping[str, list[Any]], where: str) -> Iterator[Cell]:
    """The cells of `base` at every combination of `axes`, with those of one seed together.

    A sweep that is stopped early then has complete rows to compare.
    """
    settings = {name: [_settings(name, v, where) for v in axes[name]] for name in axes}
    _no_clash(settings, where)
    order = sorted(
        axes, key=lambda name: name != "seed"
    )  # a stable sort: the first axis changes slowest
    seen: dict[str, int] = {}
    named: dict[tuple[str, str, int], int] = {}
    choices = itertools.product(*(range(len(axes[name])) for name in order))
    for number, choice in enumerate(choices, 1):
        chosen = dict(zip(order, choice, strict=True))
        raw = json.loads(json.dumps(base))  # a deep copy of plain values
        given = [pair for name in axes for pair in settings[name][chosen[name]].items()]
        for key, value in sorted(given, key=lambda pair: pair[0].count(".")):
            _assign(raw, key, value)
        short = {name: _short(axes[name][chosen[name]]) for name in axes}
        about = ", ".join(f"{name} {value}" for name, value in short.items())
        run: Run = config.parse(Run, raw, f"{where}: cell {number} ({about})")
        known = seen.setdefault(run.hash, number)
        if known != number:
            raise ConfigError(
                f"{where}: cells {known} and {number} are the same run ({about}): "
                "remove the value that an axis repeats"
            )
        twin = named.setdefault((run.setting_hash, run.recipe.title, run.seed), number)
        if twin != number:
            raise ConfigError(
                f"{where}: cells {twin} and {number} differ, but the recipes of both are called "
                f"{run.recipe.title!r}: give them labels of their own"
            )
        yield Cell(run, {name: _shown(name, value, run) for name, value in short.items()})


def _base(file: File, path: Path) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    raw = dict(file.base) if isinstance(file.base, dict) else _read_base(file.base, path.parent)
    for key, value in file.overrides.items():
        _assign(raw, key, value)
    lists = {one: raw.pop(many) for many, one in LISTS.items() if many in raw}
    for key in NOT_OF_A_RUN:
        raw.pop(key, None)
    raw["name"] = file.name
    axes = dict(file.axes)
    taken = {key for name in axes for value in axes[name] for key in _keys(name, value)}
    for key, values in lists.items():
        if key in taken:
            continue
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{path}: the base gives {values!r} for its {key}s: write a list")
        axes = {key: values, **axes}
    return raw, axes


def _read_base(base: str, beside: Path) -> dict[str, Any]:
    path = beside / base
    return config.read(base if base in catalog.names() and not path.is_file() else path)


def _keys(name: str, value: Any) -> list[str]:
    return [k for k in value if k != "label"] if _together(name, value) else [name]


def _together(name: str, value: Any) -> bool:
    """Whether an axis's value maps keys to values, instead of being a value of the key `name`."""
    return isinstance(value, Mapping) and "." not in name and name not in MAPPINGS


def _settings(name: str, value: Any, where: str) -> dict[str, Any]:
    if not _together(name, value):
        _known(name, f"{where}: axis {name!r} is", where)
        return {name: value}
    for key in value:
        if key != "label":
            _known(str(key), f"{where}: axis {name!r} sets {key!r},", where)
    return {str(key): v for key, v in value.items() if key != "label"}


def _known(key: str, said: str, where: str) -> None:
    if key.partition(".")[0] not in KEYS:
        raise ConfigError(f"{said} not a key of a run{near(key, sorted(KEYS))}")


def _no_clash(settings: Mapping[str, list[dict[str, Any]]], where: str) -> None:
    owner: dict[str, str] = {}
    for name, values in settings.items():
        for key in {key for value in values for key in value}:
            # Steps and a budget exclude each other, so they count as one key.
            key = "training.steps" if key == "training.budget" else key
            if owner.setdefault(key, name) != name:
                raise ConfigError(
                    f"{where}: the axes {owner[key]!r} and {name!r} both set {key!r}: join them "
                    "into one whose values are mappings"
                )


def _assign(raw: dict[str, Any], key: str, value: Any) -> None:
    if key.startswith("recipe."):
        if isinstance(raw.get("recipe"), str):
            raw["recipe"] = {"name": raw["recipe"]}
        recipe = raw.get("recipe") or {}
        if recipe.get("label") and key not in ("recipe.label", "recipe.name"):
            recipe["label"] += f", {key.rpartition('.')[2]} {value}"
    config.set_key(raw, key, value)


def _short(value: Any) -> Any:
    if isinstance(value, Mapping) and value.get("label"):
        return value["label"]
    return value if isinstance(value, str | int | float | None) else json.dumps(value)


def _shown(name: str, value: Any, run: Run) -> Any:
    return {"recipe": run.recipe.title, "pattern": run.pattern_text}.get(name, value)
