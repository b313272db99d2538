"""Where figures come from: fingerprints of weights, versions, the machine."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch
from torch import nn

PACKAGES = ("nmflow", "torch", "transformers", "accelerate", "datasets", "numpy")


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of a network's weights and their names."""
    sha = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        sha.update(name.encode())
        sha.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def versions() -> dict[str, str]:
    """The versions that a run was made with."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed as a package"
    return found


def machine(device: torch.device) -> dict[str, Any]:
    """The machine of a run."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    return {"device": name, "threads": torch.get_num_threads(), "processes": world}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
