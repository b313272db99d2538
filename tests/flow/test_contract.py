"""The contract table: every recipe on every module family under every optimizer.

Each row trains the library and the independent reference side by side and compares what the
network computes with, step for step. The fast rows have every pair of recipe and family, of recipe
and optimizer, and of family and optimizer; the others are slow.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

import nmflow
from harness import (
    Run,
    all_hold,
    assert_near,
    assert_same,
    check_row,
    dense_of,
    parameters_of,
    reference_step,
    traces,
    twin,
)
from models import BY_ID, FAMILIES, MLP, Family, loss_of
from nmflow.errors import FlowError
from pairs import pairwise
from settings import (
    ADAM,
    CASES,
    INTERVAL_CASES,
    MORE_CASES,
    NORMS_CASES,
    OPTIMIZERS,
    PANEL_CASES,
    TOTAL,
    Case,
)
from settings import BY_ID as RECIPE


def _optimizers(case: Case) -> list[str]:
    return list(ADAM if case.kind == "STEP" else OPTIMIZERS)


ROWS = [
    pytest.param(
        case, family, name, id=f"{case.id}-{family.id}-{name}",
        marks=() if (i + j + k) % len(_optimizers(case)) == 0 else pytest.mark.slow,
    )
    for i, case in enumerate(CASES)
    for j, family in enumerate(FAMILIES)
    for k, name in enumerate(_optimizers(case))
]  # fmt: skip


EVERY = [row.values for row in ROWS]


@pytest.mark.parametrize(("case", "family", "optimizer"), ROWS)
def test_row(case: Case, family: Family, optimizer: str) -> None:
    check_row(case, family, optimizer)


def test_the_fast_rows_have_every_pair() -> None:
    fast = [row.values for row in ROWS if not row.marks]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        pairs = [{(str(row[a]), str(row[b])) for row in rows} for rows in (fast, EVERY)]
        assert pairs[0] == pairs[1]


@pytest.mark.parametrize("case", [*MORE_CASES, *NORMS_CASES], ids=lambda case: case.id)
def test_variant(case: Case) -> None:
    check_row(case, MLP, "adamw-foreach")


GROWING = [*(f for f in FAMILIES if "@" in f.pattern),
           *(replace(BY_ID["panels"], pattern=p) for p in ("1:4@12", "2:8@16"))]  # fmt: skip


@pytest.mark.parametrize("family", GROWING, ids=lambda family: f"{family.id}-{family.pattern}")
@pytest.mark.parametrize("case", PANEL_CASES, ids=lambda case: case.id)
def test_panels_that_grow(case: Case, family: Family) -> None:
    check_row(case, family, "adamw-plain")


@pytest.mark.parametrize(
    ("case", "family", "dtype"),
    pairwise(
        CASES,
        ["linear", "attention", "fused-qkv", "hf-conv1d", "3:8"],
        [torch.float32, torch.bfloat16],
    ),
)
def test_dtype(case: Case, family: str, dtype: torch.dtype) -> None:
    check_row(case, BY_ID[family], "adamw-plain" if case.kind == "STEP" else "sgd", dtype)


@pytest.mark.parametrize("case", INTERVAL_CASES[:3], ids=lambda case: case.id)
def test_mask_interval(case: Case) -> None:
    """Masks are taken at every third step, and when the pattern changes; delta moves each step."""
    check_row(case, MLP, "adamw-foreach")
    check_row(case, MLP, "sgd", torch.float32)


def test_mask_interval_counts_three_steps() -> None:
    """Under STE the kept set may change at every third step only, and does change there."""
    case = Case("ste-interval", "STE", {}, {"mask_interval": 3})
    run = Run(MLP, case, OPTIMIZERS["sgd"], total=24)
    changed, before = [], run.model.get_parameter("0.weight") != 0
    for k, x in enumerate(MLP.batches(24), start=1):
        run.step(x * 4)
        now = run.model.get_parameter("0.weight") != 0
        if not torch.equal(now, before):
            changed.append(k)
        before = now
    assert len(changed) >= 2
    gaps = {b - a for a, b in itertools.pairwise(changed) if b < 24}
    assert all(gap % 3 == 0 for gap in gaps), changed


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_steps_past_the_end_keep_the_pattern(case: Case) -> None:
    run = Run(MLP, case)
    run.train(MLP.batches(TOTAL))
    keys = parameters_of(run.model)
    for x in MLP.batches(3):
        run.step(x)
        assert case.kind == "Dense" or all_hold(run.model, MLP.targets, MLP.pattern)
    assert any(not torch.equal(p, keys[n]) for n, p in run.model.named_parameters())
    run.flow.finalize()
    assert case.kind == "Dense" or all_hold(run.model, MLP.targets, MLP.pattern)


@pytest.mark.parametrize("steps", [0, 3, 7])
@pytest.mark.parametrize("case", CASES[1:], ids=lambda case: case.id)
def test_finalize_early_is_exact(case: Case, steps: int) -> None:
    """A run that is stopped in mid-decay still ends as N:M, of its dense weights."""
    run = Run(MLP, case)
    run.train(MLP.batches(steps))
    dense = dense_of(run)
    run.flow.finalize()
    assert all_hold(run.model, MLP.targets, MLP.pattern)
    for name, weight in dense.items():
        now, options = run.model.get_parameter(name), case.kwargs
        if case.kind not in ("SSTE", "MaxQ"):  # which do not keep a weight as it is
            kept = weight[now != 0] * options.get("scale", 1.0)
            torch.testing.assert_close(now[now != 0], kept, rtol=0, atol=1e-15)
    assert traces(run.optimizer) == []


def test_dense_weights_are_the_references() -> None:
    run = Run(MLP, RECIPE["mdgf-exp-masked"], attached=False)
    ref = twin(run)
    run.attach()
    for x in MLP.batches(6):
        assert_near(dense_of(run), ref.dense_weights())
        run.step(x)
        reference_step(ref, x)
    state = run.optimizer.state[run.model.get_parameter("0.weight")]
    assert_near({"w": state["nmflow_dense"]}, {"w": ref.dense_weights()["0.weight"]})


def test_only_one_copy_lives_between_steps() -> None:
    """The state holds the dense copy of each target and nothing else of its size."""
    for name in ("sr-ste", "mdgf-linear", "sdgf-geometric"):
        run = Run(MLP, RECIPE[name])
        run.train(MLP.batches(3))
        for parameter, state in run.optimizer.state.items():
            assert isinstance(parameter, torch.Tensor)
            mine = [key for key in state if "nmflow" in key]
            assert mine == (["nmflow_dense"] if parameter.dim() == 2 else [])
        for group in run.optimizer.param_groups:
            assert group["nmflow_step"] == 3
            assert isinstance(group["nmflow_recipe"], str)


def test_a_pruned_weight_comes_back_when_others_shrink_below_it() -> None:
    """Under gradual's masked rule it keeps its value, and gets no gradient, while it is pruned."""
    model = torch.nn.Linear(4, 1, bias=False)
    model.weight.data = torch.tensor([[8.0, 4.0, 2.0, 1.0]])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    recipe = nmflow.Gradual(finetune=0)
    flow = nmflow.attach(model, optimizer, recipe, "1:4", include="*", total_steps=4)
    steps = [  # 3, 3, 2, 2 of 4 are kept, and 1 in the end; 9 only meets pruned weights
        ([0.0, 0.0, 1.5, 9.0], [8.0, 4.0, 0.5, 1.0], [8.0, 4.0, 0.0, 1.0]),
        ([0.0, 0.0, 9.0, 0.25], [8.0, 4.0, 0.5, 0.75], [8.0, 4.0, 0.0, 0.0]),
        ([7.5, 0.0, 9.0, 9.0], [0.5, 4.0, 0.5, 0.75], [0.0, 4.0, 0.0, 0.75]),
        ([9.0, 3.5, 9.0, 0.0], [0.5, 0.5, 0.5, 0.75], [0.0, 0.0, 0.0, 0.75]),
    ]
    assert model.weight.tolist() == [[8.0, 4.0, 2.0, 0.0]]
    for g, dense, shown in steps:
        model.weight.grad = torch.tensor([g])
        optimizer.step()
        assert flow.dense_weights()["weight"].tolist() == [dense]
        assert model.weight.tolist() == [shown]


def test_gradual_at_1_128_keeps_one_fewer_by_one() -> None:
    """127 patterns in a row, and a state that is no larger than under any other recipe."""
    model = torch.nn.Linear(256, 3)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    recipe = nmflow.Gradual(finetune=100)
    nmflow.attach(model, optimizer, recipe, "1:128", include="*", total_steps=1100)
    met = []
    for _ in range(1100):
        kept = (model.weight != 0).reshape(6, 128).sum(1)
        assert kept.unique().numel() == 1
        met.append(int(kept[0]))
        model.weight.grad = torch.randn(3, 256)
        optimizer.step()
    assert list(dict.fromkeys(met)) == list(range(127, 0, -1))
    assert set(optimizer.state[model.weight]) == {"momentum_buffer", "nmflow_dense"}


def test_recipes_by_name_are_the_dataclasses() -> None:
    for name, recipe in [
        ("ste", nmflow.STE()),
        ("mdgf-exponential", nmflow.MDGF(decay="exponential")),
        ("sdgf-geometric", nmflow.SDGF(structure="geometric")),
    ]:
        ends = []
        for given in (name, recipe):
            model = MLP.build()
            optimizer = OPTIMIZERS["sgd"](model.parameters())
            nmflow.attach(
                model, optimizer, recipe=given, pattern="1:4", include=MLP.include, total_steps=10
            )
            for x in MLP.batches(10):
                optimizer.zero_grad()
                model(x).pow(2).mean().backward()
                optimizer.step()
            ends.append(parameters_of(model))
        assert_same(ends[0], ends[1], name)


@pytest.mark.parametrize("scale", [1.0, 100.0, 1e4])
@pytest.mark.parametrize("optimizer", ADAM)
def test_step_divides_by_the_frozen_moment(optimizer: str, scale: float) -> None:
    """STEP, however much larger than the frozen moment the gradients of its second phase are.

    The moment is frozen with its bias correction at the first step of that phase, here at k = 5.
    """
    run = Run(MLP, RECIPE["step"], OPTIMIZERS[optimizer], dtype=torch.float32, attached=False)
    ref = twin(run, OPTIMIZERS[optimizer])
    run.attach()
    for k, x in enumerate(MLP.batches(7, torch.float32)):
        for one, forward in ((run.optimizer, run.model), (ref.optimizer, ref)):
            one.zero_grad()
            (loss_of(forward(x)) * (scale if k >= 5 else 1.0)).backward()
        frozen = run.optimizer.state[run.model.get_parameter("0.bias")].get("exp_avg_sq")
        before = frozen.clone() if k > 5 else None
        run.optimizer.step()
        ref.step()
        assert before is None or torch.equal(frozen, before)
        for name, weight in ref.dense_weights().items() if k <= 5 else ():
            torch.testing.assert_close(dense_of(run)[name], weight, rtol=1e-4, atol=1e-5)


def test_step_needs_adam() -> None:
    for make in (OPTIMIZERS["sgd"], OPTIMIZERS["adafactor"]):
        with pytest.raises(FlowError, match="Adam"):
            Run(MLP, RECIPE["step"], make)
