"""One run: build, train on `Trainer`, finalize, evaluate, audit, and write the result whole."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn
from transformers import TrainerCallback
from transformers.utils import logging as hf_logging

from nmflow.errors import ConfigError
from nmflow.experiments import budget, tasks
from nmflow.experiments.config import Run
from nmflow.experiments.costs import counted
from nmflow.experiments.noise_callback import NoiseCallback, frozen, tracked
from nmflow.experiments.provenance import fingerprint, machine, versions
from nmflow.experiments.run_folder import (
    CONFIG,
    MARK,
    MODEL,
    RESULT,
    RunFolder,
    read_json,
    write_json,
)
from nmflow.experiments.trainer import trainer as make_trainer
from nmflow.inspect.audit import audit
from nmflow.integrations.transformers import NMFlowCallback


class Progress(NamedTuple):
    """Where a run is, for whoever watches."""

    run: str
    step: int
    steps: int
    loss: float | None = None


Notify = Callable[[Progress], None]


def train(run: Run, folder: RunFolder, notify: Notify | None = None) -> dict[str, Any]:
    """Train one run, or go on with it, or return its result if it is finished.

    Args:
        run: the run.
        folder: its folder; another process that holds it is waited for.
        notify: called with a `Progress` now and then.

    Raises:
        NMFlowError: a mistake in the config, the data or the recipe; a folder that cannot be
            written.
    """
    # Under torchrun every process trains and one of them writes: a lock that the others waited for
    # would keep them from the first exchange, for which it waits in turn.
    first = int(os.environ.get("RANK", "0")) == 0
    with folder.lock() if first else contextlib.nullcontext(), quiet():
        if folder.finished:
            result = folder.result()
            if notify is not None:
                steps = result["run"]["training"]["steps"]
                notify(Progress(run.id, steps, steps))
            return result
        if first:
            write_json(folder.path / CONFIG, run.model_dump(mode="json"))
        problem = tasks.build(run)
        # Solved before the seed is set: the run is the same as one that is given these steps.
        run = budget.solved(run, problem)
        transformers.set_seed(run.seed)
        model = problem.model()
        initial = fingerprint(model)
        recorder = Recorder(run, notify)
        callback = NMFlowCallback(
            run.recipe.build(),
            run.pattern,
            run.include,
            run.exclude,
            remainder=run.remainder,
            mask_interval=run.mask_interval,
            freeze_mask=run.freeze_mask,
        )
        noise = NoiseCallback(
            callback, run.training.track_every, run.training.noise_batches, _drawer(run, problem)
        )
        trainer = make_trainer(run, folder, problem, model, [callback, noise, recorder])
        checkpoint = folder.last_checkpoint()
        recorder.start(checkpoint)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        final = {
            split: _figures(trainer.evaluate(getattr(problem, split), metric_key_prefix=split))
            for split in ("validation", "test")
        }
        _check_converged(run, final)
        # What follows counts and saves: on a CPU the counts are the same wherever it was trained.
        model.cpu()
        result = {
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
            "history": _history(trainer.state.log_history),
            "tracked": tracked(trainer.state.log_history),
            "noise": frozen(trainer.state.log_history),
            "audit": _audit(run, model),
            "cost": counted(run, model, problem.example, trainer.args.world_size),
            "versions": versions(),
            "machine": machine(trainer.args.device),
            "train_seconds": round(recorder.seconds, 3),
            "resumed_at": recorder.resumed_at,
        }
        if not first:
            return result
        if run.training.save_model:
            folder.put_folder(MODEL, lambda path: _save(model, problem, path))
        write_json(folder.path / RESULT, result)
        folder.clear_checkpoints()
        return result


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No word and no bar from `transformers` while a run of ours is at work."""
    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


class Recorder(TrainerCallback):
    """Tells the watcher, marks checkpoints as whole, and keeps the time over resumes."""

    def __init__(self, run: Run, notify: Notify | None) -> None:
        self.run, self.notify = run, notify
        self.seconds, self.resumed_at, self._since = 0.0, [], 0.0

    def start(self, checkpoint: Path | None) -> None:
        """Begin to count, from what the checkpoint says if there is one."""
        if checkpoint is not None:
            mark = read_json(checkpoint / MARK)
            self.seconds, self.resumed_at = mark["seconds"], [*mark["resumed_at"], mark["step"]]
        self._since = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """No checkpoint at the last step: the result follows, and a resume would step on."""
        if state.global_step >= state.max_steps:
            control.should_save = False

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Pass on the step and the loss."""
        if self.notify is not None:
            loss = state.log_history[-1].get("loss")
            self.notify(Progress(self.run.id, state.global_step, state.max_steps, loss))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """All files of the checkpoint are there: say so in one more."""
        if state.is_world_process_zero:
            self._count()
            mark = {
                "step": state.global_step,
                "seconds": self.seconds,
                "resumed_at": self.resumed_at,
            }
            write_json(Path(args.output_dir) / f"checkpoint-{state.global_step}" / MARK, mark)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop counting."""
        self._count()

    def _count(self) -> None:
        now = time.perf_counter()
        self.seconds, self._since = self.seconds + now - self._since, now


def _drawer(run: Run, problem: tasks.Problem) -> Callable[[torch.Generator], dict[str, Any]]:
    """Draws a batch of training data, apart from the order in which the run sees it."""
    data: Any = problem.train
    size = run.training.batch_size

    def draw(generator: torch.Generator) -> dict[str, Any]:
        chosen = torch.randint(len(data), (size,), generator=generator).tolist()
        many = getattr(data, "__getitems__", None)
        return problem.collate(many(chosen) if many else [data[i] for i in chosen])

    return draw


def _figures(metrics: dict[str, float]) -> dict[str, float]:
    # "test_accuracy" becomes "accuracy"; how long the evaluation took, and at which step, is no
    # figure of the network.
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
            row |= {f"eval_{k}": v for k, v in _figures(entry).items()}
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


def _save(model: Any, problem: tasks.Problem, path: Path) -> None:
    model.save_pretrained(path)
    if problem.save is not None:
        problem.save(path)
