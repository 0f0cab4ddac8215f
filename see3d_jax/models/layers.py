"""Layers that every network of this project is built from (Flax NNX, NHWC).

Each layer holds its parameters under the names PyTorch uses (`weight`, `bias`), so that converting
a checkpoint is a walk over names; only layouts differ: linear weights are [in, out], convolution
weights [kh, kw, in, out]. Parameters are float32; `dtype` is what a layer computes in. Norm
statistics are always taken in float32, in two passes (variance around the mean, not E[x²] − mean²).
Fresh weights follow PyTorch's defaults (uniform within ±1/√fan_in); `zero=True` starts at zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

Dtype = Any


def numbered(layers: Mapping[int, nnx.Module]) -> nnx.Dict:
    """A container whose children are named by (possibly gapped) numbers, as in torch.Sequential.

    A dict with string keys rather than a list: gaps are where torch keeps layers without weights,
    and parameter trees then have string keys only, as checkpoints want.
    """
    return nnx.Dict({str(number): layer for number, layer in layers.items()})


def parameter(shape: tuple[int, ...], *, fill: float = 0.0, bound: float = 0.0) -> nnx.Param:
    """A float32 parameter and how it starts: `fill`, or uniform within ±bound where that is set.

    Only the rule is kept here. Modules are built abstractly (`nnx.eval_shape`), and
    `weights.init_unet` draws all values at once: compiling a generator per shape takes seconds.
    """
    return nnx.Param(jnp.full(shape, fill, jnp.float32), fill=fill, bound=bound)


class Linear(nnx.Module):
    """y = x · weight + bias over the last axis."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        bias: bool = True,
        zero: bool = False,
        dtype: Dtype = jnp.float32,
    ) -> None:
        bound = 0.0 if zero else 1 / math.sqrt(inputs)
        self.weight = parameter((inputs, outputs), bound=bound)
        self.bias = parameter((outputs,), bound=bound) if bias else None
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., inputs] → [..., outputs] in the layer's dtype."""
        y = x.astype(self.dtype) @ self.weight[...].astype(self.dtype)
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


class Conv(nnx.Module):
    """2-D convolution (cross-correlation, like torch) with explicit padding."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 3,
        *,
        stride: int = 1,
        padding: tuple[tuple[int, int], tuple[int, int]] | int | None = None,
        bias: bool = True,
        zero: bool = False,
        dtype: Dtype = jnp.float32,
    ) -> None:
        bound = 0.0 if zero else 1 / math.sqrt(inputs * kernel * kernel)
        self.weight = parameter((kernel, kernel, inputs, outputs), bound=bound)
        self.bias = parameter((outputs,), bound=bound) if bias else None
        self.stride = stride
        # Never "SAME": at stride 2 it pads (0, 1) where torch pads (1, 1).
        pad = kernel // 2 if padding is None else padding
        self.padding = ((pad, pad), (pad, pad)) if isinstance(pad, int) else pad
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, h, w, inputs] → [N, h', w', outputs] in the layer's dtype."""
        y = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            self.weight[...].astype(self.dtype),
            window_strides=(self.stride, self.stride),
            padding=self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


class GroupNorm(nnx.Module):
    """Normalises each sample over space and the channels of a group, then scales and shifts."""

    def __init__(self, channels: int, groups: int = 32, *, eps: float = 1e-5) -> None:
        if channels % groups:
            raise ValueError(f"group norm: {channels} channels do not split into {groups} groups")
        self.weight = parameter((channels,), fill=1.0)
        self.bias = parameter((channels,))
        self.groups = groups
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, ..., channels] → same shape and dtype; the middle axes are normalised together."""
        batch, channels = x.shape[0], x.shape[-1]
        grouped = x.astype(jnp.float32).reshape(batch, -1, self.groups, channels // self.groups)
        centred = grouped - grouped.mean((1, 3), keepdims=True)
        variance = jnp.square(centred).mean((1, 3), keepdims=True)
        y = (centred * jax.lax.rsqrt(variance + self.eps)).reshape(x.shape)
        return (y * self.weight[...] + self.bias[...]).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Normalises the last axis, then scales and shifts."""

    def __init__(self, channels: int, *, eps: float = 1e-5) -> None:
        self.weight = parameter((channels,), fill=1.0)
        self.bias = parameter((channels,))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., channels] → same shape and dtype."""
        y = x.astype(jnp.float32)
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        return (y * self.weight[...] + self.bias[...]).astype(x.dtype)


def timestep_embedding(t: jax.Array, channels: int, max_period: float = 10_000.0) -> jax.Array:
    """[...] timesteps (any number type) → [..., channels] float32 sinusoids, cosines first."""
    half = channels // 2
    frequencies = jnp.exp(-math.log(max_period) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = t.astype(jnp.float32)[..., None] * frequencies
    embedding = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)
    return jnp.pad(embedding, [(0, 0)] * t.ndim + [(0, channels % 2)])


def upsample_nearest(x: jax.Array) -> jax.Array:
    """[N, h, w, c] → [N, 2h, 2w, c], every pixel repeated."""
    n, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None], (n, h, 2, w, 2, c)).reshape(n, 2 * h, 2 * w, c)
