"""Fix one error, and induce one: each by an edit of its own, ResNet-56 on CIFAR-10.

Part of `python -m benchmarks.editing`. A draw: errors of the network at random; right images as references;
others that guard; others that judge. The references and errors of a draw are attributed once, and each
edit reads those of its own target. Sizes are tried from small to large, and those after the first that fixes
the error within the guard are not swept: they would not be chosen.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import coar
from benchmarks.editing_images import Images, margins_of, points_lost
from benchmarks.report import Report
from coar.attributions import Attributions
from coar.errors import EditError

DRAWS = (3, 4, 5)  # 0 to 2 were looked at while this was built
STAGES = ((1, 2, 4), (8, 12, 16, 20))  # 20 of 2,032 filters are 1 %
GUARD = 0.04  # of the holdout: 6 of its 150 images
PASSES, FRACTION = 100, 0.01  # an edit leaves the network nearly whole
BLIND = ("derivative", "weight_norm", "random")


@dataclass(frozen=True)
class Counts:
    """How many images play which part."""

    errors: int = 50
    induced: int = 5
    references: int = 80
    holdout: int = 150
    judges: int = 400
    compared: int = 3  # errors of the first draw that the alternatives get


SMALL = Counts(errors=4, induced=1, references=60, judges=300, compared=1)


@dataclass(frozen=True)
class Draw:
    """One draw: an experiment whose columns are errors, images to break, references, holdout; and judges."""

    images: Images
    counts: Counts
    seed: int
    experiment: coar.ComponentAblation
    judges: np.ndarray

    @classmethod
    def of(cls, images: Images, counts: Counts, seed: int) -> Draw:
        """Draw by the seed."""
        order = images.shuffled("errors", seed)
        wrong, right = order[images.margins[order] <= 0], order[images.margins[order] > 0]
        chosen = wrong[: counts.errors], right[: counts.induced + counts.references]
        others = order[~np.isin(order, np.concatenate(chosen))]
        holdout, judges = np.split(others[: counts.holdout + counts.judges], [counts.holdout])
        experiment = images.experiment(np.concatenate([*chosen, holdout]))
        return cls(images, counts, seed, experiment, judges)

    @property
    def targets(self) -> np.ndarray:
        """Columns of errors, then of images to break."""
        return np.arange(self.counts.errors + self.counts.induced)

    def attributions(self) -> Attributions:
        """Gate gradients of errors, images to break, and references."""
        last = len(self.targets) + self.counts.references
        return coar.gate_gradients(
            self.experiment, FRACTION, passes=PASSES, seed=self.seed, examples=range(last), progress=False
        )

    def parts(self, target: int) -> coar.EditParts:
        """Of one target; the other errors, which nothing is chosen by, are reported on."""
        first, last = len(self.targets), len(self.targets) + self.counts.references
        others = np.setdiff1d(self.targets, [target])
        columns = self.experiment.columns["margin"]
        return coar.EditParts([target], range(first, last), range(last, len(columns)), others)


@dataclass(frozen=True)
class Outcome:
    """What became of one target: size 0 where no edit met the guard and moved it across 0."""

    done: bool
    size: int
    lost: float
    seconds: float


def measure(report: Report) -> dict[str, Any]:
    """Share of errors fixed, points of accuracy lost; a line of the page's table."""
    images, counts = Images.of(report.small), SMALL if report.small else Counts()
    draws = [Draw.of(images, counts, seed) for seed in (DRAWS[:1] if report.small else DRAWS)]
    found = [_both(draw) for draw in draws]
    rows = [
        {"draw": draw.seed, **_summary(what, outcomes)}
        for draw, outcomes_by in zip(draws, found, strict=True)
        for what, outcomes in outcomes_by.items()
    ]
    report.table(f"one image at a time, each by an edit of its own; {counts.judges} other images judge", rows)
    fixed = [outcome for outcomes in found for outcome in outcomes["fix"]]
    report.measure("error_fixed", float(np.mean([outcome.done for outcome in fixed])))
    report.measure("error_accuracy", _median_lost(fixed))
    others = {method: _alternative(draws[0], method) for method in (*BLIND, "fine_tuning")}
    ours = found[0]["fix"][: counts.compared]
    lines = {"gate_gradients": ours, **others}
    title = f"the first {counts.compared} errors of draw 0, by other methods as well"
    report.table(title, [{"method": name, **_summary("fix", line)} for name, line in lines.items()])
    return _line(images, fixed, lines, len(draws[0].experiment.components))


def _both(draw: Draw) -> dict[str, list[Outcome]]:
    start = time.perf_counter()
    attributions = draw.attributions()
    each = (time.perf_counter() - start) / len(draw.targets)  # of the shared seconds
    errors, right = np.split(draw.targets, [draw.counts.errors])
    return {
        "fix": [edited(draw, int(target), "raise", attributions, each) for target in errors],
        "induce": [edited(draw, int(target), "lower", attributions, each) for target in right],
    }


def edited(draw: Draw, target: int, direction: Any, method: Any, seconds: float = 0.0) -> Outcome:
    """Fix an error ("raise") or induce one ("lower"), and judge the edited model on other images."""
    start = time.perf_counter()
    for sizes in STAGES:
        try:
            found = coar.make_edit(
                draw.experiment,
                draw.parts(target),
                direction,
                method=method,
                seed=draw.seed,
                sizes=sizes,
                max_accuracy_drop=GUARD,
            )
        except EditError:
            continue
        if (found.targets.after[0] > 0) == (direction == "raise"):
            seconds += time.perf_counter() - start
            model = found.edit.apply(draw.images.task.model)
            return Outcome(True, len(found.edit.names), _lost(draw, model), seconds)
    return Outcome(False, 0, 0.0, seconds + time.perf_counter() - start)


def _lost(draw: Draw, model: Any) -> float:
    after = margins_of(model, draw.images.task, draw.judges)
    return points_lost(draw.images.margins[draw.judges], after)


def _alternative(draw: Draw, method: str) -> list[Outcome]:
    if method != "fine_tuning":
        return [edited(draw, target, "raise", method) for target in range(draw.counts.compared)]
    return [_fine_tuned(draw, target) for target in range(draw.counts.compared)]


def _fine_tuned(draw: Draw, target: int) -> Outcome:
    try:
        found = coar.fine_tune(draw.experiment, draw.parts(target), "raise", max_accuracy_drop=GUARD)
    except EditError:
        return Outcome(False, 0, 0.0, 0.0)
    done = bool(found.targets.after[0] > 0)
    return Outcome(done, 0, _lost(draw, found.model) if done else 0.0, found.seconds)


def _median_lost(outcomes: Sequence[Outcome]) -> float:
    """Over the edits that were made."""
    lost = [outcome.lost for outcome in outcomes if outcome.done]
    return float(np.median(lost)) if lost else float("nan")


def _summary(what: str, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    done = [outcome for outcome in outcomes if outcome.done]
    return {
        "what": what,
        "images": len(outcomes),
        "done": len(done),
        "median size": float(np.median([outcome.size for outcome in done])) if done else "",
        "median points lost": _median_lost(outcomes),
        "most points lost": max((outcome.lost for outcome in done), default=float("nan")),
        "seconds each": float(np.mean([outcome.seconds for outcome in outcomes])),
    }


def _line(images: Images, fixed: list[Outcome], lines: dict[str, list[Outcome]], of: int) -> dict[str, Any]:
    """Of the table in docs/editing.md; means over draws."""
    before = float((images.margins > 0).mean())
    told = [
        f"{name}: {sum(outcome.done for outcome in outcomes)} of {len(outcomes)}, "
        f"{_median_lost(outcomes):.1f} points lost"
        for name, outcomes in lines.items()
    ]
    return {
        "task": "fix one error",
        "what": "share of errors read right; median accuracy of others",
        "before": 0.0,
        "after": float(np.mean([outcome.done for outcome in fixed])),
        "others_before": before,
        "others_after": before - _median_lost(fixed) / 100,
        "components": float(np.median([outcome.size for outcome in fixed if outcome.done])),
        "of": of,
        "seconds": float(np.mean([outcome.seconds for outcome in fixed])),
        "alternatives": "; ".join(told),
    }
