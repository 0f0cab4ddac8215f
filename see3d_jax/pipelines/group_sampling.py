"""Fills the holes of warped views with the model, a group of views at a time.

A group holds as many views as the model was trained with: the given views, clean in every group,
and the next targets; so memory does not grow with the number of targets.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from see3d_jax.diffusion.precondition import condition_images
from see3d_jax.diffusion.sampler import SamplerConfig, sample, sampling_steps
from see3d_jax.diffusion.schedule import Schedule
from see3d_jax.diffusion.visual_condition import latent_mask
from see3d_jax.models.codec import Codec
from see3d_jax.models.unet import UNetConfig
from see3d_jax.models.weights import Params
from see3d_jax.pipelines.pretrained import See3DModel, denoiser


def group_targets(num_targets: int, per_group: int) -> list[list[int]]:
    """Splits targets into groups of one size, in order; the last one reaches back if need be.

    >>> group_targets(5, 3)
    [[0, 1, 2], [2, 3, 4]]
    """
    per_group = min(per_group, num_targets)
    starts = [*range(0, num_targets - per_group, per_group), num_targets - per_group]
    return [list(range(start, start + per_group)) for start in starts]


def sample_groups(
    model: See3DModel, given: np.ndarray, warps: np.ndarray, masks: np.ndarray,
    seed: int, first_group: int = 0,
) -> np.ndarray:  # fmt: skip
    """Fills the holes of all warps [N, h, w, 3] uint8, masks [N, h, w] bool: [N, h, w, 3] uint8.

    `given` [R, h, w, 3] are the clean views of every group; the noise of a group depends on the
    seed and on its number, which counts from `first_group`.
    """
    references = len(given)
    groups = group_targets(len(warps), max(1, model.views - references))
    context = model.context(given[0], references + len(groups[0]))
    generated = np.empty_like(warps)
    key = jax.random.key(seed)
    calls = len(sampling_steps(model.sampling, model.schedule.num_timesteps)[0])
    with tqdm(total=len(groups) * calls, desc="sampling", unit="step") as bar:
        _bars.append(bar)
        try:
            for number, group in enumerate(groups):
                images = np.concatenate([given, warps[group]])[None]
                known = np.ones((references, *masks.shape[1:]), bool)
                mask = np.concatenate([known, masks[group]])[None, ..., None]
                sampled = _sample(
                    model.params, model.codec, model.schedule, images,
                    mask.astype(np.float32),
                    np.arange(images.shape[1])[None] < references,
                    context, jax.random.fold_in(key, first_group + number),
                    unet=model.unet, preconditioning=model.preconditioning, sampler=model.sampling,
                    official=model.official,
                )  # fmt: skip
                generated[group] = np.asarray(sampled)[0, references:]
            jax.effects_barrier()  # the bar's last updates
        finally:
            _bars.pop()
    return generated


@functools.partial(jax.jit, static_argnames=("unet", "preconditioning", "sampler", "official"))
def _sample(
    params: Params, codec: Codec, schedule: Schedule, images: jax.Array, mask: jax.Array,
    is_reference: jax.Array, context: jax.Array, key: jax.Array,
    *, unet: UNetConfig, preconditioning: str, sampler: SamplerConfig, official: bool,
) -> jax.Array:  # fmt: skip
    """Samples the targets among uint8 images [B, V, H, W, 3] with black holes: uint8 images.

    The mask [B, V, H, W, 1] is 1 on what is known.
    """
    key, key_encoding = jax.random.split(key)
    images = condition_images(images.astype(jnp.float32) / 127.5 - 1, mask, preconditioning)
    latents = codec.encode(images, key_encoding if official else None)
    mask = latent_mask(mask, codec.factor)
    denoise = denoiser(unet, params, preconditioning, schedule, codec, sampler)
    sampled = sample(
        denoise, schedule, sampler, latents, mask, is_reference, context, key, progress=_advance
    )
    pixels = jnp.clip(codec.decode(sampled) * 0.5 + 0.5, 0, 1)
    return jnp.round(pixels * 255).astype(jnp.uint8)


# The bar that sampling moves. It is found through one fixed function because the function is part
# of the compiled program: a new one for every call would compile the network anew.
_bars: list[tqdm] = []


def _advance(done: int, total: int) -> None:
    if _bars:
        _bars[-1].update()
