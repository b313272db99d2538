"""A packed network loaded into an architecture on `meta` is the one that was saved."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from nmflow.errors import CompressError
from nmflow.packed import compress, load, save
from pruned import prune

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
IDS = {"input_ids": torch.arange(12).view(2, 6) + 3}
PIXELS = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)}
MODELS: dict[str, tuple[Callable[[], Any], dict[str, Tensor]]] = {
    "bert": (lambda: hf.BertForSequenceClassification(hf.BertConfig(**SMALL)), IDS),
    "vit": (
        lambda: hf.ViTForImageClassification(
            hf.ViTConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=4, image_size=32, patch_size=8)
        ),
        PIXELS,
    ),
    "t5": (
        lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=64,
                        decoder_start_token_id=0)
        ),
        {**IDS, "decoder_input_ids": IDS["input_ids"]},
    ),
    "llama": (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, num_key_value_heads=2)), IDS),
    "llama scaled": (
        lambda: hf.LlamaForCausalLM(
            hf.LlamaConfig(
                **SMALL, num_key_value_heads=2,
                rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 500.0},
            )
        ),
        IDS,
    ),
    "qwen2": (lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**SMALL, num_key_value_heads=2)), IDS),
    "gpt2": (
        lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=16, vocab_size=64,
                          bos_token_id=0, eos_token_id=0)
        ),
        IDS,
    ),
    "modernbert": (
        lambda: hf.ModernBertForMaskedLM(
            hf.ModernBertConfig(
                **SMALL, cls_token_id=1, sep_token_id=2, global_attn_every_n_layers=2
            )
        ),
        IDS,
    ),
    "swin": (
        lambda: hf.SwinForImageClassification(
            hf.SwinConfig(image_size=32, patch_size=2, embed_dim=16, depths=[2, 2],
                          num_heads=[2, 4], window_size=4)
        ),
        PIXELS,
    ),
    "a network of one": (lambda: Head(hf.BertModel(hf.BertConfig(**SMALL))), IDS),
}  # fmt: skip


class Head(nn.Module):
    """No network of transformers itself, but built around one."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(32, 8)

    def forward(self, **inputs: Tensor) -> tuple[Tensor]:
        return (self.head(self.body(**inputs)[0]),)


def on_meta(make: Callable[[], Any]) -> Any:
    with torch.device("meta"):
        return make()


def empty_weights(make: Callable[[], Any]) -> Any:
    with accelerate.init_empty_weights():
        return make()


def empty_all(make: Callable[[], Any]) -> Any:
    with accelerate.init_empty_weights(include_buffers=True):
        return make()


@pytest.mark.parametrize("name", MODELS)
def test_networks_on_meta(name: str, tmp_path: Path) -> None:
    make, inputs = MODELS[name]
    packed = compress(prune(make()), measure=False)
    with torch.no_grad():
        want = packed(**inputs)[0]
        save(packed, tmp_path)
        for build in (on_meta, empty_weights, empty_all):
            model, drawn = build(make), torch.get_rng_state()
            again = load(tmp_path, model).eval()
            assert torch.equal(torch.get_rng_state(), drawn)
            assert torch.equal(again(**inputs)[0], want), build.__name__
            assert not [n for n, t in [*again.named_parameters(), *again.named_buffers()]
                        if t.is_meta]  # fmt: skip
            assert not again.load_state_dict(packed.state_dict()).missing_keys
        half = load(tmp_path, on_meta(lambda: make().half())).eval()
        assert torch.equal(half(**inputs)[0], load(tmp_path, make().half()).eval()(**inputs)[0])


class Positions(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.fc = nn.Linear(32, 8)
        self.register_buffer("ids", torch.arange(size), persistent=False)
        self.scale = torch.tensor(2.0)


@pytest.mark.parametrize("again", [lambda: Positions(3), lambda: nn.Sequential(Positions(3))])
def test_what_nothing_rebuilds_is_named_and_the_model_left_alone(
    again: Callable[[], Any], tmp_path: Path
) -> None:
    save(compress(prune(again()), measure=False), tmp_path)
    model = on_meta(again)
    with pytest.raises(CompressError, match=r"scale, .*ids.* on meta .*build the model on the CPU"):
        load(tmp_path, model)
    assert all(p.is_meta for p in model.parameters())
    load(tmp_path, again())


def test_what_is_tied_in_the_file_is_tied_again(tmp_path: Path) -> None:
    make, _ = MODELS["gpt2"]
    save(compress(prune(make()), measure=False), tmp_path)
    for build in (on_meta, empty_weights):
        again = load(tmp_path, build(make))
        assert again.lm_head.weight is again.transformer.wte.weight


@pytest.mark.slow
def test_a_load_into_meta_holds_little_more_than_the_packed_network(tmp_path: Path) -> None:
    made = textwrap.dedent("""
        import sys, threading, torch, nmflow
        from torch import nn
        torch.set_num_threads(1)

        def make():
            return nn.Sequential(*[nn.Linear(1024, 4096, bias=False) for _ in range(24)])

        def held():
            for line in open("/proc/self/status"):
                if line.startswith("RssAnon"):
                    return int(line.split()[1]) * 1024

        folder = sys.argv[1]
        if sys.argv[2] == "save":
            model = make()
            for layer in model:
                layer.weight.data *= nmflow.mask(layer.weight, "1:8")
            nmflow.save(model, folder)
            raise SystemExit
        with torch.device("meta"):
            model = make()
            small = nn.Sequential(nn.Linear(64, 32))
        start = most = held()
        done = False

        def watch():
            global most
            while not done:
                most = max(most, held())

        thread = threading.Thread(target=watch)
        sys.setswitchinterval(1e-4)
        thread.start()
        packed = nmflow.load(folder, model)
        done = True
        thread.join()
        size = sum(b.nbytes for b in packed.buffers())
        layer = 1024 * 4096 * 4
        print((most - start - layer) / size)
        assert most - start <= 1.2 * size + layer, ((most - start) / size, layer / size)
    """)
    for what in ("save", "load"):
        run = subprocess.run(
            [sys.executable, "-c", made, str(tmp_path), what], capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr[-1000:]
    print(run.stdout)
