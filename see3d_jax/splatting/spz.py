"""The `.spz` coding of Gaussian scenes (Niantic, github.com/nianticlabs/spz): a fraction of a PLY.

A gzip stream: 16 bytes of header, then one array after the other over all N Gaussians:
  position 3 × 24-bit fixed point · opacity u8 · colour 3 × u8 (harmonic 0, ±1/0.3) · log scale
  3 × u8 in sixteenths from −10 · rotation (version 3: smallest three in 32 bits; version 2: x y z
  as u8) · harmonics coefficient-major RGB, u8 in 1/128.
Axes inside the file are right, up, back (OpenGL); PLY worlds are right, down, front, so y and z
change sign on the way, in harmonics and rotations too. Written is version 3; read are 2 and 3.
"""

from __future__ import annotations

import gzip
import struct
import zlib

import numpy as np

from see3d_jax.errors import InputError
from see3d_jax.splatting.gaussians import Gaussians

_MAGIC, _VERSION = 0x5053474E, 3  # "NGSP"
_HEADER = struct.Struct("<IIIBBBB")  # magic, version, N, degree, fractional bits, flags, 0
_HAS_EXTENSIONS = 2
_COLOR_SCALE = 0.15
# x y z and harmonics 1–15 under (x, y, z) → (x, −y, −z); rotations (x y z) turn like positions.
_FLIP = np.array([1, -1, -1], np.float32)
_FLIP_SH = np.array([-1, -1, 1, -1, 1, 1, -1, 1, -1, 1, -1, -1, 1, -1, 1], np.float32)
_MAX_FIXED = (1 << 23) - 1
_QUATERNION_STEPS = (1 << 9) - 1


def encode(scene: Gaussians) -> bytes:
    """N Gaussians (NumPy leaves, no empty slots) → the bytes of a `.spz` file, version 3.

    Positions get as many fractional bits as the farthest Gaussian leaves room for. Raises
    InputError when one is farther than 2²³ units away, which the format cannot hold.
    """
    farthest = float(np.abs(scene.means).max(initial=0.0))
    if farthest > _MAX_FIXED:
        raise InputError(f"means: {farthest:.3g} is farther out than .spz can hold ({_MAX_FIXED})")
    bits = int(np.clip(np.floor(np.log2(_MAX_FIXED / max(farthest, 1e-9))), 0, 20))
    fixed = np.rint(np.float64(1 << bits) * (scene.means * _FLIP)).astype("<i4")
    opacity = 1.0 / (1.0 + np.exp(-np.asarray(scene.opacity_logits, np.float64)))
    coefficients = scene.sh.shape[1] - 1
    higher = scene.sh[:, 1:] * _FLIP_SH[:coefficients, None]
    parts = [
        _HEADER.pack(_MAGIC, _VERSION, scene.count, scene.sh_degree, bits, 0, 0),
        np.ascontiguousarray(fixed).view(np.uint8).reshape(-1, 4)[:, :3],
        _to_bytes(255 * opacity),
        _to_bytes(255 * (0.5 + _COLOR_SCALE * scene.sh[:, 0])),
        _to_bytes(16 * (scene.log_scales + 10)),
        _pack_quaternions(scene.quaternions),
        _to_bytes(128 * higher + 128),
    ]
    # mtime = 0: the same scene gives the same bytes.
    return gzip.compress(
        b"".join(p if isinstance(p, bytes) else p.tobytes() for p in parts), 6, mtime=0
    )


def decode(data: bytes, name: str) -> Gaussians:
    """The bytes of a `.spz` file → Gaussians (NumPy); InputErrors begin with `name`."""
    if data.startswith(b"NGSP"):
        raise InputError(f"{name}: .spz version 4 or later is not read; save it as version 2 or 3")
    try:
        data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(
            f"{name}: not a whole .spz file, its gzip stream is broken ({error})"
        ) from None
    if len(data) < _HEADER.size or _HEADER.unpack_from(data)[0] != _MAGIC:
        raise InputError(f"{name}: not a .spz file (it does not start with NGSP)")
    _, version, number, degree, bits, flags, _ = _HEADER.unpack_from(data)
    if version not in (2, 3):
        raise InputError(f"{name}: .spz version {version} is not read, only 2 and 3")
    if degree > 3 or bits > 23:
        raise InputError(f"{name}: degree {degree} with {bits} fractional bits; at most 3 and 23")
    if flags & _HAS_EXTENSIONS:
        raise InputError(f"{name}: .spz extensions are not read; write it again without them")
    if not number:
        raise InputError(f"{name}: holds no Gaussians")
    coefficients = (degree + 1) ** 2 - 1
    widths = (9, 1, 3, 3, 4 if version == 3 else 3, 3 * coefficients)
    if len(data) != _HEADER.size + number * sum(widths):
        raise InputError(
            f"{name}: cut short or damaged, {len(data) - _HEADER.size} bytes of Gaussians where "
            f"its header promises {number} of {sum(widths)} bytes"
        )
    edges = _HEADER.size + number * np.cumsum((0, *widths))
    position, opacity, color, scale, rotation, higher = (
        np.frombuffer(data, np.uint8, end - start, start).reshape(number, width)
        for start, end, width in zip(edges[:-1], edges[1:], widths, strict=True)
    )
    # 24 bits in the upper part of an int32, then shifted down with their sign.
    fixed = np.zeros((number, 3, 4), np.uint8)
    fixed[..., 1:] = position.reshape(number, 3, 3)
    means = (fixed.view("<i4")[..., 0] >> 8) / np.float64(1 << bits) * _FLIP
    share = np.clip(opacity[:, 0] / 255.0, 0.5 / 255, 254.5 / 255)
    sh = np.zeros((number, 1 + coefficients, 3))
    sh[:, 0] = (color / 255.0 - 0.5) / _COLOR_SCALE
    sh[:, 1:] = (higher.reshape(number, -1, 3) / 128.0 - 1) * _FLIP_SH[:coefficients, None]
    unpack = _unpack_quaternions if version == 3 else _unpack_first_three
    leaves = means, scale / 16.0 - 10, unpack(rotation), np.log(share / (1 - share)), sh
    return Gaussians(*(leaf.astype(np.float32) for leaf in leaves))


def _to_bytes(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def _pack_quaternions(wxyz: np.ndarray) -> np.ndarray:
    """[N, 4] → [N] uint32: which of x y z w is largest, then the other three in 10 bits each."""
    xyzw = np.roll(np.asarray(wxyz, np.float64), -1, axis=1) * [*_FLIP, 1]
    xyzw /= np.maximum(np.linalg.norm(xyzw, axis=1, keepdims=True), 1e-12)
    largest = np.abs(xyzw).argmax(1)
    rows = np.arange(len(xyzw))
    xyzw *= np.where(xyzw[rows, largest] < 0, -1, 1)[:, None]
    packed = largest.astype(np.uint32)
    for k in range(4):
        magnitude = np.rint(_QUATERNION_STEPS * np.abs(xyzw[:, k]) * np.sqrt(2)).astype(np.uint32)
        field = (xyzw[:, k] < 0).astype(np.uint32) << np.uint32(9) | magnitude
        packed = np.where(largest == k, packed, packed << np.uint32(10) | field)
    return packed.astype("<u4")


def _unpack_quaternions(rotation: np.ndarray) -> np.ndarray:
    """[N, 4] bytes → wxyz [N, 4]."""
    packed = np.ascontiguousarray(rotation).view("<u4")[:, 0]
    largest = packed >> 30
    xyzw = np.zeros((len(packed), 4))
    for k in (3, 2, 1, 0):
        value = (packed & _QUATERNION_STEPS) / (_QUATERNION_STEPS * np.sqrt(2))
        here = largest != k
        xyzw[:, k] = np.where(here, np.where(packed & 512, -value, value), 0)
        packed = np.where(here, packed >> 10, packed)
    xyzw[np.arange(len(xyzw)), largest] = np.sqrt(np.maximum(0, 1 - (xyzw**2).sum(1)))
    return np.roll(xyzw * [*_FLIP, 1], 1, axis=1)


def _unpack_first_three(rotation: np.ndarray) -> np.ndarray:
    """[N, 3] bytes of version 2 → wxyz [N, 4], w ≥ 0."""
    xyz = rotation / 127.5 - 1
    w = np.sqrt(np.maximum(0, 1 - (xyz**2).sum(1)))
    return np.concatenate([w[:, None], xyz * _FLIP], 1)
