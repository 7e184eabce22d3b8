"""Figures of edits: curves of several targets, outputs before and after, examples, methods compared."""

from __future__ import annotations

from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas
import pytest
import torch

from coar.editing import Effect, rank_components
from coar.errors import SettingError, TaskError
from coar.report import figures
from coar.task import Task
from coar.testing import LinearSum
from tests.contributions import make_attributions, make_experiment

# Two targets, two references, two of a holdout; the first component holds the targets down.
CONTRIBUTIONS = np.array([[-3.0, 2.0], [-2.5, 1.0], [0.2, 1.1], [0.0, 1.0], [1.0, -0.5], [0.5, 0.2]])


@pytest.fixture(autouse=True)
def pyplot_is_left_alone():
    """Whatever a figure does, pyplot knows of no figure and of no setting more than before."""
    before = plt.get_fignums(), dict(plt.rcParams)
    yield
    assert (plt.get_fignums(), dict(plt.rcParams)) == before


@pytest.fixture
def curve():
    experiment = make_experiment(CONTRIBUTIONS)
    ranking = rank_components(make_attributions(CONTRIBUTIONS, experiment), [0, 1], [2, 3])
    return ranking.sweep(experiment, [1, 2], holdout=[4, 5], progress=False)


def table_only(curve, **more):
    """What a figure reads of a curve, with other columns in its table."""
    output = SimpleNamespace(attributions=SimpleNamespace(output="margin"))
    return SimpleNamespace(table=curve.table.assign(**more), ranking=output, targets=curve.targets)


def lines(ax):
    """y values by label, of this Axes and its twin."""
    found = [line for axes in ax.figure.axes for line in axes.get_lines()]
    return {line.get_label(): [float(y) for y in line.get_ydata()] for line in found}


def legend(ax):
    (found,) = [a.get_legend() for a in ax.figure.axes if a.get_legend()]
    return [text.get_text() for text in found.get_texts()]


class TestEditCurve:
    def test_several_targets_have_an_accuracy_beside_that_of_the_holdout(self, curve):
        ax = figures.edit_curve(curve, chosen=1)
        found = lines(ax)
        assert found["target margin"] == pytest.approx([-1.25, 1.5, 0.0])
        assert found["target accuracy"] == [0.0, 1.0, 0.0]
        assert found["holdout accuracy"] == [1.0, 0.5, 0.0]
        names = ["target margin", "target margin, predicted", "holdout accuracy", "target accuracy"]
        assert legend(ax) == names
        assert ax.get_ylabel() == "margin of the targets"

    def test_targets_that_choose_are_drawn_where_there_are_such(self, curve):
        ax = figures.edit_curve(
            table_only(curve, target_holdout_output=[-1.0, 2.0, 3.0], target_holdout_accuracy=[0.1, 0.7, 0.9])
        )
        found = lines(ax)
        assert found["target margin"] == [-1.0, 2.0, 3.0]
        assert found["target accuracy"] == [0.1, 0.7, 0.9]
        assert legend(ax) == ["target margin", "holdout accuracy", "target accuracy"]

    def test_nothing_is_predicted_where_components_were_ranked_blindly(self, curve):
        ax = figures.edit_curve(table_only(curve, target_predicted=np.nan))
        assert legend(ax) == ["target margin", "holdout accuracy", "target accuracy"]

    def test_an_output_without_accuracy_has_its_holdout_mean(self, curve):
        nothing = dict.fromkeys([name for name in curve.table if name.endswith("_accuracy")], np.nan)
        ax = figures.edit_curve(table_only(curve, **nothing))
        assert lines(ax)["holdout margin"] == pytest.approx(curve.table.holdout_output.tolist())
        assert legend(ax)[2:] == ["holdout margin"]
        ax.figure.canvas.draw()


class TestMarginsBeforeAfter:
    def test_a_point_per_example_and_accuracies_in_the_legend(self):
        ax = figures.margins_before_after(Effect(np.array([-1.0, 2.0]), np.array([3.0, 2.5])))
        (points,) = ax.collections
        assert np.asarray(points.get_offsets()).tolist() == [[-1.0, 3.0], [2.0, 2.5]]
        assert legend(ax) == ["50.0% right, then 100.0%"]
        assert (ax.get_xlabel(), ax.get_ylabel()) == ("margin before the edit", "margin after")

    def test_several_by_name_the_many_below_the_few(self):
        rng = np.random.default_rng(0)
        many = Effect(rng.normal(size=300), rng.normal(size=300))
        few = Effect(np.array([-1.0]), np.array([1.0]))
        ax = figures.margins_before_after({"targets": few, "others": many})
        assert [len(points.get_offsets()) for points in sorted(ax.collections, key=lambda c: c.zorder)] == [
            300,
            1,
        ]
        assert {text.split(":")[0] for text in legend(ax)} == {"targets", "others"}

    def test_means_where_signs_mean_nothing(self):
        effect = Effect(np.array([-1.0, -3.0]), np.array([-4.0, -6.0]))
        ax = figures.margins_before_after(effect, output="log-probability", accuracy=False)
        assert legend(ax) == ["mean -2, then -5"]
        assert ax.get_xlabel() == "log-probability before the edit"

    def test_the_axes_given_is_drawn_on(self):
        _, (ax,) = figures.new_figure()
        assert figures.margins_before_after(Effect(np.zeros(1), np.ones(1)), ax) is ax


def shades(show=True):
    def draw(item, ax):
        ax.imshow(item.reshape(1, 1).numpy(), vmin=0, vmax=9)
        ax.set_title(f"number {int(item)}")

    model = LinearSum(torch.ones(1, 1)).eval()
    margin = {"margin": lambda m, b: m(b)}
    return Task(model, list(torch.arange(9.0)), margin, show=draw if show else None, device="cpu")


class TestExampleGrid:
    def test_an_axes_per_example_in_order(self):
        axes = figures.example_grid(shades(), [5, 0, 7], columns=2)
        assert [int(ax.images[0].get_array()[0, 0]) for ax in axes] == [5, 0, 7]
        assert [ax.get_title() for ax in axes] == ["number 5", "number 0", "number 7"]
        axes[0].figure.canvas.draw()
        tops = [round(ax.get_position().y1, 3) for ax in axes]
        assert tops[0] == tops[1] > tops[2]

    def test_titles_of_ones_own(self):
        axes = figures.example_grid(shades(), np.array([1, 2]), titles=np.array(["first", "second"]))
        assert [ax.get_title() for ax in axes] == ["first", "second"]

    def test_refusals(self):
        with pytest.raises(TaskError, match="how an example is drawn"):
            figures.example_grid(shades(show=False), [0])
        with pytest.raises(SettingError, match=r"one or more of 0 \.\. 8"):
            figures.example_grid(shades(), [9])
        with pytest.raises(SettingError, match="no such examples"):
            figures.example_grid(shades(), [])
        with pytest.raises(SettingError, match="2 titles"):
            figures.example_grid(shades(), [0, 1], titles=["one"])


def comparison(*rows):
    names = [
        "method",
        "components",
        "seconds",
        "targets_before",
        "targets_after",
        "others_before",
        "others_after",
    ]
    return SimpleNamespace(table=pandas.DataFrame(rows, columns=names))


class TestEditComparison:
    def test_before_as_lines_after_as_points(self):
        ax = figures.edit_comparison(
            comparison(
                ("gate_gradients", 5, 1.5, 0.3, 0.8, 0.81, 0.8), ("fine_tuning", 0, 1.5, 0.3, 0.5, 0.81, 0.7)
            )
        )
        found = lines(ax)
        assert (found["targets before"], found["others before"]) == ([0.0, 1.0], [0.0, 1.0])
        across = {line.get_label(): [float(x) for x in line.get_xdata()] for line in ax.get_lines()}
        assert (across["targets before"], across["others before"]) == (
            [0.3, 0.3],
            pytest.approx([0.81, 0.81]),
        )
        assert (across["targets after"], across["others after"]) == ([0.5, 0.8], [0.7, 0.8])
        assert [tick.get_text() for tick in ax.get_yticklabels()] == ["fine tuning", "gate gradients (5)"]
        assert ax.get_xlabel().startswith("accuracy")

    def test_a_method_that_met_no_guard_says_so(self):
        rows = [("gate_gradients", 5, 1.5, 0.3, 0.8, 0.8, 0.8), ("random", 0, np.nan, 0.3, 0.3, 0.8, 0.8)]
        ax = figures.edit_comparison(comparison(*rows))
        ax.figure.canvas.draw()
        names = [tick.get_text() for tick in ax.get_yticklabels()]
        assert names == ["random (guard not met)", "gate gradients (5)"]

    def test_mean_outputs_are_no_accuracies(self):
        ax = figures.edit_comparison(comparison(("gate_gradients", 5, 1.5, -2.0, -9.0, -1.5, -1.51)))
        ax.figure.canvas.draw()
        assert ax.get_xlabel().startswith("mean output")
        assert ax.get_xlim()[0] < -9
