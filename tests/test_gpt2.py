"""GPT-2 on stories: the whole loading path from local folders, margins against loops over tokens."""

import json
import math
import sys

import numpy as np
import pytest
import torch

import coar
from coar.errors import MissingDependencyError, SettingError, TaskError
from coar.tasks import gpt2
from coar.testing import check_components, check_experiment
from tests.refused import refused

transformers = pytest.importorskip("transformers", reason=coar.errors.install_hint("language"))
datasets = pytest.importorskip("datasets", reason=coar.errors.install_hint("language"))
tokenizers = pytest.importorskip("tokenizers", reason=coar.errors.install_hint("language"))

POSITIONS = 24
STORIES = [f"once upon a time there was {'a very ' * (i % 5)}big dog number {i}" for i in range(12)]
STORIES[11] = "and they lived happily ever after. " * 9  # longer than the model takes


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A tiny GPT-2 with random weights, a tokenizer trained on the stories, as `save_pretrained` writes."""
    folder = tmp_path_factory.mktemp("gpt2")
    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator(
        STORIES, vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False
    )
    tokenizer = transformers.GPT2TokenizerFast(tokenizer_object=trained._tokenizer)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=POSITIONS,
        n_embd=16,
        n_layer=2,
        n_head=2,
        initializer_range=0.5,
    )
    transformers.GPT2LMHeadModel(config).train().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def stories_folder(tmp_path_factory):
    """Two splits of stories, as `save_to_disk` writes them."""
    folder = tmp_path_factory.mktemp("stories")
    parts = {"train": ["not these"] * 3, "validation": STORIES}
    splits = {name: datasets.Dataset.from_dict({"text": texts}) for name, texts in parts.items()}
    datasets.DatasetDict(splits).save_to_disk(str(folder))
    return str(folder)


@pytest.fixture(scope="module")
def task(model_folder, stories_folder):
    return gpt2.make_task(data=stories_folder, model=model_folder, num_examples=8)


class Logits(torch.nn.Module):
    """A model whose result is a tensor."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids=input_ids).logits


def tokens_of(task, index):
    return task.dataset[index]["input_ids"]


def margin_by_loop(model, tokens):
    """Mean over positions of (logit of the next token - largest other logit), one story without padding."""
    with torch.no_grad():
        logits = model(input_ids=tokens[None]).logits[0].tolist()
    margins = []
    for position in range(len(tokens) - 1):
        following = int(tokens[position + 1])
        others = [value for token, value in enumerate(logits[position]) if token != following]
        margins.append(logits[position][following] - max(others))
    return sum(margins) / len(margins)


class TestStories:
    def test_are_the_last_of_the_validation_split_in_order(self, task, stories_folder):
        split = datasets.load_from_disk(stories_folder)["validation"]
        published = split.train_test_split(test_size=8, shuffle=False)["test"]
        assert task.metadata["text"].tolist() == list(published["text"]) == STORIES[4:]
        assert task.example_ids() == [str(i) for i in range(4, 12)]

    def test_are_the_tokens_of_the_tokenizer(self, task, model_folder):
        tokenizer = transformers.GPT2TokenizerFast.from_pretrained(model_folder)
        for index in range(7):
            assert tokens_of(task, index).tolist() == tokenizer(STORIES[4 + index])["input_ids"]
        assert task.metadata["tokens"].tolist() == [len(tokens_of(task, i)) for i in range(8)]

    def test_are_cut_at_the_length_that_the_model_takes(self, task, model_folder):
        tokenizer = transformers.GPT2TokenizerFast.from_pretrained(model_folder)
        whole = tokenizer(STORIES[11])["input_ids"]
        assert len(whole) > POSITIONS
        assert tokens_of(task, 7).tolist() == whole[:POSITIONS]

    def test_are_cut_shorter_on_request_but_never_left_longer(self, model_folder, stories_folder):
        for asked, got in ((5, 5), (1000, POSITIONS)):
            cut = gpt2.make_task(data=stories_folder, model=model_folder, num_examples=1, max_length=asked)
            assert len(tokens_of(cut, 0)) == got

    def test_may_lie_in_a_folder_without_splits(self, model_folder, tmp_path):
        datasets.Dataset.from_dict({"text": STORIES}).save_to_disk(str(tmp_path / "one"))
        task = gpt2.make_task(data=str(tmp_path / "one"), model=model_folder, num_examples=2)
        assert task.metadata["text"].tolist() == STORIES[-2:]

    def test_batches_are_padded_on_the_right_and_padding_has_no_label(self, task):
        batch = task.batch(range(8))
        for row, index in enumerate(range(8)):
            length = len(tokens_of(task, index))
            assert batch["input_ids"][row, :length].tolist() == tokens_of(task, index).tolist()
            assert batch["labels"][row, :length].tolist() == tokens_of(task, index).tolist()
            assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (POSITIONS - length)
            assert set(batch["labels"][row, length:].tolist()) <= {-100}


class TestModel:
    def test_is_in_eval_mode_and_keeps_no_cache(self, task):
        assert not any(module.training for module in task.model.modules())
        assert task.model(**task.batch([0])).past_key_values is None

    def test_has_the_published_components(self, task):
        components = coar.find_components(task.model, published="gpt2")
        assert len(components) == 2 * (16 + 16 + 16 + 64)  # rows of (in, out) weights: what a layer reads
        logits = Logits(task.model).eval()
        components = coar.find_components(logits, published="gpt2")
        check_components(logits, components, torch.stack([tokens_of(task, 7)] * 2))

    def test_its_ablation_keeps_the_contract(self, task):
        check_experiment(coar.ComponentAblation(task, coar.find_components(task.model, published="gpt2")))


class TestMargin:
    def test_is_the_loop_over_tokens(self, task):
        runner = coar.ComponentAblation(task, coar.find_components(task.model, published="gpt2")).prepare(
            torch.device("cpu")
        )
        found = runner(np.ones((1, 224), dtype=bool))["token_margin"][0]
        expected = [margin_by_loop(task.model, tokens_of(task, index)) for index in range(8)]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)

    def test_does_not_depend_on_the_padding(self, task):
        function = task.outputs["token_margin"]
        with torch.no_grad():
            together = function(task.model, task.batch(range(8)))
            alone = torch.cat([function(task.model, task.batch([i])) for i in range(8)])
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)

    def test_does_not_depend_on_the_token_that_pads(self, task):
        batch = task.batch(range(8))
        other = batch | {"input_ids": torch.where(batch["attention_mask"] == 0, 7, batch["input_ids"])}
        function = task.outputs["token_margin"]
        with torch.no_grad():
            torch.testing.assert_close(function(task.model, other), function(task.model, batch))


class TestRecipe:
    def test_makes_the_same_task_again(self, task):
        json.dumps(task.recipe.args)
        again = coar.recipes.build_task(task.recipe)
        assert again.model_fingerprint() == task.model_fingerprint()
        assert again.data_fingerprint() == task.data_fingerprint()

    def test_a_study_runs_from_a_spec(self, task, tmp_path):
        experiment = coar.ComponentAblation(task, coar.find_components(task.model, published="gpt2"))
        coar.Study.create(tmp_path / "s", experiment, coar.Bernoulli(ablation_fraction=0.025), 5).run()
        study = coar.Study.open(tmp_path / "s")
        assert study.outputs["token_margin"].shape == (5, 8)
        assert study.experiment.fingerprint() == experiment.fingerprint()

    def test_a_story_can_be_drawn(self, task):
        figure = pytest.importorskip("matplotlib.figure").Figure()
        axes = figure.add_subplot()
        task.show(task.dataset[0], axes)
        figure.canvas.draw()
        assert "once upon a time" in axes.texts[0].get_text()


class TestSmall:
    @pytest.fixture(params=[None, "gpt2_deep"])
    def small(self, request):
        return gpt2.make_task(small=True, network=request.param, num_examples=6)

    def test_reads_shakespeare_better_than_chance(self, small):
        batch = small.batch(range(6))
        assert batch["input_ids"].shape == (6, gpt2.SMALL_LENGTH)
        with torch.no_grad():
            logits = small.model(input_ids=batch["input_ids"]).logits[:, :-1]
        following = batch["input_ids"][:, 1:]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), following.flatten())
        assert loss < 0.6 * math.log(logits.shape[-1])

    def test_passages_are_the_last_of_the_sample(self, small):
        lines = gpt2.read_sample(gpt2.TEXT).decode().splitlines()
        assert small.metadata["text"].tolist() == [json.loads(line) for line in lines[-6:]]
        assert len(gpt2.make_task(small=True)) == len(lines) == 200

    def test_margins_are_the_loop_over_letters(self, small):
        with torch.no_grad():
            found = small.outputs["token_margin"](small.model, small.batch([0, 5]))
        expected = [margin_by_loop(small.model, tokens_of(small, i)) for i in (0, 5)]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)

    def test_reads_a_text_of_ones_own(self, tmp_path):
        (tmp_path / "own.txt").write_text("To be, or not to be: that is the question.\n" * 8)
        task = gpt2.make_task(small=True, data=str(tmp_path / "own.txt"), num_examples=2, max_length=20)
        assert task.metadata["tokens"].tolist() == [20, 20]
        text = (tmp_path / "own.txt").read_text()
        assert task.metadata["text"].tolist() == [text[i : i + 20] for i in range(0, len(text) - 19, 20)][-2:]

    def test_a_letter_that_it_does_not_know_is_named(self, tmp_path):
        (tmp_path / "own.txt").write_text("naïve " * 100)
        with refused(TaskError, "'ï'", "letters"):
            gpt2.make_task(small=True, data=str(tmp_path / "own.txt"), num_examples=2)

    @pytest.mark.parametrize(("network", "layers"), [(None, 4), ("gpt2", 4), ("gpt2_deep", 12)])
    def test_has_512_neurons_and_4_heads_per_layer(self, network, layers):
        task = gpt2.make_task(small=True, network=network, num_examples=2)
        kinds = {"mlp_neuron": 512 * layers, "attention_head": 4 * layers}
        found = {kind: len(coar.find_components(task.model, kinds=[kind])) for kind in kinds}
        assert found == kinds

    def test_the_deep_ones_recipe_makes_it_again(self):
        task = gpt2.make_task(small=True, network="gpt2_deep", num_examples=2)
        assert task.recipe.args == {"small": True, "network": "gpt2_deep", "num_examples": 2}
        again = coar.recipes.build_task(task.recipe)
        assert again.model_fingerprint() == task.model_fingerprint()
        assert again.data_fingerprint() == task.data_fingerprint()

    def test_none_is_gpt2_under_the_recipe_that_it_always_had(self):
        task = gpt2.make_task(small=True, num_examples=2)
        named = gpt2.make_task(small=True, network="gpt2", num_examples=2)
        assert task.recipe.args == {"small": True, "num_examples": 2}
        assert named.model_fingerprint() == task.model_fingerprint()

    def test_a_network_that_there_is_not(self):
        with refused(SettingError, "gpt2, gpt2_deep", "'gpt3'"):
            gpt2.make_task(small=True, network="gpt3")
        with refused(SettingError, "gpt2, gpt2_deep", "''"):
            gpt2.make_task(small=True, network="")

    def test_has_no_other_model(self):
        with refused(SettingError, "model=None", "'gpt2'"):
            gpt2.make_task(small=True, model="gpt2")


class TestRefusals:
    @pytest.mark.parametrize("count", [0, 13])
    def test_more_stories_than_there_are(self, model_folder, stories_folder, count):
        with refused(SettingError, "num_examples", "1 to 12", str(count)):
            gpt2.make_task(data=stories_folder, model=model_folder, num_examples=count)

    def test_a_small_network_for_the_published_task(self, model_folder, stories_folder):
        with refused(SettingError, "small=True", "'gpt2_deep'", "model="):
            gpt2.make_task(data=stories_folder, model=model_folder, network="gpt2_deep")

    def test_a_model_that_is_not_there(self, stories_folder, tmp_path):
        with refused(TaskError, "cannot load the model", "model="):
            gpt2.make_task(data=stories_folder, model=str(tmp_path), num_examples=2)

    def test_data_that_are_not_there(self, model_folder, tmp_path):
        with refused(TaskError, "cannot load the data set", "data="):
            gpt2.make_task(data=str(tmp_path), model=model_folder, num_examples=2)

    def test_data_without_a_validation_split(self, model_folder, tmp_path):
        split = datasets.Dataset.from_dict({"text": STORIES})
        datasets.DatasetDict({"train": split}).save_to_disk(str(tmp_path / "d"))
        with refused(TaskError, "no validation split", "train"):
            gpt2.make_task(data=str(tmp_path / "d"), model=model_folder, num_examples=2)

    def test_a_story_without_a_next_token(self, model_folder, tmp_path):
        datasets.Dataset.from_dict({"text": [*STORIES, "a"]}).save_to_disk(str(tmp_path / "d"))
        with refused(TaskError, "story 12", "at least 2 tokens", "1"):
            gpt2.make_task(data=str(tmp_path / "d"), model=model_folder, num_examples=2)

    @pytest.mark.parametrize("missing", ["transformers", "datasets"])
    def test_a_missing_library_is_named_with_the_command_that_installs_it(
        self, model_folder, stories_folder, monkeypatch, missing
    ):
        monkeypatch.setitem(sys.modules, missing, None)
        with refused(MissingDependencyError, missing, coar.errors.install_hint("language")):
            gpt2.make_task(data=stories_folder, model=model_folder, num_examples=2)
