import pickle
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, field_validator

from coar.errors import SettingError
from coar.settings import Setting, nearest
from tests.refused import refused


class Inner(Setting):
    size: int = Field(default=1, ge=1)


class Outer(Setting):
    name: str
    share: float = 0.5
    inner: Inner = Inner()
    step: float | Literal["auto"] = "auto"
    sizes: Annotated[int | tuple[int, ...], Field(description="a whole number, or several")] = 1
    parts: dict[str, Inner] | None = None
    held_out: int = 2

    @field_validator("share")
    @classmethod
    def _of_one(cls, share):
        if share == -7:
            raise SettingError("a share", expected="at least 0", got="too little", todo="take more")
        return share


def test_defaults_are_filled_in():
    assert Outer(name="a") == Outer(name="a", share=0.5, inner=Inner(size=1))


@given(st.text(), st.floats(0, allow_infinity=False), st.integers(1, 2**62))
def test_json_and_back_is_the_same_setting(name, share, size):
    setting = Outer(name=name, share=share, inner=Inner(size=size))
    assert Outer.model_validate_json(setting.model_dump_json()) == setting


def test_settings_travel_to_workers():
    setting = Outer(name="a", inner=Inner(size=3))
    assert pickle.loads(pickle.dumps(setting)) == setting


def test_a_setting_cannot_be_changed_afterwards():
    setting = Outer(name="a")
    with refused(SettingError, "Outer is frozen: 'share' cannot be set", "Outer(share=...)"):
        setting.share = 0.1
    assert setting.share == 0.5


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


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"step": "fast"}, ["1 setting", "step: a valid number, or 'auto'", "got:      'fast'"]),
        ({"sizes": "x"}, ["1 setting", "sizes: a whole number, or several\n", "got:      'x'\n"]),
        ({"sizes": (1, "x")}, ["1 setting", "sizes: a whole number, or several\n", "got:      (1, 'x')\n"]),
        ({"share": -7.0}, ["share: at least 0\n", "got:      too little\n", "to do:    take more"]),
        ({"parts": {"a": {"size": 0}}}, ["parts.a.size: greater than or equal to 1"]),
        ({"parts": {"a": {"sise": 0}}}, ["no key 'parts.a.sise' (did you mean 'size'?)"]),
        ({"cv": 5}, ["no key 'cv' (did you mean 'held_out'?)"]),
        ({"xyz": 5}, ["no key 'xyz'\n"]),
    ],
)
def test_a_setting_is_named_once_with_what_it_may_be(values, words):
    with refused(SettingError, *words):
        Outer(name="a", **values)


def test_settings_are_given_by_name():
    with refused(SettingError, "to do:    name the setting: Inner(size=3)"):
        Inner(3)


def test_a_name_of_another_library_suggests_ours_only_where_there_is_one():
    assert nearest("max_iter", ["max_sweeps"]) == "; did you mean 'max_sweeps'?"
    assert nearest("cv", ["errors", "choose"]) == ""
