"""What attributions cost, in forward passes over all examples: what is compared is compared at equal cost.

As for gate gradients a backward pass counts as two forwards, and each value of an example needs one of
its own. Checks at start-up, on a few examples, are not counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from coar.axes import Axis
from coar.gradients.provenance import FORWARDS_PER_PASS


def cost_of_passes(passes: int, columns: Axis) -> int:
    """Forwards that passes are worth: each a forward, and a backward for every value of an example.

    >>> cost_of_passes(10, Axis("columns", ["a", "b", "c", "d"], {}, {"example": [0, 0, 1, 1]}))
    50
    """
    values = len(columns) / max(1, len(np.unique(columns.fields["example"])))
    return round(passes * (1 + (FORWARDS_PER_PASS - 1) * values))


def spent(provenance: Mapping[str, Any], columns: Axis) -> int | None:
    """Forwards that attributions took, from what they say of themselves; None if they do not."""
    if "forwards" in provenance:
        return provenance["forwards"]
    if "passes" in provenance and "example" in columns.fields:
        return cost_of_passes(int(provenance["passes"]), columns)
    return provenance.get("rows")
