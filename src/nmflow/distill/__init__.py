"""Distillation: the dense network teaches the sparse one, in one line of a training step."""

from nmflow.distill.distiller import Distiller
from nmflow.distill.losses import hidden_loss, logit_loss, multilabel_loss, regression_loss

__all__ = ["Distiller", "hidden_loss", "logit_loss", "multilabel_loss", "regression_loss"]
