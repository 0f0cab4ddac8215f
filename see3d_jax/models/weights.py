"""Networks as pure functions over plain parameter trees.

A parameter tree is a nested dict with string keys and float32 leaves; joined with dots its keys are
the names PyTorch uses (`input_blocks.1.0.in_layers.2.weight`). Modules are split once per
configuration into a static graph and parameters; everything outside this package sees only
`init_*`, `abstract_*` and `apply_*`. `*_params_from_torch` turn a flat dict of PyTorch tensors (as
NumPy arrays) into such a tree: every key is consumed exactly once, every shape is checked, and
leftovers or gaps are an error that lists them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from see3d_jax.errors import InputError
from see3d_jax.models.clip_text import ClipText, ClipTextConfig
from see3d_jax.models.clip_vision import ClipVision, ClipVisionConfig
from see3d_jax.models.unet import WHOLE, MultiViewUNet, Parts, UNetConfig
from see3d_jax.models.vae import AutoencoderKL, VaeConfig

Params = dict[str, Any]


def init_unet(config: UNetConfig, seed: int | jax.Array) -> Params:
    """Fresh float32 parameters for training from scratch; the same seed gives the same bits."""
    return _initialise(lambda: MultiViewUNet(config), seed)


def abstract_unet(config: UNetConfig) -> Params:
    """The parameter tree as `jax.ShapeDtypeStruct` leaves; allocates nothing."""
    return jax.eval_shape(functools.partial(init_unet, config, 0))


def apply_unet(
    config: UNetConfig,
    params: Params,
    x: jax.Array,
    t: jax.Array,
    context: jax.Array,
    camera: jax.Array | None = None,
    parts: Parts = WHOLE,
) -> jax.Array:
    """Runs the UNet.

    Args:
      config: architecture the parameters were made for.
      params: parameter tree.
      x: [B, V, h, w, in_channels].
      t: [B, V] timesteps.
      context: [B, V, L, context_dim].
      camera: [B, V, camera_dim] if the config has one.
      parts: what of views and weights is on this device (inside `jax.shard_map`).

    Returns:
      [B, V, h, w, out_channels] float32.

    Raises:
      ValueError: an input has the wrong shape (the message names it).
    """
    return nnx.merge(_unet_graph(config), params)(x, t, context, camera, parts)


def unet_params_from_torch(tensors: Mapping[str, np.ndarray], config: UNetConfig) -> Params:
    """Parameters of the UNet from PyTorch tensors under their LDM / See3D names."""
    return _from_torch(tensors, abstract_unet(config), "UNet")


def init_vae(config: VaeConfig, seed: int | jax.Array) -> Params:
    """Fresh float32 parameters of the autoencoder; the same seed gives the same bits."""
    return _initialise(lambda: AutoencoderKL(config), seed)


def abstract_vae(config: VaeConfig) -> Params:
    """The parameter tree as `jax.ShapeDtypeStruct` leaves; allocates nothing."""
    return jax.eval_shape(functools.partial(init_vae, config, 0))


def encode_vae(config: VaeConfig, params: Params, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[N, H, W, 3] in [−1, 1] → posterior mean and log-variance, [N, h, w, c], unscaled."""
    return nnx.merge(_vae_graph(config), params).encode(images)


def decode_vae(config: VaeConfig, params: Params, z: jax.Array) -> jax.Array:
    """[N, h, w, c] unscaled latents → [N, H, W, 3], about [−1, 1]."""
    return nnx.merge(_vae_graph(config), params).decode(z)


def vae_params_from_torch(tensors: Mapping[str, np.ndarray], config: VaeConfig) -> Params:
    """Parameters of the autoencoder from PyTorch tensors under their diffusers names."""
    return _from_torch(tensors, abstract_vae(config), "VAE")


def init_clip_text(config: ClipTextConfig, seed: int | jax.Array) -> Params:
    """Fresh float32 parameters of CLIP's text tower; the same seed gives the same bits."""
    return _initialise(lambda: ClipText(config), seed)


def abstract_clip_text(config: ClipTextConfig) -> Params:
    """The parameter tree as `jax.ShapeDtypeStruct` leaves; allocates nothing."""
    return jax.eval_shape(functools.partial(init_clip_text, config, 0))


def apply_clip_text(
    config: ClipTextConfig, params: Params, ids: jax.Array
) -> tuple[jax.Array, list[jax.Array]]:
    """[N, tokens] ids → the states the UNet reads, and those before each layer and after the last.

    The first are [N, tokens, width] float32 and normalised; the others are not.
    """
    return nnx.merge(_clip_text_graph(config), params)(ids)


def clip_text_params_from_torch(
    tensors: Mapping[str, np.ndarray], config: ClipTextConfig
) -> Params:
    """Parameters of the text tower from PyTorch tensors, of the tower alone or of a whole CLIP."""
    other = ("vision_model.", "visual_projection.", "text_projection.", "logit_scale")
    return _from_torch(_without(tensors, other), abstract_clip_text(config), "CLIP text")


def init_clip_vision(config: ClipVisionConfig, seed: int | jax.Array) -> Params:
    """Fresh float32 parameters of CLIP's image tower; the same seed gives the same bits."""
    return _initialise(lambda: ClipVision(config), seed)


def abstract_clip_vision(config: ClipVisionConfig) -> Params:
    """The parameter tree as `jax.ShapeDtypeStruct` leaves; allocates nothing."""
    return jax.eval_shape(functools.partial(init_clip_vision, config, 0))


def apply_clip_vision(
    config: ClipVisionConfig, params: Params, pixels: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """[N, S, S, 3] of `preprocess` → embeddings [N, projection_dim], tokens [N, 1 + P, width]."""
    return nnx.merge(_clip_vision_graph(config), params)(pixels)


def clip_vision_params_from_torch(
    tensors: Mapping[str, np.ndarray], config: ClipVisionConfig
) -> Params:
    """Parameters of the image tower from PyTorch tensors, of the tower alone or of a whole CLIP."""
    other = ("text_model.", "text_projection.", "logit_scale")
    return _from_torch(_without(tensors, other), abstract_clip_vision(config), "CLIP vision")


def parameter_count(tree: Any) -> int:
    """Number of scalars in a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _initialise(build: Callable[[], nnx.Module], seed: int | jax.Array) -> Params:
    """Draws all parameters of a module from one stream of uniform numbers, in tree order."""
    state = nnx.state(nnx.eval_shape(build), nnx.Param)
    flat = sorted(nnx.to_flat_state(state), key=lambda item: item[0])
    total = sum(math.prod(variable.shape) for _, variable in flat if variable.bound)
    stream = jax.random.uniform(jax.random.key(seed), (total,), jnp.float32, -1, 1)
    if not isinstance(stream, jax.core.Tracer):
        stream = np.asarray(stream)  # cut on the host: no program to compile per shape
    params, used = {}, 0
    for path, variable in flat:
        size = math.prod(variable.shape)
        if variable.bound:
            value = stream[used : used + size].reshape(variable.shape) * np.float32(variable.bound)
            used += size
        else:
            value = np.full(variable.shape, variable.fill, np.float32)
        node = params
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = jnp.asarray(value)
    return params


def _graph(build: Callable[[], nnx.Module]) -> nnx.GraphDef:
    return nnx.split(nnx.eval_shape(build))[0]


@functools.lru_cache(maxsize=32)
def _unet_graph(config: UNetConfig) -> nnx.GraphDef:
    return _graph(lambda: MultiViewUNet(config))


@functools.lru_cache(maxsize=8)
def _vae_graph(config: VaeConfig) -> nnx.GraphDef:
    return _graph(lambda: AutoencoderKL(config))


@functools.lru_cache(maxsize=8)
def _clip_text_graph(config: ClipTextConfig) -> nnx.GraphDef:
    return _graph(lambda: ClipText(config))


@functools.lru_cache(maxsize=8)
def _clip_vision_graph(config: ClipVisionConfig) -> nnx.GraphDef:
    return _graph(lambda: ClipVision(config))


def _without(tensors: Mapping[str, np.ndarray], other: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Leaves out the other tower of a CLIP, and the position counters that older files hold."""
    return {
        name: value
        for name, value in tensors.items()
        if not name.startswith(other) and not name.endswith(".position_ids")
    }


def _from_torch(tensors: Mapping[str, np.ndarray], abstract: Params, what: str) -> Params:
    """Fills the abstract tree, transposing layouts; raises InputError listing what does not fit."""
    wanted = {".".join(key.key for key in path): leaf for path, leaf in _leaves(abstract)}
    missing, extra = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if missing or extra:
        raise InputError(
            f"{what} weights do not fit the configuration: "
            f"{len(missing)} missing {_some(missing)}, {len(extra)} left over {_some(extra)}"
        )
    converted, wrong = {}, []
    for name, leaf in wanted.items():
        value = _from_torch_layout(np.asarray(tensors[name]))
        if value.shape != leaf.shape:
            wrong.append(f"{name} {value.shape} instead of {leaf.shape}")
        converted[name] = value
    if wrong:
        raise InputError(f"{what} weights have {len(wrong)} wrong shapes {_some(wrong)}")
    return jax.tree.map_with_path(
        lambda path, leaf: jnp.asarray(converted[".".join(key.key for key in path)], leaf.dtype),
        abstract,
    )


def _from_torch_layout(value: np.ndarray) -> np.ndarray:
    """Linear [out, in] → [in, out]; convolution [out, in, kh, kw] → [kh, kw, in, out]."""
    if value.ndim == 4:
        return value.transpose(2, 3, 1, 0)
    return value.T


def _leaves(tree: Params) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_flatten_with_path(tree)[0]


def _some(names: list[str], limit: int = 8) -> str:
    shown = ", ".join(names[:limit])
    return f"[{shown}{', …' if len(names) > limit else ''}]"
