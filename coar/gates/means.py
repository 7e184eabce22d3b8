"""Means of what components emit or are read as, over examples and positions: what `value="mean"` puts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from coar.components import ComponentSet
from coar.errors import ComponentError
from coar.gates.convention import Means
from coar.gates.interception import Interception
from coar.gates.sites import Gate, Site, make_sites


def measure_means(
    model: nn.Module,
    components: ComponentSet,
    batches: Iterable[Any],
    run: Callable[[nn.Module, Any], Any],
) -> Means:
    """Mean of each entry of every component, over all examples and positions.

    Args:
        model: a copy on the batches' device, in eval mode.
        components: of this model.
        batches: of the task's data.
        run: runs the model on a batch, for example the task's output function.

    Returns:
        Group name -> float64 [count * width]. Positions that a batch's `attention_mask` hides do not
        count where it fits what a layer sees; a layer called several times counts every call.

    Raises:
        ComponentError: a layer was never called, or is not one that can be watched.
    """
    sites = make_sites(model, components)
    watch = _Watch(sites)
    with torch.no_grad():
        for batch in batches:
            watch.mask = _attention_mask(model, batch)
            with watch:
                run(model, batch)
    missing = [
        gate.group.name
        for site in sites
        for gate in site.gates
        if not bool(watch.counts.get(gate.group.name, torch.zeros(1)).all())
    ]
    if missing:
        raise ComponentError(
            "these components have no mean: their layers were never called",
            expected="a forward pass that calls each layer",
            got=", ".join(missing[:5]),
            todo="exclude them, or use value=0.0",
        )
    return {name: (total / watch.counts[name]).cpu().numpy() for name, total in watch.sums.items()}


def _attention_mask(model: nn.Module, batch: Any) -> Tensor | None:
    """The batch's own mask, wherever in it, if it hides anything."""
    if isinstance(batch, Mapping):
        mask = batch.get("attention_mask")
        if not isinstance(mask, Tensor) or bool(mask.all()):
            return None
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise ComponentError(
                "means with padding: which positions of an encoder-decoder model a mask hides is not known",
                expected="batches without padding",
                got="an attention_mask that hides positions",
                todo="batch examples of equal length, or use a number as value",
            )
        return mask
    entries = batch if isinstance(batch, list | tuple) else []
    return next((m for entry in entries if (m := _attention_mask(model, entry)) is not None), None)


class _Watch(Interception):
    def __init__(self, sites: list[Site]) -> None:
        super().__init__(sites)
        self.mask: Tensor | None = None
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}

    def on_input(self, site: Site, x: Tensor, channels: int) -> Tensor:
        for gate in site.inputs:
            self._add(gate, x, channels, 0, x.shape[channels])
        return x

    def on_output(self, site: Site, y: Tensor, channels: int, bias: Tensor | None) -> Tensor:
        del bias
        for gate in site.outputs:
            size = y.shape[channels]
            used = (0, size) if self.third is None else (self.third * size // 3, (self.third + 1) * size // 3)
            self._add(gate, y, channels, *used)
        return y

    def _add(self, gate: Gate, values: Tensor, channels: int, first: int, last: int) -> None:
        """Count entries first .. last - 1, those of the group that are among them."""
        group = gate.group
        start, stop = max(first, group.offset), min(last, group.stop)
        if start >= stop:
            return
        own = values.narrow(channels, start, stop - start)
        rows = own.movedim(channels, -1).reshape(-1, stop - start).double()
        visible = self.mask
        if visible is not None and channels == -1 and _fits(visible, values):
            rows = rows[visible.reshape(-1).bool()]
        if group.name not in self.sums:
            self.sums[group.name] = rows.new_zeros(group.stop - group.offset)
            self.counts[group.name] = rows.new_zeros(group.stop - group.offset)
        entries = slice(start - group.offset, stop - group.offset)
        self.sums[group.name][entries] += rows.sum(dim=0)
        self.counts[group.name][entries] += len(rows)


def _fits(mask: Tensor, values: Tensor) -> bool:
    """Whether a mask [examples, positions] is of these rows: flattened, or examples first."""
    as_many = values.shape[:-1].numel() == mask.numel()
    return as_many and (values.ndim == 2 or len(values) == len(mask))


def pick_means(means: Means | None, components: ComponentSet, indices: Iterable[int]) -> Means | None:
    """Means of `components.pick(indices)`."""
    if means is None:
        return None
    picked: dict[str, np.ndarray] = {}
    for index in indices:
        group, number = components.locate(int(index))
        entries = slice(number * group.width, (number + 1) * group.width)
        picked[group.component_name(number)] = means[group.name][entries]
    return picked
