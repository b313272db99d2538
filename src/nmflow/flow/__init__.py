"""A recipe on an optimizer, which owns the dense weights; the network owns the sparse ones."""

from nmflow.flow.attach import Flow, FlowStage, attach
from nmflow.flow.observing import Observation, Observer, View

__all__ = ["Flow", "FlowStage", "Observation", "Observer", "View", "attach"]
