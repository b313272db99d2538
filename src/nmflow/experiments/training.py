"""One run: build, train with `Trainer`, finalize, evaluate, audit, and write the result."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.utils import logging as hf_logging

from nmflow.distill import Distiller
from nmflow.errors import ConfigError
from nmflow.experiments import budget, origins, stopping, tasks, teachers
from nmflow.experiments.config import Run
from nmflow.experiments.costs import counted
from nmflow.experiments.files import write_json
from nmflow.experiments.noise_callback import NoiseCallback, frozen, tracked
from nmflow.experiments.provenance import fingerprint, machine, versions
from nmflow.experiments.recorder import Notify, Progress, Recorder
from nmflow.experiments.run_folder import CONFIG, MODEL, RESULT, RunFolder
from nmflow.experiments.trainer import trainer as make_trainer
from nmflow.inspect.audit import audit
from nmflow.inspect.record import write_record
from nmflow.integrations.transformers import NMFlowCallback
from nmflow.permute import permute_hidden
from nmflow.select.plan import plan


def train(
    run: Run, folder: RunFolder, notify: Notify | None = None, *mixins: type
) -> dict[str, Any]:
    """Train or resume one run, or return its result if it is finished.

    Args:
        run: the run.
        folder: its folder; if another process holds it, this one waits.
        notify: called with a `Progress` now and then.
        mixins: classes that change how the run's `Trainer` computes, but not the result.

    Under `stopping.watched()` a signal ends it: in training at the next step, when a checkpoint is
    saved, which raises `Stopped`; in the last evaluation when the result is written.

    Raises:
        NMFlowError: there is a mistake in the config, the data or the recipe, or the folder cannot
            be written.
    """
    # Under torchrun every process trains and one writes. If the others waited for the lock, they
    # would miss the first exchange, and all would hang.
    first = int(os.environ.get("RANK", "0")) == 0
    with folder.lock(run.id) if first else contextlib.nullcontext(), quiet():
        if first:
            folder.tidy()
        if folder.finished:
            result = folder.result()
            if notify is not None:
                steps = result["run"]["training"]["steps"]
                notify(Progress(run.id, steps, steps))
            return result
        if first:
            write_json(folder.path / CONFIG, run.model_dump(mode="json"))
        problem = tasks.build(run)
        # Solved before the seed is set, so that the run equals one with these steps.
        run = budget.solved(run, problem)
        transformers.set_seed(run.seed)
        model = problem.model()
        initial = fingerprint(model)
        # Copied or loaded before training, and before a checkpoint is loaded.
        distiller = teachers.distiller(run.distill, model) if run.distill else None
        if run.permute:
            permute_hidden(model, problem.example, run.pattern, run.include, run.exclude)
        callback = NMFlowCallback(
            run.recipe.build(),
            run.pattern,
            run.include,
            run.exclude,
            remainder=run.remainder,
            mask_interval=run.mask_interval,
            freeze_mask=run.freeze_mask,
            sparse_steps=run.sparse_steps,
        )
        checkpoint = folder.last_checkpoint(clean=first)
        noise = NoiseCallback(
            callback,
            run.training.track_every,
            run.training.noise_batches,
            _drawer(run, problem),
            checkpoint,
        )
        recorder = Recorder(run, callback, notify)
        trainer = make_trainer(
            run, folder, problem, model, [callback, noise, recorder], distiller, mixins
        )
        recorder.trainer = trainer
        recorder.start(checkpoint)
        with stopping.held():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            result = _result(run, problem, trainer, recorder, initial)
            result |= _origins(run, distiller)
            if first:
                if run.training.save_model:
                    folder.put_folder(MODEL, lambda path: _save(run, model, problem, path))
                write_json(folder.path / RESULT, result)
                folder.clear_checkpoints()
        return result


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the logs and progress bars of `transformers` during a run."""
    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def _result(
    run: Run, problem: tasks.Problem, trainer: Any, recorder: Recorder, initial: str
) -> dict[str, Any]:
    """Evaluate a trained network, and collect the result of its run."""
    model, log = trainer.model, trainer.state.log_history
    final = {
        split: _figures(trainer.evaluate(getattr(problem, split), metric_key_prefix=split))
        for split in ("validation", "test")
    }
    _check_converged(run, final)
    # Counted and saved on the CPU, so that counts do not depend on the device of training.
    model.cpu()
    return {
        "run": run.model_dump(mode="json"),
        "id": run.id,
        "recipe": run.recipe.title,
        "pattern": run.pattern_text,
        "seed": run.seed,
        "steps": run.training.steps,
        "config_hash": run.hash,
        "setting_hash": run.setting_hash,
        "headline": problem.headline,
        "data": asdict(problem.data),
        "initial_sha256": initial,
        "final_sha256": fingerprint(model),
        **final,
        "history": _history(log),
        "tracked": tracked(log),
        "noise": frozen(log),
        "audit": _audit(run, model),
        "cost": counted(run, model, problem.example, trainer.args.world_size),
        "versions": versions(),
        "machine": machine(trainer.args.device),
        "train_seconds": round(recorder.seconds, 3),
        "resumed_at": recorder.resumed_at,
    }


def _origins(run: Run, distiller: Distiller | None) -> dict[str, Any]:
    """Where saved weights came from: the network's, and its teacher's."""
    found: dict[str, Any] = {}
    if run.model.load is not None:
        found["source"] = asdict(origins.locate(run.model.load, "model.load"))
    if run.distill is not None and distiller is not None:
        found["teacher"] = {
            "text": run.distill.teacher,
            "sha256": fingerprint(distiller.teacher),
        }
    return found


def _drawer(run: Run, problem: tasks.Problem) -> Callable[[torch.Generator], dict[str, Any]]:
    """A function that draws training batches, independent of the run's own order."""
    data: Any = problem.train
    size = run.training.batch_size

    def draw(generator: torch.Generator) -> dict[str, Any]:
        chosen = torch.randint(len(data), (size,), generator=generator).tolist()
        many = getattr(data, "__getitems__", None)
        return problem.collate(many(chosen) if many else [data[i] for i in chosen])

    return draw


def _figures(metrics: dict[str, float]) -> dict[str, float]:
    # "test_accuracy" becomes "accuracy"; the evaluation's time and step are dropped.
    skip = ("runtime", "per_second", "epoch", "model_preparation_time")
    return {
        key.partition("_")[2]: float(value)
        for key, value in metrics.items()
        if "_" in key and not key.startswith("nmflow_") and not any(word in key for word in skip)
    }


def _check_converged(run: Run, final: dict[str, dict[str, float]]) -> None:
    for split, figures in final.items():
        for name, value in figures.items():
            if not math.isfinite(value):
                raise ConfigError(
                    f"training.learning_rate is {run.training.learning_rate}: the run diverged, "
                    f"its {split} {name} is {value}; lower it or clip harder"
                )


def _history(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for entry in log:
        row = {"step": entry["step"]}
        if "eval_loss" in entry:
            row |= {f"eval_{k}": v for k, v in sorted(_figures(entry).items())}
        elif "loss" in entry:
            row |= {key: entry[key] for key in ("loss", "learning_rate", "grad_norm")}
        else:
            continue
        row |= {name: entry[f"nmflow_{name}"] for name in ("delta", "density", "phase")}
        rows.append(row)
    return rows


def _audit(run: Run, model: nn.Module) -> dict[str, Any]:
    found = audit(model, run.pattern, run.include, run.exclude)
    rows = [
        {
            "name": row.name,
            "shape": list(row.shape),
            "pattern": str(row.pattern) if row.pattern else None,
            "holds": row.holds,
            "density": row.density,
            "nonzero": row.nonzero,
            "total": row.total,
        }
        for row in found.rows
    ]
    return {"ok": found.ok, "rows": rows}


def _save(run: Run, model: Any, problem: tasks.Problem, path: Path) -> None:
    model.save_pretrained(path)
    if run.recipe.name != "dense":  # for `nmflow audit`
        chosen = plan(model, run.pattern, run.include, run.exclude, remainder=run.remainder)
        write_record(path, chosen, dict(model.named_parameters()))
    if problem.save is not None:
        problem.save(path)
