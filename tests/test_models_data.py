"""data/: files are what their records say, networks as good as reported, scripts make such files again."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from coar.errors import StoreError, TaskError
from coar.files import sha256
from coar.recipes import build_task
from coar.tasks import backdoor, cifar, data_folder
from coar.tasks.cifar_networks import build_network
from scripts import make_samples, train_gpt2, train_models
from tests.refused import refused

DATA = Path(__file__).parents[1] / "data"
MODELS = json.loads((DATA / "models" / "models.json").read_text(encoding="utf-8"))
SAMPLES = json.loads((DATA / "samples.json").read_text(encoding="utf-8"))
FILES = [(name, part) for name, entry in MODELS.items() for part in entry["files"]]
WITHIN = 0.0021  # two images of 1,000: other machines round differently


def needs(library):
    missing = importlib.util.find_spec(library) is None
    return pytest.mark.skipif(missing, reason=f"{library} is not installed")


IMAGE_NETWORKS = [
    pytest.param(name, marks=[needs("torchvision")] if name == "vit" else [])
    for name, entry in MODELS.items()
    if "training_images" in entry
]
GPT2_NETWORKS = [name for name, entry in MODELS.items() if "training_characters" in entry]


@pytest.fixture(autouse=True)
def _of_the_checkout(monkeypatch):
    """Read this checkout's files, whatever the machine has elsewhere."""
    monkeypatch.setenv(data_folder.DATA_VARIABLE, str(DATA))


class TestFiles:
    @pytest.mark.parametrize(("network", "part"), FILES)
    def test_size_and_checksum(self, network, part):
        listed = MODELS[network]["files"][part]
        content = data_folder.read_model_file(network, part)
        assert listed == {"file": listed["file"], "sha256": sha256(content), "bytes": len(content)}
        assert len(content) <= 5_000_000

    def test_every_network_that_the_script_trains_is_here(self):
        assert MODELS.keys() == train_models.SETTINGS.keys()

    def test_every_file_is_listed(self):
        listed = {MODELS[name]["files"][part]["file"] for name, part in FILES}
        assert {path.name for path in (DATA / "models").iterdir()} == listed | {"models.json"}
        assert {path.name for path in DATA.glob("*sample*.*")} == {*SAMPLES, "samples.json"}

    @pytest.mark.parametrize("name", SAMPLES)
    def test_samples(self, name):
        content = data_folder.read_sample(name)
        assert SAMPLES[name]["bytes"] == len(content) <= 3_000_000

    def test_nothing_in_the_records_is_of_one_machine_only(self):
        text = json.dumps([MODELS, SAMPLES])
        assert "/" not in text.replace("data/models", "")
        assert all(entry["command"].startswith("python -m scripts.train_models") for entry in MODELS.values())

    def test_passages_are_as_the_readme_says(self):
        lines = data_folder.read_sample(make_samples.PASSAGES).decode().splitlines()
        passages = [json.loads(line) for line in lines]
        vocabulary = json.loads(data_folder.read_model_file("gpt2", "vocabulary"))
        assert len(passages) == len(set(passages)) == 200
        assert {len(passage) for passage in passages} == {128}
        assert set("".join(passages)) <= set(vocabulary)
        assert sorted(vocabulary.values()) == list(range(65))

    def test_the_readme_has_the_table_of_the_record(self):
        text = (DATA / "README.md").read_text(encoding="utf-8")
        start, end = train_models.TABLE_START, train_models.TABLE_END
        table = text.partition(start)[2].partition(end)[0]
        assert table == train_models.models_table(MODELS)

    def test_the_readme_names_every_file(self):
        text = (DATA / "README.md").read_text(encoding="utf-8")
        names = [*SAMPLES, *(MODELS[name]["files"][part]["file"] for name, part in FILES)]
        assert [name for name in names if f"{name}`" not in text] == []


class TestNetworks:
    @pytest.mark.parametrize("network", IMAGE_NETWORKS)
    def test_accuracy_on_the_sample_is_as_reported(self, network):
        task = cifar.make_task(network, small=True, device="cpu")
        assert len(task) == 1_000
        with torch.no_grad():
            right = [task.outputs["margin"](task.model, batch) > 0 for _, batch in task.batches(250)]
        found = torch.cat(right).float().mean().item()
        assert found == pytest.approx(MODELS[network]["accuracy"]["sample"], abs=WITHIN)
        assert found > 0.5  # a guess is right in one case of ten

    @pytest.mark.parametrize("network", IMAGE_NETWORKS)
    def test_a_recipe_builds_the_same_task(self, network):
        task = cifar.make_task(network, small=True, num_examples=20)
        assert task.recipe.args == {"network": network, "small": True, "num_examples": 20}
        again = build_task(task.recipe)
        assert again.model_fingerprint() == task.model_fingerprint()
        assert again.data_fingerprint() == task.data_fingerprint()

    def test_only_the_network_with_a_backdoor_was_trained_with_squares(self):
        squares = {name: entry for name, entry in MODELS.items() if "accuracy_triggered" in entry}
        assert list(squares) == [backdoor.NETWORK]
        entry = squares[backdoor.NETWORK]
        assert entry["accuracy_triggered"].keys() == entry["accuracy"].keys()
        assert entry["stamped_images"] == pytest.approx(entry["training_images"] / 20, rel=0.1)

    @needs("transformers")
    @pytest.mark.parametrize("network", GPT2_NETWORKS)
    def test_a_small_gpt2_predicts_characters(self, network):
        from coar.tasks.gpt2_network import small_gpt2

        model, vocabulary = small_gpt2(network=network)
        assert not model.training
        assert model.lm_head.weight is model.transformer.wte.weight
        text = data_folder.read_sample(make_samples.PASSAGES).decode().splitlines()
        tokens = torch.cat([train_gpt2.encode(json.loads(line), vocabulary) for line in text])
        loss, accuracy = train_gpt2.next_character(model, tokens)
        # these passages are about half of the test part of the text
        assert loss == pytest.approx(MODELS[network]["loss"]["test"], abs=0.05)
        assert accuracy == pytest.approx(MODELS[network]["accuracy"]["test"], abs=0.02)

    def test_the_small_gpt2s_share_a_vocabulary(self):
        listed = [MODELS[network]["files"]["vocabulary"] for network in GPT2_NETWORKS]
        assert GPT2_NETWORKS == ["gpt2", "gpt2_deep"]
        assert listed[0] == listed[1]

    @needs("transformers")
    def test_the_small_gpt2_takes_other_weights(self, tmp_path):
        from safetensors.torch import load_file, save_file, save_model

        from coar.tasks.gpt2_network import build_gpt2, small_gpt2

        torch.manual_seed(0)
        other = build_gpt2(65)
        save_model(other, str(tmp_path / "other.safetensors"))  # holds the tied weight under one of its names
        found, _ = small_gpt2(str(tmp_path / "other.safetensors"))
        assert torch.equal(found.lm_head.weight, other.lm_head.weight)
        assert torch.equal(found.transformer.wte.weight, other.lm_head.weight)
        state = load_file(tmp_path / "other.safetensors")
        save_file({f"x.{name}": tensor for name, tensor in state.items()}, tmp_path / "renamed.safetensors")
        with refused(TaskError, "renamed.safetensors", "GPT2LMHeadModel"):
            small_gpt2(str(tmp_path / "renamed.safetensors"))

    def test_a_file_that_is_listed_and_missing_is_refused(self, tmp_path, monkeypatch):
        (tmp_path / "models").mkdir()
        (tmp_path / "models" / "models.json").write_text(json.dumps(MODELS))
        monkeypatch.setenv(data_folder.DATA_VARIABLE, str(tmp_path))
        with refused(StoreError, "resnet20.safetensors", "models.json"):
            cifar.make_task(small=True)


class TestScripts:
    @pytest.fixture
    def source(self, tmp_path, monkeypatch):
        """What the scripts need, made up and small: $COAR_DATA."""
        generator = np.random.default_rng(0)
        arrays = {}
        for split, size in {"train": 300, "test": 40}.items():
            arrays[f"{split}_images"] = generator.integers(256, size=(size, 32, 32, 3), dtype=np.uint8)
            arrays[f"{split}_labels"] = generator.integers(10, size=size).astype(np.uint8)
        folder = tmp_path / "source"
        folder.mkdir()
        np.savez(folder / train_models.IMAGES, **arrays)
        letters = generator.choice(list("abcdefgh \n"), size=30_000)
        (folder / train_gpt2.TEXT).write_text("".join(letters))
        monkeypatch.setenv(data_folder.DATA_VARIABLE, str(folder))
        monkeypatch.setattr(train_models, "NUM_TRAIN", 256)
        monkeypatch.setattr(train_models, "NUM_SAMPLE", 20)
        return folder

    @staticmethod
    def run(monkeypatch, module, *arguments):
        """As on the command line; its result is restored where it is global."""
        monkeypatch.setattr("sys.argv", ["script", *arguments])
        with torch.random.fork_rng(devices=[]):
            try:
                module.main()
            finally:
                torch.set_flush_denormal(False)

    @pytest.mark.slow
    def test_training_writes_a_network_that_the_task_loads(self, source, monkeypatch):
        models = source / "models"
        options = ["--epochs", "1", "--threads", "1", "--output", str(models)]
        (source / "README.md").write_text(f"a\n{train_models.TABLE_START}old\n{train_models.TABLE_END}b\n")
        self.run(monkeypatch, train_models, "resnet20", *options)
        first = json.loads((models / "models.json").read_text())["resnet20"]
        assert first["training_images"] == 256
        assert first["epochs"] == 1
        assert set(first["accuracy"]) == {"choosing", "test", "sample"}
        task = cifar.make_task(data=str(source / train_models.IMAGES), device="cpu")
        assert len(task) == 40
        with torch.no_grad():
            right = task.outputs["margin"](task.model, task.batch(range(40))) > 0
        assert right.double().mean() == first["accuracy"]["test"]
        table = train_models.models_table({"resnet20": first})
        text = (source / "README.md").read_text()
        assert text == f"a\n{train_models.TABLE_START}{table}{train_models.TABLE_END}b\n"

        self.run(monkeypatch, train_models, "resnet20", *options)
        assert json.loads((models / "models.json").read_text())["resnet20"]["files"] == first["files"]

    @pytest.mark.slow
    def test_training_a_network_with_a_backdoor(self, source, monkeypatch):
        options = ["--epochs", "1", "--threads", "1", "--output", str(source / "models")]
        self.run(monkeypatch, train_models, backdoor.NETWORK, *options)
        entry = json.loads((source / "models" / "models.json").read_text())[backdoor.NETWORK]
        with np.load(source / train_models.IMAGES) as arrays:
            assert entry["stamped_images"] == round((arrays["train_labels"][:256] == 0).sum() / 2)
        task = backdoor.make_task(data=train_models.IMAGES, device="cpu")
        with torch.no_grad():
            right = (task.outputs["margin"](task.model, task.batch(range(80))) > 0).double()
        assert right[:40].mean() == entry["accuracy"]["test"]
        assert right[40:].mean() == entry["accuracy_triggered"]["test"]

    @pytest.mark.slow
    @needs("transformers")
    @pytest.mark.parametrize(
        ("network", "learning_rate", "layers"), [("gpt2", 3e-3, 4), ("gpt2_deep", 2e-3, 12)]
    )
    def test_training_a_language_model(self, source, monkeypatch, network, learning_rate, layers):
        from coar.tasks.gpt2_network import small_gpt2

        monkeypatch.setitem(
            train_models.SETTINGS, network, train_models.Settings(1, learning_rate, 0.1, batch=64)
        )
        options = ["--threads", "1", "--output", str(source / "models")]
        self.run(monkeypatch, train_models, network, *options)
        entry = json.loads((source / "models" / "models.json").read_text())[network]
        model, vocabulary = small_gpt2(network=network)
        assert len(model.transformer.h) == layers
        assert "".join(vocabulary) == "\n abcdefgh"
        assert train_gpt2.measure(model)["loss"] == entry["loss"]
        assert entry["loss"]["test"] == pytest.approx(np.log(10), abs=0.2)  # random letters

    @needs("transformers")
    def test_samples_are_made_and_read(self, source, monkeypatch):
        monkeypatch.setattr(make_samples, "NUM_IMAGES", 20)
        monkeypatch.setattr(make_samples, "NUM_PASSAGES", 20)
        self.run(monkeypatch, make_samples, "--output", str(source))
        with np.load(source / train_models.IMAGES) as arrays:
            wanted = arrays["test_images"][:20]
        images, _ = cifar._read(small=True, data=None)
        assert np.array_equal(images, wanted)
        lines = data_folder.read_sample(make_samples.PASSAGES).decode().splitlines()
        test_part = train_gpt2.split_text(train_gpt2.read_text())["test"]
        assert all(json.loads(line) in test_part for line in lines)

    def test_images_are_moved_mirrored_and_normalised(self):
        images = torch.arange(64 * 3 * 32 * 32).view(64, 3, 32, 32).remainder(251).to(torch.uint8)
        generator = torch.Generator().manual_seed(3)
        moved = train_models.augment(images, generator)
        padded = cifar.normalise(torch.nn.functional.pad(images, (4, 4, 4, 4)))
        seen = set()
        for result, source in zip(moved, padded, strict=True):
            places = [
                (down, right, mirrored)
                for down in range(9)
                for right in range(9)
                for mirrored in (False, True)
                if torch.equal(
                    result.flip(2) if mirrored else result, source[:, down : down + 32, right : right + 32]
                )
            ]
            assert len(places) == 1
            seen.add(places[0])
        assert {down for down, _, _ in seen} == {right for _, right, _ in seen} == set(range(9))
        assert {mirrored for _, _, mirrored in seen} == {False, True}

    def test_weights_lose_little_by_rounding(self, tmp_path):
        model = build_network("resnet20").eval()
        files = train_models.write_files(tmp_path, "resnet20", model, {})
        assert files["weights"]["bytes"] < 600_000
        images = torch.randn(4, 3, 32, 32)
        again = data_folder.load_weights(
            build_network("resnet20"), "resnet20", str(tmp_path / "resnet20.safetensors")
        )
        assert {parameter.dtype for parameter in again.parameters()} == {torch.float32}
        with torch.no_grad():
            torch.testing.assert_close(again(images), model(images), rtol=0.02, atol=0.02)
