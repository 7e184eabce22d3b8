"""What every experiment and every executor must keep."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from coar.designs import Bernoulli
from coar.executors.base import Executor
from coar.executors.serial import Serial
from coar.experiments.base import Experiment
from coar.files import digest_json
from coar.fingerprints import model_fingerprint
from coar.study import Study
from coar.testing.toys import SubsetMean, linear_experiment


def check_experiment(experiment: Experiment) -> None:
    """Assert that an experiment keeps its contract.

    Outputs have the promised shapes, are finite and float; a row depends on its mask alone (not on the
    rows beside it or before it); fingerprint and spec are stable; the task's model is not modified.
    """
    model = getattr(getattr(experiment, "task", None), "model", None)
    before = None if model is None else model_fingerprint(model)
    fingerprint = experiment.fingerprint()
    count = len(experiment.components)
    masks = Bernoulli(ablation_fraction=0.3, seed=11).masks(range(3), count)
    masks[0] = True
    runner = experiment.prepare(experiment.device)
    together = runner(masks)
    assert set(together) == set(experiment.columns), (
        f"outputs {set(together)}, columns {set(experiment.columns)}"
    )
    for name, values in together.items():
        expected = (len(masks), len(experiment.columns[name]))
        assert values.shape == expected, f"{name}: expected shape {expected}, got {values.shape}"
        assert values.dtype in (np.float32, np.float64), f"{name}: expected floats, got {values.dtype}"
        assert np.isfinite(values).all(), f"{name}: not finite"
        backwards = np.stack([runner(mask[None])[name][0] for mask in masks[::-1]])[::-1]
        assert np.array_equal(values, backwards), f"{name}: a row depends on the rows run beside or before it"
    digest_json(runner.record())
    digest_json(experiment.to_spec())
    assert experiment.fingerprint() == fingerprint, "the fingerprint changes between calls"
    if model is not None:
        assert model_fingerprint(model) == before, "the task's model was modified"


def check_executor(executor: Executor, num_rows: int = 23) -> None:
    """Assert that an executor completes studies with the very bits that `Serial` gives."""
    for experiment in (linear_experiment()[0], SubsetMean()):
        with tempfile.TemporaryDirectory() as folder:
            design = Bernoulli(ablation_fraction=0.3, seed=5)
            studies = [
                Study.create(Path(folder) / name, experiment, design, num_rows, rows_per_shard=5)
                for name in ("serial", "other")
            ]
            studies[0].run(Serial(), progress=False)
            status = studies[1].run(executor, progress=False)
            assert status.complete, status.summary()
            assert status.rows == num_rows, status.summary()
            assert np.array_equal(studies[0].masks, studies[1].masks), "masks differ from those of Serial"
            for name, values in studies[0].outputs.items():
                assert np.array_equal(values, studies[1].outputs[name]), f"{name} differs from that of Serial"
