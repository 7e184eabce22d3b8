"""Digits with a patch: which images carry it, what the network learns from that, and what an edit undoes."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_model

import coar
from coar.errors import SettingError
from coar.tasks import digits, spurious_digits
from coar.testing import check_experiment
from tests.refused import refused

GROUPS = ["even, plain", "even, patch", "odd, plain", "odd, patch"]


def accuracies(task, model=None):
    """Share of right answers, by subpopulation."""
    images, labels = task.dataset.tensors
    with torch.no_grad():
        right = ((model or task.model)(images).argmax(dim=1) == labels).numpy()
    return {group: right[(task.metadata["subpopulation"] == group).to_numpy()].mean() for group in GROUPS}


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "untrained.safetensors"
    save_model(spurious_digits.make_network(seed=3), str(path))
    return str(path)


@pytest.fixture(scope="module")
def quick(untrained):
    return spurious_digits.make_task(num_images=100, weights=untrained)


@pytest.fixture(scope="module")
def task():
    return spurious_digits.make_task(seed=10)


class TestExamples:
    def test_every_image_comes_without_and_with_the_patch(self, quick):
        images, labels = quick.dataset.tensors
        table = quick.metadata
        assert len(quick) == 200
        for i in range(100):
            assert table["image"][i] == table["image"][100 + i]
            assert labels[i] == labels[100 + i] == table["digit"][i] % 2 == table["label"][i]
            differing = (images[i] != images[100 + i])[0]
            assert differing.any()
            assert not differing[3:].any()
            assert not differing[:, 3:].any()
        assert table["cue"].tolist() == ["plain"] * 100 + ["patch"] * 100
        assert table["id"].is_unique

    def test_groups_with_the_same_label_are_as_large(self, quick):
        sizes = Counter(quick.metadata["subpopulation"])
        assert set(sizes) == set(GROUPS)
        assert sizes["odd, plain"] == sizes["odd, patch"]
        assert sizes["even, plain"] == sizes["even, patch"]
        for label, cue, group in quick.metadata[["label", "cue", "subpopulation"]].to_numpy():
            assert group == f"{('even', 'odd')[label]}, {cue}"

    def test_the_images_are_those_that_digits_holds_out(self, quick):
        images, numbers, order = digits.load_images(seed=0)
        held_out = order[digits.NUM_TRAIN :][:100]
        assert quick.metadata["image"].tolist() == 2 * held_out.tolist()
        assert quick.metadata["digit"].tolist() == 2 * numbers[held_out].tolist()
        assert torch.equal(quick.dataset.tensors[0][:100], images[held_out])

    def test_an_image_can_be_drawn(self, quick):
        axes = pytest.importorskip("matplotlib.figure").Figure().add_subplot()
        quick.show(quick.dataset[0], axes)
        assert axes.get_title() == ("even", "odd")[quick.metadata["label"][0]]

    def test_its_ablation_keeps_the_contract(self, quick):
        components = coar.find_components(quick.model, kinds=["conv_filter"])
        assert len(components) == 312
        check_experiment(coar.ComponentAblation(quick, components))


class TestPatch:
    @given(st.floats(0, 1), st.integers(0, 2**32 - 1))
    def test_is_no_lighter_than_its_strength_and_hides_no_ink(self, strength, seed):
        images = torch.from_numpy(np.random.default_rng(seed).uniform(-1, 2, (4, 1, 8, 8)))
        marked = torch.tensor([True, False, True, False])
        found = spurious_digits.with_cue(images, marked, strength)
        level = images.min() + strength * (images.max() - images.min())
        expected = images.clone()
        for i in (0, 2):
            for row in range(3):
                for column in range(3):
                    expected[i, 0, row, column] = max(images[i, 0, row, column], level)
        torch.testing.assert_close(found, expected)

    @pytest.mark.parametrize("agreement", [0.0, 0.5, 0.95, 1.0])
    def test_agrees_with_the_label_as_often_as_asked(self, agreement):
        labels = torch.from_numpy(np.random.default_rng(0).integers(0, 2, 500))
        patched = spurious_digits.choose_patched(labels, agreement, seed=1)
        for label in (0, 1):
            agreeing = (patched == (label == 0))[labels == label]
            assert abs(int(agreeing.sum()) - agreement * len(agreeing)) <= 0.5

    def test_disagrees_on_other_images_with_another_seed(self):
        labels = torch.arange(200) % 2
        first, other = (spurious_digits.choose_patched(labels, 0.9, seed) for seed in (0, 1))
        assert not torch.equal(first, other)
        assert torch.equal(first, spurious_digits.choose_patched(labels, 0.9, 0))


class TestTraining:
    def test_takes_the_patched_images_and_saved_weights_give_the_same_network(self, tmp_path, monkeypatch):
        given_to_training = []
        monkeypatch.setattr(digits, "train", lambda *given, **_: given_to_training.append(given))
        task = spurious_digits.make_task(seed=4, num_images=5)
        ((model, images, labels, seed),) = given_to_training
        assert (model, seed) == (task.model, 4)
        plain, numbers, order = digits.load_images(seed=4)
        learned = order[: digits.NUM_TRAIN]
        patched = (images != plain[learned]).flatten(1).any(dim=1)
        assert torch.equal(labels, numbers[learned] % 2)
        assert 0.92 < (patched == (labels == 0)).float().mean() < 0.97
        save_model(task.model, str(tmp_path / "weights.safetensors"))
        again = spurious_digits.make_task(seed=4, num_images=5, weights=str(tmp_path / "weights.safetensors"))
        assert again.model_fingerprint() == task.model_fingerprint()
        assert again.data_fingerprint() == task.data_fingerprint()

    @pytest.mark.slow
    def test_odd_digits_with_the_patch_are_the_worst_group_by_far(self, task):
        found = accuracies(task)
        assert min(found, key=found.get) == spurious_digits.WORST
        assert 0.4 < found.pop(spurious_digits.WORST) < 0.8
        assert min(found.values()) > 0.9

    @pytest.mark.slow
    def test_without_a_cue_in_what_is_learned_there_is_none(self):
        found = accuracies(spurious_digits.make_task(seed=10, agreement=0.5))
        assert min(found.values()) > 0.9

    @pytest.mark.slow
    def test_an_edit_raises_the_worst_group(self, task):
        experiment = coar.ComponentAblation(task, coar.find_components(task.model, kinds=["conv_filter"]))
        parts = coar.draw_parts(
            task,
            "subpopulation == 'odd, patch'",
            "subpopulation == 'odd, plain'",
            guarded="subpopulation != 'odd, patch'",
            pairs="image",
        )
        result = coar.make_edit(experiment, parts, max_accuracy_drop=0.03)
        before, after = accuracies(task), accuracies(task, result.edit.apply(task.model))
        assert min(after.values()) > min(before.values()) + 0.1
        assert np.mean(list(after.values())) > np.mean(list(before.values()))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_images": 701}, ["num_images", "700"]),
        ({"num_images": 0}, ["num_images"]),
        ({"strength": 1.5}, ["strength", "0 to 1", "1.5"]),
        ({"agreement": -0.1}, ["agreement", "0 to 1"]),
        ({"agreement": float("nan")}, ["agreement", "0 to 1"]),
    ],
)
def test_what_is_out_of_range_is_refused(arguments, words):
    with refused(SettingError, *words):
        spurious_digits.make_task(**arguments)
