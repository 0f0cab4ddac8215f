"""Loss and gradient of one batch on a mesh: each device works on its rows, views and weights.

The whole is one `jax.shard_map`. A device encodes its own views and takes the loss of its own
targets; weights are held as shards (see `sharding`) and gathered block by block where they are used
(twice: blocks are recomputed in the backward pass), in the precision the network computes in. So
the gradient comes back by reduce-scatter, and what is left to sum over `data` is a shard. Only
self-attention exchanges anything between the devices of one sample. The `tensor` axis, if it is
used, is left to XLA.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from see3d_jax.diffusion.loss import Denoise, diffusion_loss, draw_loss_noise
from see3d_jax.diffusion.precondition import precondition
from see3d_jax.diffusion.schedule import Schedule
from see3d_jax.evaluation.lpips import lpips_of_crop
from see3d_jax.models.codec import Codec
from see3d_jax.models.unet import Parts
from see3d_jax.models.weights import apply_unet
from see3d_jax.training.inputs import batch_context, encode_batch
from see3d_jax.training.settings import TrainSpec
from see3d_jax.training.sharding import (
    AXES,
    ROW_AXES,
    VIEW_AXIS,
    WEIGHT_AXES,
    batch_shardings,
    state_shardings,
)
from see3d_jax.training.state import Frozen, Params

Batch = dict[str, jax.Array]
_PLACE = 1 << 20  # apart from the rows, which the noise is drawn by


def loss_and_gradient(
    params: Params,
    batch: Batch,
    frozen: Frozen,
    schedule: Schedule,
    key: jax.Array,
    *,
    spec: TrainSpec,
    mesh: Mesh,
) -> tuple[jax.Array, Params]:
    """The loss over the target views of the whole batch, and its gradient placed like `params`.

    Args:
      params: float32, placed by `sharding.state_shardings`.
      batch: see `data.pipeline`, placed by `sharding.batch_shardings`.
      frozen: networks that are used and not trained, placed by `sharding.state_shardings`.
      schedule: noise schedule.
      key: key of this step.
      spec: constants; its `accumulate` must divide the rows per device.
      mesh: the devices.
    """
    manual = manual_axes(mesh)
    weight_specs = manual_specs(state_shardings(params, mesh), manual)
    frozen_specs = manual_specs(state_shardings(frozen, mesh), manual)
    batch_specs = manual_specs(batch_shardings(batch, mesh), manual)

    def on_device(
        params: Params, batch: Batch, frozen: Frozen, schedule: Schedule, key: jax.Array
    ) -> tuple[jax.Array, Params]:
        frozen = gather(frozen_specs, frozen)
        targets = jax.lax.psum((~batch["is_reference"]).sum(), (*ROW_AXES, VIEW_AXIS))
        loss_of = functools.partial(
            _loss, spec=spec, mesh=mesh, weight_specs=weight_specs, frozen=frozen,
            schedule=schedule, key=key, targets=targets,
        )  # fmt: skip
        rows = positions(len(batch["is_reference"]), ROW_AXES)
        loss, grads = _accumulated(
            jax.value_and_grad(loss_of), params, batch | {"row": rows}, spec.accumulate
        )
        reduce = functools.partial(_sum_over_devices, mesh=mesh, dtype=jnp.dtype(spec.unet.dtype))
        grads = jax.tree.map(reduce, grads, weight_specs)
        return jax.lax.psum(loss, (*ROW_AXES, VIEW_AXIS)), grads

    run = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(weight_specs, batch_specs, frozen_specs, P(), P()),
        out_specs=(P(), weight_specs),
        axis_names=manual,
        check_vma=False,
    )
    return run(params, batch, frozen, schedule, key)


def _loss(
    params: Params,
    batch: Batch,
    *,
    spec: TrainSpec,
    mesh: Mesh,
    weight_specs: Any,
    frozen: Frozen,
    schedule: Schedule,
    key: jax.Array,
    targets: jax.Array,
) -> jax.Array:
    """This device's share of the loss of the whole batch, which has so many `targets`."""
    x_0, condition, mask = jax.lax.stop_gradient(
        encode_batch(frozen.codec, batch, spec.objective.preconditioning)
    )
    context = batch_context(frozen, batch, spec.context_tokens, spec.unet.context_dim)
    views = positions(x_0.shape[1], VIEW_AXIS)
    noise = draw_loss_noise(
        key, batch["row"], views, x_0.shape[2:],
        num_timesteps=schedule.num_timesteps,
        drop_probability=spec.objective.drop_probability,
    )  # fmt: skip
    loss, _ = diffusion_loss(
        local_denoiser(spec, params, mesh, weight_specs, schedule, frozen.codec),
        schedule, x_0, condition, mask, batch["is_reference"], context, noise,
        weight_form=spec.objective.weight_form,
        beta=spec.objective.beta,
        weighting=spec.objective.weighting,
        view_loss=_perceptual_term(frozen, batch, views, key, spec.objective.lpips),
        targets=targets,
    )  # fmt: skip
    return loss


def _perceptual_term(
    frozen: Frozen, batch: Batch, views: jax.Array, key: jax.Array, weight: float
) -> Callable[[jax.Array], jax.Array] | None:
    """LPIPS of the views that estimated latents show, in the holes of their condition."""
    if not weight:
        return None
    truth, holes = (batch["image"] + 1) / 2, 1 - batch["mask"][..., 0]

    def place(row: jax.Array, view: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, _PLACE), row), view)

    places = jax.vmap(lambda row: jax.vmap(lambda view: place(row, view))(views))(batch["row"])
    one = functools.partial(lpips_of_crop, frozen.perceptual)

    def of_views(x_0: jax.Array) -> jax.Array:
        shown = (frozen.codec.decode(x_0) + 1) / 2
        return weight * jax.vmap(jax.vmap(one))(shown, truth, holes, places)

    return of_views


def local_denoiser(
    spec: TrainSpec, params: Params, mesh: Mesh, weight_specs: Any, schedule: Schedule, codec: Codec
) -> Denoise:
    """The network for this device's rows and views, inside `jax.shard_map`; `params` are shards."""
    dtype = jnp.dtype(spec.unet.dtype)

    def gather_block(path: tuple[str, ...], shards: Params) -> Params:
        specs = functools.reduce(lambda tree, name: tree[name], path, weight_specs)
        return gather(specs, shards, dtype)

    weights_are_split = any(mesh.shape[axis] > 1 for axis in WEIGHT_AXES)
    parts = Parts(
        gather=gather_block if weights_are_split else None,
        view_axis=VIEW_AXIS if mesh.shape[VIEW_AXIS] > 1 else None,
    )
    return precondition(
        functools.partial(apply_unet, spec.unet, params, parts=parts),
        spec.objective.preconditioning, schedule, codec.deviation,
        form=spec.objective.weight_form, beta=spec.objective.beta,
    )  # fmt: skip


def _accumulated(
    value_and_grad: Any, params: Params, batch: Batch, count: int
) -> tuple[jax.Array, Params]:
    """Sums over `count` equal parts of this device's rows, one after the other."""
    if count == 1:
        return value_and_grad(params, batch)

    def add(total: Any, part: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, value_and_grad(params, part)), None

    parts = jax.tree.map(lambda x: x.reshape(count, len(x) // count, *x.shape[1:]), batch)
    zero = jax.tree.map(jnp.zeros_like, (jnp.zeros(()), params))
    return jax.lax.scan(add, zero, parts)[0]


def positions(count: int, axes: str | tuple[str, ...]) -> jax.Array:
    """[count] int32, where this device's rows (or views) are in the whole batch (or sample)."""
    return jax.lax.axis_index(axes) * count + jnp.arange(count, dtype=jnp.int32)


def gather(specs: Any, shards: Any, dtype: Any = None) -> Any:
    """Whole arrays from the shards of each device, inside `jax.shard_map`.

    What is split is cast to `dtype` before it is sent (and so its gradient before it is reduced);
    what is not split is left as it is.
    """

    def whole(shard: jax.Array, spec: P) -> jax.Array:
        dimension = _split_dimension(spec)
        if dimension is None:
            return shard
        shard = shard if dtype is None else shard.astype(dtype)
        # The pieces are stacked on a new outer axis and joined here: collectives over an inner axis
        # whose pieces do not fill memory tiles (320 / 8 = 40) do not scatter, they reduce
        # everything everywhere.
        with jax.named_scope("weights"):  # tools.plan_aot tells gathers apart by it
            pieces = jax.lax.all_gather(shard, WEIGHT_AXES, axis=0)
        pieces = jnp.moveaxis(pieces, 0, dimension)
        size = shard.shape[dimension] * pieces.shape[dimension]
        return pieces.reshape(*shard.shape[:dimension], size, *shard.shape[dimension + 1 :])

    return jax.tree.map(whole, shards, specs)


def _split_dimension(spec: P) -> int | None:
    """The dimension of a weight that is split over `WEIGHT_AXES`, if one is."""
    return next((i for i, axes in enumerate(spec) if axes == WEIGHT_AXES), None)


def _sum_over_devices(gradient: jax.Array, spec: P, *, mesh: Mesh, dtype: Any) -> jax.Array:
    """What is still to be added up once reduce-scatter has done its part.

    A split weight's gradient went over the wire in `dtype` before; it does so again.
    """
    if _split_dimension(spec) is None:
        return jax.lax.psum(gradient, (*ROW_AXES, VIEW_AXIS))
    if mesh.shape["data"] == 1:
        return gradient
    return jax.lax.psum(gradient.astype(dtype), "data").astype(gradient.dtype)


def manual_axes(mesh: Mesh) -> frozenset[str]:
    """Mesh axes that code in `jax.shard_map` handles itself: all, but not `tensor` if in use."""
    return frozenset(axis for axis in AXES if axis != "tensor" or mesh.shape[axis] == 1)


def manual_specs(shardings: Any, manual: frozenset[str]) -> Any:
    """The specs of shardings as `jax.shard_map` wants them: without the axes left to XLA."""

    def strip(sharding: NamedSharding) -> P:
        entries = (e if isinstance(e, tuple) or e in manual else None for e in sharding.spec)
        return P(*entries)

    return jax.tree.map(strip, shardings)
