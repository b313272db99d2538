"""The check of a new order is never empty: in any precision, for any outputs, for every block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nmflow
from nmflow.errors import PlanError

X = torch.linspace(-2, 2, 64).view(4, 16)
CHANGES = "another order of its units changes the outputs"


class Blocks(nn.Module):
    """A block whose units may stand in any order, and one whose units may not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.free = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.bound = nn.Sequential(
            nn.Linear(16, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 16)
        )
        nn.init.normal_(self.bound.get_parameter("1.weight"))

    def forward(self, x: Tensor) -> Any:
        return self.bound(x + self.free(x))


class Masked(Blocks):
    """Its outputs hold what masks are made of."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return {"logits": y.masked_fill(torch.arange(16) < 3, self.value)}


def prepared(model: nn.Module) -> nn.Module:
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(True)
    return accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(model)


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "float32": (Blocks, X),
    "float64": (lambda: Blocks().double(), X.double()),
    "bfloat16": (lambda: Blocks().bfloat16(), X.bfloat16()),
    "autocast": (Blocks, X),
    "autocast inside": (lambda: prepared(Blocks()), X),
    "minus infinity": (lambda: Masked(-torch.inf), X),
    "the least number": (lambda: Masked(torch.finfo(torch.float32).min), X),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_block_is_permuted_exactly_if_its_function_stays(name: str) -> None:
    make, x = MODELS[name]
    model = make().train()
    old = {n: p.detach().clone() for n, p in model.named_parameters()}
    cast = torch.autocast("cpu", torch.bfloat16, enabled=name == "autocast")
    with cast:
        model(x)  # so that autocast has kept the weights
        done = nmflow.permute_hidden(model, x, "1:4", include="*")
    assert [block.name for block in done] == ["free"]
    assert ("bound", CHANGES) in done.left_out
    assert all(module.training for module in model.modules())
    for n, p in model.named_parameters():
        assert torch.equal(p, old[n]) == (not n.startswith("free.") or n == "free.2.bias"), n


class Opaque:
    """An output that holds a tensor where nobody looks."""

    def __init__(self, y: Tensor) -> None:
        self.y = y


@pytest.mark.parametrize("wrap", [Opaque, lambda y: y.argmax(-1), lambda y: None])
def test_outputs_without_numbers_are_refused(wrap: Callable[[Tensor], Any]) -> None:
    class Net(Blocks):
        def forward(self, x: Tensor) -> Any:
            return wrap(super().forward(x))

    model = Net()
    old = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(PlanError, match="outputs of Net hold no floating-point tensor"):
        nmflow.permute_hidden(model, X, "1:4", include="*")
    assert all(torch.equal(p, old[n]) for n, p in model.named_parameters())


class Gated(nn.Module):
    """A gated block, all of whose matrices have the same shape."""

    def __init__(self, names: tuple[str, str, str], bias: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mlp = nn.ModuleDict({name: nn.Linear(16, 16, bias=bias) for name in names})
        self.names = names

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = (self.mlp[name] for name in self.names)
        return x + down(nn.functional.silu(gate(x)) * up(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "names",
    [("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"), ("wi_0", "wi_1", "wo")],
    ids=lambda names: names[0],
)
def test_gated_blocks_of_square_matrices_are_one_block(names: Any, bias: bool, dtype: Any) -> None:
    model = Gated(names, bias).to(dtype)
    x = X.to(dtype)
    wide = Gated(names, bias)
    wide.load_state_dict(model.state_dict())
    before = wide(X)
    (done,) = nmflow.permute_hidden(model, x, "1:4", include="*")
    assert done.down[1] > done.down[0]
    assert len(done.order) == 16
    wide.load_state_dict(model.state_dict())
    torch.testing.assert_close(wide(X), before, atol=1e-5, rtol=1e-5)


def test_a_block_that_the_inputs_do_not_reach_is_named() -> None:
    class Routed(Blocks):
        def forward(self, x: Tensor) -> Any:
            return self.free(x)

    done = nmflow.permute_hidden(Routed(), X, "1:4", include="*")
    assert [block.name for block in done] == ["free"]
    (left,) = done.left_out
    assert left[0] == "bound"
    assert "do not reach the outputs" in left[1]


@pytest.mark.parametrize("call", range(4))
def test_a_network_that_raises_is_left_as_it_was(call: int) -> None:
    model = nn.Sequential(
        *[nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(2)]
    )
    optimizer = torch.optim.AdamW(model.parameters())
    model(X).square().mean().backward()
    optimizer.step()
    states = [s for one in optimizer.state.values() for s in one.values()]
    old = [x.detach().clone() for x in (*model.parameters(), *states)]
    calls = []

    def broken(*_: Any) -> None:
        calls.append(1)
        if len(calls) == call + 1:
            raise RuntimeError("out of memory")

    handle = model.register_forward_hook(broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        nmflow.permute_hidden(model, X, "1:4", include="*", optimizer=optimizer)
    handle.remove()
    for x, was in zip((*model.parameters(), *states), old, strict=True):
        assert torch.equal(x, was)
    assert not any(module._forward_hooks for module in model.modules())
