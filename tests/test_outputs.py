import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from coar import outputs
from coar.errors import OutputError
from tests import naive
from tests.cases import make_case
from tests.refused import refused

IDENTITY = nn.Identity()  # the inputs are the logits
LOGITS = torch.tensor([[1.0, 4.0, 2.0], [0.0, 0.0, math.log(2.0)]])
LABELS = torch.tensor([2, 2])
PER_EXAMPLE = [outputs.margin, outputs.log_odds, outputs.loss, outputs.logit]
PER_SEQUENCE = [outputs.token_margin, outputs.token_log_probability]


def logits_and_labels(rows=6, classes=5):
    numbers = st.floats(-50, 50, width=32)
    one = st.tuples(st.lists(numbers, min_size=classes, max_size=classes), st.integers(0, classes - 1))
    return st.lists(one, min_size=1, max_size=rows).map(
        lambda pairs: (torch.tensor([p[0] for p in pairs]), torch.tensor([p[1] for p in pairs]))
    )


class TestByHand:
    """Logits 1, 4, 2 and 0, 0, log 2, both with label 2: probabilities of the second are 1/4, 1/4, 1/2."""

    def test_margin(self):
        assert outputs.margin(IDENTITY, (LOGITS, LABELS)).tolist() == pytest.approx([2 - 4, math.log(2)])

    def test_log_odds(self):
        found = outputs.log_odds(IDENTITY, (LOGITS, LABELS)).tolist()
        assert found == pytest.approx([2 - math.log(math.e + math.e**4), 0.0], abs=1e-6)

    def test_loss(self):
        total = math.e + math.e**4 + math.e**2
        found = outputs.loss(IDENTITY, (LOGITS, LABELS)).tolist()
        assert found == pytest.approx([math.log(total) - 2, math.log(2)])

    def test_logit(self):
        assert outputs.logit(IDENTITY, (LOGITS, LABELS)).tolist() == pytest.approx([2.0, math.log(2)])

    def test_zero_shot_margin_reads_logits_per_image(self):
        def clip(input_ids, pixel_values):
            return SimpleNamespace(logits_per_image=pixel_values @ input_ids.T, logits_per_text=None)

        prompts, images = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[3.0, 1.0], [2.0, 6.0]])
        batch = {"input_ids": prompts, "pixel_values": images, "labels": torch.tensor([0, 0])}
        assert outputs.zero_shot_margin(clip, batch).tolist() == [2.0, -4.0]


class TestAgainstDefinitions:
    @given(logits_and_labels())
    def test_margin_is_the_loop_over_other_classes(self, batch):
        np.testing.assert_allclose(outputs.margin(IDENTITY, batch), naive.margins(*batch), rtol=1e-6)

    @given(logits_and_labels())
    def test_log_odds_is_the_log_of_p_over_1_minus_p(self, batch):
        logits, labels = batch[0].double(), batch[1]
        probability = logits.softmax(dim=1)
        chosen = probability.gather(1, labels[:, None])[:, 0]
        others = probability.scatter(1, labels[:, None], 0.0).sum(dim=1)
        expected = chosen.log() - others.log()
        np.testing.assert_allclose(outputs.log_odds(IDENTITY, (logits, labels)), expected, atol=1e-8)

    @given(logits_and_labels())
    def test_loss_and_log_odds_agree(self, batch):
        odds = outputs.log_odds(IDENTITY, batch).double()
        loss = outputs.loss(IDENTITY, batch).double()
        np.testing.assert_allclose(loss, nn.functional.softplus(-odds), atol=1e-4)

    @given(logits_and_labels())
    def test_a_positive_margin_means_a_correct_answer(self, batch):
        correct = naive_correct(*batch)
        assert (outputs.margin(IDENTITY, batch) > 0).tolist() == correct


def naive_correct(logits, labels):
    """The labelled class has the largest logit, and no other has it too."""
    pairs = zip(logits.tolist(), labels.tolist(), strict=True)
    return [row[label] == max(row) and row.count(max(row)) == 1 for row, label in pairs]


def test_accuracy_can_be_read_off_margins_but_not_off_losses():
    marked = {
        function.__name__
        for function in [*PER_EXAMPLE, *PER_SEQUENCE, outputs.zero_shot_margin]
        if getattr(function, "sign_means_correct", False)
    }
    assert marked == {"margin", "zero_shot_margin"}


class TestTokenMargin:
    # Two sequences of tokens 0/1/2, the second with two padded positions at the end.
    IDS = torch.tensor([[0, 1, 2, 1], [1, 2, 0, 0]])
    ATTENTION = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    LOGITS = torch.tensor(
        [
            [[0.0, 3.0, 1.0], [0.0, 1.0, 5.0], [2.0, 0.0, 0.0], [9.0, 9.0, 9.0]],
            [[1.0, 0.0, 4.0], [0.0, 7.0, 0.0], [math.inf, 0.0, 0.0], [9.0, 9.0, 9.0]],
        ]
    )

    def found(self, **batch):
        return outputs.token_margin(lambda **_: SimpleNamespace(logits=self.LOGITS), batch)

    def test_is_the_mean_over_next_tokens_that_are_not_padding(self):
        # first: next tokens 1, 2, 1 have margins 3-1, 5-1, 0-2; second: next token 2 has margin 4-1
        margins = self.found(input_ids=self.IDS, attention_mask=self.ATTENTION)
        assert margins.tolist() == pytest.approx([(2 + 4 - 2) / 3, 3.0])

    def test_labels_of_minus_100_do_not_count(self):
        labels = torch.tensor([[-100, 1, -100, 1], [-100, 2, -100, -100]])
        assert self.found(input_ids=self.IDS, labels=labels).tolist() == pytest.approx([(2 - 2) / 2, 3.0])

    def test_padding_counts_if_nothing_says_that_it_is_padding(self):
        assert math.isinf(self.found(input_ids=self.IDS)[1])

    def test_what_stands_at_padded_positions_changes_neither_value_nor_gradient(self):
        logits = self.LOGITS.clone().requires_grad_(True)
        batch = {"input_ids": self.IDS, "attention_mask": self.ATTENTION}
        outputs.token_margin(lambda **_: logits, batch).sum().backward()
        assert torch.isfinite(logits.grad).all()
        assert not logits.grad[1, 1:].any()
        assert logits.grad[1, 0].tolist() == [-1.0, 0.0, 1.0]

    @given(st.integers(1, 4), st.integers(2, 6), st.integers(0, 1000))
    def test_is_the_loop_over_tokens(self, rows, time, seed):
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(rows, time, 5, generator=generator)
        labels = torch.randint(0, 5, (rows, time), generator=generator)
        found = outputs.token_margin(lambda **_: logits, {"labels": labels})
        expected = [
            np.mean(naive.margins(logits[r, :-1], labels[r, 1:])) for r in range(rows)
        ]  # the logits at a position speak about the next token
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


class TestTokenLogProbability:
    IDS, ATTENTION, LOGITS = TestTokenMargin.IDS, TestTokenMargin.ATTENTION, TestTokenMargin.LOGITS

    def found(self, logits=LOGITS, **batch):
        return outputs.token_log_probability(lambda **_: SimpleNamespace(logits=logits), batch)

    def test_of_equal_logits_is_the_log_of_one_over_all_tokens(self):
        logits = torch.zeros(2, 4, 3)
        assert self.found(logits, input_ids=self.IDS).tolist() == pytest.approx([-math.log(3)] * 2)

    def test_probabilities_of_counted_tokens_multiply_to_exp_of_count_times_it(self):
        probability = self.LOGITS[0].double().softmax(dim=-1)
        whole = probability[0, 1] * probability[1, 2] * probability[2, 1]
        found = self.found(input_ids=self.IDS, attention_mask=self.ATTENTION)
        assert math.exp(3 * found[0]) == pytest.approx(float(whole), rel=1e-5)

    def test_padding_and_labels_of_minus_100_do_not_count(self):
        labels = torch.tensor([[-100, 1, -100, 1], [-100, 2, -100, -100]])
        first = self.LOGITS[0].double().log_softmax(dim=-1)
        second = self.LOGITS[1, 0].double().log_softmax(dim=-1)[2]
        expected = [float(first[0, 1] + first[2, 1]) / 2, float(second)]
        assert self.found(input_ids=self.IDS, labels=labels).tolist() == pytest.approx(expected, rel=1e-5)
        padded = self.found(input_ids=self.IDS, attention_mask=self.ATTENTION)
        assert padded[1] == pytest.approx(float(second), rel=1e-5)

    def test_what_stands_at_padded_positions_changes_neither_value_nor_gradient(self):
        logits = self.LOGITS.clone().requires_grad_(True)
        batch = {"input_ids": self.IDS, "attention_mask": self.ATTENTION}
        outputs.token_log_probability(lambda **_: logits, batch).sum().backward()
        assert torch.isfinite(logits.grad).all()
        assert not logits.grad[1, 1:].any()
        assert logits.grad[1, 0].abs().sum() > 0

    @given(st.integers(1, 4), st.integers(2, 6), st.integers(0, 1000))
    def test_is_minus_the_mean_cross_entropy_of_counted_tokens(self, rows, time, seed):
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(rows, time, 5, generator=generator) * 10
        labels = torch.randint(0, 5, (rows, time), generator=generator)
        labels[:, 2:][torch.rand(rows, time - 2, generator=generator) < 0.5] = -100
        found = outputs.token_log_probability(lambda **_: logits, {"labels": labels})
        loss = nn.functional.cross_entropy
        expected = [-float(loss(logits[r, :-1], labels[r, 1:])) for r in range(rows)]  # ignores -100
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
        assert (found <= 0).all()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_low_precision_logits_are_read_in_float32(self, dtype):
        found = self.found(self.LOGITS.to(dtype), input_ids=self.IDS, attention_mask=self.ATTENTION)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, self.found(input_ids=self.IDS, attention_mask=self.ATTENTION))


@pytest.mark.parametrize("function", PER_EXAMPLE)
class TestEveryOutput:
    def test_reaches_every_parameter_with_a_gradient(self, function):
        case = make_case("mlp")
        model = case.task.model.requires_grad_(True)
        function(model, case.task.batch(range(5))).sum().backward()
        for name, parameter in model.named_parameters():
            if function is outputs.logit and name.startswith("head"):
                continue  # one logit reaches one row of the head
            assert torch.isfinite(parameter.grad).all(), name
            assert parameter.grad.abs().sum() > 0, name

    def test_depends_on_its_own_example_alone(self, function):
        case = make_case("residual")
        together = function(case.task.model, case.task.batch(range(5)))
        alone = torch.cat([function(case.task.model, case.task.batch([i])) for i in range(5)])
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_low_precision_logits_are_compared_in_float32(self, function, dtype):
        found = function(IDENTITY, (LOGITS.to(dtype), LABELS))
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, function(IDENTITY, (LOGITS.to(dtype).float(), LABELS)))

    def test_double_precision_is_kept(self, function):
        assert function(IDENTITY, (LOGITS.double(), LABELS)).dtype == torch.float64

    def test_labels_may_be_of_a_small_type(self, function):
        found = function(IDENTITY, (LOGITS, LABELS.to(torch.uint8)))
        assert found.tolist() == function(IDENTITY, (LOGITS, LABELS)).tolist()

    def test_a_dictionary_is_passed_by_name_without_the_labels(self, function):
        def model(*, values):
            return SimpleNamespace(logits=values)

        found = function(model, {"values": LOGITS, "labels": LABELS})
        assert found.tolist() == function(IDENTITY, (LOGITS, LABELS)).tolist()


class TestBatchesThatCannotBeRead:
    @pytest.mark.parametrize("batch", [LOGITS, (LOGITS,), (LOGITS, LABELS, LABELS), None])
    def test_another_layout_is_refused(self, batch):
        with refused(OutputError, "(inputs, labels) or a dictionary", type(batch).__name__, "collate"):
            outputs.margin(IDENTITY, batch)

    def test_missing_labels_are_refused(self):
        with refused(OutputError, "no labels", "a key 'labels'", "values"):
            outputs.margin(lambda values: values, {"values": LOGITS})

    @pytest.mark.parametrize("result", [None, (LOGITS,), SimpleNamespace(hidden=LOGITS)])
    def test_a_model_without_logits_is_refused(self, result):
        with refused(OutputError, "no logits", ".logits", type(result).__name__, "output function"):
            outputs.margin(lambda _: result, (LOGITS, LABELS))
