"""Where arrays live: a device mesh and ordered (path → placement) rules, outside the models.

Mesh axes: `data` (more samples), `fsdp` (more samples, and the weights are split), `view` (one
sample's views are split), `tensor` (wide matrices are split). Batches [B, V, …] are placed on
((data, fsdp), view). The same rules place parameters, their moving average and the Adam moments,
because all three have the parameter's path at their end. Anything no rule matches, and anything
small, is replicated, except that large arrays have their largest divisible axis split over `fsdp`.
"""

from __future__ import annotations

import re
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import logging
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from see3d_jax.errors import InputError

AXES = ("data", "fsdp", "view", "tensor")
BATCH = P(("data", "fsdp"), "view")
# Weights are [in, out]: the first matrix of a pair is split by its output, the second by its input,
# so that one sum over `tensor` per pair is all that has to be exchanged.
RULES: tuple[tuple[str, P], ...] = (
    (r"to_[qkv]/weight$", P("fsdp", "tensor")),
    (r"to_out/0/weight$", P("tensor", "fsdp")),
    (r"ff/net/0/proj/weight$", P("fsdp", "tensor")),
    (r"ff/net/2/weight$", P("tensor", "fsdp")),
)
MIN_SPLIT_BYTES = 4 * 2**20


def make_mesh(config: ml_collections.ConfigDict) -> Mesh:
    """A mesh over all devices from `config.mesh`; one axis may be −1 for "all that are left".

    Raises InputError when the axes do not multiply to the number of devices.
    """
    devices = jax.device_count()
    sizes = [int(config.mesh[axis]) for axis in AXES]
    if sizes.count(-1) == 1:
        sizes[sizes.index(-1)] = max(1, devices // abs(int(np.prod(sizes))))
    if min(sizes) < 1 or int(np.prod(sizes)) != devices:
        asked = ", ".join(f"{axis}={config.mesh[axis]}" for axis in AXES)
        raise InputError(
            f"config.mesh ({asked}) does not fit {devices} device(s): its axes must multiply to "
            f"{devices}, and at most one may be -1"
        )
    if config.batch_size % (sizes[0] * sizes[1]):
        raise InputError(
            f"config.batch_size={config.batch_size} is not a multiple of mesh data × fsdp = "
            f"{sizes[0] * sizes[1]}"
        )
    if config.data.views % sizes[2]:
        raise InputError(
            f"config.data.views={config.data.views} is not a multiple of mesh view = {sizes[2]}"
        )
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def state_shardings(
    state: Any,
    mesh: Mesh,
    rules: tuple[tuple[str, P], ...] = RULES,
    min_split_bytes: int | None = None,
) -> Any:
    """A NamedSharding for every leaf of `state` (arrays or abstract arrays).

    Leaves below `min_split_bytes` (default `MIN_SPLIT_BYTES`) are replicated.
    """
    least = MIN_SPLIT_BYTES if min_split_bytes is None else min_split_bytes

    def place(path: Any, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, _spec(name, leaf, mesh, rules, least))

    return jax.tree_util.tree_map_with_path(place, state)


def _spec(
    name: str, leaf: Any, mesh: Mesh, rules: tuple[tuple[str, P], ...], min_split_bytes: int
) -> P:
    if leaf.size * leaf.dtype.itemsize < min_split_bytes:
        return P()
    for pattern, spec in rules:
        if re.search(pattern, name):
            if all(leaf.shape[i] % mesh.shape[axis] == 0 for i, axis in enumerate(spec) if axis):
                return spec
            logging.warning("%s %s does not divide over %s", name, leaf.shape, spec)
            break
    fsdp = mesh.shape["fsdp"]
    divisible = [(size, i) for i, size in enumerate(leaf.shape) if size % fsdp == 0]
    if fsdp == 1 or not divisible:
        return P()
    _, largest = max(divisible)
    return P(*[None] * largest, "fsdp")


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Host arrays [B, V, …] → device arrays placed on ((data, fsdp), view)."""
    return put_whole(batch, jax.tree.map(lambda _: NamedSharding(mesh, BATCH), batch))


def put_whole(tree: Any, shardings: Any) -> Any:
    """Arrays that every process holds whole → device arrays; each process keeps its own part."""

    def put(leaf: Any, sharding: NamedSharding) -> jax.Array:
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(put, tree, shardings)
