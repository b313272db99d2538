"""How `compress` measures on a GPU, with graphs and events that only count."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from nmflow import compress, mask
from nmflow.errors import CompressError
from nmflow.packed import faster, measure
from nmflow.packed.modules import PackedLinear


class Card:
    """A GPU on which a call takes its cost, and every graph knows the calls it captured."""

    def __init__(self) -> None:
        self.now = 0.0
        self.capturing: Any = None

    def spend(self, microseconds: float) -> None:
        self.now += microseconds
        if self.capturing is not None:
            self.capturing.cost += microseconds


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    made = Card()

    class Graph:
        cost = 0.0

        def replay(self) -> None:
            made.now += self.cost

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = 0.0

        def record(self) -> None:
            self.at = made.now

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, other: Event) -> float:
            return (other.at - self.at) / 1e3

    @contextlib.contextmanager
    def graph(one: Graph, stream: Any) -> Any:
        assert stream is side
        made.capturing = one
        yield
        made.capturing = None

    side = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {
        "CUDAGraph": Graph,
        "Event": Event,
        "graph": graph,
        "Stream": lambda: side,
        "stream": lambda one: contextlib.nullcontext(),
        "current_stream": lambda: side,
        "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=100_000),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return made


def test_a_way_is_timed_a_call(card: Card) -> None:
    found = measure.time_on_gpu(
        {"one": [lambda: card.spend(5)] * 4, "other": [lambda: card.spend(7)] * 2}, rounds=3
    )
    assert found["one"].median == pytest.approx(5)
    assert found["other"].median == pytest.approx(7)
    assert found["one"].runs == 3


def test_copies_do_not_fit_into_the_cache(card: Card) -> None:
    device = torch.device("cpu")
    assert measure.copies_past_cache(10_000, device) == 20
    assert measure.copies_past_cache(10_000_000, device) == 2
    assert measure.copies_past_cache(10, device) == 64


@pytest.mark.parametrize("pattern", ["1:16", "2:4"])
def test_every_copy_of_a_race_has_its_own_weight(
    pattern: str, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    linear = nn.Linear(128, 64).bfloat16()
    linear.weight.data *= mask(linear.weight, pattern)
    packed = PackedLinear.pack(linear.weight, pattern, linear.bias)
    seen: dict[str, set[int]] = {"dense": set(), "packed": set()}
    forward, product = PackedLinear.forward, measure.F.linear

    def ran(self: PackedLinear, x: torch.Tensor) -> torch.Tensor:
        seen["packed"].add(self.values.data_ptr())
        card.spend(3)
        return forward(self, x)

    def dense(x: torch.Tensor, w: torch.Tensor, b: Any) -> torch.Tensor:
        seen["dense"].add(w.data_ptr())
        card.spend(8)
        return product(x, w, b)

    monkeypatch.setattr(PackedLinear, "forward", ran)
    monkeypatch.setattr(measure.F, "linear", dense)
    x = torch.randn(2, 128).bfloat16()
    found = faster._race_on_gpu(linear.weight.detach(), linear.bias, packed, x)
    assert set(found) == {"cuBLAS", "packed"}  # cuSPARSELt refuses a CPU
    assert found["packed"].median == pytest.approx(3)
    assert found["cuBLAS"].median == pytest.approx(8)
    assert len(seen["dense"]) == -(-200_000 // linear.weight.nbytes)
    assert len(seen["packed"]) > len(seen["dense"])


def _full(*args: object, **kwargs: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_a_way_that_has_no_memory_is_no_way_that_lost(
    card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", _full)
    w = torch.randn(32, 64)
    with pytest.raises(torch.OutOfMemoryError):
        measure.gpu_ways(w * mask(w, "2:4"), None, torch.randn(2, 64))


def test_a_measurement_without_memory_is_told_and_nothing_is_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(faster, "_races", _full)
    layer = nn.Linear(64, 32)
    layer.weight.data *= mask(layer.weight, "1:16")
    model = nn.Sequential(layer)
    with pytest.raises(CompressError, match=r"^tokens is \(1, 9\): .* at 1 takes .*measure=False"):
        compress(model, tokens=(1, 9), inplace=True)
    assert type(model[0]) is nn.Linear


def test_what_no_kernel_serves_is_told() -> None:
    packed = PackedLinear.pack(torch.eye(16), "1:16")
    like = SimpleNamespace(device=SimpleNamespace(type="cuda"))
    assert "bfloat16 and float16" in faster._why_slow(packed, like)  # pyright: ignore
    assert "none is for mps" in faster._why_slow(
        packed,
        SimpleNamespace(device=SimpleNamespace(type="mps")),  # pyright: ignore
    )
