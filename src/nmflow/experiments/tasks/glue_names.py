"""The names of GLUE's tasks as an option, without heavy imports."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

Name = Literal["cola", "sst2", "mrpc", "qqp", "mnli", "qnli", "rte", "wnli"]


def _once(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) < len(names):
        raise ValueError("a task is named twice")
    return names


Names = Annotated[tuple[Name, ...], Field(min_length=1), AfterValidator(_once)]
