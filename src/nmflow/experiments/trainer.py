"""A `Trainer` that computes only what runs need, with one sentence for a failed save."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import Subset
from transformers import PrinterCallback, Trainer, TrainingArguments

from nmflow.distill import Distiller
from nmflow.errors import ConfigError
from nmflow.experiments.config import Run
from nmflow.experiments.config_errors import near
from nmflow.experiments.run_folder import RunFolder
from nmflow.experiments.tasks import Problem
from nmflow.integrations.distillation import Distillation
from nmflow.integrations.transformers import ExactCheckpoints, FinalMasksEvaluation
from nmflow.packed.onednn import onednn_takes

log = logging.getLogger("nmflow")


class _Lean(ExactCheckpoints, FinalMasksEvaluation):
    """Leaves out what runs do not need of a `Trainer`; a failed save is one sentence."""

    def floating_point_ops(self, inputs: Any) -> int:
        """0, since `nmflow.cost` counts; counting here would walk the modules at each step."""
        return 0

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        ours: Any = self
        place = Path(ours.args.output_dir) / f"checkpoint-{ours.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
        except (OSError, RuntimeError, SafetensorError) as error:
            reason = " ".join(str(error).split())
            if type(error) is RuntimeError:
                # torch.save raises a RuntimeError after a short write.
                if "inline_container" not in reason:
                    raise
                reason = "a file was written only in part, for example because the disk is full"
            shutil.rmtree(place, ignore_errors=True)
            raise ConfigError(
                f"output is {str(place)!r} and cannot be written ({reason[:160]}): free some "
                "space or choose another folder; the run continues from its last checkpoint"
            ) from None


def trainer(
    run: Run,
    folder: RunFolder,
    problem: Problem,
    model: nn.Module,
    callbacks: list[Any],
    distiller: Distiller | None = None,
    mixins: tuple[type, ...] = (),
) -> Trainer:
    """The `Trainer` of a run, or its task's subclass, with its teacher."""
    few = _few(problem.validation, run.training.eval_rows)
    taught = () if distiller is None else (Distillation,)
    kind: Any = type("Trainer", (_Lean, *mixins, *taught, problem.trainer or Trainer), {})
    made = kind(
        model=model,
        args=_arguments(run, folder, problem),
        data_collator=problem.collate,
        train_dataset=problem.train,
        eval_dataset=few,
        compute_metrics=problem.metrics,
        preprocess_logits_for_metrics=problem.reduce,
        callbacks=callbacks,
    )
    if made.args.bf16 and made.args.use_cpu and not onednn_takes(torch.bfloat16):
        log.warning(
            "training.precision is 'bf16', for which this processor has no instructions: products "
            "take several times as long as in 'fp32'"
        )
    if distiller is not None:
        made.distiller = distiller
    made.remove_callback(PrinterCallback)  # a library does not print
    return made


def _few(data: Any, rows: int) -> Any:
    """Some rows, evenly spread, or the first rows of a stream, which only runs forward."""
    if hasattr(data, "take"):
        return data.take(rows)
    chosen = np.linspace(0, len(data) - 1, num=min(rows, len(data))).astype(int)
    return Subset(data, chosen.tolist())


def _arguments(run: Run, folder: RunFolder, problem: Problem) -> TrainingArguments:
    t = run.training
    kind = TrainingArguments
    if problem.trainer is not None and problem.trainer is not Trainer:
        kind = transformers.Seq2SeqTrainingArguments
    known = list(kind.__dataclass_fields__)
    for key in t.trainer:
        if key not in known:
            raise ConfigError(f"unknown key 'training.trainer.{key}'{near(key, known)}")
    values: dict[str, Any] = {
        "output_dir": str(folder.path),
        "max_steps": t.steps,
        "per_device_train_batch_size": t.batch_size,
        "per_device_eval_batch_size": 4 * t.batch_size,
        "gradient_accumulation_steps": t.accumulate,
        "learning_rate": t.learning_rate,
        "weight_decay": t.weight_decay,
        "warmup_steps": round(t.warmup * t.steps),
        "lr_scheduler_type": t.schedule,
        "optim": t.optimizer,
        "max_grad_norm": t.clip,
        "bf16": t.precision == "bf16",
        "fp16": t.precision == "fp16",
        # Set only on CPUs, where bfloat16 is otherwise refused.
        "use_cpu": t.device == "cpu" or not torch.accelerator.is_available(),
        "logging_steps": t.log_every,
        "eval_strategy": "steps",
        "eval_steps": t.interval("eval_every"),
        "save_strategy": "steps",
        "save_steps": t.interval("save_every"),
        "save_total_limit": 2,
        "seed": run.seed,
        "data_seed": run.seed,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": torch.cuda.is_available() and t.device != "cpu",
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "disable_tqdm": True,
        "report_to": "none",
    }
    try:
        return kind(**{**values, **(problem.arguments or {}), **t.trainer})
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"training is refused by the Trainer: {' '.join(str(error).split())}"
        ) from None
