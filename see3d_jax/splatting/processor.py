"""A computer without an accelerator, used well: all its cores, and memory that stays.

XLA works through a program for the processor op by op, and the ops of the renderer are too small to
share. So the processor is split into several JAX devices, each of which draws a band of the image
(`render.render_within` with the mesh of `host_mesh`).
"""

from __future__ import annotations

import ctypes
import os

import jax
from jax.sharding import AxisType, Mesh

BAND = "band"  # the mesh's axis
# For `jax.jit` of what draws; means nothing to accelerators. Handing parts of small ops to other
# threads and waiting for them took more time than the ops (a step on two cores: 184 ms with it, 140
# without), and vectors as wide as the processor has, where it has such, take off a tenth.
COMPILER_OPTIONS = {
    "xla_disable_hlo_passes": "cpu-parallel-task-assigner",
    "xla_cpu_prefer_vector_width": 512,
}
# Every device has a copy of the photos, and bands of few tile rows share the work less evenly.
MOST_DEVICES = 8
# Of glibc's mallopt, from its malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8


def use_all_cores(devices: int | None = None) -> None:
    """Splits the processor into `devices` of JAX, by default one per core, and keeps memory.

    To be called before JAX is used: once it has started, its devices stay as they are.
    """
    keep_memory()
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        cores = os.cpu_count() or 1
    try:
        jax.config.update("jax_num_cpu_devices", devices or min(cores, MOST_DEVICES))
    except RuntimeError:
        return


def keep_memory() -> None:
    """Has glibc keep what is freed: every step of a fit asks for the same memory again.

    Its pages, 50 MB and more, went back to the system after each step and were cleared anew, which
    took an eighth of the time. Threads that exist already may go on as they did. Elsewhere than on
    Linux with glibc nothing changes.
    """
    try:
        library = ctypes.CDLL(None)
        library.mallopt(_MMAP_THRESHOLD, 1 << 30)
        library.mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)
        library.mallopt(_ARENA_MAX, 1)  # those of threads give memory back all the same
    except (AttributeError, OSError, TypeError):  # no such function, no such library
        return


def host_mesh() -> Mesh | None:
    """The processor's devices as a mesh for `render_within`; None with one, or an accelerator."""
    devices = jax.local_devices()
    if devices[0].platform != "cpu" or len(devices) == 1 or jax.process_count() > 1:
        return None
    return jax.make_mesh((len(devices),), (BAND,), (AxisType.Auto,), devices=devices)
