"""Masks: one op, which of a weight to keep, with a backend each for C++, Triton and plain torch."""

from nmflow.masks.activations import wanda_score
from nmflow.masks.forms import FORMS, importance, least_squares, soft_threshold
from nmflow.masks.held import hold, one_pass_holds
from nmflow.masks.launches import Job, Launch, begin_capture, end_capture, launches_of
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

__all__ = [
    "FORMS",
    "Job",
    "Launch",
    "begin_capture",
    "end_capture",
    "hold",
    "holds",
    "importance",
    "largest_groups",
    "launches_of",
    "least_squares",
    "mask",
    "one_pass",
    "one_pass_holds",
    "one_pass_serves",
    "project",
    "select",
    "soft_threshold",
    "touched",
    "wanda_score",
]
