"""Which source tells the linear ceiling at which fraction, and whether it is of the same experiment."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal

import numpy as np

from coar.attributions import Attributions
from coar.axes import Axis
from coar.errors import CoarWarning, FitError, SettingError
from coar.evaluation.ceiling import ceiling_from_replicates, has_replicates, linear_ceiling, tells_ceiling
from coar.evaluation.held_out import own_fraction
from coar.evaluation.predicted import Chosen, PackedMasks, Predicted
from coar.experiments.base import Experiment
from coar.metrics import Estimate, Table
from coar.study import Study

CeilingSource = Attributions | Study
PRECISE = 0.06  # width of the interval of a ceiling


class Ceilings:
    """Sources of the ceiling for some columns of an experiment.

    Args:
        asked: as in `coar.evaluate`.
        methods: by name; "auto" looks among them.
        experiment: that is evaluated.
        columns: of the methods.
        output: name of the output.
        fractions: that will be tested.

    Raises:
        SettingError: what is asked for is no source.
        AxisError: a source is of another model, of other components, or lacks columns.
    """

    def __init__(
        self,
        asked: CeilingSource | Sequence[CeilingSource] | Literal["auto"] | None,
        methods: Mapping[str, Attributions],
        experiment: Experiment,
        columns: Axis,
        output: str,
        fractions: Sequence[float],
    ) -> None:
        self._output, self._columns = output, columns
        self._sources = _sources(asked, methods, output)
        self._positions = [self._located(source, experiment) for source in self._sources]
        if asked != "auto":
            self._warn_of_other_fractions(fractions)

    def _located(self, source: CeilingSource, experiment: Experiment) -> np.ndarray:
        name = "ceiling source"
        source.components.require_same(experiment.components, name, "experiment")
        axis = source.columns[self._output] if isinstance(source, Study) else source.columns
        return self._columns.locate(axis, "methods", name)

    def _warn_of_other_fractions(self, fractions: Sequence[float]) -> None:
        for source in self._sources:
            if (known := _fraction_of(source)) not in fractions:
                tested = ", ".join(f"{fraction:g}" for fraction in fractions)
                warnings.warn(
                    f"{source!r} tells the linear ceiling at an ablation fraction of {known}, which is not "
                    f"among those tested: {tested}",
                    CoarWarning,
                    stacklevel=4,
                )

    def at(self, fraction: float, masks: PackedMasks, truth: Table, seed: int) -> tuple[Estimate, str] | None:
        """The ceiling at a fraction, and where it is from; None where it is not known.

        Rows are believed where they tell it well: they know no derivatives that could be wrong.
        """
        known: list[tuple[Estimate, str]] = []
        for source, positions in zip(self._sources, self._positions, strict=True):
            if _fraction_of(source) != fraction:
                continue
            if isinstance(source, Study):
                with suppress(FitError):  # no output changes: there is nothing to reach
                    found = linear_ceiling(source, output=self._output, columns=positions)
                    known.append((found, f"{sum(map(len, source.finished())):,} rows"))
                    if found.high - found.low <= PRECISE:
                        return known[-1]
                continue
            whole = np.array_equal(positions, np.arange(len(source.columns)))
            own = source if whole else source.subset(positions)
            predicted: list[Table] = [Chosen(Predicted(source, masks), positions)]
            told = ceiling_from_replicates([own], truth, predicted, fraction=fraction, seed=seed)
            if told is not None:
                passes = source.provenance.get("passes", "?")
                known.append((told, f"gate gradients of {passes} passes"))
        return min(known, key=lambda one: one[0].high - one[0].low, default=None)


def _fraction_of(source: CeilingSource) -> float | None:
    if isinstance(source, Study):
        return getattr(source.spec.design, "ablation_fraction", None)
    return own_fraction(source)


def _sources(asked: object, methods: Mapping[str, Attributions], output: str) -> list[CeilingSource]:
    if asked is None:
        return []
    if isinstance(asked, str) and asked == "auto":
        return [one for one in methods.values() if has_replicates(one)]
    several = isinstance(asked, list | tuple)
    found: list[Any] = list(asked) if isinstance(asked, list | tuple) else [asked]
    for one in found:
        outputs = one.columns if isinstance(one, Study) else [getattr(one, "output", None)]
        if not tells_ceiling(one) or output not in outputs:
            raise SettingError(
                "this does not tell the linear ceiling",
                expected=f"a coar.Study of output {output!r} with 40 or more random ablations, or its gate "
                "gradients from three replicates or more",
                got=repr(one)[:100] + (" in the list" if several else ""),
                todo="gate gradients of more passes, a study, or ceiling=None",
            )
    return found
