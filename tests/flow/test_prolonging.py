"""A run that is resumed with another total_steps: its laws, by brute force, and its resume."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

import nmflow
from harness import ADAMW, Run, all_hold, assert_same, parameters_of, through_file
from models import MLP
from nmflow.errors import StateError
from nmflow.flow.prolonging import planned, same_so_far
from nmflow.flow.state import Run as Schedule
from nmflow.pattern import Pattern
from nmflow.recipes import Recipe
from settings import Case

RECIPES: list[Recipe] = [
    nmflow.Dense(),
    nmflow.OneShot(dense=0.5),
    nmflow.OneShot(dense=6),
    nmflow.STE(dense=0.0),
    nmflow.STE(dense=0.25, finetune=0.25),
    nmflow.SRSTE(dense=3),
    nmflow.STEP(dense=0.5),
    nmflow.Gradual(dense=0.2),
    nmflow.MDGF(dense=0.2),
    nmflow.MDGF("linear", dense=4, finetune=6),
    nmflow.MDGF("exponential", beta=0.9),
    nmflow.SDGF("geometric", dense=0.1),
    nmflow.Hybrid(dense=0.2, finetune=0.3),
    nmflow.Settling(),
    nmflow.MDGF("linear", dense=4, finetune=6, stairs=4),
    nmflow.SSTE(dense=0.25, finetune=0.25),
    nmflow.MaxQ(dense=0.2),
    nmflow.Settling(scale=1.6, lr_scale=2.0),
]
PATTERN = Pattern("2:8")
TOTALS = (20, 21, 30, 44)


def seen(recipe: Recipe, total: int, last: int) -> list[tuple[Any, ...]]:
    """What the network is at each step; names of phases change nothing in it."""
    stages = [recipe.stage(k, total, PATTERN, 64) for k in range(last + 1)]
    return [(*s.masks, s.delta) for s in stages]


def density(stage: Any) -> float:
    return 1.0 if stage.pattern is None else stage.pattern.n / stage.pattern.m


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: f"{recipe.name}-{recipe}"[:40])
def test_laws(recipe: Recipe) -> None:
    """At every step of every run, prolonged and shortened to every length."""
    allowed = refused = 0
    for begun, total in itertools.product(TOTALS, (*TOTALS, 12)):
        for k in range(begun + 1):
            if same_so_far(recipe, begun, total, k):
                assert seen(recipe, begun, k) == seen(recipe, total, k)
            try:
                count = planned(recipe, begun, total, k)
            except StateError:
                assert total < begun
                refused += 1
                continue
            allowed += 1
            run = Schedule(recipe, total, begun=None if count == total else count)
            target = nmflow.Target("w", (8, 64), 1, PATTERN)
            stages = [run.stages([target], j)["w"] for j in range(total + 3)]
            before = seen(recipe, begun, k)
            assert [(*s.masks, s.delta) for s in stages][: k + 1] == before  # phases so far
            assert recipe.name == "dense" or stages[total].phase == "final"
            assert recipe.name == "dense" or stages[total].pattern == PATTERN
            later = stages[k:]
            assert all(density(a) >= density(b) for a, b in itertools.pairwise(later))
            if recipe.name != "hybrid":  # whose δ starts anew in each frame, by definition
                assert all(a.delta >= b.delta for a, b in itertools.pairwise(later))
            if recipe.freezes_second_moment and k >= recipe.phases(begun)[0]:
                assert run.dense_steps == recipe.phases(begun)[0]
            since = recipe.frozen_since(begun)
            if since is not None and k >= since:
                assert run.frozen_since() == since
    assert allowed
    assert refused or not recipe.decays


def test_prolonging_is_never_refused() -> None:
    for recipe, k in itertools.product(RECIPES, range(21)):
        assert planned(recipe, 20, 40, k) in (20, 40)


MDGF = Case("", "MDGF", {"decay": "linear", "dense": 0.2, "finetune": 0.2})
MORE = [
    MDGF,
    Case("", "OneShot", {"dense": 0.5}),
    Case("", "STE", {"dense": 0.2, "finetune": 0.2}, {"freeze_mask": True}),
    Case("", "Hybrid", {"dense": 0.2, "finetune": 0.2}, {"mask_interval": 3, "freeze_mask": True}),
    Case("", "Settling", {"dense": 0.2, "finetune": 0.2}),
]


def resumed(case: Case, state: Any, total: int, attached: bool = False) -> Run:
    run = Run(MLP, case, ADAMW, seed=99, total=total, attached=attached)
    model_state, optimizer_state = copy.deepcopy(state)  # an optimizer loads without copying
    run.model.load_state_dict(model_state)
    run.optimizer.load_state_dict(optimizer_state)
    if not attached:
        run.attach()
    return run


@pytest.mark.parametrize("case", MORE, ids=lambda case: case.kind)
@pytest.mark.parametrize("k", [1, 6, 9, 10])
def test_a_prolonged_run_is_the_run_whose_phases_are_so_long(case: Case, k: int) -> None:
    """Bit for bit, also when it is stopped and resumed again, and loaded in either order."""
    batches = MLP.batches(20)
    half = Run(MLP, case, total=10)
    half.train(batches[:k])
    state = through_file((half.model.state_dict(), half.optimizer.state_dict()))
    recipe = case.build()
    if k == 1:  # in the dense phase: the longer run, wholly
        whole = Run(MLP, case, total=20)
    else:
        d, f = recipe.phases(10)
        phases = {"dense": d} | ({"finetune": f + 10} if "finetune" in case.kwargs else {})
        whole = Run(MLP, replace(case, kwargs={**case.kwargs, **phases}), total=20)
    whole.train(batches)
    for attached in (False, True):
        again = resumed(case, state, 20, attached)
        assert (again.flow.steps_done, again.flow.total_steps) == (k, 20)
        again.train(batches[k:14])
        assert again.flow.stage.phase != "final"
        state2 = through_file((again.model.state_dict(), again.optimizer.state_dict()))
        again.train(batches[14:])
        assert again.flow.stage.phase == "final"
        assert_same(parameters_of(again.model), parameters_of(whole.model))
        twice = resumed(case, state2, 20)
        twice.train(batches[14:])
        assert_same(parameters_of(twice.model), parameters_of(whole.model))
        twice.flow.finalize()
        assert all_hold(twice.model, MLP.targets, MLP.pattern)


def test_a_run_is_shortened_as_far_as_its_phases_allow() -> None:
    run = Run(MLP, MDGF, total=20)
    run.train(MLP.batches(10))
    state = through_file((run.model.state_dict(), run.optimizer.state_dict()))
    short = resumed(MDGF, state, 17)
    short.train(MLP.batches(7))
    assert short.flow.stage.phase == "final"
    for attached in (False, True):
        with pytest.raises(StateError, match=r"is 15, .*at least 16"):
            resumed(MDGF, state, 15, attached)
    other = Run(MLP, MDGF, seed=99, total=15)
    before = parameters_of(other.model)
    with pytest.raises(StateError):
        other.optimizer.load_state_dict(state[1])
    assert_same(parameters_of(other.model), before)


def test_a_state_whose_steps_are_no_numbers_is_refused() -> None:
    run = Run(MLP, MDGF, total=20)
    run.train(MLP.batches(2))
    for bad in ('"begun": 0', '"begun": "x"', '"begun": true', '"total_steps": null'):
        state = through_file((run.model.state_dict(), run.optimizer.state_dict()))
        group = state[1]["param_groups"][0]
        group["nmflow_recipe"] = group["nmflow_recipe"][:-1] + f", {bad}}}"
        with pytest.raises(StateError, match="cannot be read"):
            resumed(MDGF, state, 20)


def test_the_stage_of_a_prolonged_flow() -> None:
    run = Run(MLP, MDGF, total=10)
    run.train(MLP.batches(5))
    state = through_file((run.model.state_dict(), run.optimizer.state_dict()))
    again = resumed(MDGF, state, 30)
    assert [again.flow.stage_at(k).phase for k in (5, 8, 12, 29, 30)] == [
        "decay", "finetune", "finetune", "finetune", "final",
    ]  # fmt: skip
    assert again.flow.stage_at(5).delta == pytest.approx(0.5)
    torch.testing.assert_close(again.flow.stage.delta, run.flow.stage.delta)
