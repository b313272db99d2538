"""Loss scalers, autocast, accumulation and closures: a step that is skipped does not count."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from harness import Run, all_hold, assert_near, dense_of, parameters_of, reference_step, twin
from models import BY_ID as FAMILY
from models import MLP, loss_of
from pairs import pairwise
from settings import BY_ID, OPTIMIZERS, TOTAL, Case

KINDS = ["adamw-foreach", "adamw-fused", "sgd", "sgd-fused"]
MAKE = OPTIMIZERS | {
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
}
RECIPES = [
    "ste-at-once",
    "sr-ste-at-once",
    "sr-ste",
    "mdgf-linear-masked",
    "hybrid",
    "one-shot",
    "settling",
]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("optimizer", KINDS)
def test_accumulation(recipe: str, optimizer: str) -> None:
    """Four micro-batches a step: SR-STE's term is added once, not four times."""
    make = MAKE[optimizer]
    run = Run(MLP, BY_ID[recipe], make, attached=False)
    ref = twin(run, make)
    run.attach()
    batches = MLP.batches(4 * TOTAL)
    for k in range(TOTAL):
        micro = batches[4 * k : 4 * k + 4]
        run.step(*micro)
        reference_step(ref, *micro)
        assert run.flow.steps_done == k + 1
    assert_near(parameters_of(run.model), ref.weights())


def _scaler(scale: float = 2.0**10) -> Any:
    return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=4)


def _forward(forward: Any, x: torch.Tensor, dtype: torch.dtype, burst: bool) -> torch.Tensor:
    with torch.autocast("cpu", dtype=dtype):
        output = forward(x)
    return loss_of(output.float()) * (float("inf") if burst else 1.0)


@pytest.mark.parametrize(
    ("optimizer", "recipe", "dtype", "unscale"),
    pairwise(list(KINDS), list(RECIPES), [torch.float16, torch.bfloat16], [False, True]),
)
def test_loss_scaler(optimizer: str, recipe: str, dtype: torch.dtype, unscale: bool) -> None:
    """Infinite gradients at the first step and at two more: skipped, k stays, the mask stays.

    A fused optimizer is called all the same, with `found_inf` and with gradients still scaled.
    The reference unscales by hand and leaves out the bursts itself, so it needs no scaler's help.
    """
    make = MAKE[optimizer]
    run = Run(MLP, BY_ID[recipe], make, dtype=torch.float32, attached=False)
    ref = twin(run, make)
    run.attach()
    mine, theirs = _scaler(), _scaler()
    # torch's fused SGD reads uninitialised momentum after a first step that was skipped.
    bursts = (2, 3, 7) if optimizer == "sgd-fused" else (0, 3, 7)
    done = 0
    for i, x in enumerate(MLP.batches(TOTAL + 3, torch.float32)):
        burst = i in bursts
        before, dense = parameters_of(run.model), dense_of(run)
        run.optimizer.zero_grad()
        mine.scale(_forward(run.model, x, dtype, burst)).backward()
        if unscale:
            mine.unscale_(run.optimizer)
        mine.step(run.optimizer)
        mine.update()

        ref.optimizer.zero_grad()
        theirs.scale(_forward(ref, x, dtype, burst)).backward()
        theirs.unscale_(ref.optimizer)
        if not burst:
            ref.regularise()
        theirs.step(ref.optimizer)
        theirs.update()
        ref.k += not burst

        done += not burst
        assert run.flow.steps_done == done
        assert mine.get_scale() == theirs.get_scale()
        if burst:
            assert_near(parameters_of(run.model), before, f"skipped {i}")
            assert_near(dense_of(run), dense, f"skipped {i}")
        assert_near(parameters_of(run.model), ref.weights(), f"after {i}")
    assert run.flow.steps_done == TOTAL
    assert all_hold(run.model, MLP.targets, MLP.pattern)


@pytest.mark.parametrize("optimizer", ["adamw-foreach", "adamw-fused"])
def test_lambda_is_not_divided_by_the_scale(optimizer: str) -> None:
    """The same run at four loss scales, in which every product is exact: the same weights."""
    ends = []
    for scale in (1.0, 2.0**4, 2.0**8, 2.0**16):
        run = Run(MLP, BY_ID["sr-ste-at-once"], MAKE[optimizer], dtype=torch.float32)
        scaler = _scaler(scale)
        for x in MLP.batches(4, torch.float32):
            run.optimizer.zero_grad()
            scaler.scale(loss_of(run.model(x))).backward()
            scaler.step(run.optimizer)
            scaler.update()
        ends.append(parameters_of(run.model))
    for end in ends[1:]:
        assert_near(end, ends[0])


@pytest.mark.parametrize("optimizer", KINDS)
def test_gradients_are_the_users_after_a_step(optimizer: str) -> None:
    """Gradient clipping and logging before the step see g, without any term of a recipe."""
    run = Run(MLP, BY_ID["sr-ste-at-once"], MAKE[optimizer], dtype=torch.float32, attached=False)
    ref = twin(run, MAKE[optimizer])
    run.attach()
    for x in MLP.batches(5, torch.float32):
        for one, forward in ((run.optimizer, run.model), (ref.optimizer, ref)):
            one.zero_grad()
            loss_of(forward(x)).backward()
        norms = [
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            for model in (run.model, ref.model)
        ]
        torch.testing.assert_close(*norms)
        run.optimizer.step()
        ref.step()
    assert_near(parameters_of(run.model), ref.weights())


def test_bf16_weights_and_autocast_around_attention() -> None:
    family = FAMILY["encoder-layer"]
    run = Run(family, BY_ID["mdgf-exp"], dtype=torch.float32, attached=False)
    ref = twin(run)
    run.attach()
    for x in family.batches(TOTAL, torch.float32):
        for one, forward in ((run.optimizer, run.model), (ref.optimizer, ref)):
            one.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                output = forward(x)
            loss_of(output.float()).backward()
        run.optimizer.step()
        ref.step()
    assert_near(parameters_of(run.model), ref.weights())
    assert all_hold(run.model, family.targets, family.pattern)


# --- closures ---------------------------------------------------------------------------------


@pytest.mark.parametrize("by_name", [False, True], ids=["positional", "keyword"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    "recipe", ["ste-at-once", "sr-ste-at-once", "mdgf-linear-masked", "hybrid"]
)
def test_closures(recipe: str, optimizer: str, by_name: bool) -> None:
    """`optimizer.step(closure)`, as Lightning does: the closure runs on the sparse weights."""
    make = MAKE[optimizer]
    run = Run(MLP, BY_ID[recipe], make, attached=False)
    ref = twin(run, make)
    run.attach()
    for x in MLP.batches(TOTAL):
        sparse = parameters_of(run.model)

        def closure(x: torch.Tensor = x, sparse: Any = sparse) -> Any:
            assert_near(parameters_of(run.model), sparse, "in the closure")
            run.optimizer.zero_grad()
            loss = loss_of(run.model(x))
            loss.backward()
            return loss

        expected = loss_of(ref(x)).item()
        got = run.optimizer.step(closure=closure) if by_name else run.optimizer.step(closure)
        assert got is not None
        assert torch.as_tensor(got).item() == pytest.approx(expected, rel=1e-12)
        reference_step(ref, x)
    assert run.flow.steps_done == TOTAL
    assert_near(parameters_of(run.model), ref.weights())


def test_a_closure_that_raises_leaves_the_flow_whole() -> None:
    run = Run(MLP, BY_ID["ste-at-once"])
    batches = MLP.batches(6)
    run.train(batches[:3])
    before, dense = parameters_of(run.model), dense_of(run)

    def closure() -> torch.Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.optimizer.step(closure)  # type: ignore[arg-type]
    assert run.flow.steps_done == 3
    assert_near(parameters_of(run.model), before)
    assert_near(dense_of(run), dense)
    other = Run(MLP, BY_ID["ste-at-once"])
    other.train(batches)
    run.train(batches[3:])
    assert_near(parameters_of(run.model), parameters_of(other.model))


def test_an_interrupted_step_loses_no_dense_weight() -> None:
    """The optimizer itself fails between the two hooks: the next step starts from whole weights."""
    run = Run(MLP, BY_ID["ste-at-once"], OPTIMIZERS["sgd"])
    batches = MLP.batches(6)
    run.train(batches[:3])
    dense = dense_of(run)
    run.optimizer.zero_grad()
    loss_of(run.model(batches[3])).backward()
    lr = run.optimizer.param_groups[0].pop("lr")
    with pytest.raises(KeyError):
        run.optimizer.step()
    run.optimizer.param_groups[0]["lr"] = lr
    assert_near(dense_of(run), dense)
    assert run.flow.steps_done == 3
    for k, x in enumerate(batches[3:], start=4):
        run.step(x)
        assert run.flow.steps_done == k
        assert all_hold(run.model, MLP.targets, MLP.pattern)


def test_case_table_has_lambda_large_enough_to_see() -> None:
    """With lambda 0 the runs above would differ from SR-STE: the tests can fail."""
    ends = []
    for case in (BY_ID["sr-ste-at-once"], Case("", "SRSTE", {"lam": 0.0}), BY_ID["ste-at-once"]):
        run = Run(MLP, case)
        run.train(MLP.batches(6))
        ends.append(run.flow.dense_weights()["0.weight"])
    assert not torch.allclose(ends[0], ends[1], rtol=1e-4)
    assert torch.equal(ends[1], ends[2])
