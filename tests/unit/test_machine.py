"""The extras that `doctor` lists are those of the installed package, whatever their names."""

from __future__ import annotations

import importlib.metadata

import pytest

from nmflow.inspect import machine

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
