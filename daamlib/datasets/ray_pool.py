"""Workers that are Ray actors, on this machine or on a cluster; see `daamlib.datasets.workers` for what a pool is."""

import os
from dataclasses import dataclass
from typing import Any

import torch

from ..extras import needs
from .job import Job
from .workers import WRONG, Died, as_plain


class Maker:
    """One actor: it loads the model once and makes shards. What is wrong in any worker is returned, not raised."""

    def __init__(self, job: Job):
        self.job, self.maker = job, None

    def load(self) -> int | Exception:
        try:
            torch.set_num_threads(self.job.threads)
            self.maker = self.job.open()
        except WRONG as error:
            return as_plain(error)
        return 0

    def make(self, shard: range) -> int | Exception:
        try:
            return sum(1 for _ in self.maker.make(shard))
        except WRONG as error:
            return as_plain(error)


@dataclass(frozen=True, eq=False)
class _Worker:
    actor: Any


class Actors:
    """One actor a GPU where the cluster has GPUs, else one for every `job.threads` CPU cores.

    address: of a cluster, as for `ray.init`; None: a cluster of this machine alone, for as long as this runs. A Ray
    that the caller has initialised is used as it is. size: of actors, None: as many as there is room for.

    Raises ImportError without Ray, ConnectionError without a cluster at the address, ValueError where there is no room
    for so many.
    """

    def __init__(self, job: Job, size: int | None = None, address: str | None = None):
        self._ray = ray = _import_ray()
        self._ours = not ray.is_initialized()
        self._waiting: dict[Any, _Worker] = {}  # for an answer, by its reference
        if self._ours:
            local = {"include_dashboard": False, "object_store_memory": 2**27}  # nothing but the job is kept there
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            options = {"address": address} if address else {"address": "local", **local}
            try:
                ray.init(**options, logging_level="error", log_to_driver=False)
            except ConnectionError as error:
                raise ConnectionError(
                    f"no Ray cluster answers at {address}: {error}. One that asks for a token, as Ray does from 2.61 "
                    "on, wants RAY_AUTH_MODE=token here and the token that `ray get-auth-token` shows there"
                ) from error
        resources = ray.cluster_resources()
        gpus, cores = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
        on_gpus = gpus > 0 and job.device in (None, "cuda")
        room = gpus if on_gpus else cores // job.threads
        self.size = room if size is None else size
        if not 1 <= self.size <= room:
            self.close()
            each = "a GPU" if on_gpus else f"{job.threads} CPU cores (--threads)"
            raise ValueError(
                f"there is room for {room} workers, asked for {self.size}: the cluster has {gpus} GPUs and {cores} CPU "
                f"cores, and each worker takes {each}"
            )
        needs = {"num_gpus": 1, "num_cpus": 1} if on_gpus else {"num_gpus": 0, "num_cpus": job.threads}
        self._make_actor = ray.remote(**needs, max_restarts=0)(Maker).remote
        self._job = ray.put(job)

    def start(self) -> _Worker:
        worker = _Worker(self._make_actor(self._job))
        self._waiting[worker.actor.load.remote()] = worker
        return worker

    def give(self, worker: _Worker, shard: range) -> None:
        self._waiting[worker.actor.make.remote(shard)] = worker

    def wait(self) -> tuple[_Worker, int | Exception | Died]:
        (answer, *_), _ = self._ray.wait(list(self._waiting))
        worker = self._waiting.pop(answer)
        try:
            return worker, self._ray.get(answer)
        except self._ray.exceptions.RayError as error:  # of the actor, its node or the network, or raised by `make`
            self.stop(worker)
            return worker, Died(str(error).strip())

    def stop(self, worker: _Worker) -> None:
        self._ray.kill(worker.actor)

    def close(self) -> None:
        if self._ours:
            self._ray.shutdown()  # ends the actors too
        else:
            for worker in set(self._waiting.values()):
                self.stop(worker)


def _import_ray():
    with needs("ray"):
        import ray
    return ray
