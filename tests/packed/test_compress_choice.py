"""What `compress` packs, what it leaves dense, and why."""

from __future__ import annotations

import copy
import pickle
import sys
from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from nmflow import mask
from nmflow.packed import compress, decompress, report_of
from nmflow.packed.bfloat16 import BFloat16Linear
from nmflow.packed.layout import detect, runs
from nmflow.packed.measure import Timing, copies_in_network
from nmflow.packed.modules import PackedLinear
from nmflow.packed.onednn import OneDNNLinear, onednn_takes
from pruned import Attend, prune


def test_detect_finds_the_sparsest_and_smallest() -> None:
    w = torch.randn(64, 192)
    for pattern in ("1:2", "2:4", "1:16", "3:8", "1:3", "2:12", "1:64"):
        assert str(detect(w * mask(w, pattern))) == pattern
    assert str(detect(w * mask(w, "1:16@32"))) == "1:16@32"
    assert detect(w) is None
    assert detect(torch.zeros(4, 8)) is None
    assert [r[:2] for r in runs(w * mask(w, "1:16"))] == [(0, 64)]


def test_what_stays_dense_says_why() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(16, 32)
            self.head = nn.Linear(32, 16, bias=False)
            self.head.weight = self.embed.weight
            self.lstm = nn.LSTM(32, 32)
            self.grouped = nn.Conv2d(32, 32, 3, groups=2)
            self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(32, 32))
            self.hooked = nn.Linear(32, 32)
            self.hooked.register_forward_hook(lambda m, a, o: o)
            self.dense = nn.Linear(32, 32)
            self.good = nn.Linear(32, 32)

    model = cast(Any, Mixed())
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 and name != "dense.weight":
            parameter.data *= mask(parameter, "1:8") if parameter.shape[1] % 8 == 0 else 1
    report = report_of(compress(model, measure=False))
    why = {row.name: row.why for row in report}
    assert [row.name for row in report.packed] == ["good.weight"]
    assert "shared by several modules (embed, head)" in why["embed.weight"]
    assert "recurrent" in why["lstm.weight_ih_l0"]
    assert "grouped convolution" in why["grouped.weight"]
    assert "hooks" in why["hooked.weight"]
    assert why["dense.weight"] == "holds no N:M pattern"
    assert "1 of" in str(report)


def test_measuring_keeps_dense_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """The verdict is the geometric mean over the token counts of what the clock said."""
    module = sys.modules["nmflow.packed.faster"]

    def clock(packed: dict[int, float]):
        def time_ways(ways: dict, **kwargs: object) -> dict[str, Timing]:
            for way in ways.values():
                tokens = way().shape[0]
            times = {name: Timing(10.0 + i, 0, 0, 1) for i, name in enumerate(ways)}
            times["packed"] = Timing(packed[tokens], 0, 0, 1)
            return times

        return time_ways

    model = prune(nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64)))
    monkeypatch.setattr(module, "time_ways", clock({1: 2.0, 9: 40.0}))
    packed = compress(model, tokens=(1, 9))
    assert isinstance(packed[0], PackedLinear)  # 5 x 0.25 is above 1
    assert report_of(packed)[0].times[1] == (2.0, 10.0, "F.linear")
    assert "5.00x" in str(report_of(packed))
    monkeypatch.setattr(module, "time_ways", clock({1: 4.0, 9: 40.0}))
    kept = compress(model, tokens=(1, 9))
    assert isinstance(kept[0], nn.Linear)
    assert report_of(kept)[0].why == "the best dense way is faster"
    assert report_of(kept)[0].bytes == report_of(kept)[0].dense_bytes
    assert type(kept[0]) is nn.Linear


def test_a_race_runs_on_as_many_weights_as_the_network_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """One weight, called again and again, would lie in a nearer cache than a network's do."""
    raced: list[set[tuple[int, ...]]] = []

    def time_ways(ways: dict, **kwargs: object) -> dict[str, Timing]:
        read: set[tuple[int, ...]] = set()

        class Reads(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
                read.add(tuple(a.data_ptr() for a in args[1:2] if isinstance(a, torch.Tensor)))
                return func(*args, **(kwargs or {}))

        with Reads():
            for _ in range(5):
                ways["packed"]()
        raced.append(read)
        return {name: Timing(1.0, 1.0, 1.0, 1) for name in ways}

    monkeypatch.setattr(sys.modules["nmflow.packed.faster"], "time_ways", time_ways)
    model = prune(nn.Sequential(*[nn.Linear(64, 64) for _ in range(3)], nn.Linear(64, 32)))
    compress(model, tokens=(2,))
    assert [len(read) for read in raced] == [3, 1]


@pytest.mark.skipif(not onednn_takes(torch.bfloat16), reason="oneDNN has no bfloat16 here")
@pytest.mark.parametrize(("half", "kind"), [(1.0, BFloat16Linear), (3.0, PackedLinear)])
def test_values_are_rounded_to_bfloat16_only_where_that_is_faster(
    monkeypatch: pytest.MonkeyPatch, half: float, kind: type
) -> None:
    def time_ways(ways: dict, **kwargs: object) -> dict[str, Timing]:
        rounded = "oneDNN bfloat16" in ways
        took = {"packed": half if rounded else 2.0}
        return {name: Timing(took.get(name, 9.0), 0, 0, 1) for name in ways}

    monkeypatch.setattr(sys.modules["nmflow.packed.faster"], "time_ways", time_ways)
    model = prune(nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64)))
    packed = compress(model, tokens=(1, 9), dtype="bfloat16")
    assert [type(layer) for layer in packed] == [kind, kind]
    assert all((row.error is None) == (kind is PackedLinear) for row in report_of(packed))


def test_copies_are_those_of_the_network_until_they_fill_a_cache() -> None:
    assert copies_in_network(1 << 20, 1) == 1
    assert copies_in_network(1 << 20, 12) == 12
    assert copies_in_network(9 << 20, 12) == 8
    assert copies_in_network(180 << 20, 32) == 1


@pytest.mark.skipif(not onednn_takes(torch.float32), reason="this torch has no oneDNN")
def test_what_loses_to_packed_onednn_runs_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def time_ways(ways: dict, **kwargs: object) -> dict[str, Timing]:
        return {n: Timing(1.0 if n == "oneDNN packed" else 9.0, 0, 0, 1) for n in ways}

    monkeypatch.setattr(sys.modules["nmflow.packed.faster"], "time_ways", time_ways)
    model = prune(nn.Sequential(nn.Linear(64, 32)))
    kept = compress(model, tokens=(3,))
    assert isinstance(kept[0], OneDNNLinear)
    assert "runs on packed oneDNN" in str(report_of(kept))
    assert report_of(kept)[0].bytes == 2 * report_of(kept)[0].dense_bytes
    x = torch.randn(2, 3, 64)
    with torch.no_grad():
        torch.testing.assert_close(kept(x), model(x))
        kept[0].weight.mul_(2)  # a changed weight is seen
        torch.testing.assert_close(kept(x), 2 * model(x) - model[0].bias)
    again = pickle.loads(pickle.dumps(copy.deepcopy(kept)))
    assert again.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        torch.testing.assert_close(again(x), kept(x))
        torch.testing.assert_close(
            again.bfloat16()(x.bfloat16()).float(), kept(x), atol=0.1, rtol=0.1
        )
    kept(x.requires_grad_()).sum().backward()
    assert kept[0].weight.grad is not None
    assert type(decompress(kept)[0]) is nn.Linear


@pytest.mark.skipif(not onednn_takes(torch.float32), reason="this torch has no oneDNN")
def test_other_dense_layers_on_onednn_and_tied_ones_stay_tied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def time_ways(ways: dict, **kwargs: object) -> dict[str, Timing]:
        return {n: Timing({"packed": 1.0, "oneDNN packed": 2.0}.get(n, 9.0), 0, 0, 1) for n in ways}

    monkeypatch.setattr(sys.modules["nmflow.packed.faster"], "time_ways", time_ways)
    model = cast(Any, nn.Sequential(nn.Embedding(16, 32), prune(nn.Linear(32, 32)),
                                    nn.Linear(32, 16, bias=False)))  # fmt: skip
    model[2].weight = model[0].weight
    x = torch.randint(0, 16, (2, 3))
    assert type(compress(model)[2]) is nn.Linear
    for inplace in (False, True):
        packed = compress(model, onednn=True, inplace=inplace)
        kinds = [type(m).__name__ for m in packed]
        assert kinds == ["Embedding", "PackedLinear", "OneDNNLinear"]
        assert packed[2].weight is packed[0].weight
        with torch.no_grad():
            torch.testing.assert_close(packed(x), decompress(packed)(x))


def test_measuring_for_real() -> None:
    model = prune(nn.Sequential(nn.Linear(256, 256), nn.Conv2d(16, 16, 3), Attend()), "1:16")
    for dtype in (torch.float32, torch.bfloat16):
        report = report_of(compress(model.to(dtype), tokens=(2,)))
        for row in report:
            packed, dense, way = row.times[2]
            assert packed > 0
            assert dense > 0
            assert way.split(" and ")[0] in {
                "F.linear", "oneDNN", "oneDNN packed", "conv", "conv, channels last",
            }  # fmt: skip
            # Packed only where the clock says so.
            assert (row.kept == "packed") == (dense > packed)
