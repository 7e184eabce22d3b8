"""StudyFolder: what every study is, whatever its work items are. Open, run, and rebuild the experiment."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from coar.axes import Axis
from coar.creation import kept_weights, read_provenance, read_untouched
from coar.errors import SettingError, StudyError
from coar.executors.base import Executor, ItemWorker
from coar.experiments.base import Experiment, full_fingerprint
from coar.files import digest_json, safe_name
from coar.spec import StudySpec, build_experiment, can_rebuild
from coar.task import resolve_device
from coar.work import require_same_experiment


class StudyFolder(ABC):
    """A folder that any number of workers fill, one file at a time.

    Attributes:
        directory: the folder.
        spec: what the study is; see `coar.spec`.
        provenance: what was written down when it was created.
        components: axis of the masks.
        columns: per output, axis of its columns.
        untouched: per output, float32 [columns], outputs with every component kept.
    """

    estimator: ClassVar[str]  # of the specs that a subclass is for
    contents: ClassVar[str]  # what it holds, for messages

    def __init__(
        self, directory: Path, experiment: Experiment | None = None, allow_import: Sequence[str] | None = None
    ) -> None:
        self.directory = directory
        self.spec = StudySpec.load(directory / "spec.json")
        self._require_kind(self.spec, f"{directory} holds another kind of study", "open it with {}.open")
        self.provenance = read_provenance(directory)
        where = str(directory / "provenance.json")
        self.components = Axis.from_json(self.provenance["components"], where)
        columns = self.provenance["columns"].items()
        self.columns = {name: Axis.from_json(value, where) for name, value in columns}
        self.untouched = read_untouched(directory, self.provenance)
        self.allow_import = allow_import
        self._experiment: Experiment | None = None
        if experiment is not None:
            self._use(experiment)

    @classmethod
    def open(
        cls,
        directory: str | Path,
        experiment: Experiment | None = None,
        allow_import: Sequence[str] | None = None,
    ) -> Self:
        """Open a study.

        Args:
            directory: its folder.
            experiment: needed to run a study whose task exists only in memory.
            allow_import: prefixes of modules that running it may import; None allows all.
        """
        require_study_folder(Path(directory))
        return cls(Path(directory), experiment, allow_import)

    @classmethod
    def _require_kind(cls, spec: StudySpec, what: str, todo: str) -> None:
        """Raise unless a spec is for this class; `todo` names the right one."""
        found = spec.estimator.name
        if found != cls.estimator:
            other = {"rows": "coar.Study", "gate_gradients": "coar.GateGradientStudy"}[found]
            raise StudyError(
                what,
                expected=f"{cls.contents} (estimator {cls.estimator!r})",
                got=f"estimator {found!r}",
                todo=todo.format(other),
            )

    def _use(self, experiment: Experiment) -> None:
        require_same_experiment(self.provenance["fingerprint"], full_fingerprint(experiment))
        self._experiment = experiment

    @property
    def experiment(self) -> Experiment:
        """The experiment; built from the spec (which imports the code it names) unless it was given."""
        if self._experiment is None:
            found = build_experiment(
                self.spec, kept_weights(self.directory, self.provenance), self.allow_import
            )
            self._use(found)
        assert self._experiment is not None
        return self._experiment

    @property
    def digest(self) -> str:
        """Of spec, model and data: files of other studies are refused by it."""
        return digest_json([self.spec.digest, self.provenance["fingerprint"]])

    def attributions_path(self, name: str) -> Path:
        """Folder of attributions saved with this study."""
        return self.directory / "attributions" / safe_name(name, "a name of attributions")

    @abstractmethod
    def worker(self, device: torch.device, batch_size: int | None = None) -> ItemWorker:
        """Prepare to do items in this process."""

    def session(self, device: str | torch.device | None, batch_size: int | None) -> StudySession:
        """How workers of this study get ready; device and batch size instead of the spec's."""
        asked = device or self.spec.execution.device
        where = self.experiment.device if str(asked) == "auto" else resolve_device(asked)
        return StudySession(self, where, batch_size)


class StudySession:
    """How workers get ready: in this process with the study at hand, elsewhere from its folder.

    Pickled, it is a path; and the experiment, only where no spec can rebuild it.
    """

    def __init__(self, study: StudyFolder, device: torch.device, batch_size: int | None) -> None:
        self._study: StudyFolder | None = study
        self._kind = type(study)
        self._directory = str(study.directory.absolute())
        self._allow_import = study.allow_import
        self._batch_size = batch_size
        self.device = device

    def __getstate__(self) -> dict[str, Any]:
        assert self._study is not None
        experiment = self._study.experiment
        sent = None if can_rebuild(experiment) else experiment
        return self.__dict__ | {"_study": None, "_experiment": sent}

    def worker(self, device: torch.device) -> ItemWorker:
        """Prepare the study's experiment on a device."""
        study = self._study or self._kind.open(
            self._directory, self.__dict__["_experiment"], self._allow_import
        )
        return study.worker(device, self._batch_size)


def require_study_folder(directory: Path) -> None:
    """Raise unless there is a study in a folder."""
    if not (directory / "spec.json").exists():
        raise StudyError(
            f"no study in {directory}",
            expected="a folder with spec.json",
            got="an empty or missing folder" if not directory.exists() else "a folder without it",
            todo="create it with Study.create, or `coar init SPEC DIRECTORY`",
        )


def require_executor(executor: Executor | None) -> None:
    """Raise unless something is an executor, or None."""
    if executor is not None and not isinstance(executor, Executor):
        raise SettingError(
            "not an executor", expected="coar.Serial() or coar.Processes(workers=2)", got=repr(executor)
        )
