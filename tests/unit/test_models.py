"""Presets over real architectures: all of the role, or a reason from a short list of rules."""

from __future__ import annotations

import pytest

import zoo
from survey import Row, row_of

pytest.importorskip("transformers")

# One of each kind of name, storage and block; the slow test builds all types.
REPRESENTATIVE = (
    "bert", "deberta-v2", "modernbert", "distilbert", "longformer", "xlnet", "funnel", "gpt2",
    "gpt_neox", "codegen", "phi3", "llama", "mixtral", "qwen2_moe", "gpt_oss", "llama4_text",
    "deepseek_v3", "jetmoe", "nemotron_h", "mamba", "rwkv", "t5", "clip", "swinv2", "poolformer",
    "siglip",
)  # fmt: skip


def check(row: Row) -> None:
    assert not row.unexplained, f"{row.name}: {row.unexplained}"
    for preset, share in row.shares.items():
        assert share == 1 or row.reasons[preset]


@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_presets_take_all_of_their_role(name):
    row = row_of("transformers", name, zoo.build("transformers", name))
    check(row)
    assert not row.beyond.get("all"), row.beyond  # no router, embedding, pooler or head


@pytest.mark.slow
@pytest.mark.parametrize("library", ["transformers", "timm", "diffusers"])
def test_presets_take_all_of_their_role_in_every_architecture(library):
    try:
        names = getattr(zoo, f"{library}_types")()
    except zoo.NotBuilt as error:
        pytest.skip(str(error))
    built = 0
    for name in names:
        try:
            model = zoo.build(library, name)
        except zoo.NotBuilt:
            continue
        check(row_of(library, name, model))
        built += 1
    assert built > 0.7 * len(names)


def test_experts_are_the_larger_part_of_a_mixture_and_are_taken():
    model = zoo.build("transformers", "qwen2_moe")
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    row = row_of("transformers", "qwen2_moe", model)
    assert experts > row.weights / 2
    assert row.shares["ff"] == 1
