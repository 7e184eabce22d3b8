"""Evaluations as files: one set for each, with names that say what they are of."""

from __future__ import annotations

import pandas
import pytest
from matplotlib.image import imread

import coar
from coar.baselines import leave_one_out
from coar.report.evaluation_files import evaluation_figure, save_evaluations
from coar.testing import linear_experiment


@pytest.fixture(scope="module")
def evaluation():
    experiment, _ = linear_experiment()
    methods = {"leave-one-out": leave_one_out(experiment, progress=False)}
    return coar.evaluate(experiment, methods, [0.1, 0.3], num_rows=20, progress=False)


class Named:
    """An evaluation under another output's name."""

    def __init__(self, evaluation, output):
        self.evaluation, self.output = evaluation, output

    def __getattr__(self, name):
        return getattr(self.evaluation, name)


def test_a_table_and_the_means_are_written_as_they_are(evaluation, tmp_path):
    written = save_evaluations([Named(evaluation, "margin")], table=tmp_path / "new" / "found.csv")
    assert [path.name for path in written] == ["found.csv", "found-means.csv"]
    for path, frame in zip(written, (evaluation.table, evaluation.means()), strict=True):
        pandas.testing.assert_frame_equal(
            pandas.read_csv(path, dtype={"column": str}), frame, check_dtype=False
        )


@pytest.mark.parametrize(
    ("outputs", "names"),
    [
        (["margin", "loss"], ["found", "found-loss"]),
        (["margin", "margin", "loss"], ["found", "found-2", "found-loss"]),
        (["margin", "means"], ["found", "found-means-2"]),  # found-means.csv is taken
        (["margin", "a/b", "a b"], ["found", "found-a_b", "found-a_b-3"]),
        ([], []),
    ],
)
def test_files_are_named_by_output_and_none_replaces_another(evaluation, tmp_path, outputs, names):
    several = [Named(evaluation, output) for output in outputs]
    written = save_evaluations(several, table=tmp_path / "found.csv")
    assert [path.stem for path in written[::2]] == names
    assert [path.stem for path in written[1::2]] == [f"{name}-means" for name in names]
    assert len(set(written)) == len(written) == len(list(tmp_path.iterdir()))


def test_figures_of_several_outputs_say_which(evaluation, tmp_path):
    alone = save_evaluations([Named(evaluation, "margin")], figure=tmp_path / "one.png")
    both = save_evaluations([Named(evaluation, "margin"), Named(evaluation, "loss")], tmp_path / "two.png")
    assert [path.name for path in (*alone, *both)] == ["one.png", "two.png", "two-loss.png"]
    pictures = [imread(path) for path in (*alone, *both)]
    assert (pictures[0] != pictures[1]).any()  # a title
    assert (pictures[1] != pictures[2]).any()  # another
    assert evaluation_figure(evaluation, "loss").get_suptitle() == "loss"
    assert evaluation_figure(evaluation).get_suptitle() == ""
