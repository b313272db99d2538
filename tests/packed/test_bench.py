"""`bench`, and the commands `nmflow bench` and `nmflow compress`."""

from __future__ import annotations

import csv
import json
import sys
import time
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)
from typer.testing import CliRunner

import nmflow
from nmflow import mask
from nmflow.bench import networks
from nmflow.bench.bench import bench, pruned, where_the_time_goes
from nmflow.bench.plots import plot
from nmflow.bench.results import DENSE, Bench, cpu_name
from nmflow.bench.rivals import RIVALS, race
from nmflow.bench.ways import as_linears, best_dense, int8_dynamic, tokens_of
from nmflow.cli import app
from nmflow.errors import CompressError, ConfigError, FileFormatError, PlanError
from nmflow.packed import compress, load, load_state
from nmflow.packed.measure import time_ways


def vit() -> Any:
    config = ViTConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        image_size=16, patch_size=8,
    )  # fmt: skip
    return ViTForImageClassification(config).eval()


@pytest.fixture(scope="module")
def found() -> Bench:
    model = vit()
    example = networks.example(model, 2, 8)
    rivals = ("int8", "bfloat16")
    return bench(model, example, "1:16", "ff", (), tokens=(1, 5), rivals=rivals, seconds=0.002,
                 name="small")  # fmt: skip


def test_rows_say_what_was_measured_against_what(found: Bench) -> None:
    layers = [r for r in found.rows if r.level == "layer"]
    assert {r.shape for r in layers} == {"128x64", "64x128"}
    for dtype, tokens, shape in {(r.dtype, r.tokens, r.shape) for r in layers}:
        race = {r.way: r for r in layers if (r.dtype, r.tokens, r.shape) == (dtype, tokens, shape)}
        assert {"F.linear", "packed"} <= race.keys()
        if dtype == "float32" and torch.backends.quantized.engine != "none":
            assert {"int8 dynamic", "packed int8", "packed bfloat16"} <= race.keys()
        dense = [r.median_us for way, r in race.items() if way in DENSE]
        for row in race.values():
            assert row.speedup == pytest.approx(min(dense) / row.median_us)
            assert row.q10_us <= row.median_us <= row.q90_us
            assert row.runs >= 5
            assert row.pattern == "1:16"
            assert (row.threads, row.cpu) == (1, cpu_name())
            assert f"torch {torch.__version__}" in row.versions
            assert f"nmflow {nmflow.__version__}" in row.versions
        assert race["packed"].kernel
        assert max(r.speedup for way, r in race.items() if way in DENSE) == pytest.approx(1.0)
    network = {(r.way, r.dtype): r for r in found.rows if r.level == "network"}
    assert {("dense", "float32"), ("dense, best", "bfloat16"), ("packed", "float32")} <= set(
        network
    )
    assert {r.tokens for r in network.values()} == {10}  # 2 images of 4 patches and a class token
    for parts in found.shares.values():
        assert 0.9 < sum(parts.values()) <= 1.0 + 1e-9
        assert "matrix products" in parts


def test_table_csv_and_plot(found: Bench, tmp_path: Path) -> None:
    text = str(found)
    assert "speedup" in text
    assert "time of the network, packed, float32:" in text
    found.to_csv(tmp_path / "a.csv")
    rows = list(csv.DictReader((tmp_path / "a.csv").open()))
    assert len(rows) == len(found.rows)
    assert float(rows[0]["median_us"]) == found.rows[0].median_us
    plot(found, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(CompressError, match="cannot be written"):
        found.to_csv(tmp_path / "no" / "a.csv")
    with pytest.raises(CompressError, match="cannot be written"):
        plot(found, tmp_path / "no" / "a.png")
    with pytest.raises(CompressError, match="no rows"):
        plot(Bench(), tmp_path / "b.png")


@pytest.mark.slow
def test_every_rival_gives_the_network_s_answer(tmp_path: Path) -> None:
    model = pruned(vit(), "1:16")
    example = networks.example(model, 1, 8)
    packed = compress(model, measure=False)
    eight = compress(model, measure=False, values="int8", activations="int8")
    both = {"packed": packed, "packed int8": eight}
    runs, skipped = race(tuple(RIVALS), model, both, example, tmp_path)
    assert not skipped
    assert runs.keys() == {
        "int8 dynamic (torch)", "bfloat16 (torch)", "torch.compile", "torch.compile, packed",
        "torch.compile, packed int8", "onnxruntime float32", "onnxruntime int8 dynamic",
        "onnxruntime packed", "onnxruntime packed int8",
    }  # fmt: skip
    with torch.inference_mode():
        want = model(**example).logits
        for name, run in runs.items():
            output = cast(Any, run())  # of transformers, or a list of arrays
            found = torch.as_tensor(output[0])
            off = 0.05 if "int8" in name or "bfloat16" in name else 1e-5
            torch.testing.assert_close(found.float(), want, atol=off, rtol=0)


def test_rivals_without_their_package_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = vit()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    found = bench(
        model, networks.example(model, 1, 8), dtypes=("float32",), layers=False,
        rivals=("onnxruntime", "bfloat16"), seconds=0.002,
    )  # fmt: skip
    assert list(found.skipped) == ["onnxruntime"]
    assert "pip install 'nmflow[onnx]'" in found.skipped["onnxruntime"]
    assert "not measured, onnxruntime: " in str(found)
    assert found.to_dict()["skipped"] == found.skipped
    assert {r.way for r in found.rows} == {
        "dense", "dense, best", "packed", "packed int8", "bfloat16 (torch)"
    }  # fmt: skip


def test_clock_takes_turns_and_gives_quantiles() -> None:
    order: list[str] = []

    def way(name: str, seconds: float) -> Any:
        def run() -> None:
            order.append(name)
            time.sleep(seconds)

        return run

    took = time_ways({"a": way("a", 0.001), "b": way("b", 0.003)}, budget=0.0, least=5)
    assert order[:4] == ["a", "a", "b", "b"]  # warm-up
    assert order[4:] == ["a", "b"] * 5
    assert took["a"].median < took["b"].median
    assert took["b"].median >= 3000
    assert took["a"].runs == 5


def test_best_dense_gives_the_same_answers() -> None:
    model = vit()
    example = networks.example(model, 2, 8)
    best = best_dense(model, example)
    with torch.inference_mode():
        torch.testing.assert_close(
            best(**example).logits, model(**example).logits, atol=1e-5, rtol=1e-5
        )
    assert max(tokens_of(model, example).values()) == 10


def test_rivals_know_the_layers_of_gpt2() -> None:
    config = GPT2Config(n_embd=64, n_layer=1, n_head=2, n_inner=128, vocab_size=50, n_positions=16)
    model = cast(Any, GPT2LMHeadModel(config).eval())
    example = {"input_ids": torch.arange(8)[None]}
    plain = cast(Any, as_linears(model))
    assert not any(type(m).__name__ == "Conv1D" for m in plain.modules())
    assert plain.lm_head.weight is plain.transformer.wte.weight
    assert len(tokens_of(plain, example)) == 5
    small = cast(Any, int8_dynamic(model))
    assert sum("quantized" in type(m).__module__ for m in small.modules()) >= 5
    with torch.inference_mode():
        expected = model(**example).logits
        for rival, off in ((plain, 1e-5), (best_dense(model, example), 1e-5), (small, 0.3)):
            torch.testing.assert_close(rival(**example).logits, expected, atol=off, rtol=0)


def test_pruned_leaves_its_model_alone() -> None:
    model = vit()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    small = pruned(model, {"ff": "1:16", "qk": "1:8"})
    assert nmflow.audit(small, {"ff": "1:16", "qk": "1:8"}).ok
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    fused = cast(Any, nn.TransformerEncoderLayer(32, 4, 64))
    cut = pruned(fused, "1:8", include="qk")
    assert nmflow.audit(cut, "1:8", include="qk").ok
    assert (cast(Any, cut).self_attn.in_proj_weight[64:] != 0).all()


def test_shares_are_of_the_profile() -> None:
    x = torch.randn(300, 300)
    shares = where_the_time_goes(lambda: x @ x)
    assert shares["matrix products"] > 0.5


BAD = {
    "dtype": ({"dtypes": ("int8",)}, CompressError, "int8"),
    "tokens": ({"tokens": (0,)}, CompressError, "tokens"),
    "rivals": ({"rivals": ("onnx",)}, CompressError, "onnxruntime"),
    "include": ({"include": "nothing"}, PlanError, "nothing"),
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes_of_bench(name: str) -> None:
    kwargs, error, said = BAD[name]
    model = vit()
    with pytest.raises(error, match=said):
        bench(model, networks.example(model, 1, 8), **kwargs)


def test_networks_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, vocab_size=64)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    t5 = cast(Any, networks.network(str(tmp_path)))
    assert type(t5).__name__ == "T5Stack"
    assert networks.example(t5, 2, 7)["input_ids"].shape == (2, 7)
    monkeypatch.setitem(
        networks.KNOWN, "tiny", ("bert", {"hidden_size": 48, "num_hidden_layers": 1})
    )
    assert cast(Any, networks.network("tiny")).config.hidden_size == 48
    with pytest.raises(ConfigError, match="vit-base"):
        networks.network("no such network")


def run(*args: object) -> Any:
    return CliRunner().invoke(app(), [str(a) for a in args])


def test_nmflow_bench_of_a_folder(tmp_path: Path) -> None:
    pruned(vit(), "1:16").save_pretrained(tmp_path / "net")  # pyright: ignore
    out = run("bench", tmp_path / "net", "--pattern", "held", "--tokens", "3", "--dtype", "float32",
              "--rivals", "", "--seconds", "0.001", "-o", tmp_path / "out")  # fmt: skip
    assert out.exit_code == 0, out.output
    assert "packed" in out.output
    assert {f.name for f in (tmp_path / "out").iterdir()} == {"bench.csv", "bench.png"}
    bad = run("bench", tmp_path / "net", "--tokens", "three")
    assert isinstance(bad.exception, CompressError)
    (tmp_path / "file").write_text("")
    bad = run("bench", tmp_path / "net", "-o", tmp_path / "file" / "x")
    assert isinstance(bad.exception, CompressError)


def test_nmflow_compress_of_a_folder(tmp_path: Path) -> None:
    model = cast(Any, pruned(vit(), "1:16", "ff"))
    model.save_pretrained(tmp_path / "net")
    (tmp_path / "net" / "notes.txt").write_text("kept")
    out = run("compress", tmp_path / "net", "-o", tmp_path / "out")
    assert out.exit_code == 0, out.output
    assert "4 of" in out.output
    names = {f.name for f in (tmp_path / "out").iterdir()}
    assert {"config.json", "nmflow.json", "notes.txt"} <= names
    assert not [n for n in names if n.startswith("model") and n.endswith(".safetensors")]
    again = load(tmp_path / "out", vit())
    example = networks.example(model, 2, 8)
    with torch.no_grad():
        torch.testing.assert_close(
            again(**example).logits, model(**example).logits, atol=1e-5, rtol=1e-5
        )
    assert nmflow.audit(tmp_path / "out", "1:16", include="ff").ok
    timed = run("compress", tmp_path / "net", "-o", tmp_path / "timed", "--tokens", "2")
    assert timed.exit_code == 0, timed.output
    assert "T=2" in timed.output
    assert all(torch.equal(v, load_state(tmp_path / "timed")[k])
               for k, v in model.state_dict().items())  # fmt: skip


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_nmflow_compress_of_a_file(tmp_path: Path, kind: str) -> None:
    w = torch.randn(16, 32)
    state = {"a.weight": w * mask(w, "2:8"), "a.bias": torch.randn(16)}
    file = tmp_path / f"a.{kind}"
    if kind == "pt":
        torch.save(state, file)
    else:
        save_file(state, file)
    out = run("compress", file, "-o", tmp_path / "out")
    assert out.exit_code == 0, out.output
    assert all(torch.equal(v, state[k]) for k, v in load_state(tmp_path / "out").items())
    header = json.loads((tmp_path / "out" / "nmflow.json").read_text())
    assert header["weights"]["a.weight"]["parts"][0]["pattern"] == "2:8"


def test_mistakes_of_nmflow_compress(tmp_path: Path) -> None:
    save_file({"a.weight": torch.randn(16, 32)}, tmp_path / "a.safetensors")
    for args, error in (
        ((tmp_path / "a.safetensors", "-o", tmp_path / "o"), CompressError),
        ((tmp_path / "a.safetensors", "-o", tmp_path / "o", "--tokens", "1"), CompressError),
        ((tmp_path / "a.safetensors", "-o", tmp_path / "o", "--tokens", "x"), CompressError),
        ((tmp_path / "b.safetensors", "-o", tmp_path / "o"), FileFormatError),
        ((tmp_path, "-o", tmp_path), CompressError),
    ):
        out = run("compress", *args)
        assert isinstance(out.exception, error), (args, out.exception)
    assert not (tmp_path / "o").exists()
