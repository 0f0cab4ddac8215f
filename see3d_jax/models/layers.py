"""Layers that every network of this project is built from (Flax NNX, NHWC).

Each layer holds its parameters under the names PyTorch uses (`weight`, `bias`), so that converting
a checkpoint is a walk over names; only layouts differ: linear weights are [in, out], convolution
weights [kh, kw, in, out]. Parameters are float32; `dtype` is what a layer computes in. Norm
statistics are always taken in float32, in two passes (variance around the mean, not E[x²] − mean²).
Fresh weights follow PyTorch's defaults (uniform within ±1/√fan_in); `zero=True` starts at zero.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from see3d_jax.models.attention import platform

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
        x, weight = x.astype(self.dtype), self.weight[...].astype(self.dtype)
        if self.stride == 1 and platform() == "cpu":
            y = _plain_gradient_convolution(x, weight, self.padding)
        else:
            y = _convolution(x, weight, self.padding, self.stride)
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


Padding = tuple[tuple[int, int], tuple[int, int]]


def _convolution(x: jax.Array, weight: jax.Array, padding: Padding, stride: int = 1) -> jax.Array:
    """x [N, h, w, in], weight [kh, kw, in, out] → [N, h', w', out]."""
    return jax.lax.conv_general_dilated(
        x, weight, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _plain_gradient_convolution(x: jax.Array, weight: jax.Array, padding: Padding) -> jax.Array:
    """`_convolution` at stride 1, whose gradients are convolutions in the same plain layout.

    Those of JAX have their axes permuted. XLA's CPU backend puts that right, but not inside of
    calls and loops (see `remat`), where they would run on a path many times slower.
    """
    return _convolution(x, weight, padding)


def _convolution_forward(
    x: jax.Array, weight: jax.Array, padding: Padding
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _convolution(x, weight, padding), (x, weight)


def _convolution_backward(
    padding: Padding, saved: tuple[jax.Array, jax.Array], d_y: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, weight = saved
    turned = jnp.swapaxes(weight[::-1, ::-1], 2, 3)
    opposite = tuple(
        (size - 1 - low, size - 1 - high) for size, (low, high) in zip(weight.shape, padding)
    )
    d_x = _convolution(d_y, turned, opposite)
    # Channels take the place of images, images that of channels: [in, h, w, N] × [h', w', N, out].
    d_weight = _convolution(
        jnp.transpose(x, (3, 1, 2, 0)), jnp.transpose(d_y, (1, 2, 0, 3)), padding
    )
    return d_x, jnp.transpose(d_weight, (1, 2, 0, 3))


_plain_gradient_convolution.defvjp(_convolution_forward, _convolution_backward)


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
