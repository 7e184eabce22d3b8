import copy
import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from coar.errors import TaskError
from coar.fingerprints import digest_value, model_fingerprint
from tests.cases import CASES, make_model
from tests.refused import refused

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4)
nested = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3), max_leaves=8)


@pytest.mark.parametrize("name", CASES)
class TestModelFingerprint:
    def test_a_copy_is_recognised(self, name):
        model = make_model(name)
        assert model_fingerprint(copy.deepcopy(model)) == model_fingerprint(model)

    def test_every_single_number_counts(self, name):
        model = make_model(name)
        before = model_fingerprint(model)
        for tensor in model.state_dict().values():
            first = tensor.reshape(-1)[:1]
            kept = first.clone()
            first += 1
            assert model_fingerprint(model) != before
            first.copy_(kept)
        assert model_fingerprint(model) == before


def test_the_class_of_a_module_counts():
    relu, tanh = nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    tanh.load_state_dict(relu.state_dict())
    assert model_fingerprint(relu) != model_fingerprint(tanh)


def test_a_name_of_a_parameter_counts():
    first, second = nn.Module(), nn.Module()
    first.one, second.two = (nn.Parameter(torch.ones(2)) for _ in range(2))
    assert model_fingerprint(first) != model_fingerprint(second)


def test_precision_counts():
    model = make_model("mlp")
    assert model_fingerprint(copy.deepcopy(model).double()) != model_fingerprint(model)


class TestDigestValue:
    @given(nested, nested)
    def test_tells_plain_values_apart(self, ours, theirs):
        assert (digest_value(ours) == digest_value(theirs)) == (repr(ours) == repr(theirs))

    def test_knows_a_tensor_by_its_numbers_not_by_its_memory(self):
        tensor = torch.arange(6.0).view(2, 3)
        assert digest_value(tensor.T.contiguous().T) == digest_value(tensor)
        assert digest_value(tensor.clone().requires_grad_()) == digest_value(tensor)
        assert digest_value(tensor.numpy()) == digest_value(tensor)
        assert digest_value(tensor.T) != digest_value(tensor)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.uint8])
    def test_reads_every_usual_type(self, dtype):
        zeros = torch.zeros(3, dtype=dtype)
        ones = torch.ones(3, dtype=dtype)
        assert digest_value(zeros) == digest_value(zeros.clone())
        assert digest_value(zeros) != digest_value(ones)

    def test_a_dictionary_is_known_whatever_the_order_of_its_keys(self):
        first = {"ids": torch.tensor([1]), "mask": [True]}
        assert digest_value(first) == digest_value(dict(reversed(first.items())))
        assert digest_value(first) != digest_value(first | {"mask": [False]})

    def test_numbers_of_numpy_are_read(self):
        assert digest_value(np.float32(1)) == digest_value(np.ones((), np.float32))

    @pytest.mark.parametrize("value", [object(), {1, 2}, hashlib])
    def test_what_cannot_be_recognised_again_is_refused(self, value):
        with refused(TaskError, "cannot be recognised", "tensors, arrays", type(value).__name__, "collate"):
            digest_value([value])

    def test_an_array_of_objects_is_refused_too(self):
        with refused(TaskError, "cannot be recognised", "tensors, arrays", "object", "collate"):
            digest_value(np.array([object()], dtype=object))
