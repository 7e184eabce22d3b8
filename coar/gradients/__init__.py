"""Gate gradients: attributions from derivatives by gates instead of a regression on rows."""

from coar.gradients.gate_gradients import gate_gradients, plan_gate_gradients
from coar.gradients.study import GateGradientStudy

__all__ = ["GateGradientStudy", "gate_gradients", "plan_gate_gradients"]
