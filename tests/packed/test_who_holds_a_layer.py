"""Whoever holds a layer besides its parent: packed, left dense with a reason, or an error."""

from __future__ import annotations

import copy
import functools
import pickle
import weakref
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nmflow.errors import CompressError
from nmflow.kernels import explain
from nmflow.packed import compress, decompress, report_of
from nmflow.packed.modules import PackedLinear
from pruned import prune


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.last = nn.Linear(32, 24), nn.Linear(24, 8)
        self.more: Any = None

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.fc(x)))


def wrapped(m: Net) -> None:
    f = m.forward
    m.forward = functools.wraps(f)(lambda *a, **k: f(*a, **k))  # pyright: ignore


def wrapped_twice(m: Net) -> None:
    wrapped(m)
    wrapped(m)


def closure(m: Net) -> None:
    fc, last = m.fc, m.last

    def forward(x: Tensor, scale: float = 1.0) -> Tensor:
        return last(torch.relu(fc(x))) * scale

    m.forward = forward


def partial(m: Net) -> None:
    m.forward = functools.partial(Net.forward, m)


def method(m: Net) -> None:
    m.forward = m.forward


def default(m: Net) -> None:
    def forward(x: Tensor, me: Net = m) -> Tensor:
        return Net.forward(me, x)

    m.forward = forward


def autocast(m: Net) -> None:
    """As accelerate does."""
    m.more = m.forward
    m.forward = torch.autocast("cpu", torch.bfloat16, enabled=False)(m.forward)


def hooked(m: Net) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    add_hook_to_module(m, ModelHook())


def compiled(m: Net) -> None:
    m.forward = torch.compile(m.forward, backend="eager")


class InList(Net):
    def __init__(self) -> None:
        super().__init__()
        self.more = [self.fc, {"last": self.last}]

    def forward(self, x: Tensor) -> Tensor:
        return self.more[1]["last"](torch.relu(self.more[0](x)))


class InPartial(Net):
    def __init__(self) -> None:
        super().__init__()
        self.more = functools.partial(
            lambda fc, last, x: last(torch.relu(fc(x))), self.fc, self.last
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.more(x)


class InLambda(Net):
    def __init__(self) -> None:
        super().__init__()
        self.more = lambda x: self.last(torch.relu(self.fc(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.more(x)


class Weak(Net):
    def __init__(self) -> None:
        super().__init__()
        self.more = weakref.ref(self.fc)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.more()(x)))


class OtherName(Net):
    def __init__(self) -> None:
        super().__init__()
        self.__dict__["more"] = self.fc

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.more(x)))


class Functional(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(F.linear(x, self.fc.weight, self.fc.bias)))


def with_(change: Callable[[Net], None]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = Net()
        change(model)
        return model

    return make


RUN: dict[str, Callable[[], nn.Module]] = {
    "plain": Net,
    **{
        f.__name__: with_(f)
        for f in (wrapped, wrapped_twice, closure, partial, method, default, autocast, hooked,
                  compiled)
    },
    **{c.__name__: c for c in (InList, InPartial, InLambda, Weak, OtherName, Functional)},
    "torch.compile": lambda: cast(nn.Module, torch.compile(Net(), backend="eager")),
    "DataParallel": lambda: nn.DataParallel(Net()),
    "nested": lambda: nn.Sequential(with_(wrapped)(), nn.Identity()),
}  # fmt: skip


def test_a_forward_that_reads_the_network_from_a_global_is_refused() -> None:
    model = prune(nn.Sequential(nn.Linear(32, 32)))
    spread: dict[str, object] = {"method": model.forward}
    exec("def forward(*args, **kwargs):\n    return method(*args, **kwargs)", spread)
    model.forward = spread["forward"]  # pyright: ignore
    with pytest.raises(CompressError, match=r"replaced on the instance.*inplace=True"):
        compress(model, measure=False)
    assert type(model[0]) is nn.Linear
    packed = compress(model, measure=False, inplace=True)
    assert len(explain(packed, torch.randn(2, 32))) == 1


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", RUN)
def test_the_packed_layers_run(name: str, inplace: bool) -> None:
    model = prune(RUN[name]())
    x = torch.randn(3, 32)
    with torch.no_grad():
        want = model(x)
        state = {k: v.clone() for k, v in model.state_dict().items()}
        packed = compress(model, measure=False, inplace=inplace, example_inputs=x)
        torch.testing.assert_close(packed(x), want, atol=1e-5, rtol=1e-5)
        assert len(report_of(packed).packed) == 2
        if "compile" not in name and name != "Functional":
            assert len(explain(packed, x)) == 2
        if inplace:
            assert packed is model
        else:
            assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())
            if name != "compiled":  # zeroed layers of the old network change nothing
                for parameter in model.parameters():
                    parameter.zero_()
                torch.testing.assert_close(packed(x), want, atol=1e-5, rtol=1e-5)
        back = decompress(packed, inplace=inplace)
        torch.testing.assert_close(back(x), want, atol=1e-5, rtol=1e-5)
        assert all(torch.equal(back.state_dict()[k], v) for k, v in state.items())
    torch._dynamo.reset()


class Trainer:
    def __init__(self, model: Net) -> None:
        self.model = model


def by_a_trainer(m: Net) -> None:
    trainer = Trainer(m)
    m.forward = lambda x: Net.forward(trainer.model, x)


_LAYER = nn.Linear(32, 24)


class ByGlobal(Net):
    def __init__(self) -> None:
        super().__init__()
        self.fc = _LAYER

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(_LAYER(x)))


def by_class() -> nn.Module:
    fc = nn.Linear(32, 24)

    class ByClass(Net):
        def __init__(self) -> None:
            super().__init__()
            self.fc = fc

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.relu(fc(x)))

    return ByClass()


@pytest.mark.parametrize("make", [with_(by_a_trainer), ByGlobal, by_class])
def test_what_a_copy_cannot_follow_is_an_error_and_in_place_it_runs(
    make: Callable[[], nn.Module],
) -> None:
    model = prune(make())
    x = torch.randn(3, 32)
    want = model(x)
    with pytest.raises(CompressError, match="inplace=True"):
        compress(model, measure=False)
    assert type(model.fc) is nn.Linear  # nothing half-done
    packed = compress(model, measure=False, inplace=True)
    assert len(explain(packed, x)) == 2
    torch.testing.assert_close(packed(x), want, atol=1e-5, rtol=1e-5)
    decompress(packed, inplace=True)


def test_a_global_of_the_name_of_an_attribute_is_no_reason() -> None:
    globals()["fc"] = model = prune(Net())
    assert len(report_of(compress(model, measure=False)).packed) == 2
    del globals()["fc"]


def test_a_function_keeps_what_it_shares_with_others() -> None:
    model, seen = prune(Net()), []
    f = model.forward

    def forward(x: Tensor) -> Tensor:
        seen.append(len(x))
        return f(x)

    model.forward = forward
    packed = compress(model, measure=False)
    packed(torch.randn(3, 32))
    assert seen == [3]


def _own_forward(m: Net) -> None:
    f = m.fc.forward
    m.fc.forward = lambda x: f(x) * 2  # pyright: ignore[reportAttributeAccessIssue]


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def _lora(m: Net) -> None:
    m.fc = Doubled(32, 24)


DENSE: dict[str, tuple[Callable[[Net], Any], str]] = {
    "own forward": (_own_forward, "forward of this Linear was replaced"),
    "subclass": (_lora, "Doubled has no packed form"),
    "forward hook": (lambda m: m.fc.register_forward_hook(lambda *a: None), "hooks"),
    "pre hook": (lambda m: m.fc.register_forward_pre_hook(lambda *a: None), "hooks"),
    "backward hook": (lambda m: m.fc.register_full_backward_hook(lambda *a: None), "hooks"),
    "state hook": (lambda m: m.fc.register_state_dict_post_hook(lambda *a: None), "hooks"),
    "weight norm": (lambda m: nn.utils.parametrizations.weight_norm(m.fc), "parametrized"),
    "spectral norm": (lambda m: nn.utils.parametrizations.spectral_norm(m.fc), "parametrized"),
    "tied": (lambda m: setattr(m, "twin", _tied(m.fc)), "shared"),
}


def _tied(layer: nn.Linear) -> nn.Linear:
    twin = nn.Linear(32, 24)
    twin.weight = layer.weight
    return twin


@pytest.mark.parametrize("name", DENSE)
def test_what_is_no_plain_layer_stays_dense_with_the_reason(name: str) -> None:
    change, said = DENSE[name]
    model = prune(Net())
    change(model)
    prune(model)
    x = torch.randn(3, 32)
    with torch.no_grad():
        want = model(x)
        packed = compress(model, measure=False, example_inputs=x)
        torch.testing.assert_close(packed(x), want, atol=1e-5, rtol=1e-5)
    rows = {r.name: r for r in report_of(packed) if r.name.startswith("fc.")}
    assert any(said in r.why for r in rows.values()), rows
    assert {r.kept for r in rows.values()} == {"dense"}


def test_lazy_layers_are_in_the_report() -> None:
    model = prune(nn.Sequential(nn.Linear(32, 8)))
    model.append(nn.LazyLinear(4))
    report = report_of(compress(model, measure=False))
    assert [r.kept for r in report] == ["packed", "dense", "dense"]  # the bias has no shape either
    assert all("not initialized" in r.why for r in report[1:])


NOTHING: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "lstm": (lambda: prune(nn.LSTM(32, 16)), "none of them can be packed.*recurrent"),
    "grouped": (lambda: prune(nn.Conv2d(32, 32, 1, groups=2)), "none of them can.*grouped"),
    "embedding": (lambda: prune(nn.Embedding(8, 32)), "none of them can.*looked up"),
    "script": (lambda: torch.jit.script(prune(Net())), "Recursive"),
    "dense": (Net, "prune it first"),
    "no weight": (nn.ReLU, "nothing to pack"),
}


@pytest.mark.parametrize("name", NOTHING)
def test_where_nothing_is_packed_the_error_says_what_is_so(name: str) -> None:
    make, said = NOTHING[name]
    with pytest.raises(CompressError, match=said) as caught:
        compress(make(), measure=False)
    assert ("prune it first" in str(caught.value)) == (name in ("dense", "script"))


class Both(nn.Module):
    """Runs its activation in a way that another name hides."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.act = nn.Linear(32, 24), nn.ReLU()
        self.hidden = [self.act]

    def forward(self, x: Tensor) -> Tensor:
        return self.hidden[0](self.fc(x) - 1.0)


def test_a_fusion_that_changes_the_output_is_undone() -> None:
    class Twice(Both):
        def forward(self, x: Tensor) -> Tensor:
            return self.hidden[0](self.fc(x))  # a ReLU twice is a ReLU: right in either case

    for make in (Both, Twice):
        model = prune(make())
        x = torch.randn(5, 32)
        torch.testing.assert_close(compress(model, measure=False)(x), model(x))


class Past(nn.Module):
    """Reads a layer of a child past the activation that follows it there."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(32, 24), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.block[0](x)


def test_an_example_shows_what_no_block_alone_does() -> None:
    model = prune(Past())
    x = torch.randn(5, 32)
    with pytest.raises(CompressError, match="fuse=False"):
        compress(model, measure=False, example_inputs=x)
    packed = compress(model, measure=False, example_inputs=x, fuse=False)
    torch.testing.assert_close(packed(x), model(x))


class Shares(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        fc = nn.Linear(32, 32)
        self.one, self.two = nn.Sequential(fc, nn.ReLU()), nn.Sequential(fc)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x))


def test_a_layer_of_two_parents_applies_no_activation() -> None:
    model = prune(Shares())
    packed = compress(model, measure=False)
    assert report_of(packed).fused == []
    x = torch.randn(5, 32)
    torch.testing.assert_close(packed(x), model(x))


def test_hooks_see_no_random_inputs() -> None:
    model, seen = prune(nn.Sequential(nn.Linear(32, 24), nn.ReLU())), []
    model.register_forward_hook(lambda m, args, y: seen.append(1))
    packed = compress(model, measure=False)
    assert not seen
    assert report_of(packed).fused == []


def test_states_of_packed_and_dense_networks_are_not_mistaken_for_each_other() -> None:
    make: Callable[[], Any] = lambda: prune(  # noqa: E731
        nn.Sequential(
            nn.Linear(32, 24), nn.Unflatten(1, (24, 1, 1)), nn.Conv2d(24, 8, 1), nn.Flatten()
        )
    )
    dense, packed = make(), compress(make(), measure=False)
    x = torch.randn(3, 32)
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=r"size mismatch for 0\.weight"):
            make().load_state_dict(packed.state_dict(), strict=strict)
        with pytest.raises(RuntimeError, match=r"0\.weight is a dense weight"):
            packed.load_state_dict(dense.state_dict(), strict=strict)
    packed = compress(make(), measure=False)
    want = packed(x)
    other = compress(make(), measure=False)
    assert not any(other.load_state_dict(packed.state_dict()))
    assert torch.equal(other(x), want)
    old = {k: v for k, v in packed.state_dict().items() if v.numel()}  # as it was once written
    assert not any(compress(make(), measure=False).load_state_dict(old))
    attend = compress(prune(nn.MultiheadAttention(32, 4)), measure=False)
    with pytest.raises(RuntimeError, match="in_proj_weight"):
        nn.MultiheadAttention(32, 4).load_state_dict(attend.state_dict(), strict=False)


class Pretends(nn.Module):
    """Has transformers' ways of saving."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.saved = nn.Linear(32, 8), 0

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)

    def save_pretrained(self, folder: str) -> str:
        return folder


def test_save_pretrained_of_a_packed_network_is_refused() -> None:
    model = prune(nn.Sequential(Pretends(), nn.Linear(8, 32)))
    packed = compress(model, measure=False)
    for one in (packed, copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        with pytest.raises(CompressError, match=r"nmflow\.save\(model, folder\)"):
            one[0].save_pretrained("x")
    assert decompress(packed)[0].save_pretrained("x") == "x"
    assert model[0].save_pretrained("x") == "x"
    kept = compress(model, measure=False, exclude="0.*")
    assert kept[0].save_pretrained("x") == "x"  # nothing in it is packed
    assert isinstance(kept[1], PackedLinear)
