"""Waterbirds and CelebA: small folders of the published form, read line by line as a loop would."""

import csv
import json
from collections import Counter

import numpy as np
import pytest
import torch

import coar
from coar.errors import SettingError, TaskError
from coar.recipes import import_object
from coar.tasks import group_images, group_tables
from tests.refused import refused

torchvision = pytest.importorskip("torchvision", reason=coar.errors.install_hint("vision"))
PIL_Image = pytest.importorskip("PIL.Image", reason=coar.errors.install_hint("vision"))

COLUMNS = ["img_id", "img_filename", "y", "split", "place", "place_filename"]
FACES, ATTRIBUTES = 12, ["5_o_Clock_Shadow", "Blond_Hair", "Eyeglasses", "Male"]


def write_image(path, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (40 + seed % 5, 60, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL_Image.fromarray(pixels).save(path)


def bird_lines():
    """Every label, place and split, twice; not sorted by any of them."""
    groups = [(y, place, split) for split in range(3) for place in range(2) for y in range(2)] * 2
    for number, (y, place, split) in enumerate(groups, start=1):
        name = f"{number:03}.A_{'gull' if y else 'wren'}/A_{number:04}.jpg"
        yield [number, name, y, split, place, f"/o/ocean/{number}.jpg"]


def write_birds(folder, lines=None, columns=COLUMNS):
    lines = list(bird_lines()) if lines is None else lines
    with (folder / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([columns, *lines])
    return folder


def write_faces(folder, count=FACES, lines=None, partition=None):
    """As published: names of attributes padded by spaces, 1 and -1."""
    random = np.random.default_rng(0)
    names = [f"{number:06}.jpg" for number in range(1, FACES + 1)]
    values = random.choice([-1, 1], (FACES, len(ATTRIBUTES)))
    values[:4, 1], values[:4, 3] = [-1, -1, 1, 1], [-1, 1, -1, 1]  # every group there is
    if lines is None:
        lines = [f"{name}  {'  '.join(map(str, row))}" for name, row in zip(names, values, strict=True)]
    if partition is None:
        partition = [f"{name} {i % 3}" for i, name in enumerate(names)]
    text = "\n".join([str(count), " ".join(ATTRIBUTES), *lines, ""])
    (folder / "list_attr_celeba.txt").write_text(text)
    (folder / "list_eval_partition.txt").write_text("\n".join([*partition, ""]))
    return dict(zip(names, values, strict=True))


@pytest.fixture(scope="module")
def birds(tmp_path_factory):
    folder = write_birds(tmp_path_factory.mktemp("waterbirds"))
    for number, name, *_ in bird_lines():
        write_image(folder / name, number)
    return folder


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    folder = tmp_path_factory.mktemp("celeba")
    for number, name in enumerate(write_faces(folder)):
        write_image(folder / "img_align_celeba" / name, number)
    return folder


@pytest.fixture(scope="module")
def task(birds):
    return group_images.make_waterbirds_task(str(birds), small=True)


class TestWaterbirds:
    def test_the_test_part_in_the_order_of_its_table(self, task):
        expected = [line for line in bird_lines() if line[3] == 2]
        assert task.example_ids() == [line[1] for line in expected]
        assert task.metadata["label"].tolist() == [line[2] for line in expected]
        assert task.metadata["class"].tolist() == [("landbird", "waterbird")[line[2]] for line in expected]
        assert task.metadata["place"].tolist() == [("land", "water")[line[4]] for line in expected]
        assert set(task.metadata["split"]) == {"test"}

    def test_a_subpopulation_is_label_and_place(self, task):
        groups = [f"{kind} on {place}" for kind in ("landbird", "waterbird") for place in ("land", "water")]
        assert Counter(task.metadata["subpopulation"]) == dict.fromkeys(groups, 2)
        for kind, place, group in task.metadata[["class", "place", "subpopulation"]].to_numpy().tolist():
            assert group == f"{kind} on {place}"

    def test_several_splits_and_some_of_their_images(self, birds):
        make = group_images.make_waterbirds_task
        both = make(str(birds), small=True, splits=["val", "test"])
        assert Counter(both.metadata["split"]) == {"val": 8, "test": 8}
        some = make(str(birds), small=True, splits=["val", "test"], stride=2, num_examples=4)
        assert some.example_ids() == both.example_ids()[::4]
        assert some.metadata["subpopulation"].tolist() == both.metadata["subpopulation"].tolist()[::4]

    def test_pixels_and_labels_are_those_of_the_files(self, birds, task):
        weights = torchvision.models.ResNet50_Weights.IMAGENET1K_V1
        whole = weights.transforms(crop_size=32, resize_size=32)
        pixels, labels = task.batch(range(len(task)))
        for index, name in enumerate(task.example_ids()):
            with PIL_Image.open(birds / name) as image:
                torch.testing.assert_close(pixels[index], whole(image.convert("RGB")), atol=1e-6, rtol=0)
        assert labels.tolist() == task.metadata["label"].tolist()

    def test_decoded_images_are_kept_and_the_same(self, birds, task, tmp_path):
        kept = [
            group_images.make_waterbirds_task(str(birds), small=True, cache=str(tmp_path)) for _ in range(2)
        ]
        assert len(list(tmp_path.iterdir())) == 1
        assert {found.data_fingerprint() for found in kept} == {task.data_fingerprint()}

    @pytest.mark.parametrize("ending", ["pt", "safetensors"])
    def test_the_network_is_the_users(self, birds, tmp_path, ending):
        torch.manual_seed(1)
        network = torchvision.models.resnet18(num_classes=2).eval()
        path = tmp_path / f"birds.{ending}"
        save = torch.save if ending == "pt" else pytest.importorskip("safetensors.torch").save_file
        save(network.state_dict(), str(path))
        task = group_images.make_waterbirds_task(str(birds), str(path), network="resnet18", num_examples=2)
        pixels, _ = task.batch([0, 1])
        assert pixels.shape == (2, 3, 224, 224)
        with torch.no_grad():
            assert torch.equal(task.model(pixels), network(pixels))

    def test_its_recipe_makes_it_again(self, task):
        recipe = json.loads(json.dumps({"factory": task.recipe.factory, "args": task.recipe.args}))
        again = import_object(recipe["factory"])(**recipe["args"])
        assert again.data_fingerprint() == task.data_fingerprint()
        assert again.model_fingerprint() == task.model_fingerprint()

    def test_an_edit_can_be_drawn_from_its_groups(self, birds):
        task = group_images.make_waterbirds_task(str(birds), small=True, splits=["train", "val", "test"])
        parts = coar.draw_parts(
            task,
            "subpopulation == 'waterbird on land'",
            "subpopulation == 'waterbird on water'",
            guarded="subpopulation != 'waterbird on land'",
            num_targets=2,
            num_references=3,
        )
        groups = task.metadata["subpopulation"].to_numpy()
        assert set(groups[parts.targets]) == set(groups[parts.target_report]) == {"waterbird on land"}
        guarded = [*parts.holdout, *parts.report]
        assert set(groups[guarded]) == set(groups) - {"waterbird on land"}
        assert len(guarded) == 18 - 3


class TestCelebA:
    def test_labels_and_groups_are_the_attributes_signs(self, faces, tmp_path):
        values = write_faces(tmp_path)
        task = group_images.make_celeba_task(str(faces), small=True, splits=["train", "val", "test"])
        assert task.example_ids() == list(values)
        for name, label, male, group in task.metadata[["id", "label", "male", "subpopulation"]].to_numpy():
            signs = values[name]
            assert label == (signs[1] == 1)
            assert male == ("Male" if signs[3] == 1 else "not Male")
            blond = "Blond_Hair" if signs[1] == 1 else "not Blond_Hair"
            assert group == f"{blond}, {male}"
        assert len(set(task.metadata["subpopulation"])) == 4

    def test_the_test_part(self, faces):
        task = group_images.make_celeba_task(str(faces), small=True)
        assert task.example_ids() == [f"{number:06}.jpg" for number in range(3, FACES + 1, 3)]

    def test_other_attributes(self, faces, tmp_path):
        values = write_faces(tmp_path)
        every = ["train", "val", "test"]
        task = group_images.make_celeba_task(
            str(faces), small=True, splits=every, label="Eyeglasses", group="5_o_Clock_Shadow"
        )
        assert task.metadata["label"].tolist() == [int(signs[2] == 1) for signs in values.values()]
        assert set(task.metadata["5_o_clock_shadow"]) <= {"5_o_Clock_Shadow", "not 5_o_Clock_Shadow"}

    @pytest.mark.parametrize("name", ["label", "group"])
    def test_an_unknown_attribute(self, faces, name):
        with refused(SettingError, "'Blonde'", "5_o_Clock_Shadow, Blond_Hair"):
            group_images.make_celeba_task(str(faces), small=True, **{name: "Blonde"})


class TestRefusals:
    def test_no_folder_and_no_table(self, tmp_path):
        with refused(TaskError, "metadata.csv is missing", "no such folder", "data="):
            group_images.make_waterbirds_task(str(tmp_path / "nowhere"), small=True)
        with refused(TaskError, "metadata.csv is missing", "a folder without it"):
            group_images.make_waterbirds_task(str(tmp_path), small=True)
        with refused(TaskError, "list_attr_celeba.txt is missing"):
            group_images.make_celeba_task(str(tmp_path), small=True)
        write_faces(tmp_path)
        (tmp_path / "list_eval_partition.txt").unlink()
        with refused(TaskError, "list_eval_partition.txt is missing"):
            group_images.make_celeba_task(str(tmp_path), small=True)

    def test_an_image_of_the_table_is_missing(self, tmp_path):
        write_birds(tmp_path)
        with refused(TaskError, "the image A_0009.jpg is missing", "unpack"):  # the first of the test part
            group_images.make_waterbirds_task(str(tmp_path), small=True)

    def test_a_file_that_is_no_image(self, tmp_path):
        lines = [line for line in bird_lines() if line[3] == 2][:1]
        write_birds(tmp_path, lines)
        (tmp_path / lines[0][1]).parent.mkdir()
        (tmp_path / lines[0][1]).write_text("a web page that says 404")
        task = group_images.make_waterbirds_task(str(tmp_path), small=True)
        with refused(TaskError, "cannot read the image", lines[0][1], "UnidentifiedImageError"):
            task.batch([0])

    @pytest.mark.parametrize(
        ("columns", "entry", "words"),
        [
            (["img_id", "img_filename", "label", "split", "place"], None, ["line 1,", "no y"]),
            (COLUMNS, (2, 2), ["line 2,", "y: 0, 1", "'2'"]),
            (COLUMNS, (3, 3), ["line 2,", "split: 0, 1, 2", "'3'"]),
            (COLUMNS, (4, "water"), ["line 2,", "place: 0, 1", "'water'"]),
        ],
    )
    def test_a_table_of_birds_that_is_malformed(self, tmp_path, columns, entry, words):
        lines = list(bird_lines())
        if entry:
            lines[0][entry[0]] = entry[1]
        write_birds(tmp_path, lines, columns)
        with refused(TaskError, "metadata.csv", "published form", *words):
            group_tables.read_waterbirds(tmp_path)

    def test_a_table_of_birds_that_ends_within_a_line(self, tmp_path):
        write_birds(tmp_path, [[1, "a.jpg", 0, 2]])
        with refused(TaskError, "line 2,", "place", "None"):
            group_tables.read_waterbirds(tmp_path)

    @pytest.mark.parametrize(
        ("given", "words"),
        [
            ({"count": 13}, ["line 1,", "12, the number of lines", "13"]),
            ({"count": 1, "lines": ["000001.jpg 1 -1 1"]}, ["line 3,", "4 times 1 or -1"]),
            ({"count": 1, "lines": ["000001.jpg 1 0 1 -1"]}, ["line 3,", "4 times 1 or -1"]),
            ({"count": 1, "lines": ["7.jpg 1 1 1 -1"]}, ["list_eval_partition.txt", "a line for 7.jpg"]),
            ({"partition": ["000001.jpg 3"]}, ["list_eval_partition.txt, line 1,", "0, 1, 2", "'3'"]),
            ({"partition": ["000001.jpg"]}, ["list_eval_partition.txt, line 1,", "a file name and"]),
            ({"partition": []}, ["list_eval_partition.txt", "lines", "nothing"]),
        ],
    )
    def test_lists_of_faces_that_are_malformed(self, tmp_path, given, words):
        write_faces(tmp_path, **given)
        with refused(TaskError, "published form", *words):
            group_tables.read_celeba(tmp_path, "Blond_Hair", "Male")

    def test_an_empty_list_of_faces(self, tmp_path):
        write_faces(tmp_path)
        (tmp_path / "list_attr_celeba.txt").write_text("")
        with refused(TaskError, "list_attr_celeba.txt", "lines", "nothing"):
            group_tables.read_celeba(tmp_path, "Blond_Hair", "Male")

    @pytest.mark.parametrize("splits", [["testing"], [], "test"])
    def test_unknown_splits(self, birds, splits):
        with refused(SettingError, "unknown split", "train, val, test"):
            group_images.make_waterbirds_task(str(birds), small=True, splits=splits)

    def test_a_split_without_images(self, tmp_path):
        write_birds(tmp_path, [line for line in bird_lines() if line[3] != 1])
        with refused(TaskError, "images of val", "16 images, all of other splits"):
            group_images.make_waterbirds_task(str(tmp_path), small=True, splits=["val"])

    def test_no_network_and_another_network(self, birds, tmp_path):
        with refused(SettingError, "checkpoint=", "resnet50 with two outputs", "small=True"):
            group_images.make_waterbirds_task(str(birds))
        with refused(SettingError, "unknown network", "resnet18, resnet34"):
            group_images.make_waterbirds_task(str(birds), network="vgg11")
        torch.save(torchvision.models.resnet18(num_classes=1000).state_dict(), tmp_path / "imagenet.pt")
        with refused(TaskError, "imagenet.pt", "a state dict of this ResNet", "size mismatch"):
            group_images.make_waterbirds_task(str(birds), str(tmp_path / "imagenet.pt"), network="resnet18")
