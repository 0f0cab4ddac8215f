"""The transformer that both CLIP towers are made of: pre-norm attention and MLP layers.

Attribute names mirror the Hugging Face names (`encoder.layers.0.self_attn.q_proj`), so that
converting weights is a walk over names. The configurations keep the field names of the released
`config.json` files; `read_config` takes one of those.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from see3d_jax.errors import InputError
from see3d_jax.models.layers import Dtype, LayerNorm, Linear, numbered, parameter

# OpenCLIP's towers (SD 2, ViT-H/14) use the exact GELU, OpenAI's the sigmoid approximation.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """What both towers have in common.

    Attributes:
      hidden_size: width of the tokens.
      intermediate_size: width inside the MLP.
      num_hidden_layers: number of layers.
      num_attention_heads: heads of the attention; must divide `hidden_size`.
      hidden_act: activation of the MLP, one of `ACTIVATIONS`.
      layer_norm_eps: of every layer norm.
      dtype: what the network computes in; parameters are float32.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(
                f"hidden_act: expected one of {sorted(ACTIVATIONS)}, got {self.hidden_act!r}"
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads: {self.num_attention_heads} heads do not divide "
                f"hidden_size {self.hidden_size}"
            )


Config = TypeVar("Config", bound=EncoderConfig)


def read_config(
    kind: type[Config], config: Mapping[str, Any], defaults: Mapping[str, Any], section: str
) -> Config:
    """A tower's configuration from a parsed `config.json`, of the tower alone or of both.

    Args:
      kind: the configuration class to make.
      config: parsed file; fields that the class does not have are ignored.
      defaults: what fields mean that the file leaves out.
      section: where a file about both towers keeps this one's fields.

    Raises:
      InputError: a field has a value that is not supported.
    """
    if section in config:
        # Such a file states the true projection width beside its sections, not inside.
        outer = {key: config[key] for key in ("projection_dim",) if key in config}
        config = {**(config[section] or {}), **outer}
    names = {field.name for field in dataclasses.fields(kind)} - {"dtype"}
    fields = {**defaults, **{key: config[key] for key in names if key in config}}
    try:
        return kind(**{key: value for key, value in fields.items() if key in names})
    except (ValueError, TypeError) as error:
        raise InputError(f"CLIP config.json: {error}") from error


class Embedding(nnx.Module):
    """A table of vectors.

    `weight` is [channels, rows], transposed like every matrix that comes from PyTorch, so that
    converting checkpoints needs no exception for tables.
    """

    def __init__(self, rows: int, channels: int, *, dtype: Dtype = jnp.float32) -> None:
        self.weight = parameter((channels, rows), bound=channels**-0.5)
        self.dtype = dtype

    def __call__(self, ids: jax.Array) -> jax.Array:
        """[...] int → [..., channels] in the table's dtype."""
        return jnp.moveaxis(jnp.take(self.weight[...], ids, axis=1), 0, -1).astype(self.dtype)


class SelfAttention(nnx.Module):
    """Multi-head attention between all tokens, or of each to those before it."""

    def __init__(self, config: EncoderConfig, causal: bool) -> None:
        width, dtype = config.hidden_size, jnp.dtype(config.dtype)
        self.q_proj = Linear(width, width, dtype=dtype)
        self.k_proj = Linear(width, width, dtype=dtype)
        self.v_proj = Linear(width, width, dtype=dtype)
        self.out_proj = Linear(width, width, dtype=dtype)
        self.heads = config.num_attention_heads
        self.causal = causal

    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, tokens, width] → same shape."""
        q, k, v = (
            layer(x).reshape(*x.shape[:2], self.heads, -1)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        # At most a few hundred tokens: the library's plain form is the right one.
        out = jax.nn.dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out_proj(out.reshape(x.shape))


class Mlp(nnx.Module):
    """Two linear layers around the activation."""

    def __init__(self, config: EncoderConfig) -> None:
        dtype = jnp.dtype(config.dtype)
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, dtype=dtype)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, dtype=dtype)
        self.activation = config.hidden_act

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., width] → same shape."""
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))


class EncoderLayer(nnx.Module):
    """Attention and MLP, each on normalised tokens and added to its input."""

    def __init__(self, config: EncoderConfig, causal: bool) -> None:
        self.layer_norm1 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = SelfAttention(config, causal)
        self.layer_norm2 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = Mlp(config)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, tokens, width] → same shape."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nnx.Module):
    """The stack of layers."""

    def __init__(self, config: EncoderConfig, *, causal: bool) -> None:
        self.layers = numbered(
            {i: EncoderLayer(config, causal) for i in range(config.num_hidden_layers)}
        )

    def __call__(self, x: jax.Array) -> list[jax.Array]:
        """[N, tokens, width] → the tokens before the first and after every layer."""
        states = [x]
        for index in range(len(self.layers)):
            states.append(self.layers[str(index)](states[-1]))
        return states
