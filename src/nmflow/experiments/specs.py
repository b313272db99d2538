"""The parts of a configuration that do not depend on the task: data, network, training, recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_serializer, model_validator

from nmflow.errors import ConfigError
from nmflow.experiments.config_errors import near
from nmflow.recipes import Recipe, resolve

Fraction = Annotated[float, Field(ge=0, lt=1)]
# Strict, since `true` would count as 1.
Count = Annotated[int, Field(strict=True, ge=0)]
Positive = Annotated[int, Field(strict=True, gt=0)]
Globs = str | list[str]
FILES = ("parquet", "csv", "json")  # sources of rows with one file per split


class Strict(BaseModel):
    """A mapping of a file; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


def _without(values: dict[str, Any], **usual: Any) -> dict[str, Any]:
    """Leave out keys that are not given, so that a new key does not change the hash of old runs."""
    return {k: v for k, v in values.items() if k not in usual or v != usual[k]}


class Data(Strict):
    """Where the examples come from. Paths are relative to the working folder.

    Attributes:
        source: the kind of source. `pydoc` and `digits` need no file; `csv` has a header, and
            `json` an object per line.
        path: for `text`, a file or a folder of `.txt`; for `images`, a folder of classes, or of
            splits of classes; for `hub`, the name of a data set.
        files: for `parquet`, `csv` and `json`, a file per split, at least `train`.
        subset: for `hub`, the configuration of the data set.
        splits: for `hub`, the data set's name for each split.
        columns: the column of each role, such as `{text: body}`.
        limit: use only the first rows of each split, or characters of a text.
        held_out: how many training rows replace a missing split; a tenth of them by default.
    """

    source: Literal["pydoc", "digits", "text", "parquet", "csv", "json", "images", "hub"]
    path: str | None = None
    files: dict[Literal["train", "validation", "test"], str] = {}
    subset: str | None = None
    splits: dict[Literal["train", "validation", "test"], str] = {}
    columns: dict[str, str] = {}
    limit: Positive | None = None
    held_out: dict[Literal["validation", "test"], Positive] = {}

    @model_serializer(mode="wrap")
    def _given(self, usual: Any) -> dict[str, Any]:
        return _without(usual(self), held_out={})

    @model_validator(mode="after")
    def _complete(self) -> Data:
        if self.source in ("text", "images", "hub") and not self.path:
            raise ValueError(f"source '{self.source}' needs the key 'path'")
        if self.source in FILES and "train" not in self.files:
            raise ValueError(f"source '{self.source}' needs the key 'files' with at least 'train'")
        if self.held_out and self.source not in (*FILES, "images", "hub"):
            raise ValueError(f"source '{self.source}' has splits of its own: leave out 'held_out'")
        return self


class Model(Strict):
    """A network of `transformers`: by `kind` and the fields of its config, or `load`ed.

    Attributes:
        kind: a `model_type` of transformers, such as `gpt2`, or nmflow's `mlp-mixer` or `lstm`.
            With `load`, `--smoke` builds it instead.
        load: a folder (of a network, or of one finished run), a GGUF file, `package:NAME` for the
            network in an installed package, a name in the hub's cache, or `hub:NAME` to download.
        fields: fields of the network's config.
        freeze: globs of parameters that are not trained.
        keep_units: hidden units that each feed-forward block keeps, those of largest norm.
    """

    kind: str | None = None
    load: str | None = None
    fields: dict[str, Any] = {}
    freeze: list[str] = []
    keep_units: Positive | None = None

    @model_serializer(mode="wrap")
    def _given(self, usual: Any) -> dict[str, Any]:
        return _without(usual(self), freeze=[], keep_units=None)

    @model_validator(mode="after")
    def _one(self) -> Model:
        if self.kind is None and self.load is None:
            raise ValueError(
                "give either 'kind' (such as gpt2) or 'load' (a folder, package:NAME or hub:NAME)"
            )
        return self


class Distill(Strict):
    """A teacher for the training, see `nmflow.Distiller`.

    Attributes:
        teacher: a network as in `model.load`, or `self`: a frozen copy of the network before its
            first step.
        task: weight of the task's own loss.
        logits: weight of the loss on logits.
        hidden: weight of the loss on hidden states.
        temperature: T of the loss on logits.
    """

    teacher: str
    task: Annotated[float, Field(ge=0)] = 0.5
    logits: Annotated[float, Field(ge=0)] = 0.5
    hidden: Annotated[float, Field(ge=0)] = 1.0
    temperature: Annotated[float, Field(gt=0)] = 2.0

    @model_validator(mode="after")
    def _teaches(self) -> Distill:
        if self.logits == 0 and self.hidden == 0:
            raise ValueError("'logits' and 'hidden' are both 0: give one of them a weight")
        return self


class Training(Strict):
    """The optimization; steps are optimizer steps.

    Attributes:
        steps: steps of the run; needed unless there is a `budget`.
        budget: training FLOPs of the run instead of `steps`, which are solved from it.
        batch_size: examples per batch of one process.
        accumulate: batches per step.
        learning_rate: the largest learning rate.
        weight_decay: the optimizer's weight decay.
        warmup: the fraction of the steps in which the learning rate grows.
        schedule: the learning rate's schedule after that.
        optimizer: the `optim` of transformers' `TrainingArguments`.
        clip: the largest norm of the gradient; 0 does not clip.
        precision: the dtype of autocast.
        device: `auto` uses a GPU if there is one.
        log_every: steps between entries of the log.
        eval_every: steps between evaluations; 0 takes a tenth of the run.
        eval_rows: validation rows in each of them.
        save_every: steps between checkpoints; 0 takes a quarter of the run.
        track_every: steps between records of gradients and masks; 0 records none.
        noise_batches: batches for the signal-to-noise of gradients, at each quarter of the run; 0
            measures none.
        save_model: keep the finished network.
        trainer: more fields of `TrainingArguments`.
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
        # See `_without`.
        absent = {"steps": not self.steps, "budget": self.budget is None}
        return {key: value for key, value in usual(self).items() if not absent.get(key)}

    def interval(self, name: Literal["eval_every", "save_every"]) -> int:
        """Steps between evaluations or checkpoints, a multiple of `log_every`; 0 chooses.

        It is aligned, so that the loss logged after a resume is the mean of the same steps.
        """
        steps = getattr(self, name) or self.steps // {"eval_every": 10, "save_every": 4}[name]
        return max(1, round(steps / self.log_every)) * self.log_every


class RecipeSpec(Strict):
    """A recipe by name, its options, and its label in reports."""

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
                raise ConfigError(f"{key!r} is not an option of {self.name}{near(key, fields)}")
        return dataclasses.replace(recipe, **self.options)
