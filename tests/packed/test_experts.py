"""Experts whose weights are one parameter of three axes stay dense, and nothing of them is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from nmflow import mask
from nmflow.packed import compress, decompress, load, load_state, report_of, save


def network() -> Any:
    return hf.Qwen2MoeForCausalLM(
        hf.Qwen2MoeConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, moe_intermediate_size=32,
            shared_expert_intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, num_experts=4, num_experts_per_tok=2,
        )
    ).eval()  # fmt: skip


@pytest.mark.parametrize("whole", [False, True])
def test_a_mixture_of_experts(whole: bool, tmp_path: Path) -> None:
    model = network()
    for name, p in model.named_parameters():
        if p.ndim == 3:
            p.data = torch.stack([expert * mask(expert, "1:8") for expert in p.data])
        elif p.ndim == 2 and ("attn" in name or "shared_expert." in name) and whole:
            p.data *= mask(p, "1:8")
    if not whole:
        model.lm_head.weight.data *= mask(model.lm_head.weight, "1:8")
    ids = torch.arange(12).view(2, 6)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        want = model(ids).logits
        packed = compress(model, measure=False, example_inputs={"input_ids": ids})
        torch.testing.assert_close(packed(ids).logits, want, atol=1e-5, rtol=1e-5)
        rows = {r.name: r for r in report_of(packed)}
        for name, p in model.named_parameters():
            if p.ndim == 3:
                assert rows[name].kept == "dense"
                assert "batch of matrices" in rows[name].why
        assert len(report_of(packed).packed) == (7 if whole else 1)
        save(packed, tmp_path / "packed")
        save(model, tmp_path / "dense")
        with torch.device("meta"):
            empty = network()
        again = load(tmp_path / "packed", empty).eval()
        assert torch.equal(again(ids).logits, packed(ids).logits)
        for state in (
            decompress(packed).state_dict(),
            decompress(load(tmp_path / "dense", network())).state_dict(),
            load_state(tmp_path / "packed"),
        ):
            assert all(torch.equal(state[k], v) for k, v in before.items())
