"""The state of a tracker, which goes on where a killed run stopped."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch

import nmflow
from nmflow.errors import StateError


def test_a_tracker_goes_on_from_its_state() -> None:
    """Rows of a run that was resumed are those of the run that was not, from the first on."""

    def run(steps: range, start: Any = None) -> tuple[Any, Any]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(32, 16), torch.nn.Tanh(), torch.nn.Linear(16, 8)
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
        if start:
            model.load_state_dict(start[0])
            optimizer.load_state_dict(start[1])
        flow = nmflow.attach(model, optimizer, "ste", "1:8", "*", total_steps=8)
        tracker = nmflow.track(flow)
        if start:
            tracker.load_state_dict(start[2])
        for i in steps:
            optimizer.zero_grad()
            x = torch.randn(4, 32, generator=torch.Generator().manual_seed(i))
            model(x).square().mean().backward()
            optimizer.step()
        buffer = io.BytesIO()
        torch.save([model.state_dict(), optimizer.state_dict(), tracker.state_dict()], buffer)
        buffer.seek(0)
        return tracker, torch.load(buffer, weights_only=True)

    whole, _ = run(range(8))
    _, saved = run(range(3))
    again, _ = run(range(3, 8), saved)
    assert again.rows == whole.rows
    assert all(row["flip_rate"] is not None for row in again.rows if row["step"])
    assert any(row["flip_rate"] for row in again.rows[1:])
    kept = list(again.rows)
    for bad in ({}, {"rows": 3}, {**saved[2], "masks": {"x": saved[2]["masks"]["0.weight"]}},
                {**saved[2], "shapes": {"0.weight": [1]}}):  # fmt: skip
        with pytest.raises(StateError, match="tracker"):
            again.load_state_dict(bad)
        assert again.rows == kept
