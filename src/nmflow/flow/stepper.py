"""The hooks of one optimizer: dense weights in before its step, sparse ones out after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from nmflow.errors import FlowError, WeightError
from nmflow.flow import owners, preconditioner
from nmflow.flow.clones import Clones
from nmflow.flow.edits import Edits
from nmflow.flow.graph_steps import GraphSteps
from nmflow.flow.guard import Guard, overrides
from nmflow.flow.observing import Observation
from nmflow.flow.record import Record
from nmflow.flow.sharding import local, sharded
from nmflow.flow.slots import Slot
from nmflow.flow.sparse_steps import Mode, SparseSteps
from nmflow.flow.state import GROUP_KEYS, Run
from nmflow.flow.steps import Steps
from nmflow.flow.weights import Weights


class Stepper:
    """One optimizer under a recipe, from `attach` to `finalize`.

    Attributes:
        slots: the parameters that it owns and a recipe targets.
        edits: what the user may do to them between two steps.
        layers: how the layers of the weights compute.
        graphs: the part of its steps that is in a CUDA graph.
    """

    def __init__(
        self,
        run: Run,
        optimizer: Optimizer,
        slots: Sequence[Slot],
        observations: list[Observation],
        sparse_steps: Mode,
    ) -> None:
        self.optimizer, self.slots = optimizer, slots
        self._weights = Weights(run, optimizer, slots)
        self.edits = Edits(self._weights)
        self._record = Record(run, optimizer, self._weights, self.edits)
        self._steps = Steps(optimizer, self._weights, self.edits, self._record, observations)
        self.graphs = GraphSteps(
            optimizer, self._weights, self.edits, self._record, self._steps, observations
        )
        self._weights.shrinks = sparse_steps != "off"
        self._handles: list[Any] = []  # of hooks and guards
        self.layers = SparseSteps(sparse_steps, self._weights.pruned, optimizer, observations)
        self._weights.told.append(self.layers.show)

    @property
    def k(self) -> int:
        """The optimizer steps done."""
        return self._record.k

    @property
    def run(self) -> Run:
        """The recipe over its run; it differs from the requested one while a state is prolonged."""
        return self._weights.run

    @property
    def block(self) -> str:
        """The `with` block of the flow that is open, in which nothing may step; or ""."""
        return self._steps.block

    @block.setter
    def block(self, name: str) -> None:
        self._steps.block = name

    def tell(self, listener: Callable[[Run, int], None]) -> None:
        """Call a listener with the run and k, whenever W̃ of step k was written."""
        self._weights.told.append(listener)

    # -- from attach to finalize ---------------------------------------------------------------

    def check(self) -> None:
        """Raise unless a recipe fits the optimizer and the weights; change nothing."""
        for slot in self.slots:
            if owners.is_owned(slot.param):
                raise FlowError(
                    f"'{slot.name}' already has a recipe attached: call finalize() or detach() "
                    "on that flow first, or exclude it"
                )
        if owners.owns(self.optimizer):
            raise FlowError(
                f"the {type(self.optimizer).__name__} already has a recipe attached, on other "
                "weights: attach once, with a mapping of patterns such as {'ff': '1:16', 'qk': "
                "'1:4'}, or with an nn.ModuleList of the models"
            )
        for slot in self.slots:
            if slot.param.is_meta:
                raise WeightError(
                    f"'{slot.name}' is on the meta device, where it has no values: load the model "
                    "onto a device (`to_empty`, then `load_state_dict`) before attaching"
                )
            if slot.param.is_inference():
                raise WeightError(
                    f"'{slot.name}' was made in torch.inference_mode(), so that nothing can train "
                    "it: build or load the model outside of that"
                )
            if not bool(torch.isfinite(local(slot.param)).all()):
                raise WeightError(
                    f"'{slot.name}' holds a NaN or an infinity, which no magnitude mask can "
                    "order: correct the weight before attaching"
                )
            if self.run.recipe.form and sharded(slot.param):
                raise FlowError(
                    f"'{slot.name}' is sharded, but {self.run.recipe.name} looks at a whole weight "
                    "at once: use DDP, or another recipe"
                )
        if self.run.recipe.freezes_second_moment:
            preconditioner.check(self.optimizer)
        self._weights.groups.check(self.run.recipe)
        if self._record.is_there():
            self._record.check()

    def start(self) -> None:
        """Adopt the weights, or the state that is there already, and hook the optimizer."""
        for slot in self.slots:
            owners.add(slot.param, self.optimizer)
        self._hook()
        fresh = not self._record.is_there()
        if fresh:
            self._record.write()
            self._weights.start()
            if overrides(self.optimizer, "state_dict"):
                self._record.check_saved(self.optimizer.state_dict())
        else:
            self._record.take_over()
        with torch.no_grad():
            self._weights.write(self.k, reuse=False if fresh else None)

    def _hook(self) -> None:
        one, steps, record = self.optimizer, self._steps, self._record
        around: Any = torch.compiler.disable  # a compiler that traces a step skips ours
        hooks: Any
        hooks = (
            (one.register_step_pre_hook, around(steps.before)),
            (one.register_step_post_hook, around(steps.after)),
            (one.register_state_dict_pre_hook, steps.before_saving),
            (one.register_state_dict_pre_hook, record.before_saving),
            (one.register_state_dict_post_hook, record.saved),
            (one.register_load_state_dict_pre_hook, steps.before_loading),
            (one.register_load_state_dict_pre_hook, record.before_loading),
            (one.register_load_state_dict_post_hook, record.loaded),
        )
        self._handles.extend(register(hook) for register, hook in hooks)
        # Hooks of others after a step see the sparse weights, and a step that is counted.
        hooks = one._optimizer_step_post_hooks
        hooks.move_to_end(self._handles[1].id, last=False)
        self._handles.append(Clones(one, self._weights.expand))
        self._guard("step", steps.begins, steps.ends, steps.fails)
        for name in ("train", "eval"):
            if callable(getattr(one, name, None)):
                self._guard(name, steps.lend, steps.give_back, steps.give_back)
        # Classes that have their own version may leave out the hooks.
        if overrides(one, "state_dict"):
            self._guard("state_dict", self._before_saving, lambda out: record.saved(one, out))
        if overrides(one, "load_state_dict"):
            self._guard("load_state_dict", self._before_loading, lambda out: record.loaded() or out)

    def _guard(self, name: str, begin: Any, done: Any, fail: Any = lambda: None) -> None:
        self._handles.append(Guard(self.optimizer, name, begin, done, fail))

    def _before_saving(self, args: tuple, kwargs: dict) -> None:
        self._steps.before_saving()
        self._record.before_saving()

    def _before_loading(self, args: tuple, kwargs: dict) -> None:
        self._steps.before_loading()
        self._record.before_loading(self.optimizer, args[0] if args else kwargs["state_dict"])

    def stop(self) -> None:
        """Leave the optimizer as it would be without a recipe; the weights stay as they are."""
        self.unhook()
        self._weights.expand()
        for group in self.optimizer.param_groups:
            for key in GROUP_KEYS:
                group.pop(key, None)
        for slot in self.slots:
            slot.clear()

    def unhook(self) -> None:
        """Take no further part in what the optimizer does."""
        self.layers.stop()
        for handle in reversed(self._handles):
            handle.remove()
        for slot in self.slots:
            owners.remove(slot.param)
