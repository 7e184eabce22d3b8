"""What somebody new met: messages that name the cause, from the library and on the command line alike."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

import coar
from coar.attributions import Attributions
from coar.axes import Axis
from coar.errors import OutputError, TaskError
from tests.refused import refused


class Numbers(Dataset):
    """Twelve examples of three numbers; `spoilt` is a number of one, `noisy` gives others at every read."""

    def __init__(self, spoilt=None, noisy=False):
        self.values = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
        self.noisy = noisy
        if spoilt is not None:
            self.values[4, 1] = spoilt

    def __len__(self):
        return 12

    def __getitem__(self, position):
        return self.values[position] + (torch.randn(3) if self.noisy else 0)


def experiment(dataset, of=lambda model, batch: model(batch)[:, 0]):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).eval()
    task = coar.Task(model, dataset, outputs={"score": of}, device="cpu")
    return coar.ComponentAblation(task, coar.find_components(model, kinds=["neuron"]))


@pytest.mark.parametrize("spoilt", [float("nan"), float("inf")])
def test_an_output_that_is_not_finite_is_named_with_its_example(spoilt, tmp_path):
    def ratio(model, batch):  # infinite inputs stay infinite
        return model(batch)[:, 0] + batch[:, 1]

    message = f"output 'score' of example 4 is {spoilt} although nothing is ablated"
    with refused(OutputError, message, "1 of 12 values"):
        coar.gate_gradients(experiment(Numbers(spoilt), ratio), 0.1, progress=False)
    with refused(OutputError, message):
        design = coar.Bernoulli(ablation_fraction=0.1)
        coar.Study.create(tmp_path / "study", experiment(Numbers(spoilt), ratio), design, num_rows=4)


def test_the_example_is_counted_in_outputs_of_several_values():
    def both(model, batch):
        return model(batch)

    with refused(OutputError, "of example 4 is nan", "2 of 24 values"):
        coar.gate_gradients(experiment(Numbers(float("nan")), both), 0.1, progress=False)


def test_a_data_set_that_gives_other_items_each_time_is_a_cause_that_is_named():
    with refused(TaskError, "alone is not what it is in its batch", "same item whenever it is asked"):
        coar.gate_gradients(experiment(Numbers(noisy=True)), 0.1, progress=False)


def test_attributions_say_what_they_cost_and_how_good_they_are():
    axes = Axis("components", ["a", "b"], {}), Axis("columns", ["0"], {})

    def said(**provenance):
        return repr(Attributions(np.ones((1, 2)), np.ones(1), *axes, output="score", provenance=provenance))

    start = "Attributions(1 columns x 2 components, output='score', by "
    assert said() == start + "hand)"
    assert said(method="ridge", rows=90) == start + "ridge)"
    assert said(method="gate gradients", passes=1200, correlation=0.9671) == (
        start + "gate gradients, 1,200 passes, estimated correlation 0.967)"
    )


def test_all_methods_and_checks_are_at_hand():
    from coar import baselines, checking

    for module in (baselines, checking):
        for name in set(module.__all__) - {"Check"}:
            assert getattr(coar, name) is getattr(module, name)
            assert name in coar.__all__
