"""A training that was broken off, and is begun or resumed by the same callback."""

from __future__ import annotations

import logging

from nmflow.errors import StateError
from nmflow.flow import Flow
from nmflow.flow.flow import let_go

log = logging.getLogger("nmflow")


def leave(flow: Flow, resumed: bool) -> None:
    """Leave the flow of a training that was broken off, so that another may be attached.

    Args:
        flow: the flow.
        resumed: whether a trainer has restored weights and state, which are then to stay. Else the
            network holds the dense weights afterwards, as after a dense training.
    """
    if resumed:
        let_go(flow)
        return
    log.warning(
        "the training before was broken off after %d steps: this one begins with the dense weights "
        "that it left",
        flow.steps_done,
    )
    flow.detach()


def check_resumed(flow: Flow, step: int, mend: str) -> None:
    """Raise a `StateError` where a checkpoint in mid-run brought no state of a recipe.

    Args:
        flow: the flow that was attached; it is detached first.
        step: the optimizer steps that the trainer has restored.
        mend: how a checkpoint of that trainer comes to hold the state.
    """
    if not step or flow.steps_done:
        return
    flow.detach()
    left = max(1, flow.total_steps - step)
    raise StateError(
        f"the checkpoint is of step {step} and holds no state of a recipe, which would begin now "
        f"and not end by step {flow.total_steps}: resume from one that was saved under the recipe, "
        f"{mend}; or load its weights and train without a checkpoint; or pass NMFlowCallback "
        f"total_steps={left}, the steps that are left"
    )
