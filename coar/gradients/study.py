"""GateGradientStudy: gate gradients that any number of workers compute, and that go on where they stopped.

runs/gradients/
spec.json  provenance.json  untouched.safetensors  weights.safetensors     as of every study
extensions/000001.json                     more passes or examples, asked for later
sums/000017.safetensors                    sums over some passes of some examples, written once
attributions/NAME/                         as of every study
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from coar.attributions import Attributions
from coar.creation import require_same_spec
from coar.errors import StudyError
from coar.executors.base import Executor
from coar.executors.serial import Serial
from coar.experiments.ablation import ComponentAblation
from coar.files import remove_abandoned
from coar.gradients.creation import gate_spec, write_gate_study
from coar.gradients.draws import GateDraws
from coar.gradients.extensions import read_layout, write_step
from coar.gradients.layout import Layout, Step
from coar.gradients.passes import GatePasses, require_gradients
from coar.gradients.results import make_attributions, pass_means
from coar.gradients.schedule import Passes, Schedule
from coar.gradients.status import GateStatus
from coar.gradients.sums import BlockMeans, FileSums
from coar.gradients.weights import (
    PassMeans,
    Progress,
    chosen_examples,
)
from coar.gradients.worker import GateWorker
from coar.progress import progress_bar
from coar.rows import require_output
from coar.settings import whole_number
from coar.spec import GateGradientsEstimator, StudySpec, build_experiment
from coar.study_folder import StudyFolder, require_executor

NAME = "gate-gradients"  # of attributions, where none is given


class GateGradientStudy(StudyFolder):
    """A folder of sums over passes.

    Use `GateGradientStudy.create`, `.from_spec` or `.open`.
    """

    estimator = "gate_gradients"
    contents = "sums of gate gradients"

    def __repr__(self) -> str:
        layout = self.layout
        passes = self.schedule.passes(layout.rounds)
        return (
            f"GateGradientStudy({str(self.directory)!r}, {passes} passes, {len(layout.examples)} examples, "
            f"{len(self.components)} components)"
        )

    @classmethod
    def create(
        cls,
        directory: str | Path,
        experiment: ComponentAblation,
        ablation_fraction: float,
        *,
        passes: Passes = "auto",
        target_correlation: float | None = None,
        target_error: float | None = None,
        seed: int = 0,
        outputs: Sequence[str] | None = None,
        examples: Sequence[int] | None = None,
        device: str = "auto",
        batch_size: int | None = None,
        precision: str = "float32",
    ) -> GateGradientStudy:
        """Create a study, or open the equal one that is there.

        Args:
            directory: its folder; made if needed.
            experiment: a component ablation whose outputs have gradients.
            ablation_fraction: of the ablations to predict.
            passes: see `coar.gate_gradients`; likewise the targets.
            target_correlation: see there.
            target_error: see there.
            seed: of the gates.
            outputs: which of the task's; each value of an example costs a backward pass. Default all.
            examples: positions of the examples to attribute; default all.
            device: where.
            batch_size: examples at a time; None chooses.
            precision: of the passes.

        Raises:
            StudyError: the folder holds a study with another spec; the difference is named.
        """
        require_gradients(experiment)
        estimator = GateGradientsEstimator(
            passes=passes if isinstance(passes, str) else whole_number(passes, "passes"),
            target_correlation=target_correlation,
            target_error=target_error,
            examples=None if examples is None else chosen_examples(examples, len(experiment.task)),
        )
        size = "auto" if batch_size is None else batch_size
        execution: dict[str, object] = {"device": device, "batch_size": size, "precision": precision}
        spec = gate_spec(experiment, estimator, ablation_fraction, seed, outputs, execution)
        return cls._create(Path(directory), spec, experiment)

    @classmethod
    def from_spec(
        cls, directory: str | Path, spec: StudySpec, allow_import: Sequence[str] | None = None
    ) -> GateGradientStudy:
        """Create a study from a spec, or open the equal one that is there; imports what the spec names."""
        cls._require_kind(spec, "the spec is for another kind of study", "create it with {}.from_spec")
        if (Path(directory) / "spec.json").exists():
            study = cls.open(directory, allow_import=allow_import)
            study._require_spec(spec)
            return study
        experiment = build_experiment(spec, allow_import=allow_import)
        require_gradients(experiment)
        assert isinstance(experiment, ComponentAblation)
        return cls._create(Path(directory), spec, experiment, allow_import)

    @classmethod
    def _create(
        cls,
        directory: Path,
        spec: StudySpec,
        experiment: ComponentAblation,
        allow_import: Sequence[str] | None = None,
    ) -> GateGradientStudy:
        if not (directory / "spec.json").exists():
            write_gate_study(directory, spec, experiment)
        study = cls(directory, allow_import=allow_import)
        study._require_spec(spec)
        study._use(experiment)
        return study

    def _require_spec(self, asked: StudySpec) -> None:
        require_same_spec(self.directory, asked, self.spec, None, self.provenance["precision"])
        estimator = asked.estimator
        assert isinstance(estimator, GateGradientsEstimator)
        own = self.spec.estimator
        if estimator != own:
            self._asked = estimator  # passes and targets may differ from run to run

    _asked: GateGradientsEstimator | None = None

    @property
    def schedule(self) -> Schedule:
        """How many rounds, and when to stop: as asked for last in this process, else as created."""
        estimator = self._asked or self.spec.estimator
        assert isinstance(estimator, GateGradientsEstimator)
        return Schedule(
            self.draws,
            estimator.passes,
            estimator.target_correlation,
            estimator.target_error,
            self.provenance["replicates"],
        )

    @cached_property
    def draws(self) -> GateDraws:
        """Of the gates."""
        design = self.spec.design
        return GateDraws(
            getattr(design, "ablation_fraction", 0.0), getattr(design, "seed", 0), len(self.components)
        )

    @property
    def layout(self) -> Layout:
        """Everything asked for so far, cut into items."""
        estimator = self.spec.estimator
        assert isinstance(estimator, GateGradientsEstimator)
        count = int(self.provenance["num_examples"])
        first = Step(chosen_examples(estimator.examples, count), self.provenance["rounds"])
        sizes = tuple(self.provenance[key] for key in ("block_examples", "item_rounds", "replicates"))
        return read_layout(self.directory, first, sizes, count)

    @cached_property
    def sums(self) -> FileSums:
        """The files."""
        return FileSums(
            self.directory,
            self.digest,
            self.spec.outputs,
            len(self.components),
            self.provenance["replicates"],
        )

    def extend(self, passes: int | None = None, examples: Sequence[int] | None = None) -> None:
        """Ask for more passes in all, or for further examples; `run` then does what is missing.

        Args:
            passes: in all, more than now; rounded up to whole rounds.
            examples: positions of examples that are not there yet; they get as many passes as the others.
        """
        layout = self.layout
        rounds = layout.rounds
        if passes is not None:
            rounds = -(-whole_number(passes, "passes") // self.schedule.per_round)
        new: tuple[int, ...] = ()
        if examples is not None:
            new = chosen_examples(examples, int(self.provenance["num_examples"]), layout.examples.tolist())
        if rounds < layout.rounds or (rounds == layout.rounds and not new):
            raise StudyError(
                "a study can only grow",
                expected=f"more than {self.schedule.passes(layout.rounds)} passes, or examples not there yet",
                got=f"passes={passes}, examples={examples!r:.60}",
            )
        write_step(self.directory, layout, Step(new, rounds))

    def run(
        self,
        executor: Executor | None = None,
        *,
        device: str | torch.device | None = None,
        batch_size: int | None = None,
        pool: bool = False,
        progress: bool = True,
    ) -> GateStatus:
        """Do what is missing, and go on to more passes until the target is met.

        Args:
            executor: where; default `Serial()`.
            device: instead of the spec's.
            batch_size: instead of the spec's; recorded in the files.
            pool: judge targets by weights that are pooled, see `coar.gate_gradients`.
            progress: show a bar.

        Raises:
            OutputError: an output has no gradient, or a derivative is not finite.
        """
        require_executor(executor)
        remove_abandoned(self.sums.folder)
        schedule = self.schedule
        if not schedule.adaptive and schedule.most > self.layout.rounds:
            self.extend(schedule.passes(schedule.most))
        while True:
            layout = self.layout
            self._run_missing(executor or Serial(), layout, (device, batch_size), pool, progress)
            if not schedule.adaptive:
                break
            found = self.progress(pool=pool)
            more = schedule.next(layout.rounds, found)
            if more is None:
                schedule.warn_missed(layout.rounds, found)
                break
            write_step(self.directory, layout, Step((), more))
        return self.status()

    def _run_missing(
        self, executor: Executor, layout: Layout, where: tuple[Any, int | None], pool: bool, progress: bool
    ) -> None:
        items, done = layout.items(), self.sums.present()
        missing = [item for item in items if item.index not in done]
        total = sum(map(len, items))
        bar = progress_bar(
            total, "gate gradients", progress and bool(missing), total - sum(map(len, missing))
        )
        with bar:
            if not missing:
                return
            left = Counter(item.stop for item in missing)  # to look where a cut is complete
            for item, _ in executor.run(self.session(*where), missing):
                left[item.stop] -= 1
                bar.update(len(item))
                if not bar.disable and not left[item.stop] and layout.complete_rounds(self.sums.present()):
                    bar.set_postfix_str(str(self.progress(pool=pool)))

    def progress(self, output: str | None = None, *, pool: bool = False) -> Progress:
        """How good weights are from the rounds that are complete; with several outputs, the worst."""
        names = [output] if output else list(self.spec.outputs)
        found = [self._means(name, self._complete(), pool).progress() for name in names]
        return Progress(min(one.correlation for one in found), max(one.error for one in found))

    def status(self) -> GateStatus:
        """Count what is there; reads no sums."""
        layout, present = self.layout, self.sums.present()
        items = layout.items()
        rounds = layout.complete_rounds(present)
        return GateStatus(
            directory=str(self.directory),
            passes=self.schedule.passes(rounds),
            num_passes=self.schedule.passes(layout.rounds),
            examples=len(layout.examples),
            files=sum(item.index in present for item in items),
            num_files=len(items),
            seconds_left=self.provenance["seconds_per_pass"]
            * sum(len(item) for item in items if item.index not in present)
            * self.draws.passes_per_round
            / self.provenance["timed_examples"],
            bytes=self.sums.bytes(),
            adaptive=self.schedule.adaptive,
        )

    def attributions(
        self, output: str | None = None, *, pool: bool = False, save_as: str | None = None
    ) -> Attributions:
        """Weights from all passes that every example has had.

        Args:
            output: which output; needed where there are several.
            pool: see `coar.gate_gradients`.
            save_as: name to write them under, block by block; None returns them in memory.

        Raises:
            StudyError: no round is complete yet.
        """
        name = require_output(output, list(self.spec.outputs))
        rounds = self._complete()
        how = self.draws, self.schedule, rounds, self.provenance["placed"]
        path = None if save_as is None else self.attributions_path(save_as)
        axes = self.components, self.columns[name]
        return make_attributions(self._means(name, rounds, pool), axes, name, how, path)

    def _complete(self) -> int:
        rounds = self.layout.complete_rounds(self.sums.present())
        if not rounds:
            raise StudyError(
                f"{self.directory} has no complete round of passes yet",
                expected="at least one for every example",
                got=f"{len(self.sums.present())} of {len(self.layout.items())} files",
                todo="run it: study.run(), or `coar run`",
            )
        return rounds

    def _means(self, output: str, rounds: int, pool: bool) -> PassMeans:
        layout = self.layout
        items = layout.by_block(rounds)

        def means(block: int) -> BlockMeans:
            return self.sums.means(items[block], output)

        return pass_means(self._ablation, self.columns[output], layout, self.draws, pool, means)

    @property
    def _ablation(self) -> ComponentAblation:
        experiment = self.experiment
        assert isinstance(experiment, ComponentAblation)
        return experiment

    def worker(self, device: torch.device, batch_size: int | None = None) -> GateWorker:
        """Prepare to do items in this process."""
        asked = self.spec.execution.batch_size
        size = batch_size if batch_size is not None else (None if asked == "auto" else asked)
        passes = GatePasses(
            self._ablation, list(self.spec.outputs), device, size, self.provenance["precision"]
        )
        owners = {name: self.columns[name].fields["example"] for name in self.spec.outputs}
        return GateWorker(passes, self.draws, owners, self.components.names, self.sums)
