"""Figures of edits and top components; each figure draws on one Axes, outside pyplot, and can be written."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas
import pytest
import torch

from coar.editing import rank_components
from coar.errors import SettingError
from coar.report import figures
from coar.task import Task
from coar.testing import LinearSum
from tests.contributions import make_attributions, make_experiment

CONTRIBUTIONS = np.array(
    [[-3.0, 2.0, 0.5], [0.1, 1.0, 0.2], [0.2, 1.1, 0.1], [0.0, 1.0, 1.0], [1.0, -0.5, 0.0]]
)
MEANS = pandas.DataFrame(
    {
        "method": ["a", "a", "b", "b"],
        "ablation_fraction": [0.025, 0.1, 0.025, 0.1],
        "correlation": [0.9, 0.8, 0.5, 0.4],
        "low": [0.8, 0.7, 0.4, -0.2],
        "high": [0.95, 0.9, 0.6, 0.5],
    }
)


@pytest.fixture(autouse=True)
def pyplot_is_left_alone():
    """Whatever a figure does, pyplot knows of no figure and of no setting more than before."""
    before = plt.get_fignums(), dict(plt.rcParams)
    yield
    assert (plt.get_fignums(), dict(plt.rcParams)) == before


@pytest.fixture
def curve():
    experiment = make_experiment(CONTRIBUTIONS)
    ranking = rank_components(make_attributions(CONTRIBUTIONS, experiment), [0], [1, 2])
    return ranking.sweep(experiment, [1, 2], holdout=[3, 4], progress=False)


def lines(ax):
    """Data of the lines by label."""
    return {line.get_label(): [list(map(float, xy)) for xy in line.get_data()] for line in ax.get_lines()}


def legend(ax):
    """Its texts, on this Axes or on its twin."""
    (found,) = [a.get_legend() for a in ax.figure.axes if a.get_legend()]
    return [text.get_text() for text in found.get_texts()]


def test_an_edit_curve_shows_target_prediction_and_holdout(curve):
    ax = figures.edit_curve(curve, chosen=1)
    found = lines(ax)
    assert found["target margin"] == [[0, 1, 2], pytest.approx(curve.outputs[:, 0])]
    assert found["target margin, predicted"][1] == pytest.approx(curve.outputs[:, 0], abs=1e-6)
    assert legend(ax) == ["target margin", "target margin, predicted", "holdout accuracy"]
    assert ax.get_xlabel() == "components ablated"
    assert [text.get_text().strip() for text in ax.texts] == ["chosen"]
    other = next(a for a in ax.figure.axes if a is not ax)
    assert lines(other)["holdout accuracy"][1] == curve.table.holdout_accuracy.tolist()
    assert other.get_ylabel() == "holdout accuracy"


def test_top_components_are_bars_with_the_largest_on_top():
    ax = figures.top_components(make_attributions(CONTRIBUTIONS), "e0", count=2)
    assert [bar.get_width() for bar in ax.patches] == [2.0, -3.0]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["hidden[1]", "hidden[0]"]
    assert ax.patches[0].get_facecolor() != ax.patches[1].get_facecolor()
    assert "margin" in ax.get_xlabel()


def test_top_components_have_error_bars_where_errors_are_known():
    errors = np.full(CONTRIBUTIONS.shape, 0.5)
    ax = figures.top_components(make_attributions(CONTRIBUTIONS, errors=errors), "e0", count=1)
    ((left, _), (right, _)) = ax.collections[0].get_segments()[0]
    assert (left, right) == pytest.approx((-3.0 - 0.98, -3.0 + 0.98))


def test_undetermined_components_can_be_drawn():
    errors = np.full(CONTRIBUTIONS.shape, np.inf)
    ax = figures.top_components(make_attributions(CONTRIBUTIONS, errors=errors), "e0")
    ax.figure.canvas.draw()
    assert len(ax.patches) == 3


def test_each_draws_on_the_axes_given_and_is_written_as_png(curve, tmp_path):
    figure, axes = figures.new_figure(columns=8)
    attributions = make_attributions(CONTRIBUTIONS)
    task = Task(
        LinearSum(torch.ones(1, 1)).eval(), [torch.ones(1)] * 5, show=lambda _, ax: ax.set_title("one")
    )
    drawn = [
        figures.correlation_by_fraction(MEANS, axes[0]),
        figures.predictions(np.arange(3.0), np.arange(3.0), axes[1]),
        figures.edit_curve(curve, ax=axes[2]),
        figures.top_components(attributions, 0, ax=axes[3]),
        figures.correlation_by_compute(MEANS.assign(forwards=10), ax=axes[4]),
        figures.correlation_histogram(MEANS.assign(pearson=MEANS.correlation), axes[5]),
        figures.layer_heat_map(attributions, ax=axes[6]),
        figures.top_component_images(attributions, 0, task, ax=axes[7]),
    ]
    assert drawn == axes
    path = figures.save_figure(figure, tmp_path / "new folder" / "all.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_what_a_figure_function_returns_can_be_saved(tmp_path):
    ax = figures.correlation_by_fraction(MEANS)
    of_axes = figures.save_figure(ax, tmp_path / "axes.png")
    of_figure = figures.save_figure(ax.figure, str(tmp_path / "figure.png"))
    assert of_axes.read_bytes() == of_figure.read_bytes()
    part = plt.Figure().subfigures(1, 2)[0].subplots()
    assert figures.save_figure(part, tmp_path / "part.png").exists()
    with pytest.raises(SettingError, match=r"got: +list"):
        figures.save_figure([ax], tmp_path / "none.png")


def test_alone_each_gets_a_figure_of_its_own(curve):
    drawn = [figures.correlation_by_fraction(MEANS), figures.edit_curve(curve)]
    assert drawn[0].figure is not drawn[1].figure
