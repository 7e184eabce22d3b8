"""Draw the figure of the idea for docs/gate-gradients.md: `python -m scripts.draw_gate_gradients`.

The ResNet-20 and the images that come with a checkout: the margin along the gates of randomly drawn filters,
others being ablated at random, with the gate at the filter's layer and behind its ReLU. The two curves are of
the filter whose errors are nearest to the medians; all drawn filters are in the panel on the right.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import coar
from coar.gradients.draws import Gates
from coar.gradients.passes import GatePasses
from coar.randomness import integers
from coar.report import figures
from coar.tasks import cifar

FRACTION, SEED = 0.05, 0
PAIRS, IMAGES, POINTS = 400, 200, 33
LARGE = 0.75  # the shown filter is among those with an effect above this quantile: a curve one can see
PLACES = ("gate at the layer", "gate behind the ReLU")


@dataclass(frozen=True)
class Along:
    """The margin along one gate each, for pairs of an image and a filter.

    Attributes:
        values: [pairs, points], from ablated to kept.
        kept: derivative at the kept end, [pairs].
    """

    values: np.ndarray
    kept: np.ndarray

    @property
    def effect(self) -> np.ndarray:
        """Kept less ablated: the mean slope, [pairs]."""
        return self.values[:, -1] - self.values[:, 0]

    @property
    def error(self) -> np.ndarray:
        """Of the derivative at the kept end, as a share of the effect, [pairs]."""
        return np.abs(self.kept - self.effect) / np.abs(self.effect)

    def of(self, chosen: np.ndarray) -> Along:
        """Some of the pairs."""
        return Along(self.values[chosen], self.kept[chosen])


def main() -> None:
    """Draw, and print the figures that the page quotes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    default = Path("docs/images/gate_gradients_idea.png")
    parser.add_argument("--output", type=Path, default=default, help="the PNG to write")
    output = parser.parse_args().output
    task = cifar.make_task("resnet20", small=True, num_examples=IMAGES)
    components = coar.find_components(task.model, kinds=["conv_filter"])
    experiment = coar.ComponentAblation(task, components)
    engines = [GatePasses(experiment, ["margin"], task.device, placed=placed) for placed in (False, True)]
    images, filters, masks = pairs(IMAGES, len(components))
    found = [along(engine, images, filters, masks) for engine in engines]
    moved = np.flatnonzero(np.abs(found[1].effect) > 1e-4)  # the others are dead: nothing to compare
    found = [one.of(moved) for one in found]
    shown = typical(found)
    print(f"shown: image {images[moved[shown]]}, filter {experiment.components.names[filters[moved[shown]]]}")
    print(said(found))
    draw(found, shown, output)


def pairs(num_images: int, num_components: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images and filters at random, and for each pair a mask of all filters, [pairs, components]."""
    images = integers(SEED, "figure: images", 0, PAIRS, num_images)
    filters = integers(SEED, "figure: filters", 0, PAIRS, num_components)
    design = coar.Bernoulli(ablation_fraction=FRACTION, seed=SEED, stream="figure")
    return images, filters, design.masks(range(PAIRS), num_components)


def along(engine: GatePasses, images: np.ndarray, filters: np.ndarray, masks: np.ndarray) -> Along:
    """Move one gate of each pair from 0 to 1, the others being as the mask says."""
    owners, which = np.repeat(images, POINTS), np.repeat(filters, POINTS)
    gates = np.repeat(masks, POINTS, axis=0).astype(np.float32)
    gates[np.arange(len(gates)), which] = np.tile(np.linspace(0, 1, POINTS), PAIRS)
    values, slopes = np.empty((2, len(owners)))
    for here, batch in engine.batches(owners):
        taken = engine.derivatives(batch, Gates(gates[here], gates[here] > 1))["margin"]
        values[here], slopes[here] = taken.values, taken.by_gate[np.arange(len(batch[0])), which[here]]
    return Along(values.reshape(PAIRS, POINTS), slopes.reshape(PAIRS, POINTS)[:, -1])


def typical(found: list[Along]) -> int:
    """The pair with a large effect whose errors are nearest to the medians, in both places."""
    effect = np.abs(found[1].effect)
    large = np.flatnonzero(effect > np.quantile(effect, LARGE))
    far = [np.log(one.error[large] / np.median(one.error)) ** 2 for one in found]
    return int(large[np.argmin(sum(far))])


def said(found: list[Along]) -> str:
    """Figures over all pairs, as text."""
    ends = np.abs(found[0].values[:, [0, -1]] - found[1].values[:, [0, -1]]).max()
    lines = [
        f"{len(found[0].kept)} of {PAIRS} filters do anything; both gates have equal ends within {ends:.1g}"
    ]
    for place, one in zip(PLACES, found, strict=True):
        correlation = np.corrcoef(one.kept, one.effect)[0, 1]
        slopes = np.diff(one.values, axis=1) * (POINTS - 1)
        spread = float(slopes.var(axis=1).sum() / (one.effect**2).sum())
        lines.append(
            f"{place}: derivative at the kept end against effect: correlation {correlation:.2f}, error "
            f"{np.median(one.error):.0%} of the effect (median); variance of the derivative along the gate "
            f"{spread:.2g} of squared effects"
        )
    return "\n".join(lines)


def draw(found: list[Along], shown: int, path: Path) -> None:
    """Two curves of one filter, and the errors of all."""
    figure, axes = figures.new_figure(columns=3, width=4.0, height=3.6)
    for place, one, ax in zip(PLACES, found, axes[:2], strict=True):
        curve(one, shown, ax)
        ax.set_title(place)
    axes[0].set_ylabel("margin of one image")
    axes[0].legend(frameon=False, loc="lower right")
    axes[1].sharey(axes[0])
    errors(found, shown, axes[2])
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    figures.save_figure(figure, path)


def curve(one: Along, shown: int, ax: Any) -> None:
    """The output along a gate, its tangent at the kept end, its chord."""
    gate, values = np.linspace(0, 1, POINTS), one.values[shown]
    chord, tangent = values[0] + gate * one.effect[shown], values[-1] + (gate - 1) * one.kept[shown]
    ax.plot(gate, tangent, "--", color=figures.COLOURS[1], label="derivative at the kept\nend (patching)")
    ax.plot(gate, chord, ":", color="#333333", linewidth=2, label="mean slope: the\neffect (wanted)")
    ax.plot(gate, values, color=figures.COLOURS[0], linewidth=2.2, label="output")
    ax.plot([0, 1], values[[0, -1]], "o", color=figures.COLOURS[0])
    ax.set_xticks([0, 0.5, 1], ["0\nablated", "0.5\ngate", "1\nkept"])


def errors(found: list[Along], shown: int, ax: Any) -> None:
    """Share of pairs against the error of the derivative at the kept end."""
    share = (np.arange(len(found[0].kept)) + 1) / len(found[0].kept)
    for place, one, colour in zip(PLACES, found, figures.COLOURS[1:4:2], strict=True):
        ordered, mine = np.sort(one.error), one.error[shown]
        ax.plot(ordered, share, color=colour, linewidth=2, label=place)
        ax.plot(mine, np.interp(mine, ordered, share), "o", color=colour)
    ax.set_xscale("log")
    ax.set_xlim(0.005, 10)
    ax.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g} %")
    ax.set(
        xlabel="error of the patching derivative, relative to the effect",
        ylabel="share of pairs with a smaller error",
    )
    ax.set_title(f"{len(share)} random pairs")
    ax.legend(frameon=False, loc="upper left")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
