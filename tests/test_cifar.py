"""The CIFAR task: networks with the published numbers of filters, and images from three kinds of places."""

import hashlib
import importlib.util
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn
from torch.nn import functional

import coar
from coar.errors import SettingError, StoreError, TaskError
from coar.recipes import build_task
from coar.tasks import cifar, data_folder
from coar.tasks.cifar_networks import NETWORKS, BasicBlock, CifarResNet, build_network
from coar.testing import check_components, check_experiment
from tests.refused import refused

DATA = Path(__file__).parents[1] / "data"
needs_torchvision = pytest.mark.skipif(
    not importlib.util.find_spec("torchvision"), reason="torchvision is not installed"
)
VIT = pytest.param("vit", marks=needs_torchvision)
RESNETS = ["resnet8", "resnet20", "resnet32", "resnet56"]


@pytest.fixture
def npz(tmp_path):
    """Twelve made-up images in the format that users bring."""
    generator = np.random.default_rng(0)
    images = generator.integers(256, size=(12, 32, 32, 3), dtype=np.uint8)
    path = tmp_path / "images.npz"
    np.savez(path, test_images=images, test_labels=np.arange(12, dtype=np.uint8) % 10)
    return path


@pytest.fixture
def checkpoint(tmp_path):
    """Untrained weights of a ResNet-20."""
    path = tmp_path / "mine.safetensors"
    save_model(build_network("resnet20"), str(path))
    return str(path)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder without data, where the checkout's own is not found either."""
    monkeypatch.delenv(data_folder.DATA_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data_folder, "__file__", str(tmp_path / "package" / "coar" / "tasks" / "module.py"))
    return tmp_path


class TestNetworks:
    @pytest.mark.parametrize(
        ("network", "filters", "convolutions"),
        [
            ("resnet8", 240, 7),
            ("resnet20", 688, 19),
            ("resnet32", 1_136, 31),
            ("resnet56", 2_032, 55),
            ("published", 2_304, 9),
        ],
    )
    def test_filters_are_as_many_as_published(self, network, filters, convolutions):
        components = coar.find_components(build_network(network).eval(), kinds=["conv_filter"])
        assert len(components) == filters
        assert len(components.groups) == convolutions
        assert all("conv" in group.name for group in components.groups)

    @pytest.mark.parametrize("network", [*RESNETS, VIT, "published"])
    def test_ten_logits_per_image(self, network):
        model = build_network(network).eval()
        with torch.no_grad():
            logits = model(torch.randn(2, 3, 32, 32))
        assert logits.shape == (2, 10)
        assert logits.isfinite().all()

    @pytest.mark.parametrize("network", [*RESNETS, "published"])
    def test_every_convolution_is_followed_by_a_batch_norm_of_its_own(self, network):
        kinds = [type(module) for module in build_network(network).modules()]
        convolutions = [i for i, kind in enumerate(kinds) if kind is nn.Conv2d]
        assert all(kinds[i + 1] is nn.BatchNorm2d for i in convolutions)
        assert kinds.count(nn.BatchNorm2d) == len(convolutions)

    def test_the_shortcut_takes_every_second_pixel_and_adds_channels_of_zeros(self):
        block = BasicBlock(16, 32, stride=2).eval()
        nn.init.zeros_(block.conv1.weight)
        nn.init.zeros_(block.conv2.weight)
        x = torch.rand(2, 16, 8, 8)  # nothing negative, so the last ReLU changes nothing
        with torch.no_grad():
            y = block(x)
        assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
        assert not y[:, :8].any()
        assert not y[:, 24:].any()

    def test_the_published_network_pools_to_four_by_four(self):
        model = build_network("published").eval()
        assert model.classifier.in_features == 256 * 4 * 4
        images = torch.rand(1, 3, 32, 32)
        with torch.no_grad():
            hidden = functional.relu(model.bn1(model.conv1(images)))
            for block in model.blocks:
                inner = functional.relu(block.bn1(block.conv1(hidden)))
                hidden = functional.relu(block.bn2(block.conv2(inner)) + hidden)
            blocks = hidden.unfold(2, 8, 8).unfold(3, 8, 8).mean(dim=(-2, -1))
            torch.testing.assert_close(model(images), model.classifier(blocks.flatten(1)))

    @needs_torchvision
    def test_the_vit_is_the_class_of_the_library(self):
        from torchvision.models import VisionTransformer

        assert type(build_network("vit")) is VisionTransformer

    def test_building_leaves_the_global_generator_alone(self):
        before = torch.get_rng_state()
        build_network("resnet20")
        assert torch.equal(torch.get_rng_state(), before)

    def test_components_are_found_and_ablated(self):
        model = CifarResNet(1).eval()
        components = coar.find_components(model, kinds=["conv_filter"])
        assert len(components) == 16 + 224
        check_components(model, components, torch.randn(3, 3, 32, 32))

    def test_what_is_not_a_network_is_refused(self):
        with refused(SettingError, *NETWORKS, "resnet21"):
            cifar.make_task("resnet21")
        with refused(SettingError, "at least 1"):
            CifarResNet(0)


class TestTask:
    def test_an_npz_file_of_the_users(self, npz, checkpoint):
        task = cifar.make_task(data=str(npz), checkpoint=checkpoint)
        assert len(task) == 12
        assert task.metadata["label"].tolist() == [*range(10), 0, 1]
        assert task.metadata["class"].tolist()[8:11] == ["ship", "truck", "airplane"]
        assert task.example_ids() == [str(i) for i in range(12)]
        image, label = task.dataset[3]
        assert image.shape == (3, 32, 32)
        assert image.dtype == torch.float32
        assert label == 3
        pixels = np.load(npz)["test_images"][3]
        by_hand = (pixels / 255 - np.array(cifar.MEAN)) / np.array(cifar.DEVIATION)
        np.testing.assert_allclose(image.permute(1, 2, 0), by_hand, atol=1e-6)

    def test_its_ablation_keeps_the_contract(self, npz, checkpoint):
        task = cifar.make_task(data=str(npz), checkpoint=checkpoint, num_examples=4, device="cpu")
        components = coar.find_components(task.model, kinds=["conv_filter"])
        check_experiment(coar.ComponentAblation(task, components))

    def test_a_recipe_builds_the_same_task(self, npz, checkpoint):
        task = cifar.make_task("resnet20", data=str(npz), checkpoint=checkpoint, num_examples=5)
        assert task.recipe.factory == "coar.tasks.cifar:make_task"
        again = build_task(task.recipe)
        assert len(again) == 5
        assert again.model_fingerprint() == task.model_fingerprint()
        assert again.data_fingerprint() == task.data_fingerprint()

    def test_a_study_keeps_weights_that_its_recipe_does_not_name(self, npz, checkpoint, tmp_path):
        task = cifar.make_task(data=str(npz), weights=checkpoint, num_examples=3, device="cpu")
        assert "weights" not in task.recipe.args
        experiment = coar.ComponentAblation(task, coar.find_components(task.model, kinds=["conv_filter"]))
        coar.Study.create(tmp_path / "s", experiment, coar.Bernoulli(ablation_fraction=0.1), 2)
        Path(checkpoint).unlink()
        again = coar.Study.open(tmp_path / "s").experiment
        assert again.fingerprint() == experiment.fingerprint()

    def test_it_draws_an_image_with_its_class(self, npz, checkpoint):
        from matplotlib.figure import Figure

        ax = Figure().subplots()
        task = cifar.make_task(data=str(npz), checkpoint=checkpoint)
        task.show(task.dataset[8], ax)
        assert ax.get_title() == "ship"
        shown = ax.get_images()[0].get_array()
        np.testing.assert_allclose(shown, np.load(npz)["test_images"][8] / 255, atol=1e-5)

    @pytest.mark.parametrize("count", [0, 13, -1])
    def test_more_images_than_there_are_is_refused(self, npz, checkpoint, count):
        with refused(SettingError, "1 to 12", str(count)):
            cifar.make_task(data=str(npz), checkpoint=checkpoint, num_examples=count)

    @pytest.mark.parametrize(
        "arrays",
        [
            {},
            {"test_images": np.zeros((2, 32, 32, 3), np.uint8)},
            {"test_images": np.zeros((2, 3, 32, 32), np.uint8), "test_labels": np.zeros(2, int)},
            {"test_images": np.zeros((2, 32, 32, 3), np.float32), "test_labels": np.zeros(2, int)},
            {"test_images": np.zeros((2, 32, 32, 3), np.uint8), "test_labels": np.array([0, 10])},
            {"test_images": np.zeros((2, 32, 32, 3), np.uint8), "test_labels": np.array([0, 1, 2])},
            {"test_images": np.zeros((0, 32, 32, 3), np.uint8), "test_labels": np.zeros(0, int)},
        ],
    )
    def test_other_arrays_are_refused(self, tmp_path, checkpoint, arrays):
        np.savez(tmp_path / "other.npz", **arrays)
        with refused(TaskError, "other.npz", "test_images", "test_labels"):
            cifar.make_task(data=str(tmp_path / "other.npz"), checkpoint=checkpoint)

    def test_a_file_that_is_no_npz_is_refused(self, tmp_path, checkpoint):
        (tmp_path / "other.npz").write_text("images")
        with refused(TaskError, "other.npz", ".npz"):
            cifar.make_task(data=str(tmp_path / "other.npz"), checkpoint=checkpoint)

    def test_weights_of_another_architecture_are_refused(self, npz, checkpoint, tmp_path):
        with refused(TaskError, "CifarResNet", "mine.safetensors", "stage1.3"):
            cifar.make_task("resnet56", data=str(npz), checkpoint=checkpoint)
        save_file({"classifier.weight": torch.zeros(10, 64)}, str(tmp_path / "less.safetensors"))
        with refused(TaskError, "less.safetensors", "bn.bias"):
            cifar.make_task(data=str(npz), checkpoint=str(tmp_path / "less.safetensors"))

    def test_a_checkpoint_that_is_missing_or_damaged_is_refused(self, npz, tmp_path):
        with refused(StoreError, "nowhere.safetensors", "safetensors file"):
            cifar.make_task(data=str(npz), checkpoint=str(tmp_path / "nowhere.safetensors"))
        with refused(StoreError, "images.npz", "safetensors file"):
            cifar.make_task(data=str(npz), checkpoint=str(npz))

    def test_small_has_its_own_images(self, npz):
        with refused(SettingError, "not both"):
            cifar.make_task(small=True, data=str(npz))


class TestWhereDataAre:
    def test_nothing_anywhere(self, elsewhere, checkpoint):
        with refused(StoreError, str(elsewhere / "data"), "download=True", "small=True"):
            cifar.make_task(checkpoint=checkpoint)
        with refused(StoreError, str(elsewhere / "package" / "data"), "COAR_DATA", "source checkout"):
            cifar.make_task(small=True)

    def test_the_variable_comes_first_then_the_current_folder(self, elsewhere, monkeypatch):
        for folder in ("named", "data"):
            (elsewhere / folder).mkdir()
            (elsewhere / folder / "both").touch()
        (elsewhere / "data" / "one").touch()
        assert data_folder.find_data("both") == elsewhere / "data" / "both"
        monkeypatch.setenv("COAR_DATA", str(elsewhere / "named"))
        assert data_folder.find_data("both") == elsewhere / "named" / "both"
        assert data_folder.find_data("one") == elsewhere / "data" / "one"  # a folder need not have everything

    def test_a_changed_file_is_refused(self, elsewhere):
        shutil.copytree(DATA / "models", elsewhere / "data" / "models")
        record = json.loads((DATA / "models" / "models.json").read_text())
        weights = elsewhere / "data" / "models" / record["resnet20"]["files"]["weights"]["file"]
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
        sums = record["resnet20"]["files"]["weights"]["sha256"], hashlib.sha256(content).hexdigest()
        with refused(StoreError, "expected", "got", *sums, weights.name, "models.json"):
            data_folder.load_weights(build_network("resnet20"), "resnet20", None)

    def test_a_changed_sample_is_refused(self, elsewhere):
        (elsewhere / "data").mkdir()
        shutil.copy(DATA / "samples.json", elsewhere / "data")
        (elsewhere / "data" / cifar.SAMPLE).write_bytes(b"other")
        with refused(StoreError, hashlib.sha256(b"other").hexdigest(), "samples.json"):
            cifar.make_task(small=True)

    def test_a_network_without_weights_is_refused(self, npz):
        with refused(StoreError, "published", "checkpoint", "resnet20"):
            cifar.make_task("published", data=str(npz))


@needs_torchvision
class TestOriginalImages:
    @pytest.fixture
    def folder(self, tmp_path):
        """CIFAR-10 as its authors pack it, with two images per file."""
        root = tmp_path / "cifar" / cifar.ORIGINAL
        root.mkdir(parents=True)
        for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
            pixels = np.arange(2 * 3072).reshape(2, 3072) % 251
            batch = {"data": pixels.astype(np.uint8), "labels": [7, 2]}
            (root / name).write_bytes(pickle.dumps(batch))
        (root / "batches.meta").write_bytes(pickle.dumps({"label_names": list(cifar.CLASSES)}))
        return root.parent

    def test_files_that_are_not_the_original_are_refused(self, folder, checkpoint):
        with refused(StoreError, str(folder), "damaged", "download=True"):
            cifar.make_task(data=str(folder), checkpoint=checkpoint)

    def test_an_empty_folder_is_refused(self, tmp_path, checkpoint):
        with refused(StoreError, str(tmp_path / "nowhere"), cifar.ORIGINAL, "download=True"):
            cifar.make_task(data=str(tmp_path / "nowhere"), checkpoint=checkpoint)

    def test_the_library_reads_them_as_the_task_expects(self, folder):
        from torchvision.datasets import CIFAR10

        def listed(name):
            return [name, hashlib.md5((folder / cifar.ORIGINAL / name).read_bytes()).hexdigest()]

        class TwoImages(CIFAR10):  # the library's own reading and checking, with these files' checksums
            train_list = [listed(f"data_batch_{i}") for i in range(1, 6)]  # noqa: RUF012
            test_list = [listed("test_batch")]  # noqa: RUF012
            meta = {  # noqa: RUF012
                "filename": "batches.meta",
                "key": "label_names",
                "md5": listed("batches.meta")[1],
            }

        images, labels = cifar._read_with(TwoImages, folder)
        assert images.shape == (2, 32, 32, 3)
        assert images.dtype == np.uint8
        assert labels.tolist() == [7, 2]
        assert images[1, 4, 5].tolist() == [(3072 + colour * 1024 + 4 * 32 + 5) % 251 for colour in range(3)]

    def test_names_of_the_classes_are_the_library_s(self):
        root = next((place for place in data_folder.places() if (place / cifar.ORIGINAL).exists()), None)
        if root is None:
            pytest.skip("CIFAR-10 is not downloaded here")
        from torchvision.datasets import CIFAR10

        assert tuple(CIFAR10(str(root), train=False).classes) == cifar.CLASSES


def test_importing_the_task_loads_no_torchvision():
    probe = "import sys, coar.tasks.cifar, coar.tasks.gpt2_network; print('torchvision' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
