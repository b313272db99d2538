"""A recipe on an optimizer, which owns the dense weights; the network owns the sparse ones."""

from nmflow.flow.attach import attach
from nmflow.flow.flow import Flow
from nmflow.flow.flow_stage import FlowStage
from nmflow.flow.graphs import GraphedStep
from nmflow.flow.observing import Observation, Observer, View
from nmflow.flow.sparse_steps import LayerStep, LayerSteps

__all__ = [
    "Flow",
    "FlowStage",
    "GraphedStep",
    "LayerStep",
    "LayerSteps",
    "Observation",
    "Observer",
    "View",
    "attach",
]
