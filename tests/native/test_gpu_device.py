"""Packed layers on a real GPU; where there is none these tests are skipped and say so.

What a CPU can show of the same kernels is in `test_gpu_decode.py`.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from test_gpu_decode import MORE, QUICK, TOLERANCE, packed
from test_gpu_int8 import streamed
from torch import Tensor, nn

import nmflow
from nmflow.errors import CompressError
from nmflow.kernels import explain, gpu, gpu_driver, gpu_panels, gpu_plan
from nmflow.kernels.gpu_panels import Group
from nmflow.kernels.reference import apply_epilogue

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")

DTYPES = [torch.bfloat16, torch.float16]


def check(spec: str, out: int, inputs: int, tokens: int, dtype: torch.dtype, epilogue: int) -> None:
    shape, *buffers = packed(spec, out, inputs, dtype)
    x, b = torch.randn(tokens, inputs).to(dtype).cuda(), torch.randn(out).to(dtype).cuda()
    w, values, codes = (t.cuda() for t in buffers)
    y = gpu.matmul(x, values, codes, b, shape, epilogue)
    want = apply_epilogue(x.double() @ w.double().t() + b.double(), epilogue)
    size = x.double().abs() @ w.double().abs().t() + b.double().abs()
    assert ((y.double() - want).abs() <= TOLERANCE[dtype] * size).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("spec", "out", "inputs", "tokens"), QUICK + MORE)
def test_products(spec: str, out: int, inputs: int, tokens: int, dtype: torch.dtype) -> None:
    for epilogue in (0, 1, 2):
        check(spec, out, inputs, tokens, dtype, epilogue)


@pytest.mark.parametrize("spec", ["1:16", "2:4", "1:16@16", "1:16@64", "1:8@128", "1:32@64"])
@pytest.mark.parametrize(("out", "inputs"), [(4096, 4096), (1000, 1152)])
@pytest.mark.parametrize("tokens", [1, 16, 64, 65, 300, 2048])
def test_layers_of_networks(spec: str, out: int, inputs: int, tokens: int) -> None:
    check(spec, out, inputs, tokens, torch.bfloat16, 1)


# Warps, slices, row tiles, shares, stages.
CUTS = {
    "decode": [(4, 1, 1, 1, 3), (8, 4, 2, 2, 2), (16, 1, 1, 4, 4)],
    "groups": [(4, 1, 1, 1, 3), (8, 2, 1, 1, 3), (16, 1, 1, 4, 2), (16, 4, 1, 1, 3)],
    "ready": [
        (4, 1, 1, 1, 3),
        (16, 1, 2, 1, 2),
        (8, 2, 1, 1, 3),
        (16, 1, 1, 4, 2),
        (16, 1, 1, 1, 3),
    ],
    "lookup": [(4, 1, 1, 1, 4), (8, 2, 1, 1, 4), (16, 8, 1, 1, 4), (16, 2, 1, 4, 2)],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", ["1:16", "1:8", "1:4", "2:4", "1:32", "4:16"])
@pytest.mark.parametrize("kind", CUTS)
def test_plans_that_are_not_taken_are_right_too(kind: str, spec: str, dtype: torch.dtype) -> None:
    """A benchmark may find one of them to be the fastest; also with a tail of rows."""
    shape, *buffers = packed(spec, 1000, 2048, dtype)
    w, values, codes = (t.cuda() for t in buffers)
    before, card, ran = gpu._planned, gpu_driver.driver(0).card, 0
    try:
        for i, tokens in enumerate((1, 7, 16, 33, 64)):
            x, b = torch.randn(tokens, 2048).to(dtype).cuda(), torch.randn(1000).to(dtype).cuda()
            want = (x.double() @ w.double().t() + b.double()).relu()
            size = x.double().abs() @ w.double().abs().t() + b.double().abs()
            for numbers in CUTS[kind][i % 2 :: 2]:
                half = dtype == torch.float16
                plan = gpu_plan.make(shape, half, tokens, card, *numbers, kind=kind)
                if plan is None:
                    continue
                gpu._planned = lambda *args, plan=plan: plan  # pyright: ignore
                y = gpu.matmul(x, values, codes, b, shape, 2)
                wrong = (y.double() - want).abs() > TOLERANCE[dtype] * size
                assert not wrong.any(), (tokens, numbers, int(wrong.sum()))
                ran += 1
    finally:
        gpu._planned = before
    assert ran or (kind in gpu_plan.OF_GROUPS and not card.groups)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", ["1:16@64", "1:8@128", "2:8@64", "1:12@192", "1:32@64"])
def test_panels_by_warp_groups(spec: str, dtype: torch.dtype) -> None:
    """Every shape of a block; x as it comes, and as it is when its tokens lie side by side."""
    card, inputs = gpu_driver.driver(0).card, 960
    if not card.groups:
        pytest.skip("this card has no products of warp groups")
    ran = 0
    for out, tokens, epilogue in ((520, 700, 0), (385, 72, 2), (256, 513, 1)):
        shape, *buffers = packed(spec, out, inputs, dtype)
        w, values, codes = (t.cuda() for t in buffers)
        x, b = torch.randn(tokens, inputs).to(dtype).cuda(), torch.randn(out).to(dtype).cuda()
        side = torch.nn.functional.pad(x.t(), (0, -tokens % 8)).contiguous()[:, :tokens].t()
        want = apply_epilogue(x.double() @ w.double().t() + b.double(), epilogue)
        size = x.double().abs() @ w.double().abs().t() + b.double().abs()
        for cut in [
            Group(64, 256, 2, 32, 4, 2), Group(64, 256, 1, 32, 3, 3), Group(64, 128, 1, 64, 3, 2),
            Group(64, 512, 4, 32, 3, 1), Group(128, 256, 2, 32, 4, 1), Group(128, 128, 1, 32, 3, 2),
        ]:  # fmt: skip
            if not gpu_panels.shared_bytes(shape, cut, card):
                continue
            for one in (x, side):
                y = gpu_panels.matmul(one, values, codes, b, shape, epilogue, cut)
                wrong = (y.double() - want).abs() > TOLERANCE[dtype] * size
                assert not wrong.any(), (out, tokens, cut, int(wrong.sum()))
                ran += 1
    assert ran


def _network(dtype: torch.dtype = torch.bfloat16) -> Any:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(512, 1024), nn.GELU(), nn.Linear(1024, 512)).to(dtype)
    for layer in (model[0], model[2]):
        layer.weight.data *= nmflow.mask(layer.weight, "1:16")
    return model.eval()


def _near(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a.float().cpu(), b.float().cpu(), rtol=2e-2, atol=2e-2)


def test_moved_saved_and_unpacked(tmp_path: Path) -> None:
    model = _network()
    on_cpu = nmflow.compress(model, measure=False)
    moved = copy.deepcopy(on_cpu).cuda()
    x = torch.randn(5, 512).bfloat16()
    _near(moved(x.cuda()), model(x))
    assert {choice.backend for _, choice in explain(moved, x.cuda())} == {"cuda"}
    nmflow.save(moved, tmp_path / "packed")
    again = nmflow.load(tmp_path / "packed", _network().cuda())
    assert torch.equal(again(x.cuda()), moved(x.cuda()))
    back = nmflow.decompress(moved)
    assert torch.equal(back[0].weight.cpu(), model[0].weight)
    moved.load_state_dict({k: v.cuda() for k, v in on_cpu.state_dict().items()})


def test_compress_measures_on_the_gpu() -> None:
    model = _network().cuda()
    packed = nmflow.compress(model, tokens=(1, 16))
    for row in nmflow.report_of(packed):
        assert set(row.times) == {1, 16}
        assert all(took > 0 for took, best, _ in row.times.values() for took in (took, best))
    big: Any = nn.Sequential(nn.Linear(4096, 11008, dtype=torch.bfloat16, device="cuda"))
    big[0].weight.data *= nmflow.mask(big[0].weight, "1:16")
    (row,) = nmflow.report_of(nmflow.compress(big, tokens=(1,)))
    print(row)
    assert row.kept == "packed"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "spec", ["1:4", "2:4", "1:8", "1:16", "1:32", "3:8", "1:16@16", "1:16@64", "1:8@4"]
)
def test_products_of_values_of_8_bits(spec: str, dtype: torch.dtype) -> None:
    """One rounding of y; of many tokens W is rounded too. With a tail of rows."""
    for out, inputs in ((1000, 1024), (520, 2048)):
        shape, w, stream = streamed(spec, out, inputs)
        w, stream = w.cuda(), stream.cuda()
        for tokens, roundings in ((1, 1), (3, 1), (8, 1), (16, 1), (33, 1), (64, 1), (300, 3)):
            x, b = torch.randn(tokens, inputs).to(dtype).cuda(), torch.randn(out).to(dtype).cuda()
            y = gpu.matmul_int8(x, stream, b, shape, 1)
            want = apply_epilogue(x.double() @ w.double().t() + b.double(), 1)
            size = x.double().abs() @ w.double().abs().t() + b.double().abs()
            wrong = (y.double() - want).abs() > roundings * TOLERANCE[dtype] * size
            assert not wrong.any(), (out, tokens, int(wrong.sum()))


def test_networks_with_values_of_8_bits(tmp_path: Path) -> None:
    """Packed here or on a CPU: moved, saved, explained, unpacked, compiled, in graphs."""
    on_cpu = nmflow.compress(_network(), values="int8", measure=False)
    moved = copy.deepcopy(on_cpu).cuda()
    x = torch.randn(5, 512, device="cuda", dtype=torch.bfloat16)
    dense = nmflow.decompress(moved)
    with torch.no_grad():
        want = moved(x)
        _near(want, dense(x))
        here = nmflow.compress(_network().cuda(), values="int8", measure=False)
        assert torch.equal(here(x), want)
        assert {choice.backend for _, choice in explain(moved, x)} == {"cuda"}
        nmflow.save(moved, tmp_path / "packed")
        assert torch.equal(nmflow.load(tmp_path / "packed", _network().cuda())(x), want)
        graph = torch.cuda.CUDAGraph()
        moved(x)
        with torch.cuda.graph(graph):
            y = moved(x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(y, moved(x))
        _near(torch.compile(moved, fullgraph=True)(x), y)
        many = torch.randn(300, 512, device="cuda", dtype=torch.bfloat16)
        _near(moved(many), dense(many))
        with torch.autocast("cuda", dtype=torch.bfloat16):
            wide = copy.deepcopy(moved).float()(x.float())
        assert wide.dtype == torch.bfloat16
        _near(wide, y)
    given = x.clone().requires_grad_()
    moved(given).float().square().sum().backward()
    assert given.grad is not None


def test_inputs_of_8_bits_are_refused() -> None:
    model = _network().cuda()
    with pytest.raises(CompressError, match=r"activations is 'int8' and the model is on cuda"):
        nmflow.compress(model, values="int8", activations="int8")
    both = nmflow.compress(model.cpu(), values="int8", activations="int8", measure=False).cuda()
    x = torch.randn(1, 512, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(CompressError, match=r"activations is 'int8' and x is on cuda.*the CPU"):
        both(x)


def test_gradients_and_autocast() -> None:
    model = _network()
    packed = nmflow.compress(model, measure=False).cuda()
    x = torch.randn(3, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    packed(x).float().square().sum().backward()
    assert x.grad is not None
    other = x.detach().clone().requires_grad_()
    model.cuda()(other).float().square().sum().backward()
    _near(x.grad, other.grad)  # pyright: ignore
    with torch.autocast("cuda", dtype=torch.float16):
        assert packed(x).dtype == torch.float16


def test_cuda_graphs_and_streams() -> None:
    packed = nmflow.compress(_network(), measure=False).cuda()
    still = torch.randn(4, 512, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            packed(still)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = packed(still)
        for _ in range(3):
            still.copy_(torch.randn_like(still))
            graph.replay()
            assert torch.equal(y, packed(still))


def test_a_first_call_may_be_in_a_capture() -> None:
    packed = nmflow.compress(_network(torch.float16), measure=False).cuda()
    x = torch.randn(31, 512, device="cuda", dtype=torch.float16)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = packed(x)
    graph.replay()
    with torch.no_grad():
        assert torch.equal(y, packed(x))


def test_compiled_with_graphs() -> None:
    packed = nmflow.compress(_network(), measure=False).cuda()
    compiled = torch.compile(packed, mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        for _ in range(4):
            x = torch.randn(4, 512, device="cuda", dtype=torch.bfloat16)
            _near(compiled(x).clone(), packed(x))


@pytest.mark.parametrize("kind", ["LlamaForCausalLM", "Qwen2ForCausalLM", "GPT2LMHeadModel"])
def test_generate(kind: str) -> None:
    transformers: Any = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    config = getattr(transformers, kind).config_class(
        vocab_size=128, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, n_embd=256, n_layer=2, n_head=4,
    )  # fmt: skip
    model = getattr(transformers, kind)(config).bfloat16().eval()
    linear = [p for n, p in model.named_parameters() if p.ndim == 2 and "emb" not in n]
    for weight in linear:
        dim = 0 if kind.startswith("GPT2") else 1
        if weight.shape[dim] % 16 == 0 and weight.shape[0] != 128:
            weight.data *= nmflow.mask(weight, "1:16", dim=dim)
    packed = nmflow.compress(model, measure=False).cuda()
    dense = nmflow.decompress(packed)
    prompt = torch.randint(0, 128, (1, 9), device="cuda")
    with torch.no_grad():
        _near(packed(prompt).logits, dense(prompt).logits)
        made = packed.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert made.shape == (1, 17)


def _pruned_network(model: Any) -> Any:
    """Every linear layer whose inputs 16 divides holds 1:16."""
    model = model.bfloat16().eval()
    for module in model.modules():
        if type(module) is nn.Linear and module.in_features % 16 == 0:
            module.weight.data *= nmflow.mask(module.weight, "1:16")
    return model


def test_vit_and_t5() -> None:
    transformers: Any = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        image_size=32, patch_size=8,
    )  # fmt: skip
    packed = nmflow.compress(_pruned_network(transformers.ViTModel(config)), measure=False).cuda()
    dense = nmflow.decompress(packed)
    pixels = torch.randn(3, 3, 32, 32, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        _near(packed(pixels).last_hidden_state, dense(pixels).last_hidden_state)
    config = transformers.T5Config(
        vocab_size=128, d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    model = _pruned_network(transformers.T5ForConditionalGeneration(config))
    packed = nmflow.compress(model, measure=False).cuda()
    dense = nmflow.decompress(packed)
    prompt = torch.randint(2, 128, (2, 9), device="cuda")
    with torch.no_grad():
        logits = (one(input_ids=prompt, decoder_input_ids=prompt).logits for one in (packed, dense))
        _near(*logits)
        made = packed.generate(prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert made.shape == (2, 7)
