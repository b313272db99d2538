"""What tests of rounded values share: a layer of each kind, and files that were edited."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from nmflow.packed.files.container import checksum
from pruned import Attend, prune

MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(32, 24), (5, 32)),
    "linear without bias": (lambda: nn.Linear(32, 24, bias=False), (2, 3, 32)),
    "Conv1D of HF": (lambda: Conv1D(24, 32), (2, 3, 32)),
    "conv 3x3": (lambda: nn.Conv2d(16, 24, 3, 1, 1), (2, 16, 5, 6)),
    "conv 1d": (lambda: nn.Conv1d(16, 8, 5, 2, 2), (2, 16, 12)),
    "attention": (Attend, (7, 2, 32)),
    "attention other sizes": (lambda: Attend(kdim=16, vdim=24, bias=False), (7, 2, 32)),
}


def net() -> Any:
    torch.manual_seed(0)
    return prune(nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32)))


def first(y: Tensor | tuple[Tensor, Tensor | None]) -> Tensor:
    """The output of a network, or the first of attention's two."""
    return y[0] if isinstance(y, tuple) else y


def edit(folder: Path, change: Callable[[Any, Any], Any]) -> None:
    """Change the header and the tensors of a saved folder, with checksums that are right again."""
    path = folder / "nmflow.json"
    header = json.loads(path.read_text())
    assert header["layout"] == 2
    data = {n: t.clone() for n, t in load_file(folder / header["file"]).items()}
    change(header, data)
    save_file(data, folder / header["file"])
    header["tensors"] = {
        n: {"dtype": str(t.dtype)[6:], "shape": list(t.shape), "sha256": checksum(t)}
        for n, t in data.items()
    }
    path.write_text(json.dumps(header))
