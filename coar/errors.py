"""Named errors. Each says what went wrong, what was expected, what was got, and what to do.

>>> raise SpecError("unknown key", expected="one of: format, design", got="desing", todo="rename it")
Traceback (most recent call last):
    ...
coar.errors.SpecError: unknown key
  expected: one of: format, design
  got:      desing
  to do:    rename it
"""

from __future__ import annotations

DISTRIBUTION = "torch-coar"  # the one place that knows the name on the package index


class CoarError(Exception):
    """Base of every error that this package raises on purpose.

    Args:
        what: one sentence naming the file, row, example, module or key concerned.
        expected: what would have been accepted.
        got: what was found instead.
        todo: what the reader can do about it.
    """

    def __init__(
        self, what: str, *, expected: object = None, got: object = None, todo: str | None = None
    ) -> None:
        super().__init__(what)
        self.what, self.expected, self.got, self.todo = what, expected, got, todo

    def __str__(self) -> str:
        """Lay the parts out one below the other."""
        parts = [("expected:", self.expected), ("got:", self.got), ("to do:", self.todo)]
        lines = [f"  {label:<9} {value}" for label, value in parts if value is not None]
        return "\n".join([self.what, *lines])

    def __reduce__(self) -> tuple[object, ...]:
        """Keep all parts when an error travels from a worker process to the driver."""
        return _rebuild, (type(self), self.what, self.expected, self.got, self.todo)


def _rebuild(kind: type[CoarError], what: str, expected: object, got: object, todo: str | None) -> CoarError:
    return kind(what, expected=expected, got=got, todo=todo)


class SettingError(CoarError, ValueError):
    """An argument or a setting is out of its range or of the wrong type."""


class SpecError(SettingError):
    """A spec file has unknown keys, a newer format, or values that are not allowed."""


class TaskError(CoarError, ValueError):
    """The model or the data set cannot be used as given (train mode, changing items, ...)."""


class ComponentError(CoarError, ValueError):
    """Unknown kind or layer type, nothing found, or components of another model."""


class OutputError(CoarError, ValueError):
    """An output is NaN, infinite, too large for its type, or of the wrong length."""


class RowError(OutputError):
    """The outputs of one row are NaN, infinite or too large; other rows are not concerned."""


class AxisError(CoarError, ValueError):
    """Two things that should index the same components or columns do not."""


class StoreError(CoarError, OSError):
    """Something on disk is missing, damaged, foreign, or cannot be written."""


class StudyError(CoarError, ValueError):
    """A study exists with another spec, or cannot be opened or extended as asked."""


class ExecutorError(CoarError, RuntimeError):
    """Workers could not be started, or died more often than is worth retrying."""


class FitError(CoarError, ValueError):
    """The rows at hand do not determine what was asked for."""


class EditError(CoarError, ValueError):
    """Targets, references or guards of an edit contradict each other."""


class GuardError(EditError):
    """No edit moves the targets within its guard; says the best that could be done. Nothing was applied."""


class MissingDependencyError(CoarError, ImportError):
    """An optional library is needed here and is not installed."""


class CoarWarning(UserWarning):
    """Something works, but a careful reader would want to know."""


def install_hint(extra: str) -> str:
    """Return the command that installs an optional part.

    >>> install_hint("vision")
    'pip install "torch-coar[vision]"'
    """
    return f'pip install "{DISTRIBUTION}[{extra}]"'
