"""The extras that `doctor` lists are those of the installed package, whatever their names."""

from __future__ import annotations

import importlib.metadata

import pytest
import torch

from nmflow.inspect import machine
from nmflow.kernels import gpu_driver
from nmflow.masks import triton as masks_triton

NEEDS = [
    "torch>=2.6",
    'torch>=2.6; extra == "one"',
    "made-up_package>=1 ; extra == 'one'",
    'another.made-up[with]>=2; platform_system == "Linux" and extra == "two-words"',
    'nmflow[two-words]; extra == "all"',
    'numpy; extra == "all"',
    'pytest; extra == "dev"',
    'mkdocs; extra == "docs"',
    'nvcc; extra == "gpu-dev"',
]


def test_extras_are_read_from_the_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: NEEDS)
    assert machine.extras() == {
        "one": ["torch", "made-up_package"],
        "two-words": ["another.made-up"],
        "all": ["numpy"],
    }
    found = {f.what: f for f in machine.doctor()}
    assert found["extra one"].state == "missing"
    assert found["extra one"].found == "without made-up_package"
    assert "nmflow[two-words]" in found["extra two-words"].mend
    assert found["extra all"].found == f"numpy {importlib.metadata.version('numpy')}"


@pytest.mark.parametrize("there", [True, False])
def test_without_requirements_there_are_none(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(name: str) -> None:
        if not there:
            raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", requires)
    assert machine.extras() == {}


@pytest.mark.parametrize(("why", "state"), [(None, "ok"), ("there is no libnvrtc", "slow")])
def test_a_gpu_whose_triton_is_of_another_distribution(
    why: str | None, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nightly builds of torch bring pytorch-triton, and Windows has triton-windows."""
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    version = importlib.metadata.version

    def named(package: str) -> str:
        if package == "triton":
            raise importlib.metadata.PackageNotFoundError(package)
        return version(package)

    monkeypatch.setattr(importlib.metadata, "version", named)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(masks_triton, "why_not", lambda: "")
    monkeypatch.setattr(gpu_driver, "why_not", lambda: why)
    found = {f.what: f for f in machine._gpu()}
    assert found["GPU"].found == "H100, sm_90"
    assert found["Triton"].found == triton.__version__
    assert found["packed layers on the GPU"].state == state
