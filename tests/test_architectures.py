"""What the rules find in the architectures of four libraries, and that ablating it means what it says."""

import copy
import re
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from coar.discovery import find_components, kinds
from coar.errors import ComponentError
from coar.gates import ScaledWeights, ablated_copy
from coar.kinds.registry import RULES
from coar.tasks.cifar_networks import resnet20
from coar.tasks.digits import DigitsResNet
from coar.testing import check_components
from tests.architectures import ARCHITECTURES, COUNTS, build, randomise, run
from tests.cases import random_numbers
from tests.refused import refused

BOUND = 2e-5  # float32, outputs around 1
PAIRS = [(name, kind) for name, counts in COUNTS.items() for kind in counts]


def having(kind):
    return [name for name, counts in COUNTS.items() if kind in counts]


def without(model, components, index, example):
    """Outputs with one component ablated."""
    keep = components.keep_mask([index])
    return run(ablated_copy(model, components, keep), example)


@contextmanager
def hooked(model, path, change, before=False):
    """Replace what a module reads or emits."""
    module = model.get_submodule(path)
    calls = []

    def on_input(_, args):
        calls.append(path)
        return (change(args[0]), *args[1:])

    def on_output(_, __, out):
        calls.append(path)
        return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

    hook = module.register_forward_pre_hook(on_input) if before else module.register_forward_hook(on_output)
    yield
    hook.remove()
    assert calls, f"{path} was never called: the hook checks nothing"


def zeroing(entries):
    def change(x):
        x = x.clone()
        x[..., entries] = 0
        return x

    return change


def close(a, b):
    return float((a - b).abs().max()) <= BOUND * max(1.0, float(b.abs().max()))


def test_every_architecture_is_counted():
    assert set(COUNTS) == set(ARCHITECTURES)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_found_was_counted_by_hand(name):
    model, _ = build(name)
    found = {}
    for kind in kinds():
        try:
            found[kind] = len(find_components(model, kinds=[kind]))
        except ComponentError as error:
            assert "no component found" in str(error)  # noqa: PT017  most kinds are in some models only
    assert found == COUNTS[name]


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_ablation_equals_a_literal_rebuild(name, kind):
    model, example = build(name)
    components = find_components(model, kinds=[kind])
    untouched = run(model, example)
    gated = ScaledWeights(copy.deepcopy(model), components)
    effects = []
    for group, flat in components.slices():
        number = group.count // 2
        gated.set(components.keep_mask([flat.start + number]))
        literal = run(rebuilt(model, group, number), example)
        assert close(run(gated.model, example), literal), group.name
        effects.append(float((literal - untouched).abs().max()))
    gated.set(np.ones(len(components), dtype=bool))
    assert torch.equal(run(gated.model, example), untouched)
    assert np.median(effects) > 1e-3, "ablating does nothing: the comparison is empty"


# Examples that meet in the model (every image with every text), and an MLP that no example goes through.
ONE_GATE_VECTOR = {"clip", "swin_v2"}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_components_keep_the_contract(name, kind):
    model, example = build(name)
    components = find_components(model, kinds=[kind])
    check_components(model, components, example, per_example=name not in ONE_GATE_VECTOR)


def rebuilt(model, group, number):
    """A copy with one component's slice at zero, by hand."""
    model = copy.deepcopy(model)
    module = model.get_submodule(group.module)
    start = group.offset + number * group.width
    with torch.no_grad():
        getattr(module, group.parameter).narrow(group.dimension, start, group.width).zero_()
        if group.whole and group.bias:
            getattr(module, group.bias).zero_()
    return model


# Output projection below the group's name, and a head's width, written down by hand.
PROJECTIONS = {
    "timm_vit": ("proj", 4),
    "gpt2": ("c_proj", 4),
    "gpt_neox": ("dense", 4),
    "llama": ("o_proj", 4),
    "phi": ("dense", 4),
    "phi3": ("o_proj", 4),
    "qwen2": ("o_proj", 4),
    "gemma2": ("o_proj", 8),
    "bert": ("output.dense", 4),
    "t5": ("o", 3),
    "t5_gated": ("o", 3),
    "hf_vit": ("o_proj", 4),
    "clip": ("out_proj", 4),
}


# Rows of a head's values in the fused projection: where modules are bypassed, no hook fires.
FUSED = {
    "vit": "in_proj_",
    "torch_encoder": "in_proj_",
    "swin": "qkv.",
    "swin_v2": "qkv.",
    "timm_vit": "qkv.",
}


class TestHeads:
    def test_all_models_with_some_are_here(self):
        bare = {"gpt2_bare", "llama_bare", "bert_bare"}
        assert set(PROJECTIONS) | set(FUSED) == set(having("attention_head")) - bare

    @pytest.mark.parametrize("name", PROJECTIONS)
    def test_ablating_one_zeroes_its_slice_of_what_the_projection_reads(self, name):
        model, example = build(name)
        components = find_components(model, kinds=["attention_head"])
        path, width = PROJECTIONS[name]
        for group, flat in components.slices():
            head = group.count - 1
            own = slice(head * width, (head + 1) * width)
            with hooked(model, f"{group.name}.{path}", zeroing(own), before=True):
                expected = run(model, example)
            assert close(without(model, components, flat.start + head, example), expected), group.name

    @pytest.mark.parametrize("name", FUSED)
    def test_ablating_one_equals_values_of_zero(self, name):
        model, example = build(name)
        components = find_components(model, kinds=["attention_head"])
        for group, flat in components.slices():
            edited = copy.deepcopy(model)
            values = [edited.get_parameter(f"{group.name}.{FUSED[name]}{key}") for key in ("weight", "bias")]
            width, head = len(values[0]) // 3, group.count - 1
            start = 2 * width + head * (width // group.count)
            for value in values:
                value.data[start : start + width // group.count] = 0
            expected = run(edited, example)
            assert close(without(model, components, flat.start + head, example), expected), group.name

    def test_the_fused_path_of_an_encoder_is_what_runs(self, monkeypatch):
        model, example = build("torch_encoder")
        fused, calls = torch._transformer_encoder_layer_fwd, []
        monkeypatch.setattr(
            torch, "_transformer_encoder_layer_fwd", lambda *args: calls.append(1) or fused(*args)
        )
        run(
            ablated_copy(
                model,
                components := find_components(model, kinds=["attention_head"]),
                components.keep_mask([0]),
            ),
            example,
        )
        assert len(calls) == 2, "without it the comparisons of torch_encoder show less than they say"

    def test_query_heads_are_counted_where_keys_and_values_are_shared(self):
        model, _ = build("llama")
        group = find_components(model, kinds=["attention_head"]).groups[0]
        assert (group.count, group.width, group.module) == (4, 4, "model.layers.0.self_attn.o_proj")
        assert (group.name, group.side, group.bias) == ("model.layers.0.self_attn", "input", None)


# Module below the model whose output the hidden units are (or whose input, where no module emits them).
HIDDEN = {
    "convnext": (lambda name: name.removesuffix("3") + "4", False),  # the GELU
    "swin": (lambda name: f"{name}.1", False),
    "vit": (lambda name: f"{name}.1", False),
    "timm_vit": (lambda name: f"{name}.act", False),
    "timm_convnext": (lambda name: f"{name}.act", False),
    "gpt2": (lambda name: f"{name}.act", False),
    "gpt_neox": (lambda name: f"{name}.act", False),
    "llama": (lambda name: f"{name}.down_proj", True),
    "phi": (lambda name: f"{name}.activation_fn", False),
    "phi3": (lambda name: f"{name}.down_proj", True),
    "qwen2": (lambda name: f"{name}.down_proj", True),
    "gemma2": (lambda name: f"{name}.down_proj", True),
    "bert": (lambda name: name, False),  # BertIntermediate
    "t5": (lambda name: f"{name}.dropout", False),
    "t5_gated": (lambda name: f"{name}.dropout", False),
    "hf_vit": (lambda name: f"{name}.activation_fn", False),
    "clip": (lambda name: f"{name}.activation_fn", False),
    "torch_encoder": (lambda name: name.replace("linear1", "dropout"), False),
}


class TestMlpNeurons:
    def test_all_models_with_some_are_here(self):
        bare = {"gpt2_bare", "llama_bare", "bert_bare"}
        assert set(HIDDEN) == set(having("mlp_neuron")) - bare - {"swin_v2"}

    @pytest.mark.parametrize("name", HIDDEN)
    def test_ablating_one_zeroes_the_activation(self, name):
        model, example = build(name)
        components = find_components(model, kinds=["mlp_neuron"])
        place, before = HIDDEN[name]
        for group, flat in components.slices():
            with hooked(model, place(group.name), zeroing(5), before):
                expected = run(model, example)
            assert close(without(model, components, flat.start + 5, example), expected), group.name

    def test_a_gated_unit_is_named_by_its_mlp(self):
        model, _ = build("llama")
        group = find_components(model, kinds=["mlp_neuron"]).groups[0]
        assert (group.name, group.module) == ("model.layers.0.mlp", "model.layers.0.mlp.down_proj")

    def test_an_mlp_without_a_module_is_named_by_the_layer_that_emits_its_units(self):
        model, _ = build("bert")
        groups = find_components(model, kinds=["mlp_neuron"], include=["bert.encoder.layer.1"]).groups
        assert [group.name for group in groups] == ["bert.encoder.layer.1.intermediate"]


# The module whose output is all that a branch adds, where it is not the one that names the group.
BRANCHES = {
    "resnet18": lambda name: f"{name}.bn2",
    "resnet50": lambda name: f"{name}.bn3",
    "convnext": lambda name: f"{name}.block",
    "mobilenet_v2": lambda name: f"{name}.conv",
    "mobilenet_v3": lambda name: f"{name}.block",
    "efficientnet": lambda name: f"{name}.block",
    "swin_v2": lambda name: name.replace("attn", "norm1").replace("mlp", "norm2"),
    "timm_resnet": lambda name: f"{name}.se",
    "timm_convnext": lambda name: f"{name}.mlp",
    "gemma2": lambda name: name.replace("self_attn", "post_attention_layernorm").replace(
        "mlp", "post_feedforward_layernorm"
    ),
    "bert": lambda name: name.replace(".attention", ".attention.output.dropout").replace(
        "intermediate", "output.dropout"
    ),
    "torch_encoder": lambda name: name.replace("self_attn", "dropout1").replace("linear1", "dropout2"),
}


class TestBlocks:
    @pytest.mark.parametrize("name", [name for name in having("block") if not name.endswith("_bare")])
    @pytest.mark.parametrize("bias", ["keep", "ablate"])
    def test_ablating_one_skips_the_branch(self, name, bias):
        model, example = build(name)
        components = find_components(model, kinds=["block"])
        for index, group in enumerate(components):
            branch = BRANCHES.get(name, lambda name: name)(group.name)
            with hooked(model, branch, torch.zeros_like):
                expected = run(model, example)
            keep = components.keep_mask([index])
            assert close(run(ablated_copy(model, components, keep, bias), example), expected), group.name

    @pytest.mark.parametrize(
        ("make", "size", "count"), [(DigitsResNet, (2, 1, 8, 8), 3), (resnet20, (2, 3, 32, 32), 9)]
    )
    def test_of_our_own_networks(self, make, size, count):
        torch.manual_seed(0)
        model = make().eval()
        randomise(model)
        components, example = find_components(model, kinds=["block"]), random_numbers(*size)
        assert len(components) == count
        for index, group in enumerate(components):
            with hooked(model, f"{group.name}.bn2", torch.zeros_like):
                expected = run(model, example)
            assert close(without(model, components, index, example), expected)

    def test_one_that_changes_the_shape_without_a_shortcut_is_none(self):
        model, _ = build("efficientnet")
        names = [group.name for group in find_components(model, kinds=["block"])]
        assert names == ["features.1.0", "features.2.0", "features.3.1"]

    def test_all_of_them_leave_the_embedding(self):
        model, example = build("llama_bare")
        components = find_components(model, kinds=["block"])
        edited = ablated_copy(model, components, np.zeros(len(components), dtype=bool))
        expected = model.norm(model.embed_tokens(example["input_ids"])).detach()
        assert close(run(edited, example), expected.flatten())

    def test_a_batch_norm_without_weights_is_refused(self):
        model, _ = build("resnet18")
        model.layer1[0].bn2 = nn.BatchNorm2d(64, affine=False)
        with refused(ComponentError, "branch of layer1.0", "bn2 with a weight", "BatchNorm2d without one"):
            find_components(model, kinds=["block"])
        assert len(find_components(model, kinds=["block"], exclude=["layer1.0"])) == 3

    def test_frozen_batch_norm_is_refused(self):
        model, _ = build("mobilenet_v2")
        from torchvision.ops import FrozenBatchNorm2d

        model.features[3].conv[3] = FrozenBatchNorm2d(8)
        with refused(ComponentError, "branch of features.3", "FrozenBatchNorm2d without one"):
            find_components(model, kinds=["block"])


class TestSeveralKinds:
    @pytest.mark.parametrize("name", ["gpt2", "vit"])
    def test_may_overlap_if_asked_for(self, name):
        model, example = build(name)
        components = find_components(model, kinds=list(COUNTS[name]), overlap=True)
        assert len(components) == sum(COUNTS[name].values())
        assert len(set(components.names)) == len(components)
        with pytest.raises(ComponentError, match="components overlap"):
            find_components(model, kinds=list(COUNTS[name]))
        edited = ablated_copy(model, components, components.keep_mask([0, len(components) - 1]))
        assert not close(run(edited, example), run(model, example))

    def test_of_one_module_have_their_kind_in_their_names(self):
        model, _ = build("gpt2")
        components = find_components(model, kinds=["attention_head", "block", "mlp_neuron"], overlap=True)
        layer = [group.name for group in components if group.name.startswith("transformer.h.0.")]
        assert sorted(layer) == [
            "transformer.h.0.attn.attention_head",
            "transformer.h.0.attn.block",
            "transformer.h.0.mlp.block",
            "transformer.h.0.mlp.mlp_neuron",
        ]

    def test_of_different_modules_need_no_overlap(self):
        model, _ = build("gpt2")
        components = find_components(model, kinds=["attention_head", "mlp_neuron"])
        assert components.names[0] == "transformer.h.0.attn[0]"
        assert len(components) == 4 + 24


class TestOutputHeads:
    @pytest.mark.parametrize(
        ("name", "last"),
        [
            ("gpt2_bare", "h.1.mlp.c_proj"),
            ("llama_bare", "layers.1.mlp.down_proj"),
            ("bert_bare", "pooler.dense"),
            ("torch_encoder", "layers.1.linear2"),
            ("clip", "text_projection"),
        ],
    )
    def test_a_model_without_one_keeps_all_layers(self, name, last):
        components = find_components(build(name)[0], kinds=["neuron"])
        assert components.left_out == ()
        assert components.groups[-1].name == last

    @pytest.mark.parametrize(
        ("name", "head"),
        [
            ("gpt2", "lm_head"),
            ("t5", "lm_head"),
            ("llama", "lm_head"),
            ("bert", "classifier"),
            ("hf_vit", "classifier"),
            ("vit", "heads.head"),
            ("swin", "head"),
            ("convnext", "classifier.2"),
            ("mobilenet_v3", "classifier.3"),
            ("timm_vit", "head"),
            ("timm_convnext", "head.fc"),
        ],
    )
    def test_is_left_out(self, name, head):
        assert find_components(build(name)[0], kinds=["neuron"]).left_out == (head,)

    def test_is_found_by_name(self):
        components = find_components(build("llama")[0], kinds=["neuron"], include=["lm_head"])
        assert len(components) == 20

    def test_tied_to_the_embedding_is_refused(self):
        with refused(ComponentError, "lm_head shares its weight", "wte"):
            find_components(build("gpt2")[0], kinds=["neuron"], include=["lm_head"])


def library_class(name, children, **attributes):
    """A module of a class as a library would have it."""
    cls = type(name, (nn.Module,), {"__module__": "transformers.models.new.modeling_new"})
    module = cls()
    for key, child in children.items():
        module.add_module(key, child)
    for key, value in attributes.items():
        setattr(module, key, value)
    return nn.ModuleDict({"layer": module})


class TestUnknownLayouts:
    """Never a wrong slice: what does not add up is refused, with the way out."""

    def test_a_projection_that_reads_something_else_than_heads(self):
        model = library_class("NewAttention", {"o_proj": nn.Linear(12, 8)}, num_heads=2, head_dim=4)
        words = ["attention in layer (NewAttention)", "2 heads of 4 entries", "12 entries", "component_rule"]
        with refused(ComponentError, *words):
            find_components(model, kinds=["attention_head"])

    def test_a_projection_that_is_not_linear(self):
        model = library_class("NewAttention", {"proj": nn.Conv2d(8, 8, 1)}, num_heads=2)
        with refused(ComponentError, "Conv2d 'proj'", "neither Linear nor Conv1D"):
            find_components(model, kinds=["attention_head"])

    def test_heads_without_a_known_projection(self):
        children = {"query": nn.Linear(8, 8), "mixing": nn.Linear(8, 8)}
        model = library_class("NewAttention", children, num_heads=2)
        with refused(ComponentError, "o_proj, out_proj", "query, mixing", "exclude=['layer']"):
            find_components(model, kinds=["attention_head"])

    def test_heads_that_are_interleaved(self):
        model = library_class("Attention", {"proj": nn.Linear(8, 8)}, num_heads=2)
        type(model["layer"]).__module__ = "timm.models.nest"
        with refused(ComponentError, "heads joined one after the other"):
            find_components(model, kinds=["attention_head"])

    def test_an_excluded_module_does_not_stand_in_the_way(self):
        model = library_class("NewAttention", {"mixing": nn.Linear(8, 8)}, num_heads=2)
        model["other"] = nn.MultiheadAttention(8, 2)
        found = find_components(model, kinds=["attention_head"], exclude=["layer"])
        assert found.names == ("other[0]", "other[1]")

    def test_an_mlp_with_unknown_names(self):
        model = library_class("NewMLP", {"a": nn.Linear(8, 12), "b": nn.Linear(12, 8)})
        with refused(ComponentError, "MLP in layer (NewMLP)", "a, b", "component_rule"):
            find_components(model, kinds=["mlp_neuron"])

    def test_projections_of_an_mlp_that_do_not_fit_together(self):
        model = library_class("NewMLP", {"fc1": nn.Linear(8, 12), "fc2": nn.Linear(4, 8)})
        with refused(ComponentError, "fc1 emits what fc2 reads: 4 entries", "[12]"):
            find_components(model, kinds=["mlp_neuron"])

    def test_experts_in_one_parameter(self):
        model = library_class("NewExperts", {})
        with refused(ComponentError, "NewExperts", "experts in one parameter"):
            find_components(model, kinds=["mlp_neuron"])

    def test_blocks_that_end_in_a_norm_of_their_own(self):
        model = library_class("OtherLayer", {})
        type(model["layer"]).__module__ = "transformers.models.swinv2.modeling_swinv2"
        with refused(ComponentError, "branches of layer", "ends in a LayerNorm"):
            find_components(model, kinds=["block"])


def test_the_examples_of_the_page_run():
    page = (Path(__file__).parents[1] / "docs" / "components.md").read_text(encoding="utf-8")
    examples = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(examples) == 2
    try:
        for example in examples:
            exec(compile(example, "docs/components.md", "exec"), {"__name__": "my_layers"})
    finally:
        RULES.pop("expert", None)


def test_the_page_names_every_kind():
    page = (Path(__file__).parents[1] / "docs" / "components.md").read_text(encoding="utf-8")
    assert [kind for kind in kinds() if f"| `{kind}` |" not in page] == []
