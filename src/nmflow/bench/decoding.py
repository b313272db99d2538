"""Tokens a second of language models: transformers' `generate`, onnxruntime and llama.cpp."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nmflow.errors import CompressError
from nmflow.packed.decoder import OnnxDecoder

# Continues a text of some tokens by exactly as many as asked for, greedily, from an empty cache.
Decode = Callable[[Sequence[int], int], Any]


def by_generate(model: Any) -> Decode:
    """`model.generate` of transformers, dense or packed."""

    def run(prompt: Sequence[int], new: int) -> Tensor:
        ids = torch.tensor([list(prompt)])
        kept = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
        with torch.inference_mode():
            return model.generate(ids, attention_mask=torch.ones_like(ids), **kept)

    return run


def by_onnxruntime(path: str | os.PathLike[str], threads: int) -> Decode:
    """A file of `nmflow.export_decoder`; raises `CompressError` as `OnnxDecoder`."""
    decoder = OnnxDecoder(path, threads=threads)

    def run(prompt: Sequence[int], new: int) -> Tensor:
        return decoder.generate(torch.tensor([list(prompt)]), new)

    return run


def by_llama_cpp(path: str | os.PathLike[str], threads: int) -> Decode:
    """A GGUF file on llama.cpp.

    Raises:
        CompressError: the package is missing (`pip install 'nmflow[llama]'`), or the file is none.
    """
    try:
        import llama_cpp  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise CompressError(
            "llama.cpp's figures need the package 'llama-cpp-python': pip install 'nmflow[llama]'"
        ) from error
    try:
        model = llama_cpp.Llama(
            os.fspath(path), n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False
        )
    except ValueError as error:
        raise CompressError(f"path is '{os.fspath(path)}': {error}") from error

    def run(prompt: Sequence[int], new: int) -> list[int]:
        model.reset()
        tokens = model.generate(list(prompt), temp=0.0, repeat_penalty=1.0)
        return [next(tokens) for _ in range(new)]

    return run


def tokens_a_second(
    ways: Mapping[str, Decode], prompt: Sequence[int], *, new: int = 32, rounds: int = 5
) -> dict[str, tuple[float, float, float]]:
    """Tokens a second of every way, turn by turn: median, least and most of some rounds.

    The time of the prompt is not counted: a round is the time of `new + 1` tokens less that of one.

    Args:
        ways: names to what decodes.
        prompt: the tokens of a text.
        new: tokens to add.
        rounds: how often each way runs.
    """
    took: dict[str, list[float]] = {name: [] for name in ways}
    for decode in ways.values():
        decode(prompt, 2)
    for _ in range(rounds):
        for name, decode in ways.items():
            seconds = []
            for count in (1, new + 1):
                start = time.perf_counter()
                decode(prompt, count)
                seconds.append(time.perf_counter() - start)
            took[name].append(new / (seconds[1] - seconds[0]))
    return {name: (statistics.median(r), min(r), max(r)) for name, r in took.items()}
