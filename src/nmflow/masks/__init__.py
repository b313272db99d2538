"""Masks: one op, which of a weight to keep, with a backend each for C++, Triton and plain torch."""

from nmflow.masks.activations import wanda_score
from nmflow.masks.forms import FORMS, importance, least_squares, soft_threshold
from nmflow.masks.held import hold, one_pass_holds
from nmflow.masks.magnitude import (
    holds,
    largest_groups,
    mask,
    one_pass,
    one_pass_serves,
    project,
    select,
    touched,
)
from nmflow.masks.triton import Job, project_all

__all__ = [
    "FORMS",
    "Job",
    "hold",
    "holds",
    "importance",
    "largest_groups",
    "least_squares",
    "mask",
    "one_pass",
    "one_pass_holds",
    "one_pass_serves",
    "project",
    "project_all",
    "select",
    "soft_threshold",
    "touched",
    "wanda_score",
]
