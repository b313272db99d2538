"""Tokens a second of a network of the shape of Llama-2-7B, dense and packed, batch 1."""

from __future__ import annotations

import contextlib
import inspect
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

import nmflow
from nmflow.packed.modules import PackedLinear

LENGTH = 256  # of the cache
PROMPT, NEW = 16, 128


def step_graph(model: Any, config: Any) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """A graph that makes the next token of one sequence, and that token."""
    import transformers

    device = model.device
    cache = transformers.StaticCache(config=config, max_cache_len=LENGTH)
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    places = torch.arange(LENGTH, device=device)
    at = torch.arange(PROMPT, device=device)
    token = torch.ones(1, 1, dtype=torch.long, device=device)

    def forward(ids: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        seen = places[None, :] <= at[:, None]  # four axes, so that it is taken as it is
        out = model(
            ids, attention_mask=seen[None, None], position_ids=at[None], use_cache=True,
            **{name: cache},
        )  # fmt: skip
        return out.logits[:, -1:].argmax(-1)

    token.copy_(forward(token.expand(1, PROMPT), at))
    now = at[-1:] + 1

    def step() -> None:
        token.copy_(forward(token, now))
        now.add_(1)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph, token


def tokens_a_second(config: Any = None) -> Iterator[dict[str, Any]]:
    """Dense and 1:8 in every linear layer but the last, which makes logits; then there too."""
    import transformers

    config = config or transformers.LlamaConfig()  # 7B
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            model: Any = transformers.LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    took: dict[tuple[str, bool], float] = {}
    for name in ("dense", "1:8", "1:8, logits too"):
        if name != "dense":
            exclude = ("lm_head",) if name == "1:8" else ()
            for layer_name, layer in model.named_modules():
                if type(layer) is nn.Linear and layer_name not in exclude:
                    layer.weight.data *= nmflow.mask(layer.weight, "1:8")
            model = nmflow.compress(model, exclude=exclude, measure=False, inplace=True)
            assert any(isinstance(m, PackedLinear) for m in model.modules())
        for joined in (False, True):
            row: dict[str, Any] = {"what": "llama-7b", "pattern": name + ", compiled" * joined}
            try:
                with compiled_rest() if joined else contextlib.nullcontext():
                    one = took[name, joined] = seconds_of(model, config)
                row |= {"tokens_per_s": 1 / one, "packed_us": one * 1e6}
                row["ratio"] = took["dense", joined] / one
            except Exception as problem:  # noqa: BLE001 -- the other rows are worth their time
                row["failed"] = repr(problem)[:200]
            yield row


def seconds_of(model: Any, config: Any) -> float:
    """Seconds of a token."""
    graph, _ = step_graph(model, config)
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(NEW):
        graph.replay()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / NEW


@contextlib.contextmanager
def compiled_rest() -> Iterator[None]:
    """What is between the products, by torch.compile: norms, rotations and activations."""
    from transformers.models.llama import modeling_llama as llama

    @torch.compile(dynamic=False)
    def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return nn.functional.silu(gate) * up

    def feed_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x)))

    norm, rotate = llama.LlamaRMSNorm.forward, llama.apply_rotary_pos_emb
    before = llama.LlamaMLP.forward
    llama.LlamaRMSNorm.forward = torch.compile(norm, dynamic=False)
    llama.apply_rotary_pos_emb = torch.compile(rotate, dynamic=False)
    llama.LlamaMLP.forward = feed_forward
    try:
        yield
    finally:
        llama.LlamaRMSNorm.forward, llama.apply_rotary_pos_emb = norm, rotate
        llama.LlamaMLP.forward = before
