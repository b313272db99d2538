"""The names of tasks, the file of each, and its options, checked."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from nmflow.errors import ConfigError
from nmflow.experiments.config_errors import parse

# Each file has `Options`, a pydantic model, and `build(run) -> Problem`. It is imported on use, so
# that a configuration is checked without heavy imports.
FILES = {
    "language-modelling": "lm",
    "image-classification": "vision",
    "image-classification-stream": "image_stream",
    "text-classification": "classification",
    "text-to-text": "text_to_text",
    "translation": "translation",
    "token-modelling": "tokens",
    "instruction-tuning": "instructions",
}


def module(task: str) -> ModuleType:
    """The file of a task."""
    if task not in FILES:
        close = difflib.get_close_matches(task, FILES, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"choose from {', '.join(FILES)}"
        raise ConfigError(f"task is {task!r}: {hint}")
    return importlib.import_module(f"nmflow.experiments.tasks.{FILES[task]}")


def options(task: str, raw: Mapping[str, Any]) -> Any:
    """The task's options, checked."""
    return parse(module(task).Options, dict(raw), "options")
