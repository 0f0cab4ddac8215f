"""How good the model is on clips it has never seen: sampled targets against the true frames.

The figure to beat is copying: showing, for every target, the reference view nearest in time. The
masked target itself (holes black) is reported beside it, because the model is given that much.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from see3d_jax.data.pipeline import Batch
from see3d_jax.diffusion.sampler import SamplerConfig, sample
from see3d_jax.diffusion.schedule import Schedule
from see3d_jax.media import contact_sheet
from see3d_jax.training.inputs import EMPTY, batch_context, encode_batch
from see3d_jax.training.settings import TrainSpec
from see3d_jax.training.state import Frozen, Params
from see3d_jax.training.step import denoiser

GRID_COLUMNS = ("reference", "condition", "prediction", "truth")


@functools.partial(jax.jit, static_argnames=("spec", "sampler"))
def sample_views(
    params: Params,
    batch: dict[str, jax.Array],
    frozen: Frozen,
    schedule: Schedule,
    key: jax.Array,
    *,
    spec: TrainSpec,
    sampler: SamplerConfig,
) -> jax.Array:
    """Samples the targets of a batch → images [B, V, h, w, 3] in [−1, 1]."""
    x_0, condition, mask = encode_batch(frozen.codec, batch)
    is_reference = batch["is_reference"]
    latents = jnp.where(is_reference[:, :, None, None, None], x_0, condition)
    context = batch_context(frozen, batch, spec.context_tokens, spec.unet.context_dim)
    sampled = sample(
        denoiser(spec, params), schedule, sampler, latents, mask, is_reference, context, key
    )
    return jnp.clip(frozen.codec.decode(sampled), -1.0, 1.0)


def score(batch: Batch, predicted: np.ndarray) -> dict[str, float]:
    """PSNR in dB, averaged over target views: prediction, copied reference, masked target.

    Args:
      batch: host arrays as in `data.pipeline`.
      predicted: [B, V, h, w, 3] in [−1, 1].
    """
    target = ~batch["is_reference"]
    truth = batch["image"]
    masked = np.where(batch["mask"] > 0.5, truth, EMPTY)
    return {
        "heldout_psnr": _psnr(predicted, truth, target),
        "heldout_psnr_copy": _psnr(_nearest_reference(batch), truth, target),
        "heldout_psnr_masked": _psnr(masked, truth, target),
    }


def _psnr(images: np.ndarray, truth: np.ndarray, chosen: np.ndarray) -> float:
    """Mean PSNR over the chosen [B, V] views, for images in [−1, 1]."""
    error = np.mean(((images - truth)[chosen] / 2) ** 2, axis=(1, 2, 3))
    return float(np.mean(-10 * np.log10(np.maximum(error, 1e-10))))


def _nearest_reference(batch: Batch) -> np.ndarray:
    """For every view the reference image nearest to it in time, [B, V, h, w, 3]."""
    frame, is_reference = batch["frame"].astype(np.int64), batch["is_reference"]
    distance = np.abs(frame[:, :, None] - frame[:, None, :])  # [B, view, candidate]
    distance = np.where(is_reference[:, None, :], distance, np.iinfo(np.int64).max)
    nearest = distance.argmin(-1)
    return np.take_along_axis(batch["image"], nearest[:, :, None, None, None], axis=1)


def sample_grid(batch: Batch, predicted: np.ndarray) -> np.ndarray:
    """A picture with one row per clip, showing its first target beside its nearest reference."""
    nearest = _nearest_reference(batch)
    rows = []
    for clip, is_reference in enumerate(batch["is_reference"]):
        view = int(np.argmin(is_reference))  # the first target
        truth = batch["image"][clip, view]
        masked = np.where(batch["mask"][clip, view] > 0.5, truth, EMPTY)
        cells = (nearest[clip, view], masked, predicted[clip, view], truth)
        rows.append([cell / 2 + 0.5 for cell in cells])
    return contact_sheet(rows, column_labels=GRID_COLUMNS, cell_height=128)
