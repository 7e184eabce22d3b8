"""Processes: spawned workers, one per GPU, or several on the CPU that share its cores.

Workers get ids and paths: they rebuild the experiment from the study's spec. Only an experiment
that no spec can rebuild is sent, once, pickled.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import sys
import traceback
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from types import ModuleType
from typing import Any

import torch

from coar.errors import CoarError, ExecutorError, SettingError
from coar.executors.base import Session, SomeItem, WorkItem
from coar.recipes import FACTORY_HELP

MAX_DEATHS = 3  # an item that kills this many workers is given up


class Processes:
    """Run in spawned processes on this machine.

    Args:
        workers: how many; default one per GPU, or one per core on the CPU.
        threads: torch threads per worker on the CPU; default the cores divided by the workers.

    A worker that dies is replaced and its item done again; an item that kills three workers is
    given up and named at the end. Scripts need no `if __name__ == "__main__"` unless the model or
    data set is defined in the script itself.
    """

    def __init__(self, workers: int | None = None, threads: int | None = None) -> None:
        for name, value in (("workers", workers), ("threads", threads)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise SettingError(
                    f"{name} must be a positive whole number", expected=">= 1", got=repr(value)
                )
        self.workers, self.threads = workers, threads

    def __repr__(self) -> str:
        return f"Processes(workers={self.workers}, threads={self.threads})"

    def run(self, session: Session, items: Sequence[SomeItem]) -> Iterator[tuple[SomeItem, int]]:
        """Do the items, each on the next free worker."""
        pool = _Pool(_pickled(session), self._places(session.device, len(items)))
        try:
            yield from pool.run(items)
        finally:
            pool.close()

    def _places(self, device: torch.device, num_items: int) -> list[tuple[str, int | None]]:
        """Device and number of threads of each worker."""
        if device.type == "cuda":
            count = self.workers or torch.cuda.device_count()
            devices = [f"cuda:{i % torch.cuda.device_count()}" for i in range(count)]
            return [(name, self.threads) for name in devices[: max(1, num_items)]]
        cores = _usable_cores()
        count = min(self.workers or cores, max(1, num_items))
        return [(str(device), self.threads or max(1, cores // (self.workers or cores)))] * count


class _Pool:
    """Worker processes and what each of them is doing."""

    def __init__(self, payload: bytes, places: list[tuple[str, int | None]]) -> None:
        self._payload = payload
        self._context = multiprocessing.get_context("spawn")
        self._deaths: Counter[int] = Counter()
        self._workers = [_WorkerProcess(self._context, payload, place) for place in places]

    def run(self, items: Sequence[SomeItem]) -> Iterator[tuple[SomeItem, int]]:
        queue, given_up = deque(items), []
        while queue or any(worker.item for worker in self._workers):
            for worker in self._workers:
                if worker.ready and not worker.item and queue:
                    worker.give(queue.popleft())
            for worker in self._answering():
                try:
                    done = worker.receive()
                except _DeadWorkerError as death:
                    item = self._replace(worker, death)
                    if item and self._deaths[item.index] >= MAX_DEATHS:
                        given_up.append(item)
                    elif item:
                        queue.appendleft(item)
                else:
                    if done:
                        yield done
        if given_up:
            raise _gave_up(given_up)

    def _answering(self) -> list[_WorkerProcess]:
        # A worker that died closes its end of the pipe, which counts as an answer too.
        answering = wait([worker.connection for worker in self._workers])
        return [worker for worker in self._workers if worker.connection in answering]

    def _replace(self, worker: _WorkerProcess, death: _DeadWorkerError) -> Any:
        if not worker.ready:
            raise _never_started(death)
        item = worker.item
        if item:
            self._deaths[item.index] += 1
        worker.close()
        self._workers[self._workers.index(worker)] = _WorkerProcess(
            self._context, self._payload, worker.place
        )
        return item

    def close(self) -> None:
        for worker in self._workers:
            worker.close()


class _DeadWorkerError(Exception):
    """The process is gone; the argument is its exit code."""


class _WorkerProcess:
    """One spawned process at the other end of a pipe."""

    def __init__(self, context: Any, payload: bytes, place: tuple[str, int | None]) -> None:
        self.place = place
        self.ready = False
        self.item: Any = None
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, payload, *place), daemon=True)
        needs_main = b"__main__" in payload
        with contextlib.nullcontext() if needs_main else _without_main_module():
            self._process.start()
        theirs.close()

    def give(self, item: WorkItem) -> None:
        self.item = item
        with contextlib.suppress(OSError):  # it died meanwhile: receive() will say so
            self.connection.send(item)

    def receive(self) -> tuple[Any, int] | None:
        try:
            kind, value = self.connection.recv()
        except (EOFError, OSError):
            self._process.join(timeout=5)
            raise _DeadWorkerError(self._process.exitcode) from None
        if kind == "error":
            raise value
        if kind == "ready":
            self.ready = True
            return None
        done, self.item = self.item, None
        assert done is not None
        return done, value

    def close(self) -> None:
        self.connection.close()
        if self._process.is_alive():
            self._process.terminate()
        self._process.join(timeout=5)


def _serve(connection: Connection, payload: bytes, device: str, threads: int | None) -> None:
    """Body of a worker process: get ready, do items until the pipe closes."""
    try:
        if threads:
            torch.set_num_threads(threads)
        worker = pickle.loads(payload).worker(torch.device(device))
        connection.send(("ready", None))
        while True:
            connection.send(("done", worker.do(connection.recv())))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the driver is gone or has closed the pipe: nothing is lost, items are written whole
    except BaseException as error:
        with contextlib.suppress(OSError):
            connection.send(("error", _sendable(error)))


def _sendable(error: BaseException) -> BaseException:
    if isinstance(error, CoarError):
        return error
    text = "".join(traceback.format_exception(error))
    return ExecutorError(f"a worker failed: {type(error).__name__}: {error}", got="\n" + text)


def _pickled(session: Session) -> bytes:
    try:
        return pickle.dumps(session)
    except Exception as error:  # pickle raises many kinds
        raise ExecutorError(
            "the experiment cannot be sent to other processes",
            expected="a task made by a task factory, or one that can be pickled",
            got=f"{type(error).__name__}: {error}",
            todo=FACTORY_HELP,
        ) from error


@contextlib.contextmanager
def _without_main_module() -> Iterator[None]:
    """Keep spawned processes from running the user's script again: they need nothing of it."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _never_started(death: _DeadWorkerError) -> ExecutorError:
    return ExecutorError(
        "a worker died before it was ready",
        expected="a process that imports the task and prepares the experiment",
        got=f"exit code {death.args[0]}",
        todo='if the model is defined in your script, put the script under `if __name__ == "__main__":`; '
        "if memory ran out, use fewer workers",
    )


def _gave_up(items: Sequence[WorkItem]) -> ExecutorError:
    names = ", ".join(f"{item.index} ({item})" for item in items)
    return ExecutorError(
        f"{len(items)} work items killed {MAX_DEATHS} workers each",
        got=f"shard {names}",
        todo="most often memory: use a smaller batch size or fewer workers, then run again; "
        "all others are kept",
    )
