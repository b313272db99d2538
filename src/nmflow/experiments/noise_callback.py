"""Gradient noise during a run: `track` every few steps, and `gradient_noise` at frozen weights."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from nmflow.experiments import checkpoints
from nmflow.experiments.files import write
from nmflow.inspect.noise import gradient_noise
from nmflow.inspect.track import Tracker, track
from nmflow.integrations.transformers import NMFlowCallback

PARTS = ("kept", "pruned")
TRACKED = ("grad_second", "grad_var", "grad_norm")
# A resumed run's log has sorted keys, so results define an order of their own.
TRACKED_KEYS = (
    *("step", "phase"),
    *(f"{name}_{part}" for name in TRACKED for part in PARTS),
    *("flip_rate", "distance", "distance_hard"),
)
FROZEN_KEYS = tuple(f"{name}_{part}" for part in PARTS for name in ("snr", "noise"))


class NoiseCallback(TrainerCallback):
    """Measures during training; the rows are in the `Trainer`'s log, so that a resume keeps them.

    Args:
        attached: the callback that holds the flow, before this one in the list.
        every: steps between the tracker's rows; 0 tracks nothing.
        batches: independent batches for the noise at frozen weights, at every quarter of the run;
            0 takes none.
        draw: draws a batch of training data with its own generator.
        checkpoint: the checkpoint that the run resumes from, if any.
    """

    def __init__(
        self,
        attached: NMFlowCallback,
        every: int,
        batches: int,
        draw: Any,
        checkpoint: Path | None = None,
    ) -> None:
        self.attached, self.every, self.batches, self.draw = attached, every, batches, draw
        self.checkpoint = checkpoint
        self.tracker: Tracker | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Track the flow that has just been attached, and restore the tracker."""
        if not self.every or self.attached.flow is None:
            return
        self.tracker = track(self.attached.flow, every=self.every, per_target=False)
        file = None if self.checkpoint is None else self.checkpoint / _file(args)
        if file is not None and file.is_file():
            held = torch.load(file, map_location=args.device, weights_only=True)
            self.tracker.load_state_dict(held["tracker"])
            self.tracker.rows[:] = held["rows"]

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save the masks for the next row, and the rows that are not in the log yet."""
        if self.tracker is not None:
            held = {"tracker": self.tracker.state_dict(), "rows": self.tracker.rows}
            sink = io.BytesIO()
            torch.save(held, sink)
            folder = checkpoints.place(Path(args.output_dir), state.global_step)
            write(folder / _file(args), sink.getvalue())

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put what was tracked since the last entry into the log."""
        if self.tracker is not None and self.tracker.rows:
            state.log_history[-1]["nmflow_tracked"] = [_short(row) for row in self.tracker.rows]
            self.tracker.rows.clear()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure at frozen weights, at a quarter, half, three quarters and the end."""
        quarters = [k * state.max_steps // 4 for k in (1, 2, 3, 4)]
        if self.batches and state.global_step in quarters:
            found = self._at_frozen_weights(kwargs["model"], args.device)
            state.log_history.append({"step": state.global_step, "nmflow_frozen": found})

    def _at_frozen_weights(self, model: Any, device: torch.device) -> dict[str, float]:
        flow = self.attached.flow
        if flow is None:
            return {}
        # Dropout must not draw from the generators of the training.
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            found = gradient_noise(
                model,
                _loss,
                self._batches(device),
                flow.plan,
                weights=flow.dense_weights(),
            )
        out = {}
        for part in PARTS:
            row = found.of(part)
            out |= {f"snr_{part}": row.snr_unbiased, f"noise_{part}": row.noise / row.weights}
        return out

    def _batches(self, device: torch.device) -> Iterator[dict[str, Any]]:
        draw = torch.Generator().manual_seed(20_402_047)  # the same batches for every recipe
        for _ in range(self.batches):
            yield {name: value.to(device) for name, value in self.draw(draw).items()}


def tracked(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The tracker's rows from a log."""
    rows = [row for entry in log for row in entry.get("nmflow_tracked", [])]
    return [_short(row) for row in rows]


def frozen(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The measurements at frozen weights from a log."""
    return [
        {
            "step": entry["step"],
            **{
                key: entry["nmflow_frozen"][key]
                for key in FROZEN_KEYS
                if key in entry["nmflow_frozen"]
            },
        }
        for entry in log
        if "nmflow_frozen" in entry
    ]


def _file(args: Any) -> str:
    # Each process tracks its own part of a sharded network.
    return f"tracker-{args.process_index}.pt"


def _loss(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    return model(**batch).loss


def _short(row: dict[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in TRACKED_KEYS}
