"""The digits task: a network worth attributing, made the same way twice, kept in the study."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_model

import coar
from coar.errors import SettingError
from coar.fingerprints import model_fingerprint
from coar.tasks import digits
from coar.testing import check_components, check_experiment

pytestmark = pytest.mark.slow  # trains the network


@pytest.fixture(scope="module")
def weights(digits_task, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    save_model(digits_task.model, str(path))
    return str(path)


def test_it_reads_98_percent_of_the_images_that_it_has_not_seen(weights):
    task = digits.make_task(weights=weights)
    assert len(task) == 700
    images, labels = task.dataset.tensors
    with torch.no_grad():
        right = task.model(images).argmax(dim=1) == labels
    assert right.float().mean() >= 0.98
    assert not right.all()  # there is something to fix


def test_training_images_and_examples_are_disjoint():
    images, _, order = digits.load_images(seed=0)
    assert sorted(order) == list(range(1797))
    assert len(order[: digits.NUM_TRAIN]) + 700 == len(images)


def test_training_is_repeatable_and_leaves_the_global_generator_alone(monkeypatch):
    monkeypatch.setattr(digits, "EPOCHS", 1)
    before = torch.get_rng_state()
    first, second = digits.make_task(num_examples=5), digits.make_task(num_examples=5)
    assert torch.equal(torch.get_rng_state(), before)
    assert model_fingerprint(first.model) == model_fingerprint(second.model)
    other = digits.make_task(seed=1, num_examples=5)
    assert model_fingerprint(other.model) != model_fingerprint(first.model)


def test_saved_weights_give_the_same_network_and_data(digits_task, weights):
    again = digits.make_task(num_examples=120, weights=weights)
    assert again.model_fingerprint() == digits_task.model_fingerprint()
    assert again.data_fingerprint() == digits_task.data_fingerprint()


def test_its_components_are_the_filters_of_all_convolutions(digits_task):
    components = coar.find_components(digits_task.model)
    assert len(components) == 312
    assert len(components.groups) == 9
    check_components(digits_task.model, components, digits_task.dataset.tensors[0][:8])


def test_its_ablation_keeps_the_contract(digits_task):
    check_experiment(coar.ComponentAblation(digits_task, coar.find_components(digits_task.model)))


def test_a_study_keeps_the_weights_and_workers_use_them(tmp_path, digits_task, monkeypatch):
    experiment = coar.ComponentAblation(digits_task, coar.find_components(digits_task.model))
    design = coar.Bernoulli(ablation_fraction=0.1)
    coar.Study.create(tmp_path / "s", experiment, design, 4).run(progress=False)

    def never(*_):
        raise AssertionError("the network is trained again")

    monkeypatch.setattr(digits, "train", never)
    again = coar.Study.open(tmp_path / "s")
    assert again.experiment.fingerprint() == experiment.fingerprint()
    (other,) = again.experiment.prepare(torch.device("cpu"))(again.masks[:]).values()
    np.testing.assert_allclose(other, again.outputs["margin"], atol=1e-5)


@pytest.mark.parametrize("count", [0, 701, -1])
def test_more_examples_than_there_are_is_refused(count):
    with pytest.raises(SettingError, match="1 to 700"):
        digits.make_task(num_examples=count)
