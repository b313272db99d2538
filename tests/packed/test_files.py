"""Files: lossless, readable without nmflow, written in one step, and hostile ones refused."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from nmflow import mask
from nmflow.errors import CompressError, FileFormatError
from nmflow.inspect.audit import audit
from nmflow.kernels.layout import Shape
from nmflow.packed import compress, load, load_state, save, save_state
from nmflow.packed.convolution import PackedConv
from nmflow.packed.files.container import checksum
from nmflow.packed.files.stored import Stored
from nmflow.packed.files.writing import write
from nmflow.packed.modules import FusedLinear, PackedLinear
from nmflow.packed.parts import Part

DOCS = Path(__file__).parents[2] / "docs" / "layout.md"


def network() -> Any:
    """Layers of several kinds, one of which holds no pattern."""
    return nn.Sequential(
        nn.Linear(32, 24), nn.Conv2d(16, 6, 3), nn.BatchNorm1d(8), nn.Linear(9, 7),
        nn.Embedding(10, 16), nn.LSTM(16, 8),
    ).eval()  # fmt: skip


def sparse(dtype: torch.dtype = torch.float32) -> Any:
    model = network().to(dtype)
    model[0].weight.data *= mask(model[0].weight, "1:16")
    model[1].weight.data *= mask(model[1].weight, "2:8")
    model[4].weight.data *= mask(model[4].weight, "1:4")
    model[5].weight_ih_l0.data *= mask(model[5].weight_ih_l0, "1:2")
    return model


def same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert value.dtype == b[key].dtype
        assert torch.equal(value, b[key]), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("packed", [True, False])
def test_save_and_load_are_lossless(tmp_path: Path, packed: bool, dtype: torch.dtype) -> None:
    model = sparse(dtype)
    save(compress(model, measure=False) if packed else model, tmp_path)
    same(load_state(tmp_path), model.state_dict())
    again = load(tmp_path, network())
    assert isinstance(again[0], PackedLinear)
    x = torch.randn(3, 32).to(dtype)
    assert torch.equal(again[0](x), compress(model, measure=False)[0](x))
    assert isinstance(again[4], nn.Embedding)  # packed in the file, dense in the network
    assert torch.equal(again[4].weight, model[4].weight)
    assert torch.equal(again[5].weight_ih_l0, model[5].weight_ih_l0)
    assert again[2].num_batches_tracked.dtype == torch.int64
    save(again, tmp_path / "second")
    same(load_state(tmp_path / "second"), model.state_dict())


def test_saving_makes_no_dense_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of linear layers, of rows of several patterns and of convolutions: shapes are known."""
    model = sparse()
    model[0].weight.data[:8] *= mask(model[0].weight[:8], "1:32")
    model[0].weight.data[8:] += (
        1e-3 * (model[0].weight[8:] == 0) * mask(model[0].weight[8:], "2:16")
    )
    packed = compress(model, measure=False)
    assert [type(m) for m in packed[:2]] == [FusedLinear, PackedConv]
    save(packed, tmp_path / "before")

    def dense(self: PackedLinear) -> Tensor:
        raise AssertionError("a dense weight is made")

    with monkeypatch.context() as patched:
        patched.setattr(PackedLinear, "dense", dense)
        save(packed, tmp_path / "after")
    same(load_state(tmp_path / "after"), load_state(tmp_path / "before"))
    same(load_state(tmp_path / "after"), model.state_dict())


def test_what_compress_kept_dense_runs_dense_again(tmp_path: Path) -> None:
    model = sparse()
    packed = compress(model, exclude="1.weight", measure=False)
    save(packed, tmp_path)
    again = load(tmp_path, network())
    assert isinstance(again[0], PackedLinear)
    assert isinstance(again[1], nn.Conv2d)
    header = json.loads((tmp_path / "nmflow.json").read_text())
    assert header["weights"]["1.weight"]["run"] == "dense"
    assert header["weights"]["1.weight"]["parts"][0]["pattern"] == "2:8"


def test_tied_weights_stay_tied_and_are_stored_once(tmp_path: Path) -> None:
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=8, vocab_size=64,
                        bos_token_id=0, eos_token_id=0)  # fmt: skip
    model = cast(Any, GPT2LMHeadModel(config).eval())
    for name, p in model.named_parameters():
        if name.endswith("c_attn.weight"):
            p.data[:, :64] *= mask(p.data[:, :64], "1:8", 0)
        elif ".c_" in name and p.ndim == 2:
            p.data *= mask(p, "1:16", 0)
    packed = compress(model, measure=False)
    save(packed, tmp_path)
    assert json.loads((tmp_path / "nmflow.json").read_text())["aliases"] == {
        "lm_head.weight": "transformer.wte.weight"
    }
    again = load(tmp_path, GPT2LMHeadModel(config).eval())
    assert again.lm_head.weight is again.transformer.wte.weight
    ids = torch.arange(6)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, packed(ids).logits)
    same(load_state(tmp_path), model.state_dict())


def test_a_model_on_meta_is_filled(tmp_path: Path) -> None:
    model = sparse()
    save(model, tmp_path)
    with torch.device("meta"):
        empty = network()
    again = load(tmp_path, empty)
    same(load_state(tmp_path), model.state_dict())
    assert not any(t.is_meta for t in again.state_dict().values())
    x = torch.randn(3, 32)
    torch.testing.assert_close(again[0](x), model[0](x))


def test_a_bare_state_and_its_report(tmp_path: Path) -> None:
    state = sparse().state_dict()
    report = save_state(state, tmp_path)
    same(load_state(tmp_path), state)
    row = next(r for r in report if r.name == "0.weight")
    assert (row.pattern, row.kept) == ("1:16", "packed")
    on_disk = load_file(_weights(tmp_path))
    got = sum(t.nbytes for n, t in on_disk.items() if n.startswith("0.weight#"))
    assert got == row.bytes


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 0.075), (torch.bfloat16, 0.08)])
def test_bytes_on_disk(tmp_path: Path, dtype: torch.dtype, limit: float) -> None:
    layer = nn.Linear(768, 3072, bias=False).to(dtype)
    layer.weight.data *= mask(layer.weight, "1:16")
    save(nn.Sequential(layer), tmp_path)
    total = sum(f.stat().st_size for f in tmp_path.iterdir())
    assert total <= limit * layer.weight.nbytes


def test_the_reader_of_the_docs_needs_no_nmflow(tmp_path: Path) -> None:
    found = re.search(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert found is not None
    assert "nmflow" not in found[1].replace("nmflow.json", "")
    scope: dict[str, Any] = {}
    exec(found[1], scope)
    for dtype in (torch.float32, torch.float16):
        model = sparse(dtype)
        model.append(nn.Linear(64, 33).to(dtype))
        w = model[6].weight.data
        w.copy_(w * mask(w, "2:8@16"))
        save(model, tmp_path)
        read = scope["read"](str(tmp_path))
        state = model.state_dict()
        assert read.keys() == state.keys()
        for key, value in state.items():
            assert np.array_equal(read[key], value.numpy()), key


@st.composite
def _weight(draw: st.DrawFn) -> tuple[Tensor, str]:
    m = draw(st.sampled_from([2, 3, 4, 7, 16, 20, 64]))
    n = draw(st.integers(1, m))
    panel = draw(st.sampled_from([1, 1, 3, 16]))
    torch.manual_seed(draw(st.integers(0, 99)))
    w = torch.randn(draw(st.integers(1, 20)), m * draw(st.integers(1, 4)))
    w = w.to(draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])))
    pattern = f"{n}:{m}@{panel}"
    return torch.where(mask(w, pattern), w, torch.zeros((), dtype=w.dtype)), pattern


@given(_weight())
def test_any_pattern_and_shape_round_trips(case: tuple[Tensor, str]) -> None:
    w, pattern = case
    layer = nn.Linear(w.shape[1], w.shape[0])
    layer.weight = nn.Parameter(w)
    with tempfile.TemporaryDirectory() as folder:
        save(nn.Sequential(layer), folder, pattern)
        assert torch.equal(load_state(folder)["0.weight"], w)
        again = load(folder, nn.Sequential(nn.Linear(w.shape[1], w.shape[0])))
        first = again[0]
        assert isinstance(first, PackedLinear)
        assert torch.equal(first.dense(), w)
        assert str(first.pattern) == str(pattern).removesuffix("@1")


# Damage. Every change below keeps the checksums right unless it is about them, so that the checks
# behind them are what answers.


def _weights(folder: Path) -> Path:
    return next(folder.glob("weights-*.safetensors"))


def _edit(folder: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], Any]) -> None:
    header = json.loads((folder / "nmflow.json").read_text())
    data = load_file(_weights(folder))
    change(header, data)
    for name, t in data.items():
        header["tensors"][name] = {
            "dtype": str(t.dtype).removeprefix("torch."),
            "shape": list(t.shape),
            "sha256": checksum(t),
        }
    for name in set(header["tensors"]) - set(data):
        del header["tensors"][name]
    save_file(data, _weights(folder))
    (folder / "nmflow.json").write_text(json.dumps(header))


def _part(h: dict[str, Any], **kwargs: Any) -> None:
    h["weights"]["0.weight"]["parts"][0].update(kwargs)


def _weight_says(h: dict[str, Any], **kwargs: Any) -> None:
    h["weights"]["0.weight"].update(kwargs)


V, I = "0.weight#0.values", "0.weight#0.index"  # noqa: E741
EDITS: dict[str, Callable[[dict[str, Any], dict[str, Tensor]], Any]] = {
    "index out of range": lambda h, d: (
        _part(h, pattern="1:8"),
        d.update({V: d[V].repeat(1, 2), I: torch.full((24, 2), 0x9A, dtype=torch.uint8)}),
    ),
    "index out of order": lambda h, d: (
        _part(h, pattern="2:16"),
        d.update({V: d[V].repeat(1, 2), I: torch.full((24, 2), 0x11, dtype=torch.uint8)}),
    ),
    "index of another dtype": lambda h, d: d.update({I: d[I].to(torch.int16)}),
    "index too short": lambda h, d: d.update({I: d[I][:-1].clone()}),
    "index too long": lambda h, d: d.update({I: torch.cat([d[I], d[I]], 1)}),
    "index missing": lambda h, d: d.pop(I),
    "values too short": lambda h, d: d.update({V: d[V][:, :-1].clone()}),
    "values of another dtype": lambda h, d: d.update({V: d[V].to(torch.int32)}),
    "values of another float": lambda h, d: d.update({V: d[V].double()}),
    "values missing": lambda h, d: d.pop(V),
    "pattern nonsense": lambda h, d: _part(h, pattern="5:4"),
    "pattern no text": lambda h, d: _part(h, pattern=[1, 16]),
    "pattern too wide": lambda h, d: _part(h, pattern="1:512"),
    "pattern huge": lambda h, d: _part(h, pattern="1:16@" + "9" * 300),
    "pattern dense": lambda h, d: _part(h, pattern=None),
    "bits": lambda h, d: _part(h, bits=8),
    "bits huge": lambda h, d: _part(h, bits=10**30),
    "rows reversed": lambda h, d: _part(h, rows=[24, 0]),
    "rows past the end": lambda h, d: _part(h, rows=[0, 48]),
    "rows short": lambda h, d: _part(h, rows=[0, 23]),
    "rows negative": lambda h, d: _part(h, rows=[-24, 0]),
    "rows text": lambda h, d: _part(h, rows=["0", "24"]),
    "rows bool": lambda h, d: _part(h, rows=[False, 24]),
    "no parts": lambda h, d: _weight_says(h, parts=[]),
    "parts no list": lambda h, d: _weight_says(h, parts={"0": 1}),
    "shape overflows": lambda h, d: _weight_says(h, shape=[2**40, 2**40]),
    "shape huge": lambda h, d: _weight_says(h, shape=[24, 10**30]),
    "shape negative": lambda h, d: _weight_says(h, shape=[-24, -32]),
    "shape zero": lambda h, d: _weight_says(h, shape=[24, 0]),
    "shape float": lambda h, d: _weight_says(h, shape=[24.0, 32.0]),
    "shape other": lambda h, d: _weight_says(h, shape=[32, 24]),
    "shape flat": lambda h, d: _weight_says(h, shape=[768]),
    "axis": lambda h, d: _weight_says(h, axis=2),
    "axis negative": lambda h, d: _weight_says(h, axis=-1),
    "axis bool": lambda h, d: _weight_says(h, axis=True),
    "dtype": lambda h, d: _weight_says(h, dtype="int64"),
    "dtype code": lambda h, d: _weight_says(h, dtype="__class__"),
    "run": lambda h, d: _weight_says(h, run="exec"),
    "weight no mapping": lambda h, d: h["weights"].update({"0.weight": 3}),
    "half a convolution": lambda h, d: (
        h["weights"]["1.weight"]["parts"][0].update(rows=[0, 3]),
        h["weights"]["1.weight"]["parts"].append({"rows": [3, 6], "pattern": None}),
        d.update(
            {
                "1.weight#0.values": d["1.weight#0.values"][:3].clone(),
                "1.weight#0.index": d["1.weight#0.index"][:3].clone(),
                "1.weight#1.values": torch.zeros(3, 144),
            }
        ),
    ),
    "packed where it cannot be": lambda h, d: h["weights"]["4.weight"].update(run="packed"),
    "a bias of integers": lambda h, d: d.update({"0.bias": d["0.bias"].long()}),
    "a bias of complex numbers": lambda h, d: d.update({"0.bias": d["0.bias"].to(torch.cfloat)}),
    "a count of floats": lambda h, d: d.update({"2.num_batches_tracked": torch.tensor(1.5)}),
    "a count of another integer": lambda h, d: d.update(
        {"2.num_batches_tracked": torch.tensor(1, dtype=torch.int8)}
    ),
    "another version": lambda h, d: h.update(layout=2),
    "version true": lambda h, d: h.update(layout=True),
    "another format": lambda h, d: h.update(format="other"),
    "path traversal": lambda h, d: h.update(file="../" + h["file"]),
    "absolute path": lambda h, d: h.update(file="/etc/passwd"),
    "file no text": lambda h, d: h.update(file=7),
    "alias to nothing": lambda h, d: h["aliases"].update({"x": "y"}),
    "alias to itself": lambda h, d: h["aliases"].update({"3.bias": "3.bias"}),
    "a tensor more": lambda h, d: d.update({"more": torch.zeros(3)}),
    "a tensor less": lambda h, d: d.pop("3.bias"),
    "another shape than the model": lambda h, d: d.update({"3.bias": torch.zeros(3)}),
    "no tensors": lambda h, d: h.update(weights=None),
}


@pytest.mark.parametrize("name", EDITS)
def test_hostile_folders_are_refused_and_the_model_is_left_alone(tmp_path: Path, name: str) -> None:
    if "complex" in name and torch.complex64 not in safetensors.torch._SIZE:
        pytest.skip("this safetensors writes no complex numbers")
    save(sparse(), tmp_path)
    load(tmp_path, network())
    _edit(tmp_path, EDITS[name])
    model = network()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(FileFormatError) as caught:
        load(tmp_path, model)
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)
    same(model.state_dict(), before)
    assert isinstance(model[0], nn.Linear)


HEADERS = {
    "not JSON": b"{",
    "not UTF-8": b"\xff\xfe{}",
    "not a mapping": b"[1, 2]",
    "empty": b"",
    "nested beyond reason": b"[" * 200_000,
    "nested mappings": b'{"a":' * 200_000,
    "not a number": b'{"format": "nmflow", "layout": NaN}',
    "an infinite number": b'{"format": "nmflow", "layout": 1e999}',
    "a key twice": b'{"format": "nmflow", "format": "nmflow"}',
    "a number beyond reason": b'{"layout": ' + b"9" * 10_000 + b"}",
    "keys missing": b'{"format": "nmflow", "layout": 1}',
}


@pytest.mark.parametrize("name", HEADERS)
def test_hostile_headers_are_refused(tmp_path: Path, name: str) -> None:
    save(sparse(), tmp_path)
    (tmp_path / "nmflow.json").write_bytes(HEADERS[name])
    with pytest.raises(FileFormatError):
        load(tmp_path, network())


def test_a_header_of_too_many_bytes_is_not_read(tmp_path: Path) -> None:
    save(sparse(), tmp_path)
    with (tmp_path / "nmflow.json").open("ab") as file:
        file.truncate(1 << 40)  # sparse: takes no room
    with pytest.raises(FileFormatError, match="above the limit"):
        load(tmp_path, network())


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    """A pipe would wait for a writer for ever."""
    save(sparse(), tmp_path)
    for name in ("nmflow.json", _weights(tmp_path).name):
        kept = (tmp_path / name).read_bytes()
        for make in (
            os.mkfifo, os.mkdir, lambda path: os.symlink(path, path),
            lambda path: os.symlink("/dev/zero", path),
        ):  # fmt: skip
            (tmp_path / name).unlink()
            make(tmp_path / name)
            for read in (load_state, lambda folder: load(folder, network())):
                with pytest.raises(FileFormatError):
                    read(tmp_path)
            place = tmp_path / name
            place.rmdir() if make is os.mkdir else place.unlink()
            place.write_bytes(kept)
    load_state(tmp_path)
    (tmp_path / "linked").symlink_to(tmp_path)  # a link to a whole folder is followed
    load_state(tmp_path / "linked")


def test_a_file_expands_within_a_bound(tmp_path: Path) -> None:
    """A small file of 1:256 may stand for a network that no machine holds."""
    out, groups = 4096, 4096  # 33 MB of values for 8.6 GB of weights
    w = Stored((out, 256 * groups), 1, torch.bfloat16, "packed")
    index = torch.zeros(out, groups, dtype=torch.uint8)
    values = torch.ones(out, groups, dtype=torch.bfloat16)
    w.parts.append(Part(0, out, Shape.of(out, 256 * groups, "1:256"), values, index))
    write(tmp_path, {"0.weight": w}, {}, {})
    with pytest.raises(FileFormatError, match=r"8,589,934,592 bytes.*max_bytes"):
        load_state(tmp_path)
    with pytest.raises(FileFormatError, match="above the limit of 1,000"):
        load_state(tmp_path, max_bytes=1000)
    with pytest.raises(FileFormatError, match="above the limit"):
        audit(tmp_path, "1:8")
    # A model bounds what is loaded into it.
    with pytest.raises(FileFormatError, match="in the file and"):
        load(tmp_path, nn.Sequential(nn.Linear(32, 24, bias=False)))
    save(sparse(), tmp_path)
    assert load_state(tmp_path, max_bytes=1 << 20)


def test_tensors_that_share_memory_are_written(tmp_path: Path) -> None:
    """As in a `.pt` file of a network with tied weights."""
    w = sparse()[0].weight.detach()
    whole = torch.arange(12.0)
    state = {"a.weight": w, "b.weight": w, "first": whole[:6], "last": whole[4:], "all": whole}
    save_state(state, tmp_path)
    found = load_state(tmp_path)
    same(found, state)
    assert found["a.weight"] is found["b.weight"]


@pytest.mark.parametrize(
    "tensor",
    [torch.eye(3).to_sparse(), torch.empty(3, device="meta"),
     torch.quantize_per_tensor(torch.eye(3), 0.1, 0, torch.qint8)],
)  # fmt: skip
def test_what_no_file_can_hold_is_refused_before_anything_is_written(
    tmp_path: Path, tensor: Tensor
) -> None:
    state = {"0.weight": sparse()[0].weight.detach(), "x": tensor}
    with pytest.raises(CompressError, match="x is a"):
        save_state(state, tmp_path / "new")
    for name in ("0.weight#0.values", "__metadata__"):
        state = {"0.weight": sparse()[0].weight.detach(), name: torch.ones(3)}
        with pytest.raises(CompressError, match="rename it"):
            save_state(state, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_missing_and_foreign_folders(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="cannot be read"):
        load(tmp_path / "nowhere", network())
    save(sparse(), tmp_path)
    with pytest.raises(FileFormatError, match="does not match the model"):
        load(tmp_path, nn.Sequential(nn.Linear(32, 24)))
    with pytest.raises(FileFormatError, match=r"0\.weight"):
        load(tmp_path, nn.Sequential(nn.Linear(24, 32), *network()[1:]))
    with pytest.raises(CompressError, match="packed already"):
        load(tmp_path, compress(sparse(), measure=False))
    _weights(tmp_path).unlink()
    with pytest.raises(FileFormatError, match="weights-"):
        load(tmp_path, network())


@settings(max_examples=150)
@given(st.data())
def test_damaged_bytes_are_noticed(data: st.DataObject) -> None:
    """Truncate, extend or flip bits anywhere in either file: an error, never other weights."""
    model = _saved()[1]
    with tempfile.TemporaryDirectory() as folder:
        names = []
        for name, content in _saved()[0].items():
            names.append(name)
            Path(folder, name).write_bytes(content)
        path = Path(folder, data.draw(st.sampled_from(names)))
        content = bytearray(path.read_bytes())
        at = data.draw(st.integers(0, len(content) - 1))
        kind = data.draw(st.sampled_from(["flip", "cut", "add"]))
        if kind == "flip":
            content[at] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "cut":
            del content[at:]
        else:
            content += bytes(data.draw(st.integers(1, 64)))
        path.write_bytes(content)
        try:
            loaded = load(folder, network())
        except FileFormatError:
            return
        # Some bytes do not matter, such as the letters of the version of nmflow: same weights.
        save(loaded, Path(folder, "again"))
        same(load_state(Path(folder, "again")), model)


_SAVED: list[tuple[dict[str, bytes], dict[str, Tensor]]] = []


def _saved() -> tuple[dict[str, bytes], dict[str, Tensor]]:
    if not _SAVED:
        torch.manual_seed(0)
        model = sparse()
        with tempfile.TemporaryDirectory() as folder:
            save(model, folder)
            files = {f.name: f.read_bytes() for f in Path(folder).iterdir()}
        _SAVED.append((files, model.state_dict()))
    return _SAVED[0]


def test_a_save_that_fails_leaves_the_old_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = sparse()
    save(model, tmp_path)
    other = sparse()
    (tmp_path / "config.json").write_text("{}")
    real = os.replace

    def fail_on_header(source: Any, target: Any) -> None:
        if str(target).endswith("nmflow.json"):
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", fail_on_header)
    with pytest.raises(CompressError, match="No space left"):
        save(other, tmp_path)
    monkeypatch.undo()
    same(load_state(tmp_path), model.state_dict())
    save(other, tmp_path)
    same(load_state(tmp_path), other.state_dict())
    assert len(list(tmp_path.iterdir())) == 3  # the older weights are gone, other files stay


def test_folders_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CompressError, match="cannot be written") as caught:
        save(sparse(), tmp_path / "file" / "folder")
    assert "\n" not in str(caught.value)
    with pytest.raises(CompressError, match="no weight"):
        save(network(), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_state_that_is_no_tensor_is_refused(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"a": 1}

    model = nn.Sequential(sparse()[0], Extra(4, 4))
    with pytest.raises(CompressError, match="_extra_state"):
        save(model, tmp_path)
