"""Masks: one op, which of a weight to keep, with a backend each for C++, Triton and plain torch."""

from nmflow.masks.activations import wanda_score
from nmflow.masks.held import hold, one_pass_holds
from nmflow.masks.magnitude import holds, mask, one_pass, one_pass_serves, project, select, touched
from nmflow.masks.triton import Job, project_all

__all__ = [
    "Job",
    "hold",
    "holds",
    "mask",
    "one_pass",
    "one_pass_holds",
    "one_pass_serves",
    "project",
    "project_all",
    "select",
    "touched",
    "wanda_score",
]
