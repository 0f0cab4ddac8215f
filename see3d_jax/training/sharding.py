"""Where arrays live: a device mesh and (path → placement) rules, outside the models.

Mesh axes: `data` (more samples), `fsdp` (more samples, and the weights are split), `view` (one
sample's views are split, and the weights too), `tensor` (wide matrices are split). Batches
[B, V, …] are placed on ((data, fsdp), view). Every weight of some size has one dimension split over
fsdp × view: no device holds a whole copy of the state. The same rules place parameters, their
moving average and the Adam moments, because all of them have the parameter's path at their end.
Vectors and small arrays are replicated.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import logging
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from see3d_jax.errors import InputError

AXES = ("data", "fsdp", "view", "tensor")
ROW_AXES, VIEW_AXIS = ("data", "fsdp"), "view"
WEIGHT_AXES = ("fsdp", "view")
BATCH = P(ROW_AXES, VIEW_AXIS)
# Keys of a batch without a views axis.
PER_SAMPLE_KEYS = ("clip_pixels",)
# Path → the dimension that `tensor` splits. Weights are [in, out]: the first matrix of a pair is
# split by its output, the second by its input, so that one sum over `tensor` per pair is all that
# has to be exchanged.
TENSOR_RULES: tuple[tuple[str, int], ...] = (
    (r"to_[qkv]/weight$", 1),
    (r"to_out/0/weight$", 0),
    (r"ff/net/0/proj/weight$", 1),
    (r"ff/net/2/weight$", 0),
)
MIN_SPLIT_BYTES = 2**17


def make_mesh(
    config: ml_collections.ConfigDict, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh from `config.mesh`; one axis may be −1 for "all that are left".

    `devices` may be those of a machine that is not there (`jax.experimental.topologies`); by
    default all that are. Raises InputError when the axes do not multiply to their number, or the
    batch or its views do not divide over them.
    """
    count = jax.device_count() if devices is None else len(devices)
    sizes = [int(config.mesh[axis]) for axis in AXES]
    if sizes.count(-1) == 1:
        sizes[sizes.index(-1)] = max(1, count // abs(int(np.prod(sizes))))
    if min(sizes) < 1 or int(np.prod(sizes)) != count:
        asked = ", ".join(f"{axis}={config.mesh[axis]}" for axis in AXES)
        raise InputError(
            f"config.mesh ({asked}) does not fit {count} device(s): its axes must multiply to "
            f"{count}, and at most one may be -1"
        )
    if config.batch_size % (sizes[0] * sizes[1] * config.accumulate):
        raise InputError(
            f"config.batch_size={config.batch_size} is not a multiple of mesh data × fsdp × "
            f"config.accumulate = {sizes[0] * sizes[1] * config.accumulate}"
        )
    if config.data.views % sizes[2]:
        raise InputError(
            f"config.data.views={config.data.views} is not a multiple of mesh view = {sizes[2]}"
        )
    return device_mesh(sizes, jax.devices() if devices is None else devices)


def device_mesh(sizes: Sequence[int], devices: Sequence[jax.Device]) -> Mesh:
    """A mesh of `AXES` over exactly as many devices, neighbours in the machine kept together.

    An axis may take a part of one of the machine's own axes. `jax.make_mesh` allows that on v5e
    only, and refuses 8 × 8 on a torus of 4 × 4 × 4.
    """
    arranged = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def state_shardings(state: Any, mesh: Mesh, min_split_bytes: int | None = None) -> Any:
    """A NamedSharding for every leaf of `state` (arrays or abstract arrays).

    Leaves below `min_split_bytes` (default `MIN_SPLIT_BYTES`) are replicated.
    """
    least = MIN_SPLIT_BYTES if min_split_bytes is None else min_split_bytes

    def place(path: Any, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, _weight_spec(name, leaf, mesh, least))

    return jax.tree_util.tree_map_with_path(place, state)


def _weight_spec(name: str, leaf: Any, mesh: Mesh, min_split_bytes: int) -> P:
    if leaf.ndim < 2 or leaf.size * leaf.dtype.itemsize < min_split_bytes:
        return P()
    entries: list[Any] = [None] * leaf.ndim
    tensor = mesh.shape["tensor"]
    for pattern, dimension in TENSOR_RULES:
        divides = tensor > 1 and leaf.shape[dimension] % tensor == 0
        if divides and re.search(pattern, name):
            entries[dimension] = "tensor"
    parts = int(np.prod([mesh.shape[axis] for axis in WEIGHT_AXES]))
    free = [i for i, entry in enumerate(entries) if entry is None and leaf.shape[i] % parts == 0]
    if free:
        # The one before the last, if it divides: its pieces are contiguous rows. Pieces of the last
        # would be scattered over memory tiles, and XLA reduces such gradients whole, everywhere.
        entries[min(free, key=lambda i: abs(i - (leaf.ndim - 2)))] = WEIGHT_AXES
    elif parts > 1:
        logging.warning("%s %s does not divide by fsdp × view = %d", name, leaf.shape, parts)
    return P(*entries)


def batch_shardings(batch: dict[str, Any], mesh: Mesh) -> dict[str, NamedSharding]:
    """Placement of every array of a batch."""
    return {
        key: NamedSharding(mesh, P(ROW_AXES) if key in PER_SAMPLE_KEYS else BATCH) for key in batch
    }


def local_rows(mesh: Mesh, batch_size: int) -> tuple[int, ...]:
    """The rows of a batch that the devices of this process hold, in ascending order.

    Processes whose devices differ along `view` or `tensor` only need the same rows.
    """
    parts = NamedSharding(mesh, P(ROW_AXES)).addressable_devices_indices_map((batch_size,))
    return tuple(sorted({row for (part,) in parts.values() for row in _rows(part, batch_size)}))


def _rows(part: slice, batch_size: int) -> range:
    return range(*part.indices(batch_size))


def put_batch(
    batch: dict[str, np.ndarray], mesh: Mesh, batch_size: int | None = None
) -> dict[str, jax.Array]:
    """Host arrays [B, V, …] → device arrays placed on ((data, fsdp), view).

    With a `batch_size` the arrays hold only the `local_rows` of a batch of that size.
    """
    shardings = batch_shardings(batch, mesh)
    if batch_size is None:
        return put_whole(batch, shardings)
    place = {row: number for number, row in enumerate(local_rows(mesh, batch_size))}

    def put(rows: np.ndarray, sharding: NamedSharding) -> jax.Array:
        def part(index: tuple[slice, ...]) -> np.ndarray:
            wanted = _rows(index[0], batch_size)  # neighbours in the batch are neighbours here
            first = place[wanted[0]]
            return rows[(slice(first, first + len(wanted)), *index[1:])]

        return jax.make_array_from_callback((batch_size, *rows.shape[1:]), sharding, part)

    return {key: put(value, shardings[key]) for key, value in batch.items()}


def put_whole(tree: Any, shardings: Any) -> Any:
    """Arrays that every process holds whole → device arrays; each process keeps its own part."""

    def put(leaf: Any, sharding: NamedSharding) -> jax.Array:
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(put, tree, shardings)
