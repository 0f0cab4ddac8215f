"""The machines that `tools.plan_aot` plans for: what their chips can do, and compiling for them.

A topology is named by chip and arrangement: "v5e:8x8", "v5p:4x4x4", "v6e:16x16", "h100:8". Its
devices can be compiled for without having one: TPUs through libtpu (`pip install '.[aot]'`), GPUs
through JAX's CUDA plugin (`pip install '.[gpu]'`). Nothing can run on them. JAX must not have
started when `devices` is called, because the compilers read the environment once.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
from pathlib import Path
from typing import Any

from see3d_jax.errors import InputError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of accelerator.

    Attributes:
      name: how a topology names it.
      device_kind: how JAX names it.
      hbm_limit: bytes of memory that a program may use.
      hbm_bandwidth: bytes per second.
      wire_bandwidth: bytes per second that a chip can send along one ring of its network.
      attention_share: share of the peak that attention with 64-wide heads can reach at best.
      price: US dollars per chip and hour, on demand; a default for --price.
      dimensions: axes of its network; 0: GPUs, of which there are `per_host` to a host.
      per_host: chips of one host, where that matters.
    """

    name: str
    device_kind: str
    hbm_limit: int
    hbm_bandwidth: float
    wire_bandwidth: float
    attention_share: float
    price: float
    dimensions: int
    per_host: int = 0


# Sizes and bandwidths: cloud.google.com/tpu/docs/{v5e,v5p,v6e} and NVIDIA's data sheet of H100 SXM.
# The TPUs' memory limits are those the compiler reports (the rest is reserved); of a GPU's memory a
# part is left to the driver. A chip's links are documented together, both directions added: a ring
# along one axis of the torus has two of its four (v5p: six) links, so on v5e 400 / 2 · 2/4 = 100
# GB/s; NVLink is 900 / 2 GB/s. Attention: 64-wide heads fill half of a 128 × 128 matrix unit (v5e,
# v5p), a quarter of a 256 × 256 one (v6e); on H100 the exponentials take as long as the products.
# Prices: about the list prices on demand in US regions in 2025. They vary, hence --price.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", "TPU v5 lite", int(15.75 * GIB), 819e9, 100e9, 0.5, 1.20, 2),
        Chip("v5p", "TPU v5", int(95.74 * GIB), 2765e9, 200e9, 0.5, 4.20, 3),
        Chip("v6e", "TPU v6 lite", int(31.25 * GIB), 1638e9, 200e9, 0.25, 2.70, 2),
        Chip("h100", "NVIDIA H100 80GB HBM3", int(75.0 * GIB), 3350e9, 450e9, 0.5, 11.06, 0, 8),
    )
}

# What XLA has to know of an H100 to compile for it without one: public properties of the device.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3350000000000 l2_cache_size: 52428800 device_memory_size: 85899345920
  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclasses.dataclass(frozen=True)
class Topology:
    """A number of connected chips of one kind.

    Attributes:
      name: as given, e.g. "v5e:8x8".
      chip: what it is made of.
      shape: chips along each axis of the network, or (number,) of GPUs.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of chips, each of which is one device."""
        return math.prod(self.shape)


def parse_topology(name: str) -> Topology:
    """Raises InputError for a name that is no topology."""
    expected = "expected v5e:AxB, v5p:AxBxC, v6e:AxB or h100:N, e.g. v5e:8x8"
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    chip = CHIPS.get(match[1]) if match else None
    if match is None or chip is None:
        raise InputError(f"--topology {name!r} is not known: {expected}")
    shape = tuple(int(size) for size in match[2].split("x"))
    if len(shape) != max(1, chip.dimensions) or min(shape) < 1:
        raise InputError(f"--topology {name!r} is no arrangement of {chip.name} chips: {expected}")
    size = math.prod(shape)
    if chip.per_host and size > chip.per_host and size % chip.per_host:
        raise InputError(
            f"--topology {name!r}: more than one host needs whole hosts of {chip.per_host}"
        )
    return Topology(name, chip, shape)


def devices(topology: Topology) -> list[Any]:
    """Devices to compile for, in the order of their places.

    Raises InputError when the compiler for them is not installed or knows no such arrangement.
    """
    return _tpus(topology) if topology.chip.dimensions else _gpus(topology)


def _tpus(topology: Topology) -> list[Any]:
    library = tpu_library()
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "TPU_LIBRARY_PATH": str(library),
        # Otherwise a second process on this machine aborts, without a word if stderr is hidden.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        # It would look for the machine's own TPU, for seconds and with pages of warnings.
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_HOST_BOUNDS": "1,1,1",
        "TPU_MIN_LOG_LEVEL": "3",
    }
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology.name).devices
    except Exception as error:  # JaxRuntimeError or whatever a wrong library raises
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"--topology {topology.name}: libtpu refuses it ({reason})") from error
    return _checked(topology, found)


def tpu_library() -> Path:
    """The TPU compiler: TPU_LIBRARY_PATH, or the installed package; InputError without one."""
    given = os.environ.get("TPU_LIBRARY_PATH")
    if given:
        if not Path(given).is_file():
            raise InputError(f"TPU_LIBRARY_PATH={given}: no such file; unset it or point it right")
        return Path(given)
    spec = importlib.util.find_spec("libtpu")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / "libtpu.so").is_file():
            return Path(folder) / "libtpu.so"
    raise InputError(
        "compiling for a TPU needs libtpu, which is not installed: pip install '.[aot]' "
        "(or set TPU_LIBRARY_PATH to a libtpu.so)"
    )


def _gpus(topology: Topology) -> list[Any]:
    os.environ["JAX_PLATFORMS"] = "cpu"
    from jax.experimental import topologies

    hosts = max(1, topology.size // topology.chip.per_host)
    try:
        found = topologies.get_topology_desc(
            topology_name=topology.name, platform="cuda", target_config=_H100,
            topology=f"1x{hosts}x{topology.size // hosts}",
        ).devices  # fmt: skip
    except Exception as error:  # RuntimeError or KeyError without the plugin
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"--topology {topology.name}: compiling for a GPU needs JAX's CUDA plugin, "
            f"pip install '.[gpu]' ({reason})"
        ) from error
    return _checked(topology, found)


def _checked(topology: Topology, found: list[Any]) -> list[Any]:
    kinds = {device.device_kind for device in found}
    if len(found) != topology.size or kinds != {topology.chip.device_kind}:
        raise InputError(
            f"--topology {topology.name}: the compiler makes {len(found)} devices of {kinds} of it"
        )
    return list(found)
