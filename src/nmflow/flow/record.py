"""The record of a flow in one optimizer: k and the weights, as they travel in its state."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch.optim import Optimizer

from nmflow.errors import StateError
from nmflow.flow import resume
from nmflow.flow.edits import Edits
from nmflow.flow.state import DENSE_KEY, RECIPE_KEY, STEP_KEY, Run
from nmflow.flow.weights import Weights

log = logging.getLogger("nmflow")


class Record:
    """Goes into an optimizer's state when it is saved, and comes back when one is loaded.

    Attributes:
        k: the optimizer steps done.
    """

    def __init__(self, run: Run, optimizer: Optimizer, weights: Weights, edits: Edits) -> None:
        self.k = 0
        self._asked, self._optimizer = run, optimizer
        self._weights, self._edits = weights, edits
        self._signature = run.signature(weights.targets)

    def is_there(self) -> bool:
        """Whether the optimizer has the record of a run already."""
        return resume.is_there(self._optimizer)

    def write(self) -> None:
        """Write k and the recipe into the param groups."""
        for group in self._optimizer.param_groups:
            group[STEP_KEY], group[RECIPE_KEY] = self.k, self._signature

    def check(self) -> None:
        """Raise unless the optimizer's state, as it is, can be adopted."""
        self._check(self._optimizer.state, self._optimizer.param_groups, live=True)

    def check_saved(self, saved: Any) -> None:
        """Raise a `FlowError` if the optimizer's `state_dict` leaves the record out."""
        resume.check_saved(self._optimizer, saved)

    def take_over(self) -> None:
        """Adopt the optimizer's state, which was checked; the parameters are not written."""
        groups, weights = self._optimizer.param_groups, self._weights
        self.k = resume.steps_in(groups)
        run = weights.run = resume.run_of(groups, self._asked, weights.targets)
        self._signature = run.signature(weights.targets)
        if run.begun is not None:
            log.info(
                "%d steps of a run that was begun as one of %d: its phases go on as they were",
                run.total_steps,
                run.begun,
            )
        weights.prepared.clear()
        self._edits.forget()
        if weights.pruned:
            resume.adopt(self._optimizer, weights.slots)
        self.write()
        log.info("resumed %s at step %d", run.recipe.name, self.k)

    def notice(self) -> None:
        """Adopt a state that was loaded where neither a hook nor a guard saw it.

        Raises:
            StateError: it belongs to another run, or the gradients belong to other weights.
        """
        if self._is_foreign():
            self._notice()

    @torch.no_grad()
    def _notice(self) -> None:
        self._weights.expand()
        self.check()
        self.take_over()
        shown = self._edits.shown(self.k)
        self._weights.write(self.k)
        if not shown:
            raise StateError(
                f"a state of step {self.k} was loaded where no hook saw it, and the gradients "
                "belong to other weights: the state is adopted now, so call zero_grad(), run "
                "forward and backward again, and step"
            )

    # -- hooks and guards ----------------------------------------------------------------------

    def before_saving(self, *_: Any) -> None:
        """Before `state_dict`: a group that was added since the last step has no k yet."""
        self.notice()
        self.write()

    def saved(self, optimizer: Optimizer, state_dict: dict) -> dict:
        """After `state_dict`: add what it lacks."""
        return resume.add_pending(optimizer, self._weights.slots, state_dict)

    def before_loading(self, optimizer: Optimizer, state_dict: dict) -> None:
        """Before `load_state_dict`: raise for a state of another run."""
        self._check(state_dict["state"], state_dict["param_groups"])

    @torch.no_grad()
    def loaded(self, *_: Any) -> None:
        """After `load_state_dict`: adopt the state, unless that was done."""
        if self._is_foreign():
            self.check()
            self.take_over()
        self._weights.write(self.k)

    def _is_foreign(self) -> bool:
        together = self._weights.together
        bundled = together.gather() is not None
        return resume.is_foreign(self._optimizer, together.singles, self.k, bundled)

    def _check(self, state: dict, groups: list, live: bool = False) -> None:
        run = resume.run_of(groups, self._asked, self._weights.targets)
        keys = resume.params_of(groups)
        # Where the number differs, the optimizer itself refuses the state.
        same = live or len(keys) == len(resume.params_of(self._optimizer.param_groups))
        if run.recipe.prunes and same:
            needed = (DENSE_KEY, *run.held_keys)
            resume.check_slots(self._optimizer, self._weights.slots, state, keys, needed)
