"""`nmflow bench MODEL`: packed against the best dense way, by layer, end to end and decoding."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from nmflow.cli._output import JSON, show


def bench(
    model: Annotated[
        str,
        typer.Argument(
            help="vit-base, bert-base, minilm-l6, t5-base, a kind of transformers such as gpt2, a "
            "folder with weights, or a name on the hub (random weights); with --decode also a "
            "GGUF file."
        ),
    ],
    pattern: Annotated[
        str, typer.Option(help="N:M with N kept of every M; 'held' takes what the weights hold.")
    ] = "1:16",
    include: Annotated[
        str, typer.Option(help="Presets or globs of the weights, separated by commas.")
    ] = "ff",
    exclude: Annotated[str, typer.Option(help="Presets or globs to leave out.")] = "",
    tokens: Annotated[str, typer.Option(help="Token counts of the layers.")] = "1,16,197",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16.")] = "float32,bfloat16",
    batch: Annotated[int, typer.Option(min=1, help="Batch of the network.")] = 1,
    length: Annotated[int, typer.Option(min=1, help="Tokens of a text.")] = 128,
    threads: Annotated[int, typer.Option(min=1, help="Threads.")] = 1,
    layers: Annotated[bool, typer.Option(help="Measure single layers.")] = True,
    network: Annotated[bool, typer.Option(help="Measure the whole network.")] = True,
    decode: Annotated[
        int,
        typer.Option(
            min=0, help="Instead, measure a language model that adds so many tokens to a text."
        ),
    ] = 0,
    rivals: Annotated[
        str,
        typer.Option(
            help="What to compare with: int8, bfloat16, compile (takes a minute; not with "
            "--decode), onnxruntime (the extra onnx), llama.cpp (the extra llama; with --decode of "
            "a GGUF file); '' for nothing."
        ),
    ] = "int8,bfloat16,compile,onnxruntime,llama.cpp",
    seconds: Annotated[float, typer.Option(min=0.001, help="Time for each way.")] = 0.2,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for bench.csv and bench.png."),
    ] = None,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Measure packed layers and networks against the best dense way and what people deploy."""
    import torch
    from rich.text import Text

    from nmflow.bench import networks
    from nmflow.bench.bench import bench as measure
    from nmflow.bench.decoding import bench_decoding
    from nmflow.bench.plots import plot
    from nmflow.cli._errors import globs
    from nmflow.cli._output import console
    from nmflow.errors import CompressError

    counts = []
    for text in globs(tokens):
        if not text.isdigit():
            raise CompressError(f"tokens is {tokens!r}: give numbers such as 1,16,197")
        counts.append(int(text))
    if output is not None:  # before the measurement, which takes minutes
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CompressError(
                f"output is '{output}', which cannot be written: {error}"
            ) from error
    torch.set_num_threads(threads)
    beside = globs(rivals)
    chosen = None if pattern == "held" else pattern, globs(include), globs(exclude)
    with console(stderr=True).status("building the network") as status:
        said: dict[str, Any] = {
            "name": Path(model).name,
            "progress": lambda what: status.update(Text(f"measuring {what}")),
        }
        if decode:
            if "compile" in beside:  # generate is no one graph
                beside.remove("compile")
            built, gguf = networks.language_model(model)
            found = bench_decoding(built, *chosen, gguf=gguf, rivals=beside, new=decode, **said)
        else:
            if "llama.cpp" in beside:  # it runs language models only
                beside.remove("llama.cpp")
            built = networks.network(model)
            found = measure(
                built,
                networks.example(built, batch, length),
                *chosen,
                tokens=counts,
                dtypes=globs(dtype),
                layers=layers,
                network=network,
                rivals=beside,
                seconds=seconds,
                **said,
            )
    show(found, as_json)
    if output is not None:
        found.to_csv(output / "bench.csv")
        plot(found, output / "bench.png")
        typer.echo(f"wrote {output / 'bench.csv'} and {output / 'bench.png'}", err=as_json)
