"""Packed folders where networks are served: memory, HTTP, timm, sentence-transformers."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import textwrap
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers as hf

import nmflow
from networks_of_hf import SMALL
from nmflow.errors import ConfigError
from nmflow.packed.build import PACKED
from pruned import prune

EXAMPLES = Path(__file__).parents[2] / "examples"


def count(model: torch.nn.Module) -> int:
    return sum(isinstance(m, PACKED) for m in model.modules())


def classifier(folder: Path) -> Any:
    """A tiny packed classifier with its tokenizer in a folder."""
    torch.manual_seed(0)
    model = hf.BertForSequenceClassification(hf.BertConfig(**SMALL)).eval()
    packed = nmflow.compress(prune(cast(Any, model)), measure=False)
    packed.save_pretrained(folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij"]
    (folder / "vocab.txt").write_text("\n".join(words))
    hf.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return packed


@pytest.mark.slow
def test_the_peak_of_a_load_is_little_above_the_packed_network(tmp_path: Path) -> None:
    """The peak of a child's resident memory, above its start: 1.2 of the network and one layer."""
    code = textwrap.dedent("""
        import resource, sys, torch, transformers, nmflow
        from transformers.models.llama.modeling_llama import LlamaForCausalLM
        import nmflow.integrations.pretrained, nmflow.integrations.quantizer
        torch.set_num_threads(1)
        folder, what = sys.argv[1:]
        config = transformers.LlamaConfig(
            vocab_size=256, hidden_size=1024, intermediate_size=4096, num_hidden_layers=16,
            num_attention_heads=16, num_key_value_heads=16,
        )
        if what == "save":
            with torch.device("meta"):
                model = LlamaForCausalLM(config)
            model = model.to_empty(device="cpu")
            for weight in model.parameters():
                weight.data.normal_(0, 0.02)
            for layer in model.model.layers:
                for weight in layer.parameters():
                    if weight.ndim == 2:
                        weight.data *= nmflow.mask(weight, "1:8")
            nmflow.save(model, folder, "1:8", include="all")
            raise SystemExit
        small = transformers.LlamaConfig(
            vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=1, num_key_value_heads=1,
        )
        warm = LlamaForCausalLM(small)  # what a first load imports and allocates
        warm.lm_head.weight.data *= nmflow.mask(warm.lm_head.weight, "1:8")
        nmflow.save(warm, folder + "-warm", "1:8")
        nmflow.from_pretrained(folder + "-warm")
        def held():
            for line in open("/proc/self/status"):
                if line.startswith(("VmRSS", "VmHWM")):
                    yield int(line.split()[1]) * 1024
        most, start = held()
        model = nmflow.from_pretrained(folder)
        most, _ = held()
        size = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
        layer = 4 * 4096 * 1024
        print(f"{(most - start) / size:.3f} of {size:,}, a dense layer is {layer / size:.3f}")
        assert most - start <= 1.2 * size + layer, (most - start, size)
    """)
    for what in ("save", "load"):
        command = [sys.executable, "-c", code, str(tmp_path), what]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    print(done.stdout)


def test_the_example_of_fastapi_answers(tmp_path: Path) -> None:
    pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")
    pytest.importorskip("uvicorn", reason="the extra 'serve' is not installed")
    packed = classifier(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", "serve:app", "--app-dir", str(EXAMPLES),
               "--port", str(port), "--log-level", "warning"]  # fmt: skip
    server = subprocess.Popen(
        command, env={**os.environ, "MODEL": str(tmp_path)}, stderr=subprocess.PIPE, text=True
    )
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/classify",
        json.dumps({"texts": ["a b", "c"]}).encode(),
        {"content-type": "application/json"},
    )
    try:
        answer = None
        deadline = time.monotonic() + 300  # the machine may be busy
        while answer is None and server.poll() is None and time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(request, timeout=60) as reply:
                    answer = json.load(reply)
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.2)
    finally:
        server.terminate()
        said = server.communicate()[1]
    assert answer is not None, said[-2000:]
    tokenizer = hf.BertTokenizer.from_pretrained(tmp_path)
    want = hf.pipeline("text-classification", model=packed, tokenizer=tokenizer)(["a b", "c"])
    assert [row["label"] for row in answer] == [row["label"] for row in cast(Any, want)]
    for got, row in zip(answer, cast(Any, want), strict=True):
        assert abs(got["score"] - row["score"]) < 1e-5


def test_a_network_of_timm(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    torch.manual_seed(0)
    model = prune(timm.create_model("test_vit", num_classes=5)).eval()
    packed = nmflow.compress(model, measure=False)
    nmflow.save(packed, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["architecture"], config["num_classes"]) == ("test_vit", 5)
    again = nmflow.from_pretrained(tmp_path)
    image = torch.linspace(-1, 1, 3 * 160 * 160).view(1, 3, 160, 160)
    with torch.no_grad():
        assert torch.equal(again(image), packed(image))
        torch.testing.assert_close(again(image), model(image), atol=1e-4, rtol=1e-4)
    assert count(again) == count(packed) > 0
    assert again.pretrained_cfg["input_size"] == list(model.pretrained_cfg["input_size"])
    for change, said in (
        ({"architecture": "hf-hub:someone/net"}, "names no architecture of timm"),
        ({"model_args": {"checkpoint_path": "/etc/passwd"}}, "say where to load from"),
        ({"model_args": {"depth": "x"}}, "cannot be built"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ConfigError, match=said):
            nmflow.from_pretrained(tmp_path)


def test_a_sentence_transformer(tmp_path: Path) -> None:
    st = pytest.importorskip(
        "sentence_transformers", reason="sentence-transformers is not installed"
    )
    classifier(tmp_path / "words")
    torch.manual_seed(0)
    bert = prune(cast(Any, hf.BertModel(hf.BertConfig(**SMALL)))).eval()
    bert.save_pretrained(tmp_path / "bert")
    hf.BertTokenizer.from_pretrained(tmp_path / "words").save_pretrained(tmp_path / "bert")
    model = st.SentenceTransformer(str(tmp_path / "bert"), device="cpu")
    want = model.encode(["a b", "c"])
    packed = nmflow.compress(model, measure=False)
    packed.save_pretrained(str(tmp_path / "packed"))
    for again in (
        st.SentenceTransformer(str(tmp_path / "packed"), device="cpu"),
        nmflow.from_pretrained(tmp_path / "packed"),
    ):
        assert count(again) == count(packed) > 0
        assert abs(again.encode(["a b", "c"]) - want).max() < 1e-5
    modules = json.loads((tmp_path / "packed/modules.json").read_text())
    modules[0]["type"] = "os.system"
    (tmp_path / "packed/modules.json").write_text(json.dumps(modules))
    with pytest.raises(ConfigError, match="is not one of sentence-transformers"):
        nmflow.from_pretrained(tmp_path / "packed")


def test_the_model_card(tmp_path: Path) -> None:
    packed = classifier(tmp_path)
    nmflow.save(packed, tmp_path, recipe=nmflow.SDGF(), quality={"accuracy": 0.875})
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    lines = [line.strip("| ").split(" | ") for line in card.splitlines() if " | " in line]
    rows = {line[0]: line[1] for line in lines if len(line) == 2}
    assert rows["Recipe"].startswith("`SDGF(")
    assert rows["Quality: accuracy"] == "0.875"
    header = json.loads((tmp_path / "nmflow.json").read_text())
    sizes = [header["tensors"][f"{name}#0.values"]["shape"] for name in header["weights"]]
    kept = sum(a * b for a, b in sizes)
    whole = sum(a * b for a, b in (w["shape"] for w in header["weights"].values()))
    assert rows["Density of the packed weights"] == f"{kept / whole:.4f}"
    stored = next(tmp_path.glob("weights-*")).stat().st_size
    said = int(rows["Bytes"].split()[0].replace(",", ""))
    assert 0 <= stored - said < 50_000  # the file also has a list of its tensors
    assert rows["Time"] == "not measured"
    nmflow.save(packed, tmp_path)  # one of ours is written anew
    assert "| Recipe | not given |" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("mine")
    nmflow.save(packed, tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_the_card_has_what_compress_measured(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 32))
    model[0].weight.data *= nmflow.mask(model[0].weight, "1:16")  # pyright: ignore
    packed = nmflow.compress(model, measure=False)
    report = nmflow.report_of(packed)
    row = report[0]
    report[0] = type(row)(**{**vars(row), "times": {1: (10.0, 25.0, "F.linear")}})
    nmflow.save(packed, tmp_path, quality={"loss": 1.0})
    card = (tmp_path / "README.md").read_text()
    assert "| Time of the packed layers at 1 token | 2.50 times as fast" in card
    assert "| Pattern | 1:16 (1 weight) |" in card
