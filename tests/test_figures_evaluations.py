"""Figures of evaluations: what is drawn is what was evaluated."""

from __future__ import annotations

from itertools import combinations, pairwise
from types import SimpleNamespace

import numpy as np
import pandas
import pytest
from matplotlib.colors import to_rgb

from coar.errors import SettingError
from coar.report import figures
from coar.report.style import COLOURS, method_styles

MEANS = pandas.DataFrame(
    {
        "method": ["a", "a", "b", "b"],
        "ablation_fraction": [0.025, 0.1, 0.025, 0.1],
        "correlation": [0.9, 0.8, 0.5, 0.4],
        "low": [0.8, 0.7, 0.4, -0.2],
        "high": [0.95, 0.9, 0.6, 0.5],
    }
)
COSTS = pandas.DataFrame(
    {
        "method": ["long", "short", "once", "floor", "unknown", "by hand"],
        "ablation_fraction": 0.1,
        "correlation": [0.8, 0.6, 0.3, 0.05, 0.2, np.nan],
        "low": [0.75, 0.5, 0.2, 0.0, 0.1, np.nan],
        "high": [0.85, 0.7, 0.4, 0.1, 0.3, np.nan],
        "ceiling": [0.9, 0.92, np.nan, np.nan, np.nan, np.nan],
        "forwards": [300, 30, 3, 0, np.nan, 10],
        "family": ["gate_gradients", "gate_gradients", "one", "none", "else", "hand"],
    }
)


def lines(ax):
    """Data of the lines by label."""
    return {line.get_label(): [list(map(float, xy)) for xy in line.get_data()] for line in ax.get_lines()}


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_correlation_by_fraction_has_a_line_and_a_band_per_method():
    ax = figures.correlation_by_fraction(MEANS)
    assert lines(ax) == {"a": [[0.025, 0.1], [0.9, 0.8]], "b": [[0.025, 0.1], [0.5, 0.4]]}
    assert len(ax.collections) == 2
    assert legend(ax) == ["a", "b"]
    assert "fraction of components ablated" in ax.get_xlabel()
    assert "correlation" in ax.get_ylabel()
    assert [ax.xaxis.get_major_formatter()(tick) for tick in ax.get_xticks()] == ["2.5%", "10%"]
    assert ax.get_ylim() == (-0.2, 1.0)


def test_no_method_is_dropped_however_many_there_are():
    many = pandas.concat([MEANS.assign(method=f"method {i}") for i in range(9)])
    assert len(legend(figures.correlation_by_fraction(many))) == 9


def test_predictions_show_every_row_and_the_correlation():
    truth, predicted = np.array([1.0, 2.0, 4.0]), np.array([1.5, 2.5, 3.0])
    ax = figures.predictions(truth, predicted, title="image 7")
    assert ax.collections[0].get_offsets().tolist() == [[1.5, 1.0], [2.5, 2.0], [3.0, 4.0]]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("predicted output", "output of the ablated model")
    assert ax.get_title() == "image 7"
    assert ax.texts[0].get_text() == f"correlation {np.corrcoef(truth, predicted)[0, 1]:.2f}"


def test_predictions_of_a_constant_output_say_that_there_is_no_correlation():
    ax = figures.predictions(np.ones(3), np.arange(3.0))
    assert ax.texts[0].get_text() == "correlation not defined (constant)"


def test_the_linear_ceiling_is_dotted_where_it_is_known():
    means = MEANS.assign(ceiling=[0.97, 0.9, np.nan, 0.94])
    ax = figures.correlation_by_fraction(means)
    assert lines(ax)["linear ceiling"] == [[0.025, 0.1], [0.97, pytest.approx(0.92)]]
    assert {line.get_label(): line.get_linestyle() for line in ax.get_lines()}["linear ceiling"] == ":"
    assert legend(ax) == ["a", "b", "linear ceiling"]


def test_the_interval_of_the_ceiling_is_a_band():
    means = MEANS.assign(ceiling=[0.97, 0.9] * 2, ceiling_low=[0.95, 0.85] * 2, ceiling_high=[0.99, 0.94] * 2)
    ax = figures.correlation_by_fraction(means)
    (band,) = [path.vertices for path in ax.collections[-1].get_paths()]
    assert {tuple(map(float, corner)) for corner in band} >= {
        (0.025, 0.95),
        (0.025, 0.99),
        (0.1, 0.85),
        (0.1, 0.94),
    }
    assert len(ax.collections) == 3
    assert legend(ax) == ["a", "b", "linear ceiling"]


def test_a_ceiling_at_one_of_several_fractions_has_its_interval():
    known = [np.nan, 0.9, np.nan, 0.9]
    means = MEANS.assign(
        ceiling=known, ceiling_low=np.array(known) - 0.1, ceiling_high=np.array(known) + 0.05
    )
    ax = figures.correlation_by_fraction(means)
    assert lines(ax)["linear ceiling"] == [[0.1], [0.9]]
    (bars,) = ax.containers[-1].lines[2]
    assert bars.get_segments()[0].tolist() == [[0.1, pytest.approx(0.8)], [0.1, pytest.approx(0.95)]]
    assert legend(ax) == ["a", "b", "linear ceiling"]


def test_no_ceiling_is_drawn_where_none_is_known():
    assert legend(figures.correlation_by_fraction(MEANS.assign(ceiling=np.nan))) == ["a", "b"]


def test_fractions_far_apart_are_on_a_logarithmic_axis():
    means = MEANS.assign(ablation_fraction=[0.01, 0.4, 0.01, 0.4])
    ax = figures.correlation_by_fraction(means)
    ax.figure.canvas.draw()
    assert ax.get_xscale() == "log"
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1%", "40%"]
    assert figures.correlation_by_fraction(MEANS).get_xscale() == "linear"


def test_a_long_legend_stands_beside_the_data():
    many = pandas.concat([MEANS.assign(method=f"method {i}") for i in range(8)])
    ax = figures.correlation_by_fraction(many)
    ax.figure.canvas.draw()
    assert ax.get_legend().get_window_extent().x0 > ax.get_window_extent().x1
    assert ax.get_window_extent().width > 0.5 * ax.figure.get_window_extent().width


def lightness(colour):
    """CIE L*, 0 to 100: what is left of a colour in grey."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    luminance = float(np.dot([0.2126, 0.7152, 0.0722], linear))
    return 116 * luminance ** (1 / 3) - 16 if luminance > 0.0089 else 903.3 * luminance


def test_ten_methods_have_colours_and_markers_of_their_own():
    drawn = list(method_styles(map(str, range(10))).values())
    assert len({style["color"] for style in drawn}) == 10
    assert len({style["marker"] for style in drawn}) == 10
    assert min(np.linalg.norm(np.subtract(to_rgb(a), to_rgb(b))) for a, b in combinations(COLOURS, 2)) > 0.2


def test_neighbours_differ_in_grey_and_in_dashes():
    drawn = list(method_styles(map(str, range(20))).values())
    for one, other in pairwise(drawn):
        assert one["linestyle"] != other["linestyle"]
        assert abs(lightness(one["color"]) - lightness(other["color"])) > 6
    assert all(lightness(colour) < 80 for colour in COLOURS)  # seen on white


def test_no_two_of_many_methods_look_the_same():
    drawn = method_styles(map(str, range(100))).values()
    assert len({(style["color"], style["marker"]) for style in drawn}) == 100
    assert len({(style["color"], style["linestyle"]) for style in list(drawn)[:70]}) == 70  # in histograms


def points(ax):
    """x, y, and lower and upper ends of the error bars of each family, by label."""
    found = {}
    for container in ax.containers:
        line, _, (bars,) = container.lines
        ends = [(low[1], high[1]) for low, high in bars.get_segments()]
        found[container.get_label()] = (*map(list, line.get_data()), ends, line.get_linestyle())
    return found


def test_correlation_by_compute_joins_families_in_order_of_cost():
    found = points(figures.correlation_by_compute(COSTS))
    assert set(found) == {"gate gradients", "once"}  # a method alone has its own name
    x, y, ends, style = found["gate gradients"]
    assert (x, y, style) == ([30, 300], [0.6, 0.8], "-")
    assert ends == [pytest.approx((0.5, 0.7)), pytest.approx((0.75, 0.85))]
    assert found["once"][:2] == ([3], [0.3])
    assert found["once"][3] == "None"


def test_correlation_by_compute_shows_ceiling_floor_and_what_is_left_out():
    ax = figures.correlation_by_compute(COSTS)
    found = lines(ax)
    assert set(found["linear ceiling"][1]) == {0.91}
    assert set(found["floor (costs nothing)"][1]) == {0.05}
    assert legend(ax)[-1] == "linear ceiling"
    assert ax.get_xscale() == "log"
    (note,) = [text.get_text() for text in ax.texts if text.get_fontsize() == 8 and "," in text.get_text()]
    assert note == "left out, cost or correlation not known: unknown, by hand"
    assert "forward passes" in ax.get_xlabel()
    assert ax.get_title() == "10% ablated"


def test_correlation_by_compute_labels_costs_as_numbers():
    ax = figures.correlation_by_compute(COSTS[:2])
    ax.figure.canvas.draw()
    low, high = ax.get_xlim()
    places = [place for place in ax.get_xticks() if low <= place <= high]
    label = ax.xaxis.get_major_formatter()
    assert [label(place) for place in places] == ["30", "50", "100", "200", "300"]


def test_correlation_by_compute_takes_one_fraction_and_methods_without_families():
    means = pandas.concat([COSTS, COSTS.assign(ablation_fraction=0.2, correlation=0.1, low=0.0, high=0.2)])
    found = points(figures.correlation_by_compute(means.drop(columns="family"), fraction=0.2))
    assert found["long"][:2] == ([300], [0.1])
    assert "short" in found


def test_correlation_by_compute_refuses_what_it_cannot_draw():
    with pytest.raises(SettingError, match="what it cost"):
        figures.correlation_by_compute(MEANS)
    with pytest.raises(SettingError, match="no method says what it cost"):
        figures.correlation_by_compute(COSTS.assign(forwards=np.nan))
    with pytest.raises(SettingError, match=r"0\.1"):
        figures.correlation_by_compute(COSTS, fraction=0.3)


def histogram_table():
    rng = np.random.default_rng(0)
    values = {"good": rng.uniform(0.6, 1.0, 50), "bad": rng.uniform(-0.3, 0.4, 50)}
    values["bad"][:3] = np.nan
    parts = [
        pandas.DataFrame({"method": method, "ablation_fraction": fraction, "pearson": pearson / scale})
        for fraction, scale in ((0.1, 1.0), (0.2, 2.0))
        for method, pearson in values.items()
    ]
    return pandas.concat(parts), values


def test_costs_of_all_sizes_can_be_read():
    """The least cost, the largest, and something between have a label near, and no two labels touch."""
    for costs in ((3, 300), (3, 3_000, 600), (1, 100_000), (3, 30), (3, 2_000_000), (100, 120)):
        rows = [COSTS.iloc[[2]].assign(method=str(cost), forwards=cost) for cost in costs]
        ax = figures.correlation_by_compute(pandas.concat(rows))
        ax.figure.canvas.draw()
        low, high = ax.get_xlim()
        shown = [label for label in ax.get_xticklabels() if low <= label.get_position()[0] <= high]
        boxes = sorted((label.get_window_extent() for label in shown), key=lambda box: box.x0)
        assert all(left.x1 < right.x0 for left, right in pairwise(boxes)), costs
        texts = [label.get_text() for label in shown]
        if max(costs) < 10_000:
            assert f"{min(costs)}" in texts, (costs, texts)


def test_attributions_made_for_other_fractions_are_no_line():
    methods = {
        "few": (0.05, 10, 0.5),
        "more": (0.05, 20, 0.6),
        "far": (0.2, 15, 0.4),
        "any": (np.nan, 30, 0.3),
    }
    rows = [
        {"method": method, "made_for": made, "forwards": cost, "correlation": value}
        for method, (made, cost, value) in methods.items()
    ]
    means = pandas.DataFrame(rows).assign(family="ridge", ablation_fraction=0.1)
    found = points(
        figures.correlation_by_compute(means.assign(low=means.correlation, high=means.correlation))
    )
    assert {name: data[0] for name, data in found.items()} == {
        "ridge, made for 5%": [10, 20],
        "far": [15],
        "any": [30],
    }


def test_points_of_a_family_bear_short_names_and_the_legend_long_ones():
    named = COSTS[:2].assign(method=["gate gradients, long", "short"], made_for=0.1)
    ax = figures.correlation_by_compute(named)
    assert {text.get_text(): text.xy for text in ax.texts} == {"long": (300, 0.8), "short": (30, 0.6)}
    assert legend(ax) == ["gate gradients", "linear ceiling"]
    ax = figures.correlation_by_compute(named.assign(method=["a name of many letters", "short"]))
    assert not ax.texts
    assert legend(ax)[0].replace("\n", " ") == "gate gradients: short; a name of many letters"
    ax = figures.correlation_by_compute(named.assign(forwards=[120, 90]))  # too close for names
    assert (len(ax.texts), legend(ax)[0]) == (0, "gate gradients: short; long")


def test_names_at_points_end_inside_the_axes():
    ax = figures.correlation_by_compute(COSTS[:2].assign(method=["fourteen lette", "short"], made_for=0.1))
    ax.figure.canvas.draw()
    assert len(ax.texts) == 2
    assert max(text.get_window_extent().x1 for text in ax.texts) <= ax.get_window_extent().x1


def test_attributions_by_hand_are_no_family():
    means = COSTS[:3].assign(family=["by hand", "by hand", ""], method=["x", "y", "by hand"])
    assert set(points(figures.correlation_by_compute(means))) == {"x", "y", "by hand"}


def test_one_fraction_is_a_row_for_each_method_in_the_order_given():
    means = COSTS.assign(ceiling=0.9, ceiling_low=0.85, ceiling_high=0.97)
    ax = figures.correlation_by_fraction(means)
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert names == COSTS.method.tolist()
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # the first on top
    drawn = {container.get_label(): container.lines for container in ax.containers}
    assert list(drawn) == names[:-1]
    for place, row in enumerate(COSTS[:-1].itertuples()):
        line, _, (bars,) = drawn[row.method]
        assert [list(map(float, xy)) for xy in line.get_data()] == [[row.correlation], [place]]
        assert bars.get_segments()[0] == pytest.approx(np.array([[row.low, place], [row.high, place]]))
    assert ax.get_xlabel() == figures.correlation_by_fraction(MEANS).get_ylabel()
    assert ax.get_title() == "10% ablated"


def test_one_fraction_says_shares_of_the_ceiling_and_what_is_not_defined():
    ax = figures.correlation_by_fraction(COSTS.assign(ceiling=0.8, ceiling_low=0.7, ceiling_high=0.9))
    (line,) = [line for line in ax.get_lines() if line.get_label() == "linear ceiling"]
    assert (list(line.get_xdata()), line.get_linestyle()) == ([0.8, 0.8], ":")
    (band,) = ax.patches
    assert (band.get_x(), band.get_width()) == pytest.approx((0.7, 0.2))
    texts = {text.get_text(): text.get_position() for text in ax.texts}
    assert [texts[share][1] for share in ("100%", "75%", "38%", "6%", "25%")] == [0, 1, 2, 3, 4]
    assert texts["not defined (constant)"][1] == 5
    assert "linear ceiling" in texts
    assert "share of it" in texts


def test_equal_methods_at_one_fraction_do_not_hide_each_other():
    equal = pandas.concat([MEANS[:1].assign(method=name) for name in ("a", "b", "c")])
    ax = figures.correlation_by_fraction(equal)
    assert [int(container.lines[0].get_ydata()[0]) for container in ax.containers] == [0, 1, 2]
    assert not ax.texts  # no ceiling, no shares


def test_an_evaluation_is_as_good_as_its_tables():
    table, _ = histogram_table()
    means = MEANS.assign(forwards=10)
    evaluation = SimpleNamespace(table=table, means=lambda: means)
    assert lines(figures.correlation_by_fraction(evaluation)) == lines(figures.correlation_by_fraction(means))
    assert points(figures.correlation_by_compute(evaluation)) == points(figures.correlation_by_compute(means))
    drawn = figures.correlation_histogram(evaluation)
    assert lines(drawn) == lines(figures.correlation_histogram(table))


def test_other_tables_are_refused():
    table, _ = histogram_table()
    for draw in (figures.correlation_by_fraction, figures.correlation_by_compute):
        with pytest.raises(SettingError, match=r"its means\(\)"):
            draw(table)
    with pytest.raises(SettingError, match="or its table"):
        figures.correlation_histogram(MEANS)
    with pytest.raises(SettingError, match=r"got: +dict"):
        figures.correlation_histogram({})


def test_histograms_count_every_defined_column_and_mark_medians():
    table, values = histogram_table()
    ax = figures.correlation_histogram(table)
    for stairs, (method, pearson) in zip(ax.patches, values.items(), strict=True):
        defined = pearson[np.isfinite(pearson)]
        counts, edges, _ = stairs.get_data()
        assert counts.tolist() == np.histogram(defined, edges)[0].tolist()
        assert counts.sum() == len(defined)
        assert stairs.get_label() == f"{method}, median {np.median(defined):.2f}"
    marks = [float(line.get_xdata()[0]) for line in ax.get_lines()]
    assert marks == pytest.approx([np.nanmedian(pearson) for pearson in values.values()])
    assert ax.texts[0].get_text() == "constant outputs, no correlation: bad 3"
    assert ax.get_title() == "10% ablated"


def test_histograms_of_another_fraction_and_of_none():
    table, values = histogram_table()
    ax = figures.correlation_histogram(table, fraction=0.2)
    assert ax.get_lines()[0].get_xdata()[0] == pytest.approx(np.median(values["good"]) / 2)
    with pytest.raises(SettingError, match="fraction"):
        figures.correlation_histogram(table, fraction=0.5)


def test_a_histogram_of_nothing_defined_says_so():
    table = pandas.DataFrame({"method": ["a"], "ablation_fraction": [0.1], "pearson": [np.nan]})
    assert figures.correlation_histogram(table).texts[0].get_text().endswith("a 1")


def test_perfect_correlations_are_counted():
    table = pandas.DataFrame(
        {"method": ["a"] * 2, "ablation_fraction": [0.1] * 2, "pearson": [1.0 + 1e-12, 1.0]}
    )
    assert figures.correlation_histogram(table).patches[0].get_data().values.sum() == 2
