"""Figures of attributions: layers as a heat map, and the images behind top components."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import coar
from coar.attributions import Attributions
from coar.axes import Axis
from coar.components import ComponentGroup, ComponentSet
from coar.errors import AxisError, SettingError, TaskError
from coar.report import figures
from coar.report.activations import measure_activations
from coar.task import Task
from coar.testing import LinearSum

WEIGHTS = np.array([[1.0, -3.0, 4.0], [2.0, 0.0, -1.0], [0.0, 0.0, 0.0], [6.0, 2.0, 1.0]])
GROUPS = ["net.first", "net.first", "net.second.up"]
COMPONENTS = Axis("components", ["net.first[0]", "net.first[1]", "net.second.up[0]"], {}, {"group": GROUPS})


def attributions(weights=WEIGHTS, components=COMPONENTS):
    names = [f"e{i}" for i in range(len(weights))]
    columns = Axis("columns", names, {}, {"example": np.arange(len(weights))})
    return Attributions(weights, np.zeros(len(weights)), components, columns, "margin")


def image_of(ax):
    return np.asarray(ax.images[0].get_array())


def ticks(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


class TestLayerHeatMap:
    def test_a_row_per_layer_in_model_order_and_a_column_per_example(self):
        ax = figures.layer_heat_map(attributions())
        assert image_of(ax) == pytest.approx(np.array([[-1.0, 1.0, 0.0, 4.0], [4.0, -1.0, 0.0, 1.0]]))
        assert ticks(ax.yaxis) == ["first", "second.up"]
        assert ticks(ax.xaxis) == ["e0", "e1", "e2", "e3"]

    def test_sums_are_those_of_by_group(self):
        ax = figures.layer_heat_map(attributions(), value="sum")
        assert image_of(ax) == pytest.approx(attributions().by_group().to_numpy().T)

    def test_magnitudes_do_not_cancel_and_have_no_sign(self):
        ax = figures.layer_heat_map(attributions(), value="magnitude")
        assert image_of(ax)[:, 0] == pytest.approx([2.0, 4.0])
        assert ax.images[0].get_clim()[0] == 0

    def test_white_is_zero(self):
        low, high = figures.layer_heat_map(attributions()).images[0].get_clim()
        assert low == -high < 0

    def test_some_columns_by_name(self):
        ax = figures.layer_heat_map(attributions(), ["e3", "e0"])
        assert image_of(ax) == pytest.approx(np.array([[4.0, -1.0], [1.0, 4.0]]))
        assert ticks(ax.xaxis) == ["e3", "e0"]

    def test_means_within_labels(self):
        ax = figures.layer_heat_map(attributions(), by=["dog", "cat", "dog", "cat"])
        assert image_of(ax) == pytest.approx(np.array([[2.5, -0.5], [0.0, 2.0]]))
        assert ticks(ax.xaxis) == ["cat", "dog"]

    def test_the_colour_bar_says_what_the_numbers_are(self):
        ax = figures.layer_heat_map(attributions())
        (bar,) = [other for other in ax.figure.axes if other is not ax]
        assert "effect on the margin" in bar.get_ylabel()
        assert "mean" in bar.get_ylabel()

    def test_many_columns_and_layers_are_named_here_and_there(self):
        groups = [f"layer{i}" for i in range(200)]
        components = Axis("components", [f"{g}[0]" for g in groups], {}, {"group": groups})
        weights = np.random.default_rng(0).normal(size=(500, 200))
        ax = figures.layer_heat_map(attributions(weights, components))
        assert image_of(ax).shape == (200, 500)
        for axis, prefix in ((ax.xaxis, "e"), (ax.yaxis, "layer")):
            shown = axis.get_ticklocs()
            assert 10 < len(shown) < 100
            assert ticks(axis) == [f"{prefix}{int(place)}" for place in shown]

    def test_one_outlier_does_not_bleach_the_rest(self):
        weights = np.ones((400, 3))
        weights[0] = 1000.0
        assert figures.layer_heat_map(attributions(weights)).images[0].get_clim() == (-1.0, 1.0)

    def test_zero_attributions_can_be_drawn(self):
        ax = figures.layer_heat_map(attributions(np.zeros((2, 3))))
        ax.figure.canvas.draw()
        assert not image_of(ax).any()

    def test_refusals(self):
        with pytest.raises(SettingError, match="unknown value"):
            figures.layer_heat_map(attributions(), value="median")
        with pytest.raises(SettingError, match="4 columns"):
            figures.layer_heat_map(attributions(), by=["cat"])
        with pytest.raises(AxisError, match="no such column"):
            figures.layer_heat_map(attributions(), ["e9"])


def shades(show=True):
    """Four examples, each an image of one number, by which it can be told in a figure."""

    def draw(item, ax):
        ax.imshow(item.reshape(1, 1).numpy(), vmin=0, vmax=9)
        ax.set_title(f"number {int(item)}")

    model = LinearSum(torch.ones(1, 1)).eval()
    dataset = list(torch.arange(4.0))
    return Task(model, dataset, {"margin": lambda m, b: m(b)}, show=draw if show else None, device="cpu")


class TestTopComponentImages:
    @staticmethod
    def drawn(ax):
        """Which example each inset shows, and the number below it, from left to right, rows from the top."""
        insets = [inset for inset in ax.child_axes if inset.images]
        places = [inset.get_position() for inset in insets]
        order = sorted(range(len(insets)), key=lambda i: (-round(places[i].y0, 3), places[i].x0))
        return [(int(image_of(insets[i])[0, 0]), insets[i].texts[0].get_text()) for i in order]

    def test_the_example_then_the_images_that_need_each_component_most(self):
        ax = figures.top_component_images(attributions(), "e0", shades(), components=2, images=2)
        ax.figure.canvas.draw()
        found = self.drawn(ax)
        # of e0 the largest are second.up[0] (4) and first[1] (-3)
        assert sorted(found) == sorted([(0, ""), (0, "4"), (3, "1"), (3, "2"), (1, "0")])
        assert [entry for entry in found if entry[1]] == [(0, "4"), (3, "1"), (3, "2"), (1, "0")]

    def test_bars_say_name_and_weight(self):
        ax = figures.top_component_images(attributions(), 0, shades(), components=2, images=1)
        (bars,) = [inset for inset in ax.child_axes if inset.patches]
        assert [bar.get_width() for bar in bars.patches] == [4.0, -3.0]
        assert [text.get_text() for text in bars.texts] == ["net.second.up[0]  +4", "net.first[1]  -3"]

    def test_images_that_activate_it_most_where_activations_are_given(self):
        activations = np.array([[0, 0, 0.1], [0, 0, 0.7], [0, 0, 0.3], [0, 0, -5.0]])
        ax = figures.top_component_images(
            attributions(), 0, shades(), components=1, images=2, activations=activations
        )
        ax.figure.canvas.draw()
        assert [entry for entry in self.drawn(ax) if entry[1]] == [(0, "4"), (3, "1"), (1, "0.7"), (2, "0.3")]
        assert [text.get_text() for text in ax.texts] == [
            "column e0",
            "effect on the margin",
            "images that need it most (effect)",
            "images that activate it most (mean output)",
        ]

    def test_an_example_with_several_columns_is_found_by_its_number(self):
        columns = Axis("columns", ["a:0", "a:1", "b:0", "b:1"], {}, {"example": [1, 1, 2, 2]})
        found = Attributions(WEIGHTS, np.zeros(4), COMPONENTS, columns, "margin")
        ax = figures.top_component_images(found, "b:1", shades(), components=1, images=1)
        # the largest of b:1 is first[0], which b:1 itself needs most
        assert sorted(self.drawn(ax)) == [(2, ""), (2, "6")]

    def test_draws_inside_the_axes_given(self):
        _, (ax,) = figures.new_figure()
        assert figures.top_component_images(attributions(), 0, shades(), ax=ax) is ax

    def test_refusals(self):
        with pytest.raises(TaskError, match="how an example is drawn"):
            figures.top_component_images(attributions(), 0, shades(show=False))
        with pytest.raises(AxisError, match="another shape"):
            figures.top_component_images(attributions(), 0, shades(), activations=np.zeros((4, 2)))
        with pytest.raises(AxisError, match="no such column"):
            figures.top_component_images(attributions(), "e9", shades())


NAMED = ["conv", "plain", "linear"]  # the last layer counts where it is named


class Small(nn.Module):
    """A convolution with BatchNorm that turns signs, one without, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3)
        self.plain, self.linear = nn.Conv2d(3, 4, 1), nn.Linear(4, 2)

    def forward(self, x):
        hidden = functional.relu(self.plain(functional.relu(self.norm(self.conv(x)))))
        return self.linear(hidden.mean(dim=(2, 3)))


def small_experiment():
    generator = torch.Generator().manual_seed(0)
    model = Small().eval()
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=generator).abs() + 0.1)
    model.norm.weight.data[1] *= -1
    model.plain.weight.data[::2] *= -1
    dataset = list(torch.randn(5, 2, 6, 6, generator=generator))
    task = Task(model, dataset, {"first": lambda m, b: m(b)[:, 0]}, device="cpu")
    return coar.ComponentAblation(
        task, coar.find_components(model, kinds=["conv_filter", "neuron"], include=NAMED)
    )


class TestActivations:
    def test_means_over_positions_behind_batch_norm_as_hooks_see_them(self):
        experiment = small_experiment()
        found = measure_activations(experiment)
        model, seen = experiment.task.model, {}
        for name, layer in (("conv", model.norm), ("plain", model.plain), ("linear", model.linear)):
            layer.register_forward_hook(lambda _m, _i, y, name=name: seen.__setitem__(name, y))
        model(torch.stack(experiment.task.dataset))
        expected = [y.detach().flatten(2).mean(dim=2) if y.ndim == 4 else y.detach() for y in seen.values()]
        assert found.dtype == np.float32
        assert [group.name for group in experiment.component_set] == list(seen)
        assert found == pytest.approx(torch.cat(expected, dim=1).numpy(), rel=1e-5, abs=1e-5)

    def test_of_several_entries_the_root_mean_square_of_what_is_read(self):
        model = nn.Sequential(nn.Linear(4, 1, bias=False)).eval()
        dataset = [
            torch.tensor([[3.0, 4.0, -1.0, 1.0], [3.0, 4.0, 3.0, 3.0]]),
            torch.ones(2, 4),
        ]  # [positions, 4]
        task = Task(model, dataset, {"mean": lambda m, b: m(b).mean(dim=(1, 2))}, device="cpu")
        group = ComponentGroup("pair", "entry", "0", "weight", dimension=1, count=2, width=2, side="input")
        found = measure_activations(coar.ComponentAblation(task, ComponentSet([group])))
        assert found == pytest.approx(np.array([[12.5**0.5, 2.5**0.5], [1.0, 1.0]]))

    def test_the_model_is_left_alone(self):
        experiment = small_experiment()
        before = {name: tensor.clone() for name, tensor in experiment.task.model.state_dict().items()}
        measure_activations(experiment)
        after = experiment.task.model.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)

    def test_only_of_components_of_a_model(self):
        with pytest.raises(SettingError, match="activations"):
            measure_activations(object())
