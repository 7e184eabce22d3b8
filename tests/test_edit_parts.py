"""Who plays which part in an edit: drawn by query, never twice, partners on one side."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coar.axes import Axis
from coar.editing import EditParts, draw_parts
from coar.errors import EditError, SettingError
from coar.task import Task
from tests.refused import refused


def make_task(metadata):
    count = len(next(iter(metadata.values())))
    examples = torch.utils.data.TensorDataset(torch.zeros(count, 2), torch.zeros(count, dtype=torch.int64))
    return Task(torch.nn.Identity().eval(), examples, metadata=metadata)


LABELS = make_task({"label": [0] * 30 + [1] * 25 + [2] * 5})
# every image twice, clean and attacked, in another order
PAIRED = make_task({"image": [*range(40), *reversed(range(40))], "state": ["clean"] * 40 + ["attacked"] * 40})


def drawn(task, *queries, **options):
    """Parts as sets."""
    parts = draw_parts(task, *queries, **options)
    return {
        part.name: set() if getattr(parts, part.name) is None else set(getattr(parts, part.name).tolist())
        for part in fields(EditParts)
    }


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 20),
    st.integers(1, 26),
    st.integers(0, 2**40),
    st.sampled_from([None, "label != 1", "label >= 0"]),
)
def test_every_part_is_of_its_query_and_no_example_is_used_twice(num_targets, num_references, seed, guarded):
    options = {"num_targets": num_targets, "num_references": num_references, "seed": seed, "guarded": guarded}
    parts = drawn(LABELS, "label == 1", "label == 0", **options)
    label = LABELS.metadata["label"].to_numpy()
    assert len(parts["targets"]) == num_targets
    assert len(parts["references"]) == num_references
    like_targets = parts["targets"] | parts["target_holdout"] | parts["target_report"]
    assert like_targets == set(np.flatnonzero(label == 1))
    assert set(label[list(parts["references"])]) == {0}
    wanted = {None: [0], "label != 1": [0, 2], "label >= 0": [0, 1, 2]}[guarded]
    kept = set(np.flatnonzero(np.isin(label, wanted))) - parts["targets"] - parts["references"]
    assert parts["holdout"] | parts["report"] == kept
    choosing, judging = (parts[part] | parts[f"target_{part}"] for part in ("holdout", "report"))
    attributed = parts["targets"] | parts["references"]
    assert not (choosing | judging) & attributed
    assert not choosing & judging
    assert not parts["targets"] & parts["references"]
    assert abs(len(parts["target_holdout"]) - len(parts["target_report"])) <= 1
    assert abs(len(parts["holdout"]) - len(parts["report"])) <= 3  # even within every kind


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 20), st.integers(0, 2**40))
def test_an_image_and_its_attacked_twin_are_on_one_side(num_targets, num_references, seed):
    options = {"num_targets": num_targets, "num_references": num_references, "seed": seed, "pairs": "image"}
    parts = drawn(PAIRED, "state == 'attacked'", "state == 'clean'", **options)
    image = PAIRED.metadata["image"].to_numpy()
    images = {name: set(image[list(found)]) for name, found in parts.items()}
    partners = images["targets"] & images["references"]
    assert len(partners) == min(num_targets, num_references)  # the targets' own twins first
    assert images["holdout"] == images["target_holdout"]
    assert images["report"] == images["target_report"]
    assert not images["holdout"] & images["report"]
    assert not (images["targets"] | images["references"]) & (images["holdout"] | images["report"])


def test_a_draw_is_its_seeds():
    same, again, other = (
        drawn(LABELS, "label == 1", "label == 0", num_targets=5, num_references=5, seed=seed)
        for seed in (1, 1, 2)
    )
    assert same == again != other


def test_without_further_targets_sizes_are_compared_by_the_targets():
    parts = draw_parts(LABELS, "label == 2", "label == 0", num_targets=5, num_references=5)
    assert parts.target_holdout is None
    assert parts.target_report is None


@pytest.mark.parametrize(
    ("queries", "options", "words"),
    [
        (("label == 1", "label < 2"), {}, ("targets and references overlap", "25 examples answer")),
        (("label = 1", "label == 0"), {}, ("query for targets cannot be read", "two signs: ==")),
        (("label.max() == 1", "label == 0"), {}, ("query for targets cannot be read", "with a Call")),
        (("@table == 1", "label == 0"), {}, ("query for targets cannot be read",)),
        (("label", "label == 0"), {}, ("query for targets is no condition",)),
        (("label + 1", "label == 0"), {}, ("query for targets cannot be read", "with a Add")),
        (("label == '1'", "label == 0"), {}, ("no example answers the query", "label is 0, 1, 2")),
        (("lable == 1", "label == 0"), {}, ("query for targets cannot be read", "lable")),
        (("label == 1", "label == 0"), {"num_targets": 26}, ("too few examples for the targets", "25")),
        (("label == 1", "label == 0"), {"num_references": 31}, ("too few examples for the references", "30")),
        (("label == 1", "label == 0"), {"num_references": 30}, ("no example is left for the holdout",)),
        (("label == 1", "label == 0"), {"pairs": "image"}, ("no column 'image' that names pairs", "label")),
    ],
)
def test_what_cannot_be_drawn_is_refused(queries, options, words):
    with refused(EditError, *words):
        draw_parts(LABELS, *queries, **{"num_targets": 5, "num_references": 5} | options)


def test_a_task_without_metadata_is_refused():
    task = Task(torch.nn.Identity().eval(), [(torch.zeros(2), 0)] * 4)
    with refused(EditError, "has none", "metadata="):
        draw_parts(task, "label == 1", "label == 0")


def test_a_seed_is_a_whole_number():
    with pytest.raises(SettingError):
        draw_parts(LABELS, "label == 1", "label == 0", num_targets=5, num_references=5, seed=-1)


AXIS = Axis("columns", list("abcdef"), {}, {"example": np.arange(6), "position": np.zeros(6)})


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"references": [0]}, ("targets and references overlap", "first 'a'")),
        ({"holdout": ["a", 3]}, ("targets and holdout overlap", "first 'a'")),
        ({"report": [1]}, ("references and report overlap", "first 'b'")),
        ({"target_report": [3]}, ("holdout and target_report overlap", "first 'd'")),
        ({"target_holdout": [5]}, ("target_holdout and report overlap", "first 'f'")),
        ({"holdout": []}, ("holdout", "none")),
        ({"report": [9]}, ("report", "unknown: 9")),
    ],
)
def test_parts_that_share_an_example_are_refused(changed, words):
    parts = {"targets": ["a"], "references": [1, 2], "holdout": [3, 4], "report": [5]}
    EditParts(**parts).located(AXIS)
    with refused(EditError, *words):
        EditParts(**parts | changed).located(AXIS)


def test_what_compares_may_be_what_must_hold():
    parts = EditParts([0], [1], [2, 3], [4, 5], target_holdout=[3], target_report=[4]).located(AXIS)
    assert parts.compared.tolist() == [3]
    assert parts.judging.tolist() == [4]


def test_parts_drawn_by_example_are_not_columns_of_tokens():
    parts = draw_parts(LABELS, "label == 1", "label == 0", num_targets=5, num_references=5)
    example = np.repeat(np.arange(60), 2)
    names = [f"{e}:{i % 2}" for i, e in enumerate(example)]
    source = {"data": LABELS.data_fingerprint()}
    tokens = Axis("columns", names, source, {"example": example, "position": np.arange(120) % 2})
    with refused(EditError, "several values per example", "120 columns of 60 examples"):
        parts.located(tokens)


@pytest.mark.parametrize(
    "query",
    [
        "@np.f2py.os.system('echo owned > {path}') == 0",
        "label.to_csv('{path}') == 0",
        "@table.to_csv('{path}') == 0",
        "[label.to_csv('{path}')] == [0]",
        "label == label.map(lambda x: open('{path}', 'w'))",
        "label == __import__('os').system('echo owned > {path}')",
        "label if label.to_csv('{path}') else label",
    ],
)
def test_a_query_runs_no_code(query, tmp_path):
    path = tmp_path / "owned"
    with refused(EditError, "cannot be read", "column names"):
        draw_parts(LABELS, query.format(path=path), "label == 0", num_targets=1, num_references=1)
    assert not path.exists()


def test_queries_that_are_meant_are_read():
    task = make_task({"label": [0, 1, 2] * 20, "my group": ["a", "b"] * 30})
    queries = {
        "label in [1, 2] and `my group` == 'a'": lambda t: t.label.isin([1, 2]) & (t["my group"] == "a"),
        "not label == 0": lambda t: t.label != 0,
        "(label > 0) & ~(label == 2)": lambda t: t.label == 1,
        "0 < label <= 2 or `my group` != 'b'": lambda t: (t.label > 0) | (t["my group"] != "b"),
    }
    for query, obvious in queries.items():
        parts = draw_parts(task, query, f"not ({query})", num_targets=2, num_references=2)
        found = np.concatenate([parts.targets, parts.target_holdout, parts.target_report])
        assert set(found) == set(np.flatnonzero(obvious(task.metadata)))


def test_parts_of_other_examples_are_refused():
    parts = draw_parts(LABELS, "label == 1", "label == 0", num_targets=5, num_references=5)
    names = [str(i) for i in range(60)]
    parts.located(Axis("columns", names, {"data": LABELS.data_fingerprint()}))
    with refused(EditError, "drawn from other examples", "experiment.task"):
        parts.located(Axis("columns", names, {"data": "another"}))


def test_pairs_without_a_name_are_refused():
    task = make_task({"label": [0, 1] * 10, "image": [*range(19), None]})
    with refused(EditError, "no 'image' that names their pair", "1 without one"):
        draw_parts(task, "label == 1", "label == 0", num_targets=2, num_references=2, pairs="image")
