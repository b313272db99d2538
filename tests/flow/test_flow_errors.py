"""Bad input: one sentence with the name, the value and the mend, and nothing is changed."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import nmflow
from models import MLP, FusedQKV, loss_of
from nmflow.errors import (
    FlowError,
    NMFlowError,
    PatternError,
    PlanError,
    RecipeError,
    StateError,
    WeightError,
)
from settings import OPTIMIZERS
from unchanged import Snapshot, refused, says

ADAMW = OPTIMIZERS["adamw-foreach"]


def trained(steps: int = 2) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model whose optimizer has state, so that a change of it would show."""
    model = MLP.build()
    optimizer = ADAMW(model.parameters())
    for x in MLP.batches(steps):
        optimizer.zero_grad()
        loss_of(model(x)).backward()
        optimizer.step()
    return model, optimizer


def attach(model: nn.Module, optimizer: Any, **options: Any) -> Any:
    defaults = {"recipe": "ste", "pattern": "1:4", "include": MLP.include, "total_steps": 10}
    return nmflow.attach(model, optimizer, **{**defaults, **options})


ARGUMENTS: dict[str, tuple[dict[str, Any], type[NMFlowError], tuple[str, ...]]] = {
    **{
        f"pattern {text}": ({"pattern": text}, PatternError, (text, "kept"))
        for text in ("0:4", "5:4", "1:0", "a:b", "-1:4")
    },
    "pattern in a dict": ({"pattern": {"0.*": "5:4"}}, PatternError, ("5:4", "kept")),
    "pattern that does not divide": (
        {"pattern": "1:12"},
        NMFlowError,
        ("0.weight", "1:12", "16"),
    ),
    "total_steps 0": ({"total_steps": 0}, RecipeError, ("total_steps", "0")),
    "total_steps -3": ({"total_steps": -3}, RecipeError, ("total_steps", "-3")),
    "total_steps 1.5": ({"total_steps": 1.5}, RecipeError, ("total_steps", "1.5")),
    "total_steps smaller than the phases": (
        {"recipe": nmflow.MDGF(dense=8, finetune=8), "total_steps": 12},
        RecipeError,
        ("total_steps", "12", "8"),
    ),
    "one dense phase longer than the run": (
        {"recipe": nmflow.STE(dense=30)},
        RecipeError,
        ("total_steps", "10", "30"),
    ),
    "unknown recipe": ({"recipe": "mdfg-linear"}, RecipeError, ("mdfg-linear", "mdgf-linear")),
    "no recipe": ({"recipe": None}, RecipeError, ("None",)),
    "a recipe's class": ({"recipe": nmflow.STE}, RecipeError, ("STE",)),
    "nothing matches": ({"include": ["*.mlp.*"]}, PlanError, ("*.mlp.*", "0.weight")),
    "a pattern key that matches nothing": (
        {"pattern": {"0.*": "1:4", "encoder.*": "1:4"}, "include": "all"},
        PlanError,
        ("encoder.*",),
    ),
    "a preset that matches nothing": ({"include": "qkv"}, PlanError, ("qkv", "0.weight")),
    "everything is excluded": ({"exclude": ["*"]}, PlanError, ()),
    "mask_interval 0": ({"mask_interval": 0}, NMFlowError, ("mask_interval", "0")),
    "mask_interval beside stairs": (
        {"recipe": nmflow.MDGF("linear", stairs=16), "mask_interval": 2},
        NMFlowError,
        ("mask_interval", "2", "stairs", "16"),
    ),
    "mask_interval 1.5": ({"mask_interval": 1.5}, NMFlowError, ("mask_interval", "1.5")),
    "remainder": ({"remainder": "pad"}, NMFlowError, ("remainder", "pad", "skip")),
}


@pytest.mark.parametrize("what", ARGUMENTS)
def test_arguments(what: str) -> None:
    options, kind, words = ARGUMENTS[what]
    model, optimizer = trained()
    with refused(model, optimizer, kind, *words):
        attach(model, optimizer, **options)
    attach(model, optimizer)  # the same call, put right, works


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: nmflow.MDGF(beta=0.0), ("beta", "0")),
        (lambda: nmflow.MDGF(beta=-0.5), ("beta", "-0.5")),
        (lambda: nmflow.Hybrid(beta=-1), ("beta", "-1")),
        (lambda: nmflow.MDGF(beta=math.nan), ("beta", "nan")),
        (lambda: nmflow.MDGF(dense=0.7, finetune=0.4), ("dense", "finetune", "0.7", "0.4")),
        (lambda: nmflow.SDGF(dense=0.9), ("dense", "0.9", "0.2")),
        (lambda: nmflow.STE(dense=1.01), ("dense", "1.01")),
    ],
)
def test_recipes(build: Callable[[], Any], words: tuple[str, ...]) -> None:
    with pytest.raises(RecipeError) as caught:
        build()
    says(caught.value, *words)


def test_a_model_without_a_match() -> None:
    for model in (nn.Sequential(nn.LayerNorm(4)), nn.Sequential(nn.Conv2d(4, 4, 3, groups=4))):
        optimizer = ADAMW(model.parameters())
        with refused(model, optimizer, PlanError):
            attach(model, optimizer, include="all")


def test_a_parameter_that_is_not_in_the_optimizer() -> None:
    model = MLP.build()
    optimizer = ADAMW(model.get_submodule("2").parameters())
    with refused(model, optimizer, FlowError, "0.weight", "optimizer"):
        attach(model, optimizer)
    both = [optimizer, ADAMW([model.get_parameter("0.bias")])]
    with refused(model, both, FlowError, "0.weight"):
        attach(model, both)
    attach(model, optimizer, include=["2.*"])


def test_a_parameter_in_two_optimizers() -> None:
    model = MLP.build()
    optimizers = [ADAMW(model.parameters()), ADAMW([model.get_parameter("0.weight")])]
    with refused(model, optimizers, FlowError, "0.weight"):
        attach(model, optimizers)


def test_an_optimizer_of_another_model() -> None:
    model, other = MLP.build(), MLP.build()
    optimizer = ADAMW(other.parameters())
    with refused(model, optimizer, FlowError, "0.weight"):
        attach(model, optimizer)


def test_no_optimizer_at_all() -> None:
    model = MLP.build()
    for optimizer in ([], None, "adamw"):
        with pytest.raises(FlowError):
            attach(model, optimizer)


def test_attaching_twice() -> None:
    model, optimizer = trained()
    flow = attach(model, optimizer, recipe=nmflow.MDGF(finetune=2))
    for x in MLP.batches(3):
        optimizer.zero_grad()
        loss_of(model(x)).backward()
        optimizer.step()
    before = Snapshot.of(model, optimizer)
    for recipe in ("ste", nmflow.MDGF(finetune=2)):
        with pytest.raises(FlowError) as caught:
            attach(model, optimizer, recipe=recipe)
        says(caught.value, "0.weight")
        before.assert_unchanged(model, optimizer)
    other = torch.optim.SGD(model.parameters(), lr=0.1)  # by another optimizer of the same weights
    with pytest.raises(FlowError):
        attach(model, other)
    before.assert_unchanged(model, optimizer)
    assert not other._optimizer_step_pre_hooks
    assert flow.steps_done == 3
    flow.finalize()
    attach(model, optimizer)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("recipe", ["ste", "mdgf-linear", "one-shot", "sdgf-stepwise"])
def test_weights_that_are_not_finite(recipe: str, bad: float) -> None:
    model, optimizer = trained()
    with torch.no_grad():
        model.get_parameter("2.weight")[1, 3] = bad
    with refused(model, optimizer, WeightError, "2.weight"):
        attach(model, optimizer, recipe=recipe)
    with torch.no_grad():
        model.get_parameter("2.weight")[1, 3] = 0.5
    attach(model, optimizer, recipe=recipe)


def test_a_frozen_parameter() -> None:
    """`requires_grad=False` cannot be trained to a pattern by an optimizer: named, or left out."""
    model = MLP.build()
    model.get_parameter("0.weight").requires_grad_(False)
    optimizer = ADAMW([p for p in model.parameters() if p.requires_grad])
    with refused(model, optimizer, NMFlowError, "0.weight"):
        attach(model, optimizer, include=["0.*"])


def test_a_model_of_which_only_adapters_train() -> None:
    """What a user of LoRA sees: what was done, and what to do."""
    model = MLP.build()
    for p in model.parameters():
        p.requires_grad_(False)
    model.add_module("adapter", nn.Linear(4, 4, bias=False).double())
    optimizer = ADAMW([p for p in model.parameters() if p.requires_grad])
    for include in (["0.*", "2.*"], "*weight"):
        words = ("frozen", "0.weight", "requires_grad_(True)", "adapters", "merge")
        with refused(model, optimizer, PlanError, *words):
            attach(model, optimizer, include=include, exclude="adapter")


def test_weights_of_a_kind_that_has_no_mask() -> None:
    model = MLP.build()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.detach().to(torch.complex64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with refused(model, optimizer, NMFlowError, "0.weight"):
        attach(model, optimizer)


# --- optimizers that cannot be hooked ---------------------------------------------------------


class Hookless:
    """What is no `torch.optim.Optimizer`, as apex's or a hand-written one."""

    def __init__(self, parameters: Any) -> None:
        self.param_groups = [{"params": list(parameters), "lr": 0.1}]
        self.state: dict[Any, Any] = {}

    def step(self) -> None:
        for p in self.param_groups[0]["params"]:
            p.data.add_(p.grad, alpha=-0.1)

    def zero_grad(self) -> None:
        for p in self.param_groups[0]["params"]:
            p.grad = None


def test_an_optimizer_without_hooks() -> None:
    model = MLP.build()
    optimizer = Hookless(model.parameters())
    with refused(model, optimizer, FlowError, "Hookless"):
        attach(model, optimizer)
    assert optimizer.state == {}


def test_lbfgs() -> None:
    """Its closure is called several times in a step, on weights that it moves itself."""
    model = MLP.build()
    optimizer = torch.optim.LBFGS(model.parameters())
    with refused(model, optimizer, FlowError, "LBFGS"):
        attach(model, optimizer)


def test_sparse_adam_or_others_of_torch_work_or_are_refused() -> None:
    """Every optimizer of torch either carries a recipe to its exact end or is refused by name."""
    kinds = ["Adadelta", "Adagrad", "Adam", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop"]
    kinds += ["Muon"] if hasattr(torch.optim, "Muon") else []
    for kind in kinds:
        model = MLP.build()
        targets = [model.get_parameter(name) for name in MLP.targets]
        make = getattr(torch.optim, kind)
        optimizer = make(targets if kind == "Muon" else model.parameters(), lr=0.01)
        flow = attach(model, optimizer, recipe=nmflow.MDGF(finetune=2), total_steps=6)
        for x in MLP.batches(6):
            optimizer.zero_grad()
            loss_of(model(x)).backward()
            optimizer.step()
        assert flow.steps_done == 6, kind
        flow.finalize()
        assert nmflow.holds(model.get_parameter("0.weight"), "1:4"), kind


@pytest.fixture
def one_process(tmp_path: Any) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_zero_redundancy_optimizer() -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = MLP.build()
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=0.1)
    with refused(model, optimizer, FlowError, "ZeroRedundancyOptimizer", "FSDP2"):
        attach(model, optimizer)


@pytest.mark.usefixtures("one_process")
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("original", [False, True], ids=["flat", "use_orig_params"])
def test_fsdp1(original: bool) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(
        MLP.build(torch.float32), device_id=torch.device("cpu"), use_orig_params=original
    )
    optimizer = ADAMW(model.parameters())
    with pytest.raises(FlowError, match="fully_shard"):
        nmflow.attach(model, optimizer, recipe="ste", pattern="1:4", include="all", total_steps=9)
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer.state


def test_deepspeed() -> None:
    """Its ZeRO optimizers are known by their module; its stage 3 parameters by their attributes."""
    model = MLP.build()
    kind = type("DeepSpeedZeroOptimizer", (Hookless,), {"__module__": "deepspeed.runtime.zero"})
    optimizer = kind(model.parameters())
    with refused(model, optimizer, FlowError, "DeepSpeed"):
        attach(model, optimizer)
    for parameter in model.parameters():
        parameter.ds_id = 0  # type: ignore[attr-defined]
        parameter.ds_tensor = torch.zeros(1)  # type: ignore[attr-defined]
    torch_optimizer = ADAMW(model.parameters())
    with refused(model, torch_optimizer, FlowError, "DeepSpeed"):
        attach(model, torch_optimizer)


def test_accelerate_wraps_an_optimizer() -> None:
    """Accelerate's wrapper hands its hooks on, or is refused by name; never half attached."""
    from accelerate import Accelerator

    model = MLP.build()
    inner = ADAMW(model.parameters())
    wrapped = Accelerator(cpu=True).prepare(inner)
    try:
        flow = attach(model, wrapped)
    except FlowError as error:
        says(error, "AcceleratedOptimizer")
        assert not inner._optimizer_step_pre_hooks
        return
    for x in MLP.batches(10):
        wrapped.zero_grad()
        loss_of(model(x)).backward()
        wrapped.step()
    assert flow.steps_done == 10
    flow.finalize()
    assert nmflow.holds(model.get_parameter("0.weight"), "1:4")


# --- states that are damaged ------------------------------------------------------------------


def _damage(state: dict[str, Any], how: str) -> None:
    entry = next(e for e in state["state"].values() if "nmflow_dense" in e)
    group = state["param_groups"][0]
    if how == "dense missing":
        del entry["nmflow_dense"]
    elif how == "dense of another shape":
        entry["nmflow_dense"] = entry["nmflow_dense"][:, :8].clone()
    elif how == "dense not a tensor":
        entry["nmflow_dense"] = "weights"
    elif how == "dense not finite":
        entry["nmflow_dense"] = entry["nmflow_dense"] * math.nan
    elif how == "step negative":
        group["nmflow_step"] = -4
    elif how == "step missing":
        del group["nmflow_step"]
    elif how == "step a text":
        group["nmflow_step"] = "three"
    elif how == "recipe missing":
        del group["nmflow_recipe"]
    elif how == "recipe not a recipe":
        group["nmflow_recipe"] = "{"
    elif how == "recipe a number":
        group["nmflow_recipe"] = 3


DAMAGES = ["dense missing", "dense of another shape", "dense not a tensor", "dense not finite"]
DAMAGES += ["step negative", "step missing", "step a text", "recipe missing"]
DAMAGES += ["recipe not a recipe", "recipe a number"]


@pytest.mark.parametrize("attached", [False, True], ids=["before-attach", "after-attach"])
@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_states(how: str, attached: bool) -> None:
    model, optimizer = trained()
    attach(model, optimizer)
    for x in MLP.batches(3):
        optimizer.zero_grad()
        loss_of(model(x)).backward()
        optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    _damage(state, how)
    other = MLP.build(seed=3)
    fresh = ADAMW(other.parameters())
    if attached:
        attach(other, fresh)
    else:
        fresh.load_state_dict(state)
    before = {name: p.detach().clone() for name, p in other.named_parameters()}
    with pytest.raises((StateError, WeightError)) as caught:
        fresh.load_state_dict(state) if attached else attach(other, fresh)
    says(caught.value)
    for name, p in other.named_parameters():
        assert torch.equal(p, before[name])


def test_a_flow_that_is_lost_keeps_training() -> None:
    """Nobody needs to hold the flow: the optimizer holds it."""
    import gc

    model, optimizer = trained()
    attach(model, optimizer, total_steps=5)
    gc.collect()
    for x in MLP.batches(5):
        optimizer.zero_grad()
        loss_of(model(x)).backward()
        optimizer.step()
    assert optimizer.param_groups[0]["nmflow_step"] == 5
    assert nmflow.holds(model.get_parameter("0.weight"), "1:4")


def test_an_optimizer_that_is_thrown_away_frees_its_weights() -> None:
    """A notebook builds optimizer after optimizer for one model: the second may be attached to."""
    import gc

    model = FusedQKV()
    for _ in range(2):
        optimizer = ADAMW(model.parameters())
        nmflow.attach(model, optimizer, recipe="ste", pattern="1:4", include="qk", total_steps=5)
        del optimizer
        gc.collect()
