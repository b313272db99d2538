"""The network of a command: built by a config, or loaded from a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nmflow.errors import ConfigError


def network(
    source: Path, config_only: bool = False, overrides: list[str] | None = None
) -> tuple[Any, Any, Any]:
    """The model, with the first run and an example batch of a config, or None twice for a folder.

    Raises:
        ConfigError: neither a YAML file nor a folder that `transformers` can load; overrides of a
            folder, which has no keys.
    """
    if source.is_dir() and not config_only:
        if overrides:
            raise ConfigError(
                f"override is {overrides[0]!r}, but source is {str(source)!r}, a model's folder "
                "without keys: give a YAML file"
            )
        return _from_folder(source), None, None
    from nmflow.experiments import tasks
    from nmflow.experiments.config import load

    run = next(load(source, overrides).runs())
    problem = tasks.build(run)
    return problem.model(), run, problem.example


def _from_folder(folder: Path) -> Any:
    from nmflow.experiments import architectures
    from nmflow.inspect.pretrained import from_folder

    return from_folder(folder, (architectures,))
