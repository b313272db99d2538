"""What a weight does where its name does not say it: experts, routers, stems and tied heads."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import nmflow
import reference
from models import BY_ID
from nmflow.errors import NMFlowError, NMFlowWarning, PlanError
from nmflow.inspect.record import write_record
from nmflow.pattern import Pattern
from nmflow.select.plan import plan
from nmflow.select.states import layers_of_state
from nmflow.select.weights import layers_of


def roles(model: nn.Module) -> dict[str, str]:
    return {x.name: x.parts[0].role for x in layers_of(model)}


def module(**children: nn.Module) -> nn.Module:
    return nn.ModuleDict(children)


# --- heads ------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.back = nn.Linear(16, 32), nn.Linear(32, 16)


def blocks(count: int) -> nn.ModuleList:
    return nn.ModuleList(Block() for _ in range(count))


@pytest.mark.parametrize("count", [1, 3])
def test_the_last_block_is_no_head_where_the_head_is_tied(count):
    tied = nn.ModuleDict({"table": nn.Embedding(24, 16), "blocks": blocks(count)})
    by_function = {t.name for t in plan(tied, "1:4")}
    assert f"blocks.{count - 1}.back.weight" in by_function
    tied["lm_head"] = nn.Linear(16, 24, bias=False)
    tied["lm_head"].weight = tied["table"].weight
    assert {t.name for t in plan(tied, "1:4")} == by_function
    assert len(by_function) == 2 * count


def test_a_repeated_place_is_no_head_but_the_end_of_a_plain_sequence_is():
    assert {t.name for t in plan(module(blocks=blocks(2)), "1:4")} == {
        f"blocks.{i}.{name}.weight" for i in (0, 1) for name in ("wide", "back")
    }
    plain = module(net=nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)))
    assert {t.name for t in plan(plain, "1:4")} == {"net.0.weight"}


def test_a_head_that_the_model_names_is_one_whatever_it_is_called():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks, self.unembed = blocks(2), nn.Linear(16, 24)

        def get_output_embeddings(self) -> nn.Module:
            return self.unembed

    assert roles(Named())["unembed.weight"] == "head"
    assert roles(Named())["blocks.1.back.weight"] == "other"


# --- stems and routers ------------------------------------------------------------------------


def cnn(channels: int = 3) -> nn.Module:
    """The modules of a plain timm network."""
    block = module(
        conv1=nn.Conv2d(32, 32, 3), conv2=nn.Conv2d(32, 32, 3, groups=32),
        conv3=nn.Conv2d(32, 64, 1),
    )  # fmt: skip
    return module(conv1=nn.Conv2d(channels, 32, 7), layer1=block, fc=nn.Linear(64, 10))


@pytest.mark.parametrize("channels", [1, 3])
def test_all_works_on_a_convolutional_network_as_it_is(channels):
    made = plan(cnn(channels), "1:16")
    assert [t.name for t in made] == ["layer1.conv1.weight", "layer1.conv3.weight"]
    reasons = dict(made.left_out)
    assert "stem" in reasons["conv1.weight"]
    assert "depthwise" in reasons["layer1.conv2.weight"]
    assert "head" in reasons["fc.weight"]
    with pytest.raises(PlanError, match=r"conv1\.weight has an axis of"):
        plan(cnn(channels), "1:16", "conv1")
    assert [t.name for t in plan(cnn(channels), "1:1", "conv1")] == ["conv1.weight"]


def test_what_one_preset_cannot_divide_is_said_with_its_share():
    model = cnn()
    model.get_submodule("layer1").add_module("odd", nn.Conv2d(40, 32, 1))
    with pytest.warns(NMFlowWarning, match=r"'all' leaves out 10\.2%.*odd.*axis of 40"):
        made = plan(model, "1:16")
    assert len(made) == 2
    assert "warning: 'all' leaves out" in str(made)
    with pytest.raises(PlanError, match="axis of 40"):
        plan(model, "1:16", ["*odd*", "all"])
    with pytest.raises(PlanError, match="axis of 40"):
        plan(model, "1:16", remainder="error")
    assert not plan(model, "1:16", exclude="*odd*").warnings
    assert not plan(model, "1:16", remainder="skip").warnings
    assert plan(model, {"*odd*": "1:8", "all": "1:16"})[2].pattern == Pattern("1:8")


def test_a_convolution_that_standardizes_its_weight_is_left_out():
    class StdConv2d(nn.Conv2d):
        pass

    made = plan(module(a=StdConv2d(16, 16, 3), b=nn.Conv2d(16, 16, 3)), "1:4")
    assert [t.name for t in made] == ["b.weight"]
    assert "standardizes" in dict(made.left_out)["a.weight"]


class Router(nn.Module):
    def __init__(self, experts: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, width))


def test_routers_are_told_from_gates_by_their_name_their_class_or_their_width():
    glu = module(gate=nn.Linear(16, 32), up=nn.Linear(16, 32), down=nn.Linear(32, 16))
    moe = module(gate=nn.Linear(16, 4), shared_expert_gate=nn.Linear(16, 1))
    named = roles(module(a=module(mlp=glu), b=module(mlp=moe), c=Router(4, 16)))
    assert [named[f"a.mlp.{x}.weight"] for x in ("gate", "up", "down")] == ["ff"] * 3
    assert named["b.mlp.gate.weight"] == named["b.mlp.shared_expert_gate.weight"] == "router"
    assert named["c.weight"] == "router"
    wide = Stacked({}, num_experts=64)  # more experts than inputs
    wide.gate = nn.Linear(16, 64)
    assert roles(module(mlp=wide)) == {"mlp.gate.weight": "router"}
    narrow = module(gate=nn.Linear(16, 8), up=nn.Linear(16, 8))
    assert set(roles(module(mlp=module(experts=nn.ModuleList([narrow])))).values()) == {"ff"}


# --- experts ----------------------------------------------------------------------------------


class Stacked(nn.Module):
    """A module that holds its experts in parameters; `says` are its attributes."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], **says: object) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(*shape)))
        for name, value in says.items():
            setattr(self, name, value)


SIZES = {"num_experts": 4, "hidden_size": 8, "intermediate_size": 12}
FUSED = {"gate_up_proj": (4, 24, 8), "down_proj": (4, 8, 12)}
TURNED = {"gate_up_proj": (4, 8, 24), "down_proj": (4, 12, 8)}
PAIR = {"w1": (4, 12, 8), "w2": (4, 8, 12)}
SQUARE = {"gate_proj": (4, 8, 8), "down_proj": (4, 8, 8)}
STACKS = [
    ("attribute", SQUARE | {"gate_up_proj_bias": (4, 8)}, {"is_transposed": True}, [1, 1]),
    ("attribute-not", SQUARE, {"is_transposed": False}, [2, 2]),
    ("shapes-of-the-pair", FUSED, {}, [2, 2]),
    ("shapes-of-the-turned-pair", TURNED, {}, [1, 1]),
    ("sizes", PAIR, SIZES, [2, 2]),
    ("sizes-turned", {"w1": (4, 8, 12), "w2": (4, 12, 8)}, SIZES, [1, 1]),
    ("reads-and-writes", {"weight": (4, 12, 8)}, {"input_size": 8, "output_size": 12}, [2]),
    ("unknown", SQUARE, {}, []),
    ("unknown-pair", PAIR, {}, []),
    ("square-sizes", SQUARE, {"hidden_size": 8, "intermediate_size": 8}, []),
]


@pytest.mark.parametrize(
    ("shapes", "says", "axes"), [x[1:] for x in STACKS], ids=[x[0] for x in STACKS]
)
def test_the_axis_of_experts_is_told_and_never_guessed(shapes, says, axes):
    model = module(mlp=module(experts=Stacked(shapes, num_experts=4, **{
        k: v for k, v in says.items() if k != "num_experts"
    })), rest=module(fc1=nn.Linear(8, 8), fc2=nn.Linear(8, 8)))  # fmt: skip
    if axes:
        made = plan(model, "1:4", "ff")
        stacks = [t for t in made if "experts" in t.name]
        assert [t.dim for t in stacks] == axes
        assert all(t.stacked and t.out_dim == 3 - t.dim for t in stacks)
        return
    with pytest.warns(NMFlowWarning, match="'ff' leaves out.*is_transposed"):
        made = plan(model, "1:4", "ff")
    assert not [t for t in made if "experts" in t.name]


def test_experts_that_lie_one_under_the_other_keep_their_groups_apart():
    shapes = {"w1": (4 * 12, 8), "w2": (4 * 12, 8)}  # DBRX
    experts = Stacked(shapes, num_experts=4, hidden_size=8, ffn_hidden_size=12)
    first, second = plan(module(mlp=experts), "1:4")
    assert (first.dim, first.length) == (1, 8)
    assert (second.dim, second.length) == (0, 12)
    with pytest.raises(PlanError, match=r"w2 has an axis of 12, which is not a multiple of M=8"):
        plan(module(mlp=experts), "1:8", "*w2*")


def test_what_is_no_stack_of_experts_is_not_taken_for_one():
    model = module(
        tokens=Stacked({"cls": (1, 1, 8), "table": (4, 8, 8)}), mlp=module(fc=nn.Linear(8, 8))
    )
    made = plan(model, "1:4")
    assert [t.name for t in made] == ["mlp.fc.weight"]
    assert {name for name, _ in made.left_out} == {"tokens.cls", "tokens.table"}


@pytest.mark.parametrize("shapes", [FUSED, TURNED])
def test_a_bare_state_tells_experts_by_the_shapes_of_their_pair(shapes):
    state = {f"layers.0.mlp.experts.{name}": shape for name, shape in shapes.items()}
    model = module(layers=nn.ModuleList([module(mlp=module(experts=Stacked(shapes, **SIZES)))]))
    said = {x.name: (x.dim, x.stacked, x.parts, x.why_not) for x in layers_of_state(state)}
    assert said == {x.name: (x.dim, x.stacked, x.parts, x.why_not) for x in layers_of(model)}


@pytest.mark.parametrize("pattern", ["1:4", "2:4", "1:4@3", "2:4@16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dim", [1, 2])
def test_masks_of_a_stack_are_those_of_each_matrix(pattern, dtype, dim):
    w = torch.randn(3, 8, 12, dtype=dtype)
    kept = nmflow.mask(w, pattern, dim, stacked=True)
    each = torch.stack([nmflow.mask(one, pattern, dim - 1) for one in w])
    assert torch.equal(kept, each)
    assert torch.equal(kept, reference.keep(w, *reference.parse(pattern)[:2], dim,
                                            Pattern(pattern).panel, stacked=True))  # fmt: skip
    assert nmflow.holds(w * kept, pattern, dim, stacked=True)
    assert not nmflow.holds(w, pattern, dim, stacked=True)


@pytest.mark.parametrize("way", ["eager", "batched_mm", "grouped_mm"])
def test_flops_of_experts_are_those_of_the_experts_that_tokens_use(way):
    transformers = pytest.importorskip("transformers")
    if way == "grouped_mm" and not hasattr(torch.ops.aten, "_grouped_mm"):
        pytest.skip("this torch has no grouped product")
    config = transformers.MixtralConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=16, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    model.set_experts_implementation(way)
    tokens = {"input_ids": torch.zeros(1, 6, dtype=torch.long)}
    found = nmflow.cost(model, tokens, "1:4", "ff", recipe="sr-ste", total_steps=1)
    once = 2 * 6 * 2 * (3 * 32 * 64)  # tokens, experts of each, a multiply-add a weight
    assert [row.dense_flops for row in found.rows] == [once * 2 // 3, once // 3]
    assert found.dense_flops - found.flops == once * 3 // 4
    assert found.training_flops == found.dense_step - 2 * (once * 3 // 4)


def test_pruned_experts_are_audited_costed_and_left_dense_by_compress(tmp_path):
    family = BY_ID["experts"]
    model = family.build(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    flow = nmflow.attach(model, optimizer, "sr-ste", "1:4@2", total_steps=2)
    for x in family.batches(2, torch.float32):
        model(x).square().mean().backward()
        optimizer.step()
    flow.finalize()
    assert nmflow.audit(model, "1:4@2").ok
    assert not nmflow.audit(model, "1:8").rows[0].holds
    assert [(row.name, str(row.pattern)) for row in nmflow.audit(model).rows] == [
        ("up_experts.proj", "1:4"), ("down_experts.proj", "1:4")
    ]  # fmt: skip
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    assert write_record(tmp_path, flow.plan, dict(model.named_parameters())) == []
    recorded = nmflow.audit(tmp_path)
    assert recorded.ok
    assert [str(row.pattern) for row in recorded.rows] == ["1:4@2", "1:4@2"]
    found = nmflow.cost(model, torch.zeros(4, 8), "1:4@2")
    weights = 3 * 16 * 8 + 3 * 16 * 4
    assert (found.targeted, found.kept) == (weights, weights // 4)
    assert found.index_bytes == weights // 4 // 2 * 2 // 8  # two bits, once for two rows
    assert found.flops * 4 == found.dense_flops == 2 * 4 * weights
    with pytest.raises(NMFlowError, match="batch of matrices"):
        nmflow.compress(model)
