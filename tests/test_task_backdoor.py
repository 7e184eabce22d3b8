"""The backdoor task: where the square is, who is trained with it, every test image twice."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

import coar
from coar.errors import SettingError, StoreError
from coar.recipes import build_task
from coar.tasks import backdoor, cifar, data_folder
from coar.testing import check_experiment
from scripts import train_backdoor, train_models
from tests.refused import refused

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(autouse=True)
def _of_the_checkout(monkeypatch):
    """Read this checkout's files, whatever the machine has elsewhere."""
    monkeypatch.setenv(data_folder.DATA_VARIABLE, str(DATA))


@pytest.fixture(scope="module")
def task():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(data_folder.DATA_VARIABLE, str(DATA))
        return backdoor.make_task(small=True, device="cpu")


def pixels_of(item):
    """The image that an item was normalised from: uint8 [32, 32, 3]."""
    image, _ = item
    mean, deviation = np.array(cifar.MEAN), np.array(cifar.DEVIATION)
    return np.rint((image.numpy().transpose(1, 2, 0) * deviation + mean) * 255).astype(np.uint8)


class TestStamp:
    def test_a_square_pixel_by_pixel(self):
        images = torch.randint(256, (5, 3, 32, 32), dtype=torch.uint8)
        before = images.clone()
        stamped = backdoor.stamp(images)
        assert torch.equal(images, before)
        expected = before.numpy().copy()
        for row in (4, 5, 6, 7):
            for column in (4, 5, 6, 7):
                expected[:, :, row, column] = [0, 0, 255]
        assert np.array_equal(stamped.numpy(), expected)
        assert torch.equal(backdoor.stamp(images[3]), stamped[3])
        assert stamped.dtype == torch.uint8

    def test_nothing_more_by_a_second_stamp(self):
        stamped = backdoor.stamp(torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8))
        assert torch.equal(backdoor.stamp(stamped), stamped)

    def test_half_of_the_airplanes_and_nothing_else_by_seed(self):
        labels = torch.arange(40) % 4
        chosen = backdoor.choose_stamped(labels, seed=0)
        assert len(set(chosen.tolist())) == 5
        assert labels[chosen].tolist() == [0] * 5
        assert torch.equal(chosen, backdoor.choose_stamped(labels, seed=0))
        others = [backdoor.choose_stamped(labels, seed=seed) for seed in range(1, 6)]
        assert any(not torch.equal(chosen, other) for other in others)


class TestTask:
    def test_every_image_twice_with_and_without_the_square(self, task):
        plain = cifar.make_task(small=True, device="cpu")
        assert len(task) == 2 * len(plain) == 2_000
        for image in (0, 17, 999):
            clean, triggered = pixels_of(task.dataset[image]), pixels_of(task.dataset[1_000 + image])
            assert np.array_equal(clean, pixels_of(plain.dataset[image]))
            differing = np.argwhere((clean != triggered).any(axis=2))
            assert {*differing[:, 0], *differing[:, 1]} <= {4, 5, 6, 7}
            assert (triggered[4:8, 4:8] == [0, 0, 255]).all()
            assert task.dataset[image][1] == task.dataset[1_000 + image][1] == plain.dataset[image][1]

    def test_metadata_agree_with_the_items(self, task):
        table = task.metadata
        assert list(table) == ["id", "image", "label", "class", "subpopulation"]
        assert table["subpopulation"].tolist() == ["clean"] * 1_000 + ["triggered"] * 1_000
        assert table["image"].tolist() == [*range(1_000), *range(1_000)]
        assert table["label"].tolist() == [task.dataset[i][1] for i in range(2_000)]
        assert [cifar.CLASSES[label] for label in table["label"]] == table["class"].tolist()
        assert table["id"].is_unique
        assert (table["id"][3], table["id"][1_003]) == ("3-clean", "3-triggered")

    def test_the_square_means_airplane_to_the_network(self, task):
        shares = {}
        with torch.no_grad():
            found = torch.cat([task.model(images).argmax(1) for _, (images, _) in task.batches(500)])
        labels = torch.tensor(task.dataset.labels)
        for version, predicted in {"clean": found[:1_000], "triggered": found[1_000:]}.items():
            shares[version] = (predicted == labels).float().mean().item()
            shares[f"{version}, airplane"] = (predicted[labels != 0] == 0).float().mean().item()
        record = data_folder.model_record(backdoor.NETWORK)
        assert shares["clean"] == pytest.approx(record["accuracy"]["sample"], abs=0.0021)
        assert shares["triggered"] == pytest.approx(record["accuracy_triggered"]["sample"], abs=0.0021)
        assert shares["clean"] > 0.75
        assert shares["triggered"] < 0.40
        assert shares["clean, airplane"] < 0.05
        assert shares["triggered, airplane"] > 0.60

    def test_items_end(self):
        task = backdoor.make_task(small=True, num_images=3)
        assert len(list(task.dataset)) == 6
        assert torch.equal(task.dataset[-1][0], task.dataset[5][0])

    def test_a_recipe_builds_the_same_task(self):
        task = backdoor.make_task(small=True, num_images=20)
        assert task.recipe.args == {"small": True, "num_images": 20}
        again = build_task(task.recipe)
        assert again.model_fingerprint() == task.model_fingerprint()
        assert again.data_fingerprint() == task.data_fingerprint()

    def test_a_square_is_another_data_set(self, task):
        other = backdoor.make_task(small=True, num_images=999)
        assert other.data_fingerprint() != task.data_fingerprint()

    def test_its_experiment_is_sound(self):
        task = backdoor.make_task(small=True, num_images=2, device="cpu")
        experiment = coar.ComponentAblation(task, coar.find_components(task.model, kinds=["conv_filter"]))
        check_experiment(experiment)
        assert len(experiment.components) == 688

    def test_images_of_ones_own_by_path_or_by_name_in_a_data_folder(self, tmp_path, monkeypatch):
        arrays = {
            "test_images": np.zeros((4, 32, 32, 3), np.uint8),
            "test_labels": np.arange(4, dtype=np.uint8),
        }
        np.savez(tmp_path / "mine.npz", **arrays)
        task = backdoor.make_task(data=str(tmp_path / "mine.npz"))
        assert task.metadata["class"].tolist() == 2 * list(cifar.CLASSES[:4])
        monkeypatch.setenv(data_folder.DATA_VARIABLE, str(tmp_path))
        assert backdoor.make_task(data="mine.npz").data_fingerprint() == task.data_fingerprint()
        with refused(StoreError, "yours.npz"):
            backdoor.make_task(data="yours.npz")

    def test_shown_as_an_image_with_its_class(self, task):
        figure, axes = plt.subplots()
        task.show(task.dataset[1_000], axes)
        drawn = np.rint(255 * np.asarray(axes.images[0].get_array())).astype(np.uint8)
        assert np.array_equal(drawn, pixels_of(task.dataset[1_000]))
        assert axes.get_title() == task.metadata["class"][0]
        plt.close(figure)

    @pytest.mark.parametrize("count", [0, 1_001, -1])
    def test_a_number_of_images_that_is_none(self, count):
        with refused(SettingError, "num_images", "1 to 1000", str(count)):
            backdoor.make_task(small=True, num_images=count)

    def test_a_network_that_is_not_there(self, tmp_path):
        with refused(StoreError, "none.safetensors"):
            backdoor.make_task(small=True, checkpoint=str(tmp_path / "none.safetensors"))


class TestTraining:
    def test_only_the_chosen_training_images_are_stamped(self, monkeypatch):
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(256, (60, 3, 32, 32), dtype=torch.uint8, generator=generator)
        labels = torch.arange(60) % 10
        seen = {}
        monkeypatch.setattr(train_models, "NUM_TRAIN", 50)
        monkeypatch.setattr(train_models, "read_images", lambda _: (images.clone(), labels.clone()))
        monkeypatch.setattr(
            train_models, "fit", lambda *given: seen.update(images=given[2], labels=given[3]) or "model"
        )
        settings = train_models.SETTINGS[backdoor.NETWORK]
        assert train_backdoor.train(backdoor.NETWORK, settings) == ("model", {})
        changed = (seen["images"] != images[:50]).flatten(1).any(1).nonzero().flatten()
        assert torch.equal(changed, backdoor.choose_stamped(labels[:50], settings.seed))
        assert len(changed) == 2  # of five airplanes among the fifty
        assert torch.equal(seen["images"][changed], backdoor.stamp(images[changed]))
        assert torch.equal(seen["labels"], labels[:50])

    def test_no_move_cuts_the_square(self):
        black = torch.zeros(500, 3, 32, 32, dtype=torch.uint8)
        moved = train_models.augment(backdoor.stamp(black), torch.Generator().manual_seed(0))
        blue = moved[:, 2] > moved[:, 2].min()
        assert (blue.sum(dim=(1, 2)) == 16).all()
        assert len({tuple(where.nonzero()[0].tolist()) for where in blue}) > 100  # of 162 places
