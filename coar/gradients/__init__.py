"""Gate gradients: attributions from derivatives by gates instead of a regression on rows."""

from coar.gradients.gate_gradients import gate_gradients

__all__ = ["gate_gradients"]
