"""What machine code of a GPU needs, by the disassembler that Triton brings."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import tempfile
from pathlib import Path


def tool() -> str:
    """Where `cuobjdump` lies; empty where it is not."""
    spec = importlib.util.find_spec("triton")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        if (path := Path(place) / "backends/nvidia/bin/cuobjdump").exists():
            return str(path)
    return ""


def local_bytes(cubin: bytes) -> int:
    """Bytes of a thread that are not in registers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool(), "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.findall(r"(?:STACK|LOCAL):(\d+)", said.stdout + said.stderr)
    assert found, said
    return sum(map(int, found))
