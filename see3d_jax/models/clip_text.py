"""The text tower of CLIP: token ids to one vector per token, the text half of the UNet's context.

Stable Diffusion 2 uses OpenCLIP ViT-H/14's text tower without its last layer: 23 layers, causal
attention (padding is not masked), and the states after the final layer norm. A checkpoint with all
24 layers gives the same states once the last layer is left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from see3d_jax.models.clip_layers import Embedding, Encoder, EncoderConfig, read_config
from see3d_jax.models.layers import LayerNorm

# What transformers means by a field that config.json leaves out.
_DEFAULTS = {
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipTextConfig(EncoderConfig):
    """Architecture of the text tower; the defaults are those of SD 2.1 (340,387,840 weights).

    Attributes:
      vocab_size: number of tokens.
      max_position_embeddings: longest prompt, in tokens.
    """

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 23
    num_attention_heads: int = 16
    vocab_size: int = 49408
    max_position_embeddings: int = 77


def read_text_config(config: Mapping[str, Any]) -> ClipTextConfig:
    """From a parsed Hugging Face `config.json` of a text tower or of both towers.

    Raises:
      InputError: a field has a value that is not supported.
    """
    return read_config(ClipTextConfig, config, _DEFAULTS, "text_config")


class TextEmbeddings(nnx.Module):
    """Token plus position."""

    def __init__(self, config: ClipTextConfig) -> None:
        width, dtype = config.hidden_size, jnp.dtype(config.dtype)
        self.token_embedding = Embedding(config.vocab_size, width, dtype=dtype)
        self.position_embedding = Embedding(config.max_position_embeddings, width, dtype=dtype)
        self.longest = config.max_position_embeddings

    def __call__(self, ids: jax.Array) -> jax.Array:
        """[N, tokens] int → [N, tokens, width]."""
        if ids.ndim != 2 or ids.shape[1] > self.longest:
            raise ValueError(f"ids: expected [N, at most {self.longest}], got {ids.shape}")
        return self.token_embedding(ids) + self.position_embedding(jnp.arange(ids.shape[1]))


class TextModel(nnx.Module):
    """Embeddings, causal layers, final norm."""

    def __init__(self, config: ClipTextConfig) -> None:
        self.embeddings = TextEmbeddings(config)
        self.encoder = Encoder(config, causal=True)
        self.final_layer_norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def __call__(self, ids: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        """[N, tokens] int → the normalised last states, and all states before the norm."""
        states = self.encoder(self.embeddings(ids))
        return self.final_layer_norm(states[-1]), states


class ClipText(nnx.Module):
    """See the module docstring; built and called through `see3d_jax.models.weights`."""

    def __init__(self, config: ClipTextConfig) -> None:
        self.text_model = TextModel(config)

    def __call__(self, ids: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        """[N, tokens] int → last states [N, tokens, width] float32, and the states on the way."""
        last, states = self.text_model(ids)
        return last.astype(jnp.float32), states
