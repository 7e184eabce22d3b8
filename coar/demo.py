"""The demo: the whole line on handwritten digits, in a few minutes, resumable.

train -> components -> gate gradients, and random ablations -> regression -> held-out ablations -> an edit.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from coar.attributions import Attributions
from coar.baselines import gradient_x_parameter, leave_one_out
from coar.baselines.cost import spent
from coar.checking import check
from coar.designs import Bernoulli
from coar.discovery import find_components
from coar.editing import EditResult, edit_misread
from coar.evaluation import Evaluation, evaluate
from coar.executors.processes import Processes
from coar.experiments.ablation import ComponentAblation
from coar.gradients import gate_gradients
from coar.plan import duration
from coar.progress import progress_bar
from coar.regression import fit
from coar.report import figures
from coar.study import Study
from coar.tasks import digits

NUM_ROWS = 4_000
FRACTION = 0.10
TEST_FRACTIONS = (0.05, 0.10, 0.20)
TEST_ROWS = 100
CHECK_ROWS = 60
MAX_DROP = 0.01
GATES = "gate gradients"
NAMES = {  # in the study
    GATES: "gate-gradients",
    "regression": "ridge",
    "leave-one-out": "leave-one-out",
    "gradient x parameter": "gradient-x-parameter",
}

Say = Callable[[str], None]


def run_demo(directory: str | Path, say: Say = print) -> None:
    """Run every stage; what is there from an earlier run is reused.

    Args:
        directory: where studies, figures and the edit go.
        say: called with each paragraph to print.
    """
    folder, started = Path(directory), time.perf_counter()
    study = _study(folder, say)
    experiment = study.experiment
    assert isinstance(experiment, ComponentAblation)
    seconds = {GATES: _timed(lambda: _gate_gradients(experiment, study, folder))}
    seconds["regression"] = _timed(lambda: study.run(Processes(), description="random ablations"))
    methods = _attributions(study, experiment, folder, seconds)
    places: dict[str, Any] = {"ceiling": study, "directory": folder / "held-out"}
    evaluation = evaluate(experiment, methods, TEST_FRACTIONS, TEST_ROWS, seed=1, **places)
    say("\nHow well do attributions predict ablations that they have not seen?\n\n" + evaluation.summary())
    say(_comparison(evaluation))
    say("\n" + check(experiment, methods[GATES], num_rows=CHECK_ROWS).summary())
    say(
        f"The check has {CHECK_ROWS} rows of its own and the table {TEST_ROWS} others: so few are rough, "
        "and their correlations differ by some hundredths."
    )
    fixed = _fix_errors(study, experiment, methods[GATES], say)
    names = "gate gradients", "regression"
    paths = [f"study        {study.directory}"]
    paths += [f"attributions {study.attributions_path(NAMES[name])}" for name in names]
    if fixed:
        path = folder / "edits" / f"fix-{fixed.edit.provenance['targets'][0]}.json"
        paths.append(f"edit         {fixed.edit.save(path)}")
        paths.append(f"figure       {_figure(experiment, evaluation, fixed, folder / 'figures')}")
    say("\n".join(["", "Written", *("  " + path for path in paths)]))
    say(_cost(methods, evaluation, seconds))
    say(f"  all together {duration(time.perf_counter() - started)} this time")


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _study(folder: Path, say: Say) -> Study:
    directory = folder / "study"
    if (directory / "spec.json").exists():
        say(f"Resuming {directory}")
        study = Study.open(directory)
    else:
        say("Training a small ResNet on 1,097 handwritten digits ...")
        task = digits.make_task()
        experiment = ComponentAblation(task, find_components(task.model, kinds=["conv_filter"]))
        design = Bernoulli(ablation_fraction=FRACTION, seed=0)
        study = Study.create(directory, experiment, design, num_rows=NUM_ROWS)
    margins = study.untouched["margin"]
    say(f"{len(margins)} test images, accuracy {(margins > 0).mean():.1%}; {len(study.components)} filters")
    return study


def _gate_gradients(experiment: ComponentAblation, study: Study, folder: Path) -> None:
    path = study.attributions_path(NAMES[GATES])
    if not (path / "index.json").exists():
        gate_gradients(experiment, FRACTION, directory=folder / "gate-gradients").save(path)


def _attributions(
    study: Study, experiment: ComponentAblation, folder: Path, seconds: dict[str, float]
) -> dict[str, Attributions]:
    """All methods' attributions; what those that are not there yet take is added to `seconds`."""
    made = {
        "regression": lambda: fit(study),
        "leave-one-out": lambda: leave_one_out(experiment, directory=folder / "leave-one-out"),
        "gradient x parameter": lambda: gradient_x_parameter(experiment),
    }
    for name, make in made.items():
        path = study.attributions_path(NAMES[name])
        if not (path / "index.json").exists():
            seconds[name] = seconds.get(name, 0.0) + _timed(partial(_save, make, path))
    return {name: Attributions.load(study.attributions_path(saved)) for name, saved in NAMES.items()}


def _save(make: Callable[[], Attributions], path: Path) -> None:
    make().save(path)


def _comparison(evaluation: Evaluation) -> str:
    lines = []
    for ours, other in ((GATES, "regression"), (GATES, "leave-one-out"), ("regression", "leave-one-out")):
        row = evaluation.compare(ours, other).set_index("ablation_fraction").loc[FRACTION]
        lines.append(
            f"  {ours} minus {other}: {row.difference:+.3f}, 95 % interval [{row.low:+.3f}, {row.high:+.3f}]"
        )
    return "\n".join([f"At {FRACTION:.0%} ablated, paired:", *lines])


def _fix_errors(
    study: Study, experiment: ComponentAblation, attributions: Attributions, say: Say
) -> EditResult | None:
    """Try every misread image by itself, the closest mistakes first; return the first one fixed."""
    errors = int((study.untouched["margin"] <= 0).sum())
    lines, fixed = [], None
    with progress_bar(errors, "edits") as bar:
        for target, margin, found in edit_misread(experiment, attributions, max_accuracy_drop=MAX_DROP):
            line = f"  image {study.columns['margin'].names[target]:<5} margin {margin:+.2f}"
            if found:
                after, size = found.targets.after[0], len(found.edit.names)
                lines.append(f"{line} -> {after:+.2f}, filters ablated: {size}")
            else:
                lines.append(f"{line}: not without losing more accuracy")
            fixed = fixed or found
            bar.update(1)
    say(
        f"\nFixing the {errors} misread images, each by itself, for at most {MAX_DROP:.0%} of accuracy "
        f"on the images that choose the size:\n" + "\n".join(lines)
    )
    if fixed:
        say(f"\nThe first of these, {_target(fixed)}: {fixed.summary()}")
    return fixed


def _target(result: EditResult) -> str:
    return f"image {result.edit.provenance['targets'][0]}"


def _figure(experiment: ComponentAblation, evaluation: Evaluation, fixed: EditResult, folder: Path) -> Path:
    figure, axes = figures.new_figure(columns=4, width=4.0, height=3.8)
    target, name = int(fixed.curve.ranking.targets[0]), _target(fixed)
    if experiment.task.show:
        experiment.task.show(experiment.task.dataset[target], axes[0])
        axes[0].set_title(f"{name}: {axes[0].get_title()}, misread")
    figures.correlation_by_fraction(evaluation.means(), axes[1])
    truth, predicted = evaluation.example(target, GATES, FRACTION)
    figures.predictions(truth, predicted, axes[2], title=f"{name}, {FRACTION:.0%} ablated at random")
    figures.edit_curve(fixed.curve, len(fixed.edit.names), axes[3])
    axes[3].set_title("ablating chosen filters")
    return figures.save_figure(figure, folder / "demo.png")


def _cost(methods: dict[str, Attributions], evaluation: Evaluation, seconds: dict[str, float]) -> str:
    lines = []
    for name, found in methods.items():
        took = f"; {duration(seconds[name])} this time" if name in seconds else ""
        lines.append(f"  {name:<21} {spent(found.provenance, found.columns) or 0:>6,}{took}")
    held_out = sum(truth.shape[0] for truth in evaluation.truth.values())
    return "\n".join(
        [
            "\nCost, in forward passes over all images (a backward pass counts as two)",
            *lines,
            f"  {'held-out ablations':<21} {held_out:>6,}",
        ]
    )
