"""`import nmflow` brings torch and numpy and no more: what takes seconds waits until it is used."""

import subprocess
import sys

import pytest

# Each takes from a tenth of a second to several; the extras' packages need not be installed.
HEAVY = (
    "torch.distributed.tensor",
    "torch.utils.flop_counter",
    "torch._dynamo",
    "torch._inductor",
    "torch.onnx",
    "triton",
    "sympy",
    "transformers",
    "lightning",
    "datasets",
    "accelerate",
    "pandas",
    "pyarrow",
    "matplotlib",
    "scipy",
    "sklearn",
    "pydantic",
    "yaml",
    "safetensors",
    "typer",
    "rich",
    "onnx",
    "ray",
)
REPORT = """
import sys
import torch
before = set(sys.modules)
import nmflow
new = set(sys.modules) - before
import nmflow.bench, nmflow.cli, nmflow.integrations
print(*sorted(new))
print(*sorted(set(sys.modules) - before - new))
import nmflow.experiments.config
nmflow.cli.app()
print(*sorted(set(sys.modules) - before))
"""
OF_RUNS = {"transformers", "datasets", "accelerate", "pandas", "matplotlib", "scipy", "sklearn"}


def test_importing_nmflow_adds_nothing_heavy():
    pytest.importorskip("pydantic", reason="the extra experiments is not installed")
    command = [sys.executable, "-c", REPORT]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    new, of_rooms, of_configs = (set(line.split()) for line in done.stdout.splitlines())
    assert "nmflow.flow.sharding" in new
    assert "nmflow.cli" in of_rooms
    assert not new & set(HEAVY)
    assert not of_rooms & set(HEAVY)
    assert "pydantic" in of_configs
    assert not of_configs & OF_RUNS  # which a run needs, and reading its configuration does not


def test_a_sharded_parameter_is_known_by_its_class():
    """In a process of its own: here another test may have imported DTensor."""
    code = """
import sys
import torch
import nmflow
from nmflow.flow.sharding import local, sharded

x = torch.nn.Parameter(torch.ones(4, 4))
assert "torch.distributed.tensor" not in sys.modules
assert not sharded(x) and local(x).data_ptr() == x.data_ptr()

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
assert not sharded(x)
d = distribute_tensor(torch.ones(4, 4), init_device_mesh("cpu", (1,)), [Shard(0)])
assert sharded(d) and not sharded(local(d))
dist.destroy_process_group()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
