"""Many processes as one run: start-up, agreement between processes, and stopping together.

A run has one process per TPU host, or one per GPU under SLURM; all of them execute the same program
on one global mesh. Process 0, the lead, alone writes logs, pictures and config; all take part in
checkpoints. Whatever decides what happens next (stop, restore, fall back) must be the same
everywhere, or the processes wait for each other for ever: such decisions go through this module.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from see3d_jax.errors import InputError

JOIN_SECONDS = 300  # hosts of one job start minutes apart on busy clusters
BARRIER_SECONDS = 1800  # one host may have to read all of a checkpoint from a cold disk
_barriers = itertools.count()  # the same number in every process, as they all make the same calls


def start(
    coordinator: str = "",
    num_processes: int | None = None,
    process_id: int | None = None,
    join_seconds: int = JOIN_SECONDS,
) -> None:
    """Joins the other processes of the run; must come before anything touches a device.

    Without explicit values the environment of the job is asked (TPU pod, SLURM, Open MPI), and
    where that names no others this is a run of one process. Under SLURM each task takes the GPU of
    its local rank, as JAX does; a single task keeps all of them.

    Args:
      coordinator: "host:port" of process 0; empty = found automatically.
      num_processes: how many there are; 1 = do not look for others.
      process_id: number of this one, from 0.
      join_seconds: when not all have arrived by then, the process ends with one line and code 1.

    Raises:
      InputError: values that do not fit together.
    """
    _check(coordinator, num_processes, process_id, join_seconds)
    if num_processes == 1 or (not coordinator and os.environ.get("SLURM_NTASKS") == "1"):
        return
    # Its own time over, JAX would abort the interpreter with a native stack trace.
    who = f"process {process_id} of {num_processes}" if coordinator else "this process"
    timer = threading.Timer(join_seconds, _give_up, (who, coordinator, join_seconds))
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            coordinator or None,
            num_processes,
            process_id,
            initialization_timeout=join_seconds + 60,
        )
    except ValueError as error:
        if "should be defined" not in str(error):
            raise InputError(f"cannot find the other processes of this run: {error}") from error
        # No cluster is what a laptop looks like: a run of one process.
    finally:
        timer.cancel()


def _check(
    coordinator: str, num_processes: int | None, process_id: int | None, join_seconds: int
) -> None:
    if join_seconds < 1:
        raise InputError(f"--join_seconds: must be at least 1, got {join_seconds}")
    if num_processes is not None and num_processes < 1:
        raise InputError(f"--num_processes: must be at least 1, got {num_processes}")
    if not coordinator and process_id is None and num_processes in (None, 1):
        return
    if not coordinator or num_processes is None or process_id is None:
        raise InputError(
            "--coordinator, --num_processes and --process_id belong together: give all three, or "
            "none to have them found (TPU pod, SLURM)"
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise InputError(
            f"--coordinator: want host:port of process 0, e.g. 10.0.0.1:1234, got {coordinator!r}"
        )
    if not 0 <= process_id < num_processes:
        raise InputError(
            f"--process_id: must lie between 0 and num_processes − 1 = {num_processes - 1}, got "
            f"{process_id}"
        )


def _give_up(who: str, coordinator: str, join_seconds: int) -> None:
    at = f" at {coordinator}" if coordinator else ""
    print(
        f"error: {who} waited {join_seconds} s in vain for the run to assemble{at}: start every "
        "process with the same --coordinator and --num_processes and its own --process_id, and see "
        "that all hosts reach the coordinator's port",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)  # the main thread is inside native code that nothing interrupts


def is_lead() -> bool:
    """Whether this process writes the run's logs, pictures and config."""
    return jax.process_index() == 0


def everywhere(condition: bool) -> bool:
    """Whether `condition` holds in every process. All processes must call it at the same point."""
    barrier("everywhere")
    return bool(np.all(multihost_utils.process_allgather(np.asarray(condition))))


def total(count: int) -> int:
    """The sum of `count` over all processes. All processes must call it at the same point."""
    barrier("total")
    return int(np.sum(multihost_utils.process_allgather(np.asarray(count))))


def barrier(name: str) -> None:
    """Waits until every process is at the point called `name`.

    Asks the coordinator and no device, because collectives on CPUs have no patience: Gloo gives a
    late process 30 seconds.
    """
    wait = ocp.multihost.get_barrier_sync_fn()
    wait(key=f"{name} {next(_barriers)}", timeout_ms=1000 * BARRIER_SECONDS)


def fetch(array: jax.Array) -> np.ndarray:
    """The whole of an array that may be spread over processes. All processes must call it."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def settle(arrays: Any) -> None:
    """On simulated devices, waits for a program to end before another one starts.

    XLA runs all devices of a CPU in one pool of threads; two programs with collectives under way
    can each hold threads that the other waits for.
    """
    if jax.default_backend() == "cpu" and jax.device_count() > 1:
        jax.block_until_ready(arrays)


class StopSignal:
    """Set by SIGTERM (what clusters send before they take a machine away)."""

    def __init__(self) -> None:
        self.received = False

    def agreed(self, step: int) -> bool:
        """Whether the run is to save and end after `step`, the same answer in every process.

        Must be asked after every step. Of many processes it is enough that one gets the signal: JAX
        tells the others, and all learn to stop at the first step that none of them has passed.
        """
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self.received


@contextlib.contextmanager
def stop_signal() -> Iterator[StopSignal]:
    """Listens for SIGTERM while the block runs.

    Of one process only the main thread can; in a run of many, JAX listens since `start`.
    """
    stop = StopSignal()
    if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def request(signum: int, frame: object) -> None:
        stop.received = True

    before = signal.signal(signal.SIGTERM, request)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
