"""How many components full-size networks have, with the call that gives them; weights are never made."""

import importlib
from functools import cache

import pytest
import torch

from coar.discovery import find_components
from coar.tasks.cifar_networks import PublishedCifarResNet
from tests.conftest import require_or_skip


def on_meta(library, build):
    """A model without storage."""
    require_or_skip(library, importlib.util.find_spec(library) is not None, f"{library} is not installed")
    with torch.device("meta"):
        return build(importlib.import_module(library))


@cache
def _resnet50():
    return on_meta("torchvision", lambda library: library.models.resnet50(weights=None))


class TestResNet50:
    @pytest.fixture
    def model(self):
        return _resnet50()

    def test_all_filters(self, model):
        assert len(find_components(model, kinds=["conv_filter"])) == 26_560

    def test_published_filters_leave_shortcuts_out(self, model):
        assert len(find_components(model, include=["*conv*"])) == 22_720
        assert find_components(model, published="resnet50") == find_components(model, include=["*conv*"])

    def test_blocks(self, model):
        assert len(find_components(model, kinds=["block"])) == 3 + 4 + 6 + 3


class TestResNet18:
    def test_filters(self):
        model = on_meta("torchvision", lambda library: library.models.resnet18(weights=None))
        assert len(find_components(model, kinds=["conv_filter"])) == 4_800
        assert len(find_components(model, kinds=["conv_filter"], include=["*conv*"])) == 3_904
        assert len(find_components(model, kinds=["block"])) == 8


class TestPublishedCifarNetwork:
    def test_filters(self):
        with torch.device("meta"):
            model = PublishedCifarResNet()
        assert len(find_components(model, published="cifar_resnet")) == 2_304
        assert len(find_components(model, kinds=["conv_filter"])) == 2_304
        assert len(find_components(model, kinds=["block"])) == 4


@cache
def _vit_b_16():
    return on_meta("torchvision", lambda library: library.models.vit_b_16(weights=None))


class TestVitB16:
    @pytest.fixture
    def model(self):
        return _vit_b_16()

    def test_published_neurons(self, model):
        assert len(find_components(model, published="vit_b_16")) == 82_944
        assert len(find_components(model, kinds=["neuron"])) == 82_944

    def test_heads_and_hidden_neurons(self, model):
        assert len(find_components(model, kinds=["attention_head"])) == 144
        assert len(find_components(model, kinds=["mlp_neuron"])) == 36_864
        assert len(find_components(model, kinds=["attention_neuron"])) == 12 * 3 * 768
        assert len(find_components(model, kinds=["block"])) == 24


@cache
def _gpt2():
    return on_meta("transformers", lambda library: library.GPT2LMHeadModel(library.GPT2Config()))


class TestGpt2:
    @pytest.fixture
    def model(self):
        return _gpt2()

    def test_published_rows_are_what_layers_read(self, model):
        assert len(find_components(model, kinds=["conv1d_input_row"])) == 64_512
        assert len(find_components(model, published="gpt2")) == 64_512

    def test_neurons_are_what_layers_emit(self, model):
        assert len(find_components(model, kinds=["neuron"])) == 82_944

    def test_heads_and_hidden_neurons(self, model):
        assert len(find_components(model, kinds=["attention_head"])) == 144
        assert len(find_components(model, kinds=["mlp_neuron"])) == 36_864
        assert len(find_components(model, kinds=["attention_head", "mlp_neuron"])) == 144 + 36_864
        assert len(find_components(model, kinds=["block"])) == 24
