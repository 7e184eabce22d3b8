import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError

from coar.errors import SettingError
from coar.settings import Setting
from tests.refused import refused


class Inner(Setting):
    size: int = Field(default=1, ge=1)


class Outer(Setting):
    name: str
    share: float = 0.5
    inner: Inner = Inner()


def test_defaults_are_filled_in():
    assert Outer(name="a") == Outer(name="a", share=0.5, inner=Inner(size=1))


@given(st.text(), st.floats(allow_nan=False, allow_infinity=False), st.integers(1, 2**62))
def test_json_and_back_is_the_same_setting(name, share, size):
    setting = Outer(name=name, share=share, inner=Inner(size=size))
    assert Outer.model_validate_json(setting.model_dump_json()) == setting


def test_settings_travel_to_workers():
    setting = Outer(name="a", inner=Inner(size=3))
    assert pickle.loads(pickle.dumps(setting)) == setting


def test_a_setting_cannot_be_changed_afterwards():
    with pytest.raises(ValidationError, match="frozen"):
        Outer(name="a").share = 0.1


def test_an_unknown_key_is_refused_by_name():
    with refused(SettingError, "Outer: 1 setting not accepted", "no key 'nmae'", "to do:"):
        Outer(name="a", nmae="b")


def test_a_missing_key_is_named():
    with refused(SettingError, "a key 'name'", "got:      nothing"):
        Outer()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"name": 1}, ["name: a valid string", "got:      1"]),
        ({"name": "a", "share": "0.5"}, ["share: a valid number", "'0.5'"]),
        ({"name": "a", "inner": {"size": 0}}, ["inner.size", "greater than or equal to 1", "got:      0"]),
        ({"name": "a", "inner": {"size": True}}, ["inner.size: a valid integer", "True"]),
        ({"name": "a", "inner": {"size": 1.0}}, ["inner.size: a valid integer", "1.0"]),
    ],
)
def test_nothing_is_converted_silently(values, words):
    with refused(SettingError, *words):
        Outer(**values)


def test_all_findings_come_in_one_error_also_those_of_inner_settings():
    with refused(SettingError, "3 settings", "a key 'name'", "share:", "inner.size:"):
        Outer(share="half", inner={"size": -1})


def test_a_long_value_is_cut_in_the_message():
    with pytest.raises(SettingError) as caught:
        Outer(name=["x" * 5000])
    assert len(str(caught.value)) < 500
