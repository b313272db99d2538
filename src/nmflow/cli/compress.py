"""`nmflow compress CHECKPOINT -o DIR`: write a network with its N:M weights packed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer


def compress(
    checkpoint: Annotated[
        Path, typer.Argument(help="A folder of Hugging Face's, or a .safetensors or .pt file.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")],
    pattern: Annotated[
        str, typer.Option(help="N:M with N kept of every M; empty finds what each weight holds.")
    ] = "",
    include: Annotated[
        str, typer.Option(help="Presets or globs of the weights, separated by commas.")
    ] = "*",
    exclude: Annotated[str, typer.Option(help="Presets or globs to leave dense.")] = "",
    tokens: Annotated[
        str,
        typer.Option(
            help="Token counts that you serve, such as 1,197: each layer is measured, and stays "
            "dense if that is faster. Needs a folder; empty packs every N:M weight."
        ),
    ] = "",
    values: Annotated[
        str,
        typer.Option(
            help="int8 rounds the kept values to 8 bits. Needs a folder; empty keeps them."
        ),
    ] = "",
    activations: Annotated[
        str, typer.Option(help="With --values int8: float, or int8 to round inputs as well.")
    ] = "float",
    dtype: Annotated[
        str,
        typer.Option(
            help="bfloat16 lets packed layers of float32 multiply in bfloat16. Needs a folder."
        ),
    ] = "",
    recipe: Annotated[
        str, typer.Option(help="How it was trained, for the model card; found for a run's network.")
    ] = "",
    quality: Annotated[
        list[str] | None,
        typer.Option(help="A figure for the model card, such as accuracy=0.91; may be repeated."),
    ] = None,
) -> None:
    """Pack the N:M weights of CHECKPOINT into the folder OUTPUT, and print the result for each."""
    from nmflow import packed
    from nmflow.cli._errors import globs
    from nmflow.cli._networks import network
    from nmflow.cli._output import console
    from nmflow.errors import CompressError
    from nmflow.inspect.checkpoints import open_state
    from nmflow.packed.files.container import is_packed
    from nmflow.packed.files.saving import save_beside

    if not all(count.isdigit() for count in globs(tokens)):
        raise CompressError(f"tokens is {tokens!r}: give numbers such as 1,197")
    if os.path.realpath(output) in (os.path.realpath(checkpoint), _folder_of(checkpoint)):
        raise CompressError(f"output is '{output}', where the checkpoint is: give another folder")
    if is_packed(checkpoint):
        raise CompressError(f"checkpoint is '{checkpoint}', which is packed already: nothing to do")
    counts = [int(count) for count in globs(tokens)]
    chosen = globs(include)
    names = "*" if chosen == ["*"] else chosen
    held = pattern or None
    said, figures = _trained(checkpoint)
    said, figures = recipe or said, _figures(quality or []) or figures
    if os.path.lexists(checkpoint / "config.json"):
        model, _, _ = network(checkpoint)
        made = packed.compress(
            model, held, names, globs(exclude), tokens=counts or (1,), measure=bool(counts),
            inplace=True, values=values or None, activations=activations, dtype=dtype or None,
        )  # fmt: skip
        report = packed.report_of(made)
        save_beside(made, output, checkpoint, said, figures)
    elif counts or values or dtype or activations != "float":
        raise CompressError(
            f"checkpoint is '{checkpoint}', which has no config.json to build a network from: "
            "leave tokens, values, activations and dtype out, or give a Hugging Face folder"
        )
    else:
        state = open_state(checkpoint)
        tensors = {name: state.read(name) for name in state.shapes}
        report = packed.save_state(tensors, output, held, names, globs(exclude))
    size = sum(file.stat().st_size for file in output.iterdir() if file.is_file())
    console().print(f"{report}\nwrote {output}: {size:,} bytes")


def _folder_of(checkpoint: Path) -> str:
    """The folder of a checkpoint file; a folder stands for itself."""
    place = os.path.realpath(checkpoint)
    return place if os.path.isdir(place) else os.path.dirname(place)


def _figures(given: list[str]) -> dict[str, float]:
    """Figures from the command line, such as `accuracy=0.91`."""
    from nmflow.errors import CompressError

    figures = {}
    for one in given:
        name, _, value = one.partition("=")
        try:
            figures[name] = float(value)
        except ValueError:
            raise CompressError(
                f"quality is {one!r}: write a figure such as accuracy=0.91"
            ) from None
    return figures


def _trained(checkpoint: Path) -> tuple[str | None, dict[str, float]]:
    """The recipe and test figures of the run whose folder holds the network, if there is one."""
    from nmflow import disk

    try:
        result = disk.read_json(checkpoint.parent / "result.json")
        figures = {str(name): float(value) for name, value in result["test"].items()}
        return str(result["recipe"]), figures
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None, {}
