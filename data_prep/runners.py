"""How the per-video jobs are run: one after another, or in a pool of processes.

A job is a picklable function of one item that writes its result to disk under its final name only
when it is complete; so jobs may be repeated freely, and a rerun skips what is there.
"""

from __future__ import annotations

import collections
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

TASKS_PER_WORKER = 50  # then a fresh process: native libraries leak


def run_jobs(
    job: Callable[[Any], Any], items: Sequence[Any], workers: int
) -> Iterator[tuple[Any, Any]]:
    """Yields (item, result) as jobs finish; result is a WorkerLost when its process was killed.

    Exceptions of a job end the run: jobs quarantine bad items themselves.
    """
    if workers <= 1:
        for item in items:
            yield item, job(item)
        return
    yield from _run_in_processes(job, items, workers)


class WorkerLost(RuntimeError):
    """The worker died (killed, out of memory, crash in native code) twice on this item."""


def _run_in_processes(
    job: Callable[[Any], Any], items: Sequence[Any], workers: int
) -> Iterator[tuple[Any, Any]]:
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
