"""Baselines of a study by name, saved beside its other attributions: what `coar baseline` makes.

runs/digits/
attributions/leave-one-out/                as of every study
baselines/leave-one-out-margin/            its rows: a study of its own, resumable
baselines/gate-gradients-margin/           sums of passes, likewise (-40 at the end: of 40 passes)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coar.attributions import Attributions
from coar.baselines.methods import METHODS, Wanted
from coar.errors import SettingError, StudyError
from coar.executors.base import Executor
from coar.gradients.schedule import ENOUGH, MOST_PASSES
from coar.rows import require_output
from coar.settings import nearest, whole_number
from coar.study import Study
from coar.study_folder import StudyFolder

BASELINES = tuple(METHODS)


def make_baseline(study: StudyFolder, name: str, **options: Any) -> Attributions:
    """Make a baseline for a study's experiment and save it there, or load it if it is there.

    Args:
        study: as for `wanted_baselines`.
        name: one of `BASELINES`.
        **options: of `wanted_baselines`.

    Returns:
        The attributions, as saved.

    Raises:
        SettingError: as `wanted_baselines`, and so is StudyError.

    >>> import tempfile
    >>> from coar.designs import Bernoulli
    >>> from coar.testing import linear_experiment
    >>> study = Study.create(tempfile.mkdtemp(), linear_experiment()[0], Bernoulli(ablation_fraction=0.1), 20)
    >>> make_baseline(study, "gradient-x-parameter", progress=False).provenance["forwards"]
    3
    """
    return make(wanted_baselines(study, [name], **options)[0])


def wanted_baselines(
    study: StudyFolder,
    names: Sequence[str],
    *,
    passes: int | None = None,
    output: str | None = None,
    save_as: str | None = None,
    executor: Executor | None = None,
    progress: bool = True,
) -> list[Wanted]:
    """Check what is asked for, all of it before any of it is computed.

    Args:
        study: whose experiment, and for some whose ablation fraction and rows.
        names: of `BASELINES`: the functions of `coar.baselines`, and gate gradients; dashes or underscores.
        passes: of methods that draw gates, or steps of methods along a path; default the method's own,
            and 100 for plain means.
        output: which output; needed where there are several.
        save_as: name of the attributions in the study, of one baseline; default the baseline's.
        executor: where rows or passes run, for leave-one-out and gate gradients.
        progress: show a bar.

    Raises:
        SettingError: no such baseline, passes for one that has none, or one that needs what the study has
            not.
        StudyError: other attributions have that name, or the same from fewer passes, steps or rows than
            would be made now.
    """
    if passes is not None:
        passes = whole_number(passes, "passes (--passes)")
    chosen = require_output(output, list(study.columns))
    found = []
    for name in dict.fromkeys(_known(name) for name in names):
        path = study.attributions_path(save_as or name)
        wanted = Wanted(study, name, chosen, passes, path, executor, progress, _is_there(path))
        _require_possible(wanted)
        if wanted.there:
            _require_same(Attributions.load(path), wanted)
        found.append(wanted)
    return found


def make(wanted: Wanted) -> Attributions:
    """Compute and save what is wanted, or load it if it is there."""
    if not _is_there(wanted.path):
        found = METHODS[wanted.name].make(wanted)
        if not _is_there(wanted.path):  # some methods write them as they go
            found.save(wanted.path)
    return Attributions.load(wanted.path)


def report(wanted: Wanted, found: Attributions) -> list[str]:
    """What was made, or was there, in lines for people."""
    counted, spent = METHODS[wanted.name].counted, _spent(found)
    place = f"{wanted.path.name}: in {wanted.path}"
    if wanted.there:
        return [str(found), f"{place} (already there{f': {spent:,} {counted}' if counted else ''})"]
    if wanted.passes is None or spent <= wanted.passes:
        return [str(found), place]
    rounds = f"{wanted.passes:,} {counted} are rounded up to {spent:,}: gates are drawn in whole rounds"
    return [str(found), rounds, place]


def _known(name: str) -> str:
    asked = name.replace("_", "-")
    if asked in METHODS:
        return asked
    begun = [known for known in BASELINES if asked and known.startswith(asked)]
    hint = f"; did you mean {begun[0]!r}?" if len(begun) == 1 else nearest(asked, BASELINES)
    raise SettingError("no such baseline", expected=", ".join(BASELINES), got=repr(name) + hint)


def _is_there(path: Path) -> bool:
    return (path / "index.json").exists()


def _spent(found: Attributions) -> int:
    return int(found.provenance.get("passes", found.provenance.get("steps", 0)))


def _require_possible(wanted: Wanted) -> None:
    """Raise where a method has no passes, or the study not what it needs."""
    method = METHODS[wanted.name]
    if wanted.passes is not None and not method.counted:
        raise SettingError(
            f"{wanted.name} has no passes to choose",
            expected=" or ".join(name for name, one in METHODS.items() if one.counted),
            got=wanted.passes,
        )
    if method.of_rows and not isinstance(wanted.study, Study):
        raise SettingError(
            f"{wanted.name} is fitted to rows, and this study has none",
            expected="a study of rows",
            got=f"{wanted.study.contents} in {wanted.study.directory}",
        )
    if method.of_fraction and wanted.fraction is None:
        raise SettingError(
            f"{wanted.name}: made for an ablation fraction, and this study has none",
            expected="rows of coar.Bernoulli or coar.FixedSize",
            got=wanted.study.spec.design.name,
        )


def _require_same(found: Attributions, wanted: Wanted) -> None:
    """Raise if saved attributions are others than would be made, or less of the same."""
    said = found.provenance
    what = str(said.get("method", "")).replace("_", "-").replace(" ", "-")
    least, here = _amounts(found, wanted)
    if not what.startswith(wanted.name) or found.output != wanted.output:
        got = f"{said.get('method', 'attributions of unknown origin')} of output {found.output!r}"
    elif here:
        got = f"the same from {here}"
    else:
        return
    instead = f", or take what is there: --passes {_spent(found)}" if here and not said.get("rows") else ""
    raise StudyError(
        f"attributions {wanted.path.name!r} are there, and are others",
        expected=f"{wanted.name} of output {wanted.output!r}" + (f" from {least}" if least else ""),
        got=got,
        todo=f"save these under another name (--name NAME, save_as=NAME){instead}",
    )


def _amounts(found: Attributions, wanted: Wanted) -> tuple[str, str]:
    """What would be made of, and if that is more than attributions were made of: theirs; else empty."""
    method, spent, said = METHODS[wanted.name], _spent(found), found.provenance
    if method.of_rows and isinstance(wanted.study, Study):
        rows = wanted.study.status().rows
        return f"{rows:,} rows", f"{said.get('rows', 0):,} rows" if said.get("rows", 0) < rows else ""
    least = wanted.passes or method.default
    here = f"{spent:,} {method.counted}"
    if least:
        own = "" if wanted.passes else " (the default)"
        return f"{least:,} {method.counted}{own}", here if spent < least else ""
    if method.counted:  # as many as it takes
        short = spent < MOST_PASSES and (said.get("correlation") or 0.0) < ENOUGH
        return f"passes up to an estimated correlation of {ENOUGH:g}", here if short else ""
    return "", ""
