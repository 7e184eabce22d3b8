import pytest


def test_what_is_available_is_not_skipped(require):
    assert require("a thing", True, "never shown") is None


def test_what_is_missing_is_skipped_with_the_reason(require, monkeypatch):
    monkeypatch.delenv("COAR_REQUIRE", raising=False)
    with pytest.raises(pytest.skip.Exception, match=r"quota: no loop devices here"):
        require("quota", False, "no loop devices here")


def test_what_is_missing_fails_where_it_was_promised(require, monkeypatch):
    monkeypatch.setenv("COAR_REQUIRE", "gpu, quota")
    with pytest.raises(pytest.fail.Exception, match=r"promises 'quota', but no loop devices here"):
        require("quota", False, "no loop devices here")


def test_a_promise_of_something_else_does_not_count(require, monkeypatch):
    monkeypatch.setenv("COAR_REQUIRE", "quotas")
    with pytest.raises(pytest.skip.Exception):
        require("quota", False, "no loop devices here")
