"""Every file in specs/: valid, importable, with the published numbers; the small ones really run."""

import inspect
from pathlib import Path

import numpy as np
import pytest
import torch

import coar
from coar.editing.edit_spec import EditSpec
from coar.recipes import import_object
from coar.spec import StudySpec, build_experiment
from tests.conftest import require_or_skip

FOLDER = Path(__file__).parents[1] / "specs"
FILES = {path.stem: path for path in sorted(FOLDER.glob("*.json"))}
EDITS = {name: EditSpec.load(path) for name, path in FILES.items() if name.startswith("edit_")}
SPECS = {name: StudySpec.load(path) for name, path in FILES.items() if name not in EDITS}
# arXiv 2404.11534: components, ablations, share ablated, examples
PUBLISHED = {
    "cifar_resnet": (2_304, 50_000, 0.10, 10_000),
    "imagenet_resnet50": (22_720, 100_000, 0.05, 50_000),
    "imagenet_vit_b_16": (82_944, 100_000, 0.05, 5_000),
    "gpt2_tinystories": (64_512, 100_000, 0.025, 500),
}
SMALL = {f"{name}_small" for name in PUBLISHED}
LIBRARIES = {"imagenet": ("torchvision", "vision"), "gpt2": ("transformers", "language")}


def need_library(factory):
    module, extra = LIBRARIES.get(factory.split(":")[0].split(".")[-1], ("torch", ""))
    pytest.importorskip(module, reason=coar.errors.install_hint(extra))


def test_there_is_one_of_each_published_study_and_a_small_one_beside_it():
    assert set(SPECS) == {"digits", "digits_gate_gradients"} | set(PUBLISHED) | SMALL


def test_gate_gradients_of_digits_predict_the_ablations_that_rows_of_digits_are():
    rows, gates = SPECS["digits"].to_json(), SPECS["digits_gate_gradients"].to_json()
    assert gates.pop("estimator") == {"name": "gate_gradients", "passes": "auto"}
    assert gates.items() <= rows.items()


@pytest.mark.parametrize("name", FILES)
def test_names_a_task_factory_that_takes_its_arguments(name):
    task = (SPECS | EDITS)[name].experiment.task
    factory = import_object(task.factory)
    assert factory.is_task_factory
    inspect.signature(factory).bind(**task.args)


@pytest.mark.parametrize("name", FILES)
def test_says_nothing_that_a_study_or_an_edit_would_not_keep(name):
    spec = (SPECS | EDITS)[name]
    assert type(spec).from_json(spec.to_json()) == spec


@pytest.mark.parametrize("name", [name for name in EDITS if not name.endswith("_small")])
def test_every_edit_has_a_small_one_that_changes_the_same_thing_and_a_script(name):
    full, small = EDITS[name], EDITS[f"{name}_small"]
    assert small.edit.direction == full.edit.direction
    script = FOLDER.parent / "scripts" / f"{name}.sh"
    require_or_skip("scripts", script.parent.is_dir(), "an installation without scripts/")
    assert name in script.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", PUBLISHED)
def test_has_the_published_numbers(name):
    _, rows, fraction, examples = PUBLISHED[name]
    spec = SPECS[name]
    assert spec.estimator.num_rows == rows
    assert spec.design.ablation_fraction == fraction
    assert (spec.experiment.bias, spec.experiment.value) == ("keep", "zero")
    args = spec.experiment.task.args
    total = {"cifar_resnet": 10_000, "gpt2_tinystories": args.get("num_examples")}.get(name, 50_000)
    assert total // args.get("stride", 1) == examples


@pytest.mark.parametrize("name", PUBLISHED)
def test_selects_the_published_components(name):
    components, *_ = PUBLISHED[name]
    need_library(SPECS[name].experiment.task.factory)
    with torch.device("meta"):  # shapes without numbers
        model = full_network(name)
    found = coar.find_components(model, published=SPECS[name].experiment.components.published)
    assert len(found) == components


def full_network(name):
    if name == "cifar_resnet":
        return import_object("coar.tasks.cifar_networks:PublishedCifarResNet")()
    if name == "gpt2_tinystories":
        transformers = pytest.importorskip("transformers")
        return transformers.GPT2LMHeadModel(transformers.GPT2Config())  # its defaults are GPT-2
    models = pytest.importorskip("torchvision.models")
    return models.get_model(SPECS[name].experiment.task.args["network"], weights=None)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_small_study_differs_in_size_alone(name):
    full, small = SPECS[name], SPECS[f"{name}_small"]
    assert small.experiment.task.factory == full.experiment.task.factory
    assert small.experiment.task.args["small"] is True
    assert small.experiment.components == full.experiment.components
    assert small.design == full.design
    assert set(small.outputs) == set(full.outputs)
    assert small.estimator.num_rows <= 1_000


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SMALL))
def test_the_small_study_runs(name):
    spec = SPECS[name]
    need_library(spec.experiment.task.factory)
    experiment = build_experiment(spec)
    assert set(experiment.columns) == set(spec.outputs)
    masks = np.ones((2, len(experiment.components)), dtype=bool)
    masks[1, ::20] = False
    (rows,) = experiment.prepare(torch.device("cpu"))(masks).values()
    assert np.isfinite(rows).all()
    assert np.abs(rows[0] - rows[1]).max() > 0.01


def test_there_is_a_script_for_every_published_study():
    scripts = "".join(path.read_text() for path in (FOLDER.parent / "scripts").glob("estimate_*.sh"))
    require_or_skip("scripts", bool(scripts), "an installation without scripts/")
    assert all(f'estimate.sh" {name} ' in scripts for name in PUBLISHED)
