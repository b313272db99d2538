"""Mutations of saved networks that know what they change, with their checksums made right again.

`run(folder, seeds)` is one process's share of a fuzz: a case a seed, each under a time limit, all
under a limit of memory. It says which seeds broke the law: a file is refused by an error of nmflow,
or what is loaded packed is what is loaded dense.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import pickle
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import nmflow
from nmflow.errors import NMFlowError
from nmflow.packed import compress, decompress, load, load_state, save
from nmflow.packed.files.container import checksum

SECONDS = 20.0  # of wall clock: the machine may be busy
MEMORY = 4 << 30  # address space above what the process has at its start

DTYPES = (
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.uint8,
    torch.int16, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.uint16,
)  # fmt: skip
NUMBERS = (0, 1, 2, 3, 4, 7, 16, 24, 32, 255, 256, 257, 2**31, 2**47, 2**63, 10**30, -1, -24)
JUNK: tuple[Any, ...] = (
    None, True, False, 1.5, float("1e308"), "", "x", "1:16", [], {}, [1], {"a": 1}, [[]], "\ud800",
    "float32", "packed", "dense", "\0", "a" * 300, *NUMBERS,
)  # fmt: skip
PATTERNS = (
    "1:1", "1:2", "2:4", "1:4", "1:8", "1:16", "2:16", "1:32", "1:256", "256:256", "1:257", "16:16",
    "1:16@2", "1:16@16", "1:16@999999999", "0:4", "5:4", " 1:16 ", "1:16@0", "999999999:999999999",
    "1:16@1",
)  # fmt: skip


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(32, 24), nn.Conv2d(16, 6, 3), nn.BatchNorm1d(8), nn.Linear(9, 7),
        nn.Embedding(10, 16), nn.MultiheadAttention(16, 2), nn.Linear(32, 32, bias=False),
    ).eval()  # fmt: skip


def sparse() -> nn.Sequential:
    torch.manual_seed(0)
    model = network()
    parameters = dict(model.named_parameters())
    for name, pattern in (
        ("0.weight", "1:16"), ("1.weight", "2:8"), ("4.weight", "1:4"), ("6.weight", "1:16@16"),
        ("5.out_proj.weight", "2:16"),
    ):  # fmt: skip
        w = parameters[name].data
        w.mul_(nmflow.mask(w, pattern))
    rows = parameters["5.in_proj_weight"].data[:32]
    rows.mul_(nmflow.mask(rows, "1:8"))
    return model


Header = dict[str, Any]
Data = dict[str, Tensor]


def _places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of every part of a value of JSON."""
    if at:
        yield at
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, part in list(items) if isinstance(value, dict | list) else ():
        yield from _places(part, (*at, key))


def any_field(r: random.Random, header: Any) -> None:
    """Change, drop, move or double any part of a value of JSON."""
    path = r.choice(list(_places(header)))
    holder = header
    for key in path[:-1]:
        holder = holder[key]
    what = r.randrange(5)
    if what == 0:
        holder[path[-1]] = copy.deepcopy(r.choice(JUNK))
    elif what == 1:
        del holder[path[-1]]
    elif what == 2:
        old = holder[path[-1]]
        if isinstance(old, int) and not isinstance(old, bool):
            holder[path[-1]] = r.choice((old + 1, old - 1, old * 2, -old, str(old), float(old)))
        elif isinstance(old, str):
            holder[path[-1]] = r.choice((old.upper(), old + "x", old[:-1], "../" + old))
        elif isinstance(old, list):
            r.shuffle(old)
        else:
            holder[path[-1]] = [old]
    elif what == 3 and isinstance(holder, list):
        holder.append(copy.deepcopy(holder[path[-1]]))
    elif isinstance(holder, dict):
        other = r.choice(list(holder))
        holder[other] = copy.deepcopy(holder[path[-1]])


def weight_field(r: random.Random, header: Header, data: Data) -> None:
    w = header["weights"][r.choice(sorted(header["weights"]))]
    part = r.choice(w["parts"]) if w["parts"] else {}
    kind = r.randrange(8)
    if kind == 0:
        part["pattern"] = r.choice((None, *PATTERNS))
    elif kind == 1:
        part["rows"] = [r.choice(NUMBERS), r.choice(NUMBERS)]
    elif kind == 2:
        part["bits"] = r.choice((1, 2, 4, 8, 16, *NUMBERS))
    elif kind == 3:
        w["shape"][r.randrange(len(w["shape"]))] = r.choice(NUMBERS)
    elif kind == 4:
        r.shuffle(w["shape"])
    elif kind == 5:
        w["axis"] = r.choice((0, 1, 2, -1))
    elif kind == 6:
        w["dtype"] = r.choice([str(d).removeprefix("torch.") for d in DTYPES])
    else:
        w["run"] = r.choice(("packed", "dense"))


def split_part(r: random.Random, header: Header, data: Data) -> None:
    """Cut a part in two, so that its rows still follow: a valid file, or nearly one."""
    name = r.choice(sorted(header["weights"]))
    parts = header["weights"][name]["parts"]
    i = r.randrange(len(parts))
    start, stop = parts[i]["rows"]
    if stop - start < 2 or i != len(parts) - 1:
        return
    at = r.randrange(start + 1, stop)
    parts[i]["rows"] = [start, at]
    parts.append({**parts[i], "rows": [at, stop]})
    for kind in ("values", "index"):
        whole = data.get(f"{name}#{i}.{kind}")
        if whole is not None:
            data[f"{name}#{i}.{kind}"] = whole[: at - start].clone()
            data[f"{name}#{i + 1}.{kind}"] = whole[at - start :].clone()


def tensor(r: random.Random, header: Header, data: Data) -> None:
    """Change one tensor: its content, dtype, shape or name; drop or double it."""
    name = r.choice(sorted(data))
    t = data[name]
    kind = r.randrange(9)
    if kind == 0:
        data[name] = t.flatten().roll(r.randrange(1, 9)).view(t.shape).clone()
    elif kind == 1:
        data[name] = t.to(r.choice(DTYPES))
    elif kind == 2:
        data[name] = t.reshape(-1).clone() if r.random() < 0.5 else t[None].clone()
    elif kind == 3 and t.ndim:
        data[name] = t[: r.randrange(t.shape[0] + 1)].clone()
    elif kind == 4:
        data[r.choice((name + "x", "", "0.weight", "x#0.values", "\n", "a" * 999))] = t.clone()
    elif kind == 5:
        del data[name]
    elif kind == 6:
        other = r.choice(sorted(data))
        data[name], data[other] = data[other].clone(), t.clone()
    elif kind == 7:
        raw = t.contiguous().view(-1).view(torch.uint8).clone()
        if raw.numel():
            raw[r.randrange(raw.numel())] = r.randrange(256)
        data[name] = raw.view(t.dtype).view(t.shape) if t.ndim else t
    else:
        data[name] = torch.full_like(t, r.choice((0, 1, 17))) if t.numel() else t


def alias(r: random.Random, header: Header, data: Data) -> None:
    names = [*data, *header["weights"], "x", "0.weight#0.values"]
    header["aliases"][r.choice(names)] = r.choice(names)
    if r.random() < 0.5:  # the alias stands for a tensor that is dropped
        data.pop(r.choice(list(header["aliases"])), None)


def large(r: random.Random, header: Header, data: Data) -> None:
    """A consistent weight of 1:256, whose dense form is far larger than the file."""
    name = r.choice(("0.weight", "6.weight", "more"))
    out, groups = r.choice((1, 64, 4096)), r.choice((1, 64, 8192))
    for old in [n for n in data if n.startswith(name + "#")]:
        del data[old]
    part = {"rows": [0, out], "pattern": "1:256", "bits": 8}
    header["weights"][name] = {
        "shape": [out, 256 * groups], "dtype": "bfloat16", "axis": 1, "run": "packed",
        "parts": [part],
    }  # fmt: skip
    data[f"{name}#0.values"] = torch.ones(out, groups, dtype=torch.bfloat16)
    data[f"{name}#0.index"] = torch.zeros(out, groups, dtype=torch.uint8)


MUTATIONS: tuple[Callable[[random.Random, Header, Data], None], ...] = (
    lambda r, h, d: any_field(r, h), weight_field, weight_field, split_part, tensor, tensor, alias,
    large,
)  # fmt: skip


def mutate_packed(r: random.Random, folder: Path) -> None:
    """Change the files of a packed folder, and make its checksums right again."""
    header = json.loads((folder / "nmflow.json").read_text())
    file = folder / header["file"]
    data = load_file(file)
    tensors = header["tensors"]
    for _ in range(r.choice((1, 1, 1, 2, 3))):
        with contextlib.suppress(KeyError, IndexError, TypeError, AttributeError, ValueError,
                                 RuntimeError):  # fmt: skip
            r.choice(MUTATIONS)(r, header, data)
    if header.get("tensors") == tensors and r.random() < 0.97:
        header["tensors"] = {
            name: {"dtype": str(t.dtype).removeprefix("torch."), "shape": list(t.shape),
                   "sha256": checksum(t.contiguous())}
            for name, t in data.items()
        }  # fmt: skip
    save_file({name: t.contiguous().clone() for name, t in data.items()}, file)
    text = json.dumps(header).encode()
    (folder / "nmflow.json").write_bytes(damage_text(r, text) if r.random() < 0.05 else text)
    if r.random() < 0.05:
        damage_bytes(r, r.choice(sorted(folder.iterdir())))


def damage_text(r: random.Random, text: bytes) -> bytes:
    at = r.randrange(len(text))
    return r.choice((
        text[:at], text + b"}", b"\xff" + text, text.replace(b":", b": NaN, ", 1), b"[" * 99_999,
        text.replace(b"{", b'{"format": 1, "format": 2, ', 1), text.replace(b"1", b"9" * 5000, 1),
        text[:at] + bytes([r.randrange(256)]) + text[at + 1 :], b"", b"null", b"[]", b'"x"',
    ))  # fmt: skip


def damage_bytes(r: random.Random, file: Path) -> None:
    content = bytearray(file.read_bytes())
    if not content:
        return
    for _ in range(r.choice((1, 4, 64))):
        content[min(r.randrange(len(content)), r.randrange(len(content)))] = r.randrange(256)
    if r.random() < 0.3:
        del content[r.randrange(len(content)) :]
    file.write_bytes(content)


def packed_case(r: random.Random, base: Path, folder: Path) -> str:
    shutil.copytree(base / "packed", folder)
    mutate_packed(r, folder)
    model = network()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    said = "refused"
    try:
        state = load_state(folder)
        said = "state"
    except NMFlowError as error:
        check_sentence(error)
        state = None
    try:
        loaded = load(folder, model)
    except NMFlowError as error:
        check_sentence(error)
        for name, t in model.state_dict().items():
            assert torch.equal(t, before[name]), f"{name} was changed by a load that failed"
        return said
    assert state is not None, "load takes what load_state refuses"
    for name, t in decompress(loaded).state_dict().items():
        assert t.dtype == state[name].dtype, name
        same = torch.equal(t.contiguous().view(-1).view(torch.uint8),
                           state[name].contiguous().view(-1).view(torch.uint8))  # fmt: skip
        assert same, f"{name} is another packed than dense"
    if state["0.weight"].dtype == torch.float32 == state["0.bias"].dtype:
        x = torch.linspace(-1, 1, 64).view(2, 32)
        dense = nn.functional.linear(x, state["0.weight"], state["0.bias"])
        torch.testing.assert_close(loaded[0](x), dense, equal_nan=True)
    nmflow.audit(folder)
    return "loaded"


def audit_case(r: random.Random, base: Path, folder: Path) -> str:
    """Mutate a checkpoint of another kind, and audit it."""
    kind = r.choice(("hf", "shards", "record", "packed", "pickle", "pickle", "old pickle"))
    shutil.copytree(base / kind, folder)
    texts = sorted(f for f in folder.iterdir() if f.suffix == ".json")
    others = sorted(f for f in folder.iterdir() if f.suffix != ".json")
    if texts and (not others or r.random() < 0.6):
        file = r.choice(texts)
        value = json.loads(file.read_text())
        with contextlib.suppress(KeyError, IndexError, TypeError, AttributeError, ValueError):
            for _ in range(r.choice((1, 2))):
                any_field(r, value)
        text = json.dumps(value).encode()
        file.write_bytes(damage_text(r, text) if r.random() < 0.3 else text)
    else:
        file = r.choice(others)
        if file.suffix == ".safetensors" and r.random() < 0.6:
            mutate_safetensors(r, file)
        elif file.suffix == ".bin" and r.random() < 0.5:
            mutate_pickle(r, file)
        else:
            damage_bytes(r, file)
    path = folder if r.random() < 0.8 else r.choice(others)
    pattern = r.choice((None, "1:4", "1:16", {"ff": "1:8", "*": "1:2"}))
    try:
        found = nmflow.audit(path, pattern)
    except NMFlowError as error:
        check_sentence(error)
        return "refused"
    str(found)
    json.dumps(found.to_dict())
    return "audited"


def mutate_safetensors(r: random.Random, file: Path) -> None:
    """Change the header of a safetensors file, with its length right."""
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    with contextlib.suppress(KeyError, IndexError, TypeError, AttributeError, ValueError):
        if r.random() < 0.4:
            one = header[r.choice([n for n in header if n != "__metadata__"])]
            one["dtype"] = r.choice(
                ("F64", "BF16", "F8_E4M3", "F8_E8M0", "F4", "I8", "U16", "BOOL", "C64", "U64")
            )
            width = {"F64": 2, "U64": 2, "C64": 2, "BF16": 0.5, "U16": 0.5}.get(one["dtype"], 0.25)
            one["shape"] = [int(one["shape"][0] / width), *one["shape"][1:]]
        else:
            any_field(r, header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])


class Global:
    """Pickles as a call of something that a state dict has no business with."""

    def __init__(self, made: Any) -> None:
        self.made = made

    def __reduce__(self) -> Any:
        return self.made


def mutate_pickle(r: random.Random, file: Path) -> None:
    state: dict[Any, Any] = torch.load(file)
    name = r.choice(sorted(state))
    t = state[name]
    state[name] = r.choice((
        lambda: torch.zeros(1).expand(10**6, 10**6), lambda: t.to_sparse(),
        lambda: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), lambda: t.to("meta"),
        lambda: t.to(r.choice(DTYPES)), lambda: t[:0], lambda: t.movedim(0, -1), lambda: 3,
        lambda: None,
        lambda: nn.Parameter(t), lambda: t[None], lambda: t.as_strided((4, 4), (0, 1)),
        lambda: Global((print, ("x",))), lambda: Global((exec, ("raise SystemExit",))),
        lambda: {"state_dict": {name: t}}, lambda: torch.nested.nested_tensor([t, t]),
    ))()  # fmt: skip
    if r.random() < 0.3:
        state[r.choice((1, ("a",), "", "\n", "x.weight"))] = t
    sink = io.BytesIO()
    torch.save(r.choice((state, {"model": state}, {"state_dict": {"model": state}}, [state])), sink,
               _use_new_zipfile_serialization=r.random() < 0.8)  # fmt: skip
    content = sink.getvalue()
    if r.random() < 0.1 and zipfile.is_zipfile(io.BytesIO(content)):
        squeezed = io.BytesIO()
        with (zipfile.ZipFile(io.BytesIO(content)) as old,
              zipfile.ZipFile(squeezed, "w", zipfile.ZIP_DEFLATED) as new):  # fmt: skip
            for entry in old.namelist():
                new.writestr(entry, old.read(entry))
        content = squeezed.getvalue()
    elif r.random() < 0.05:
        content = pickle.dumps(r.choice(([1], {"a": 1}, Global((exec, ("raise SystemExit",))))))
    file.write_bytes(content)


def check_sentence(error: NMFlowError) -> None:
    text = str(error)
    assert "\n" not in text, text
    assert len(text) < 1200, text


def make_base(base: Path) -> None:
    """The networks that are mutated."""
    from nmflow.inspect.record import write_record

    save(compress(sparse(), measure=False), base / "packed")
    state = {k: v for k, v in sparse().state_dict().items() if "num_batches" not in k}
    for kind in ("hf", "record"):
        (base / kind).mkdir()
        save_file(state, base / kind / "model.safetensors")
        (base / kind / "config.json").write_text('{"model_type": "x", "architectures": ["Y"]}')
    write_record(base / "record", nmflow.plan(sparse(), {"0.weight": "1:16"}), state)
    (base / "shards").mkdir()
    names = sorted(state)
    shards = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, held in shards.items():
        save_file({n: state[n] for n in held}, base / "shards" / file)
    (base / "shards" / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {n: f for f, ns in shards.items() for n in ns}})
    )
    for kind, new in (("pickle", True), ("old pickle", False)):
        (base / kind).mkdir()
        torch.save(state, base / kind / "pytorch_model.bin", _use_new_zipfile_serialization=new)


class TooLong(BaseException):
    pass


def _stop(*args: Any) -> None:
    raise TooLong


def run(first: int, count: int, cases: tuple[Callable[..., str], ...] = ()) -> dict[str, Any]:
    """Run the cases of `count` seeds; what became of each, and how the law was broken."""
    torch.set_num_threads(1)
    said: dict[str, int] = {}
    broken: list[str] = []
    for limit in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(limit, _stop)
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        make_base(base)
        with open("/proc/self/statm") as statm:
            taken = int(statm.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
        for seed in range(first, first + count):
            r = random.Random(seed)
            case = r.choice(cases or (packed_case, packed_case, packed_case, audit_case))
            folder = base / "case"
            # Of the process's own time, since a machine may be busy; a hang takes none of that.
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            signal.setitimer(signal.ITIMER_REAL, 20 * SECONDS)
            try:
                outcome = case(r, base, folder)
            except (Exception, TooLong, SystemExit):  # noqa: BLE001 - what the law forbids
                outcome = "broken"
                broken.append(f"seed {seed}: {traceback.format_exc()[-1500:]}")
            finally:
                for timer in (signal.ITIMER_PROF, signal.ITIMER_REAL):
                    signal.setitimer(timer, 0)
                shutil.rmtree(folder, ignore_errors=True)
            key = f"{case.__name__} {outcome}"
            said[key] = said.get(key, 0) + 1
    return {"said": said, "broken": broken}


if __name__ == "__main__":
    print(json.dumps(run(int(sys.argv[1]), int(sys.argv[2]))))
