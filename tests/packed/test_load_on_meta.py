"""A packed network loaded into an architecture on `meta` is the one that was saved."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import nn

from networks_of_hf import MODELS
from nmflow.errors import CompressError
from nmflow.packed import compress, load, save
from nmflow.packed.files import fill
from pruned import prune


def on_meta(make: Callable[[], Any]) -> Any:
    with torch.device("meta"):
        return make()


def empty_weights(make: Callable[[], Any]) -> Any:
    with accelerate.init_empty_weights():
        return make()


def empty_all(make: Callable[[], Any]) -> Any:
    with accelerate.init_empty_weights(include_buffers=True):
        return make()


@pytest.mark.parametrize("name", MODELS)
def test_networks_on_meta(name: str, tmp_path: Path) -> None:
    make, inputs = MODELS[name]
    packed = compress(prune(make()), measure=False)
    with torch.no_grad():
        want = packed(**inputs)[0]
        save(packed, tmp_path)
        for build in (on_meta, empty_weights, empty_all):
            model, drawn = build(make), torch.get_rng_state()
            again = load(tmp_path, model).eval()
            assert torch.equal(torch.get_rng_state(), drawn)
            assert torch.equal(again(**inputs)[0], want), build.__name__
            assert not [n for n, t in [*again.named_parameters(), *again.named_buffers()]
                        if t.is_meta]  # fmt: skip
            assert not again.load_state_dict(packed.state_dict()).missing_keys
        half = load(tmp_path, on_meta(lambda: make().half())).eval()
        assert torch.equal(half(**inputs)[0], load(tmp_path, make().half()).eval()(**inputs)[0])


class Positions(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.fc = nn.Linear(32, 8)
        self.register_buffer("ids", torch.arange(size), persistent=False)
        self.scale = torch.tensor(2.0)


@pytest.mark.parametrize("again", [lambda: Positions(3), lambda: nn.Sequential(Positions(3))])
def test_what_nothing_rebuilds_is_named_and_the_model_left_alone(
    again: Callable[[], Any], tmp_path: Path
) -> None:
    save(compress(prune(again()), measure=False), tmp_path)
    model = on_meta(again)
    with pytest.raises(CompressError, match=r"scale, .*ids.* on meta .*build the model on the CPU"):
        load(tmp_path, model)
    assert all(p.is_meta for p in model.parameters())
    load(tmp_path, again())


def test_what_is_tied_in_the_file_is_tied_again(tmp_path: Path) -> None:
    make, _ = MODELS["gpt2"]
    save(compress(prune(make()), measure=False), tmp_path)
    for build in (on_meta, empty_weights):
        again = load(tmp_path, build(make))
        assert again.lm_head.weight is again.transformer.wte.weight


@pytest.mark.slow
def test_a_load_into_meta_holds_little_more_than_the_packed_network(tmp_path: Path) -> None:
    made = textwrap.dedent("""
        import sys, threading, torch, nmflow
        from torch import nn
        torch.set_num_threads(1)

        def make():
            return nn.Sequential(*[nn.Linear(1024, 4096, bias=False) for _ in range(12)])

        def held():
            for line in open("/proc/self/status"):
                if line.startswith("RssAnon"):
                    return int(line.split()[1]) * 1024

        folder = sys.argv[1]
        if sys.argv[2] == "save":
            model = make()
            for layer in model:
                layer.weight.data *= nmflow.mask(layer.weight, "1:8")
            nmflow.save(model, folder, "1:8")  # told, which is faster than found
            raise SystemExit
        with torch.device("meta"):
            model = make()
            small = nn.Sequential(nn.Linear(64, 32))
        start = most = held()
        done = False

        def watch():
            global most
            while not done:
                most = max(most, held())

        thread = threading.Thread(target=watch)
        sys.setswitchinterval(1e-3)
        thread.start()
        packed = nmflow.load(folder, model)
        done = True
        thread.join()
        size = sum(b.nbytes for b in packed.buffers())
        layer = 1024 * 4096 * 4
        print((most - start - layer) / size)
        assert most - start <= 1.2 * size + layer, ((most - start) / size, layer / size)
    """)
    for what in ("save", "load"):
        run = subprocess.run(
            [sys.executable, "-c", made, str(tmp_path), what], capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr[-1000:]
    print(run.stdout)


@pytest.mark.parametrize("name", MODELS)
def test_a_file_goes_where_the_model_lies(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`meta` stands for a GPU: a device with no values, to which a model on a CPU is not bound."""
    make, _ = MODELS[name]
    save(compress(prune(make()), measure=False), tmp_path)
    there, device = nn.Linear(2, 3), torch.device("meta")
    assert fill.home(nn.Sequential(there), "0.weight") == there.weight.device
    assert fill.home(nn.Sequential(there.to(device)), "0.weight") == torch.device("cpu")
    monkeypatch.setattr(fill, "home", lambda module, own: device)
    model = load(tmp_path, make(), fuse=False)  # a fusion reads values
    tensors = [*model.named_parameters(), *model.named_buffers()]
    assert {t.device for name, t in tensors if name in dict(make().named_parameters())} == {device}
    assert {t.device for name, t in tensors if name.endswith((".values", ".codes"))} == {device}


def test_what_is_loaded_answers_the_same_twice(tmp_path: Path) -> None:
    """A fresh architecture is in training mode, and its dropout would draw."""

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5), nn.Linear(64, 64))

    model = build().eval()
    prune(model, "1:4")
    save(compress(model, measure=False), tmp_path / "packed")
    made = load(tmp_path / "packed", build().train())
    x = torch.randn(3, 64)
    assert not any(module.training for module in made.modules())
    assert torch.equal(made(x), made(x))
