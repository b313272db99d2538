"""Check plain values against a pydantic model; a mistake is one sentence with its key."""

from __future__ import annotations

import difflib
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from nmflow.errors import ConfigError, NMFlowError


def parse(kind: type[BaseModel], raw: Any, where: str) -> Any:
    """Make a `kind` of `raw`; the first mistake becomes a ConfigError."""
    try:
        return kind.model_validate(raw)
    except ValidationError as failure:
        raise ConfigError(f"{where}: {_sentence(kind, failure)}") from None


def near(word: str, words: list[str]) -> str:
    """Suggest a replacement for `word`: the nearest of `words`, or all of them."""
    close = difflib.get_close_matches(word, words, n=1)
    if close:
        return f": did you mean '{close[0]}'?"
    return f": choose from {', '.join(sorted(words))}" if words else ""


def _sentence(kind: type[BaseModel], failure: ValidationError) -> str:
    error = failure.errors()[0]
    path = ".".join(str(part) for part in error["loc"]) or "the file"
    if error["type"] == "extra_forbidden":
        keys = _fields_at(kind, error["loc"][:-1])
        return f"unknown key '{path}'{near(str(error['loc'][-1]), keys)}"
    if error["type"] == "missing":
        return f"the key '{path}' is missing"
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, NMFlowError):
        return f"{path}: {cause}" if error["loc"] else str(cause)
    reason = str(cause) if isinstance(cause, ValueError) else error["msg"]
    value = repr(error["input"])
    return f"{path} is {value if len(value) < 80 else value[:77] + '...'}: {_lower(reason)}"


def _fields_at(kind: type[BaseModel], loc: tuple[Any, ...]) -> list[str]:
    for part in loc:
        if isinstance(part, int):
            continue
        field = kind.model_fields.get(str(part))
        inner = [field.annotation, *get_args(field.annotation)] if field else []
        kinds = [k for k in inner if isinstance(k, type) and issubclass(k, BaseModel)]
        if not kinds:
            return []
        kind = kinds[0]
    return list(kind.model_fields)


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:] if text[1:2].islower() else text
