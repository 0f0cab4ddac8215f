"""RAFT optical flow (Teed and Deng, ECCV 2020) in JAX, small and large, for data_prep.flow.

    features of both frames at 1/8 → all-pairs correlation, pooled into 4 levels → repeated: look up
    a (2r + 1)² window per level, let a convolutional GRU correct the flow → upsample by 8

Parameters are one flat dictionary, name → float32 array (kernels [h, w, in, out]), written by
`tools.convert_raft`; `parameter_shapes` lists what each variant needs. Batch norms of the large
context encoder are folded into its convolutions by the converter. Images are RGB 0..255, NHWC;
flow is (x, y) in pixels.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from see3d_jax.errors import InputError

Parameters = Mapping[str, jax.Array]
LEVELS = 4  # of the correlation pyramid
STRIDE = 8  # of the features


@dataclasses.dataclass(frozen=True)
class Variant:
    """Widths of one size of RAFT.

    Attributes:
      features: channels that are correlated.
      hidden, context: channels of the GRU's state and of its constant input.
      radius: of the correlation window.
      stages: output channels of the three encoder stages.
      stem: channels of the first convolution.
      bottleneck: encoder blocks of three convolutions instead of two.
    """

    features: int
    hidden: int
    context: int
    radius: int
    stages: tuple[int, int, int]
    stem: int
    bottleneck: bool


SMALL = Variant(128, 96, 64, 3, (32, 64, 96), 32, True)
LARGE = Variant(256, 128, 128, 4, (64, 96, 128), 64, False)


def parameter_shapes(variant: Variant) -> dict[str, tuple[int, ...]]:
    """Every parameter's name → shape, in a fixed order."""
    kernels: dict[str, tuple[int, int, int, int]] = {}
    for encoder, out in (
        ("fnet", variant.features),
        ("cnet", variant.hidden + variant.context),
    ):
        kernels[f"{encoder}.conv1"] = (7, 7, 3, variant.stem)
        width = variant.stem
        for stage, channels in enumerate(variant.stages, 1):
            for block in (0, 1):
                name = f"{encoder}.layer{stage}.{block}"
                if variant.bottleneck:
                    quarter = channels // 4
                    kernels[f"{name}.conv1"] = (1, 1, width, quarter)
                    kernels[f"{name}.conv2"] = (3, 3, quarter, quarter)
                    kernels[f"{name}.conv3"] = (1, 1, quarter, channels)
                else:
                    kernels[f"{name}.conv1"] = (3, 3, width, channels)
                    kernels[f"{name}.conv2"] = (3, 3, channels, channels)
                if stage > 1 and block == 0:
                    kernels[f"{name}.downsample.0"] = (1, 1, width, channels)
                width = channels
        kernels[f"{encoder}.conv2"] = (1, 1, width, out)
    kernels |= {f"update_block.{name}": shape for name, shape in _update_shapes(variant).items()}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in kernels.items():
        shapes[f"{name}.kernel"] = shape
        shapes[f"{name}.bias"] = shape[-1:]
    return shapes


def _update_shapes(variant: Variant) -> dict[str, tuple[int, int, int, int]]:
    window = LEVELS * (2 * variant.radius + 1) ** 2
    hidden, context = variant.hidden, variant.context
    if variant is SMALL:
        gated = hidden + context + 82
        return {
            "encoder.convc1": (1, 1, window, 96), "encoder.convf1": (7, 7, 2, 64),
            "encoder.convf2": (3, 3, 64, 32), "encoder.conv": (3, 3, 128, 80),
            **{f"gru.conv{gate}": (3, 3, gated, hidden) for gate in "zrq"},
            "flow_head.conv1": (3, 3, hidden, 128), "flow_head.conv2": (3, 3, 128, 2),
        }  # fmt: skip
    gated = hidden + context + 128
    return {
        "encoder.convc1": (1, 1, window, 256), "encoder.convc2": (3, 3, 256, 192),
        "encoder.convf1": (7, 7, 2, 128), "encoder.convf2": (3, 3, 128, 64),
        "encoder.conv": (3, 3, 256, 126),
        **{f"gru.conv{gate}1": (1, 5, gated, hidden) for gate in "zrq"},
        **{f"gru.conv{gate}2": (5, 1, gated, hidden) for gate in "zrq"},
        "flow_head.conv1": (3, 3, hidden, 256), "flow_head.conv2": (3, 3, 256, 2),
        "mask.0": (3, 3, hidden, 256), "mask.2": (1, 1, 256, 9 * STRIDE**2),
    }  # fmt: skip


def load(path: Path) -> tuple[Variant, dict[str, jax.Array]]:
    """A file of `tools.convert_raft` → which variant it is, and its parameters."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        arrays = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: no RAFT weights ({' '.join(str(error).split())})") from None
    shapes = {name: value.shape for name, value in arrays.items()}
    for variant in (SMALL, LARGE):
        if shapes == parameter_shapes(variant):
            return variant, {name: jnp.asarray(value) for name, value in arrays.items()}
    raise InputError(f"{path}: holds neither RAFT; make it with python -m tools.convert_raft")


def make_flow(
    path: Path, long_side: int, iterations: int
) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """A backend for data_prep.flow: (first, second) uint8 RGB [H, W, 3] → flow [H, W, 2] float32.

    Frames are resized so that the longer side has `long_side` pixels; the flow is in pixels of the
    frames as they came.
    """
    variant, parameters = load(path)

    def flow(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        factor = long_side / max(first.shape[:2])
        size = tuple(int(side * factor) for side in first.shape[:2])
        return estimate(parameters, variant, first, second, size, iterations)

    return flow


def estimate(
    parameters: Parameters,
    variant: Variant,
    first: np.ndarray,
    second: np.ndarray,
    size: tuple[int, int],
    iterations: int,
) -> np.ndarray:
    """Flow between two uint8 frames [H, W, 3], estimated at `size` (height, width): [H, W, 2]."""
    import cv2

    height, width = first.shape[:2]
    small = [resize(frame, size) for frame in (first, second)]
    above, left = ((-side % STRIDE) // 2 for side in size)
    _, flow = network(parameters, variant, *(pad(frame) for frame in small), iterations)
    flow = np.asarray(flow)[0, above : above + size[0], left : left + size[1]]
    flow = cv2.resize(flow, (width, height), interpolation=cv2.INTER_LINEAR)
    return flow * np.array([width / size[1], height / size[0]], np.float32)


def resize(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear, to (height, width); as the official scripts do it before RAFT."""
    import cv2

    return cv2.resize(frame, size[::-1], interpolation=cv2.INTER_LINEAR)


def pad(frame: np.ndarray) -> np.ndarray:
    """Repeats the border so that both sides are multiples of 8: [H, W, 3] → [1, H8, W8, 3]."""
    more = [(side // 2, side - side // 2) for side in (-s % STRIDE for s in frame.shape[:2])]
    return np.pad(frame, [*more, (0, 0)], mode="edge")[None]


@functools.partial(jax.jit, static_argnames=("variant", "iterations"))
def network(
    parameters: Parameters, variant: Variant, first: jax.Array, second: jax.Array, iterations: int
) -> tuple[jax.Array, jax.Array]:
    """The network: images [B, H, W, 3] in 0..255 → (flow at 1/8, flow [B, H, W, 2]).

    The first, [B, H/8, W/8, 2], is in pixels of the small grid. H and W must be multiples of 8.
    """
    first, second = (2.0 * jnp.asarray(image, jnp.float32) / 255.0 - 1.0
                     for image in (first, second))  # fmt: skip
    features = _encode(parameters, "fnet", variant, jnp.concatenate([first, second]), norm=True)
    pyramid = _correlations(*jnp.split(features, 2))
    both = _encode(parameters, "cnet", variant, first, norm=False)
    hidden = jnp.tanh(both[..., : variant.hidden])
    context = jax.nn.relu(both[..., variant.hidden :])
    batch, height, width = hidden.shape[:3]
    y, x = jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij")
    start = jnp.broadcast_to(jnp.stack([x, y], -1), (batch, height, width, 2)).astype(jnp.float32)

    def body(
        state: tuple[jax.Array, jax.Array], _: None
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        hidden, coords = state
        seen = _look_up(pyramid, coords, variant.radius)
        hidden, change = _update(parameters, variant, hidden, context, seen, coords - start)
        return (hidden, coords + change), None

    (hidden, coords), _ = jax.lax.scan(body, (hidden, start), length=iterations)
    flow = coords - start
    if variant is LARGE:
        return flow, _upsample_convex(parameters, hidden, flow)
    return flow, STRIDE * _upsample_bilinear(flow)


def _conv(parameters: Parameters, name: str, x: jax.Array, stride: int = 1) -> jax.Array:
    kernel = parameters[f"{name}.kernel"]
    padding = [(side // 2, side // 2) for side in kernel.shape[:2]]
    out = jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return out + parameters[f"{name}.bias"]


def _instance_norm(x: jax.Array) -> jax.Array:
    mean = x.mean((1, 2), keepdims=True)
    variance = ((x - mean) ** 2).mean((1, 2), keepdims=True)
    return (x - mean) / jnp.sqrt(variance + 1e-5)


def _encode(
    parameters: Parameters, name: str, variant: Variant, x: jax.Array, norm: bool
) -> jax.Array:
    """Residual encoder to 1/8 resolution."""
    normalise = _instance_norm if norm else (lambda value: value)

    def layer(path: str, value: jax.Array, stride: int = 1) -> jax.Array:
        return jax.nn.relu(normalise(_conv(parameters, path, value, stride)))

    x = layer(f"{name}.conv1", x, 2)
    convolutions = 3 if variant.bottleneck else 2
    strided = 2 if variant.bottleneck else 1  # the one that halves the resolution
    for stage in (1, 2, 3):
        for block in (0, 1):
            path = f"{name}.layer{stage}.{block}"
            halve = stage > 1 and block == 0
            y = x
            for index in range(1, convolutions + 1):
                y = layer(f"{path}.conv{index}", y, 2 if halve and index == strided else 1)
            if halve:
                x = normalise(_conv(parameters, f"{path}.downsample.0", x, 2))
            x = jax.nn.relu(x + y)
    return _conv(parameters, f"{name}.conv2", x)


def _correlations(first: jax.Array, second: jax.Array) -> list[jax.Array]:
    """All pairs of features: levels of [B, h, w, h/2ˡ, w/2ˡ]."""
    volume = jnp.einsum("bijc,bklc->bijkl", first, second, precision=jax.lax.Precision.HIGHEST)
    pyramid = [volume / jnp.sqrt(jnp.float32(first.shape[-1]))]
    for _ in range(LEVELS - 1):
        last = pyramid[-1]
        rows, columns = last.shape[3] // 2, last.shape[4] // 2
        last = last[..., : 2 * rows, : 2 * columns]
        pyramid.append(last.reshape(*last.shape[:3], rows, 2, columns, 2).mean((4, 6)))
    return pyramid


def _look_up(pyramid: list[jax.Array], coords: jax.Array, radius: int) -> jax.Array:
    """Windows around coords [B, h, w, 2] in every level: [B, h, w, levels · (2r + 1)²].

    Bilinear, zero outside. As in the published weights the first window axis moves x.
    """
    shape = coords.shape[:3]
    windows = []
    for level, volume in enumerate(pyramid):
        volume = volume.reshape(-1, *volume.shape[3:])
        around = functools.partial(_window, radius=radius)
        window = jax.vmap(around)(volume, coords.reshape(-1, 2) / 2**level)
        windows.append(window.reshape(*shape, -1))
    return jnp.concatenate(windows, -1)


def _window(image: jax.Array, center: jax.Array, radius: int) -> jax.Array:
    """Bilinear samples of image [H, W] at center + (i, j), i, j = −r..r: [x, y]."""
    side = 2 * radius + 2
    corner = jnp.floor(center)
    # All samples share one fraction, so one patch of whole pixels serves all of them; what lies
    # outside reads zeros from the padding.
    padded = jnp.pad(image, side)
    limit = jnp.array(image.shape[::-1], jnp.float32) + side
    place = jnp.clip(corner - radius + side, 0, limit).astype(jnp.int32)
    patch = jax.lax.dynamic_slice(padded, (place[1], place[0]), (side, side))
    fraction = center - corner
    across = patch[:, :-1] * (1 - fraction[0]) + patch[:, 1:] * fraction[0]
    return (across[:-1] * (1 - fraction[1]) + across[1:] * fraction[1]).T


def _update(
    parameters: Parameters,
    variant: Variant,
    hidden: jax.Array,
    context: jax.Array,
    seen: jax.Array,
    flow: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """One correction: (new hidden state, change of the flow). Large RAFT's GRUs are separable."""

    def layer(name: str, x: jax.Array) -> jax.Array:
        return jax.nn.relu(_conv(parameters, f"update_block.encoder.{name}", x))

    motion = layer("convc1", seen)
    if variant is LARGE:
        motion = layer("convc2", motion)
    travelled = layer("convf2", layer("convf1", flow))
    motion = layer("conv", jnp.concatenate([motion, travelled], -1))
    inputs = jnp.concatenate([context, motion, flow], -1)
    for direction in ("1", "2") if variant is LARGE else ("",):
        hidden = _gru(parameters, direction, hidden, inputs)
    return hidden, _flow_head(parameters, hidden)


def _gru(parameters: Parameters, direction: str, hidden: jax.Array, inputs: jax.Array) -> jax.Array:
    def gate(name: str, state: jax.Array) -> jax.Array:
        both = jnp.concatenate([state, inputs], -1)
        return _conv(parameters, f"update_block.gru.conv{name}{direction}", both)

    keep, reset = jax.nn.sigmoid(gate("z", hidden)), jax.nn.sigmoid(gate("r", hidden))
    return (1 - keep) * hidden + keep * jnp.tanh(gate("q", reset * hidden))


def _flow_head(parameters: Parameters, hidden: jax.Array) -> jax.Array:
    wide = jax.nn.relu(_conv(parameters, "update_block.flow_head.conv1", hidden))
    return _conv(parameters, "update_block.flow_head.conv2", wide)


def _upsample_bilinear(flow: jax.Array) -> jax.Array:
    """×8 with the corners aligned: [B, h, w, 2] → [B, 8h, 8w, 2]."""
    for axis in (1, 2):
        count = flow.shape[axis]
        place = jnp.arange(STRIDE * count) * ((count - 1) / (STRIDE * count - 1))
        low = jnp.clip(place.astype(jnp.int32), 0, max(0, count - 2))
        fraction = (place - low).reshape([-1 if a == axis else 1 for a in range(4)])
        high = jnp.minimum(low + 1, count - 1)
        flow = flow.take(low, axis) * (1 - fraction) + flow.take(high, axis) * fraction
    return flow


def _upsample_convex(parameters: Parameters, hidden: jax.Array, flow: jax.Array) -> jax.Array:
    """×8; every fine pixel is a learned average of its 3 × 3 coarse neighbours."""
    weights = jax.nn.relu(_conv(parameters, "update_block.mask.0", hidden))
    weights = 0.25 * _conv(parameters, "update_block.mask.2", weights)
    batch, height, width = flow.shape[:3]
    weights = jax.nn.softmax(weights.reshape(batch, height, width, 9, STRIDE, STRIDE), axis=3)
    padded = jnp.pad(STRIDE * flow, [(0, 0), (1, 1), (1, 1), (0, 0)])
    around = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    fine = jnp.einsum("bhwnij,bhwnc->bhiwjc", weights, jnp.stack(around, 3))
    return fine.reshape(batch, STRIDE * height, STRIDE * width, 2)
