"""Solve a run's steps from a budget of training FLOPs, to compare recipes at equal cost."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

from nmflow.errors import ConfigError, NMFlowWarning, RecipeError
from nmflow.experiments.config import Run
from nmflow.experiments.costs import counted
from nmflow.experiments.tasks import Problem
from nmflow.inspect.cost import cost

MOST = 10_000_000


def solved(run: Run, problem: Problem) -> Run:
    """The run with its steps; a run with given steps is returned unchanged.

    Raises:
        ConfigError: a budget below one step, below the recipe's phases, or beyond `MOST` steps.
    """
    if run.training.budget is None:
        return run
    found = steps(run, problem.model(), problem.example)
    training = run.training.model_copy(update={"steps": found})
    return run.model_copy(update={"training": training})


def steps(run: Run, model: Any, example: Any) -> int:
    """Optimizer steps of a run: the given ones, or the most whose training FLOPs fit the budget.

    K = max { k : F(k) ≤ budget }, where F(k) is what `nmflow.cost` counts for the phases of a run
    of k steps, over all examples of a step and all processes.

    Args:
        run: the run; the recipe's phases are those of its own k steps.
        model: its network.
        example: a batch of one example.

    Raises:
        ConfigError: a budget below one step, below the recipe's phases, or beyond `MOST` steps.
    """
    budget = run.training.budget
    if budget is None:
        return run.training.steps
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    refused: list[str] = []

    def spent(k: int) -> int:
        try:
            training = run.training.model_copy(update={"steps": k})
            found = counted(
                run.model_copy(update={"training": training}), model, example, processes
            )
        except RecipeError as error:  # phases in steps do not fit into so few
            refused.append(str(error))
            return 0
        return found["run_training_flops"]

    with warnings.catch_warnings():
        # A trial of a few steps may warn of a δ that the run itself will not have.
        warnings.simplefilter("ignore", NMFlowWarning)
        step = _dense_step(run, model, example, processes)
        if budget // step >= MOST:
            raise ConfigError(
                f"training.budget is {budget:g}: more than {MOST:,} steps of {step:g} training "
                "FLOPs; give less"
            )
        found = most(spent, budget, max(1, int(budget // step)))
        last = spent(found) if found else 0
    if found == 0:
        raise ConfigError(
            f"training.budget is {budget:g}: less than one step of this run, which takes "
            f"{spent(1) or step:g} training FLOPs; give more"
        )
    if last == 0:
        raise ConfigError(
            f"training.budget is {budget:g}: it is too small for the recipe's phases "
            f"({refused[-1]})"
        )
    return found


def most(spent: Callable[[int], int], budget: float, guess: int) -> int:
    """The largest k with `spent(k) <= budget`, or 0; `spent` grows nearly in proportion to k.

    Each trial counts a network's products again, so k is found by interpolation, not by bisection.
    """
    low, high, k = 0, None, guess
    while high is None or high - low > 1:
        used = spent(k)
        if used <= budget:
            low = k
        else:
            high = k
        ahead = int(k * budget / used) if used else 2 * k
        k = max(ahead, low + 1)
        k = k if high is None else min(k, high - 1)
    return low


def _dense_step(run: Run, model: Any, example: Any, processes: int) -> int:
    found = cost(
        model, example, run.pattern, run.include, run.exclude, recipe="dense", total_steps=1
    )
    t = run.training
    return max(1, found.dense_step * t.batch_size * t.accumulate * processes)
