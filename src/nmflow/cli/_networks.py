"""The network that a command speaks of: by a config, or in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nmflow.errors import ConfigError


def network(
    source: Path, config_only: bool = False, overrides: list[str] | None = None
) -> tuple[Any, Any, Any]:
    """A model, and for a config its first run and an example batch; else None twice.

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
    import transformers

    from nmflow.experiments import architectures as networks

    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"source is {str(folder)!r}: it holds no model ({reason})") from None
    for name in config.architectures or []:
        for place in (transformers, networks):
            if hasattr(place, name):
                return getattr(place, name).from_pretrained(folder, local_files_only=True)
    raise ConfigError(f"source is {str(folder)!r}: its config.json names no known architecture")
