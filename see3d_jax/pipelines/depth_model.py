"""Depth of one picture from a network in an ONNX file: Depth Anything, MoGe, Metric3D and the like.

What such a file outputs differs, so its kind is declared (paper: "affine-invariant"):
    metric     planar depth in metres
    affine     planar depth up to an unknown scale and shift
    disparity  inverse depth up to an unknown scale and shift
The network takes one float tensor [1, 3, h, w] (or [3, h, w]) and gives a map [.., h, w]; of
several outputs the one called predicted_depth, depth, disparity or metric_depth counts, else a
point map [.., h, w, 3], whose z it is; an output called mask marks what is known. What the file
does not say about its input is read from its metadata or from MODEL.json beside MODEL.onnx:
    {"kind", "size": longer side, "multiple": of sides, "mean": [3], "std": [3],
     "input_range": 1 or 255, "canonical_focal": pixels, if depth is for a camera of this focal}
Defaults: 518, 14, ImageNet's mean and deviation, 1, none. Needs onnxruntime (extra `depth`).
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np

from see3d_jax.errors import InputError
from see3d_jax.geometry.cameras import Camera
from see3d_jax.geometry.depth_align import GuidedDepths, align_depth, fit_global
from see3d_jax.onnx_models import open_session

KINDS = ("disparity", "affine", "metric")
_NAMES = ("predicted_depth", "depth", "metric_depth", "disparity", "inverse_depth")
_FEWEST = 16  # anchors that scale and shift are fitted to
_KEYPOINTS = 1024
_FAR_OVER_NEAR = 10.0  # assumed of disparity that nothing else tells the scale of


@dataclasses.dataclass(frozen=True)
class InputSettings:
    """How a picture is prepared for the network; see the module docstring."""

    size: int = 518
    multiple: int = 14
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    input_range: float = 1.0
    canonical_focal: float | None = None


@dataclasses.dataclass(frozen=True)
class DepthModel:
    """A network ready to run; made by `load_depth_model`.

    Attributes:
      path: the file.
      kind: one of `KINDS`.
      settings: how pictures are prepared.
      session: of onnxruntime.
    """

    path: Path
    kind: str
    settings: InputSettings
    session: Any

    def predict(self, image: np.ndarray, camera: Camera) -> np.ndarray:
        """uint8 [H, W, 3] → what the network says, [H, W] float32 of its kind, NaN = unknown.

        Raises InputError when the network cannot take the picture or gives no usable map.
        """
        height, width = image.shape[:2]
        entry = self.session.get_inputs()[0]
        small = _input_size(entry.shape, width, height, self.settings)
        pixels = cv2.resize(image, small, interpolation=cv2.INTER_AREA).astype(np.float32)
        pixels *= self.settings.input_range / 255
        with np.errstate(over="ignore"):
            pixels = (pixels - np.float32(self.settings.mean)) / np.float32(self.settings.std)
        tensor = np.ascontiguousarray(pixels.transpose(2, 0, 1))
        tensor = tensor[None] if len(entry.shape) == 4 else tensor
        if "float16" in entry.type:
            tensor = tensor.astype(np.float16)
        try:
            outputs = self.session.run(None, {entry.name: tensor})
        except Exception as error:  # onnxruntime raises classes of its own for any refusal
            raise InputError(f"{self.path}: cannot run on {small[0]}×{small[1]}: {error}") from None
        names = [output.name for output in self.session.get_outputs()]
        found = _map_of(dict(zip(names, outputs, strict=True)), self.path)
        if self.settings.canonical_focal:
            focal = float(np.asarray(camera.intrinsics)[0, 0]) * small[0] / width
            found = found * np.float32(focal / self.settings.canonical_focal)
        if not np.isfinite(found).any():
            raise InputError(f"{self.path}: the network gave nothing but NaN for this picture")
        return _resized(found, width, height)

    def depth(
        self, image: np.ndarray, camera: Camera,
        pixels: np.ndarray | None = None, depths: np.ndarray | None = None,
    ) -> tuple[np.ndarray, bool]:  # fmt: skip
        """Planar depth [H, W] float32, 0 = unknown, and whether it was aligned to what is known.

        Args:
          image: uint8 [H, W, 3]; camera: of this size.
          pixels: [K, 2] where planar `depths` [K] are known, e.g. of sparse points. With 16 or more
            the result is brought to them: scale and shift of its kind, then locally (Eq. 5, 6).

        Without them metric depth stays as it is, affine depth is shifted to be positive, and of
        disparity the farthest surface is taken to be 10 times as far as the nearest, which is at 1.
        """
        found = self.predict(image, camera)
        if pixels is not None and depths is not None:
            column, row = np.asarray(pixels).astype(int).T
            height, width = found.shape
            inside = (column >= 0) & (row >= 0) & (column < width) & (row < height)
            column, row, depths = column[inside], row[inside], np.asarray(depths)[inside]
            known = np.isfinite(found[row, column]) & (depths > 0)
            if known.sum() >= _FEWEST:
                at = np.stack([column, row], -1)[known] + 0.5
                return _aligned(found, self.kind, at, depths[known]), True
        return _positive(_alone(found, self.kind)), False


def load_depth_model(path: str | os.PathLike[str], kind: str | None = None) -> DepthModel:
    """Opens an ONNX file; `kind` (one of `KINDS`) wins over what its metadata says.

    Raises InputError: no such file, no onnxruntime, not a network of pictures, kind unknown.
    """
    path = Path(path)
    session = open_session(path, "--depth", "depth")
    inputs = session.get_inputs()
    if len(inputs) != 1 or len(inputs[0].shape) not in (3, 4) or "float" not in inputs[0].type:
        raise InputError(
            f"{path}: expected one input, a float tensor [1, 3, h, w]; it has "
            f"{', '.join(f'{i.name} {i.type} {i.shape}' for i in inputs)}"
        )
    said = _metadata(path, session.get_modelmeta().custom_metadata_map)
    kind = kind or said.pop("kind", None)
    if kind not in KINDS:
        raise InputError(
            f"{path}: what it outputs must be declared: --depth-kind {'|'.join(KINDS)}"
            + (f" (it says {kind!r})" if kind else "")
        )
    said.pop("kind", None)
    return DepthModel(path, kind, InputSettings(**said), session)


def _metadata(path: Path, inside: dict[str, str]) -> dict[str, Any]:
    """Settings from the file's metadata, then from the JSON beside it."""
    fields = {field.name for field in dataclasses.fields(InputSettings)} | {"kind"}
    said: dict[str, Any] = {}
    for key in fields & set(inside):
        try:
            said[key] = json.loads(inside[key])
        except ValueError:
            said[key] = inside[key]
    beside = path.with_suffix(".json")
    if beside.is_file():
        try:
            content = json.loads(beside.read_text(encoding="utf-8"))
            unknown = content.keys() - fields
        except (OSError, ValueError, AttributeError) as error:
            raise InputError(f"{beside}: not an object of settings ({error})") from error
        if unknown:
            raise InputError(f"{beside}: unknown {', '.join(sorted(unknown))}; known: {fields}")
        said |= content
    for key, value in said.items():
        numbers = value if key in ("mean", "std") else [value]
        good = key == "kind" or (
            isinstance(numbers, list | tuple)
            and len(numbers) == (3 if key in ("mean", "std") else 1)
            and all(isinstance(n, int | float) and np.isfinite(n) for n in numbers)
            and (key == "mean" or min(numbers) > 0)
        )
        if not good:
            raise InputError(f"{path}: {key} of its settings cannot be {value!r}")
    return said


def _input_size(
    shape: list[Any], width: int, height: int, settings: InputSettings
) -> tuple[int, int]:
    """(width, height) to run at: the network's own where it is fixed, else keeping the aspect."""
    rows, columns = shape[-2:]
    if isinstance(rows, int) and isinstance(columns, int):
        return columns, rows
    scale = settings.size / max(width, height)
    step = int(settings.multiple)
    wide, high = (max(1, round(length * scale / step)) * step for length in (width, height))
    return wide, high


def _map_of(outputs: dict[str, np.ndarray], path: Path) -> np.ndarray:
    """The depth map among the outputs: [h, w] float32, NaN where unknown."""
    maps = {name: _plane(np.asarray(value)) for name, value in outputs.items()}
    name = next((n for n in _NAMES if maps.get(n) is not None), None)
    others = [n for n, v in maps.items() if v is not None and "mask" not in n and "conf" not in n]
    if name is None and len(others) == 1:
        name = others[0]
    if name is None:
        shapes = ", ".join(f"{n} {np.shape(v)}" for n, v in outputs.items())
        raise InputError(f"{path}: no output is a depth map [.., h, w]; it gives {shapes}")
    found = maps[name].astype(np.float32)
    mask = maps.get("mask")
    if mask is not None and mask.shape == found.shape:
        found = np.where(mask > 0.5, found, np.nan)
    return np.where(np.isfinite(found), found, np.nan)


def _plane(value: np.ndarray) -> np.ndarray | None:
    """[.., h, w] or a point map [.., h, w, 3] → [h, w], None for anything else."""
    if value.ndim >= 3 and value.shape[-1] == 3 and value.shape[-2] > 3:
        value = value[..., 2]
    if value.ndim < 2 or np.prod(value.shape[:-2], dtype=int) != 1 or min(value.shape[-2:]) < 2:
        return None
    return value.reshape(value.shape[-2:])


def _resized(values: np.ndarray, width: int, height: int) -> np.ndarray:
    """Linear resize in which unknown stays unknown."""
    known = cv2.resize(np.isfinite(values).astype(np.float32), (width, height))
    filled = cv2.resize(np.nan_to_num(values, nan=0.0, posinf=0, neginf=0), (width, height))
    return np.where(known > 0.999, filled, np.nan).astype(np.float32)


def _aligned(found: np.ndarray, kind: str, pixels: np.ndarray, depths: np.ndarray) -> np.ndarray:
    """Depth [H, W] brought to the K given depths: scale and shift of its kind, then locally."""
    order = np.random.default_rng(0).permutation(len(depths))[:_KEYPOINTS]
    used = np.arange(_KEYPOINTS) < len(order)
    order = np.resize(order, _KEYPOINTS)  # one shape for all pictures: one compiled program
    pixels, depths = pixels[order], depths[order].astype(np.float32)
    valid = jnp.asarray(used, jnp.float32)
    column, row = pixels.astype(int).T
    values = jnp.asarray(found[row, column])
    goal = 1 / depths if kind == "disparity" else depths
    deviation = jnp.full(_KEYPOINTS, 0.01)
    # disparity and affine depth may be negative; the fit takes positive numbers only
    lift = float(np.nanmin(found)) - 1e-3 * float(np.ptp(found[np.isfinite(found)]) + 1e-6)
    lift = 0.0 if kind == "metric" else min(lift, 0.0)
    scale, shift = fit_global(
        values - lift, GuidedDepths(jnp.asarray(goal), deviation, valid, valid[None]),
        jax.random.key(0),
    )  # fmt: skip
    if kind == "metric":
        ratios = depths[used] / np.maximum(np.asarray(values)[used], 1e-9)
        scale, shift = np.median(ratios), 0.0
    line = np.float32(scale) * (found - np.float32(lift)) + np.float32(shift)
    if kind == "disparity":  # no farther than twice the farthest known depth
        line = 1 / np.maximum(line, np.float32(0.5 / depths.max()))
    estimate = _positive(line)
    local = GuidedDepths(jnp.asarray(depths), deviation, valid, valid[None])
    aligned = align_depth(jnp.asarray(estimate), jnp.asarray(pixels, jnp.float32), local).depth
    return _positive(np.asarray(aligned))


def _alone(found: np.ndarray, kind: str) -> np.ndarray:
    """Depth by convention, where nothing tells scale and shift."""
    if kind == "metric":
        return found
    low, high = np.nanquantile(found, [0.01, 0.99])
    if kind == "affine":
        return found if low > 0 else found - low + 0.1 * max(high - low, 1e-6)
    share = np.clip((found - low) / max(high - low, 1e-6), 0, 1)
    return 1 / (1 / _FAR_OVER_NEAR + (1 - 1 / _FAR_OVER_NEAR) * share)


def _positive(depth: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return np.where(np.isfinite(depth) & (depth > 0), depth, 0).astype(np.float32)
