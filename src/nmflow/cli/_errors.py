"""Parsing that several commands share."""

from __future__ import annotations


def globs(text: str) -> list[str]:
    """`ff, *.attn.*` as a list."""
    return [part.strip() for part in text.split(",") if part.strip()]
