"""The image tower of CLIP (ViT-H/14 in See3D): a picture to one vector of the UNet's context width.

`preprocess` brings pictures to what the tower was trained on: bicubic resize of the shorter side,
centre crop, channel statistics. It runs on the host with Pillow, whose antialiased bicubic filter
the official pipeline uses. That pipeline passes pictures through [−1, 1] floats and *truncates*
them to bytes again, which makes the byte values 1 to 63 one too dark; `official=True` repeats that,
the default rounds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from see3d_jax.errors import InputError
from see3d_jax.models.clip_layers import Embedding, Encoder, EncoderConfig, read_config
from see3d_jax.models.layers import Conv, LayerNorm, Linear, parameter

# What transformers means by a field that config.json leaves out.
_DEFAULTS = {
    "image_size": 224,
    "patch_size": 32,
    "num_channels": 3,
    "projection_dim": 512,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipVisionConfig(EncoderConfig):
    """Architecture of the image tower; the defaults are ViT-H/14's (632,076,800 weights).

    Attributes:
      image_size: height and width of the input in pixels.
      patch_size: side of the square that becomes one token.
      num_channels: image channels.
      projection_dim: width of the image embedding; None for a tower without projection.
    """

    hidden_size: int = 1280
    intermediate_size: int = 5120
    num_hidden_layers: int = 32
    num_attention_heads: int = 16
    image_size: int = 224
    patch_size: int = 14
    num_channels: int = 3
    projection_dim: int | None = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.patch_size <= self.image_size:
            raise ValueError(
                f"patch_size: expected 1 to image_size {self.image_size}, got {self.patch_size}"
            )


def read_vision_config(config: Mapping[str, Any]) -> ClipVisionConfig:
    """From a parsed Hugging Face `config.json` of an image tower or of both towers.

    Raises:
      InputError: a field has a value that is not supported.
    """
    return read_config(ClipVisionConfig, config, _DEFAULTS, "vision_config")


class VisionEmbeddings(nnx.Module):
    """One token for the whole picture, then one per patch, row by row; plus position."""

    def __init__(self, config: ClipVisionConfig) -> None:
        width, patch, dtype = config.hidden_size, config.patch_size, jnp.dtype(config.dtype)
        self.class_embedding = parameter((width,), bound=width**-0.5)
        self.patch_embedding = Conv(
            config.num_channels, width, patch, stride=patch, padding=0, bias=False, dtype=dtype
        )
        tokens = 1 + (config.image_size // patch) ** 2
        self.position_embedding = Embedding(tokens, width, dtype=dtype)
        self.shape = (config.image_size, config.image_size, config.num_channels)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """[N, S, S, 3] → [N, 1 + patches, width]."""
        if pixels.ndim != 4 or pixels.shape[1:] != self.shape:
            raise ValueError(f"pixels: expected [N, {self.shape}], got {pixels.shape}")
        patches = self.patch_embedding(pixels)
        patches = patches.reshape(len(pixels), -1, patches.shape[-1])
        first = jnp.broadcast_to(
            self.class_embedding[...].astype(patches.dtype), (len(pixels), 1, patches.shape[-1])
        )
        tokens = jnp.concatenate([first, patches], 1)
        return tokens + self.position_embedding(jnp.arange(tokens.shape[1]))


class VisionModel(nnx.Module):
    """Embeddings, layers between two norms."""

    def __init__(self, config: ClipVisionConfig) -> None:
        width, eps = config.hidden_size, config.layer_norm_eps
        self.embeddings = VisionEmbeddings(config)
        self.pre_layrnorm = LayerNorm(width, eps=eps)  # spelt as in the checkpoints
        self.encoder = Encoder(config, causal=False)
        self.post_layernorm = LayerNorm(width, eps=eps)

    def __call__(self, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[N, S, S, 3] → the normalised first token, and all tokens before the last norm."""
        tokens = self.encoder(self.pre_layrnorm(self.embeddings(pixels)))[-1]
        return self.post_layernorm(tokens[:, 0]), tokens


class ClipVision(nnx.Module):
    """See the module docstring; built and called through `see3d_jax.models.weights`."""

    def __init__(self, config: ClipVisionConfig) -> None:
        self.vision_model = VisionModel(config)
        width, outputs, dtype = config.hidden_size, config.projection_dim, jnp.dtype(config.dtype)
        self.visual_projection = (
            None if outputs is None else Linear(width, outputs, bias=False, dtype=dtype)
        )

    def __call__(self, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[N, S, S, 3] → embeddings [N, projection_dim], tokens [N, 1 + P, width]; float32."""
        pooled, tokens = self.vision_model(pixels)
        if self.visual_projection is not None:
            pooled = self.visual_projection(pooled)
        return pooled.astype(jnp.float32), tokens.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How pictures are prepared; the defaults are CLIP's.

    Attributes:
      shortest_edge: length of the shorter side after resizing, in pixels.
      crop: height and width cut out of the middle.
      mean, std: per channel, for values in [0, 1].
    """

    shortest_edge: int = 224
    crop: tuple[int, int] = (224, 224)
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self) -> None:
        if max(self.crop) > self.shortest_edge:
            raise ValueError(f"crop: {self.crop} is larger than the resized {self.shortest_edge}")


def read_preprocessing(config: Mapping[str, Any]) -> Preprocessing:
    """From a parsed `preprocessor_config.json`, in its older (plain numbers) or newer form.

    Raises:
      InputError: a field is missing, or asks for something other than CLIP's steps.
    """
    for step in ("do_resize", "do_center_crop", "do_normalize"):
        if not config.get(step, True):
            raise InputError(f"preprocessor_config.json: {step} must be true for CLIP")
    if config.get("resample", 3) != Image.Resampling.BICUBIC:
        raise InputError("preprocessor_config.json: resample must be 3 (bicubic)")
    default = Preprocessing()
    try:
        size, crop = config.get("size", 224), config.get("crop_size", 224)
        return Preprocessing(
            shortest_edge=int(size["shortest_edge"] if isinstance(size, Mapping) else size),
            crop=(int(crop["height"]), int(crop["width"]))
            if isinstance(crop, Mapping)
            else (int(crop), int(crop)),
            mean=tuple(config.get("image_mean", default.mean)),
            std=tuple(config.get("image_std", default.std)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"preprocessor_config.json: size, crop_size: {error}") from error


def preprocess(
    images: np.ndarray, settings: Preprocessing = Preprocessing(), *, official: bool = False
) -> np.ndarray:
    """Pictures as the image tower wants them.

    Args:
      images: [N, H, W, 3], uint8 or float in [−1, 1].
      settings: sizes and statistics.
      official: repeat the released pipeline's truncation, see the module docstring.

    Returns:
      [N, *crop, 3] float32.

    Raises:
      ValueError: another shape, or floats outside [−1, 1].
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"images: expected [N, H, W, 3], got {images.shape}")
    edge = settings.shortest_edge
    height, width = images.shape[1:3]
    short = min(height, width)
    # Python's int() rounds the longer side down, as officially.
    size = (int(edge * width / short), int(edge * height / short))
    top, left = (size[1] - settings.crop[0]) // 2, (size[0] - settings.crop[1]) // 2
    prepared = np.empty((len(images), *settings.crop, 3), np.float32)
    for target, image in zip(prepared, _to_bytes(images, official), strict=True):
        resized = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
        target[:] = resized[top : top + settings.crop[0], left : left + settings.crop[1]]
    prepared /= 255
    return (prepared - np.float32(settings.mean)) / np.float32(settings.std)


def _to_bytes(images: np.ndarray, official: bool) -> np.ndarray:
    if images.dtype == np.uint8:
        if not official:
            return images
        images = images.astype(np.float32) / np.float32(127.5) - np.float32(1)
    images = np.asarray(images, np.float32)
    if not (np.abs(images) <= 1).all():  # also catches NaN
        raise ValueError("images: expected floats in [−1, 1]")
    unit = (images + np.float32(1)) / np.float32(2)
    scaled = unit * np.float32(255)
    return (scaled if official else np.round(scaled)).astype(np.uint8)
