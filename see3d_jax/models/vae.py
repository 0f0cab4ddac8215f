"""The Stable-Diffusion autoencoder (AutoencoderKL): images ↔ latents at 1/8 of their size.

Plain convolutional encoder and decoder with one attention block in the middle of each. Attribute
names mirror the diffusers names, so that converting weights is a walk over names. Images are
[N, H, W, 3] in [−1, 1]; latents [N, h, w, c] are *unscaled* here: `codec.VaeCodec` multiplies by
`scaling_factor`. The down-sampling convolution pads (0, 1), unlike the UNet's (1, 1).
Large images can go through in tiles, and batches image by image: see `tiling`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from see3d_jax.models.attention import attention
from see3d_jax.models.layers import Conv, GroupNorm, Linear, numbered, upsample_nearest
from see3d_jax.models.tiling import Network, map_rows, map_tiles

_EPS = 1e-6  # of every norm in here


@dataclasses.dataclass(frozen=True)
class VaeConfig:
    """Architecture of the autoencoder; the defaults are Stable Diffusion's (83,653,863 weights).

    Attributes:
      in_channels, out_channels: image channels.
      latent_channels: channels of the latents.
      block_out_channels: width of each level; one halving of the size between levels.
      layers_per_block: residual blocks per level of the encoder (the decoder has one more).
      norm_num_groups: groups of every group norm.
      scaling_factor: brings latents to about unit variance.
      dtype: what the network computes in; parameters are float32.
      tile_size: images with a side above this many pixels go through in tiles of this size, as in
        the released pipeline (its `sample_size`); None: never, which is more exact but needs
        memory for the whole image.
      slicing: one image of a batch at a time: the same result in less memory.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    dtype: str = "float32"
    tile_size: int | None = None
    slicing: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "block_out_channels", tuple(self.block_out_channels))
        if self.tile_size is not None and self.tile_size < self.factor:
            raise ValueError(f"tile_size: must be at least {self.factor}, got {self.tile_size}")

    @property
    def factor(self) -> int:
        """Pixels per latent along each side."""
        return 2 ** (len(self.block_out_channels) - 1)


class ResnetBlock(nnx.Module):
    """Two convolutions with a residual path."""

    def __init__(self, inputs: int, outputs: int, config: VaeConfig) -> None:
        dtype = jnp.dtype(config.dtype)
        self.norm1 = GroupNorm(inputs, config.norm_num_groups, eps=_EPS)
        self.conv1 = Conv(inputs, outputs, dtype=dtype)
        self.norm2 = GroupNorm(outputs, config.norm_num_groups, eps=_EPS)
        self.conv2 = Conv(outputs, outputs, dtype=dtype)
        self.conv_shortcut = Conv(inputs, outputs, 1, dtype=dtype) if inputs != outputs else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, h, w, inputs] → [N, h, w, outputs]."""
        h = self.conv1(jax.nn.silu(self.norm1(x)))
        h = self.conv2(jax.nn.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class PixelAttention(nnx.Module):
    """Single-head self-attention over all pixels, with a residual path."""

    def __init__(self, width: int, config: VaeConfig) -> None:
        dtype = jnp.dtype(config.dtype)
        self.group_norm = GroupNorm(width, config.norm_num_groups, eps=_EPS)
        self.to_q = Linear(width, width, dtype=dtype)
        self.to_k = Linear(width, width, dtype=dtype)
        self.to_v = Linear(width, width, dtype=dtype)
        self.to_out = numbered({0: Linear(width, width, dtype=dtype)})

    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, h, w, width] → same shape."""
        n, h, w, c = x.shape
        tokens = self.group_norm(x).reshape(n, h * w, c)
        q, k, v = (layer(tokens)[:, :, None] for layer in (self.to_q, self.to_k, self.to_v))
        return x + self.to_out["0"](attention(q, k, v)[:, :, 0]).reshape(x.shape)


class MiddleBlock(nnx.Module):
    """Residual block, attention, residual block."""

    def __init__(self, width: int, config: VaeConfig) -> None:
        self.attentions = numbered({0: PixelAttention(width, config)})
        self.resnets = numbered({i: ResnetBlock(width, width, config) for i in range(2)})

    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, h, w, width] → same shape."""
        return self.resnets["1"](self.attentions["0"](self.resnets["0"](x)))


class Resample(nnx.Module):
    """The convolution that halves or doubles the size of a level."""

    def __init__(self, width: int, down: bool, config: VaeConfig) -> None:
        stride, padding = (2, ((0, 1), (0, 1))) if down else (1, 1)
        self.conv = Conv(
            width, width, stride=stride, padding=padding, dtype=jnp.dtype(config.dtype)
        )
        self.down = down

    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, h, w, width] → [N, h/2, w/2, width], or [N, 2h, 2w, width]."""
        return self.conv(x if self.down else upsample_nearest(x))


class Level(nnx.Module):
    """Residual blocks of one size, then possibly a change of size."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        layers: int,
        resample: str | None,
        config: VaeConfig,
    ) -> None:
        widths = [inputs] + [outputs] * layers
        self.resnets = numbered(
            {i: ResnetBlock(widths[i], widths[i + 1], config) for i in range(layers)}
        )
        self.resample = resample
        if resample is not None:
            layer = Resample(outputs, resample == "downsamplers", config)
            setattr(self, resample, numbered({0: layer}))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, h, w, inputs] → [N, h', w', outputs]."""
        for index in range(len(self.resnets)):
            x = self.resnets[str(index)](x)
        return x if self.resample is None else getattr(self, self.resample)["0"](x)


class Encoder(nnx.Module):
    """Images to the moments of the posterior (before `quant_conv`)."""

    def __init__(self, config: VaeConfig) -> None:
        dtype = jnp.dtype(config.dtype)
        widths = config.block_out_channels
        self.conv_in = Conv(config.in_channels, widths[0], dtype=dtype)
        levels = {}
        for i, width in enumerate(widths):
            resample = "downsamplers" if i < len(widths) - 1 else None
            before = widths[max(i - 1, 0)]
            levels[i] = Level(before, width, config.layers_per_block, resample, config)
        self.down_blocks = numbered(levels)
        self.mid_block = MiddleBlock(widths[-1], config)
        self.conv_norm_out = GroupNorm(widths[-1], config.norm_num_groups, eps=_EPS)
        self.conv_out = Conv(widths[-1], 2 * config.latent_channels, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, H, W, 3] → [N, h, w, 2c]."""
        h = self.conv_in(x)
        for index in range(len(self.down_blocks)):
            h = self.down_blocks[str(index)](h)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(self.mid_block(h))))


class Decoder(nnx.Module):
    """Latents (after `post_quant_conv`) to images."""

    def __init__(self, config: VaeConfig) -> None:
        dtype = jnp.dtype(config.dtype)
        widths = config.block_out_channels[::-1]
        self.conv_in = Conv(config.latent_channels, widths[0], dtype=dtype)
        self.mid_block = MiddleBlock(widths[0], config)
        levels = {}
        for i, width in enumerate(widths):
            resample = "upsamplers" if i < len(widths) - 1 else None
            before = widths[max(i - 1, 0)]
            levels[i] = Level(before, width, config.layers_per_block + 1, resample, config)
        self.up_blocks = numbered(levels)
        self.conv_norm_out = GroupNorm(widths[-1], config.norm_num_groups, eps=_EPS)
        self.conv_out = Conv(widths[-1], config.out_channels, dtype=dtype)

    def __call__(self, z: jax.Array) -> jax.Array:
        """[N, h, w, c] → [N, H, W, 3]."""
        h = self.mid_block(self.conv_in(z))
        for index in range(len(self.up_blocks)):
            h = self.up_blocks[str(index)](h)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(h)))


class AutoencoderKL(nnx.Module):
    """See the module docstring; built and called through `see3d_jax.models.weights`."""

    def __init__(self, config: VaeConfig) -> None:
        dtype = jnp.dtype(config.dtype)
        c = config.latent_channels
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = Conv(2 * c, 2 * c, 1, dtype=dtype)
        self.post_quant_conv = Conv(c, c, 1, dtype=dtype)

    def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[N, H, W, 3] → mean and log-variance of the posterior, each [N, h, w, c] float32."""
        moments = self._run(lambda x: self.quant_conv(self.encoder(x)), images, "pixels")
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, -1)
        return mean, jnp.clip(logvar, -30, 20)

    def decode(self, z: jax.Array) -> jax.Array:
        """[N, h, w, c] unscaled latents → [N, H, W, 3] float32."""
        images = self._run(lambda y: self.decoder(self.post_quant_conv(y)), z, "latents")
        return images.astype(jnp.float32)

    def _run(self, network: Network, x: jax.Array, unit: str) -> jax.Array:
        """A half of the autoencoder over x, in slices and tiles where the configuration says so."""
        config = self.config
        run = (lambda y: map_rows(network, y)) if config.slicing else network
        if config.tile_size is None:
            return run(x)
        tile = {"pixels": config.tile_size, "latents": config.tile_size // config.factor}
        if max(x.shape[1:3]) <= tile[unit]:
            return run(x)
        other = tile["latents" if unit == "pixels" else "pixels"]
        return map_tiles(run, x, tile[unit], other)
