"""Image ↔ latent codecs: what the diffusion model sees instead of pixels.

Two kinds behind one interface, both pytrees that pass through jit:
- `DctCodec`: a fixed orthonormal block DCT in an opponent colour space, keeping the strongest
  coefficients. Nothing to train or download: this is what CPU-sized runs use.
- `VaeCodec`: the Stable-Diffusion autoencoder, as in the paper.
`encode` takes images [..., H, W, 3] in [−1, 1] to latents [..., H/f, W/f, c] with a deviation of
about 1 (VAE) or 2.5 (DCT); `decode` goes back (and may overshoot [−1, 1]: clip for pixels).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from see3d_jax.models.vae import VaeConfig
from see3d_jax.models.weights import Params, decode_vae, encode_vae

# Rows: luma, red − blue, green − magenta; orthonormal, so errors in latents are errors in RGB.
_COLOUR = np.array([[1, 1, 1], [1, 0, -1], [-1, 2, -1]]) / np.sqrt([[3], [2], [6]])
# Standard deviations on photographs, as a function of factor f and frequencies u, v: the block
# average varies by _DC·f, frequency u + v > 0 by _AC·f^1.5·(u + v)^−1.2. Fitted to the photos in
# scikit-image at 64² and 128² (all kept coefficients are within a factor of 1.5).
_DC = (0.74, 0.41, 0.12)
_AC = (0.0875, 0.027, 0.0105)
# Root mean square of DCT latents. More than the VAE's 1: the condition C_t comes with noise of
# deviation up to 0.58, and a block DCT leaves little redundancy to average that over.
_STRENGTH = 2.5


class Codec(Protocol):
    """What training and sampling need of a codec."""

    @property
    def factor(self) -> int:
        """Pixels per latent along height and width; image sides must be multiples of it."""

    @property
    def channels(self) -> int:
        """Latent channels."""

    @property
    def deviation(self) -> np.ndarray:
        """[channels] float32, roughly the standard deviation of latents of photographs."""

    def encode(self, images: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """[..., H, W, 3] in [−1, 1] → [..., H/f, W/f, c]; a key samples a random encoding."""

    def decode(self, latents: jax.Array) -> jax.Array:
        """[..., h, w, c] → [..., h·f, w·f, 3], about [−1, 1]."""


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class DctCodec:
    """Block DCT on factor × factor patches, keeping `channels` of 3·factor² coefficients.

    Coefficients are ordered by the standard deviation they have on photographs (see `_deviation`):
    for factor 4 luma 00, red−blue 00, luma 01 10, green 00, luma 11 02 20, red−blue 01 10, luma 12
    21, … Best possible PSNR, averaged over five photos at 64² / 128² pixels: factor 4 with 8, 12,
    16 channels 27.9/29.5, 31.3/32.5, 34.0/35.2 dB; factor 8 with 24 channels 27.8/29.3 dB; with all
    coefficients the codec is lossless.
    """

    factor: int = 4
    channels: int = 12

    def __post_init__(self) -> None:
        if self.factor < 1 or not 1 <= self.channels <= 3 * self.factor**2:
            raise ValueError(
                f"channels: a factor-{self.factor} DCT has 1 to {3 * self.factor**2} coefficients, "
                f"got {self.channels}"
            )

    @property
    def deviation(self) -> np.ndarray:
        """[channels] float32, fitted to photographs."""
        return _dct_basis(self.factor, self.channels)[2]

    def encode(self, images: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """[..., H, W, 3] → [..., H/f, W/f, channels]; `key` is not needed."""
        del key
        h, w = _latent_size(images, self.factor)
        f = self.factor
        blocks = jnp.asarray(images, jnp.float32).reshape(*images.shape[:-3], h, f, w, f, 3)
        blocks = jnp.swapaxes(blocks, -4, -3).reshape(*images.shape[:-3], h, w, f * f * 3)
        basis, unit, _ = _dct_basis(self.factor, self.channels)
        return blocks @ jnp.asarray(basis / unit)

    def decode(self, latents: jax.Array) -> jax.Array:
        """[..., h, w, channels] → [..., h·f, w·f, 3]; dropped coefficients are zero."""
        basis, unit, _ = _dct_basis(self.factor, self.channels)
        *lead, h, w, _ = latents.shape
        f = self.factor
        blocks = (latents @ jnp.asarray((basis * unit).T)).reshape(*lead, h, w, f, f, 3)
        return jnp.swapaxes(blocks, -4, -3).reshape(*lead, h * f, w * f, 3)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VaeCodec:
    """The autoencoder of Stable Diffusion; latents are scaled by its `scaling_factor`."""

    params: Params
    config: VaeConfig = dataclasses.field(metadata={"static": True})

    @property
    def factor(self) -> int:
        """Pixels per latent along each side."""
        return self.config.factor

    @property
    def channels(self) -> int:
        """Latent channels."""
        return self.config.latent_channels

    @property
    def deviation(self) -> np.ndarray:
        """[channels] float32: `scaling_factor` is chosen to make it one."""
        return np.ones(self.channels, np.float32)

    def encode(self, images: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """The posterior's mean, or with a key a sample of it (as the released pipeline uses)."""
        _latent_size(images, self.factor)
        flat = images.reshape(-1, *images.shape[-3:])
        mean, logvar = encode_vae(self.config, self.params, flat)
        if key is not None:
            mean = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape, mean.dtype)
        latents = mean * self.config.scaling_factor
        return latents.reshape(*images.shape[:-3], *latents.shape[1:])

    def decode(self, latents: jax.Array) -> jax.Array:
        """[..., h, w, c] → [..., h·f, w·f, 3]."""
        flat = latents.reshape(-1, *latents.shape[-3:]) / self.config.scaling_factor
        images = decode_vae(self.config, self.params, flat)
        return images.reshape(*latents.shape[:-3], *images.shape[1:])


def build_codec(spec: Mapping[str, Any], params: Params | None = None) -> Codec:
    """A codec from a configuration.

    Args:
      spec: {"kind": "dct", "factor": …, "channels": …} or {"kind": "vae", …fields of VaeConfig}.
      params: weights of the VAE.

    Raises:
      ValueError: an unknown kind or field, or a VAE without weights.
    """
    fields = dict(spec)
    kind = fields.pop("kind", None)
    if kind not in ("dct", "vae"):
        raise ValueError(f"codec.kind: expected 'dct' or 'vae', got {kind!r}")
    made = DctCodec if kind == "dct" else VaeConfig
    unknown = fields.keys() - {field.name for field in dataclasses.fields(made)}
    if unknown:
        raise ValueError(f"codec: unknown fields {sorted(unknown)} for kind {kind!r}")
    if kind == "dct":
        return DctCodec(**fields)
    if params is None:
        raise ValueError("codec.kind 'vae' needs the weights of the autoencoder")
    return VaeCodec(params, VaeConfig(**fields))


def fingerprint(codec: Codec) -> str:
    """Names a codec with its weights: latents can be exchanged between equal fingerprints only."""
    if isinstance(codec, DctCodec):
        return f"dct factor={codec.factor} channels={codec.channels}"
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(codec.params)[0]:
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(leaf, np.float32).tobytes())
    return f"vae scaling={codec.config.scaling_factor} sha256={digest.hexdigest()[:16]}"


def _latent_size(images: jax.Array, factor: int) -> tuple[int, int]:
    height, width = images.shape[-3:-1]
    if images.shape[-1] != 3 or height % factor or width % factor:
        raise ValueError(
            f"images: expected [..., H, W, 3] with sides that are multiples of {factor}, "
            f"got {images.shape}"
        )
    return height // factor, width // factor


def _deviation(colour: int, u: int, v: int, factor: int) -> float:
    """Standard deviation of a DCT coefficient on photographs in [−1, 1]."""
    if u + v == 0:
        return _DC[colour] * factor
    return _AC[colour] * factor**1.5 * (u + v) ** -1.2


@functools.lru_cache(maxsize=8)
def _dct_basis(factor: int, channels: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Orthonormal basis [f·f·3, channels] over (row, column, rgb), units, deviations [channels].

    A latent is a coefficient divided by its unit. Units follow the square root of the coefficients'
    deviations, so latents keep half of the natural predominance of coarse over fine (in decades).
    Deviations are those of the latents.
    """
    position = (np.arange(factor) + 0.5) / factor
    waves = np.cos(np.pi * np.arange(factor)[:, None] * position) * np.sqrt(2 / factor)
    waves[0] = np.sqrt(1 / factor)
    frequencies = [
        (colour, u, v) for colour in range(3) for u in range(factor) for v in range(factor)
    ]
    # Strongest first; among equals luma, then diagonal frequencies before straight ones.
    frequencies.sort(key=lambda k: (-_deviation(*k, factor), k[0], abs(k[1] - k[2]), k[1]))
    kept = frequencies[:channels]
    columns = [np.einsum("i,j,k->ijk", waves[u], waves[v], _COLOUR[c]).ravel() for c, u, v in kept]
    deviation = np.array([_deviation(*k, factor) for k in kept])
    unit = np.sqrt(deviation * deviation.mean()) / _STRENGTH
    arrays = (np.stack(columns, 1), unit, deviation / unit)
    return tuple(array.astype(np.float32) for array in arrays)
