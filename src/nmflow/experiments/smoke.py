"""`--smoke`: run any configuration from start to end with two steps, offline."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nmflow.errors import ConfigError, NMFlowError
from nmflow.experiments import teachers
from nmflow.experiments.config import Experiment, Run, parse
from nmflow.experiments.data import synthetic
from nmflow.experiments.files import one_sentence, write_json
from nmflow.experiments.origins import is_local
from nmflow.experiments.run_folder import MODEL, RESULT, RunFolder
from nmflow.experiments.training import Notify, train
from nmflow.inspect.audit import audit
from nmflow.numbers import is_whole

STEPS, BATCH, ROWS = 2, 2, 4
MARKER = "smoke.json"
TEXTS = ("language-modelling", "token-modelling")
# Options that need several processes or a compiler; none changes the result.
DROPPED = ("dataloader_num_workers", "dataloader_prefetch_factor", "torch_compile", "tf32")


def folder_of(experiment: Experiment, output: Path | None = None) -> Path:
    """The folder of a smoke run: beside the runs, so that no report includes it."""
    folder = output or experiment.folder
    return folder.with_name(folder.name + "-smoke")


def smoke(experiment: Experiment, folder: Path, notify: Notify | None = None) -> dict[str, Any]:
    """Train two steps of the first sparse recipe, evaluate, finalize, audit, save, audit the file.

    The network keeps its size. The batch, the rows and the steps are cut, and data, tokenisers and
    weights that the configuration takes from the hub are replaced by synthetic data, a tokeniser
    that is learnt from it, and a fresh network; the result says so under `smoke`.

    Raises:
        NMFlowError: the configuration would not run.
        ConfigError: the folder holds something else; or the network is on the hub, and the
            configuration has no `model.kind` and `model.fields` to build it.
    """
    began = time.perf_counter()
    _clear(folder)
    write_json(folder / MARKER, [])  # first, so that a killed one can be cleared
    run, said = shrunk(experiment, folder)
    write_json(folder / MARKER, said)
    place = RunFolder(folder / run.id)
    result = train(run, place, notify)
    saved = audit(place.path / MODEL, run.pattern, run.include, run.exclude)
    dense = run.recipe.name == "dense"
    for where, good in (("network", result["audit"]["ok"]), ("saved file", saved.ok)):
        if not (good or dense):
            raise NMFlowError(f"the {where} of {experiment.name!r} does not hold {run.pattern!r}")
    result["smoke"] = {
        "instead": said,
        "saved_holds": saved.ok,
        "seconds": round(time.perf_counter() - began, 1),
        "peak_bytes": _peak(),
    }
    write_json(place.path / RESULT, result)
    return result


def shrunk(experiment: Experiment, folder: Path) -> tuple[Run, list[str]]:
    """The run that replaces an experiment, and sentences about the differences."""
    runs = list(experiment.runs())
    run = next((r for r in runs if r.recipe.name != "dense"), runs[0])
    said = [
        f"{STEPS} steps of {BATCH} examples at most instead of {_length(run)} of "
        f"{run.training.batch_size * run.training.accumulate}; seed {run.seed}, "
        f"{run.recipe.title} only"
    ]
    raw = run.model_dump()
    t = run.training
    batch = min(BATCH, t.batch_size)
    raw["training"].pop("budget", None)
    raw["training"] |= {
        "steps": STEPS,
        "batch_size": batch,
        # In proportion to the batch: a rate for a thousand images is too large for two.
        "learning_rate": t.learning_rate * batch / (t.batch_size * t.accumulate),
        "accumulate": 1,
        "log_every": 1,
        "eval_every": STEPS,
        "save_every": STEPS,
        "eval_rows": ROWS,
        "track_every": min(1, t.track_every),
        "noise_batches": min(2, t.noise_batches),
        "save_model": True,
        "trainer": {key: value for key, value in t.trainer.items() if key not in DROPPED},
    }
    if not torch.cuda.is_available():
        # Without a GPU, the `Trainer` refuses reduced precision unless the device is "cpu".
        raw["training"] |= {"device": "cpu"}
        if t.precision == "fp16":
            raw["training"]["precision"] = "fp32"
            said.append("fp32 instead of fp16, which needs a GPU")
    raw["recipe"]["options"] = _fractions(run.recipe.options, t.steps)
    raw["model"], raw["options"] = _model(run, said), _options(run, said)
    if run.distill is not None and run.distill.teacher != teachers.SELF:
        raw["distill"]["teacher"] = teachers.SELF
        said.append(f"its own first weights instead of the teacher {run.distill.teacher}")
    if run.data.source == "hub":
        data, what = synthetic.make(run, folder / "data")
        said.append(f"{what} instead of {run.data.path} on the hub")
        raw["data"] = data.model_dump()
    elif not raw["options"].get("stream") and run.task != "image-classification-stream":
        # A split is a tenth of the text, and needs a window or two.
        few = 100 * int(run.options.get("length", 64)) if run.task in TEXTS else ROWS * 8
        raw["data"]["limit"] = min(few, run.data.limit or few)
        said.append(f"the first {raw['data']['limit']:,} of the data")
    return parse(Run, raw, f"smoke of {experiment.name!r}"), said


def _fractions(options: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """Turn counts of steps into fractions, since they do not fit into two steps.

    Under a budget the steps are unknown (`steps` is 0); a phase is then a quarter.
    """
    return {
        key: (value / steps if steps else 0.25 * (value > 0))
        if key in ("dense", "finetune") and is_whole(value)
        else value
        for key, value in options.items()
    }


def _length(run: Run) -> str:
    t = run.training
    return f"{t.steps:,}" if t.budget is None else f"{t.budget:g} training FLOPs"


def _model(run: Run, said: list[str]) -> dict[str, Any]:
    model = run.model
    if model.load is None or is_local(model.load):
        return model.model_dump()
    if model.kind is None:
        raise ConfigError(
            f"model.load is {model.load!r}, a name on the hub: name its architecture in "
            "model.kind and model.fields, so that --smoke can build it without a network"
        )
    said.append(f"a fresh {model.kind} of the same size instead of {model.load}")
    return {"kind": model.kind, "fields": model.fields}


def _options(run: Run, said: list[str]) -> dict[str, Any]:
    options = dict(run.options)
    tokens = dict(options.get("tokens") or {})
    name = tokens.get("load")
    if name is not None and not is_local(name):
        said.append(f"a tokeniser of the synthetic text instead of {name}")
        tokens = {"size": 400}
    if options.get("stream"):
        tokens["rows"] = synthetic.ROWS["train"]
    return {**options, "tokens": tokens} if tokens else options


def _clear(folder: Path) -> None:
    with one_sentence(folder):
        if not folder.exists():
            return
        if any(folder.iterdir()) and not (folder / MARKER).is_file():
            raise ConfigError(
                f"output is {str(folder)!r}, where a smoke run would go: it holds other files; "
                "move them or choose another output"
            )
        shutil.rmtree(folder)


def _peak() -> int:
    """The peak memory of this process in bytes; 0 if the system does not tell."""
    if sys.platform == "win32":
        return 0
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
