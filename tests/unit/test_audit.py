"""Audits of models and of files, against counts made with numpy; damaged files are one error."""

from __future__ import annotations

import doctest
import importlib
import json
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from nmflow import packed
from nmflow.errors import FileFormatError, PlanError
from nmflow.inspect.audit import Audit, audit
from nmflow.inspect.record import write_record
from nmflow.masks import mask
from nmflow.select.plan import plan

transformers = pytest.importorskip("transformers")


def broken_by_hand(w: np.ndarray, n: int, m: int) -> bool:
    """At most n non-zeros in every m consecutive ones of each row: written as loops."""
    for row in w:
        for start in range(0, len(row), m):
            if sum(1 for x in row[start : start + m] if x != 0) > n:
                return True
    return False


def prune(model: nn.Module, pattern, include="all") -> nn.Module:
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for t in plan(model, pattern, include):
            w = parameters[t.name]
            part = w if t.rows is None else w.narrow(1 - t.dim, t.rows[0], t.rows[1] - t.rows[0])
            part.mul_(mask(part.clone(), t.pattern, t.dim))
    return model


def weight_of(model: nn.Module, name: str) -> nn.Parameter:
    return model.get_parameter(name)


def gpt2():
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=48, n_embd=32, n_layer=2, n_head=2, n_positions=16, bos_token_id=0,
            eos_token_id=0,
        )
    )  # fmt: skip


def bert():
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
            vocab_size=48, max_position_embeddings=16,
        )
    )  # fmt: skip


@pytest.mark.parametrize("n", [1, 2, 3])
def test_rows_agree_with_a_count_by_hand(n):
    torch.manual_seed(n)
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 8), nn.Linear(8, 4))
    with torch.no_grad():
        first = weight_of(model, "0.weight")
        first.mul_(mask(first, f"{n}:8"))
        weight_of(model, "1.weight").mul_(torch.rand(8, 8) > 0.5)
    found = audit(model, "2:8", "*")
    for row in found.rows:
        w = weight_of(model, row.name).detach().numpy()
        assert row.holds == (not broken_by_hand(w, 2, 8))
        assert row.nonzero == np.count_nonzero(w)
        assert row.density == row.nonzero / w.size
    assert found.ok == all(row.holds for row in found.rows)
    assert not found.ok


def test_a_pruned_network_is_ok_until_one_weight_comes_back():
    model = prune(gpt2(), {"ff": "1:16", "qk": "1:4"})
    patterns = {"ff": "1:16", "qk": "1:4"}
    found = audit(model, patterns)
    assert found.ok
    by_name = {row.name: row for row in found.rows}
    assert by_name["transformer.h.0.mlp.c_fc.weight"].density == 1 / 16
    assert by_name["transformer.h.0.attn.c_attn.weight[0:64]"].density == 1 / 4
    others = {row.name: row for row in found.others}
    assert others["transformer.h.0.attn.c_attn.weight[64:96]"].total == 32 * 32
    assert others["transformer.h.0.attn.c_attn.weight[64:96]"].pattern is None
    with torch.no_grad():
        weight_of(model, "transformer.h.1.mlp.c_fc.weight")[:, 5] = 1.0
    found = audit(model, patterns)
    assert [row.name for row in found.rows if not row.holds] == ["transformer.h.1.mlp.c_fc.weight"]
    assert "NO" in str(found)
    assert "1 of 6 weights break the pattern" in str(found)


def test_a_frozen_model_is_audited():
    model = prune(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), "1:4").requires_grad_(False)
    assert audit(model, "1:4").ok


def test_a_sharded_parameter_is_planned_and_audited_whole(tmp_path):
    model = prune(nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 2)), "1:4")
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        fully_shard(model, mesh=mesh)
        (target,) = plan(model, "1:4")
        assert target.shape == (8, 16)
        found = audit(model, "1:4")
        assert found.ok
        assert found.rows[0].nonzero == 32
    finally:
        dist.destroy_process_group()


def test_panels_have_to_share_their_columns():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    prune(model, "1:4@4")
    assert audit(model, "1:4@4").ok
    assert audit(model, "1:4").ok
    with torch.no_grad():
        weight_of(model, "0.weight").copy_(torch.eye(8))
    assert audit(model, "1:4").ok
    assert not audit(model, "1:4@4").ok


def files(model, folder):
    """The same network in every kind of file that an audit reads."""
    state = model.state_dict()
    unique = {k: v.clone() for k, v in state.items() if k != "lm_head.weight"}
    save_file(unique, folder / "a.safetensors")
    yield folder / "a.safetensors"
    for name, content in (
        ("b.pt", state), ("c.bin", unique), ("d.ckpt", {"state_dict": state, "epoch": 3}),
        ("e.pth", {"model": state}),
    ):  # fmt: skip
        torch.save(content, folder / name)
        yield folder / name
    torch.save(state, folder / "old.pt", _use_new_zipfile_serialization=False)
    yield folder / "old.pt"
    cast(Any, model).save_pretrained(folder / "hf")
    yield folder / "hf"
    cast(Any, model).save_pretrained(folder / "shards", max_shard_size="20KB")
    assert (folder / "shards" / "model.safetensors.index.json").exists()
    yield folder / "shards"


@pytest.mark.parametrize("build", [gpt2, bert])
def test_files_tell_the_same_as_the_model(build, tmp_path):
    patterns = {"ff": "1:16", "qkv": "1:4"}
    model = prune(build(), patterns)
    expected = audit(model, patterns)
    key = lambda row: (row.name.rpartition("h.")[2].rpartition("bert.")[2], row.holds, row.nonzero)  # noqa: E731
    assert expected.ok
    for path in files(model, tmp_path):
        found = audit(path, patterns)
        assert sorted(map(key, found.rows)) == sorted(map(key, expected.rows)), path
        assert not audit(str(path), {"ff": "1:32", "qkv": "1:4"}).ok


def test_packed_networks_and_their_folders_tell_the_same(tmp_path):
    patterns = {"ff": "1:16", "qkv": "1:4"}
    model = prune(gpt2(), patterns)
    expected = audit(model, patterns)
    compressed = packed.compress(model, measure=False)
    packed.save(compressed, tmp_path)
    for found in (audit(compressed, patterns), audit(tmp_path, patterns)):
        assert found.ok
        assert {(r.name, r.nonzero) for r in found.rows} == {
            (r.name, r.nonzero) for r in expected.rows
        }
    assert not audit(tmp_path, {"ff": "1:32", "qkv": "1:4"}).ok
    (tmp_path / "nmflow.json").write_text("{")
    with pytest.raises(FileFormatError):
        audit(tmp_path, patterns)


def test_a_file_of_a_plain_network_is_audited_without_its_head(tmp_path):
    model = prune(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)), "1:4")
    torch.save(model.state_dict(), tmp_path / "a.pt")
    found = audit(tmp_path / "a.pt", "1:4")
    assert found.ok
    assert [row.name for row in found.rows] == ["0.weight", "1.weight"]
    assert [row.name for row in found.others] == ["2.weight"]


def test_without_a_pattern_each_weight_says_which_one_it_holds(tmp_path):
    model = prune(gpt2(), {"ff": "1:16", "qk": "1:4"})
    torch.save(model.state_dict(), tmp_path / "a.pt")
    for found in (audit(model), audit(tmp_path / "a.pt")):
        assert found.ok
        assert found.judged == "found"
        held = {row.name: str(row.pattern) for row in found.rows}
        assert held.pop("transformer.h.0.attn.c_attn.weight[0:64]") == "1:4"
        assert held["transformer.h.0.mlp.c_fc.weight"] == "1:16"
        assert len(held) == 5
        others = {row.name: row.reason for row in found.others}
        assert others["transformer.wte.weight"] == "holds no N:M pattern"
        assert others["transformer.h.0.attn.c_attn.weight[64:96]"] == "holds no N:M pattern"
        assert "6 of " in str(found)
        assert "NO" not in str(found)
    found = audit(model, include="ff")
    assert {row.name.split(".")[-2] for row in found.rows} == {"c_fc", "c_proj"}
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
    assert audit(model).ok
    assert "no weight holds an N:M pattern" in str(audit(model))


def test_a_plan_is_judged_and_nothing_else():
    patterns = {"ff": "1:16", "qk": "1:4"}
    model = prune(gpt2(), patterns)
    chosen = plan(model, patterns)
    found = audit(model, chosen)
    assert found.ok
    assert found.judged == "record"
    assert [row.name for row in found.rows] == [t.label for t in chosen]
    with torch.no_grad():
        weight_of(model, "transformer.h.1.mlp.c_fc.weight")[:, 5] = 1.0
    assert not audit(model, chosen).ok
    with pytest.raises(PlanError, match="give the plan of this network"):
        audit(nn.Linear(4, 4), chosen)


def vit():
    torch.manual_seed(0)
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
            image_size=8, patch_size=4,
        )
    )  # fmt: skip


@pytest.mark.parametrize("build", [gpt2, bert, vit])
@pytest.mark.parametrize("size", ["5GB", "20KB"])
def test_a_record_travels_with_saved_weights_whatever_they_are_called(build, size, tmp_path):
    """Of every architecture the right network is right, and a weight that comes back is not."""
    patterns = {"ff": "1:16", "qk": "1:4"}
    model = prune(build(), patterns)
    chosen = plan(model, patterns)
    cast(Any, model).save_pretrained(tmp_path, max_shard_size=size)
    assert write_record(tmp_path, chosen, dict(model.named_parameters())) == []
    found = audit(tmp_path)
    assert found.ok
    assert found.judged == "record"
    assert len(found.rows) == len(chosen)
    assert sum(row.nonzero for row in found.rows) == sum(
        row.nonzero for row in audit(model, patterns).rows
    )
    assert {row.reason for row in found.others} >= {"not pruned by the run"}
    assert audit(tmp_path, include="ff").ok
    assert len(audit(tmp_path, include="ff").rows) < len(found.rows)
    assert len(audit(tmp_path, exclude="qk").rows) < len(found.rows)
    assert not audit(tmp_path, "1:32").ok  # the same weights against another pattern
    assert len(audit(tmp_path, "1:32").rows) == len(found.rows)
    target = next(t for t in chosen if t.rows is None)
    with torch.no_grad():
        weight_of(model, target.name).fill_(1.0)
    cast(Any, model).save_pretrained(tmp_path, max_shard_size=size)
    again = audit(tmp_path)
    assert not again.ok
    assert sum(not row.holds for row in again.rows) == 1


RECORDS = {
    "no JSON": "{",
    "another format": '{"format": "x", "version": 1, "weights": []}',
    "a name that is not there": [{"name": "x", "rows": None, "axis": 1, "pattern": "1:4"}],
    "no axis": [{"name": "0.weight", "rows": None, "axis": 7, "pattern": "1:4"}],
    "an uneven axis": [{"name": "0.weight", "rows": None, "axis": 1, "pattern": "1:5"}],
    "rows out of range": [{"name": "0.weight", "rows": [0, 99], "axis": 1, "pattern": "1:4"}],
    "rows of text": [{"name": "0.weight", "rows": "ab", "axis": 1, "pattern": "1:4"}],
    "no pattern": [{"name": "0.weight", "rows": None, "axis": 1, "pattern": 3}],
    "a list": [["0.weight"]],
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_damaged_record_is_one_sentence(name, tmp_path):
    content = RECORDS[name]
    save_file({"0.weight": torch.zeros(8, 8)}, tmp_path / "model.safetensors")
    if not isinstance(content, str):
        content = json.dumps({"format": "nmflow patterns", "version": 1, "weights": content})
    (tmp_path / "nmflow_patterns.json").write_text(content)
    with pytest.raises(FileFormatError, match="is not a record of these weights") as caught:
        audit(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_packed_folder_is_its_own_record_and_a_mark_of_a_training_is_none(tmp_path):
    model = prune(gpt2(), {"ff": "1:16"})
    packed.save(model, tmp_path / "packed")
    found = audit(tmp_path / "packed")
    assert found.ok
    assert found.judged == "record"
    assert len(found.rows) == 4
    cast(Any, model).save_pretrained(tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "nmflow.json").write_text('{"step": 3}')
    assert len(audit(tmp_path / "checkpoint").rows) == 4


def test_floats_of_one_byte_and_other_integers_are_counted(tmp_path):
    state = {
        f"{str(dtype)[6:]}.weight": torch.eye(8).to(dtype)
        for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.int8, torch.bool)
    }
    save_file(state, tmp_path / "a.safetensors")
    found = audit(tmp_path / "a.safetensors")
    assert {(row.name, str(row.pattern)) for row in found.rows} == {
        ("float8_e4m3fn.weight", "1:8"), ("float8_e5m2.weight", "1:8")
    }  # fmt: skip
    assert {row.nonzero for row in (*found.rows, *found.others)} == {8}


def test_a_glob_that_matches_nothing_is_answered_with_the_name_that_was_meant():
    model = gpt2()
    for key, meant in (
        ("*.mpl.*", "*.mlp.*"), ("*c_fcc*", "*c_fc*"), ("atn", "attn"),
        ("transformer.h.0.mlp.c_fc.weigth", "transformer.h.0.mlp.c_fc.weight"),
    ):  # fmt: skip
        with pytest.raises(PlanError) as caught:
            audit(model, "1:4", key)
        assert f"did you mean {meant!r}?" in str(caught.value)


class Evil:
    def __reduce__(self):
        return (exit, (3,))


def spoilt(folder):
    """(file, what its error says)."""
    yield folder / "missing.safetensors", "does not exist"
    (folder / "text.yaml").write_text("a: 1")
    yield folder / "text.yaml", "ends in '.yaml'"
    (folder / "empty").mkdir()
    yield folder / "empty", "holds no weights"
    for name in ("zero.safetensors", "zero.pt"):
        (folder / name).write_bytes(b"")
        yield folder / name, "cannot be read as weights"
    save_file({"w": torch.ones(64, 64)}, folder / "cut.safetensors")
    whole = (folder / "cut.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(whole[:-100])
    yield folder / "cut.safetensors", "cannot be read as weights"
    (folder / "huge.safetensors").write_bytes(b"\xff" * 7 + b"\x7f" + whole[8:])
    yield folder / "huge.safetensors", "cannot be read as weights"
    torch.save({"w": torch.ones(64, 64)}, folder / "cut.pt")
    whole = (folder / "cut.pt").read_bytes()
    (folder / "cut.pt").write_bytes(whole[: len(whole) // 2])
    yield folder / "cut.pt", "cannot be read as weights"
    (folder / "noise.pt").write_bytes(bytes(range(256)) * 20)
    yield folder / "noise.pt", "cannot be read as weights"
    torch.save({"w": Evil()}, folder / "evil.pt")
    yield folder / "evil.pt", "cannot be read as weights"
    torch.save([1, 2], folder / "list.pt")
    yield folder / "list.pt", "holds no state dict"
    for i, text in enumerate(('{"weight_map": {"w": "../x.safetensors"}}', "{", '{"a": 1}', "[]")):
        (folder / f"index{i}").mkdir()
        (folder / f"index{i}" / "model.safetensors.index.json").write_text(text)
        yield folder / f"index{i}", "index"
    (folder / "index9").mkdir()
    save_file({"w": torch.ones(4, 4)}, folder / "index9" / "s.safetensors")
    mapping = {"weight_map": {"w": "s.safetensors", "v": "s.safetensors"}}
    (folder / "index9" / "model.safetensors.index.json").write_text(json.dumps(mapping))
    yield folder / "index9", "does not hold it"


def test_a_missing_or_damaged_file_is_one_clear_error(tmp_path):
    for path, message in spoilt(tmp_path):
        with pytest.raises(FileFormatError, match=message) as caught:
            audit(path, "1:4")
        assert str(path.name) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_what_matches_nothing_is_an_error_and_uneven_axes_are_left_out():
    with pytest.raises(PlanError, match=r"'\*foo\*' matches no weight"):
        audit(nn.Linear(8, 8), "1:4", "*foo*")
    model = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    found = audit(model, "8:8")
    assert [row.name for row in found.rows] == ["1.weight"]
    assert "12 is not a multiple of M=8" in found.others[0].reason


def test_the_density_is_weighted_by_size():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(16, 16), nn.Linear(8, 2))
    with torch.no_grad():
        weight_of(model, "0.weight").zero_()
    found = audit(model, "1:1")
    assert isinstance(found, Audit)
    assert found.density == 256 / (64 + 256)


def test_examples():
    assert doctest.testmod(importlib.import_module("nmflow.inspect.audit")).failed == 0
