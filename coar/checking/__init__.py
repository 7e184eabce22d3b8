"""Trust: are attributions right? Fresh ablations, an audit of derivatives, and calibration by real rows."""

from coar.checking.calibration import calibrate
from coar.checking.trust import Check, check

__all__ = ["Check", "calibrate", "check"]
