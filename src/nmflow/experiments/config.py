"""Configuration files: read once, checked wholly, every mistake one sentence with its key."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from nmflow.errors import ConfigError, NMFlowError
from nmflow.experiments.reading import plain
from nmflow.pattern import Pattern
from nmflow.recipes import Recipe, resolve

Fraction = Annotated[float, Field(ge=0, lt=1)]
# `true` for a count would be 1 unless integers are strict.
Count = Annotated[int, Field(strict=True, ge=0)]
Positive = Annotated[int, Field(strict=True, gt=0)]
Globs = str | list[str]


class Strict(BaseModel):
    """A mapping of the file: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Data(Strict):
    """Where the examples come from.

    `pydoc` and `digits` need no file. `text` takes a file or a folder of `.txt` in `path`,
    `parquet` one file a split in `files`, `images` a folder of classes (or of splits of classes) in
    `path`, `hub` a data set's name in `path`. Paths are relative to the working folder.
    """

    source: Literal["pydoc", "digits", "text", "parquet", "images", "hub"]
    path: str | None = None
    files: dict[Literal["train", "validation", "test"], str] = {}
    subset: str | None = None
    splits: dict[Literal["train", "validation", "test"], str] = {}
    columns: dict[str, str] = {}
    limit: Positive | None = None

    @model_validator(mode="after")
    def _complete(self) -> Data:
        if self.source in ("text", "images", "hub") and not self.path:
            raise ValueError(f"source '{self.source}' needs the key 'path'")
        if self.source == "parquet" and "train" not in self.files:
            raise ValueError("source 'parquet' needs the key 'files' with at least 'train'")
        return self


class Model(Strict):
    """A network of `transformers`: by `kind` and the fields of its config, or `load`ed.

    With `load`, `kind` may say what is loaded: `--smoke` builds it where the hub is out of reach.
    """

    kind: str | None = None
    load: str | None = None
    fields: dict[str, Any] = {}

    @model_validator(mode="after")
    def _one(self) -> Model:
        if self.kind is None and self.load is None:
            raise ValueError("give either 'kind' (such as gpt2) or 'load' (a folder or a hub name)")
        return self


class Training(Strict):
    """The optimization; steps are optimizer steps, warm-up a fraction of them.

    In place of `steps` a `budget` of training FLOPs may be given; `nmflow.experiments.budget` then
    solves the steps, which are 0 until it has.
    """

    steps: Positive = 0
    budget: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    batch_size: Positive = 32
    accumulate: Positive = 1
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    warmup: Fraction = 0.05
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    optimizer: str = "adamw_torch_fused"
    clip: Annotated[float, Field(ge=0)] = 1.0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    device: Literal["auto", "cpu"] = "auto"
    log_every: Positive = 10
    eval_every: Count = 0
    eval_rows: Positive = 512
    save_every: Count = 0
    track_every: Count = 10
    noise_batches: Count = 0
    save_model: bool = True
    trainer: dict[str, Any] = {}

    @model_validator(mode="after")
    def _one_length(self) -> Training:
        if self.budget is None and not self.steps:
            raise ConfigError(
                "the key 'training.steps' is missing (or 'training.budget', in training FLOPs)"
            )
        if self.budget is not None and self.steps:
            raise ConfigError(
                f"both steps {self.steps} and budget {self.budget:g} are given: keep one"
            )
        return self

    @model_serializer(mode="wrap")
    def _given(self, usual: Any) -> dict[str, Any]:
        # What is not given is not written: a run without a budget keeps the hash that it had
        # before there were budgets.
        absent = {"steps": not self.steps, "budget": self.budget is None}
        return {key: value for key, value in usual(self).items() if not absent.get(key)}

    def interval(self, name: Literal["eval_every", "save_every"]) -> int:
        """Steps between evaluations or checkpoints, a multiple of `log_every`; 0 chooses.

        Aligned, so that the loss logged after a resume is the mean of the very same steps.
        """
        steps = getattr(self, name) or self.steps // {"eval_every": 10, "save_every": 4}[name]
        return max(1, round(steps / self.log_every)) * self.log_every


class RecipeSpec(Strict):
    """A recipe by name with options of its own, and the label that reports show."""

    name: str
    label: str = ""
    options: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        """Read `sr-ste`, or `{name: mdgf-linear, gradient: masked}` with the options inline."""
        if isinstance(value, str):
            return {"name": value}
        if isinstance(value, Mapping):
            known = {key: value[key] for key in ("name", "label") if key in value}
            options = dict(value.get("options", {}))
            options |= {k: v for k, v in value.items() if k not in ("name", "label", "options")}
            return {**known, "options": options}
        return value

    @model_validator(mode="after")
    def _resolves(self) -> RecipeSpec:
        self.build()
        return self

    @property
    def title(self) -> str:
        """The label, or the name with its options."""
        extra = ", ".join(f"{key} {value}" for key, value in sorted(self.options.items()))
        return self.label or (f"{self.name} ({extra})" if extra else self.name)

    def build(self) -> Recipe:
        """The recipe itself."""
        recipe = resolve(self.name)
        fields = list(type(recipe).__dataclass_fields__)
        for key in self.options:
            if key not in fields:
                raise ConfigError(f"{key!r} is no option of {self.name}{_near(key, fields)}")
        return dataclasses.replace(recipe, **self.options)


class Setting(Strict):
    """What all runs of an experiment share: task, data, network, placement, optimization."""

    name: str = "experiment"
    task: str
    options: dict[str, Any] = {}
    data: Data
    model: Model
    pattern: str | dict[str, str] = "1:16"
    include: Globs = "ff"
    exclude: list[str] = []
    remainder: Literal["error", "skip"] = "error"
    mask_interval: PositiveInt = 1
    freeze_mask: bool = False
    training: Training

    @field_validator("pattern")
    @classmethod
    def _reads(cls, value: str | dict[str, str]) -> str | dict[str, str]:
        for pattern in value.values() if isinstance(value, dict) else [value]:
            Pattern(pattern)
        return value

    @model_validator(mode="after")
    def _task_knows(self) -> Setting:
        from nmflow.experiments.tasks import options

        options(self.task, self.options)
        return self


class Run(Setting):
    """One training: a setting, one recipe, one seed."""

    recipe: RecipeSpec
    seed: Count = 0

    @property
    def pattern_text(self) -> str:
        """The pattern for people: `1:16`, or `*.mlp.* 1:16, *.attn.* 1:4`."""
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
            values["training"].pop("steps", None)  # solved, so a consequence
        return values

    @property
    def id(self) -> str:
        """The name of the run's folder: readable, and unique by its hash."""
        words = f"{self.recipe.name}_{self.pattern_text}_seed{self.seed}"
        return "".join(c if c.isalnum() or c in "-_." else "-" for c in words) + f"_{self.hash[:8]}"


class Experiment(Setting):
    """A file: a setting, several recipes and seeds, and how to run them on this machine."""

    recipes: Annotated[list[RecipeSpec], Field(min_length=1)]
    seeds: Annotated[list[Count], Field(min_length=1)] = [0]
    baseline: str = "sr-ste"
    output: str = "runs/{name}"
    workers: Count = 0
    threads: Count = 0

    @property
    def folder(self) -> Path:
        """Where the runs go."""
        return Path(self.output.replace("{name}", self.name))

    def runs(self) -> Iterator[Run]:
        """Every run, all recipes of one seed together, so that a stopped experiment is paired."""
        shared = self.model_dump(include=set(Setting.model_fields))
        for seed in self.seeds:
            for recipe in self.recipes:
                yield Run(**shared, recipe=recipe, seed=seed)


def load(path: str | Path, overrides: list[str] | None = None) -> Experiment:
    """Read a YAML file, set `key.path=value` overrides, and check it.

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


def read(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file, unchecked."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError(
            f"config is {str(path)!r}: {reason}; give the path of a YAML file"
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
    if key in ("training.steps", "training.budget"):  # one replaces the other
        place.pop("budget" if last == "steps" else "steps", None)
    place[last] = value


def parse(kind: type[BaseModel], raw: Any, where: str) -> Any:
    """`kind` made of `raw`; the first mistake becomes one ConfigError."""
    try:
        return kind.model_validate(raw)
    except ValidationError as failure:
        raise ConfigError(f"{where}: {_sentence(kind, failure)}") from None


def digest(value: Any) -> str:
    """SHA-256 of a plain value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _sentence(kind: type[BaseModel], failure: ValidationError) -> str:
    error = failure.errors()[0]
    path = ".".join(str(part) for part in error["loc"]) or "the file"
    if error["type"] == "extra_forbidden":
        keys = _fields_at(kind, error["loc"][:-1])
        return f"unknown key '{path}'{_near(str(error['loc'][-1]), keys)}"
    if error["type"] == "missing":
        return f"the key '{path}' is missing"
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, NMFlowError):
        return f"{path}: {cause}" if error["loc"] else str(cause)
    reason = str(cause) if isinstance(cause, ValueError) else error["msg"]
    value = repr(error["input"])
    return f"{path} is {value if len(value) < 80 else value[:77] + '...'}: {_lower(reason)}"


def _fields_at(kind: type[BaseModel], loc: tuple[Any, ...]) -> list[str]:
    for part in loc:
        if isinstance(part, int):
            continue
        field = kind.model_fields.get(str(part))
        inner = [field.annotation, *get_args(field.annotation)] if field else []
        kinds = [k for k in inner if isinstance(k, type) and issubclass(k, BaseModel)]
        if not kinds:
            return []
        kind = kinds[0]
    return list(kind.model_fields)


def _near(word: str, words: list[str]) -> str:
    close = difflib.get_close_matches(word, words, n=1)
    if close:
        return f": did you mean '{close[0]}'?"
    return f": choose from {', '.join(sorted(words))}" if words else ""


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:] if text[1:2].islower() else text
