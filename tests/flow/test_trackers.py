"""δ, the density, the phase and the flip rate reach whatever a plain `Trainer` reports to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("datasets")

from test_callback import plain_trainer
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from nmflow.integrations.transformers import PHASES, NMFlowCallback

OURS = ("nmflow_delta", "nmflow_density", "nmflow_phase_number", "nmflow_flip_rate")


class Tracker(TrainerCallback):
    """Keeps what it is given when it is called, as those of W&B and MLflow do."""

    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.entries.append({"step": state.global_step, **logs})


def test_a_tracker_sees_what_the_history_keeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "made-up", Tracker)
    callback = NMFlowCallback("mdgf-linear", "1:8", include="ff")
    trainer = plain_trainer(tmp_path, callback, report_to="made-up", logging_steps=2)
    (tracker,) = [c for c in trainer.callback_handler.callbacks if isinstance(c, Tracker)]
    trainer.train()
    losses = [entry for entry in tracker.entries if "loss" in entry]
    assert [entry["step"] for entry in losses] == [2, 4, 6, 8, 10, 12]
    kept = [entry for entry in trainer.state.log_history if "loss" in entry]
    for seen, held in zip(losses, kept, strict=True):
        given = {name: held[name] for name in OURS if name in held}
        assert {name: seen.get(name) for name in given} == given
        assert all(isinstance(value, int | float) for value in given.values())
        assert PHASES[held["nmflow_phase_number"]] == held["nmflow_phase"]
    assert losses[0]["nmflow_delta"] > losses[-1]["nmflow_delta"] == 0
    assert losses[-1]["nmflow_density"] == 1 / 8
    assert ["nmflow_flip_rate" in entry for entry in losses] == [False] + [True] * 5
    assert any(entry["nmflow_flip_rate"] > 0 for entry in losses[1:])
    assert sum(c is callback for c in trainer.callback_handler.callbacks) == 1


def test_tensorboard_has_them(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import (  # pyright: ignore
        EventAccumulator,
    )

    callback = NMFlowCallback("mdgf-linear", "1:8", include="ff")
    plain_trainer(tmp_path, callback, report_to="tensorboard", logging_steps=2).train()
    (events,) = tmp_path.rglob("events.out.*")
    read = EventAccumulator(str(events)).Reload()
    assert {f"train/{name}" for name in OURS} <= set(read.Tags()["scalars"])
