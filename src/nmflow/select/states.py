"""The weights of a bare state dict, which has names and shapes but no modules."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from nmflow.select.fused import cut
from nmflow.select.heads import with_head
from nmflow.select.layer import Layer, Part
from nmflow.select.roles import clean, owners, role_of
from nmflow.select.stacks import Stack, axis_of
from nmflow.select.target import out_dim
from nmflow.select.weights import MHA, RNN, path_of

# Names under which a bare state holds weights of HF's Conv1D, which are stored (in, out).
_HF_CONV1D = {"c_attn", "c_fc", "c_proj", "q_attn"}


def layers_of_state(state: Mapping[str, torch.Size | tuple[int, ...]]) -> list[Layer]:
    """What `layers_of` returns, from names and shapes alone.

    Weights called `c_attn`, `c_fc`, `c_proj` or `q_attn` are taken as HF's `Conv1D`, stored
    (in, out), unless the shape of a fused `c_attn` or of a `c_fc` in the state says otherwise.
    A three-dimensional `gate_up_proj` beside a `down_proj` is a stack of experts.
    """
    names = [n for n in state if len(state[n]) >= 2]
    names.sort(key=lambda n: [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", n)])
    beside = owners(p for n in names for p in (clean(n), clean(path_of(n))))
    stored_in_out = _stored_in_out(state)
    layers = []
    for name in names:
        shape = tuple(state[name])
        path, _, own = name.rpartition(".")
        at = Stack(0 if path.rpartition(".")[2] in _HF_CONV1D and stored_in_out else 1)
        if own in ("gate_up_proj", "down_proj") and len(shape) == 3:
            pair = {x: tuple(state.get(f"{path}.{x}", ())) for x in ("gate_up_proj", "down_proj")}
            at = axis_of(own, pair)
        elif own != "weight" and own not in MHA and not RNN.fullmatch(own):
            at = Stack(at.dim, why_not="not called 'weight'")
        where = clean(path if own == "weight" else name)
        length, out = shape[at.dim], shape[out_dim(at.dim, at.stacked)]
        role = role_of(where, (out, length, *shape[2:]), beside.get(path_of(where), ""))
        parts = tuple(Part(*part) for part in cut(where, role, out, length))
        paths = tuple(dict.fromkeys((name, path, clean(name), clean(path))))
        layers.append(Layer(name, shape, at.dim, parts, paths, at.why_not, stacked=at.stacked))
    return with_head(layers, [len(x.shape) == 2 for x in layers], "attn" in beside.values(), False)


def _stored_in_out(state: Mapping[str, torch.Size | tuple[int, ...]]) -> bool:
    """Whether GPT-2's weights are stored (in, out), by the shape of a fused or widening one."""
    for name, shape in state.items():
        telling = name.endswith((".c_attn.weight", ".c_fc.weight")) and len(shape) == 2
        if telling and shape[0] != shape[1]:
            return shape[0] < shape[1]
    return True
