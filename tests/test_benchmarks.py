"""Benchmarks: claims are complete, verdicts are honest, and the page is the results'."""

import tomllib

import pytest

from benchmarks import docs, report

CLAIMS = tomllib.loads((report.ROOT / "benchmarks/claims.toml").read_text())


@pytest.mark.parametrize("name", sorted(CLAIMS))
def test_every_group_of_claims_has_a_benchmark_and_a_committed_full_run(name):
    assert (report.ROOT / f"benchmarks/{name}.py").exists()
    (result,) = [result for result in docs.load() if result["benchmark"] == name]
    assert not result["small"]
    bars = {f"{name}.{key}": entry["full"] for key, entry in CLAIMS[name].items()}
    assert {claim["id"]: claim["bar"] for claim in result["claims"]} == bars
    texts = {f"{name}.{key}": entry["claim"] for key, entry in CLAIMS[name].items()}
    assert {claim["id"]: claim["claim"] for claim in result["claims"]} == texts


@pytest.mark.parametrize("path", docs.pages(), ids=lambda path: path.name)
def test_pages_are_made_from_the_results(path):
    assert path.read_text() == docs.pages()[path]


def test_a_claim_that_is_missed_or_not_measured_fails(capsys):
    found = report.Report("line", small=True)
    for key, entry in CLAIMS["line"].items():
        found.measure(key, entry["small"])
    assert found.finish(None) == 0
    found.measure("fit_seconds", 1e9)
    assert found.finish(None) == 1
    assert "False" in capsys.readouterr().out


def test_a_claim_that_was_not_run_counts_as_false_and_says_why():
    found = report.Report("line", small=True)
    found.not_run("fit_seconds", "no disk")
    holds = {claim["id"]: claim["holds"] for claim in found.claims()}
    assert holds["line.fit_seconds"] == "not run: no disk"
    assert "does not report" in str(holds["line.accuracy"])
    assert found.finish(None) == 1


def test_ratios_are_taken_pair_by_pair():
    assert report.ratio([2.0, 4.0, 60.0], [1.0, 2.0, 20.0]) == 2.0
