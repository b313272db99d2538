"""Installing: with a compiler, without one, from an sdist and as a wheel; none of them may fail."""

import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
CHECK = """
import pathlib, torch, nmflow
from nmflow import native
assert pathlib.Path(nmflow.__file__).is_relative_to({target!r}), nmflow.__file__
kept = nmflow.mask(torch.tensor([[1.0, -3.0, 2.0, 0.5]]), "1:4")
assert kept.tolist() == [[False, True, False, False]]
layer = nmflow.compress(torch.nn.Sequential(torch.nn.Linear(16, 32)), "16:16", measure=False)
assert layer(torch.ones(2, 16)).shape == (2, 32)
print("native:", native.available(), native.why_not())
"""


def run(*command: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def tree(tmp_path) -> Path:
    """A copy of what is checked in, so that no build touches the checkout."""
    tree = tmp_path / "tree"
    tree.mkdir()
    names = ["csrc", "src", "setup.py", "pyproject.toml", "MANIFEST.in"]
    names += ["LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff"]
    for name in names:
        source = ROOT / name
        if source.is_dir():
            skip = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
            shutil.copytree(source, tree / name, ignore=skip)
        else:
            shutil.copy(source, tree / name)
    return tree


def install(what: Path, target: Path, **environment: str) -> str:
    """`pip install` of a folder or an archive into a folder of its own, and what it then says."""
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation"]
    log = run(*command, "-v", "--target", str(target), str(what), cwd=target.parent, **environment)
    code = CHECK.format(target=str(target))
    said = run(sys.executable, "-c", code, cwd=target.parent, PYTHONPATH=str(target))
    return said + log


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_with_a_compiler(tree, tmp_path):
    assert install(tree, tmp_path / "site").count("native: True") == 1
    assert len(list((tmp_path / "site" / "nmflow").glob("_native.*"))) == 1


def test_without_a_compiler(tree, tmp_path):
    said = install(tree, tmp_path / "site", CXX="/bin/false")
    assert "native: False the library was not built" in said
    assert "the native library was not built" in said
    assert not list((tmp_path / "site" / "nmflow").glob("_native.*"))


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_from_an_sdist(tree, tmp_path):
    code = "from setuptools.build_meta import build_sdist; print(build_sdist('dist'))"
    (tree / "dist").mkdir(exist_ok=True)
    name = run(sys.executable, "-c", code, cwd=tree).strip().splitlines()[-1]
    assert install(tree / "dist" / name, tmp_path / "site").count("native: True") == 1


def wheel(tree: Path, **environment: str) -> Path:
    code = "from setuptools.build_meta import build_wheel; print(build_wheel('dist'))"
    (tree / "dist").mkdir(exist_ok=True)
    said = run(sys.executable, "-c", code, cwd=tree, **environment)
    (name,) = (line for line in said.splitlines() if line.startswith("nmflow-") and ".whl" in line)
    return tree / "dist" / name


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_a_wheel_is_of_its_platform_and_of_every_python(tree):
    made = wheel(tree, NMFLOW_BUILD="required")
    _, _, python, abi, place = made.stem.split("-")
    assert (python, abi) == ("py3", "none")
    assert place.endswith(platform.machine())
    names = zipfile.ZipFile(made).namelist()
    assert "nmflow/_native.so" in names
    assert "nmflow/py.typed" in names
    configs = {name for name in names if name.startswith("nmflow/experiments/configs/")}
    assert {"demo.yaml", "sweeps/demo.yaml", "two-cores/vit-cifar10.yaml"} <= {
        name.removeprefix("nmflow/experiments/configs/") for name in configs
    }
    assert not [name for name in configs if "/study/" in name]


def test_a_wheel_without_the_library_is_of_every_platform(tree, tmp_path):
    made = wheel(tree, NMFLOW_BUILD="none")
    assert made.name.endswith("-py3-none-any.whl")
    assert not [n for n in zipfile.ZipFile(made).namelist() if "_native" in n]
    assert "native: False the library was not built" in install(made, tmp_path / "site")


@pytest.mark.parametrize("given", [{"CXX": "/bin/false"}, {"CXX": "/nowhere/c++"}])
def test_a_required_library_that_fails_is_an_error(tree, given):
    with pytest.raises(AssertionError, match=r"does not run|No such file"):
        wheel(tree, NMFLOW_BUILD="required", **given)


def test_an_unknown_way_to_build_is_an_error(tree):
    with pytest.raises(AssertionError, match="must be optional, required or none"):
        wheel(tree, NMFLOW_BUILD="maybe")


def test_an_installed_package_knows_its_configurations(tree, tmp_path):
    install(tree, tmp_path / "site", NMFLOW_BUILD="none")
    code = "from nmflow.experiments import config; print(config.load('demo').name)"
    said = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert said.split() == ["demo"]


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_editable(tree, tmp_path):
    """An editable install leaves the library out, or builds it in place."""
    where = tmp_path / "venv"
    run(sys.executable, "-m", "venv", "--system-site-packages", str(where), cwd=tmp_path)
    python = str(where / "bin" / "python")
    # The packages of the running interpreter (torch, setuptools) serve, without a download.
    paths = os.pathsep.join(p for p in sys.path if p.endswith("site-packages"))
    command = [python, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "-e", str(tree)]
    library = tree / "src" / "nmflow" / "_native.so"
    for compiler, built in (("/bin/false", False), (str(COMPILER), True)):
        run(*command, cwd=tmp_path, PYTHONPATH=paths, CXX=compiler)
        code = "from nmflow import native; print(native.available(), native.__file__)"
        said = run(python, "-c", code, cwd=tmp_path, PYTHONPATH=paths).split()
        assert said[0] == str(built), said
        assert library.exists() == built
