"""Folders, files and names of strangers: no code of theirs runs, nothing hangs, one sentence."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from typer.testing import CliRunner, Result

from nmflow.bench import networks
from nmflow.cli import app
from nmflow.errors import ConfigError, NMFlowError
from nmflow.experiments import models
from nmflow.experiments.specs import Model
from nmflow.inspect.pretrained import from_folder


def run(*words: str | Path, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app(), [str(word) for word in words], input=stdin)


def refused(*words: str | Path) -> str:
    found = run(*words)
    assert isinstance(found.exception, NMFlowError), (words, found.output, found.exception)
    sentence = str(found.exception)
    assert "\n" not in sentence
    return sentence


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 as `save_pretrained` writes it, its feed-forward matrices pruned."""
    import nmflow

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=48, n_embd=32, n_layer=1, n_head=2, n_positions=16, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".mlp." in name and p.ndim == 2:
                p.mul_(nmflow.mask(p, "1:8", 0))
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "network"))


def set_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


CODE = "open({mark!r}, 'w').close()\nraise SystemExit(3)\n"


def armed(folder: Path, mark: Path) -> Path:
    """A folder whose code would leave a mark, wherever transformers may look for code."""
    (folder / "evil.py").write_text(CODE.format(mark=str(mark)))
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(CODE.format(mark=str(mark)))
    set_config(
        folder,
        model_type="evil",
        architectures=["EvilModel"],
        auto_map={
            "AutoConfig": "evil.EvilConfig",
            "AutoModel": "evil.EvilModel",
            "AutoModelForCausalLM": "evil.EvilModel",
            "AutoTokenizer": ["evil.EvilTokenizer", None],
        },
    )
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["evil.EvilTokenizer", None]}})
    )
    return folder


TRAIN = {
    "name": "small",
    "task": "language-modelling",
    "options": {"length": 16},
    "data": {"source": "pydoc", "limit": 20_000},
    "pattern": "1:8",
    "training": {"steps": 2, "batch_size": 2, "log_every": 2, "device": "cpu", "eval_rows": 4},
    "recipes": ["sr-ste"],
    "threads": 1,
}


def commands(folder: Path, tmp: Path) -> dict[str, list[str]]:
    """Every command that takes a network, on a folder."""
    for name, extra in (
        ("model", {"model": {"load": str(folder)}}),
        ("tokens", {"model": {"kind": "gpt2", "fields": {"n_embd": 32, "n_layer": 1, "n_head": 2}},
                    "options": {"length": 16, "tokens": {"load": str(folder)}}}),
    ):  # fmt: skip
        raw = {**TRAIN, **extra, "output": str(tmp / "runs")}
        (tmp / f"{name}.yaml").write_text(json.dumps(raw))
    return {
        "plan": ["plan", str(folder)],
        "compress": ["compress", str(folder), "-o", str(tmp / "out")],
        "bench": ["bench", str(folder), "--no-layers", "--rivals", "", "--seconds", "0.001"],
        "audit": ["audit", str(folder)],
        "cost": ["cost", str(tmp / "model.yaml")],
        "train": ["train", str(tmp / "model.yaml"), "--workers", "1"],
        "tokens": ["train", str(tmp / "tokens.yaml"), "--workers", "1"],
    }


@pytest.mark.parametrize("stdin", ["y\n" * 20, ""])
@pytest.mark.parametrize("native", [False, True])
def test_no_command_runs_the_code_of_a_folder_or_asks(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stdin: str, native: bool
) -> None:
    def asked(*args: Any) -> str:
        (tmp_path / "asked").touch()
        return "y"

    monkeypatch.setattr("builtins.input", asked)
    mark = tmp_path / "mark"
    armed(copy, mark)
    if native:  # a kind that transformers knows: its own class is taken, not the folder's
        set_config(copy, model_type="gpt2", architectures=["GPT2LMHeadModel"])
    for name, words in commands(copy, tmp_path).items():
        found = run(*words, stdin=stdin)
        if not native and name != "audit":
            assert isinstance(found.exception, NMFlowError), (name, found.exception, found.output)
        elif name in ("plan", "compress", "audit"):
            assert found.exit_code == 0, (name, found.exception, found.output)
        assert not mark.exists(), name
        assert not (tmp_path / "asked").exists(), name


def test_a_yaml_cannot_ask_for_code(copy: Path) -> None:
    model = Model(load=str(copy), fields={"trust_remote_code": True})
    with pytest.raises(ConfigError, match="trust_remote_code"):
        models.build(model, transformers.AutoModelForCausalLM, {})


BROKEN: dict[str, Any] = {
    "a module": {"architectures": ["logging"]},
    "a function": {"architectures": ["is_torch_available"]},
    "a config": {"architectures": ["GPT2Config"]},
    "a tokeniser": {"architectures": ["AutoTokenizer"]},
    "an attribute": {"architectures": ["__class__"]},
    "a path": {"architectures": ["os.system"]},
    "not a list": {"architectures": "GPT2LMHeadModel"},
    "numbers": {"architectures": [1, None]},
    "nothing": {"architectures": []},
    "unknown kind": {"model_type": "nothing"},
    "kind of another type": {"model_type": ["gpt2"]},
    "size of another type": {"n_embd": "many"},
    "negative size": {"n_embd": -32},
    "zero heads": {"n_head": 0},
    "another size": {"n_embd": 64},
    "quantized": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_config_that_builds_no_network_is_one_sentence(copy: Path, name: str) -> None:
    set_config(copy, **BROKEN[name])
    with pytest.raises(ConfigError) as caught:
        from_folder(copy)
    assert str(copy) in str(caught.value)
    assert "\n" not in str(caught.value)
    if name != "nothing":  # bench takes AutoModel then
        with pytest.raises(ConfigError):
            networks.network(str(copy))


@pytest.mark.parametrize(
    "text", [b"{", b"[]", b"\xff\xfe", b'{"a": 1, "a": 2}', b"[" * 100_000, b'{"n_embd": NaN}', b""]
)
def test_a_config_that_is_no_json_is_one_sentence(copy: Path, text: bytes) -> None:
    (copy / "config.json").write_bytes(text)
    with pytest.raises(ConfigError, match="holds no model"):
        from_folder(copy)


def test_a_network_that_its_weights_do_not_fill_is_refused(copy: Path) -> None:
    set_config(copy, n_layer=2)
    with pytest.raises(ConfigError, match="lacks 12 of the weights of GPT2LMHeadModel"):
        from_folder(copy)


@pytest.mark.parametrize(
    "shard",
    ["..", ".", "", "../x.safetensors", "/etc/passwd", "a/b.safetensors", "a\\b.safetensors",
     "model.safetensors.index.json", "pytorch_model.bin.index.json", "x.safetensors\0", "x" * 5000],
)  # fmt: skip
def test_an_index_names_files_beside_it_only(copy: Path, shard: str) -> None:
    (copy / "model.safetensors").rename(copy.parent / "x.safetensors")
    mapping = {"metadata": {}, "weight_map": {"w": shard}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(mapping))
    mapping["weight_map"] = {"w": "model.safetensors.index.json"}
    (copy / "pytorch_model.bin.index.json").write_text(json.dumps(mapping))
    assert "index.json" in refused("audit", copy)
    assert "index.json" in refused("plan", copy)
    assert "index.json" in refused("bench", copy)
    assert "index.json" in refused("compress", copy, "-o", copy.parent / "out")


def special(folder: Path) -> dict[str, Path]:
    """Things with a name that are no regular file."""
    folder.mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "folder").mkdir()
    (folder / "loop").symlink_to(folder / "loop2")
    (folder / "loop2").symlink_to(folder / "loop")
    (folder / "to pipe").symlink_to(folder / "pipe")
    here = os.getcwd()
    os.chdir(folder)  # the path of a socket has to be short
    try:
        socket.socket(socket.AF_UNIX).bind("socket")
    finally:
        os.chdir(here)
    (folder / "device").symlink_to("/dev/zero")
    return {f.name: f for f in folder.iterdir()} | {"long": folder / ("x" * 300)}


def test_nothing_but_regular_files_is_opened(copy: Path, tmp_path: Path) -> None:
    """A pipe would wait for ever: each has to be an error at once, in every place of a file."""
    places = {
        "model.safetensors": ["audit", str(copy)],
        "config.json": ["plan", str(copy)],
        "model.safetensors.index.json": ["audit", str(copy)],
        "nmflow.json": ["audit", str(copy)],
        "run.yaml": ["train", str(copy / "run.yaml")],
        "cost.yaml": ["cost", str(copy / "cost.yaml")],
        "sweep.yaml": ["sweep", str(copy / "sweep.yaml")],
        "plan.yaml": ["plan", str(copy / "plan.yaml"), "--set", "a=1"],
        "alone.safetensors": ["audit", str(copy / "alone.safetensors")],
        "alone.pt": ["compress", str(copy / "alone.pt"), "-o", str(tmp_path / "out")],
    }
    for kind, path in special(tmp_path / "special").items():
        for name, words in places.items():
            if kind == "long":
                continue
            place = copy / name
            kept = place.read_bytes() if place.exists() else None
            place.unlink(missing_ok=True)
            place.symlink_to(path)
            try:
                if not (kind == "folder" and name == "plan.yaml"):
                    refused(*words)
            finally:
                place.unlink()
                if kept is not None:
                    place.write_bytes(kept)
        refused("audit", path)


def test_a_pipe_as_data_or_as_a_result_is_no_reason_to_wait(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "text.txt")
    raw = {
        **TRAIN, "output": str(tmp_path / "runs"),
        "data": {"source": "text", "path": str(tmp_path / "text.txt")},
        "model": {"kind": "gpt2", "fields": {"n_embd": 32, "n_layer": 1, "n_head": 2}},
    }  # fmt: skip
    (tmp_path / "a.yaml").write_text(json.dumps(raw))
    assert "text.txt" in refused("train", tmp_path / "a.yaml", "--workers", "1")
    (tmp_path / "other" / "cell").mkdir(parents=True)
    os.mkfifo(tmp_path / "other" / "cell" / "result.json")
    assert "no finished run" in refused("report", tmp_path / "other")


MARKUP = ["[red]", "[/]", "[/x]", "[x]", "a [bold]b", "[link=http://x]y[/link]", ":smile:", "100%"]


@pytest.mark.parametrize("name", MARKUP)
def test_a_path_is_shown_as_it_is(copy: Path, tmp_path: Path, name: str) -> None:
    """No square bracket is taken for markup, no colon for an emoji."""
    folder = tmp_path / name.replace("/", "∕")
    shutil.copytree(copy, folder / "in")
    name = folder.name
    found = run("compress", folder / "in", "-o", folder / "out")
    assert found.exit_code == 0, found.exception
    assert f"wrote {folder / 'out'}" in found.output
    assert name in refused("audit", folder / "none")
    assert name in refused("train", folder / "none.yaml")
    assert name in refused("sweep", folder / "none.yaml")
    assert name in refused("report", folder / "none")
    assert name in refused("plan", folder)


def test_a_training_and_its_report_show_names_as_they_are(tmp_path: Path) -> None:
    name = "[red]a[∕red] [∕x] :smile:"
    folder = tmp_path / name
    folder.mkdir()
    raw = {
        **TRAIN, "name": name, "output": str(folder / "runs"),
        "recipes": [{"name": "sr-ste", "label": name.replace("∕", "/")}],
        "model": {"kind": "gpt2", "fields": {"n_embd": 32, "n_inner": 64, "n_layer": 1,
                                             "n_head": 2}},
    }  # fmt: skip
    (folder / "a.yaml").write_text(json.dumps(raw))
    found = run("train", folder / "a.yaml", "--workers", "1")
    assert found.exit_code == 0, found.exception
    assert str(folder / "runs") in found.output
    found = run("report", folder / "runs")
    assert found.exit_code == 0, found.exception
    assert f"report: {folder / 'runs' / 'report' / 'report.html'}" in found.output


def test_compress_never_copies_over_its_own_files(copy: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (copy / "nmflow.json").write_text('{"step": 3}')
    (copy / "tokenizer.json").write_text('{"ours": 1}')
    (copy / "merges.txt").write_text("a b")
    (copy / "evil.py").write_text("")
    (copy / "optimizer.pt").write_bytes(b"x")
    (copy / "model.safetensors.index.json.bak").write_text("")
    os.mkfifo(copy / "vocab.txt")
    found = run("compress", copy, "-o", out)
    assert found.exit_code == 0, (found.exception, found.output)
    assert json.loads((out / "nmflow.json").read_text())["format"] == "nmflow"
    assert {f.name for f in out.iterdir() if not f.name.startswith("weights-")} == {
        "nmflow.json", "config.json", "generation_config.json", "tokenizer.json", "merges.txt",
        "README.md", "model.safetensors.index.json",
    }  # fmt: skip
    assert run("audit", out).exit_code == 0
    again = run("compress", copy, "-o", out)  # the same once more
    assert again.exit_code == 0
    assert "is packed already" in refused("compress", out, "-o", tmp_path / "third")


def test_compress_refuses_to_write_where_it_reads(copy: Path, tmp_path: Path) -> None:
    before = {f.name: f.read_bytes() for f in copy.iterdir()}
    (tmp_path / "link").symlink_to(copy)
    for words in (
        (copy, copy), (copy, tmp_path / "link"), (tmp_path / "link", copy), (copy, copy / "." ),
        (copy / "model.safetensors", copy), (copy / "model.safetensors", tmp_path / "link"),
    ):  # fmt: skip
        assert "give another folder" in refused("compress", words[0], "-o", words[1])
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    refused("compress", copy, "-o", tmp_path / "loop")
    refused("compress", tmp_path / "loop", "-o", tmp_path / "out")
    (tmp_path / "file").write_text("")
    refused("compress", copy, "-o", tmp_path / "file")
    assert {f.name: f.read_bytes() for f in copy.iterdir()} == before
    assert (tmp_path / "file").read_text() == ""


def test_main_ends_with_one_line_and_exit_code_2(tmp_path: Path) -> None:
    name = "a\nb\x1b[2J"
    command = [sys.executable, "-c", "import nmflow.cli; nmflow.cli.main()"]
    done = subprocess.run(
        [*command, "audit", str(tmp_path / name)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert "\x1b" not in done.stderr
    assert r"a\nb\x1b[2J" in done.stderr
