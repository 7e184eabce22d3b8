"""Exported edits: the file alone, read into a fresh instance of the class, gives the edited outputs."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import coar
from coar.editing import Edit, export_edited, load_exported, removed
from coar.errors import EditError, StoreError
from coar.task import Task
from coar.tasks.cifar_networks import build_network
from tests.refused import refused


def network():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3, bias=False),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5),
    )  # fmt: skip
    for _ in range(3):
        model(torch.randn(8, 3, 8, 8))
    return model.eval()


def an_edit(model, images, indices):
    task = Task(model, torch.utils.data.TensorDataset(images, torch.zeros(len(images), dtype=torch.int64)))
    experiment = coar.ComponentAblation(task, coar.find_components(model, kinds=["conv_filter"]))
    return Edit.of(experiment, indices)


IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("inputs", [None, IMAGES], ids=["zeroed", "removed"])
def test_the_file_alone_gives_the_edited_outputs(tmp_path, inputs):
    model = network()
    edit = an_edit(model, IMAGES, [1, 4, 7])
    before = copy.deepcopy(model.state_dict())
    path = export_edited(model, edit, tmp_path / "edited.safetensors", inputs)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    torch.manual_seed(9)
    fresh = copy.deepcopy(model)
    for parameter in fresh.parameters():
        nn.init.normal_(parameter)
    found = load_exported(fresh, path)
    with torch.no_grad():
        expected = edit.apply(model)(IMAGES)
        torch.testing.assert_close(found(IMAGES), expected, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(fresh(IMAGES), expected)
    smaller = removed(model, edit, IMAGES).model if inputs is not None else edit.apply(model)
    sizes = {name: tuple(value.shape) for name, value in smaller.state_dict().items()}
    assert {name: tuple(value.shape) for name, value in found.state_dict().items()} == sizes
    assert found[0].out_channels == found[0].weight.shape[0] == (6 if inputs is None else 4)
    assert export_edited(model, edit, path, inputs) == path  # the same again


def test_a_zeroed_file_fits_the_class_itself(tmp_path):
    model = network()
    edit = an_edit(model, IMAGES, [2])
    path = export_edited(model, edit, tmp_path / "edited.safetensors")
    fresh = network()
    fresh.load_state_dict(load_file(path))
    torch.testing.assert_close(fresh(IMAGES), edit.apply(model)(IMAGES))


def test_a_residual_network_goes_there_and_back(tmp_path):
    torch.manual_seed(0)
    model = build_network("resnet8").eval()
    images = torch.randn(2, 3, 32, 32)
    edit = an_edit(model, images, np.arange(0, 240, 7))
    path = export_edited(model, edit, tmp_path / "edited.safetensors", images)
    found = load_exported(build_network("resnet8"), path)
    with torch.no_grad():
        torch.testing.assert_close(found(images), edit.apply(model)(images), rtol=1e-4, atol=1e-5)
    counts = [sum(parameter.numel() for parameter in m.parameters()) for m in (found, model)]
    assert counts[0] < counts[1]


def test_tied_weights_stay_tied(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=2, n_embd=16, n_head=2, vocab_size=11, n_positions=8, use_cache=False,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    examples = [{"input_ids": torch.arange(6)}]
    task = Task(model, examples, outputs={"token_margin": coar.outputs.token_margin})
    experiment = coar.ComponentAblation(task, coar.find_components(model, kinds=["mlp_neuron"]))
    edit = Edit.of(experiment, [0, 3, 70])
    path = export_edited(model, edit, tmp_path / "e.safetensors", {"input_ids": torch.arange(6)[None]})
    found = load_exported(transformers.GPT2LMHeadModel(config), path)
    assert found.lm_head.weight is found.transformer.wte.weight
    assert found.transformer.h[0].mlp.c_fc.weight.shape[1] == 62
    ids = torch.arange(6)[None]
    with torch.no_grad():
        torch.testing.assert_close(found(ids).logits, edit.apply(model)(ids).logits, rtol=1e-4, atol=1e-5)


def test_what_is_no_export_is_refused(tmp_path):
    model = network()
    edit = an_edit(model, IMAGES, [2])
    path = export_edited(model, edit, tmp_path / "edited.safetensors")
    with refused(EditError, "another kind of model", "0.weight"):
        load_exported(nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), path)
    with refused(StoreError, "no exported edit"):
        load_exported(model, tmp_path / "nothing.safetensors")
    save_file({"0.weight": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with refused(StoreError, "no exported edit", "export_edited"):
        load_exported(model, tmp_path / "foreign.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:-9])
    with refused(StoreError, "no exported edit"):
        load_exported(model, tmp_path / "cut.safetensors")
    other = an_edit(network(), IMAGES, [3])
    with refused(StoreError, "another"):
        export_edited(network(), other, path)


def test_buffers_go_where_the_model_is(tmp_path):
    model = network()
    edit = an_edit(model, IMAGES, [1, 4])
    path = export_edited(model, edit, tmp_path / "edited.safetensors")
    with torch.device("meta"):
        found = load_exported(nn.Sequential(*copy.deepcopy(list(model))).to("meta").eval(), path)
    assert {tensor.device.type for tensor in found.state_dict().values()} == {"meta"}


def test_a_model_of_another_size_is_refused(tmp_path):
    model = network()
    path = export_edited(model, an_edit(model, IMAGES, [2]), tmp_path / "edited.safetensors")
    wider = copy.deepcopy(model)
    wider[7] = nn.Linear(4, 9)
    with refused(EditError, "another kind of model", "7.bias [9]", "7.bias [5]"):
        load_exported(wider, path)
