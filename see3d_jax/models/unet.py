"""The multi-view UNet (paper Sec. 3.2; layout of SD-2.1 / MVDream): latents of V views in and out.

A Stable-Diffusion UNet whose self-attention runs over the tokens of all views of a sample jointly;
everything else is per view. See3D's form has 9 input channels [X_t, V_t, M] and no camera input;
MVDream's has 4 and adds an embedded camera to the time embedding. Views carry no index, so they
form an unordered set. Attribute names mirror the LDM PyTorch names (`input_blocks.1.0.in_layers.2`)
so that converting weights is a walk over names. Use it through `see3d_jax.models.weights`.
Inside, views are folded into the batch: [B·V, h, w, c], NHWC.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from see3d_jax.models.attention import BACKENDS, attention
from see3d_jax.models.layers import (
    Conv,
    GroupNorm,
    LayerNorm,
    Linear,
    numbered,
    timestep_embedding,
    upsample_nearest,
)
from see3d_jax.models.remat import recomputed
from see3d_jax.models.view_attention import EXCHANGES, view_attention

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Parts:
    """How the network runs where each device holds only a part of the views and of the weights.

    For code inside `jax.shard_map`; by default everything is whole.

    Attributes:
      gather: (path of a block, its parameters as they are held) → its parameters. Called before a
        block is used, and again when it is recomputed, so that few blocks are whole at once.
      view_axis: mesh axis over which the views of a sample are spread; None: they are all here.
    """

    gather: Callable[[tuple[str, ...], Params], Params] | None = None
    view_axis: str | None = None


WHOLE = Parts()


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """Architecture of the UNet; the defaults are the released See3D model (865,925,124 weights).

    Attributes:
      in_channels: 2·c + 1 for See3D's [X_t, V_t, M] with c latent channels; c for MVDream.
      out_channels: latent channels c.
      model_channels: width of the finest level.
      channel_mult: width of each level, in units of `model_channels`; the first must be 1.
      num_res_blocks: residual blocks per level (one more on the way up).
      attention_strides: levels (by down-sampling factor) that have attention; the middle always.
      head_dim: width of one attention head; divides the width of every level with attention.
      context_dim: width of the context tokens (text + image embedding).
      camera_dim: length of the flattened camera (16 in MVDream); None: no camera input.
      norm_groups: groups of every group norm; divides the width of every level.
      dtype: what the network computes in ("float32" or "bfloat16"); parameters are float32.
      remat: recompute whole blocks in the backward pass, not only norms and activations: a third
        more work for less memory; see `see3d_jax.models.remat`.
      attention_backend: see `see3d_jax.models.attention`.
      view_exchange: how devices that share the views of a sample exchange keys and values; see
        `see3d_jax.models.view_attention`.
    """

    in_channels: int = 9
    out_channels: int = 4
    model_channels: int = 320
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attention_strides: tuple[int, ...] = (1, 2, 4)
    head_dim: int = 64
    context_dim: int = 1024
    camera_dim: int | None = None
    norm_groups: int = 32
    dtype: str = "float32"
    remat: bool = False
    attention_backend: str = "auto"
    view_exchange: str = "gather"

    def __post_init__(self) -> None:
        for name in ("channel_mult", "attention_strides"):  # lists come from config files
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.channel_mult or self.channel_mult[0] != 1:
            raise ValueError(f"channel_mult: must start with 1, got {self.channel_mult}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype: expected float32 or bfloat16, got {self.dtype!r}")
        if self.attention_backend not in BACKENDS:
            raise ValueError(f"attention_backend: {self.attention_backend!r} is not in {BACKENDS}")
        if self.view_exchange not in EXCHANGES:
            raise ValueError(f"view_exchange: {self.view_exchange!r} is not in {EXCHANGES}")
        for level, multiple in enumerate(self.channel_mult):
            width = multiple * self.model_channels
            if width % self.norm_groups:
                raise ValueError(
                    f"norm_groups: {self.norm_groups} does not divide level {level}'s {width}"
                )
            attends = 2**level in self.attention_strides or level == len(self.channel_mult) - 1
            if attends and width % self.head_dim:
                raise ValueError(
                    f"head_dim: {self.head_dim} does not divide level {level}'s {width} channels"
                )

    @property
    def stride(self) -> int:
        """Latent heights and widths must be multiples of this."""
        return 2 ** (len(self.channel_mult) - 1)


class ResBlock(nnx.Module):
    """Two convolutions with a residual path; the time embedding is added between them."""

    def __init__(self, inputs: int, outputs: int, embedding: int, config: UNetConfig) -> None:
        dtype = jnp.dtype(config.dtype)
        groups = config.norm_groups
        self.in_layers = numbered(
            {0: GroupNorm(inputs, groups), 2: Conv(inputs, outputs, dtype=dtype)}
        )
        self.emb_layers = numbered({1: Linear(embedding, outputs, dtype=dtype)})
        self.out_layers = numbered(
            {0: GroupNorm(outputs, groups), 3: Conv(outputs, outputs, zero=True, dtype=dtype)}
        )
        self.skip_connection = Conv(inputs, outputs, 1, dtype=dtype) if inputs != outputs else None

    def __call__(self, x: jax.Array, embedding: jax.Array) -> jax.Array:
        """x [B·V, h, w, inputs], embedding [B·V, embedding] → [B·V, h, w, outputs]."""
        h = self.in_layers["2"](jax.nn.silu(self.in_layers["0"](x)))
        h = h + self.emb_layers["1"](jax.nn.silu(embedding))[:, None, None]
        h = self.out_layers["3"](jax.nn.silu(self.out_layers["0"](h)))
        return h + (x if self.skip_connection is None else self.skip_connection(x))


class Attention(nnx.Module):
    """Multi-head attention from x's tokens to `context`'s (or to x's own)."""

    def __init__(self, width: int, context: int, config: UNetConfig) -> None:
        dtype = jnp.dtype(config.dtype)
        self.to_q = Linear(width, width, bias=False, dtype=dtype)
        self.to_k = Linear(context, width, bias=False, dtype=dtype)
        self.to_v = Linear(context, width, bias=False, dtype=dtype)
        self.to_out = numbered({0: Linear(width, width, dtype=dtype)})
        self.head_dim = config.head_dim
        self.backend = config.attention_backend
        self.view_exchange = config.view_exchange

    def __call__(
        self, x: jax.Array, context: jax.Array | None = None, view_axis: str | None = None
    ) -> jax.Array:
        """x [N, tokens, width], context [N, tokens', context width] → [N, tokens, width].

        With a `view_axis`, x attends to the tokens of all devices along that mesh axis.
        """
        context = x if context is None else context
        q, k, v = (
            y.reshape(*y.shape[:2], -1, self.head_dim)
            for y in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        if view_axis is None:
            out = attention(q, k, v, backend=self.backend)
        else:
            out = view_attention(
                q, k, v, view_axis, exchange=self.view_exchange, backend=self.backend
            )
        return self.to_out["0"](out.reshape(x.shape))


class GatedUnit(nnx.Module):
    """GEGLU: value · gelu(gate), exact (erf) gelu, value first."""

    def __init__(self, width: int, hidden: int, config: UNetConfig) -> None:
        self.proj = Linear(width, 2 * hidden, dtype=jnp.dtype(config.dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., width] → [..., hidden]."""
        value, gate = jnp.split(self.proj(x), 2, -1)
        return value * jax.nn.gelu(gate, approximate=False)


class FeedForward(nnx.Module):
    """Per-token two-layer network, four times as wide inside."""

    def __init__(self, width: int, config: UNetConfig) -> None:
        out = Linear(4 * width, width, dtype=jnp.dtype(config.dtype))
        self.net = numbered({0: GatedUnit(width, 4 * width, config), 2: out})

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., width] → [..., width]."""
        return self.net["2"](self.net["0"](x))


class TransformerBlock(nnx.Module):
    """Joint self-attention over views, per-view attention to the context, feed-forward."""

    def __init__(self, width: int, config: UNetConfig) -> None:
        self.attn1 = Attention(width, width, config)
        self.attn2 = Attention(width, config.context_dim, config)
        self.ff = FeedForward(width, config)
        self.norm1, self.norm2, self.norm3 = LayerNorm(width), LayerNorm(width), LayerNorm(width)

    def __call__(
        self, x: jax.Array, context: jax.Array, views: int, view_axis: str | None = None
    ) -> jax.Array:
        """x [B·V, h·w, width], context [B·V, L, context_dim] → like x."""
        rows, tokens, width = x.shape
        joint = self.norm1(x).reshape(rows // views, views * tokens, width)
        x = x + self.attn1(joint, view_axis=view_axis).reshape(x.shape)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nnx.Module):
    """Pixels become tokens for one transformer block, with a residual path around it."""

    def __init__(self, width: int, config: UNetConfig) -> None:
        dtype = jnp.dtype(config.dtype)
        self.norm = GroupNorm(width, config.norm_groups, eps=1e-6)
        self.proj_in = Linear(width, width, dtype=dtype)
        self.transformer_blocks = numbered({0: TransformerBlock(width, config)})
        self.proj_out = Linear(width, width, zero=True, dtype=dtype)

    def __call__(
        self, x: jax.Array, context: jax.Array, views: int, view_axis: str | None = None
    ) -> jax.Array:
        """x [B·V, h, w, width], context [B·V, L, context_dim] → like x."""
        n, h, w, c = x.shape
        tokens = self.proj_in(self.norm(x).reshape(n, h * w, c))
        tokens = self.transformer_blocks["0"](tokens, context, views, view_axis)
        return x + self.proj_out(tokens).reshape(x.shape)


class Downsample(nnx.Module):
    """Strided convolution padded by 1 on every side."""

    def __init__(self, width: int, config: UNetConfig) -> None:
        self.op = Conv(width, width, stride=2, dtype=jnp.dtype(config.dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, h, w, width] → [N, h/2, w/2, width]."""
        return self.op(x)


class Upsample(nnx.Module):
    """Nearest-neighbour doubling, then a convolution."""

    def __init__(self, width: int, config: UNetConfig) -> None:
        self.conv = Conv(width, width, dtype=jnp.dtype(config.dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, h, w, width] → [N, 2h, 2w, width]."""
        return self.conv(upsample_nearest(x))


class MultiViewUNet(nnx.Module):
    """See the module docstring; built and called through `see3d_jax.models.weights`."""

    def __init__(self, config: UNetConfig) -> None:
        dtype = jnp.dtype(config.dtype)
        width, embedding = config.model_channels, 4 * config.model_channels
        self.config = config

        def mlp(inputs: int) -> nnx.Dict:
            first = Linear(inputs, embedding, dtype=dtype)
            second = Linear(embedding, embedding, dtype=dtype)
            return numbered({0: first, 2: second})

        def res(inputs: int, outputs: int) -> ResBlock:
            return ResBlock(inputs, outputs, embedding, config)

        def stage(*layers: nnx.Module) -> nnx.Dict:
            return numbered(dict(enumerate(layers)))

        self.time_embed = mlp(width)
        if config.camera_dim is not None:
            self.camera_embed = mlp(config.camera_dim)

        blocks = [stage(Conv(config.in_channels, width, dtype=dtype))]
        skips, channels, stride = [width], width, 1
        for level, multiple in enumerate(config.channel_mult):
            outputs = multiple * width
            for _ in range(config.num_res_blocks):
                layers = [res(channels, outputs)]
                if stride in config.attention_strides:
                    layers.append(SpatialTransformer(outputs, config))
                blocks.append(stage(*layers))
                skips.append(outputs)
                channels = outputs
            if level < len(config.channel_mult) - 1:
                blocks.append(stage(Downsample(channels, config)))
                skips.append(channels)
                stride *= 2
        self.input_blocks = stage(*blocks)

        self.middle_block = stage(
            res(channels, channels),
            SpatialTransformer(channels, config),
            res(channels, channels),
        )

        blocks = []
        for level, multiple in reversed(list(enumerate(config.channel_mult))):
            outputs = multiple * width
            for index in range(config.num_res_blocks + 1):
                layers = [res(channels + skips.pop(), outputs)]
                channels = outputs
                if stride in config.attention_strides:
                    layers.append(SpatialTransformer(outputs, config))
                if level > 0 and index == config.num_res_blocks:
                    layers.append(Upsample(outputs, config))
                    stride //= 2
                blocks.append(stage(*layers))
        self.output_blocks = stage(*blocks)

        last = Conv(width, config.out_channels, zero=True, dtype=dtype)
        self.out = numbered({0: GroupNorm(width, config.norm_groups), 2: last})

    def __call__(
        self,
        x: jax.Array,
        t: jax.Array,
        context: jax.Array,
        camera: jax.Array | None = None,
        parts: Parts = WHOLE,
    ) -> jax.Array:
        """Predicts the schedule's target (noise or v) for every view.

        Args:
          x: [B, V, h, w, in_channels]; h and w multiples of `config.stride`.
          t: [B, V] timesteps, may differ from view to view.
          context: [B, V, L, context_dim] tokens.
          camera: [B, V, camera_dim], exactly if the config has a `camera_dim`.
          parts: what of views and weights is on this device.

        Returns:
          [B, V, h, w, out_channels] float32.
        """
        config = self.config
        _check_inputs(config, x, t, context, camera)
        batch, views = x.shape[:2]
        rows = batch * views
        dtype = jnp.dtype(config.dtype)

        embedding = self._mlp(
            _whole(self.time_embed, ("time_embed",), parts),
            timestep_embedding(t.reshape(rows), config.model_channels),
        )
        if camera is not None:
            layers = _whole(self.camera_embed, ("camera_embed",), parts)
            embedding = embedding + self._mlp(layers, camera.reshape(rows, -1))
        context = context.reshape(rows, *context.shape[2:]).astype(dtype)
        run = _block_runner(config, embedding, context, views, parts)

        h = x.reshape(rows, *x.shape[2:]).astype(dtype)
        skips = []
        for index in map(str, range(len(self.input_blocks))):
            h = run(self.input_blocks[index], ("input_blocks", index), h)
            skips.append(h)
        h = run(self.middle_block, ("middle_block",), h)
        for index in map(str, range(len(self.output_blocks))):
            h = jnp.concatenate([h, skips.pop()], -1)
            h = run(self.output_blocks[index], ("output_blocks", index), h)
        out = _whole(self.out, ("out",), parts)
        h = out["2"](jax.nn.silu(out["0"](h)))
        return h.astype(jnp.float32).reshape(*x.shape[:-1], config.out_channels)

    @staticmethod
    def _mlp(layers: nnx.Dict, x: jax.Array) -> jax.Array:
        return layers["2"](jax.nn.silu(layers["0"](x)))


def _whole(block: nnx.Dict, path: tuple[str, ...], parts: Parts) -> nnx.Dict:
    """The block with the whole of its parameters."""
    if parts.gather is None:
        return block
    graph, held = nnx.split(block)
    return nnx.merge(graph, parts.gather(path, nnx.to_pure_dict(held)))


def _block_runner(
    config: UNetConfig, embedding: jax.Array, context: jax.Array, views: int, parts: Parts
) -> Callable[[nnx.Dict, tuple[str, ...], jax.Array], jax.Array]:
    """A function that runs one numbered stage, each layer given what its kind needs."""

    def run(stage: nnx.Dict, path: tuple[str, ...], h: jax.Array) -> jax.Array:
        stage = _whole(stage, path, parts)
        for index in range(len(stage)):
            layer = stage[str(index)]
            if isinstance(layer, ResBlock):
                h = layer(h, embedding)
            elif isinstance(layer, SpatialTransformer):
                h = layer(h, context, views, parts.view_axis)
            else:
                h = layer(h)
        return h

    return lambda stage, path, h: recomputed(lambda y: run(stage, path, y), whole=config.remat)(h)


def _check_inputs(
    config: UNetConfig,
    x: jax.Array,
    t: jax.Array,
    context: jax.Array,
    camera: jax.Array | None,
) -> None:
    if x.ndim != 5 or x.shape[-1] != config.in_channels:
        raise ValueError(f"x: expected [B, V, h, w, {config.in_channels}], got {x.shape}")
    views = x.shape[:2]
    if x.shape[2] % config.stride or x.shape[3] % config.stride:
        raise ValueError(
            f"x: latent height and width must be multiples of {config.stride}, got {x.shape[2:4]}"
        )
    if t.shape != views:
        raise ValueError(f"t: expected [B, V] = {views}, got {t.shape}")
    if context.ndim != 4 or context.shape[:2] != views or context.shape[3] != config.context_dim:
        raise ValueError(
            f"context: expected [B, V, L, {config.context_dim}] with [B, V] = {views}, "
            f"got {context.shape}"
        )
    expected = None if config.camera_dim is None else (*views, config.camera_dim)
    if (None if camera is None else camera.shape) != expected:
        raise ValueError(
            f"camera: expected {expected}, got {None if camera is None else camera.shape}"
        )
