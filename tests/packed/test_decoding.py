"""Decoding: packed language models give the masked dense one's tokens, in torch and onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from networks_of_hf import MODELS, SMALL
from nmflow import native
from nmflow.errors import CompressError
from nmflow.packed import OnnxDecoder, compress, export_decoder
from nmflow.packed.modules import PackedLinear
from pruned import prune

NETWORKS: dict[str, Any] = {
    "llama": MODELS["llama"][0],
    "llama, one matrix for words and head": lambda: hf.LlamaForCausalLM(
        hf.LlamaConfig(**SMALL, num_key_value_heads=2, tie_word_embeddings=True)
    ),
    "qwen3": lambda: hf.Qwen3ForCausalLM(
        hf.Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8)
    ),
    "gpt2": MODELS["gpt2"][0],
}
PROMPT = torch.tensor([[5, 9, 33, 7], [60, 3, 3, 12]])
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"do_sample": True, "temperature": 1.5, "top_k": 20, "top_p": 0.9},
    "beams": {"num_beams": 3},
}


def pruned(name: str) -> Any:
    torch.manual_seed(0)
    model = NETWORKS[name]()
    for parameter in model.parameters():  # steeper, so that no two tokens are nearly as likely
        parameter.data *= 4 if parameter.ndim == 2 else 1
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    words = model.get_input_embeddings().weight.detach().clone()
    prune(model)
    if tied:
        model.get_input_embeddings().weight.data.copy_(words)
    return model


@pytest.mark.parametrize("how", SAMPLINGS)
@pytest.mark.parametrize("name", NETWORKS)
def test_generate_gives_the_tokens_of_the_masked_dense_network(name: str, how: str) -> None:
    dense = pruned(name)
    packed = compress(dense, measure=False)
    blocks = [m for path, m in packed.named_modules() if ".layers." in path or ".h." in path]
    assert not any(isinstance(m, nn.Linear) for m in blocks), "every linear layer is packed"
    tied = dense.lm_head.weight is dense.get_input_embeddings().weight
    assert isinstance(packed.lm_head, PackedLinear) != tied
    ways = {"max_new_tokens": 10, "min_new_tokens": 10, "pad_token_id": 0, **SAMPLINGS[how]}
    texts = []
    for model in (dense, packed):
        torch.manual_seed(7)
        texts.append(model.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), **ways))
    assert texts[0].shape == (2, 14)
    assert torch.equal(*texts)
    with torch.no_grad():  # and with the cache as without
        again = packed(texts[1], use_cache=False).logits[:, -2].argmax(-1)
    if how == "greedy":
        assert torch.equal(again, texts[1][:, -1])


pytest_onnx = pytest.mark.skipif(not native.available(), reason=native.why_not())


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
    packed = compress(pruned("llama"), measure=False)
    return packed, export_decoder(packed, tmp_path_factory.mktemp("step") / "step.onnx")


def sample(seed: int) -> Any:
    draw = torch.Generator().manual_seed(seed)
    return lambda logits: torch.multinomial(logits.softmax(-1), 1, generator=draw)[:, 0]


def by_hand(model: Any, text: Tensor, steps: int, choose: Any) -> Tensor:
    """Without a cache: the whole text anew for every token."""
    for _ in range(steps):
        with torch.no_grad():
            logits = model(text, use_cache=False).logits[:, -1]
        text = torch.cat([text, choose(logits)[:, None]], 1)
    return text


@pytest_onnx
def test_onnxruntime_decodes_as_torch(written: tuple[Any, Path]) -> None:
    packed, path = written
    decoder = OnnxDecoder(path, threads=1)
    for text in (PROMPT, PROMPT[:1, :1]):
        greedy = decoder.generate(text, 9)
        assert torch.equal(greedy, by_hand(packed, text, 9, lambda z: z.argmax(-1)))
        assert torch.equal(
            decoder.generate(text, 9, choose=sample(3)), by_hand(packed, text, 9, sample(3))
        )
    stop = int(greedy[0, 3])
    stopped = decoder.generate(PROMPT[:1, :1], 9, stop=stop)
    assert stopped.tolist() == greedy[:, : stopped.shape[1]].tolist()
    assert int(stopped[0, -1]) == stop
    decoder.reset()
    with torch.no_grad():  # a text given in pieces
        want = packed(PROMPT).logits[:, -1]
    decoder.step(PROMPT[:, :3])
    for wrong in (PROMPT[:, 3:].int(), PROMPT[:1, 3:]):
        with pytest.raises(CompressError, match=r"input_ids is .*, which does not go on .*reset"):
            decoder.step(wrong)
    torch.testing.assert_close(decoder.step(PROMPT[:, 3:]), want, atol=1e-4, rtol=1e-4)


@pytest_onnx
@pytest.mark.parametrize("held", [None, b"no network"])
def test_a_file_that_onnxruntime_does_not_open(held: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "step.onnx"
    if held is not None:
        path.write_bytes(held)
    with pytest.raises(CompressError, match=r"path is '.*step\.onnx', which onnxruntime does not"):
        OnnxDecoder(path)


@pytest_onnx
@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama, one matrix for words and head", "qwen3", "gpt2"])
def test_every_kind_decodes_in_onnxruntime(name: str, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="the extra onnx is not installed")
    packed = compress(pruned(name), measure=False)
    want = by_hand(packed, PROMPT, 8, lambda z: z.argmax(-1))
    with torch.no_grad():
        logits = packed(PROMPT).logits[:, -1]
    for head in ("float32", "int8"):
        path = export_decoder(packed, tmp_path / f"{head}.onnx", head=head)
        kinds = {node.op_type for node in onnx.load(path).graph.node}
        dense_head = not isinstance(packed.lm_head, PackedLinear)
        assert ("MatMulInteger" in kinds) == (head == "int8" and dense_head)
        decoder = OnnxDecoder(path, threads=1)
        near = (decoder.step(PROMPT) - logits).abs().max() / logits.abs().max()
        assert near < (1e-5 if head == "float32" else 0.05)
        if head == "float32":
            assert torch.equal(decoder.generate(PROMPT, 8), want)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["float32.onnx", "int8.onnx"]
    dense = export_decoder(pruned(name), tmp_path / "dense.onnx", packed=False)
    assert torch.equal(OnnxDecoder(dense, threads=1).generate(PROMPT, 8), want)
    for opset in (20, 23):
        path = export_decoder(packed, tmp_path / f"{opset}.onnx", opset=opset)
        kinds = {node.op_type for node in onnx.load(path).graph.node}
        assert ("Attention" in kinds) == (opset == 23)
        assert torch.equal(OnnxDecoder(path, threads=1).generate(PROMPT, 8), want)


def test_what_is_no_language_model_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
    with pytest.raises(CompressError, match="head is 'int4'"):
        export_decoder(nn.Linear(8, 8), tmp_path / "a.onnx", head="int4")
    with pytest.raises(CompressError, match="opset is 11: give one from 18 to 23"):
        export_decoder(nn.Linear(8, 8), tmp_path / "a.onnx", opset=11)
    with pytest.raises(CompressError, match="no packed layer"):
        export_decoder(pruned("llama"), tmp_path / "a.onnx")
    packed = compress(prune(nn.Sequential(nn.Linear(32, 16))), measure=False)
    with pytest.raises(CompressError, match="model is Sequential: give a causal language model"):
        export_decoder(packed, tmp_path / "a.onnx")
    t5 = compress(prune(MODELS["t5"][0]()).eval(), measure=False)
    with pytest.raises(CompressError, match="ForConditionalGeneration: give a causal language"):
        export_decoder(t5, tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_experts_that_onnx_has_no_product_for_are_gathered(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
    torch.manual_seed(0)
    sizes = SMALL | {"num_key_value_heads": 2, "num_local_experts": 3, "eos_token_id": None}
    config = hf.MixtralConfig(**sizes)
    packed = compress(prune(hf.MixtralForCausalLM(config)).eval(), measure=False)
    was = packed.config._experts_implementation
    path = export_decoder(packed, tmp_path / "a.onnx")
    assert packed.config._experts_implementation == was
    want = packed.generate(PROMPT, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(OnnxDecoder(path, threads=1).generate(PROMPT, 8), want)
