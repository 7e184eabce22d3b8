"""Written digits: what is drawn where, a loss held to loops, and a network that reads and can be fooled."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_model

import coar
from coar.errors import SettingError
from coar.fingerprints import model_fingerprint
from coar.tasks import written_digits
from coar.testing import check_components, check_experiment
from tests.refused import refused

SEED = 10
LABELS = [number % 10 for number in range(2000)]
CORNERS = [(0.0, 0.0, 0.0), (0.999, 0.999, 0.999), (0.49, 0.999, 0.0), (0.5, 0.0, 0.999)]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Trained once; about 10 seconds."""
    path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    save_model(written_digits.make_task(SEED, num_images=1).model, str(path))
    return str(path)


@pytest.fixture(scope="module")
def task(weights):
    return written_digits.make_task(SEED, weights=weights)


@pytest.fixture
def one_epoch(monkeypatch):
    monkeypatch.setattr(written_digits, "EPOCHS", 1)


class TestPictures:
    def test_letters_are_enough_for_all_words_and_differ(self):
        assert set("".join(written_digits.WORDS)) == set(written_digits.LETTERS)
        assert len(set(written_digits.LETTERS.values())) == len(written_digits.LETTERS)

    @pytest.mark.parametrize("word", written_digits.WORDS)
    @pytest.mark.parametrize("places", CORNERS)
    def test_a_word_is_whole_wherever_it_is_and_beside_the_digit(self, word, places):
        digit = torch.ones(16, 16)
        blue, red = written_digits.write(digit, word, places)
        assert (blue > 0).sum() == 16 * 16
        assert red.sum() == written_digits.draw_word(word).sum()
        rows = torch.nonzero(red.any(dim=1))
        drawn = red[rows.min() : rows.max() + 1]
        windows = drawn.unfold(1, 4 * len(word) - 1, 1).transpose(0, 1)
        assert any(torch.equal(window, written_digits.draw_word(word)) for window in windows)
        assert not (blue.any(dim=1) & red.any(dim=1)).any()
        assert (rows.min() > 16) == (places[0] >= 0.5)

    def test_without_a_word_nothing_is_red(self):
        blue, red = written_digits.write(torch.rand(16, 16), "", CORNERS[0])
        assert blue.any()
        assert not red.any()

    def test_digits_are_those_of_scikit_learn(self):
        datasets = pytest.importorskip("sklearn.datasets")
        pixels, labels = datasets.load_digits(return_X_y=True)
        digits, found, order = written_digits.load(0)
        assert found.tolist() == labels.tolist()
        assert sorted(order.tolist()) == list(range(1797))
        means = digits.mean(dim=(1, 2)).numpy()
        assert np.corrcoef(means, pixels.mean(axis=1))[0, 1] > 0.99


class TestWrongWords:
    def test_are_never_right_and_each_other_word_occurs(self):
        words = written_digits.wrong_words(LABELS, range(2000), seed=0)
        numbers = [written_digits.WORDS.index(word) for word in words]
        pairs = set(zip(LABELS, numbers, strict=True))
        assert pairs == {(a, b) for a in range(10) for b in range(10) if a != b}

    def test_depend_on_the_image_alone(self):
        every = written_digits.wrong_words(LABELS, range(2000), seed=3)
        some = written_digits.wrong_words(LABELS[50:60], range(50, 60), seed=3)
        assert some == every[50:60]
        assert every != written_digits.wrong_words(LABELS, range(2000), seed=4)


def units(count, features):
    """Unit vectors for images and for texts."""
    numbers = torch.randn(2, count, features, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.normalize(numbers, dim=-1)


class TestLoss:
    def test_is_clips_where_no_two_captions_are_of_one_class(self):
        images, texts = units(6, 8)
        logits, diagonal = written_digits.SCALE * images @ texts.T, torch.arange(6)
        entropy = torch.nn.functional.cross_entropy
        expected = (entropy(logits, diagonal) + entropy(logits.T, diagonal)) / 2
        found = written_digits.contrastive_loss(images, texts, torch.arange(6))
        torch.testing.assert_close(found, expected)

    def test_divides_among_captions_of_one_class_by_hand(self):
        images, texts = units(5, 4)
        classes, total = [0, 1, 0, 2, 0], 0.0
        for one, other in ((images, texts), (texts, images)):
            for i in range(5):
                logits = [written_digits.SCALE * float(one[i] @ other[j]) for j in range(5)]
                log_sum = np.log(np.sum(np.exp(logits)))
                same = [j for j in range(5) if classes[j] == classes[i]]
                total += np.mean([log_sum - logits[j] for j in same]) / 10
        found = written_digits.contrastive_loss(images, texts, torch.tensor(classes))
        assert float(found) == pytest.approx(total, rel=1e-4)


class TestTraining:
    def test_the_prompt_is_no_caption(self):
        assert written_digits.PROMPT not in written_digits.CAPTIONS

    def test_pictures_have_no_word_the_right_word_or_nothing_else(self):
        digits, labels, _ = written_digits.load(0)
        counts = np.zeros(3)
        for images, tokens, classes in written_digits._batches(digits[:640], labels[:640], 0, 0):
            for (blue, red), ids, label in zip(images, tokens, classes, strict=True):
                counts += [bool(blue.any()), bool(red.any()), 1]
                word = written_digits.WORDS[int(label)]
                assert not red.any() or red.sum() == written_digits.draw_word(word).sum()
                assert word in [written_digits.VOCABULARY[token] for token in ids]
        assert counts[2] == 640
        np.testing.assert_allclose(counts[:2] / 640, [0.8, 0.6], atol=0.06)

    @pytest.mark.slow
    @pytest.mark.usefixtures("one_epoch")
    def test_is_repeatable_and_leaves_the_global_generator_alone(self):
        before = torch.get_rng_state()
        first, second = (written_digits.make_task(num_images=5) for _ in range(2))
        assert torch.equal(torch.get_rng_state(), before)
        assert model_fingerprint(first.model) == model_fingerprint(second.model)
        assert first.data_fingerprint() == second.data_fingerprint()
        other = written_digits.make_task(seed=1, num_images=5)
        assert model_fingerprint(other.model) != model_fingerprint(first.model)


@pytest.mark.slow
class TestTask:
    def test_every_image_is_there_clean_and_attacked(self, task):
        table = task.metadata
        clean, attacked = table[:700], table[700:].reset_index(drop=True)
        assert set(clean.subpopulation) == {"clean"}
        assert set(attacked.subpopulation) == {"attacked"}
        assert (clean[["image", "label", "class"]] == attacked[["image", "label", "class"]]).all(axis=None)
        assert (clean.written == "").all()
        assert (attacked.written != attacked["class"]).all()
        images, labels = task.dataset.tensors
        assert labels.tolist() == table.label.tolist()
        assert torch.equal(images[:700, 0], images[700:, 0])
        assert not images[:700, 1].any()
        assert len(set(table.id)) == 1400

    def test_its_network_reads_digits_and_is_fooled_by_writing(self, task):
        images, labels = task.dataset.tensors
        with torch.no_grad():
            said = task.model(images).argmax(dim=1)
        right = (said == labels).float()
        assert right[:700].mean() >= 0.95
        assert right[700:].mean() <= 0.6
        written = torch.tensor([written_digits.WORDS.index(word) for word in task.metadata.written[700:]])
        wrong = said[700:] != labels[700:]
        assert (said[700:] == written)[wrong].float().mean() >= 0.8  # it is the word that fools it

    def test_its_network_reads_words_where_there_is_nothing_else(self, task):
        blank = torch.zeros(16, 16)
        words = [written_digits.write(blank, word, (0.2, 0.5, 0.5)) for word in written_digits.WORDS]
        with torch.no_grad():
            assert task.model(torch.stack(words)).argmax(dim=1).tolist() == list(range(10))

    def test_saved_weights_make_it_again(self, task, weights):
        some = written_digits.make_task(SEED, num_images=20, weights=weights)
        assert some.model_fingerprint() == task.model_fingerprint()
        assert torch.equal(some.dataset.tensors[0][20:], task.dataset.tensors[0][700:720])

    def test_its_components_are_the_filters_of_the_image_tower(self, task):
        components = coar.find_components(task.model)
        assert len(components) == 48 + 64 + 128
        check_components(task.model, components, task.dataset.tensors[0][:8])

    def test_its_ablation_keeps_the_contract(self, weights):
        some = written_digits.make_task(SEED, num_images=30, weights=weights)
        check_experiment(coar.ComponentAblation(some, coar.find_components(some.model)))

    @pytest.mark.usefixtures("one_epoch")
    def test_a_study_keeps_the_weights(self, tmp_path, monkeypatch):
        some = written_digits.make_task(SEED, num_images=10)
        experiment = coar.ComponentAblation(some, coar.find_components(some.model))
        coar.Study.create(tmp_path / "s", experiment, coar.Bernoulli(ablation_fraction=0.1), 3).run(
            progress=False
        )
        monkeypatch.setattr(written_digits, "train", lambda *_: pytest.fail("trained again"))
        again = coar.Study.open(tmp_path / "s")
        assert again.experiment.fingerprint() == experiment.fingerprint()

    def test_an_image_can_be_drawn(self, task):
        axes = pytest.importorskip("matplotlib.figure").Figure().add_subplot()
        task.show(task.dataset[700], axes)
        assert axes.get_title() == task.metadata["class"][0]
        drawn = axes.get_images()[0].get_array()
        red = (drawn == [1, 0, 0]).all(axis=2)
        assert red.sum() == written_digits.draw_word(task.metadata.written[700]).sum()

    def test_an_edit_restores_most_of_what_the_attack_costs(self, task):
        components = coar.find_components(task.model, kinds=["conv_filter"])
        queries = "subpopulation == 'attacked'", "subpopulation == 'clean'"
        parts = coar.draw_parts(task, *queries, pairs="image", seed=SEED)
        experiment = coar.ComponentAblation(task, components)
        found = coar.make_edit(experiment, parts, score="best", max_accuracy_drop=0.01)
        attacked, clean = found.target_report, found.report
        lost = clean.accuracy_before - attacked.accuracy_before
        assert attacked.accuracy_after - attacked.accuracy_before >= 0.6 * lost
        assert clean.accuracy_after >= clean.accuracy_before - 0.02


@pytest.mark.parametrize("count", [0, 701, -1])
def test_more_images_than_there_are_are_refused(count):
    with refused(SettingError, "1 to 700", str(count)):
        written_digits.make_task(num_images=count)
