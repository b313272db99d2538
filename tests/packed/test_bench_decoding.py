"""Tokens a second: what is counted, and what each way decodes."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from typer.testing import CliRunner

from networks_of_hf import MODELS
from nmflow.bench import networks
from nmflow.bench.decoding import (
    bench_decoding,
    by_generate,
    by_llama_cpp,
    by_onnxruntime,
    tokens_a_second,
)
from nmflow.cli import app
from nmflow.errors import CompressError, ConfigError
from nmflow.packed import compress, export_decoder
from pruned import prune


def test_tokens_are_counted_without_the_prompt() -> None:
    asked: list[tuple[str, int]] = []

    def way(name: str, seconds: float) -> Any:
        def run(prompt: Sequence[int], new: int) -> None:
            asked.append((name, new))
            time.sleep(0.02 + seconds * new)  # a prompt that takes long

        return run

    found = tokens_a_second({"a": way("a", 0.001), "b": way("b", 0.004)}, [1, 2], new=8, rounds=3)
    assert asked[:2] == [("a", 2), ("b", 2)]  # warm-up
    assert asked[2:] == [("a", 1), ("a", 9), ("b", 1), ("b", 9)] * 3
    for name, most in (("a", 1000.0), ("b", 250.0)):
        median, least, best = found[name]
        assert least <= median <= best
        assert median <= most * 1.2
    assert found["a"][0] > 1.5 * found["b"][0]


def llama() -> Any:
    torch.manual_seed(0)
    return MODELS["llama"][0]().eval()


def test_a_busy_machine_makes_no_token_free() -> None:
    """The first call of each round stalls, so that one token takes longer than nine."""
    calls = 0

    def stalls(prompt: Sequence[int], count: int) -> list[int]:
        nonlocal calls
        calls += 1
        time.sleep(0.02 if count == 1 else 0.002)
        return [0] * count

    median, least, most = tokens_a_second({"it": stalls}, [1, 2], new=8, rounds=3)["it"]
    assert calls == 7
    assert 0 < least <= median <= most < 8 / 0.002


def test_rows_of_decoding_and_what_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    found = bench_decoding(llama(), "1:8", new=2, rounds=3, name="small")
    ways = {row.way: row for row in found.rows}
    assert {"dense", "bfloat16 (torch)", "packed", "packed int8"} <= ways.keys()
    assert ways["dense"].speedup == pytest.approx(1.0)
    for row in found.rows:
        assert (row.level, row.name, row.pattern, row.tokens) == ("decoding", "small", "1:8", 1)
        assert row.q10_us <= row.median_us <= row.q90_us
        assert f"{row.way}: {1e6 / row.median_us:.1f} tokens/s" in str(found)
    assert set(found.skipped) == {"onnxruntime", "llama.cpp"}
    assert "pip install 'nmflow[llama]'" in found.skipped["llama.cpp"]
    assert "nmflow[onnx" in found.skipped["onnxruntime"]


def test_mistakes_of_bench_decoding() -> None:
    for wrong, said in (
        ({"rivals": ("llama",)}, "llama.cpp"),
        ({"new": 0}, "new is 0"),
        ({"rounds": 0}, "rounds 0"),
    ):
        with pytest.raises(CompressError, match=said):
            bench_decoding(llama(), "1:8", **cast(Any, wrong))


def test_a_language_model_by_its_name(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path)
    again, gguf = networks.language_model(str(tmp_path))
    assert gguf is None
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in again.state_dict().items())
    for wrong in ("no such network", str(tmp_path / "none.gguf")):
        with pytest.raises(ConfigError, match="GGUF"):
            networks.language_model(wrong)


def test_nmflow_bench_decodes(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "net")
    out = CliRunner().invoke(
        app(), ["bench", str(tmp_path / "net"), "--decode", "2", "--rivals", "bfloat16,llama.cpp",
                "--pattern", "1:8", "--include", "ff,attn", "-o", str(tmp_path / "out")],
    )  # fmt: skip
    assert out.exit_code == 0, out.output
    assert "tokens/s" in out.output
    assert "not measured, llama.cpp: " in out.output
    assert {f.name for f in (tmp_path / "out").iterdir()} == {"bench.csv", "bench.png"}


@pytest.mark.slow
def test_every_way_decodes_the_same_text(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
    torch.manual_seed(0)
    packed = compress(prune(MODELS["llama"][0]()), measure=False)
    path = export_decoder(packed, tmp_path / "a.onnx")
    texts = [way([5, 9, 33], 7) for way in (by_generate(packed), by_onnxruntime(path, 1))]
    assert torch.equal(*texts)


def test_llama_cpp_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(CompressError, match=r"pip install 'nmflow\[llama\]'"):
        by_llama_cpp("a.gguf", 1)


def test_what_is_no_gguf_file_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="the extra llama is not installed")
    with pytest.raises(CompressError, match="path is"):
        by_llama_cpp(tmp_path / "none.gguf", 1)
