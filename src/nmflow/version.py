"""The version, as the package was installed; its one place is pyproject.toml."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("nmflow")
except PackageNotFoundError:  # the sources on the path, not installed
    __version__ = "0+unknown"
