import pickle

import pytest

from coar import errors
from coar.errors import CoarError, install_hint

PARTS = {"expected": "a spec", "got": 3, "todo": "rename it"}
BUILTIN = {
    "SettingError": ValueError,
    "SpecError": ValueError,
    "TaskError": ValueError,
    "ComponentError": ValueError,
    "OutputError": ValueError,
    "RowError": ValueError,
    "AxisError": ValueError,
    "StoreError": OSError,
    "StudyError": ValueError,
    "ExecutorError": RuntimeError,
    "FitError": ValueError,
    "EditError": ValueError,
    "GuardError": ValueError,
    "MissingDependencyError": ImportError,
}
NAMED = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, CoarError) and kind is not CoarError
]


def test_the_table_above_lists_every_error():
    assert {kind.__name__ for kind in NAMED} == set(BUILTIN)


@pytest.mark.parametrize("kind", NAMED)
class TestEveryError:
    def test_says_what_expected_got_and_to_do_on_lines_of_their_own(self, kind):
        assert str(kind("spec.json is damaged", **PARTS)).splitlines() == [
            "spec.json is damaged",
            "  expected: a spec",
            "  got:      3",
            "  to do:    rename it",
        ]

    def test_leaves_out_what_it_does_not_know(self, kind):
        assert str(kind("spec.json is damaged", got=0)).splitlines() == [
            "spec.json is damaged",
            "  got:      0",
        ]

    def test_is_caught_by_who_expects_the_builtin_one(self, kind):
        assert issubclass(kind, BUILTIN[kind.__name__])

    def test_travels_whole_from_a_worker_process(self, kind):
        error = kind("spec.json is damaged", **PARTS)
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is kind
        assert str(copy) == str(error)
        assert (copy.what, copy.expected, copy.got, copy.todo) == ("spec.json is damaged", *PARTS.values())


def test_the_error_of_one_row_is_an_error_of_outputs():
    assert issubclass(errors.RowError, errors.OutputError)


def test_install_hints_name_the_distribution_not_the_import_name():
    assert install_hint("ray") == 'pip install "torch-coar[ray]"'
