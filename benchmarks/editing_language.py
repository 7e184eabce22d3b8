"""The language edit: a word becomes improbable where it comes next, and the loss elsewhere stays.

Five words of the last 10 % of the text, which trained nothing: two names of speakers and three words that are
common. Claims are means over all of them, whatever an edit does for one. Part of
`python -m benchmarks.editing`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

import coar
from benchmarks.report import Report
from coar.editing import Effect
from coar.tasks import gpt2_words

WORDS, SMALL_WORDS = ("PETRUCHIO", "KATHARINA", "sir", "thou", "you"), ("thou",)
COMPARED = ("thou", "you")  # with alternatives, on the first draw: fine-tuning takes as long as all else
DRAWS = (0, 1, 2)
KINDS = ["mlp_neuron", "attention_head"]
EXAMPLES: dict[str, Any] = {"num_elsewhere": 80, "num_places": 60}  # minutes
SMALL_EXAMPLES: dict[str, Any] = {"num_elsewhere": 60}  # there are 33 places in all
PARTS: dict[str, Any] = {
    "targets": "kind == 'word'",
    "references": "kind == 'elsewhere'",
    "pairs": "passage",
}
NUMBERS: dict[str, Any] = {"num_targets": 12, "num_references": 24}
SMALL_NUMBERS: dict[str, Any] = {"num_targets": 8, "num_references": 16}
EDIT: dict[str, Any] = {
    "score": "contrast",
    "ablation_fraction": 0.05,
    "passes": 8,
    "max_output_drop": 0.016,  # nats a letter: 0.9 % of the loss, so that the report keeps to 1 %
    "sizes": (1, 2, 4, 8, 12, 16, 20, 30),
}
OURS, OTHERS = ("gate_gradients",), ("derivative", "weight_norm", "random", "fine_tuning")


def measure(report: Report) -> dict[str, Any]:
    """Fall of the word's mean probability, rise of the loss elsewhere; a line of the page's table."""
    words, draws = (SMALL_WORDS, DRAWS[:1]) if report.small else (WORDS, DRAWS)
    others = OTHERS[:-1] if report.small else OTHERS
    lines = []
    for word in words:
        experiment = _experiment(word, report.small)
        for draw in draws:
            compared = word in COMPARED and draw == draws[0]
            lines += _edited(experiment, word, draw, OURS + others if compared else OURS, report.small)
    ours = [line for line in lines if line["method"] in OURS]
    told = [line for line in lines if line["method"] not in OURS]
    report.table("language: probability of a word where it comes next, and loss elsewhere", ours)
    report.table("language: each word, mean over draws", [_mean(ours, word) for word in words])
    report.table("language: alternatives, first draw", told)
    report.measure("language_word", float(np.mean([line["fall"] for line in ours])))
    report.measure("language_loss", float(np.mean([line["loss_rise"] for line in ours])))
    return _line(ours, told, words)


def _experiment(word: str, small: bool) -> Any:
    task = gpt2_words.make_task(word, small=small, **(SMALL_EXAMPLES if small else EXAMPLES))
    return coar.ComponentAblation(task, coar.find_components(task.model, kinds=KINDS))


def _edited(
    experiment: Any, word: str, draw: int, methods: tuple[str, ...], small: bool
) -> list[dict[str, Any]]:
    """A line a method; where nothing meets the guard, nothing is done."""
    numbers = SMALL_NUMBERS if small else NUMBERS
    parts = coar.draw_parts(experiment.task, **PARTS, **numbers, seed=draw)
    comparison = coar.compare_edits(experiment, parts, "lower", methods=methods, seed=draw, **EDIT)
    untouched = tuple(Effect(outputs, outputs) for outputs in comparison.untouched)
    lines = []
    for name, result in comparison.results.items():
        effects = untouched if result is None else (result.judged, result.report)
        line = {
            "word": word,
            "draw": draw,
            "method": name,
            "components": len(result.edit.names) if result is not None and hasattr(result, "edit") else 0,
            "of": len(experiment.components),
        }
        line |= _told(experiment.task, parts, *effects)
        lines.append(line | {"seconds": np.nan if result is None else round(result.seconds, 1)})
    return lines


def _told(task: Any, parts: Any, words: Effect, others: Effect) -> dict[str, float]:
    """Probabilities and losses on the examples that chose nothing."""
    where = parts.target_report
    before, after = (
        float(gpt2_words.probabilities(task, outputs, where).mean())
        for outputs in (words.before, words.after)
    )
    return {
        "before": before,
        "after": after,
        "fall": gpt2_words.fall(task, words, where),
        "loss_before": float(gpt2_words.mean_loss(task, others.before, parts.report)),
        "loss_after": float(gpt2_words.mean_loss(task, others.after, parts.report)),
        "loss_rise": gpt2_words.loss_rise(task, others, parts.report),
    }


def _mean(lines: list[dict[str, Any]], word: str) -> dict[str, Any]:
    """One word: means over its draws."""
    own = [line for line in lines if line["word"] == word]
    names = ("components", "before", "after", "fall", "loss_rise")
    return {"word": word} | {name: float(np.mean([line[name] for line in own])) for name in names}


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
