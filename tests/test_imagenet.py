"""ImageNet: folders of JPEG files, local checkpoints, torchvision's own transforms as the reference."""

import sys
import urllib.error

import numpy as np
import pytest
import torch

import coar
from coar.errors import MissingDependencyError, SettingError, TaskError
from coar.tasks import image_folders, imagenet
from coar.testing import check_components, check_experiment
from tests.refused import refused

torchvision = pytest.importorskip("torchvision", reason=coar.errors.install_hint("vision"))
PIL_Image = pytest.importorskip("PIL.Image", reason=coar.errors.install_hint("vision"))

CLASSES = ["n01", "n02", "n03", "n10"]
PER_CLASS = 5


def write_images(folder, classes=CLASSES, repeat_names=False):
    """JPEG files of several shapes; one of them is grey."""
    random = np.random.default_rng(0)
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(PER_CLASS):
            shape = (40 + 7 * i, 60 - 5 * i) if (number, i) == (1, 2) else (40 + 7 * i, 60 - 5 * i, 3)
            image = PIL_Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8))
            image.save(folder / name / f"image_{i if repeat_names else 10 * number + i:03}.JPEG")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """As ImageNet is laid out: the images are under `val`."""
    found = tmp_path_factory.mktemp("imagenet")
    write_images(found / "val")
    (found / "val" / "n01" / "readme.txt").write_text("not an image")
    return str(found)


@pytest.fixture(scope="module", params=["resnet50", "vit_b_16"])
def task(request, folder):
    return imagenet.make_task(request.param, data=folder, small=True, num_classes=4)


class TestFolder:
    def test_examples_are_the_sorted_files_of_the_sorted_folders(self, task):
        assert len(task) == 20
        assert task.metadata["label"].tolist() == [i // PER_CLASS for i in range(20)]
        assert task.metadata["class"].tolist() == [CLASSES[i // PER_CLASS] for i in range(20)]
        names = [f"image_{10 * (i // PER_CLASS) + i % PER_CLASS:03}.JPEG" for i in range(20)]
        assert task.example_ids() == names

    def test_may_be_the_folder_of_classes_itself(self, folder):
        task = imagenet.make_task(data=f"{folder}/val", small=True, num_classes=4)
        assert len(task) == 20

    def test_files_of_one_name_are_told_apart_by_their_folder(self, tmp_path):
        write_images(tmp_path, repeat_names=True)
        task = imagenet.make_task(data=str(tmp_path), small=True, num_classes=4)
        assert task.example_ids()[:2] == ["n01/image_000.JPEG", "n01/image_001.JPEG"]
        assert len(set(task.example_ids())) == 20

    def test_every_second_image(self, folder, task):
        some = imagenet.make_task(data=folder, small=True, num_classes=4, stride=2)
        assert some.example_ids() == task.example_ids()[::2]
        assert some.metadata["label"].tolist() == task.metadata["label"].tolist()[::2]

    def test_a_number_of_images_is_spread_over_the_classes(self, folder, task):
        some = imagenet.make_task(data=folder, small=True, num_classes=4, num_examples=4)
        assert some.example_ids() == task.example_ids()[::5]
        half = imagenet.make_task(data=folder, small=True, num_classes=4, num_examples=5, stride=2)
        assert half.example_ids() == task.example_ids()[::4]

    def test_an_image_can_be_drawn(self, task):
        axes = pytest.importorskip("matplotlib.figure").Figure().add_subplot()
        task.show(task.dataset[19], axes)
        assert axes.get_title() == "n10"
        assert axes.images[0].get_array().shape == (32, 32, 3)


class TestPixelsAndMargins:
    @pytest.mark.parametrize("network", ["resnet50", "vit_b_16"])
    @pytest.mark.parametrize("small", [True, False])
    def test_pixels_are_those_of_the_weights_transforms(self, folder, network, small):
        preset = imagenet._preset(network, small)
        images = imagenet._validation(folder, network, 4, preset)
        for index in (0, 7, 19):  # 7 is the grey one
            with PIL_Image.open(images.sources[index]) as image:
                expected = preset(image.convert("RGB"))
            found = image_folders.normalised([images[index]], preset.mean, preset.std)[0][0]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)

    def test_the_full_preset_is_224_pixels_of_a_side(self):
        assert [imagenet._preset(name, False).crop_size for name in imagenet.WEIGHTS] == [[224], [224]]

    def test_margins_are_the_loop_over_classes(self, task):
        function = task.outputs["margin"]
        with torch.no_grad():
            found = function(task.model, task.batch(range(20))).tolist()
            for index in range(20):
                pixels, label = task.batch([index])
                logits = task.model(pixels)[0].tolist()
                others = [value for number, value in enumerate(logits) if number != int(label)]
                assert found[index] == pytest.approx(logits[int(label)] - max(others), abs=1e-4)
        assert np.std(found) > 0.01  # a network that tells images apart


class TestCache:
    @pytest.fixture
    def make(self, folder, tmp_path):
        arguments = {"data": folder, "small": True, "num_classes": 4, "cache": str(tmp_path / "cache")}
        return lambda **more: imagenet.make_task(**(arguments | more))

    def test_changes_no_pixel(self, make):
        plain, cached = make(cache=None), make()
        assert plain.data_fingerprint() == cached.data_fingerprint() == make().data_fingerprint()

    def test_spares_decoding(self, make, monkeypatch):
        make()
        monkeypatch.setattr(image_folders.Images, "_write", lambda *_: pytest.fail("written again"))
        monkeypatch.setattr(imagenet, "crop", lambda *_: pytest.fail("decoded again"))
        pixels, _ = make().batch(range(20))
        assert pixels.shape == (20, 3, 32, 32)

    def test_other_images_are_another_file(self, make, tmp_path):
        make()
        make(stride=2)
        make(network="vit_b_16")  # its transforms might differ
        assert len(list((tmp_path / "cache").iterdir())) == 3

    def test_a_file_that_has_changed_is_noticed(self, make, tmp_path):
        write_images(tmp_path / "own")
        first = make(data=str(tmp_path / "own"))
        PIL_Image.new("RGB", (90, 90), "red").save(tmp_path / "own" / "n01" / "image_000.JPEG")
        assert make(data=str(tmp_path / "own")).data_fingerprint() != first.data_fingerprint()


class TestFullNetworks:
    @pytest.mark.slow
    @pytest.mark.parametrize("ending", ["pth", "safetensors"])
    def test_a_checkpoint_is_loaded_without_a_download(self, folder, tmp_path, ending):
        torch.manual_seed(1)
        network = torchvision.models.resnet50(num_classes=4).eval()
        path = tmp_path / f"weights.{ending}"
        if ending == "pth":
            torch.save(network.state_dict(), path)
        else:
            pytest.importorskip("safetensors.torch").save_file(network.state_dict(), path)
        task = imagenet.make_task(data=folder, num_classes=4, checkpoint=str(path), num_examples=2)
        with torch.no_grad():
            pixels, _ = task.batch([0, 1])
            assert pixels.shape == (2, 3, 224, 224)
            assert torch.equal(task.model(pixels), network(pixels))
        assert len(coar.find_components(task.model, published="resnet50")) == 22_720

    def test_classes_of_all_thousand_folders_have_their_names(self, tmp_path, monkeypatch):
        for number in range(1000):
            (tmp_path / f"n{number:08}").mkdir()
            PIL_Image.new("RGB", (8, 8)).save(tmp_path / f"n{number:08}" / f"{number}.jpg")
        monkeypatch.setattr(imagenet, "_trained", lambda *_: torch.nn.Linear(1, 1))
        task = imagenet.make_task("vit_b_16", data=str(tmp_path), stride=10)
        assert len(task) == 100
        assert task.metadata["class"][0] == "tench"
        assert task.metadata["label"].tolist() == list(range(0, 1000, 10))

    def test_no_download_says_which_file_to_fetch(self, monkeypatch):
        def no_internet(*_, **__):
            raise urllib.error.URLError("no internet")

        monkeypatch.setattr(torchvision.models, "get_model", no_internet)
        monkeypatch.setattr(imagenet, "_validation", lambda *_: image_folders.sample_images())
        with refused(TaskError, "resnet50", "https://download.pytorch.org", "no internet", "checkpoint="):
            imagenet.make_task()

    def test_other_classes_need_other_weights(self, folder):
        with refused(SettingError, "num_classes=1000", "4", "checkpoint="):
            imagenet.make_task(data=folder, num_classes=4)

    def test_a_checkpoint_of_another_network_is_refused(self, tmp_path):
        path = tmp_path / "other.pth"
        torch.save(torch.nn.Linear(2, 2).state_dict(), path)
        with refused(TaskError, "other.pth", "state dict of this ResNet", "conv1.weight"):
            imagenet.load_checkpoint(imagenet.small_network("resnet50", 4), str(path))
        with refused(TaskError, "nowhere.safetensors"):
            imagenet.load_checkpoint(imagenet.small_network("resnet50", 4), "nowhere.safetensors")


class TestSmall:
    @pytest.mark.parametrize(("network", "count"), [("resnet50", 1984), ("vit_b_16", 448)])
    def test_needs_no_files_and_keeps_the_contract(self, network, count):
        task = imagenet.make_task(network, small=True, num_examples=6)
        components = coar.find_components(task.model, published=network)
        assert len(components) == count
        check_components(task.model, components, task.batch(range(3))[0])
        check_experiment(coar.ComponentAblation(task, components))

    @pytest.mark.parametrize("network", ["resnet50", "vit_b_16"])
    def test_is_the_same_every_time_and_leaves_the_global_generator_alone(self, network):
        before = torch.get_rng_state()
        first, second = (imagenet.make_task(network, small=True, num_examples=4) for _ in range(2))
        assert torch.equal(torch.get_rng_state(), before)
        assert first.model_fingerprint() == second.model_fingerprint()
        assert first.data_fingerprint() == second.data_fingerprint()

    def test_makes_images_up_where_the_sample_is_missing(self, monkeypatch):
        monkeypatch.setattr(image_folders, "places", list)
        task = imagenet.make_task(small=True)
        assert len(task) == image_folders.MADE_UP
        assert set(task.metadata["class"]) == set(image_folders.CLASSES)
        pixels, _ = task.batch(range(50))
        assert len({image.sum().item() for image in pixels}) == 50

    def test_a_study_runs_from_its_recipe(self, tmp_path):
        task = imagenet.make_task("vit_b_16", small=True, num_examples=5)
        experiment = coar.ComponentAblation(task, coar.find_components(task.model, published="vit_b_16"))
        coar.Study.create(tmp_path / "s", experiment, coar.Bernoulli(ablation_fraction=0.05), 4).run()
        study = coar.Study.open(tmp_path / "s")
        assert study.outputs["margin"].shape == (4, 5)
        assert study.experiment.fingerprint() == experiment.fingerprint()


class TestRefusals:
    def test_an_unknown_network(self):
        with refused(SettingError, "resnet50 or vit_b_16", "'alexnet'"):
            imagenet.make_task("alexnet")

    def test_another_number_of_classes(self, folder):
        with refused(TaskError, "another number of classes", "10", "4: n01, n02", "num_classes="):
            imagenet.make_task(data=folder, small=True)

    def test_a_folder_that_is_not_there(self, tmp_path):
        with refused(TaskError, "missing", "nowhere", "data=", "small=True"):
            imagenet.make_task(data=str(tmp_path / "nowhere"), small=True)

    def test_no_folder_where_it_is_looked_for(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(imagenet, "_trained", lambda *_: torch.nn.Linear(1, 1))
        monkeypatch.setattr(imagenet, "places", lambda: [tmp_path / "data"])
        with refused(TaskError, "missing", "data/imagenet", "image-net.org"):
            imagenet.make_task()

    def test_a_class_without_images(self, tmp_path):
        write_images(tmp_path)
        (tmp_path / "n99").mkdir()
        with refused(TaskError, "not a folder of images", "n99"):
            imagenet.make_task(data=str(tmp_path), small=True, num_classes=5)

    @pytest.mark.parametrize(
        ("setting", "value", "allowed"),
        [
            ("stride", 0, "at least 1"),
            ("num_examples", 21, "1 to 20"),
            ("num_examples", 0, "1 to 20"),
        ],
    )
    def test_numbers_out_of_range(self, folder, setting, value, allowed):
        with refused(SettingError, setting, allowed, str(value)):
            imagenet.make_task(data=folder, small=True, num_classes=4, **{setting: value})

    def test_a_missing_library_is_named_with_the_command_that_installs_it(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "torchvision.models", None)
        with refused(MissingDependencyError, "torchvision", coar.errors.install_hint("vision")):
            imagenet.make_task(small=True)
