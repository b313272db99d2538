"""Tokens a second of a network of the shape of Llama-2-7B, dense and packed, batch 1."""

from __future__ import annotations

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
    took: dict[str, float] = {}
    for name in ("dense", "1:8", "1:8, logits too"):
        if name != "dense":
            exclude = ("lm_head",) if name == "1:8" else ()
            for layer_name, layer in model.named_modules():
                if type(layer) is nn.Linear and layer_name not in exclude:
                    layer.weight.data *= nmflow.mask(layer.weight, "1:8")
            model = nmflow.compress(model, exclude=exclude, measure=False, inplace=True)
            assert any(isinstance(m, PackedLinear) for m in model.modules())
        graph, _ = step_graph(model, config)
        for _ in range(3):
            graph.replay()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(NEW):
            graph.replay()
        torch.cuda.synchronize()
        took[name] = (time.perf_counter() - start) / NEW
        del graph
        yield {
            "what": "llama-7b", "pattern": name, "tokens_per_s": 1 / took[name],
            "packed_us": took[name] * 1e6, "ratio": took["dense"] / took[name],
        }  # fmt: skip
