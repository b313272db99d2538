"""Configuration files, read and checked: an experiment per file, and its runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from nmflow import disk
from nmflow.errors import ConfigError
from nmflow.experiments import catalog
from nmflow.experiments.config_errors import parse
from nmflow.experiments.specs import (
    Count,
    Data,
    Distill,
    Globs,
    Model,
    RecipeSpec,
    Strict,
    Training,
)
from nmflow.experiments.tasks.registry import options
from nmflow.experiments.yaml_values import plain
from nmflow.pattern import Pattern

__all__ = [
    "Data",
    "Distill",
    "Experiment",
    "Model",
    "RecipeSpec",
    "Run",
    "Setting",
    "Training",
    "digest",
    "load",
    "parse",
    "read",
    "set_key",
]


class Setting(Strict):
    """The part that all runs of an experiment share: task, data, network, placement, optimization.

    Attributes:
        name: the name of the experiment.
        task: what is trained, such as `text-classification`.
        options: options of the task, such as `length` or `tokens`.
        data: where the examples come from.
        model: the network.
        pattern: N:M with N kept, or a mapping from presets or globs to patterns.
        include: presets or globs of the weights, see `nmflow.plan`.
        exclude: presets or globs to leave out.
        remainder: what to do with an axis that M does not divide, see `nmflow.plan`.
        mask_interval: steps between masks.
        freeze_mask: hold the mask through the fine-tune phase.
        sparse_steps: layers compute on kept places where they can, see `nmflow.attach`.
        distill: a teacher.
        permute: order the hidden units before the first step, see `nmflow.permute_hidden`.
        training: the optimization.
    """

    name: str = "experiment"
    task: str
    options: dict[str, Any] = Field(default_factory=dict)
    data: Data
    model: Model
    pattern: str | dict[str, str] = "1:16"
    include: Globs = "ff"
    exclude: list[str] = Field(default_factory=list)
    remainder: Literal["auto", "error", "skip"] = "error"
    mask_interval: PositiveInt = 1
    freeze_mask: bool = False
    sparse_steps: Literal["off", "auto", "on"] = "off"
    distill: Distill | None = None
    permute: bool = False
    training: Training

    @field_validator("pattern")
    @classmethod
    def _reads(cls, value: str | dict[str, str]) -> str | dict[str, str]:
        for pattern in value.values() if isinstance(value, dict) else [value]:
            Pattern(pattern)
        return value

    @field_validator("sparse_steps", mode="before")
    @classmethod
    def _yaml(cls, value: object) -> object:
        # YAML reads a bare `on` as true, and a bare `off` as false.
        return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _task_knows(self) -> Setting:
        options(self.task, self.options)
        return self


class Run(Setting):
    """One training: a setting, one recipe, one seed."""

    recipe: RecipeSpec
    seed: Count = 0

    @property
    def pattern_text(self) -> str:
        """The pattern as text: `1:16`, or `*.mlp.* 1:16, *.attn.* 1:4`."""
        if isinstance(self.pattern, str):
            return self.pattern
        return ", ".join(f"{glob} {pattern}" for glob, pattern in self.pattern.items())

    @property
    def hash(self) -> str:
        """SHA-256 of everything that decides the outcome."""
        return digest(self._given({"name"}))

    @property
    def setting_hash(self) -> str:
        """SHA-256 of all but recipe and seed: runs that share it may be compared."""
        return digest(self._given({"name", "recipe", "seed"}))

    def _given(self, exclude: set[str]) -> dict[str, Any]:
        values = self.model_dump(mode="json", exclude=exclude)
        if self.training.budget is not None:
            values["training"].pop("steps", None)  # solved from the budget
        # Defaults of newer keys are left out, so that older runs keep their hash.
        if self.distill is None:
            del values["distill"]
        if not self.permute:
            del values["permute"]
        if self.sparse_steps == "off":
            del values["sparse_steps"]
        return values

    @property
    def id(self) -> str:
        """The name of the run's folder: readable, and unique by its hash."""
        words = f"{self.recipe.name}_{self.pattern_text}_seed{self.seed}"
        return "".join(c if c.isalnum() or c in "-_." else "-" for c in words) + f"_{self.hash[:8]}"


class Experiment(Setting):
    """A file: a setting, several recipes and seeds, and how to run them on this machine.

    Attributes:
        recipes: names of recipes, or mappings with `name`, `label` and options.
        seeds: each recipe runs once per seed.
        output: the folder of the runs.
        workers: runs at a time; 0 takes one per core, and one in all on a GPU.
        threads: threads of each; 0 divides the cores among the workers.
    """

    recipes: Annotated[list[RecipeSpec], Field(min_length=1)]
    seeds: Annotated[list[Count], Field(min_length=1, default_factory=lambda: [0])]
    output: str = "runs/{name}"
    workers: Count = 0
    threads: Count = 0

    @property
    def folder(self) -> Path:
        """The folder of the runs."""
        return Path(self.output.replace("{name}", self.name))

    def runs(self) -> Iterator[Run]:
        """Every run, all recipes of one seed together, so that a stopped experiment has pairs."""
        shared = self.model_dump(include=set(Setting.model_fields))
        for seed in self.seeds:
            for recipe in self.recipes:
                yield Run(**shared, recipe=recipe, seed=seed)


_LARGEST_FILE = 8 << 20


def load(path: str | Path, overrides: list[str] | None = None) -> Experiment:
    """Read a YAML file, set `key.path=value` overrides, and check it.

    `path` may be a name of the catalog, such as `demo`.

    Raises:
        ConfigError: a missing file, a file that is no YAML mapping, an unknown key, a wrong type.
    """
    raw = read(path)
    for text in overrides or []:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"override is {text!r}: write key.path=value")
        set_key(raw, key, plain(value, f"override {text!r}"))
    return parse(Experiment, raw, str(path))


def read(path: str | Path, kind: str = "") -> dict[str, Any]:
    """The unchecked mapping in a YAML file, or in the catalog's file of that name and `kind`."""
    try:
        text = disk.read_bytes(catalog.find(path, kind), _LARGEST_FILE).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError(
            f"config is {str(path)!r}: {reason}; {catalog.instead(path, kind)}"
        ) from None
    raw = plain(text, f"config {str(path)!r}")
    if not isinstance(raw, dict):
        raise ConfigError(
            f"config {str(path)!r} holds a {type(raw).__name__}: write a mapping of keys such as "
            "'task', 'data', 'model', 'training', 'recipes'"
        )
    return raw


def set_key(raw: dict[str, Any], key: str, value: Any) -> None:
    """Set `training.steps` in the nested mapping `raw`, in place."""
    *parents, last = key.split(".")
    place = raw
    for parent in parents:
        place = place.setdefault(parent, {})
        if not isinstance(place, dict):
            raise ConfigError(f"override is {key!r}: {parent!r} is a value, not a mapping of keys")
    if key in ("training.steps", "training.budget"):  # each replaces the other
        place.pop("budget" if last == "steps" else "steps", None)
    place[last] = value


def digest(value: Any) -> str:
    """SHA-256 of a plain value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
