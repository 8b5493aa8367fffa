"""Handing shards of a dataset to workers that may die, and workers that are processes of this machine.

A pool has `size` and

    start() -> worker         it loads the model, and then says so
    give(worker, shard)       to one that has nothing to do
    wait() -> (worker, word)  the next that has something to say, and what: the images made (0 when it has loaded), an
                              exception that ends the run, or `Died`
    stop(worker), close()     one, or all
"""

import multiprocessing
import signal
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import torch

from .job import Job

DEATHS = 3  # of workers over one shard, or over loading the model, that end a run
WRONG = (ValueError, TypeError, OSError)  # would come again in any worker: settings, a missing file, a full disk


class WorkerError(RuntimeError):
    """Workers died again and again."""


@dataclass(frozen=True)
class Died:
    """A worker is gone. reason: what is known of it."""

    reason: str


def spread(shards: Sequence[range], pool, done: Callable[[int], None]) -> None:
    """Have all shards made by the workers of `pool`; `done(images made)` after each. The pool is closed in the end.

    A worker that dies is replaced and its shard made again: images that were finished are kept, none is made twice.
    Raises the exception that a worker reports, and WorkerError where three died over the same shard or, without one
    that succeeded between them, while they loaded the model.
    """
    pending, deaths = deque(shards), Counter()
    work: dict[object, range | None] = {}  # None: it is loading
    try:
        for _ in range(min(pool.size, len(pending))):
            work[pool.start()] = None
        while pending or any(shard is not None for shard in work.values()):
            worker, word = pool.wait()
            shard = work.pop(worker)
            if isinstance(word, Exception):
                raise word
            if isinstance(word, Died):
                deaths[shard] += 1
                if deaths[shard] == DEATHS:
                    what = "loading the model" if shard is None else f"the images {shard.start} to {shard.stop - 1}"
                    raise WorkerError(f"{DEATHS} workers died over {what}, the last one: {word.reason}")
                if shard is not None:
                    pending.appendleft(shard)
                if pending:
                    work[pool.start()] = None
                continue
            deaths[shard] = 0
            done(word)
            if pending:
                work[worker] = pending.popleft()
                pool.give(worker, work[worker])
            else:
                pool.stop(worker)
    finally:
        pool.close()


def as_plain(error: Exception) -> Exception:
    """One of WRONG by its plain type: those of libraries do not all survive pickling."""
    return next(kind for kind in WRONG if isinstance(error, kind))(str(error))


@dataclass(frozen=True, eq=False)
class _Worker:
    process: BaseProcess
    connection: Connection


class Processes:
    """Workers that are processes of this machine, started afresh ("spawn"); with several GPUs they take turns."""

    def __init__(self, job: Job, size: int):
        self.job, self.size = job, size
        self._context = multiprocessing.get_context("spawn")
        self._workers: list[_Worker] = []
        self._ending: list[BaseProcess] = []
        self._started = 0

    def start(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_work, args=(self.job, self._device(), theirs), daemon=True)
        process.start()
        theirs.close()  # so that the end of the process is the end of the connection
        self._started += 1
        self._workers.append(_Worker(process, ours))
        return self._workers[-1]

    def _device(self) -> str | None:
        several = self.job.device in (None, "cuda") and torch.cuda.device_count() > 1
        return f"cuda:{self._started % torch.cuda.device_count()}" if several else None

    def give(self, worker: _Worker, shard: range) -> None:
        try:
            worker.connection.send(shard)
        except OSError:  # it has just died, which `wait` will see
            pass

    def wait(self) -> tuple[_Worker, int | Exception | Died]:
        ready = wait([worker.connection for worker in self._workers])[0]
        worker = next(worker for worker in self._workers if worker.connection is ready)
        try:
            return worker, worker.connection.recv()
        except (EOFError, OSError):
            worker.process.join()
            self.stop(worker)
            code = worker.process.exitcode
            by = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
            return worker, Died(f"process {worker.process.pid} {by}; what it said stands above")

    def stop(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        self._ending.append(worker.process)
        worker.connection.close()  # which ends an idle process

    def close(self) -> None:
        for worker in list(self._workers):
            worker.process.terminate()  # all files it writes are whole or not there
            self.stop(worker)
        for process in self._ending:
            process.join()


def _work(job: Job, device: str | None, connection: Connection) -> None:
    """What a process does until its connection ends, with the driver or by it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the driver, which ends this process
    torch.set_num_threads(job.threads)
    try:
        maker = job.open(device)
        connection.send(0)
        while True:
            connection.send(sum(1 for _ in maker.make(connection.recv())))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except WRONG as error:
        connection.send(as_plain(error))
