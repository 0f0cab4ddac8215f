"""How the per-video jobs are run: one after another, in a pool of processes, or on a Ray cluster.

A job is a picklable function of one item that writes its result to disk under its final name only
when it is complete; so jobs may be repeated freely, and a rerun skips what is there. On a cluster
the inputs and the output folder have to be on a file system that every node sees.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import dataclasses
import multiprocessing
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from see3d_jax.errors import InputError

TASKS_PER_WORKER = 50  # then a fresh process: native libraries leak
RAY_RETRIES = 4  # of one item whose worker or node died
RAY_AHEAD = 2  # tasks handed to the cluster per CPU, so that no CPU waits for the driver


@dataclasses.dataclass(frozen=True)
class Runner:
    """Where jobs run.

    Attributes:
      kind: serial, process or ray.
      workers: processes of the pool; ignored elsewhere.
      address: of the Ray cluster; "" starts one on this machine.
      gpus: share of a GPU that one job takes on Ray.
    """

    kind: str = "serial"
    workers: int = 1
    address: str = ""
    gpus: float = 0.0


class WorkerLost(RuntimeError):
    """The worker died (killed, out of memory, crash in native code) repeatedly on this item."""


class LimitExceeded(RuntimeError):
    """A job took longer or needed more memory than it may; the message says which."""


def run_jobs(
    job: Callable[[Any], Any], items: Sequence[Any], runner: Runner
) -> Iterator[tuple[Any, Any]]:
    """Yields (item, result) as jobs finish; result is a WorkerLost when its process was killed.

    Exceptions of a job end the run: jobs quarantine bad items themselves.
    """
    if runner.kind == "ray":
        yield from _run_on_ray(job, items, runner)
    elif runner.kind == "process" and runner.workers > 1:
        yield from _run_in_processes(job, items, runner.workers)
    else:
        for item in items:
            yield item, job(item)


@contextlib.contextmanager
def limited(seconds: float, megabytes: int) -> Iterator[None]:
    """Ends what runs inside with LimitExceeded after `seconds` or `megabytes` of new memory."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = _address_space() + megabytes * 2**20
    timed = threading.current_thread() is threading.main_thread()

    def stop(signum: int, frame: object) -> None:
        raise LimitExceeded(f"took longer than {seconds:g} s")

    if timed:
        before = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
        yield
    except MemoryError:
        raise LimitExceeded(f"needs more than {megabytes} MB") from None
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        if timed:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def _address_space() -> int:
    """Bytes of address space that this process has now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def die_with_parent() -> None:
    """Makes the kernel kill this process when its parent dies, so that no orphan works on."""
    if sys.platform == "linux":
        parent_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGKILL)


def _run_in_processes(
    job: Callable[[Any], Any], items: Sequence[Any], workers: int
) -> Iterator[tuple[Any, Any]]:
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        os.environ.setdefault(name, "1")  # read by the workers; they share the cores already
    waiting = collections.deque(items)
    suspects: collections.deque[Any] = collections.deque()  # were running when a worker died
    while waiting or suspects:
        alone = bool(suspects)  # one at a time, so that the guilty one is known
        queue = suspects if alone else waiting
        running: dict[Future, Any] = {}
        with ProcessPoolExecutor(
            1 if alone else workers,
            mp_context=multiprocessing.get_context("spawn"),
            max_tasks_per_child=TASKS_PER_WORKER,
            initializer=die_with_parent,
        ) as pool:
            try:
                while queue or running:
                    while queue and len(running) < (1 if alone else workers + 1):
                        item = queue.popleft()
                        running[pool.submit(job, item)] = item
                    done, _ = wait(running, return_when=FIRST_COMPLETED)
                    for future in done:
                        result = future.result()
                        yield running.pop(future), result
            except BrokenProcessPool:
                lost = list(running.values())
                if alone:
                    for item in lost:
                        yield item, WorkerLost("the process working on it was killed or crashed")
                else:
                    suspects.extend(lost)


def _run_on_ray(
    job: Callable[[Any], Any], items: Sequence[Any], runner: Runner
) -> Iterator[tuple[Any, Any]]:
    try:
        import ray
    except ImportError:
        raise InputError("--runner ray: needs Ray (pip install 'see3d_jax[curate]')") from None
    own = not ray.is_initialized()
    if own:
        try:
            ray.init(address=runner.address or None, log_to_driver=False, logging_level="error",
                     include_dashboard=False if not runner.address else None)  # fmt: skip
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:160]
            raise InputError(f"--address {runner.address}: no Ray cluster ({reason})") from None
    # a dead worker or node is the cluster's trouble: Ray starts the task again elsewhere
    task = ray.remote(
        num_cpus=1, num_gpus=runner.gpus, max_retries=RAY_RETRIES, max_calls=TASKS_PER_WORKER
    )(job)
    waiting, running = collections.deque(items), {}
    try:
        while waiting or running:
            ahead = RAY_AHEAD * max(1, int(ray.cluster_resources().get("CPU", 1)))
            while waiting and len(running) < ahead:
                item = waiting.popleft()
                running[task.remote(item)] = item
            done, _ = ray.wait(list(running), timeout=5.0)
            for reference in done:
                item = running.pop(reference)
                try:
                    result = ray.get(reference)
                except ray.exceptions.RayTaskError as error:
                    raise error.as_instanceof_cause() from None
                except ray.exceptions.RayError as error:
                    result = WorkerLost(f"its worker was lost ({type(error).__name__})")
                yield item, result
    finally:
        if own:
            ray.shutdown()


def cores() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
