"""evaluate: how well attributions predict ablations that nobody has fitted.

For each ablation fraction, fresh masks are drawn from a stream of their own, the model is really
ablated, and every method predicts the same outputs. Figures per column: Pearson and Spearman
correlation over rows, R2 and calibration slope in output units. Intervals come from a two-way
bootstrap over columns and rows; methods are compared on the same draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from coar.attributions import Attributions
from coar.axes import Axis
from coar.designs import EVALUATION, Bernoulli
from coar.errors import FitError, SettingError, StudyError
from coar.executors.base import Executor
from coar.experiments.base import Experiment
from coar.metrics import bootstrap_means, interval, pearson, per_column
from coar.progress import progress_bar
from coar.settings import whole_number
from coar.study import Study
from coar.work import run_rows

if TYPE_CHECKING:
    import pandas

DRAWS = 500


@dataclass(repr=False)
class Evaluation:
    """True and predicted outputs under held-out ablations.

    Attributes:
        columns: axis of the outputs.
        truth: per fraction, float32 [rows, columns].
        predictions: per method and fraction, float32 [rows, columns].
        seed: of the masks and of the bootstrap.
    """

    columns: Axis
    truth: dict[float, np.ndarray]
    predictions: dict[str, dict[float, np.ndarray]]
    seed: int
    _means: dict[tuple[str, float], np.ndarray] = field(default_factory=dict, repr=False)

    def __repr__(self) -> str:
        fractions = ", ".join(f"{fraction:g}" for fraction in self.truth)
        return f"Evaluation({', '.join(self.methods)}; {len(self.columns)} columns, fractions {fractions})"

    @property
    def methods(self) -> list[str]:
        """Names of the methods, in the order given."""
        return list(self.predictions)

    @property
    def table(self) -> pandas.DataFrame:
        """Tidy: method, ablation_fraction, column, pearson, spearman, r2, slope (NaN = not defined)."""
        import pandas

        parts = []
        for method, by_fraction in self.predictions.items():
            for fraction, predicted in by_fraction.items():
                figures = per_column(self.truth[fraction], predicted)
                head = {"method": method, "ablation_fraction": fraction, "column": self.columns.names}
                parts.append(pandas.DataFrame(head | figures))
        return pandas.concat(parts, ignore_index=True)

    def means(self) -> pandas.DataFrame:
        """Per method and fraction: mean correlation over columns with its 95 % interval, mean R2, slope.

        `undefined` counts columns whose true or predicted output is constant; they are left out.
        """
        import pandas

        rows = []
        for key, part in self.table.groupby(["method", "ablation_fraction"], sort=False):
            method, fraction = cast("tuple[str, float]", key)
            low, high = interval(self._bootstrap(method, fraction))
            rows.append(
                {
                    "method": method,
                    "ablation_fraction": fraction,
                    "correlation": part.pearson.mean(),
                    "low": low,
                    "high": high,
                    "spearman": part.spearman.mean(),
                    "r2": part.r2.median(),
                    "slope": part.slope.median(),
                    "undefined": int(part.pearson.isna().sum()),
                }
            )
        return pandas.DataFrame(rows)

    def compare(self, first: str, second: str) -> pandas.DataFrame:
        """Paired difference of mean correlations, first - second, with 95 % intervals, per fraction.

        Over the columns in which both correlations are defined.
        """
        import pandas

        rows = []
        for fraction, truth in self.truth.items():
            pair = [self._predicted(method, fraction) for method in (first, second)]
            each = [pearson(truth, predicted) for predicted in pair]
            both = np.isfinite(each[0]) & np.isfinite(each[1])  # the same columns on both sides
            difference = float((each[0] - each[1])[both].mean()) if both.any() else float("nan")
            ours, theirs = (bootstrap_means(truth[:, both], p[:, both], self.seed, DRAWS) for p in pair)
            low, high = interval(ours - theirs)
            rows.append({"ablation_fraction": fraction, "difference": difference, "low": low, "high": high})
        return pandas.DataFrame(rows)

    def summary(self) -> str:
        """A table: method x ablation fraction, mean correlation with its 95 % interval."""
        means = self.means()
        fractions = list(self.truth)
        width = max(len(method) for method in [*self.methods, "method"])
        lines = [f"{'method':<{width}}" + "".join(f"  {f'ablate {100 * f:.4g}%':>18}" for f in fractions)]
        lines.append("-" * len(lines[0]))
        for method in self.methods:
            part = means[means.method == method].set_index("ablation_fraction")
            cells = [part.loc[f] for f in fractions]
            lines.append(
                f"{method:<{width}}"
                + "".join(f"  {f'{c.correlation:.3f} [{c.low:.3f}, {c.high:.3f}]':>18}" for c in cells)
            )
        rows, columns = next(iter(self.truth.values())).shape
        lines.append(f"mean correlation over {columns} columns, {rows} held-out rows each, 95 % intervals")
        if means.undefined.any():
            lines.append(f"not defined, and left out: up to {means.undefined.max()} constant columns")
        return "\n".join(lines)

    def plot(self, ax: Any = None) -> Any:
        """Correlation against ablation fraction; see `coar.report.figures`."""
        from coar.report.figures import correlation_by_fraction

        return correlation_by_fraction(self.means(), ax)

    def _predicted(self, method: str, fraction: float) -> np.ndarray:
        if method not in self.predictions:
            raise SettingError("no such method", expected=", ".join(self.methods), got=repr(method))
        return self.predictions[method][fraction]

    def _bootstrap(self, method: str, fraction: float) -> np.ndarray:
        key = method, fraction
        if key not in self._means:
            predicted = self._predicted(method, fraction)
            self._means[key] = bootstrap_means(self.truth[fraction], predicted, self.seed, DRAWS)
        return self._means[key]


def evaluate(
    experiment: Experiment,
    methods: Mapping[str, Attributions],
    ablation_fractions: Sequence[float],
    num_rows: int = 100,
    seed: int = 1,
    *,
    directory: str | Path | None = None,
    executor: Executor | None = None,
    progress: bool = True,
) -> Evaluation:
    """Compare attributions with really ablated models (COAR paper, section 4).

    Args:
        experiment: what is ablated.
        methods: attributions by name, all of the same columns.
        ablation_fractions: to test at; correlations fall away from the fraction fitted at.
        num_rows: masks per fraction, at least 3.
        seed: of the masks; their stream is never used for fitting.
        directory: keep the rows there as resumable studies, one per fraction, and reuse them.
        executor: where those studies run.
        progress: show a bar per fraction.

    Raises:
        AxisError: attributions of another model, other components or other columns.
        FitError: fewer than 3 rows.
    """
    if not isinstance(methods, Mapping):
        raise SettingError(
            "methods have names", expected='{"ridge": attributions}', got=type(methods).__name__
        )
    if isinstance(ablation_fractions, int | float):
        ablation_fractions = [ablation_fractions]
    num_rows = whole_number(num_rows, "num_rows", least=-(2**40))
    if num_rows < 3:
        raise FitError("a correlation needs rows", expected="at least 3", got=num_rows)
    if not len(ablation_fractions):
        raise SettingError("nothing to evaluate at", expected="ablation_fractions=[0.05, 0.1]", got="[]")
    output, columns, positions = _common_columns(experiment, methods)
    truth: dict[float, np.ndarray] = {}
    predictions: dict[str, dict[float, np.ndarray]] = {method: {} for method in methods}
    for fraction in ablation_fractions:
        design = Bernoulli(ablation_fraction=fraction, seed=seed, stream=EVALUATION)
        _require_unseen(methods, design)
        if directory is None:
            masks, outputs = _rows_in_memory(experiment, design, num_rows, output, progress)
        else:
            masks, outputs = _rows_of_study(
                experiment, design, num_rows, output, directory, executor, progress
            )
        truth[fraction] = outputs[:, positions]
        for method, attributions in methods.items():
            predictions[method][fraction] = attributions.predict(masks).astype(np.float32)
    return Evaluation(columns, truth, predictions, seed)


def _common_columns(
    experiment: Experiment, methods: Mapping[str, Attributions]
) -> tuple[str, Axis, np.ndarray]:
    if not methods:
        raise SettingError("nothing to evaluate", expected='{"regression": attributions}', got="{}")
    name, first = next(iter(methods.items()))
    if first.output not in experiment.columns:
        raise SettingError("no such output", expected=", ".join(experiment.columns), got=first.output)
    for other, attributions in methods.items():
        attributions.components.require_same(experiment.components, f"attributions {other!r}", "experiment")
        attributions.columns.require_same(first.columns, f"attributions {other!r}", f"attributions {name!r}")
    positions = first.columns.locate(experiment.columns[first.output], f"attributions {name!r}", "experiment")
    return first.output, first.columns, positions


def _require_unseen(methods: Mapping[str, Attributions], design: Bernoulli) -> None:
    for name, attributions in methods.items():
        fitted = attributions.provenance.get("design") or {}
        if (fitted.get("seed"), fitted.get("stream")) == (design.seed, design.stream):
            raise SettingError(
                f"attributions {name!r} were fitted on the very rows they would be evaluated on",
                expected=f"rows of another seed or stream than {design.seed}, {design.stream!r}",
                got=f"seed {fitted['seed']}, stream {fitted['stream']!r}",
                todo="evaluate with another seed",
            )


def _rows_in_memory(
    experiment: Experiment, design: Bernoulli, num_rows: int, output: str, progress: bool
) -> tuple[np.ndarray, np.ndarray]:
    runner = experiment.prepare(experiment.device)
    names = {name: axis.names for name, axis in experiment.columns.items()}
    masks, outputs = [], []
    with progress_bar(num_rows, f"held-out, {design.ablation_fraction:g} ablated", progress) as bar:
        for mask, values in run_rows(runner, design, range(num_rows), len(experiment.components), names):
            masks.append(mask)
            outputs.append(values[output])
            bar.update(1)
    return np.stack(masks), np.stack(outputs)


def _rows_of_study(
    experiment: Experiment,
    design: Bernoulli,
    num_rows: int,
    output: str,
    directory: str | Path,
    executor: Executor | None,
    progress: bool,
) -> tuple[np.ndarray, np.ndarray]:
    folder = Path(directory) / f"fraction-{design.ablation_fraction!r}-seed-{design.seed}"
    if (folder / "spec.json").exists():
        study = Study.open(folder, experiment)
        _require_design(study, design, output)
        if study.num_rows < num_rows:
            study.extend(num_rows)
    else:
        study = Study.create(folder, experiment, design, num_rows)
    study.run(executor, progress=progress, description=f"held-out, {design.ablation_fraction:g} ablated")
    return study.masks[:num_rows], study.outputs[output][:num_rows]


def _require_design(study: Study, design: Bernoulli, output: str) -> None:
    if study.spec.design != design or output not in study.columns:
        raise StudyError(
            f"{study.directory} holds other rows than this evaluation's",
            expected=f"{design!r}, output {output!r}",
            got=f"{study.spec.design!r}, outputs {sorted(study.columns)}",
            todo="choose another directory",
        )
