"""From a batch of images to what the diffusion model is trained on: latents, mask and context.

Everything here is done by frozen networks, outside of what is differentiated. A batch is a dict as
`data.pipeline` makes it; three keys are optional and replace or add work: `latent` (clean latents
computed beforehand), `warped` (the condition images, where they are more than the masked views),
`clip_pixels` (the first reference as CLIP's image tower wants it).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from see3d_jax.diffusion.precondition import condition_images
from see3d_jax.diffusion.visual_condition import latent_mask
from see3d_jax.errors import InputError
from see3d_jax.models.codec import Codec
from see3d_jax.training.state import Frozen

EMPTY = -1.0  # black in the model's range: missing pixels look as they do in a warped image


def encode_batch(
    codec: Codec, batch: dict[str, jax.Array], preconditioning: str = "none"
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Batch → (clean latents [B, V, h, w, c], condition latents, mask at latent size).

    Holes of the condition are black, unless `preconditioning` has them filled.
    """
    x_0 = batch["latent"] if "latent" in batch else codec.encode(batch["image"])
    if "warped" in batch:
        seen = batch["warped"]
    else:
        seen = jnp.where(batch["mask"] > 0.5, batch["image"], EMPTY)
    seen = condition_images(seen, batch["mask"], preconditioning)
    return x_0, codec.encode(seen), latent_mask(batch["mask"], codec.factor)


def batch_context(
    frozen: Frozen, batch: dict[str, jax.Array], tokens: int, context_dim: int
) -> jax.Array:
    """What the model is told beside the views, [B, V, tokens, context_dim] float32.

    Zeros without a context encoder. Raises InputError when the encoder and the batch or the model
    do not fit each other.
    """
    rows, views = batch["is_reference"].shape
    if frozen.context_encoder is None:
        return jnp.zeros((rows, views, tokens, context_dim), jnp.float32)
    if "clip_pixels" not in batch:
        raise InputError("batch: 'clip_pixels' is missing, and the model has an image context")
    context = frozen.context_encoder.encode(batch["clip_pixels"], views)
    if context.shape[2:] != (tokens, context_dim):
        raise InputError(
            f"config.context.tokens and config.model.context_dim are ({tokens}, {context_dim}), "
            f"but the context encoder makes {context.shape[2:]}"
        )
    return context
