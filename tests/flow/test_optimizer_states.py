"""States of an optimizer that go past its hooks, are thrown away, or lack something."""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any, cast

import pytest
import torch

import nmflow
from harness import Run, assert_near, assert_same, dense_of, parameters_of, reference_step, twin
from models import MLP, loss_of
from nmflow.errors import FlowError, StateError
from settings import BY_ID, TOTAL
from unchanged import refused


class Silent(torch.optim.AdamW):
    """Its `state_dict` and `load_state_dict` are its own, and call no hooks."""

    def state_dict(self) -> Any:
        index = {id(p): i for i, p in enumerate(p for g in self.param_groups for p in g["params"])}
        groups = [{**g, "params": [index[id(p)] for p in g["params"]]} for g in self.param_groups]
        state = {index[id(p)]: dict(s) for p, s in self.state.items()}
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: Any) -> None:
        state_dict = copy.deepcopy(state_dict)
        params = [p for g in self.param_groups for p in g["params"]]
        state = defaultdict(dict)
        for key, value in state_dict["state"].items():
            state[params[key] if isinstance(key, int) else key] = value
        for group, old in zip(state_dict["param_groups"], self.param_groups, strict=True):
            group["params"] = old["params"]
        self.__setstate__({"state": state, "param_groups": state_dict["param_groups"]})


class Forgetful(torch.optim.AdamW):
    """What it saves is what it knows."""

    def state_dict(self) -> Any:
        saved = super().state_dict()
        for group in saved["param_groups"]:
            group.pop("nmflow_step", None)
        return saved


def silent(params: Any) -> Silent:
    return Silent(params, lr=0.02, weight_decay=0.1)


@pytest.mark.parametrize("order", ["amo", "aom", "moa", "oma"])
@pytest.mark.parametrize("k", [0, 1, 7, TOTAL])
@pytest.mark.parametrize("case", ["settling", "one-shot", "hybrid-interval"])
def test_a_state_dict_without_hooks(case: str, k: int, order: str) -> None:
    batches = MLP.batches(TOTAL + 1)
    run = Run(MLP, BY_ID[case], silent)
    run.train(batches[:k])
    saved = copy.deepcopy((run.model.state_dict(), run.optimizer.state_dict()))
    run.train(batches[k:])
    again = Run(MLP, BY_ID[case], silent, seed=9, attached=False)
    for what in order:
        if what == "m":
            again.model.load_state_dict(saved[0])
        elif what == "o":
            again.optimizer.load_state_dict(saved[1])
        else:
            again.attach()
    assert again.flow.steps_done == k
    again.train(batches[k:])
    assert_same(parameters_of(again.model), parameters_of(run.model))


def test_a_state_that_nobody_saw_is_noticed_at_the_next_step() -> None:
    """Put in by `__setstate__`: taken over, and gradients of other weights are not stepped with."""
    batches = MLP.batches(TOTAL)
    run = Run(MLP, BY_ID["settling"], silent)
    run.train(batches[:7])
    saved = copy.deepcopy((run.model.state_dict(), run.optimizer.state_dict()))
    run.train(batches[7:])
    for loaded in (True, False):
        again = Run(MLP, BY_ID["settling"], silent, seed=9)
        again.train(batches[:1])
        if loaded:
            again.model.load_state_dict(saved[0])
        Silent.load_state_dict(
            cast(Silent, again.optimizer), saved[1]
        )  # past what is on the instance
        again.optimizer.zero_grad()
        loss_of(again.model(batches[7])).backward()
        if not loaded:
            with pytest.raises(StateError, match="backward again"):
                again.optimizer.step()
            assert again.flow.steps_done == 7
            again.model.load_state_dict(saved[0])
            again.train(batches[7:8])
        else:
            again.optimizer.step()
        again.train(batches[8:])
        assert_same(parameters_of(again.model), parameters_of(run.model))


def test_a_state_of_another_run_that_nobody_saw_is_refused() -> None:
    run, other = Run(MLP, BY_ID["settling"], silent), Run(MLP, BY_ID["sr-ste"], silent)
    plain = Run(MLP, BY_ID["settling"], silent, attached=False)
    for one in (run, other, plain):
        one.train(MLP.batches(3))
    dense = dense_of(run)
    for state in (other.optimizer.state_dict(), plain.optimizer.state_dict()):
        with pytest.raises(StateError):
            run.optimizer.load_state_dict(copy.deepcopy(state))
        assert run.flow.steps_done == 3
        assert_same(dense_of(run), dense)
    run.train(MLP.batches(1))
    dense = dense_of(run)
    Silent.load_state_dict(cast(Silent, run.optimizer), copy.deepcopy(plain.optimizer.state_dict()))
    for _ in range(2):
        with pytest.raises(StateError, match="without a recipe"):
            run.train(MLP.batches(1))
    assert_same(dense_of(run), dense)


def test_an_optimizer_that_saves_too_little_is_refused() -> None:
    model = MLP.build()
    optimizer = Forgetful(model.parameters())
    with refused(model, optimizer, FlowError, "Forgetful", "state_dict"):
        nmflow.attach(model, optimizer, pattern="1:4", include="0.*", total_steps=9)


def _lose(optimizer: Any, how: str) -> None:
    if how == "del":
        for p in list(optimizer.state):
            del optimizer.state[p]
    elif how == "clear":
        optimizer.state.clear()
    elif how == "replace":
        optimizer.state = defaultdict(dict)
    else:
        for p in optimizer.state:
            optimizer.state[p] = {}


@pytest.mark.parametrize("how", ["del", "clear", "replace", "empty"])
@pytest.mark.parametrize("case", ["settling", "one-shot", "settling-interval"])
def test_an_optimizer_whose_state_is_thrown_away_forgets_its_moments_alone(
    case: str, how: str
) -> None:
    batches = MLP.batches(TOTAL)
    run = Run(MLP, BY_ID[case], attached=False)
    ref = twin(run)
    run.attach()
    for k, x in enumerate(batches):
        if k == 6:
            _lose(run.optimizer, how)
            ref.optimizer.state.clear()
            saved = copy.deepcopy((run.model.state_dict(), run.optimizer.state_dict()))
        run.step(x)
        reference_step(ref, x)
    assert_near(parameters_of(run.model), ref.weights())
    again = Run(MLP, BY_ID[case], seed=9)
    again.model.load_state_dict(saved[0])
    again.optimizer.load_state_dict(saved[1])
    again.train(batches[6:])
    assert_same(parameters_of(again.model), parameters_of(run.model))


def test_a_state_saved_after_a_group_was_added_is_resumed() -> None:
    batches = MLP.batches(TOTAL)
    runs = []
    for seed in (0, 9):
        run = Run(MLP, BY_ID["settling"], seed=seed, attached=False)
        run.optimizer = torch.optim.AdamW([run.model.get_parameter(n) for n in MLP.targets], lr=0.1)
        run.attach()
        runs.append(run)
    run, again = runs
    run.train(batches[:5])
    for one in runs:
        biases = [one.model.get_parameter(name) for name in ("0.bias", "2.bias")]
        one.optimizer.add_param_group({"params": biases, "lr": 0.01})
    saved = copy.deepcopy((run.model.state_dict(), run.optimizer.state_dict()))
    older = copy.deepcopy(saved[1])
    for key in ("nmflow_step", "nmflow_recipe"):
        older["param_groups"][1].pop(key)
    run.train(batches[5:])
    for state in (saved[1], older):  # as it is saved now, and as it was
        again.model.load_state_dict(saved[0])
        again.optimizer.load_state_dict(copy.deepcopy(state))
        assert again.flow.steps_done == 5
        again.train(batches[5:])
        assert_same(parameters_of(again.model), parameters_of(run.model))


def test_a_weight_that_left_the_optimizer_is_named() -> None:
    run = Run(MLP, BY_ID["settling"])
    run.train(MLP.batches(3))
    dense = dense_of(run)
    kept = run.optimizer.param_groups[0]["params"]
    run.optimizer.param_groups[0]["params"] = [p for p in kept if p.dim() == 1]
    with pytest.raises(FlowError, match=r"0\.weight.*no longer in the optimizer"):
        run.train(MLP.batches(1))
    assert_same(dense_of(run), dense)
    run.optimizer.param_groups[0]["params"] = list(kept)
    run.train(MLP.batches(3))
    assert run.flow.steps_done == 6
