"""Spec: strict, round-trips, says what is wrong, and rebuilds the very experiment."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coar.editing.edit_spec import EditSpec
from coar.errors import SpecError
from coar.spec import StudySpec, build_experiment, differences
from coar.testing import SubsetMean, linear_experiment

VALID = {
    "format": 1,
    "experiment": {
        "name": "component_ablation",
        "task": {"factory": "coar.testing.toys:linear_task", "args": {"num_components": 6}},
        "components": {"kinds": ["neuron"], "include": ["hidden"], "exclude": []},
        "bias": "keep",
        "value": "zero",
    },
    "estimator": {"name": "rows", "num_rows": 40},
    "design": {"name": "bernoulli", "ablation_fraction": 0.25, "seed": 3, "stream": "fit"},
    "outputs": {"score": {"dtype": "float32"}},
    "execution": {"device": "auto", "batch_size": "auto", "precision": "auto"},
}


def changed(path, value):
    """VALID with one place replaced, added or (value is ...) removed."""
    spec = json.loads(json.dumps(VALID))
    place = spec
    for key in path[:-1]:
        place = place[key]
    if value is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return spec


designs = st.one_of(
    st.builds(
        lambda f, s: {"name": "bernoulli", "ablation_fraction": f, "seed": s, "stream": "fit"},
        st.floats(0.001, 0.999),
        st.integers(0, 2**63 - 1),
    ),
    st.builds(
        lambda f: {"name": "fixed_size", "ablation_fraction": f, "seed": 0, "stream": "evaluation"},
        st.floats(0.001, 0.999),
    ),
    st.just({"name": "leave_one_out"}),
)


@given(
    design=designs,
    rows=st.integers(1, 10**9),
    names=st.lists(st.from_regex(r"[a-z][a-z0-9_.-]{0,20}", fullmatch=True), min_size=1, unique=True),
    dtype=st.sampled_from(["float32", "float16"]),
    value=st.one_of(st.just("zero"), st.floats(-10, 10)),
    patterns=st.lists(st.text(min_size=1, max_size=10), min_size=1),
)
def test_any_valid_spec_survives_json(design, rows, names, dtype, value, patterns):
    spec = changed(("design",), design)
    spec["estimator"]["num_rows"] = rows
    spec["outputs"] = {name: {"dtype": dtype} for name in names}
    spec["experiment"]["value"] = value
    spec["experiment"]["components"]["include"] = patterns
    first = StudySpec.from_json(spec)
    second = StudySpec.from_json(json.loads(json.dumps(first.to_json())))
    assert second == first
    assert second.digest == first.digest
    assert first.to_json() == spec


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("desing",), {}, "desing"),
        (("experiment", "kidns"), [], "kidns"),
        (("design", "sed"), 1, "sed"),
        (("format",), 2, "newer"),
        (("format",), ..., "format"),
        (("format",), "1", "format"),
        (("design", "ablation_fraction"), 0.0, "ablation_fraction"),
        (("design", "ablation_fraction"), 1.0, "ablation_fraction"),
        (("design", "ablation_fraction"), "0.1", "ablation_fraction"),
        (("design", "seed"), -1, "seed"),
        (("design", "name"), "gaussian", "gaussian"),
        (("estimator", "num_rows"), -5, "num_rows"),
        (("estimator", "num_rows"), True, "num_rows"),
        (("estimator", "num_rows"), ..., "num_rows"),
        (("outputs", "score", "dtype"), "int8", "float32"),
        (("outputs", "../x"), {"dtype": "float32"}, "../x"),
        (("experiment", "value"), "median", "zero"),
        (("experiment", "bias"), "drop", "keep"),
        (("experiment", "name"), "../x", "component_ablation"),
        (("execution", "batch_size"), 0, "batch_size"),
        (("execution", "precision"), "int4", "float32"),
    ],
)
def test_a_bad_spec_is_refused_naming_the_place(path, value, words):
    with pytest.raises(SpecError) as error:
        StudySpec.from_json(changed(path, value), "runs/x/spec.json")
    assert words in str(error.value)
    assert "runs/x/spec.json" in str(error.value)


@pytest.mark.parametrize("text", ["", "[1, 2]", "{", '{"format": 1', "[" * 100_000, "\x00", "null"])
def test_a_file_that_is_no_spec_is_refused(tmp_path, text):
    path = tmp_path / "spec.json"
    path.write_text(text)
    with pytest.raises(SpecError, match=r"spec\.json"):
        StudySpec.load(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(SpecError, match="missing"):
        StudySpec.load(tmp_path / "none.json")


def test_execution_and_rows_are_not_part_of_the_identity():
    spec = StudySpec.from_json(VALID)
    assert StudySpec.from_json(changed(("execution", "batch_size"), 7)).digest == spec.digest
    assert StudySpec.from_json(changed(("estimator", "num_rows"), 7)).digest == spec.digest
    assert StudySpec.from_json(changed(("design", "seed"), 7)).digest != spec.digest
    assert StudySpec.from_json(changed(("outputs", "score", "dtype"), "float16")).digest != spec.digest


def test_differences_name_each_place():
    found = differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4})
    assert found == ["a.c: 2, not 3", "d: absent, not 4"]


@pytest.mark.parametrize("experiment", [linear_experiment(6)[0], SubsetMean()], ids=["linear", "subset mean"])
def test_an_experiment_is_rebuilt_from_its_spec(experiment):
    spec = StudySpec.from_json(changed(("experiment",), experiment.to_spec()))
    rebuilt = build_experiment(spec)
    assert rebuilt.fingerprint() == experiment.fingerprint()
    assert rebuilt.components == experiment.components


def test_imports_can_be_limited():
    spec = StudySpec.from_json(VALID)
    build_experiment(spec, allow_import=["coar.testing"])
    with pytest.raises(SpecError, match="--allow-import"):
        build_experiment(spec, allow_import=["coar.tasks"])


def test_a_prefix_allows_a_package_not_its_namesakes():
    with pytest.raises(SpecError, match="asks to import"):
        build_experiment(StudySpec.from_json(VALID), allow_import=["coar.test"])


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("coar.testing", "import string"),
        ("no.such.module:make", "cannot import"),
        ("coar.testing.toys:nothing", "cannot import"),
        ("coar.testing.toys:LinearSum", "task_factory"),
    ],
)
def test_a_factory_that_cannot_be_used_is_named(factory, words):
    with pytest.raises(SpecError, match=words):
        build_experiment(StudySpec.from_json(changed(("experiment", "task", "factory"), factory)))


def test_an_experiment_that_is_none_is_refused_before_it_is_called():
    spec = changed(("experiment",), {"name": "coar.testing.toys:linear_experiment", "args": {}})
    with pytest.raises(SpecError, match="not an experiment"):
        build_experiment(StudySpec.from_json(spec))


def test_wrong_factory_arguments_are_named():
    with pytest.raises(SpecError, match="colour"):
        build_experiment(StudySpec.from_json(changed(("experiment", "task", "args"), {"colour": 1})))


def test_the_specs_in_the_repository_are_valid(request):
    paths = sorted((request.config.rootpath / "specs").glob("*.json"))
    assert paths
    for path in paths:
        kind = EditSpec if path.name.startswith("edit_") else StudySpec
        assert kind.load(path).format == 1
