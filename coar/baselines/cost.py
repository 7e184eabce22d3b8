"""What attributions cost, in forward passes over all examples: what is compared is compared at equal cost.

A backward pass counts as two forwards, and each value of an example needs one of its own. Checks at
start-up, on a few examples, are not counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from coar.axes import Axis

BACKWARD = 2  # forwards


def pass_cost(columns: Axis) -> int:
    """Forwards of one pass: a forward, and a backward for every value of an example.

    >>> axis = Axis("columns", ["a", "b", "c"], {}, {"example": [0, 0, 1]})
    >>> pass_cost(axis)
    5
    """
    values = int(np.bincount(columns.fields["example"]).max(initial=0))
    return 1 + BACKWARD * values


def spent(provenance: Mapping[str, Any], columns: Axis) -> int | None:
    """Forwards that attributions took, from what they say of themselves; None if they do not."""
    if "forwards" in provenance:
        return provenance["forwards"]
    if "passes" in provenance and "example" in columns.fields:
        return int(provenance["passes"]) * pass_cost(columns)
    return provenance.get("rows")
