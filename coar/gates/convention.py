"""What ablation means; everything that gates a model follows this.

With gate g, module output `W x + b` and constant c, a component that is units of the output gives

- `bias="keep"`, `value="zero"`: `g W x + b` (as published: the bias of a removed unit stays)
- `bias="ablate"`, `value="zero"`: `g (W x + b)`
- `value=c` or `value="mean"`: `g (W x + b) + (1 - g) c`

and one that is entries of the input (a head, a hidden unit of an MLP) replaces its slice of x by
`g x + (1 - g) c`, c = 0 for `value="zero"`; it has no bias of its own, so `bias` does not matter. A
component that is `whole` (a residual branch) always takes its bias with it.

In one formula: a gate moves what is gated, y, from what it is at rest: `g y + (1 - g) rest`. With
"mean", rest is the unit's mean over the task's examples and positions, tokens that an
`attention_mask` hides left out.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from coar.components import ComponentGroup
from coar.errors import SettingError

Bias = Literal["keep", "ablate"]
Value = float | Literal["zero", "mean"]
Means = dict[str, np.ndarray]  # group name -> mean of each of its entries, float64 [count * width]


def check_convention(bias: Bias, value: Value) -> None:
    """Raise `SettingError` unless `bias` and `value` are ones defined above."""
    if bias not in ("keep", "ablate"):
        raise SettingError("unknown bias convention", expected="'keep' or 'ablate'", got=repr(bias))
    number = isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value)
    if value not in ("zero", "mean") and not number:
        raise SettingError(
            "unknown ablation value", expected="'zero', 'mean' or a finite number", got=repr(value)
        )


def rest(
    group: ComponentGroup, biases: Tensor | None, bias: Bias, value: Value, means: Means | None
) -> Tensor:
    """What the entries of a fully ablated group are, float64 [count * width].

    Args:
        group: the components.
        biases: of the same units, None where they have none.
        bias: the convention.
        value: the convention.
        means: needed for `value="mean"`.
    """
    size = group.count * group.width
    if value == "mean":
        if means is None or group.name not in means:
            raise SettingError(
                'value="mean" needs the mean of every component',
                expected=f"means of {group.name}",
                got="none",
                todo="let ComponentAblation measure them: it has the task's data",
            )
        return torch.as_tensor(means[group.name], dtype=torch.float64)
    if value != "zero":
        return torch.full((size,), float(value), dtype=torch.float64)
    if group.side == "output" and bias == "keep" and not group.whole and biases is not None:
        return biases.detach().double()
    return torch.zeros(size, dtype=torch.float64)
