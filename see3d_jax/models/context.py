"""What the UNet is told in words: the context of the paper's cross-attention.

Every view gets the same tokens: the text tower's states of the empty prompt, plus 0.2 times the
projected CLIP embedding of the *first* reference on every token. Both branches of guidance get
the same context (the released pipeline adds the image to the unconditional branch as well), so the
guidance acts on the visual condition alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from see3d_jax.models.clip_text import ClipTextConfig
from see3d_jax.models.clip_vision import ClipVisionConfig, Preprocessing, preprocess
from see3d_jax.models.tokenizer import EMPTY_PROMPT_IDS
from see3d_jax.models.weights import Params, apply_clip_text, apply_clip_vision

IMAGE_WEIGHT = 0.2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ContextEncoder:
    """Both CLIP towers with their weights; passes through jit."""

    text_params: Params
    vision_params: Params
    text: ClipTextConfig = dataclasses.field(metadata={"static": True})
    vision: ClipVisionConfig = dataclasses.field(metadata={"static": True})
    preprocessing: Preprocessing = dataclasses.field(
        default=Preprocessing(), metadata={"static": True}
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ImageContext:
    """The context of one fixed prompt, ready for pictures; passes through jit.

    Attributes:
      text_states: [tokens, C] float32, the text tower's states of the prompt.
      vision_params: weights of the image tower.
      vision: its architecture (static).
      preprocessing: how pictures are prepared for it (static).
    """

    text_states: jax.Array
    vision_params: Params
    vision: ClipVisionConfig = dataclasses.field(metadata={"static": True})
    preprocessing: Preprocessing = dataclasses.field(
        default=Preprocessing(), metadata={"static": True}
    )

    def encode(self, pixels: jax.Array, views: int) -> jax.Array:
        """[B, S, S, 3] of `preprocess` (first references) → [B, views, tokens, C] float32."""
        image_embeds, _ = apply_clip_vision(self.vision, self.vision_params, pixels)
        return combine_context(self.text_states, image_embeds, views)


def fix_prompt(
    encoder: ContextEncoder, ids: Sequence[int] | np.ndarray = EMPTY_PROMPT_IDS
) -> ImageContext:
    """Encodes a prompt once and for all; `ids` are its [tokens] ids.

    Raises ValueError for an id that the text tower does not know (it would give NaN).
    """
    if not isinstance(ids, jax.Array) and max(ids) >= encoder.text.vocab_size:
        raise ValueError(f"ids: {max(ids)} is not in a vocabulary of {encoder.text.vocab_size}")
    ids = jnp.asarray(ids, jnp.int32)
    return ImageContext(
        _text_states(encoder, ids), encoder.vision_params, encoder.vision, encoder.preprocessing
    )


def encode_context(
    encoder: ContextEncoder,
    first_reference: np.ndarray,
    views: int,
    *,
    ids: Sequence[int] | np.ndarray = EMPTY_PROMPT_IDS,
    official: bool = False,
) -> jax.Array:
    """The context of B scenes.

    Args:
      encoder: the CLIP towers.
      first_reference: [B, H, W, 3], uint8 or float in [−1, 1]; the first reference of each scene.
      views: V.
      ids: [tokens] ids of the prompt.
      official: prepare pictures exactly as the released pipeline, see `clip_vision.preprocess`.

    Returns:
      [B, views, tokens, context_dim] float32.
    """
    pixels = preprocess(np.asarray(first_reference), encoder.preprocessing, official=official)
    return _encode(encoder, pixels, jnp.asarray(ids, jnp.int32), views)


def combine_context(
    text_states: jax.Array, image_embeds: jax.Array, views: int, weight: float = IMAGE_WEIGHT
) -> jax.Array:
    """[tokens, C] of the text and [B, C] of the first references → [B, views, tokens, C]."""
    tokens = text_states[None] + weight * image_embeds[:, None]
    return jnp.broadcast_to(tokens[:, None], (len(tokens), views, *tokens.shape[1:]))


@jax.jit
def _text_states(encoder: ContextEncoder, ids: jax.Array) -> jax.Array:
    """[tokens] ids → [tokens, C]."""
    return apply_clip_text(encoder.text, encoder.text_params, ids[None])[0][0]


@functools.partial(jax.jit, static_argnames="views")
def _encode(encoder: ContextEncoder, pixels: jax.Array, ids: jax.Array, views: int) -> jax.Array:
    return fix_prompt(encoder, ids).encode(pixels, views)
