"""CLIP zero-shot: loaded from a local folder, margins by hand, what the text tower may do, attacks."""

import json
import math
import sys

import numpy as np
import pytest
import torch

import coar
from coar.errors import MissingDependencyError, SettingError, TaskError
from coar.tasks import clip, image_folders
from coar.testing import check_components, check_experiment
from tests.refused import refused

transformers = pytest.importorskip("transformers", reason=coar.errors.install_hint("language"))
pytest.importorskip("torchvision", reason=coar.errors.install_hint("vision"))
PIL_Image = pytest.importorskip("PIL.Image", reason=coar.errors.install_hint("vision"))

CLASSES = ["black_cat", "dog", "fish"]
NAMES = ["black cat", "dog", "fish"]
TEMPLATES = ["a photo of a {}", "the {} there"]
PIXELS = 32


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A tiny CLIP with random weights and its processor, as `save_pretrained` writes them."""
    folder, vocabulary = tmp_path_factory.mktemp("clip"), tmp_path_factory.mktemp("vocabulary")
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "do", "dog</w>"]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    (vocabulary / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (vocabulary / "merges.txt").write_text("#version: 0.2\nd o\ndo g</w>\n")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(vocabulary)
    images = transformers.CLIPImageProcessor(size={"shortest_edge": PIXELS}, crop_size=PIXELS)
    transformers.CLIPProcessor(images, tokenizer).save_pretrained(folder)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1, "pad_token_id": len(tokens) - 1}
    text = tower | {"vocab_size": len(tokens), "max_position_embeddings": 32} | ends
    vision = tower | {"image_size": PIXELS, "patch_size": 8}
    torch.manual_seed(0)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    model = transformers.CLIPModel(config)
    model.logit_scale.data.fill_(math.log(clip.SCALE))  # as OpenAI's models have learned
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four images of each of three classes."""
    found, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name in CLASSES:
        (found / name).mkdir()
        for i in range(4):
            pixels = random.integers(0, 256, (250 + 10 * i, 300 - 20 * i, 3), dtype=np.uint8)
            PIL_Image.fromarray(pixels).save(found / name / f"{name}_{i}.png")
    return str(found)


@pytest.fixture(scope="module")
def make(folder, model_folder):
    arguments = {"data": folder, "model": model_folder, "templates": TEMPLATES}
    return lambda **more: clip.make_task(**(arguments | more))


@pytest.fixture(scope="module")
def task(make):
    return make()


@pytest.fixture(scope="module")
def whole(model_folder):
    """The model and its processor, as a user of transformers has them."""
    model = transformers.CLIPModel.from_pretrained(model_folder).eval()
    return model, transformers.CLIPProcessor.from_pretrained(model_folder)


def margins(task, model=None):
    with torch.no_grad():
        return task.outputs["zero_shot_margin"](model or task.model, task.batch(range(len(task))))


class TestMargin:
    def test_is_100_times_the_cosine_by_hand(self, task, whole):
        model, processor = whole
        found = margins(task).tolist()
        with torch.no_grad():
            classes = []
            for name in NAMES:
                total = torch.zeros(8)
                for template in TEMPLATES:
                    tokens = processor.tokenizer([template.format(name)], return_tensors="pt")
                    vector = model.text_projection(model.text_model(**tokens).pooler_output)[0]
                    total += vector / vector.norm()
                classes.append(total / total.norm())
            for index in range(12):
                image = image_folders.open_image(task.dataset.sources[index].source)
                pixels = processor(images=image, return_tensors="pt")["pixel_values"]
                vector = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)[0]
                logits = [100 * float(vector @ other) / float(vector.norm()) for other in classes]
                label = index // 4
                others = [value for number, value in enumerate(logits) if number != label]
                assert found[index] == pytest.approx(logits[label] - max(others), abs=1e-2)

    def test_is_that_of_clips_own_logits(self, make, whole):
        task = make(templates=[TEMPLATES[0]])
        model, processor = whole
        prompts = processor.tokenizer(
            [TEMPLATES[0].format(n) for n in NAMES], padding=True, return_tensors="pt"
        )
        pixels, labels = task.batch(range(12))
        batch = {"pixel_values": pixels, "labels": labels} | dict(prompts)
        with torch.no_grad():
            torch.testing.assert_close(
                margins(task), coar.outputs.zero_shot_margin(model, batch), atol=1e-3, rtol=1e-4
            )

    def test_pixels_are_those_of_the_processor(self, task, whole):
        _, processor = whole
        for index in (0, 5, 11):
            image = image_folders.open_image(task.dataset.sources[index].source)
            expected = processor(images=image, return_tensors="pt")["pixel_values"]
            torch.testing.assert_close(task.batch([index])[0], expected, atol=1e-5, rtol=0)

    def test_classes_may_be_called_otherwise(self, make):
        task = make(class_names=["panther", "wolf", "shark"])
        assert task.metadata["class"].tolist() == ["panther"] * 4 + ["wolf"] * 4 + ["shark"] * 4
        assert not torch.allclose(margins(task), margins(make()))

    def test_has_no_label_of_another_class(self, task):
        assert task.metadata["class"].tolist() == [name for name in NAMES for _ in range(4)]
        assert task.metadata["label"].tolist() == [0] * 4 + [1] * 4 + [2] * 4


class TestTextTower:
    def test_fixed_text_is_no_part_of_the_model(self, task):
        names = [name for name, _ in task.model.named_modules()]
        assert not [name for name in names if name.startswith("text")]
        assert task.model.classes.shape == (3, 8)
        assert not task.model.classes.requires_grad
        torch.testing.assert_close(task.model.classes.norm(dim=1), torch.ones(3))

    def test_of_the_intact_model_gives_the_same_outputs_either_way(self, make, task):
        torch.testing.assert_close(margins(make(text="ablated")), margins(task), atol=1e-3, rtol=1e-4)

    def test_ablations_reach_it_on_request(self, make):
        task = make(text="ablated")
        components = coar.find_components(task.model, kinds=["neuron"], include=["text_model*fc1"])
        assert len(components) == 2 * 32
        runner = coar.ComponentAblation(task, components).prepare(torch.device("cpu"))
        masks = np.ones((2, 64), dtype=bool)
        masks[1, 32:] = False
        untouched, ablated = runner(masks)["zero_shot_margin"]
        assert np.abs(untouched - ablated).max() > 1e-3
        edited = coar.gates.ablated_copy(task.model, components, masks[1])
        np.testing.assert_allclose(margins(task, edited), ablated, atol=1e-4)


class TestComponents:
    def test_are_those_of_the_vision_tower(self, task):
        components = coar.find_components(task.model, kinds=["neuron"])
        assert len(components) == 2 * (4 * 16 + 32 + 16)
        assert components.left_out == ("visual_projection",)
        check_components(task.model, components, task.batch(range(3))[0])

    def test_ablation_keeps_the_contract(self, make):
        task = make(num_examples=5)
        check_experiment(coar.ComponentAblation(task, coar.find_components(task.model, kinds=["neuron"])))

    def test_a_study_runs_from_its_recipe(self, make, tmp_path):
        task = make(num_examples=4, attack="both")
        experiment = coar.ComponentAblation(task, coar.find_components(task.model, kinds=["neuron"]))
        coar.Study.create(tmp_path / "s", experiment, coar.Bernoulli(ablation_fraction=0.05), 3).run()
        study = coar.Study.open(tmp_path / "s")
        assert study.outputs["zero_shot_margin"].shape == (3, 8)
        assert study.experiment.fingerprint() == experiment.fingerprint()


class TestAttack:
    def test_writes_the_name_of_a_wrong_class(self, make):
        task = make(attack="label")
        assert set(task.metadata["subpopulation"]) == {"attacked"}
        for own, written, name in zip(
            task.metadata["class"], task.metadata["written"], task.metadata["id"], strict=True
        ):
            assert written in NAMES
            assert written != own
            assert name.endswith(f"+{written}")

    def test_every_wrong_class_is_written(self, make):
        tables = [make(attack="label", seed=seed).metadata for seed in range(4)]
        pairs = {pair for table in tables for pair in zip(table["class"], table["written"], strict=True)}
        assert len(pairs) == 3 * 2

    def test_is_the_same_every_time_and_another_with_another_seed(self, make):
        first, again, other = (make(attack="label", seed=seed).data_fingerprint() for seed in (0, 0, 1))
        assert first == again != other

    def test_does_not_depend_on_how_many_images_are_taken(self, make):
        some, every = make(attack="label", num_examples=3), make(attack="label")
        assert some.example_ids() == every.example_ids()[::4]

    def test_both_has_all_clean_images_first(self, make, task):
        both = make(attack="both", num_examples=6)
        assert both.metadata["subpopulation"].tolist() == ["clean"] * 6 + ["attacked"] * 6
        assert both.metadata["label"].tolist() == 2 * task.metadata["label"].tolist()[::2]
        pixels, _ = both.batch(range(12))
        torch.testing.assert_close(pixels[:6], task.batch(range(0, 12, 2))[0], rtol=0, atol=0)
        assert (pixels[:6] != pixels[6:]).flatten(1).any(dim=1).all()

    @pytest.mark.parametrize("attack", ["none", "label", "both"])
    def test_the_image_without_what_is_written_has_a_name(self, make, attack):
        table, clean = make(attack=attack, num_examples=6).metadata, make(num_examples=6).metadata.id.tolist()
        assert table.image.tolist() == (2 if attack == "both" else 1) * clean
        names = [
            f"{image}+{word}" if word else image
            for image, word in zip(table.image, table.written, strict=True)
        ]
        assert table.id.tolist() == names

    @pytest.mark.parametrize("shape", [(300, 224), (224, 400)])
    @pytest.mark.parametrize("corner", [(0.0, 0.0), (0.999, 0.999), (0.5, 0.2)])
    @pytest.mark.parametrize("words", ["dog", "great white shark", "a very long name of some class " * 2])
    def test_is_a_card_with_letters_inside_the_central_square(self, shape, corner, words):
        image = PIL_Image.new("RGB", shape, (90, 120, 30))
        found = np.asarray(clip.write_on(image, clip.Picture(None, words, *corner)))
        changed = (found != np.asarray(image)).any(axis=2)
        rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
        side = min(shape)
        assert (shape[0] - side) // 2 <= columns[0]
        assert (shape[1] - side) // 2 <= rows[0]
        assert rows[-1] <= (shape[1] + side) // 2
        card = found[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(int).sum(axis=2)
        assert (card == 3 * 255).mean() > 0.4  # white
        assert (card < 200).mean() > 0.03  # letters
        if len(words) < 50:
            assert columns[-1] <= (shape[0] + side) // 2

    def test_nothing_is_written_on_the_original(self):
        image = PIL_Image.new("RGB", (224, 224), "green")
        before = np.asarray(image).copy()
        clip.write_on(image, clip.Picture(None, "dog"))
        assert (np.asarray(image) == before).all()


class TestSmall:
    def test_needs_no_files(self):
        task = clip.make_task(small=True, num_examples=6, attack="both")
        assert len(task) == 12
        assert margins(task).std() > 0.01
        components = coar.find_components(task.model, kinds=["neuron"])
        check_experiment(coar.ComponentAblation(task, components))

    def test_is_the_same_every_time_and_leaves_the_global_generator_alone(self):
        before = torch.get_rng_state()
        first, second = (clip.make_task(small=True, num_examples=4) for _ in range(2))
        assert torch.equal(torch.get_rng_state(), before)
        assert first.model_fingerprint() == second.model_fingerprint()

    def test_an_image_can_be_drawn(self):
        task = clip.make_task(small=True, num_examples=4)
        axes = pytest.importorskip("matplotlib.figure").Figure().add_subplot()
        task.show(task.dataset[0], axes)
        assert axes.get_title() == task.metadata["class"][0]


def test_decoded_images_can_be_kept_in_a_file(make, tmp_path, monkeypatch):
    arguments = {"attack": "both", "num_examples": 3}
    plain, first = make(**arguments), make(**arguments, cache=str(tmp_path))
    monkeypatch.setattr(clip, "pixels", lambda *_, **__: pytest.fail("decoded again"))
    again = make(**arguments, cache=str(tmp_path))
    assert plain.data_fingerprint() == first.data_fingerprint() == again.data_fingerprint()
    assert len(list(tmp_path.iterdir())) == 1


class TestRefusals:
    @pytest.mark.parametrize("setting", ["text", "attack"])
    def test_an_unknown_choice(self, make, setting):
        with refused(SettingError, setting, "'other'"):
            make(**{setting: "other"})

    def test_another_number_of_names(self, make):
        with refused(TaskError, "another number of classes", "2", "3: black_cat, dog, fish"):
            make(class_names=["cat", "dog"])

    def test_a_single_class(self, model_folder, tmp_path):
        (tmp_path / "dog").mkdir()
        PIL_Image.new("RGB", (40, 40)).save(tmp_path / "dog" / "1.png")
        with refused(TaskError, "at least 2 classes", "1"):
            clip.make_task(data=str(tmp_path), model=model_folder)

    def test_a_template_without_a_place_for_the_name(self, make):
        with refused(SettingError, "{}", "'a photo'"):
            make(templates=["a photo"])

    def test_no_images(self, model_folder):
        with refused(SettingError, "data="):
            clip.make_task(model=model_folder)

    def test_a_model_that_is_not_there(self, folder, tmp_path):
        with refused(TaskError, "cannot load the model", "model="):
            clip.make_task(data=folder, model=str(tmp_path))

    @pytest.mark.parametrize(("module", "extra"), [("transformers", "language"), ("torchvision", "vision")])
    def test_a_missing_library_is_named_with_the_command_that_installs_it(self, monkeypatch, module, extra):
        monkeypatch.setitem(sys.modules, module, None)
        with refused(MissingDependencyError, module, coar.errors.install_hint(extra)):
            clip.make_task(small=True)
