"""Tokens a second: what is counted, and what each way decodes."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from networks_of_hf import MODELS
from nmflow.bench.decoding import by_generate, by_llama_cpp, by_onnxruntime, tokens_a_second
from nmflow.errors import CompressError
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
