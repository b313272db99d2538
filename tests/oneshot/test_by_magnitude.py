"""`prune` by magnitude: every family by the reference; adapters on a sparse base, and merged."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import nmflow
import reference
from harness import Run, assert_same, parameters_of
from models import FAMILIES, MLP, Family
from nmflow.errors import CompressError, FlowError, PlanError, WeightError
from settings import BY_ID


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.id)
def test_every_family_by_the_reference(family: Family) -> None:
    model, n_m = family.build(), reference.parse(family.pattern)
    for p in model.parameters():
        p.requires_grad_(False)  # frozen weights too
    before = parameters_of(model)
    pruned = nmflow.prune(model, family.pattern, family.include)
    assert {target.name for target in pruned.plan} == set(family.targets)
    after = parameters_of(model)
    for name, weight in before.items():
        want = weight.clone()
        spec = family.targets.get(name)
        if spec is not None:
            n, m, panel = n_m
            rows = reference.rows_of(weight, spec)
            kept = reference.keep(rows, n, m, spec.dim, panel, spec.stacked)
            reference.rows_of(want, spec).copy_(torch.where(kept, rows, 0.0))
        assert torch.equal(after[name], want), name
    nmflow.prune(model, family.pattern, family.include)
    assert_same(parameters_of(model), after)  # once more changes nothing


def test_it_ends_where_a_run_at_rate_0_ends() -> None:
    run = Run(MLP, BY_ID["mdgf-linear"])
    other = MLP.build()
    nmflow.prune(other, MLP.pattern, MLP.include)
    run.flow.finalize()
    assert_same(parameters_of(other), parameters_of(run.model))


def test_what_it_refuses_changes_nothing() -> None:
    run = Run(MLP, BY_ID["mdgf-linear"])
    bad = MLP.build()
    with torch.no_grad():
        bad.get_parameter("2.weight")[0, 0] = float("nan")
    for model, include, kind, words in (
        (run.model, "*", FlowError, r"0\.weight.*finalize"),
        (bad, "*", WeightError, r"2\.weight"),
        (MLP.build(), "nothing.*", PlanError, "nothing"),
    ):
        before = parameters_of(model)
        with pytest.raises(kind, match=words):
            nmflow.prune(model, MLP.pattern, include)
        for name, weight in before.items():
            assert torch.equal(model.get_parameter(name).nan_to_num(), weight.nan_to_num())


# -- adapters ----------------------------------------------------------------------------------


def adapted() -> tuple[nn.Module, Any]:
    """A Llama of one layer at 1:8, and the same one with LoRA on it that was trained a little."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    base = transformers.LlamaForCausalLM(config)
    nmflow.prune(base, "1:8", "ff")
    lora = peft.LoraConfig(r=4, target_modules=["up_proj", "down_proj", "q_proj"])
    model = peft.get_peft_model(copy.deepcopy(base), lora)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    tokens = torch.arange(32).reshape(2, 16)
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    return base, model.eval()


def test_adapters_leave_a_sparse_base_as_it_is() -> None:
    base, model = adapted()
    assert nmflow.audit(model, "1:8", include="ff").ok
    kept = {n.replace(".base_layer", ""): p for n, p in model.get_base_model().named_parameters()}
    for name, weight in base.named_parameters():
        assert torch.equal(kept[name], weight)
    with pytest.raises(PlanError, match="adapters train"):
        nmflow.attach(model, torch.optim.SGD(model.parameters()), total_steps=9)
    tokens = torch.arange(16)[None]
    with torch.no_grad():
        want = model(input_ids=tokens).logits
        packed = nmflow.compress(model, "1:8", include="ff")
        torch.testing.assert_close(packed(input_ids=tokens).logits, want, rtol=1e-3, atol=1e-4)


def test_merging_alone_loses_the_pattern_and_merge_keeps_it() -> None:
    from nmflow.integrations.adapters import merge

    _, model = adapted()
    before = parameters_of(model)
    plain = copy.deepcopy(model).merge_and_unload()
    assert not nmflow.audit(plain, "1:8", include="ff").ok
    merged = merge(model, "1:8", include="ff")
    assert nmflow.audit(merged, "1:8", include="ff").ok
    assert_same(parameters_of(model), before)
    for name, dense in plain.named_parameters():
        weight = merged.get_parameter(name)
        if "mlp" in name:
            kept = reference.keep(dense, 1, 8)
            assert torch.equal(weight, torch.where(kept, dense, 0.0))
        else:
            assert torch.equal(weight, dense)
    again = merge(model, "1:8", include="ff", inplace=True)
    assert_same(parameters_of(again), parameters_of(merged))
    with pytest.raises(FlowError, match="no adapters"):
        merge(merged, "1:8")


def test_a_packed_base_saves_adapters_alone_and_never_for_a_config_that_has_none(
    tmp_path: Path,
) -> None:
    from nmflow.integrations.adapters import merge

    base, model = adapted()
    peft = pytest.importorskip("peft")
    tokens = torch.arange(16)[None]
    packed = nmflow.compress(model, "1:8", include="ff", measure=False)
    packed.save_pretrained(tmp_path / "adapters")
    written = [file.name for file in (tmp_path / "adapters").iterdir()]
    assert "adapter_model.safetensors" in written
    assert not any(name.startswith(("config", "weights", "model")) for name in written)
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapters").eval()
    with torch.no_grad():
        got, want = (m(input_ids=tokens).logits for m in (again, model))
    assert torch.equal(got, want)

    nmflow.save(packed, tmp_path / "all")
    assert not (tmp_path / "all" / "config.json").exists()
    loaded = nmflow.load(tmp_path / "all", copy.deepcopy(model)).eval()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=tokens).logits, packed(input_ids=tokens).logits)

    inside = packed.get_base_model()
    with pytest.raises(CompressError, match="which its config does not build"):
        inside.save_pretrained(tmp_path / "inside")
    nmflow.save(inside, tmp_path / "inside")
    assert not (tmp_path / "inside" / "config.json").exists()
    with pytest.raises(FlowError, match="is packed"):
        merge(packed, "1:8", include="ff", inplace=True)


def test_a_trained_copy_that_is_packed_is_not_saved_as_an_adapter(tmp_path: Path) -> None:
    base, _ = adapted()
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["down_proj"])
    packed = nmflow.compress(peft.get_peft_model(base, config), measure=False)
    with pytest.raises(CompressError, match="save_pretrained"):
        packed.save_pretrained(tmp_path)
    nmflow.decompress(packed).save_pretrained(tmp_path)
