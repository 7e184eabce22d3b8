"""A word and everything else, as examples: what counts in them, against loops over the text."""

import json
import math
import re

import numpy as np
import pytest
import torch

import coar
from coar.editing import Effect
from coar.errors import SettingError, TaskError
from coar.tasks import gpt2, gpt2_words
from coar.tasks.gpt2_network import small_gpt2
from tests.refused import refused

transformers = pytest.importorskip("transformers", reason=coar.errors.install_hint("language"))
datasets = pytest.importorskip("datasets", reason=coar.errors.install_hint("language"))
tokenizers = pytest.importorskip("tokenizers", reason=coar.errors.install_hint("language"))

WORD = "thou"
TEXT = (
    "ROMEO:\nI tell thee, thou art here; though thou wert without me, thou'rt gone.\n"
    "THOU: and thou, and Thou, and thou\n"
) * 4
LENGTH = 96


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A task of a text of one's own."""
    path = tmp_path_factory.mktemp("text") / "own.txt"
    path.write_text(TEXT)
    return gpt2_words.make_task(WORD, data=str(path), max_length=LENGTH, min_context=4)


@pytest.fixture(scope="module")
def small():
    return gpt2_words.make_task(WORD, small=True, num_passages=60)


def of_kind(task, kind):
    return np.flatnonzero(task.metadata.kind == kind)


def counted_text(task, index):
    """What counts in an example, letter by letter; the others as dots."""
    item, vocabulary = task.dataset[index], small_gpt2()[1]
    letters = {token: letter for letter, token in vocabulary.items()}
    found = "".join(
        letters[int(token)] if label != gpt2_words.IGNORED else "."
        for token, label in zip(item["input_ids"], item["labels"], strict=True)
    )
    return "." + found[1:]  # the first is never predicted


def words_by_hand(text, context):
    """Ends of the words of a passage, walking over its letters."""
    ends = []
    for start in range(context, len(text) - len(WORD)):
        before, after = text[start - 1], text[start + len(WORD)]
        alone = not (before.isalnum() or before in "_'") and not (after.isalnum() or after in "_'")
        if text[start : start + len(WORD)] == WORD and alone:
            ends.append(start + len(WORD))
    return ends


class TestExamples:
    def test_of_the_word_end_with_it_and_count_its_letters_alone(self, own):
        passages = [TEXT[start : start + LENGTH] for start in range(0, len(TEXT) - LENGTH + 1, LENGTH)]
        expected = ["." * (end - 4) + WORD for text in passages for end in words_by_hand(text, context=4)]
        assert len(expected) > 4
        assert [counted_text(own, i) for i in of_kind(own, "word")] == expected
        assert set(own.metadata.counted[of_kind(own, "word")]) == {len(WORD)}

    def test_elsewhere_all_letters_count_but_those_of_the_word(self, own):
        found = [counted_text(own, i) for i in of_kind(own, "elsewhere")]
        whole = re.compile(r"(?<![\w'])thou(?![\w'])")
        passages = [TEXT[start : start + LENGTH] for start in range(0, len(TEXT) - LENGTH + 1, LENGTH)]
        assert found == ["." + whole.sub("....", text)[1:] for text in passages]
        assert "though" in "".join(found)
        assert [len(text.replace(".", "")) for text in found] != [LENGTH - 1] * len(found)
        counted = own.metadata.counted[of_kind(own, "elsewhere")]
        labels = own.batch(of_kind(own, "elsewhere"))["labels"]
        assert counted.tolist() == (labels[:, 1:] != gpt2_words.IGNORED).sum(dim=1).tolist()

    def test_no_letter_counts_in_both_kinds(self, own):
        for passage, rows in own.metadata.groupby("passage").groups.items():
            masks = [counted_text(own, i).ljust(LENGTH, ".") for i in rows]
            used = [sum(mask[k] != "." for mask in masks) for k in range(LENGTH)]
            assert max(used) == 1, passage

    def test_a_word_at_the_very_end_counts_nowhere_since_it_may_go_on(self, tmp_path):
        (tmp_path / "t.txt").write_text("I say unto thee thou ought, and though")
        task = gpt2_words.make_task(WORD, data=str(tmp_path / "t.txt"), max_length=36, min_context=4)
        assert [counted_text(task, i)[-4:] for i in of_kind(task, "word")] == ["thou"]
        assert counted_text(task, of_kind(task, "elsewhere")[0]).endswith("and ....")

    def test_words_with_little_context_are_no_examples(self, own, tmp_path):
        path = tmp_path / "own.txt"
        path.write_text(TEXT)
        longer = gpt2_words.make_task(WORD, data=str(path), max_length=LENGTH, min_context=40)
        assert len(of_kind(longer, "word")) < len(of_kind(own, "word"))
        assert all(len(longer.dataset[i]["input_ids"]) >= 44 for i in of_kind(longer, "word"))

    def test_some_of_those_elsewhere_are_at_even_distances(self, small):
        few = gpt2_words.make_task(WORD, small=True, num_passages=60, num_elsewhere=20)
        assert few.metadata.id[of_kind(few, "elsewhere")].astype(int).tolist() == list(range(140, 200, 3))
        words = [task.metadata.id[of_kind(task, "word")].tolist() for task in (few, small)]
        assert words[0] == words[1]

    def test_some_places_of_the_word_are_at_even_distances_and_the_others_count_nowhere(self, small):
        few = gpt2_words.make_task(WORD, small=True, num_passages=60, num_places=4)
        found, everywhere = (task.metadata.id[of_kind(task, "word")].tolist() for task in (few, small))
        assert len(everywhere) > 4
        assert found == [everywhere[i * len(everywhere) // 4] for i in range(4)]
        masks = [[counted_text(task, i) for i in of_kind(task, "elsewhere")] for task in (few, small)]
        assert masks[0] == masks[1]
        more = gpt2_words.make_task(WORD, small=True, num_passages=60, num_places=1000)
        assert more.example_ids() == small.example_ids()

    def test_ids_are_unique_and_a_word_is_shown_in_brackets(self, own):
        assert len(set(own.example_ids())) == len(own)
        texts = own.metadata.text[of_kind(own, "word")]
        assert all(text.endswith("[thou]") for text in texts)
        pyplot = pytest.importorskip("matplotlib.figure")
        axes = pyplot.Figure().add_subplot()
        own.show(own.dataset[int(of_kind(own, "word")[0])], axes)
        assert "[thou]" in axes.texts[0].get_text()

    def test_the_sample_is_the_passages_that_come_along(self, small):
        lines = gpt2.read_sample(gpt2.TEXT).decode().splitlines()
        texts = small.metadata.text[of_kind(small, "elsewhere")]
        assert texts.tolist() == [json.loads(line) for line in lines[-60:]]


class TestOutput:
    @torch.no_grad()
    def test_probability_of_a_word_is_the_product_over_its_letters(self, small):
        for index in of_kind(small, "word")[:3]:
            tokens = small.dataset[int(index)]["input_ids"]
            logits = small.model(input_ids=tokens[None]).logits[0]
            product = 1.0
            for place in range(len(tokens) - len(WORD), len(tokens)):
                product *= float(logits[place - 1].softmax(dim=0)[tokens[place]])
            output = small.outputs["log_probability"](small.model, small.batch([index])).numpy()
            found = gpt2_words.probabilities(small, output, [index])
            assert found.tolist() == pytest.approx([product], rel=1e-4)

    @torch.no_grad()
    def test_the_loss_elsewhere_gives_every_letter_the_same_weight(self, small):
        examples = of_kind(small, "elsewhere")[:10]
        batch = small.batch(examples)
        logits = small.model(input_ids=batch["input_ids"]).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
        outputs = small.outputs["log_probability"](small.model, batch).numpy()
        assert gpt2_words.mean_loss(small, outputs, examples) == pytest.approx(float(loss), rel=1e-5)
        twice = gpt2_words.mean_loss(small, np.stack([outputs, 2 * outputs]), examples)
        assert twice.tolist() == pytest.approx([float(loss), 2 * float(loss)], rel=1e-5)

    def test_what_an_edit_did_is_told_by_probabilities_and_by_the_loss_of_letters(self, small):
        words, others = of_kind(small, "word")[:3], of_kind(small, "elsewhere")[:2]
        before, after = np.log([0.1, 0.2, 0.3]), np.log([0.01, 0.02, 0.27])  # of whole words
        effect = Effect(before / len(WORD), after / len(WORD))
        assert gpt2_words.fall(small, effect, words) == pytest.approx(1 - 0.30 / 0.60)
        letters = small.metadata.counted[others].to_numpy()
        losses = np.array([1.0, 2.0]), np.array([1.5, 2.0])  # per letter, before and after
        effect = Effect(-losses[0], -losses[1])
        expected = (letters @ losses[1]) / (letters @ losses[0]) - 1
        assert gpt2_words.loss_rise(small, effect, others) == pytest.approx(expected)

    @torch.no_grad()
    def test_does_not_depend_on_the_padding(self, small):
        examples = [*of_kind(small, "word")[:3], *of_kind(small, "elsewhere")[:3]]
        function = small.outputs["log_probability"]
        together = function(small.model, small.batch(examples))
        alone = torch.cat([function(small.model, small.batch([i])) for i in examples])
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)

    def test_parts_of_an_edit_share_no_text(self, small):
        parts = coar.draw_parts(
            small,
            "kind == 'word'",
            "kind == 'elsewhere'",
            num_targets=3,
            num_references=8,
            pairs="passage",
        )
        sides = [
            set(small.metadata.passage.iloc[np.concatenate(side)])
            for side in (
                [parts.targets, parts.references],
                [parts.holdout, parts.target_holdout],
                [parts.report, parts.target_report],
            )
        ]
        assert all(sides)
        assert len(sides[0] | sides[1] | sides[2]) == sum(map(len, sides))


STORIES = [f"once there was a {'very ' * (i % 3)}big dog. the big dog saw number {i}" for i in range(10)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny GPT-2 with its tokenizer, and stories, as the libraries write them."""
    folder = tmp_path_factory.mktemp("words")
    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator(
        [*STORIES, "bi bi"] * 2, vocab_size=262, special_tokens=["<|endoftext|>"], show_progress=False
    )
    tokenizer = transformers.GPT2TokenizerFast(tokenizer_object=trained._tokenizer)
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_positions=80, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder / "model")
    datasets.Dataset.from_dict({"text": STORIES}).save_to_disk(str(folder / "stories"))
    return {"model": str(folder / "model"), "data": str(folder / "stories")}


@pytest.fixture(scope="module")
def task(folders):
    return gpt2_words.make_task("dog", num_passages=6, min_context=2, **folders)


class TestFullSize:
    def test_tokens_of_the_word_count_with_the_space_before_it(self, task, folders):
        tokenizer = transformers.GPT2TokenizerFast.from_pretrained(folders["model"])
        assert len(tokenizer(" dog")["input_ids"]) > 1  # a word of several tokens, which the test is about
        words = of_kind(task, "word")
        assert len(words) == 12  # two in each story
        for index in words:
            item = task.dataset[int(index)]
            counted = item["input_ids"][item["labels"] != gpt2_words.IGNORED]
            assert tokenizer.decode(counted).strip() == "dog"
            assert tokenizer.decode(item["input_ids"]).endswith("dog")
            assert task.metadata.counted[index] == len(counted)

    def test_elsewhere_counts_the_rest(self, task, folders):
        tokenizer = transformers.GPT2TokenizerFast.from_pretrained(folders["model"])
        for number, index in enumerate(of_kind(task, "elsewhere"), start=4):
            item = task.dataset[int(index)]
            kept = item["labels"] != gpt2_words.IGNORED
            assert "dog" not in tokenizer.decode(item["input_ids"][kept])
            assert tokenizer.decode(item["input_ids"]) == STORIES[number][: len(task.metadata.text[index])]
            assert task.metadata.id[index] == str(number)

    def test_a_word_that_the_length_cuts_off_is_no_example(self, folders):
        whole = gpt2_words.make_task("dog", num_passages=6, min_context=2, **folders)
        ends = [len(whole.dataset[int(i)]["input_ids"]) for i in of_kind(whole, "word")]
        cut = gpt2_words.make_task("dog", num_passages=6, min_context=2, max_length=min(ends) + 1, **folders)
        assert 1 <= len(of_kind(cut, "word")) < len(ends)
        assert all(text.endswith("[dog]") for text in cut.metadata.text[of_kind(cut, "word")])

    def test_an_edit_lowers_the_word(self, task):
        experiment = coar.ComponentAblation(task, coar.find_components(task.model, kinds=["mlp_neuron"]))
        parts = coar.draw_parts(
            task, "kind == 'word'", "kind == 'elsewhere'", num_targets=2, num_references=2, pairs="passage"
        )
        result = coar.make_edit(
            experiment, parts, "lower", score="contrast", passes=8, sizes=[1, 2, 4, 8], max_output_drop=0.5
        )
        chosen = np.array(parts.target_holdout)
        outputs = result.curve.outputs[:, chosen]
        step = result.curve.sizes.index(len(result.edit.names))
        assert outputs[step].mean() < outputs[0].mean()
        before, after = gpt2_words.probabilities(task, outputs[[0, step]], chosen)
        assert after.mean() < before.mean()

    def test_its_recipe_makes_it_again(self, task):
        again = coar.recipes.build_task(task.recipe)
        assert again.data_fingerprint() == task.data_fingerprint()
        assert again.model_fingerprint() == task.model_fingerprint()


class TestRefusals:
    @pytest.mark.parametrize("word", ["", " thou", "thou\n"])
    def test_what_is_no_word(self, word):
        with refused(SettingError, "without spaces", repr(word)):
            gpt2_words.make_task(word, small=True)

    def test_a_word_that_is_not_there(self):
        with refused(TaskError, "'Godot'", "60 passages"):
            gpt2_words.make_task("Godot", small=True, num_passages=60)

    @pytest.mark.parametrize("count", [0, 201])
    def test_numbers_out_of_range(self, count):
        with refused(SettingError, "num_elsewhere", "1 to 200", str(count)):
            gpt2_words.make_task(small=True, num_elsewhere=count)
        with refused(SettingError, "num_examples", "1 to 200", str(count)):
            gpt2_words.make_task(small=True, num_passages=count)

    def test_no_place_at_all(self):
        with refused(SettingError, "num_places", "at least 1", "0"):
            gpt2_words.make_task(small=True, num_places=0)

    def test_no_context_at_all(self):
        with refused(SettingError, "min_context", "at least 1", "0"):
            gpt2_words.make_task(small=True, min_context=0)

    def test_a_letter_that_the_network_does_not_know(self, tmp_path):
        (tmp_path / "t.txt").write_text("naïve thou " * 30)
        with refused(TaskError, "'ï'"):
            gpt2_words.make_task(data=str(tmp_path / "t.txt"))

    def test_small_has_its_own_model(self):
        with refused(SettingError, "model=None", "'gpt2'"):
            gpt2_words.make_task(small=True, model="gpt2")


def test_the_mean_log_probability_of_random_guessing_is_worse(small):
    examples = of_kind(small, "elsewhere")
    with torch.no_grad():
        outputs = small.outputs["log_probability"](small.model, small.batch(examples)).numpy()
    assert gpt2_words.mean_loss(small, outputs, examples) < 0.5 * math.log(65)
