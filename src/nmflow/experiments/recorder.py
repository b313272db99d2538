"""The callback of a run: reports progress, marks checkpoints, and stops on a signal."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from nmflow.experiments import checkpoints, stopping
from nmflow.experiments.config import Run
from nmflow.integrations.transformers import NMFlowCallback

PULSE = 2.0
"""The most seconds between two reports of progress."""


class Progress(NamedTuple):
    """The progress of a run."""

    run: str
    step: int
    steps: int
    loss: float | None = None
    phase: str | None = None


Notify = Callable[[Progress], None]


class Recorder(TrainerCallback):
    """Reports progress, marks complete checkpoints, keeps time and loss over resumes, and stops.

    Args:
        run: the run.
        attached: the callback that holds the flow.
        notify: called with a `Progress` at each entry of the log, and every `PULSE` seconds.
    """

    trainer: Any = None
    """The `Trainer`, set once it exists."""

    def __init__(self, run: Run, attached: NMFlowCallback, notify: Notify | None) -> None:
        self.run, self.attached, self.notify = run, attached, notify
        self.seconds, self.resumed_at, self._since = 0.0, [], 0.0
        self._about: dict[str, Any] = {}
        self._training = self._stopping = False
        self._told = 0.0

    def start(self, checkpoint: Path | None) -> None:
        """Begin to count, from the checkpoint's values if there is one."""
        if checkpoint is not None:
            self._about = checkpoints.about(checkpoint)
            self.seconds = self._about["seconds"]
            self.resumed_at = [*self._about["resumed_at"], self._about["step"]]
        self._since = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restore the losses of the steps since the last entry of the log."""
        self._training = True
        if self._about.get("losses") is not None and self._carries(args):
            self.trainer._tr_loss.fill_(self._about["losses"])
            self.trainer._globalstep_last_logged = self._about["logged"]
        self._tell(state, None)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save no checkpoint at the last step: the result follows, and a resume would train on."""
        if state.global_step >= state.max_steps:
            control.should_save = False
        elif control.should_log or self._carries(args):
            self._stop_if_asked(args, control)
        if self.notify is not None and time.perf_counter() - self._told > PULSE:
            self._tell(state, None)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop after an evaluation if a signal came in it, not a step later."""
        if self._training and state.global_step < state.max_steps:
            self._stop_if_asked(args, control)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report the step and the loss."""
        self._tell(state, state.log_history[-1].get("loss"))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Mark the checkpoint as complete, now that all its files are written."""
        if args.world_size > 1:
            dist.barrier()  # each process writes the state of its random numbers
        if state.is_world_process_zero:
            self._count()
            about = {
                "step": state.global_step,
                "seconds": self.seconds,
                "resumed_at": self.resumed_at,
            }
            if self._carries(args):
                about["losses"] = self.trainer._tr_loss.item()
                about["logged"] = self.trainer._globalstep_last_logged
            checkpoints.mark(checkpoints.place(Path(args.output_dir), state.global_step), about)
        if self._stopping:
            where = f"at step {state.global_step} of {state.max_steps} of {self.run.id}, saved"
            raise stopping.Stopped(self._stopping, where)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop counting."""
        self._training = False
        self._count()

    def _stop_if_asked(self, args: Any, control: Any) -> None:
        signum = stopping.asked() or 0
        if args.world_size > 1:
            # All processes must save at the same step, whenever each got the signal.
            most = torch.tensor(signum, device=args.device)
            dist.all_reduce(most, dist.ReduceOp.MAX)
            signum = int(most)
        if signum:
            self._stopping = signum
            control.should_save = True

    def _carries(self, args: Any) -> bool:
        """Whether a run can resume exactly from a checkpoint between two entries of the log.

        That needs the losses since the last entry. Older versions of `transformers` keep them in a
        local variable, and several processes have one sum each.
        """
        return args.world_size == 1 and hasattr(self.trainer, "_tr_loss")

    def _tell(self, state: Any, loss: float | None) -> None:
        if self.notify is not None:
            flow = self.attached.flow
            phase = flow.stage.phase if flow is not None and self.attached.live else None
            self._told = time.perf_counter()
            self.notify(Progress(self.run.id, state.global_step, state.max_steps, loss, phase))

    def _count(self) -> None:
        now = time.perf_counter()
        self.seconds, self._since = self.seconds + now - self._since, now
