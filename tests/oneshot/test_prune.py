"""`prune`: what it reads against hooks on modules, what it leaves, and what it refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nmflow
from models import FAMILIES, Family
from nmflow.errors import FlowError, NMFlowError, PlanError, WeightError
from nmflow.masks import mask, wanda_score
from nmflow.oneshot import METHODS, prune, sparsegpt

transformers = pytest.importorskip("transformers")
from transformers.pytorch_utils import Conv1D  # noqa: E402


class Experts(nn.Module):
    """A stack of experts, multiplied in one of the ways that libraries do."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        shape = (3, 16, 8) if way == "columns" else (3, 8, 16)
        self.gate_up_proj = nn.Parameter(torch.randn(shape))
        self.num_experts, self.is_transposed = 3, way == "columns"

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "loop":
            parts = [nn.functional.linear(x[i], w) for i, w in enumerate(self.gate_up_proj)]
            return torch.stack(parts)
        if self.way == "bmm":
            return torch.bmm(x, self.gate_up_proj.transpose(1, 2))
        if self.way == "left":
            return torch.bmm(self.gate_up_proj, x.transpose(1, 2)).transpose(1, 2)
        return x @ self.gate_up_proj


def plain(kind: str) -> tuple[nn.Module, Tensor, int]:
    """A module with one weight of 16 inputs, what it is given, and the axis of the inputs."""
    if kind in ("loop", "bmm", "left", "columns"):
        return Experts(kind), torch.randn(3, 10, 16), 1 if kind == "columns" else 2
    x = torch.randn(2, 5, 16)
    if kind == "conv1d":
        return Conv1D(8, 16), x, 0
    return nn.Linear(16, 8, bias=kind == "bias"), x if kind != "flat" else x.flatten(0, 1), 1


KINDS = ["bias", "no bias", "flat", "conv1d", "loop", "bmm", "left", "columns"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_a_weight_is_judged_by_what_it_multiplies(kind: str, method: str):
    torch.manual_seed(0)
    module, x, dim = plain(kind)
    model = nn.Sequential(module)
    name, before = next((n, p.detach().clone()) for n, p in model.named_parameters() if p.ndim > 1)
    batches = [x, 3 * x.flip(0) + 1] if x.ndim == 3 and before.ndim == 3 else [x, 3 * x + 1]
    prune(model, "1:4", "*", method=method, calibration=batches)
    found, whole = model.get_parameter(name).detach(), torch.cat(batches, dim=-2)
    stacks = before if before.ndim == 3 else before[None]
    seen = whole if before.ndim == 3 else whole.flatten(0, -2)[None]
    turned = dim == 0 or (before.ndim == 3 and dim == 1)
    for i, w in enumerate(stacks):
        got = found[i] if before.ndim == 3 else found
        w, got = (w.T, got.T) if turned else (w, got)
        if method == "wanda":
            wanted = w * mask(wanda_score(w, seen[i].norm(dim=0)), "1:4")
        else:
            wanted = sparsegpt(w, seen[i].T @ seen[i], "1:4")
        assert torch.allclose(got, wanted, atol=2e-5)


def bert(layers: int = 3) -> Any:
    shape: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(vocab_size=50, num_hidden_layers=layers, **shape)
    torch.manual_seed(1)
    return transformers.BertForSequenceClassification(config)


def batch(seed: int, pad: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(1, 50, (3, 7), generator=torch.Generator().manual_seed(seed))
    ones = torch.ones_like(ids)
    if pad:
        ids = torch.cat([ids, ids.new_full((3, pad), 9)], 1)
        ones = torch.cat([ones, ones.new_zeros(3, pad)], 1)
    return {"input_ids": ids, "attention_mask": ones}


BATCHES = [batch(0), batch(1)]


def read_by(method: str) -> list[Any] | None:
    """The batches that a method reads."""
    return None if method == "magnitude" else BATCHES


def taken(model: nn.Module, modules: list[Any]) -> list[tuple[Any, Tensor]]:
    """Modules with all that they are given."""
    seen: list[list[Tensor]] = [[] for _ in modules]

    def note(place: int) -> Any:
        return lambda _, args: seen[place].append(args[0].detach().flatten(0, 1))

    hooks = [m.register_forward_pre_hook(note(i)) for i, m in enumerate(modules)]
    with torch.no_grad():
        for one in BATCHES:
            model(**one)
    for hook in hooks:
        hook.remove()
    return [(module, torch.cat(x)) for module, x in zip(modules, seen, strict=True)]


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_every_layer_is_judged_behind_those_that_are_pruned(method: str):
    """The same by hooks on the modules, a whole forward pass for each layer."""
    model, ours = bert().eval(), bert()
    for number in range(3):
        block = model.bert.encoder.layer[number]
        for module, x in taken(model, [block.intermediate.dense, block.output.dense]):
            w = module.weight.data
            if method == "wanda":
                w.mul_(mask(wanda_score(w, x.norm(dim=0)), "1:4"))
            else:
                w.copy_(sparsegpt(w, x.T @ x, "1:4"))
    found = prune(ours, "1:4", "ff", method=method, calibration=BATCHES)
    assert [one.label for one in found] == [t.label for t in nmflow.plan(ours, "1:4", "ff")]
    for (name, p), q in zip(ours.named_parameters(), model.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-5), name


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_padding_changes_nothing(method: str):
    one, other = bert(), bert()
    prune(one, "1:4", ["ff", "qkv"], method=method, calibration=BATCHES)
    padded = [batch(0, 4), batch(1, 2)]
    prune(other, "1:4", ["ff", "qkv"], method=method, calibration=padded)
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", ["2:4", "1:8@4", {"ff": "1:8", "qk": "2:4"}])
def test_the_network_holds_its_pattern_and_packs(method: str, pattern: Any):
    model = bert()
    include = "ff" if isinstance(pattern, str) else ["ff", "qk"]
    was = [m.training for m in model.modules()]
    found = prune(model, pattern, include, method=method, calibration=read_by(method))
    assert nmflow.audit(model, pattern, include).ok
    assert all(0 < one.kept < 1 for one in found)
    assert "kept of" in str(found)
    assert [m.training for m in model.modules()] == was
    packed = nmflow.compress(model, pattern, include=include, measure=False)
    assert torch.allclose(
        packed.eval()(**BATCHES[0]).logits, model.eval()(**BATCHES[0]).logits, atol=1e-4
    )


def test_calibrated_networks_are_nearer_to_the_dense_one():
    far = {}
    for method in METHODS:
        dense, model = bert().eval(), bert()
        prune(model, "1:8", "ff", method=method, calibration=read_by(method))
        with torch.no_grad():
            h, h_dense = (m.eval().bert(**batch(7)).last_hidden_state for m in (model, dense))
        far[method] = (h - h_dense).square().sum().item()
    assert far["sparsegpt"] < far["magnitude"]


def experts_of_a_library() -> tuple[Any, list[Any]]:
    config = transformers.MixtralConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=2,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    return model, [{"input_ids": torch.randint(0, 50, (2, 9))} for _ in range(2)]


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_experts_of_a_library_are_pruned_alike_however_it_multiplies_them(method: str, monkeypatch):
    from transformers.integrations import moe

    model, batches = experts_of_a_library()
    found = {}
    for way in ("eager", "grouped_mm", "fallback"):
        again = copy.deepcopy(model)
        if way == "fallback":
            monkeypatch.setattr(moe, "_can_use_grouped_mm", lambda *_: False)
        again.set_experts_implementation("eager" if way == "eager" else "grouped_mm")
        prune(again, "1:4", "ff", method=method, calibration=batches)
        assert nmflow.audit(again, "1:4", "ff").ok
        found[way] = {k: v for k, v in again.named_parameters() if ".experts." in k}
    for way in ("grouped_mm", "fallback"):
        for name, weight in found[way].items():
            assert torch.allclose(weight, found["eager"][name], atol=1e-5), (way, name)


def test_experts_that_are_copied_before_the_product_are_refused():
    model, batches = experts_of_a_library()
    model.set_experts_implementation("batched_mm")
    with pytest.raises(WeightError, match=r"saw no input.*copies it first"):
        prune(model, "1:4", "ff", method="wanda", calibration=batches)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.attn(x, y, y, need_weights=True)[0]


def refused() -> dict[str, tuple[nn.Module, dict[str, Any], type, str]]:
    x = [torch.randn(4, 16)]
    linear = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4))
    poisoned: Any = copy.deepcopy(linear)
    poisoned[1].weight.data[0, 0] = float("nan")
    both = (torch.randn(2, 5, 16), torch.randn(2, 3, 16))
    conv = nn.Sequential(nn.Conv2d(16, 8, 3), nn.Flatten())
    lstm = nn.LSTM(16, 16)
    return {
        "method": (linear, {"method": "best"}, PlanError, "choose from magnitude"),
        "none": (linear, {"method": "wanda"}, WeightError, "needs batches"),
        "some": (linear, {"calibration": x}, WeightError, "reads none"),
        "once": (linear, {"method": "wanda", "calibration": iter(x)}, WeightError, "an iterator"),
        "empty": (linear, {"method": "wanda", "calibration": []}, WeightError, "holds no batch"),
        "late": (poisoned, {"method": "wanda", "calibration": x}, WeightError, "NaN"),
        "late too": (poisoned, {"method": "sparsegpt", "calibration": x}, WeightError, "NaN"),
        "parts": (Attention(), {"method": "wanda", "calibration": [both]}, WeightError, "in parts"),
        "conv": (conv, {"method": "wanda", "calibration": x}, WeightError, "is a convolution"),
        "lstm": (lstm, {"method": "wanda", "calibration": x}, WeightError, "saw no input"),
        "nothing": (linear, {"include": "nothing*"}, PlanError, "nothing"),
    }


@pytest.mark.parametrize("case", refused())
def test_what_is_refused_is_one_sentence_and_leaves_the_network(case: str):
    model, given, kind, said = refused()[case]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(kind, match=said) as caught:
        prune(model, "1:4", **{"include": "*", **given})
    assert "\n" not in str(caught.value)
    for name, value in model.state_dict().items():
        assert torch.equal(value.nan_to_num(9.0), before[name].nan_to_num(9.0)), name


def test_weights_under_a_recipe_are_refused():
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4))
    flow = nmflow.attach(
        model, torch.optim.SGD(model.parameters(), 0.1), "sr-ste", "1:4", "*", total_steps=2
    )
    with pytest.raises(FlowError, match="trained by a recipe"):
        prune(model, "1:4", include="*")
    assert issubclass(FlowError, NMFlowError)
    del flow


SURE = {"linear", "hf-conv1d", "fused-qkv", "attention", "experts", "panels", "3:8"}
NEVER = {"conv1d", "conv2d-grouped", "conv3d"}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.id)
@pytest.mark.parametrize("method", METHODS)
def test_every_kind_of_weight_is_pruned_or_the_error_says_why_not(family: Family, method: str):
    model = family.build(torch.float32)
    before = copy.deepcopy(model.state_dict())
    batches = None if method == "magnitude" else list(family.batches(6, torch.float32))
    said, found = "", nmflow.oneshot.Pruned()
    try:
        found = prune(model, family.pattern, family.include, method=method, calibration=batches)
    except WeightError as error:
        said = str(error)
    if said:
        assert family.id not in SURE
        assert method != "magnitude"
        assert "prune it by magnitude" in said
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    else:
        assert method == "magnitude" or family.id not in NEVER
        assert {one.label.partition("[")[0] for one in found} == set(family.targets)
        assert nmflow.audit(model, family.pattern, family.include).ok


class Named(nn.Module):
    """A network with an argument that it needs, and one that it may do without."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 8)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.fc(x) * scale


TAKEN: dict[str, Any] = {
    "tensor": lambda x: x,
    "tuple": lambda x: (x,),
    "list": lambda x: [x, 2.0],
    "mapping": lambda x: {"x": x},
    "all names": lambda x: {"x": x, "scale": 2.0},
}
NOT_TAKEN: dict[str, Any] = {
    "labels in a tuple": lambda x: (x, 1.0, torch.zeros(4)),
    "labels by name": lambda x: {"x": x, "labels": torch.zeros(4)},
    "another name": lambda x: {"inputs": x},
    "nothing": lambda x: (),
}


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("batch", [*TAKEN, *NOT_TAKEN])
def test_a_batch_is_what_the_network_takes(batch: str, method: str) -> None:
    """Batches of a loader with labels are named, and how to leave them out; nothing is changed."""
    torch.manual_seed(0)
    model, xs = Named(), [torch.randn(4, 16) for _ in range(3)]
    other, before = copy.deepcopy(model), model.fc.weight.clone()
    make = {**TAKEN, **NOT_TAKEN}[batch]
    batches = [make(x) for x in xs]
    if batch in NOT_TAKEN:
        with pytest.raises(WeightError, match=r"does not fit the forward of Named .*for x, y in"):
            prune(model, "2:4", include="*", method=method, calibration=batches)
        assert torch.equal(model.fc.weight, before)
    else:
        prune(model, "2:4", include="*", method=method, calibration=batches)
        prune(other, "2:4", include="*", method=method, calibration=xs)
        assert torch.equal(model.fc.weight, other.fc.weight)
