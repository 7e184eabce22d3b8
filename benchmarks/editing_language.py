"""The language edit: a word becomes improbable where it comes next, and the loss elsewhere stays.

The most frequent name of a speaker in the last 10 % of the text, which trained nothing, "sir" and "thou".
The claims are of these. In the table also one of the commonest words, for which 30 components are not enough.
Part of `python -m benchmarks.editing`.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

import coar
from benchmarks.report import Report
from coar.baselines import attribution_patching
from coar.editing import Effect
from coar.tasks import gpt2_words

WORDS, SMALL_WORDS = ("PETRUCHIO", "sir", "thou"), ("thou",)
TOO_COMMON = "you"
DRAWS = (0, 1, 2)
KINDS = ["mlp_neuron", "attention_head"]
PARTS: dict[str, Any] = {
    "targets": "kind == 'word'",
    "references": "kind == 'elsewhere'",
    "pairs": "passage",
}
NUMBERS: dict[str, Any] = {"num_targets": 12, "num_references": 24}
SMALL_NUMBERS: dict[str, Any] = {"num_targets": 8, "num_references": 16}  # there are 33 places in all
FRACTION, PASSES = 0.05, 12
EDIT: dict[str, Any] = {
    "score": "difference",
    "max_output_drop": 0.014,  # nats a letter: 0.8 % of the loss, so that the report keeps to 1 %
    "sizes": (1, 2, 4, 8, 12, 16, 20, 30),
}
ATTRIBUTING = ("gate_gradients", "derivative")
OTHERS = ("weight_norm", "random", "fine_tuning")


def measure(report: Report) -> dict[str, Any]:
    """Fall of the word's mean probability, rise of the loss elsewhere; a line of the page's table."""
    words, draws = (SMALL_WORDS, DRAWS[:1]) if report.small else (WORDS, DRAWS)
    ours, others = [], []
    for word in words:
        experiment = _experiment(word, report.small)
        for draw in draws:
            parts = _parts(experiment, draw, report.small)
            ours.append(_edited(experiment, parts, "gate_gradients", word, draw))
            if draw == draws[0]:
                methods = OTHERS[:2] if report.small else OTHERS  # fine-tuning takes as long as all else
                others += _alternatives(experiment, parts, word, draw, methods)
    common = [] if report.small else _too_common()
    report.table("language: probability of a word where it comes next, and loss elsewhere", ours + common)
    report.table("language: alternatives, first draw", others)
    report.measure("language_word", float(np.mean([line["fall"] for line in ours])))
    report.measure("language_loss", float(np.mean([line["loss_rise"] for line in ours])))
    return _line(ours, others, words)


def _experiment(word: str, small: bool) -> Any:
    task = gpt2_words.make_task(word, small=small, num_elsewhere=60 if small else 120)
    return coar.ComponentAblation(task, coar.find_components(task.model, kinds=KINDS))


def _parts(experiment: Any, draw: int, small: bool) -> Any:
    return coar.draw_parts(experiment.task, **PARTS, **(SMALL_NUMBERS if small else NUMBERS), seed=draw)


def _too_common() -> list[dict[str, Any]]:
    """A word that is everywhere, first draw: no claim is made of it."""
    experiment = _experiment(TOO_COMMON, small=False)
    parts = _parts(experiment, DRAWS[0], small=False)
    return [_edited(experiment, parts, "gate_gradients", TOO_COMMON, DRAWS[0])]


def _alternatives(
    experiment: Any, parts: Any, word: str, draw: int, methods: tuple[str, ...]
) -> list[dict[str, Any]]:
    found = [_edited(experiment, parts, "derivative", word, draw)]
    comparison = coar.compare_edits(experiment, parts, "lower", methods=methods, seed=draw, **EDIT)
    for name, result in comparison.results.items():
        told = _unchanged(comparison) if result is None else (result.judged, result.report)
        size = len(result.edit.names) if result is not None and hasattr(result, "edit") else 0
        seconds = np.nan if result is None else result.seconds
        found.append(_told(experiment, parts, word, draw, name, size, seconds, *told))
    return found


def _unchanged(comparison: Any) -> tuple[Effect, Effect]:
    """What a method does that met no guard: nothing."""
    words, others = comparison.untouched
    return Effect(words, words), Effect(others, others)


def _edited(experiment: Any, parts: Any, method: str, word: str, draw: int) -> dict[str, Any]:
    """One edit by attributions; components that everything else needs are left alone."""
    start = time.perf_counter()
    examples = sorted({*map(int, parts.targets), *map(int, parts.references)})
    attributions = (
        coar.gate_gradients(experiment, FRACTION, passes=PASSES, seed=draw, examples=examples, progress=False)
        if method == "gate_gradients"
        else attribution_patching(experiment, examples=examples, progress=False)
    )
    ids = experiment.task.example_ids()
    needed = gpt2_words.needed_elsewhere(attributions, [ids[i] for i in parts.references])
    result = coar.make_edit(
        experiment, parts, "lower", method=attributions, protect_components=needed, **EDIT
    )
    seconds, size = time.perf_counter() - start, len(result.edit.names)
    return _told(experiment, parts, word, draw, method, size, seconds, result.judged, result.report)


def _told(
    experiment: Any,
    parts: Any,
    word: str,
    draw: int,
    method: str,
    size: int,
    seconds: float,
    words: Effect,
    others: Effect,
) -> dict[str, Any]:
    """A line: probabilities and losses on the examples that chose nothing."""
    task, where = experiment.task, parts.target_report
    before, after = (
        float(gpt2_words.probabilities(task, outputs, where).mean())
        for outputs in (words.before, words.after)
    )
    return {
        "word": word,
        "draw": draw,
        "method": method,
        "components": size,
        "of": len(experiment.components),
        "before": before,
        "after": after,
        "fall": gpt2_words.fall(task, words, where),
        "loss_before": float(gpt2_words.mean_loss(task, others.before, parts.report)),
        "loss_after": float(gpt2_words.mean_loss(task, others.after, parts.report)),
        "loss_rise": gpt2_words.loss_rise(task, others, parts.report),
        "seconds": round(seconds, 1),
    }


def _line(ours: list[dict[str, Any]], others: list[dict[str, Any]], words: tuple[str, ...]) -> dict[str, Any]:
    def mean(lines: list[dict[str, Any]], name: str) -> float:
        return float(np.mean([line[name] for line in lines]))

    told = []
    for method in dict.fromkeys(line["method"] for line in others):
        lines = [line for line in others if line["method"] == method]
        told.append(
            f"{method.replace('_', ' ')} {-100 * mean(lines, 'fall'):+.0f} %"
            f" (loss {100 * mean(lines, 'loss_rise'):+.1f} %)"
        )
    return {
        "task": "language",
        "what": f"mean probability of a word ({', '.join(words)}); others: loss",
        "before": mean(ours, "before"),
        "after": mean(ours, "after"),
        "others_before": mean(ours, "loss_before"),
        "others_after": mean(ours, "loss_after"),
        "components": mean(ours, "components"),
        "of": ours[0]["of"],
        "seconds": mean(ours, "seconds"),
        "alternatives": "; ".join(told),
    }
