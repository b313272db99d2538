"""Kernels of packed layers: ops behind `torch.library`, one file per backend, and a registry."""

from __future__ import annotations

from nmflow.kernels.backend import Backend, Call
from nmflow.kernels.explain import Explanation, explain
from nmflow.kernels.int8_ops import matmul_int8, unpack_int8
from nmflow.kernels.ops import matmul, unpack
from nmflow.kernels.registry import BACKENDS, Choice, choose
from nmflow.kernels.step_ops import kept_linear

__all__ = [
    "BACKENDS",
    "Backend",
    "Call",
    "Choice",
    "Explanation",
    "choose",
    "explain",
    "kept_linear",
    "matmul",
    "matmul_int8",
    "unpack",
    "unpack_int8",
]
