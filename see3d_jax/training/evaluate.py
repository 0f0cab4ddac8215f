"""How good the model is on clips it has never seen: loss by timestep, and sampled targets.

Every number of a sampled view stands beside those of what needs no model: the nearest reference in
time ("copy"), the condition as it is shown (masked or warped views with black holes, coarse views)
and the condition with its holes filled by OpenCV ("inpainted"). PSNR in dB, at most 100; SSIM and
LPIPS as in `evaluation`; all averaged over target views. docs/training.md lists the names.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from see3d_jax.data.inpainting import inpaint
from see3d_jax.data.pipeline import Batch
from see3d_jax.diffusion.loss import Denoise, diffusion_loss, draw_loss_noise
from see3d_jax.diffusion.sampler import SamplerConfig, sample
from see3d_jax.diffusion.schedule import Schedule
from see3d_jax.evaluation.lpips import Lpips, lpips
from see3d_jax.evaluation.metrics import psnr, ssim
from see3d_jax.media import contact_sheet
from see3d_jax.training.distributed import fetch
from see3d_jax.training.gradient import (
    gather,
    local_denoiser,
    manual_axes,
    manual_specs,
    positions,
)
from see3d_jax.training.inputs import EMPTY, batch_context, encode_batch
from see3d_jax.training.settings import EvaluationSpec, TrainSpec
from see3d_jax.training.sharding import (
    BATCH,
    ROW_AXES,
    VIEW_AXIS,
    batch_shardings,
    put_whole,
    state_shardings,
)
from see3d_jax.training.state import Frozen, Params

GRID_COLUMNS = ("reference", "condition", "prediction", "truth")


def evaluate(
    params: Params,
    batch: Batch,
    frozen: Frozen,
    schedule: Schedule,
    key: jax.Array,
    *,
    spec: TrainSpec,
    mesh: Mesh,
    evaluation: EvaluationSpec,
    perceptual: Lpips | None = None,
) -> tuple[dict[str, float], np.ndarray]:
    """All numbers of the held-out batch by name, and its picture uint8 [H, W, 3].

    The same key gives the same noise, so that numbers of different steps can be compared.

    Args:
      params, frozen: placed by `sharding.state_shardings`.
      batch: host arrays as in `data.pipeline`, the same in every process; all must call this.
      schedule, key, spec: as for `step.train_step`.
      mesh: the devices; they share the rows, which are repeated until they divide.
      evaluation: what is measured.
      perceptual: network for LPIPS; None leaves it out.
    """
    rows = len(batch["is_reference"])
    slots = mesh.shape["data"] * mesh.shape["fsdp"]
    repeated = np.arange(-(-rows // slots) * slots) % rows
    padded = {name: x[repeated] for name, x in batch.items()}
    placed = put_whole(padded, batch_shardings(padded, mesh))
    arguments = (params, placed, frozen, schedule, key)

    buckets = evaluation.loss_buckets
    sums = fetch(target_errors(*arguments, spec=spec, mesh=mesh, buckets=buckets, rows=rows))
    losses = sums[:rows].sum(0) / (~batch["is_reference"]).sum()
    width = schedule.num_timesteps // buckets
    scores = {"heldout_loss": float(losses.mean())}
    scores |= {f"heldout_loss_t{i * width:03d}": float(loss) for i, loss in enumerate(losses)}

    predicted = fetch(sample_views(*arguments, spec=spec, mesh=mesh, sampler=evaluation.sampler))
    predicted = predicted[:rows]
    return scores | score(batch, predicted, perceptual), sample_grid(batch, predicted)


@functools.partial(jax.jit, static_argnames=("spec", "mesh", "buckets", "rows"))
def target_errors(
    params: Params,
    batch: dict[str, jax.Array],
    frozen: Frozen,
    schedule: Schedule,
    key: jax.Array,
    *,
    spec: TrainSpec,
    mesh: Mesh,
    buckets: int,
    rows: int,
) -> jax.Array:
    """Unweighted loss with the visual condition, summed over each row's targets: [B, buckets].

    The timesteps are cut into `buckets` equal ranges; in each, `rows` rows get timesteps at even
    distances. All ranges share the same noise.
    """
    width = schedule.num_timesteps / buckets

    def errors(
        denoise: Denoise, row: jax.Array, batch: dict, frozen: Frozen, schedule: Schedule, key: Any
    ) -> jax.Array:
        x_0, condition, mask = encode_batch(frozen.codec, batch, spec.objective.preconditioning)
        context = batch_context(frozen, batch, spec.context_tokens, spec.unet.context_dim)
        noise = draw_loss_noise(
            key, row[None], positions(x_0.shape[1], VIEW_AXIS), x_0.shape[2:],
            num_timesteps=schedule.num_timesteps, drop_probability=0.0,
        )  # fmt: skip

        def error_at(t: jax.Array) -> jax.Array:
            return diffusion_loss(
                denoise, schedule, x_0, condition, mask, batch["is_reference"], context,
                noise.replace(t=t[None]), weight_form=spec.objective.weight_form,
                beta=spec.objective.beta, targets=jnp.ones(()),
            )[0]  # fmt: skip

        place = (row % rows + 0.5) / rows
        timesteps = ((jnp.arange(buckets) + place) * width).astype(jnp.int32)
        return jax.lax.psum(jax.lax.map(error_at, timesteps), VIEW_AXIS)

    return _row_by_row(errors, P(ROW_AXES), params, batch, frozen, schedule, key, spec, mesh)


@functools.partial(jax.jit, static_argnames=("spec", "mesh", "sampler"))
def sample_views(
    params: Params,
    batch: dict[str, jax.Array],
    frozen: Frozen,
    schedule: Schedule,
    key: jax.Array,
    *,
    spec: TrainSpec,
    mesh: Mesh,
    sampler: SamplerConfig,
) -> jax.Array:
    """Samples the targets of a batch → images [B, V, h, w, 3] in [−1, 1]."""

    def images(
        denoise: Denoise, row: jax.Array, batch: dict, frozen: Frozen, schedule: Schedule, key: Any
    ) -> jax.Array:
        x_0, condition, mask = encode_batch(frozen.codec, batch, spec.objective.preconditioning)
        is_reference = batch["is_reference"]
        latents = jnp.where(is_reference[:, :, None, None, None], x_0, condition)
        context = batch_context(frozen, batch, spec.context_tokens, spec.unet.context_dim)
        key = jax.random.fold_in(jax.random.fold_in(key, row), jax.lax.axis_index(VIEW_AXIS))
        sampled = sample(denoise, schedule, sampler, latents, mask, is_reference, context, key)
        return jnp.clip(frozen.codec.decode(sampled), -1.0, 1.0)[0]

    return _row_by_row(images, BATCH, params, batch, frozen, schedule, key, spec, mesh)


def _row_by_row(
    function: Callable[..., jax.Array],
    out: P,
    params: Params,
    batch: dict[str, jax.Array],
    frozen: Frozen,
    schedule: Schedule,
    key: jax.Array,
    spec: TrainSpec,
    mesh: Mesh,
) -> jax.Array:
    """function(denoise, row, batch of that row, frozen, schedule, key) for every row, stacked.

    Rows, views and weights are spread over devices as in a training step. A device takes its rows
    one after the other: sampling with guidance needs more memory per row than training does.
    """
    manual = manual_axes(mesh)
    weight_specs, frozen_specs, batch_specs = (
        manual_specs(shardings, manual)
        for shardings in (
            state_shardings(params, mesh), state_shardings(frozen, mesh),
            batch_shardings(batch, mesh),
        )
    )  # fmt: skip

    def on_device(
        params: Params, batch: dict, frozen: Frozen, schedule: Schedule, key: jax.Array
    ) -> jax.Array:
        frozen = gather(frozen_specs, frozen)
        denoise = local_denoiser(spec, params, mesh, weight_specs, schedule, frozen.codec)

        def one(row_and_batch: tuple[jax.Array, dict]) -> jax.Array:
            row, single = row_and_batch
            single = jax.tree.map(lambda x: x[None], single)
            return function(denoise, row, single, frozen, schedule, key)

        return jax.lax.map(one, (positions(len(batch["is_reference"]), ROW_AXES), batch))

    run = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(weight_specs, batch_specs, frozen_specs, P(), P()),
        out_specs=out,
        axis_names=manual,
        check_vma=False,
    )
    return run(params, batch, frozen, schedule, key)


def score(batch: Batch, predicted: np.ndarray, perceptual: Lpips | None = None) -> dict[str, float]:
    """Scores of the prediction and of the baselines, averaged over target views.

    Args:
      batch: host arrays as in `data.pipeline`.
      predicted: [B, V, h, w, 3] in [−1, 1].
      perceptual: network for LPIPS; None leaves it out.

    Returns:
      heldout_{psnr, ssim, lpips} of the prediction; with _known or _hole after psnr on those pixels
      only; with _copy, _condition or _inpainted at the end those of a baseline. What no target has
      (holes, for super-resolution) is left out.
    """
    target = ~batch["is_reference"]
    truth = _unit(batch["image"][target])
    known = batch["mask"][target][..., 0] > 0.5
    shown = _unit(shown_images(batch)[target])
    methods = {
        "": _unit(predicted[target]),
        "_copy": _unit(nearest_reference(batch)[target]),
        "_condition": shown,
    }
    if not known.all():
        methods["_inpainted"] = inpaint(shown, known)
    scores = {}
    for name, images in methods.items():
        scores[f"heldout_psnr{name}"] = _mean_psnr(images, truth, np.ones_like(known))
        scores[f"heldout_ssim{name}"] = float(np.mean(ssim(images, truth)))
        if perceptual is not None:
            pairs = zip(images, truth)  # one by one, for VGG is large on large images
            scores[f"heldout_lpips{name}"] = float(np.mean([lpips(perceptual, *p) for p in pairs]))
        if not known.all():
            scores[f"heldout_psnr_known{name}"] = _mean_psnr(images, truth, known)
            scores[f"heldout_psnr_hole{name}"] = _mean_psnr(images, truth, ~known)
    return {name: value for name, value in scores.items() if np.isfinite(value)}


def _unit(images: np.ndarray) -> np.ndarray:
    """[−1, 1] → [0, 1]."""
    return np.asarray(images) / 2 + np.float32(0.5)


def _mean_psnr(images: np.ndarray, truth: np.ndarray, pixels: np.ndarray) -> float:
    """Mean over the images that have such pixels; NaN if none has."""
    some = pixels.any((1, 2))
    if not some.any():
        return float("nan")
    values = psnr(images[some], truth[some], pixels[some])
    return float(np.minimum(values, 100.0).mean())


def shown_images(batch: Batch) -> np.ndarray:
    """What the condition shows of every view, [B, V, h, w, 3] in [−1, 1]."""
    if "warped" in batch:
        return batch["warped"]
    return np.where(batch["mask"] > 0.5, batch["image"], np.float32(EMPTY))


def nearest_reference(batch: Batch) -> np.ndarray:
    """For every view the reference image nearest to it in time, [B, V, h, w, 3]."""
    frame, is_reference = batch["frame"].astype(np.int64), batch["is_reference"]
    distance = np.abs(frame[:, :, None] - frame[:, None, :])  # [B, view, candidate]
    distance = np.where(is_reference[:, None, :], distance, np.iinfo(np.int64).max)
    nearest = distance.argmin(-1)
    return np.take_along_axis(batch["image"], nearest[:, :, None, None, None], axis=1)


def sample_grid(batch: Batch, predicted: np.ndarray) -> np.ndarray:
    """A picture with one row per clip, showing its first target beside its nearest reference."""
    nearest, shown = nearest_reference(batch), shown_images(batch)
    rows = []
    for clip, is_reference in enumerate(batch["is_reference"]):
        view = int(np.argmin(is_reference))  # the first target
        cells = (images[clip, view] for images in (nearest, shown, predicted, batch["image"]))
        rows.append([_unit(cell) for cell in cells])
    return contact_sheet(rows, column_labels=GRID_COLUMNS, cell_height=128)
