"""Recipes in JAX: masks by the reference, and runs that equal the oracle of every recipe."""

from __future__ import annotations

import doctest
from typing import Any

import numpy as np
import pytest
import torch

import reference
from models import Family, Spec, loss_of
from nmflow.errors import PatternError, PlanError, RecipeError
from settings import BY_ID, TOTAL
from settings import CASES as ALL_CASES

jax = pytest.importorskip("jax", reason="jax is not installed")
optax = pytest.importorskip("optax", reason="optax is not installed")
jax.config.update("jax_enable_x64", True)

import jax.numpy as jnp  # noqa: E402 # pyright: ignore[reportMissingImports]

from nmflow import jax as nj  # noqa: E402

SLOW = pytest.mark.slow


@pytest.mark.parametrize("pattern", ["1:4", "2:4", "3:8", "1:16", "4:4", "1:4@2", "2:8@4", "1:4@3"])
@pytest.mark.parametrize("axis", [0, 1, -1, -2])
def test_masks_are_those_of_the_reference(pattern: str, axis: int) -> None:
    n, m, v = reference.parse(pattern)
    for seed, levels in ((0, 0), (1, 3), (2, 1)):  # the last ones are full of ties
        w = torch.randn(16, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        w = (w * levels).round() if levels else w
        kept = np.asarray(nj.mask(jnp.asarray(w.numpy()), pattern, axis))
        assert (kept == reference.keep(w, n, m, axis % 2, v).numpy()).all()
    with pytest.raises(PatternError, match="not a multiple"):
        nj.mask(jnp.ones((6, 10)), "1:4", axis)


def test_a_stack_of_experts_and_a_convolution() -> None:
    w = torch.randn(3, 8, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for axis in (-1, -2):
        want = reference.keep(w, 1, 4, axis % 3, 2, stacked=True)
        assert (np.asarray(nj.mask(jnp.asarray(w.numpy()), "1:4@2", axis)) == want.numpy()).all()


def _mlp() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.Tanh(), torch.nn.Linear(8, 16))


FAMILY = Family("mlp", _mlp, (16,), {"0.weight": Spec(), "2.weight": Spec()}, include="*")
OPTIMIZERS: dict[str, tuple[Any, Any]] = {
    "sgd": (
        lambda ps: torch.optim.SGD(ps, lr=0.2, momentum=0.9),
        lambda: optax.sgd(0.2, momentum=0.9),
    ),
    "adamw": (
        lambda ps: torch.optim.AdamW(ps, lr=0.05, weight_decay=0.1),
        lambda: optax.adamw(0.05, weight_decay=0.1),
    ),
}
RATES = {"sgd": 0.2, "adamw": 0.05}
CASES = [
    "dense", "one-shot", "ste", "sr-ste", "gradual", "mdgf-linear", "mdgf-linear-masked",
    "mdgf-exp", "mdgf-exp-masked", "settling", "sdgf-stepwise", "sdgf-geometric", "hybrid",
    "hybrid-masked", "mdgf-stairs", "mdgf-exp-stairs", "settling-stairs", "sdgf-stairs",
    "sdgf-stairs-odd",
]  # fmt: skip
FAST = {
    ("hybrid-masked", "adamw"), ("settling", "sgd"), ("one-shot", "adamw"), ("sr-ste", "sgd"),
    ("mdgf-exp-stairs", "sgd"),
}  # fmt: skip
ALL = [case.id for case in ALL_CASES]
RUNS = [(case, optimizer) for case in CASES for optimizer in OPTIMIZERS]


def forward(params: Any, x: Any) -> Any:
    hidden = jnp.tanh(x @ params["0.weight"].T + params["0.bias"])
    return hidden @ params["2.weight"].T + params["2.bias"]


def matrices(path: str, value: Any) -> int | None:
    return 1 if path.endswith("weight") else None


@pytest.mark.parametrize(
    ("case", "optimizer"),
    [pytest.param(*run, marks=() if run in FAST else SLOW) for run in RUNS],
)
def test_a_run_is_that_of_the_oracle(case: str, optimizer: str) -> None:
    """Compiled; W̃ before each step and at the end, and what `apply_updates` alone leaves."""
    make, inner = OPTIMIZERS[optimizer]
    model, batches = FAMILY.build(), FAMILY.batches(TOTAL)
    oracle = reference.Reference(model, make, BY_ID[case], FAMILY.targets, FAMILY.pattern, TOTAL)
    tx = nj.sparse(
        inner(), BY_ID[case].build(), FAMILY.pattern, total_steps=TOTAL, targets=matrices,
        learning_rate=RATES[optimizer],
    )  # fmt: skip
    params = {n: jnp.asarray(p.detach().numpy().copy()) for n, p in model.named_parameters()}
    state = tx.init(params)
    params = tx.show(state, params)

    def loss(params: Any, x: Any) -> Any:
        y = forward(params, x)
        return ((y - 0.5) ** 2).mean() + 0.1 * y.mean()

    @jax.jit
    def step(params: Any, state: Any, x: Any) -> Any:
        updates, state = tx.update(jax.grad(loss)(params, x), state, params)
        applied = optax.apply_updates(params, updates)
        return applied, tx.show(state, applied), state

    for x in [*batches, None]:
        plain = dict(oracle.model.named_parameters())
        want = {**plain, **oracle.effective()}
        for name, weight in want.items():
            got, weight = np.asarray(params[name]), weight.detach().numpy()
            assert ((got != 0) == (weight != 0)).all(), f"step {oracle.k}: the mask of {name}"
            np.testing.assert_allclose(got, weight, rtol=1e-9, atol=1e-10)
        if x is None:
            break
        oracle.optimizer.zero_grad()
        loss_of(oracle(x)).backward()
        oracle.step()
        applied, params, state = step(params, state, jnp.asarray(x.numpy()))
        for name in params:
            assert ((applied[name] != 0) == (params[name] != 0)).all()
            np.testing.assert_allclose(applied[name], params[name], rtol=1e-12, atol=1e-15)
    assert int(state.step) == TOTAL


def test_a_state_goes_on_where_it_was() -> None:
    """A state is arrays alone: through numpy and back, the run is the same to the last bit."""
    tx = nj.sparse(optax.adam(1e-2), "one-shot", "1:4", total_steps=8)
    params = {"fc": {"kernel": jax.random.normal(jax.random.key(0), (16, 4))}}

    def run(params: Any, state: Any, steps: range) -> Any:
        for k in steps:
            grads = jax.tree.map(lambda p, k=k: jnp.sin(p + k), params)
            updates, state = tx.update(grads, state, params)
            params = tx.show(state, optax.apply_updates(params, updates))
        return params, state

    whole, _ = run(params, tx.init(params), range(8))
    half, state = run(params, tx.init(params), range(5))
    half, state = jax.tree.map(jnp.asarray, jax.tree.map(np.asarray, (half, state)))
    again, _ = run(half, state, range(5, 8))
    assert (whole["fc"]["kernel"] == again["fc"]["kernel"]).all()
    assert reference.holds(torch.from_numpy(np.array(again["fc"]["kernel"])), 1, 4, 0)


def test_the_examples() -> None:
    found = doctest.testmod(nj)
    assert found.attempted
    assert not found.failed


@pytest.mark.parametrize("case", ALL)
def test_a_recipe_is_itself_or_refused(case: str) -> None:
    """None trains as another one because a part of it is not there."""
    recipe = BY_ID[case].build()
    if case in CASES:
        nj.sparse(optax.sgd(0.1), recipe, "1:4", total_steps=TOTAL, learning_rate=0.1)
        return
    with pytest.raises(RecipeError, match=f"recipe is '{recipe.name}' with .*: choose another"):
        nj.sparse(optax.sgd(0.1), recipe, "1:4", total_steps=TOTAL, learning_rate=0.1)


def test_what_is_refused() -> None:
    with pytest.raises(RecipeError, match="learning_rate"):
        nj.sparse(optax.adam(1e-2), "settling", "1:4", total_steps=8)
    tx = nj.sparse(optax.adam(1e-2), "ste", "1:4", total_steps=8)
    with pytest.raises(PlanError, match="targets"):
        tx.init({"scale": jnp.ones(4)})
    with pytest.raises(PatternError, match="multiple"):
        tx.init({"kernel": jnp.ones((6, 4))})
    state = tx.init({"kernel": jnp.ones((8, 4))})
    with pytest.raises(PlanError, match="params"):
        tx.update({"kernel": jnp.ones((8, 4))}, state)
