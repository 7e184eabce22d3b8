"""A fit as a file of settings asks for it."""

from __future__ import annotations

import numpy as np
import torch

from coar.attributions import Attributions
from coar.regression.fit_file import Auto, FitSettings
from coar.regression.fit_file_saved import require_unused
from coar.regression.fitting import DEFAULT_SOLVER, fit
from coar.rows import require_output
from coar.study import Study


def fit_with(
    study: Study,
    settings: FitSettings,
    *,
    partial: bool = False,
    device: str | torch.device = "auto",
    progress: bool = False,
    where: str = "fit settings",
) -> Attributions:
    """`coar.fit` with settings of a file; attributions are written to the study under `settings.name`.

    Args:
        study: as for `coar.fit`, and so are the others.
        settings: what to do.
        partial: fit what is there although rows are missing.
        device: where to compute.
        progress: show a bar.
        where: names the file in errors.

    Raises:
        SpecError: columns, or rows to hold out, that there are not.
        StudyError: the study has attributions of that name by other settings, or of other rows.
    """
    output = require_output(settings.output, list(study.columns))
    columns = settings.column_positions(len(study.columns[output]), where)
    status = study.status()
    if status.complete or partial:  # else the fit says what is missing
        settings.require_held_out(status.rows, where)
        solver = DEFAULT_SOLVER if isinstance(settings.solver, Auto) else settings.solver
        axis = study.columns[output] if columns is None else study.columns[output].subset(np.array(columns))
        asked = {"solver": solver.model_dump(mode="json"), "remarks": list(settings.notes)}
        require_unused(study, settings.name, output, axis, asked)
    return fit(
        study,
        settings.solver_setting(),
        output=output,
        columns=columns,
        save_as=settings.name,
        partial=partial,
        memory=settings.memory,
        device=device,
        progress=progress,
        remarks=settings.notes,
    )
