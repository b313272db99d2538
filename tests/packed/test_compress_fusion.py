"""Activations that a packed layer applies itself."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation, NewGELUActivation

import nmflow
from nmflow.errors import CompressError
from nmflow.packed import compress, decompress, report_of
from nmflow.packed.fuse import Fused
from pruned import NETWORKS, flat, prune

ACTIVATIONS = [
    *(nn.GELU(), nn.ReLU(), nn.SiLU(), nn.GELU(approximate="tanh")),
    *(GELUActivation(), NewGELUActivation()),
]


class Block(nn.Module):
    """A feed-forward block, some of whose forms read the layer's output twice."""

    def __init__(self, form: str = "plain", act: nn.Module | None = None) -> None:
        super().__init__()
        self.form, self.seen = form, None
        self.up, self.act, self.down = nn.Linear(32, 64), act or nn.GELU(), nn.Linear(64, 32)
        self.gate = nn.Linear(32, 64)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor | tuple[Tensor, Tensor]:
        h = self.up(x)
        if self.form == "twice":
            return self.down(self.act(h) + h)
        if self.form == "view":
            return self.down(self.act(h.flatten(0, -2)).view(h.shape))
        if self.form == "returned":
            return self.down(self.act(h)), h
        if self.form == "dtype":
            return self.down(self.act(h).to(h.dtype))
        if self.form == "gated":
            return self.down(self.act(h) * self.gate(x))
        if self.form == "shared":
            return self.act(self.down(self.act(h)))
        return self.down(self.act(h))


@pytest.mark.parametrize(
    ("form", "fused"),
    [("plain", True), ("dtype", True), ("gated", True), ("twice", False), ("view", False),
     ("returned", False), ("shared", False)],
)  # fmt: skip
@pytest.mark.parametrize("act", ACTIVATIONS, ids=repr)
def test_activations_are_fused_only_where_nobody_else_looks(
    form: str, fused: bool, act: nn.Module
) -> None:
    model = prune(nn.Sequential(Block(form, act)))
    packed = compress(model, measure=False)
    assert report_of(packed).fused == (["0.up"] if fused else [])
    assert (packed[0].up.epilogue != 0) == fused
    assert isinstance(packed[0].act, Fused) == fused
    x = torch.randn(2, 3, 32)
    torch.testing.assert_close(flat(packed(x)), flat(model(x)), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        flat(pickle.loads(pickle.dumps(packed))(x)), flat(packed(x)), atol=0, rtol=0
    )
    assert str(decompress(packed)) == str(model)
    plain = compress(model, measure=False, fuse=False)
    assert report_of(plain).fused == []
    assert plain[0].up.epilogue == 0


def test_what_is_not_fused() -> None:
    for act in (nn.Tanh(), nn.ELU()):
        packed = compress(prune(nn.Sequential(Block("plain", act))), measure=False)
        assert report_of(packed).fused == []
    model = prune(nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(3), nn.ReLU())).train()
    before = model[1].running_mean.clone()
    state = torch.get_rng_state()
    packed = compress(model, measure=False)
    assert report_of(packed).fused == []
    assert torch.equal(packed[1].running_mean, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert packed.training
    assert packed[1].training


@pytest.mark.parametrize("name", ["vit", "t5"])
def test_networks_of_hf_fuse_their_activations(name: str) -> None:
    make, inputs, at = NETWORKS[name]
    model = prune(make())
    packed = compress(model, measure=False)
    assert len(report_of(packed).fused) == 2
    assert "activation applied by the layer" in str(report_of(packed))
    with torch.no_grad():
        torch.testing.assert_close(packed(**inputs)[at], model(**inputs)[at], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("begun", [False, True], ids=["dense", "packed in part"])
def test_an_error_leaves_a_network_as_it_was_in_place(begun: bool) -> None:
    """Here 8 bits are too few: a weight of 1000 leaves no step for those of 1 beside it."""
    first, second = nn.Linear(64, 16), nn.Linear(16, 16)
    for layer in (first, second):
        with torch.no_grad():
            layer.weight.zero_()
            layer.weight[:, ::4] = 1.0
            layer.weight[:, 0] = 1000.0
            layer.bias.zero_()
    with torch.no_grad():
        first.weight[0] = 0.0  # so that the second layer's first input is 0, as the first one's
    model = nn.Sequential(first, nn.ReLU(), second, nn.ReLU()).eval()
    if begun:
        compress(model, include="0.*", measure=False, fuse=False, inplace=True)
    x = torch.ones(2, 64)
    x[:, 0] = 0.0
    modules, kinds = list(model), [type(m) for m in model]
    want, state = model(x), {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(CompressError, match=r"differs.*values=None"):
        compress(model, measure=False, inplace=True, values="int8", example_inputs=x)
    assert all(a is b for a, b in zip(model, modules, strict=True))
    assert [type(m) for m in model] == kinds
    assert all(torch.equal(state[name], t) for name, t in model.state_dict().items())
    assert torch.equal(model(x), want)
    if not begun:
        assert "nmflow_report" not in vars(model)
    packed = compress(model, measure=False, inplace=True, example_inputs=x)
    assert torch.allclose(packed(x), want)


def test_fusion_touches_the_random_generator_of_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.manual_seed` would set those of all GPUs, and nobody would put them back."""
    seeded: list[int] = []
    for device in (torch.cuda, torch.mps, torch.xpu):
        for name in ("manual_seed", "manual_seed_all"):
            if hasattr(device, name):
                monkeypatch.setattr(device, name, seeded.append)
    layer = nn.Linear(64, 16)
    layer.weight.data *= nmflow.mask(layer.weight, "1:16")
    model = nn.Sequential(layer, nn.ReLU())
    before = torch.get_rng_state()
    assert nmflow.report_of(compress(model, measure=False)).fused == ["0"]
    assert torch.equal(torch.get_rng_state(), before)
    assert not seeded
