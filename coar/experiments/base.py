"""Experiment: masks in, outputs out. The only place where COAR and its siblings differ.

An experiment names what its masks switch (`components`) and what it measures (`columns`, one axis
per output), and prepares a runner on a device. Everything else (store, study, regression,
attributions, evaluation) knows experiments through this protocol alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from coar.axes import Axis


@runtime_checkable
class Runner(Protocol):
    """An experiment made ready on one device."""

    def __call__(self, masks: np.ndarray) -> dict[str, np.ndarray]:
        """Run some rows.

        Args:
            masks: bool [rows, components], True = kept.

        Returns:
            For each output, float32 or float64 [rows, columns].
        """

    def record(self) -> dict[str, Any]:
        """What the numbers may depend on: device, CPU capability, versions, precision, batch size, ..."""


@runtime_checkable
class Experiment(Protocol):
    """What a study runs."""

    components: Axis

    @property
    def columns(self) -> Mapping[str, Axis]:
        """The columns axis of each output."""

    @property
    def accuracy_outputs(self) -> frozenset[str]:
        """Names of outputs that are > 0 exactly where the prediction is right."""

    @property
    def device(self) -> torch.device:
        """Where it runs unless an executor says otherwise."""

    def fingerprint(self) -> dict[str, str]:
        """Digests of all that the numbers depend on, by name, so that errors can say what differs."""

    def to_spec(self) -> dict[str, Any]:
        """The `experiment` part of a spec, from which `coar.spec.build_experiment` makes it again."""

    def prepare(
        self, device: torch.device, batch_size: int | None = None, precision: str = "float32"
    ) -> Runner:
        """Make a runner; `batch_size` None lets the experiment choose."""


def full_fingerprint(experiment: Experiment) -> dict[str, str]:
    """An experiment's fingerprint and its class: a subclass may compute other things from the same parts."""
    return experiment.fingerprint() | {"class": type(experiment).__qualname__}
