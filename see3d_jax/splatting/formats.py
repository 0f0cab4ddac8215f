"""Gaussian scenes as files: the PLY of 3DGS, read by every splat viewer; `.splat` and `.spz`.

PLY: one `vertex` element, binary little endian, float32 properties in this order:
  x y z · nx ny nz (zeros) · f_dc_0..2 · f_rest_* (channel-major: all of red, green, blue)
  · opacity (logit) · scale_0..2 (log) · rot_0..3 (wxyz)
.splat (antimatter15): 32 bytes per Gaussian, the most visible first: position and scale as float32,
colour without harmonics and opacity as uint8, unit quaternion wxyz as round(128 q) + 128.
.spz (Niantic): see `spz`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from see3d_jax.errors import InputError
from see3d_jax.files import atomic_path
from see3d_jax.splatting import spz
from see3d_jax.splatting.gaussians import SH_C0, Gaussians, occupied, sh_degree_of

_TYPES = {
    "char": "i1", "int8": "i1", "uchar": "u1", "uint8": "u1", "short": "i2", "int16": "i2",
    "ushort": "u2", "uint16": "u2", "int": "i4", "int32": "i4", "uint": "u4", "uint32": "u4",
    "float": "f4", "float32": "f4", "double": "f8", "float64": "f8",
}  # fmt: skip
_MAX_HEADER = 1 << 16
_SPLAT = np.dtype(
    [("mean", "<f4", 3), ("scale", "<f4", 3), ("color", "u1", 4), ("quaternion", "u1", 4)]
)


def read_gaussians(path: str | os.PathLike[str]) -> Gaussians:
    """Reads a .ply, .splat or .spz file, as its name says. Raises InputError like each of them."""
    return _format_of(path)[0](path)


def write_gaussians(path: str | os.PathLike[str], gaussians: Gaussians) -> None:
    """Writes the occupied slots as .ply, .splat or .spz, as the name says."""
    _format_of(path)[1](path, gaussians)


def _format_of(path: str | os.PathLike[str]) -> tuple[Callable, Callable]:
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise InputError(f"{path}: a scene of Gaussians is named {', '.join(FORMATS)}")
    return FORMATS[suffix]


def write_ply(path: str | os.PathLike[str], gaussians: Gaussians) -> None:
    """Writes the occupied slots; the same Gaussians give the same bytes."""
    scene = occupied(gaussians)
    number = scene.count
    rest = scene.sh[:, 1:].transpose(0, 2, 1).reshape(number, -1)
    columns = [
        scene.means, np.zeros((number, 3)), scene.sh[:, 0], rest,
        scene.opacity_logits[:, None], scene.log_scales, _unit(scene.quaternions),
    ]  # fmt: skip
    names = _property_names(rest.shape[1])
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {number}"]
    header += [f"property float {name}" for name in names] + ["end_header", ""]
    with atomic_path(path) as temporary:
        body = np.concatenate(columns, 1).astype("<f4")
        temporary.write_bytes("\n".join(header).encode("ascii") + body.tobytes())


def read_ply(path: str | os.PathLike[str]) -> Gaussians:
    """Reads a 3DGS PLY (binary little endian; properties in any order, extra ones are ignored).

    Raises InputError for a file that is missing, cut short, of another kind, empty of Gaussians,
    or holds NaN.
    """
    path = Path(path)
    data = _read(path)
    number, row, start = _read_header(path, data)
    names = [name for name, _ in row]
    rest = sum(name.startswith("f_rest_") for name in names)
    missing = [n for n in _property_names(rest) if n not in names and n not in ("nx", "ny", "nz")]
    if missing:
        raise InputError(
            f"{path}: not a 3DGS PLY, property {missing[0]} is missing"
            + (f" (and {len(missing) - 1} more)" if len(missing) > 1 else "")
        )
    if not number:
        raise InputError(f"{path}: holds no Gaussians (element vertex 0)")
    dtype = np.dtype(row)
    if len(data) - start < number * dtype.itemsize:
        raise InputError(
            f"{path}: cut short, holds {(len(data) - start) // dtype.itemsize} of the {number} "
            "Gaussians its header promises; copy the file again"
        )
    table = np.frombuffer(data, dtype, number, start)

    def columns(*wanted: str) -> np.ndarray:
        return np.stack([table[name] for name in wanted], -1).astype(np.float32)

    if rest % 3 or 1 + rest // 3 not in (1, 4, 9, 16):
        raise InputError(f"{path}: {rest} f_rest_ properties; expected 0, 9, 24 or 45")
    sh = columns("f_dc_0", "f_dc_1", "f_dc_2")[:, None]
    if rest:
        higher = columns(*(f"f_rest_{k}" for k in range(rest)))
        sh = np.concatenate([sh, higher.reshape(number, 3, -1).transpose(0, 2, 1)], 1)
    sh_degree_of(sh.shape[1])
    gaussians = Gaussians(
        means=columns("x", "y", "z"),
        log_scales=columns("scale_0", "scale_1", "scale_2"),
        quaternions=columns("rot_0", "rot_1", "rot_2", "rot_3"),
        opacity_logits=columns("opacity")[:, 0],
        sh=sh,
    )
    for field in ("means", "log_scales", "quaternions", "sh"):
        if not np.isfinite(getattr(gaussians, field)).all():
            raise InputError(f"{path}: {field} holds NaN or infinity")
    if np.isnan(gaussians.opacity_logits).any():
        raise InputError(f"{path}: opacity holds NaN")
    return gaussians


def write_splat(path: str | os.PathLike[str], gaussians: Gaussians) -> None:
    """Writes the occupied slots as `.splat`; colours keep 8 bits and nothing of the direction."""
    scene = most_visible_first(gaussians)
    opacity, scales = _opacity_and_scales(scene)
    rows = np.zeros(scene.count, _SPLAT)
    rows["mean"], rows["scale"] = scene.means, scales
    colors = np.concatenate([0.5 + SH_C0 * scene.sh[:, 0], opacity[:, None]], 1)
    rows["color"] = np.clip(np.round(255 * colors), 0, 255)
    rows["quaternion"] = np.clip(np.round(128 * _unit(scene.quaternions)) + 128, 0, 255)
    with atomic_path(path) as temporary:
        temporary.write_bytes(rows.tobytes())


def most_visible_first(gaussians: Gaussians) -> Gaussians:
    """The occupied slots in the order of a `.splat` file: by opacity times volume."""
    scene = occupied(gaussians)
    opacity, scales = _opacity_and_scales(scene)
    order = np.argsort(-opacity * scales.prod(1), kind="stable")
    return jax.tree.map(lambda leaf: leaf[order], scene)


def _opacity_and_scales(scene: Gaussians) -> tuple[np.ndarray, np.ndarray]:
    opacity = 1.0 / (1.0 + np.exp(-np.asarray(scene.opacity_logits, np.float64)))
    return opacity, np.exp(np.asarray(scene.log_scales, np.float64))


def read_splat(path: str | os.PathLike[str]) -> Gaussians:
    """Reads a `.splat` file (degree 0). Raises InputError for one that is missing or cut short."""
    path = Path(path)
    data = _read(path)
    if not data or len(data) % _SPLAT.itemsize:
        raise InputError(
            f"{path}: {len(data)} bytes are no whole number of Gaussians of {_SPLAT.itemsize} "
            "bytes; not a .splat file, or cut short"
        )
    rows = np.frombuffer(data, _SPLAT)
    if not (np.isfinite(rows["mean"]).all() and (rows["scale"] > 0).all()):
        raise InputError(f"{path}: holds NaN, infinity or a scale that is not positive")
    color, opacity = rows["color"][:, :3] / 255.0, np.clip(rows["color"][:, 3] / 255.0, 1e-3, 0.999)
    leaves = (
        rows["mean"], np.log(rows["scale"]), (rows["quaternion"].astype(np.float64) - 128) / 128,
        np.log(opacity / (1 - opacity)), ((color - 0.5) / SH_C0)[:, None],
    )  # fmt: skip
    return Gaussians(*(np.array(leaf, np.float32) for leaf in leaves))


def write_spz(path: str | os.PathLike[str], gaussians: Gaussians) -> None:
    """Writes the occupied slots as `.spz`: a fraction of the PLY's size, to the eye the same."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(spz.encode(occupied(gaussians)))


def read_spz(path: str | os.PathLike[str]) -> Gaussians:
    """Reads a `.spz` file. InputError for one that is missing, cut short or too new."""
    path = Path(path)
    return spz.decode(_read(path), str(path))


FORMATS: dict[str, tuple[Callable, Callable]] = {
    ".ply": (read_ply, write_ply),
    ".splat": (read_splat, write_splat),
    ".spz": (read_spz, write_spz),
}


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def _property_names(rest: int) -> list[str]:
    return [
        *("x", "y", "z", "nx", "ny", "nz"),
        *(f"f_dc_{k}" for k in range(3)),
        *(f"f_rest_{k}" for k in range(rest)),
        "opacity",
        *(f"scale_{k}" for k in range(3)),
        *(f"rot_{k}" for k in range(4)),
    ]


def _read_header(path: Path, data: bytes) -> tuple[int, list[tuple[str, str]], int]:
    """→ (vertices, row layout as NumPy fields, offset of the first row)."""
    if not data.startswith(b"ply"):
        raise InputError(f"{path}: not a PLY file")
    marker = b"end_header\n" if b"end_header\n" in data[:_MAX_HEADER] else b"end_header\r\n"
    end = data.find(marker, 0, _MAX_HEADER)
    if end < 0:
        raise InputError(f"{path}: the PLY header has no end_header; the file is cut short")
    number, row, element, binary = None, [], "", False
    for line in data[:end].decode("ascii", "replace").splitlines():
        words = line.split()
        if words[:1] == ["format"]:
            binary = words[1:2] == ["binary_little_endian"]
        elif words[:1] == ["element"] and len(words) == 3:
            if number is None and words[1] != "vertex":
                raise InputError(f"{path}: the first PLY element must be vertex, got {words[1]}")
            element = words[1]
            if element == "vertex":
                number = int(words[2]) if words[2].isdigit() else None
        elif words[:1] == ["property"] and element == "vertex":
            if len(words) != 3 or words[1] not in _TYPES or words[2] in dict(row):
                raise InputError(f"{path}: PLY line {line!r} is no plain number property")
            row.append((words[2], "<" + _TYPES[words[1]]))
    if not binary:
        raise InputError(f"{path}: only binary_little_endian PLY is read")
    if number is None:
        raise InputError(f"{path}: the PLY header names no number of vertices")
    return number, row, end + len(marker)


def _unit(quaternions: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(quaternions.astype(np.float64), axis=1, keepdims=True)
    return quaternions / np.maximum(length, 1e-12)
