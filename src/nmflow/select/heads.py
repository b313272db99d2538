"""Find output heads and stems that names do not give away."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from nmflow.select.layer import Layer
from nmflow.select.roles import clean


def told_heads(model: nn.Module) -> set[int]:
    """The ids of the parameters that a transformers model returns as its output embeddings."""
    found = set()
    for module in model.modules():
        ask = getattr(module, "get_output_embeddings", None)
        if ask is None:
            continue
        try:
            head = ask()
        except (NotImplementedError, AttributeError):  # a wrapper without one of its own
            continue
        if isinstance(head, nn.Module):
            found |= {id(p) for p in head.parameters()}
    return found


def with_head(
    layers: list[Layer], linear: Sequence[bool], attention: bool, found: bool
) -> list[Layer]:
    """Call the last `nn.Linear` the head if no weight is one and nothing speaks against it.

    Three things speak against it: its name gives it a role; it lies in a block that repeats; or a
    token embedding is as wide as its output, so it writes into the residual stream and the head is
    tied to the embedding.

    Args:
        layers: the weights, in the order of the model.
        linear: which of them belong to an `nn.Linear`.
        attention: whether there is attention in the model.
        found: whether a head is known already.
    """
    usable = [i for i, layer in enumerate(layers) if not layer.why_not]
    if found or any(part.role == "head" for i in usable for part in layers[i].parts):
        return layers
    last = max((i for i in usable if linear[i]), default=None)
    candidates = [i for i in usable if layers[i].parts[0].role not in ("embedding", "position")]
    if last is None or len(candidates) < 2:
        return layers
    layer = layers[last]
    flat = min(path.count(".") for path in layer.paths) == 0
    if layer.parts[0].role != "other" and (not flat or attention or layer.parts[0].role != "ff"):
        return layers
    places = Counter((_place(x.name), x.shape) for x in layers)
    widths = {x.shape[1] for x in layers if x.parts and x.parts[0].role == "embedding" and x.shape}
    if (not flat and places[_place(layer.name), layer.shape] > 1) or layer.out in widths:
        return layers
    head = layer.parts[0]._replace(role="head", start=0, stop=layer.out)
    return [replace(x, parts=(head,)) if x is layer else x for x in layers]


def _place(name: str) -> str:
    """A name without its block numbers, which a plain sequence of layers keeps."""
    return re.sub(r"(?<![^.])\d+(?=\.\w+\.)", "*", clean(name))
