"""How right and how fast forward warps are, on scenes with exact depth, against NumPy and torch.

    python -m benchmarks.warp --scene DIR [--json FILE]

`psnr_known` and `wrong_surface_fraction` are of the default warp (surfels), each view warped into
the next: PSNR over the pixels that the mask calls known, and the share of them whose depth is more
than 2 % from the truth. Where a depth map ends is not judged: pixels without true depth are left
out. `ms_per_view` and the ratios are of the fast z-buffer (`warp_points`) at 512², against the same
z-buffer, image, depth and mask written with numpy.minimum.at and with torch's scatter_reduce, turn
by turn; `ratio_vs_torch` is null where torch is not installed. `surfel_ms_per_view` is the default
warp's time.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import cv2
import jax
import numpy as np

from see3d_jax.errors import InputError, run_command
from see3d_jax.files import write_json
from see3d_jax.geometry.cameras import Camera, pixel_grid, stack
from see3d_jax.geometry.point_warping import warp_points
from see3d_jax.geometry.warping import warp_views
from see3d_jax.pipelines.inputs import Scene, load_depth, load_images, load_scene

SIDE, PAIRS, REPEATS = 512, 6, 15


@click.command(
    epilog="""\b
Examples:
  python -m benchmarks.warp --scene scene_with_depth --json warp.json
"""
)
@click.option("--scene", type=click.Path(path_type=Path), required=True, help="Posed, with depth.")
@click.option("--json", "output", type=click.Path(path_type=Path), help="Also write the numbers.")
def app(scene: Path, output: Path | None) -> None:
    """Prints quality of the default warp, and times of the fast one."""
    opened = load_scene(scene)
    if len(opened) < 2 or opened.depth_paths is None:
        raise InputError(f"{scene}: needs at least 2 posed images with depth")
    numbers = {**quality(opened), **speed(opened)}
    for name, value in numbers.items():
        click.echo(f"{name:26} {value if isinstance(value, str | None) else round(value, 4)}")
    if output is not None:
        write_json(output, numbers)


def quality(scene: Scene, pairs: int = PAIRS) -> dict[str, float]:
    """PSNR and wrong surfaces of the default warp over evenly chosen neighbours."""
    squared, count, wrong = 0.0, 0, 0
    for a in np.unique(np.linspace(0, len(scene) - 2, pairs).round().astype(int)):
        images, cameras = load_images(scene, (a, a + 1))
        pair, truth = stack(cameras), load_depth(scene, a + 1)
        image, true_image = (image / np.float32(255) for image in images)
        warped = warp_views(image[None], load_depth(scene, a)[None], pair[:1], pair[1:])
        known = (np.asarray(warped.known)[0, ..., 0] > 0) & (truth > 0)
        squared += float(((np.asarray(warped.image)[0] - true_image)[known] ** 2).mean(-1).sum())
        off = np.abs(np.asarray(warped.depth)[0][known] / truth[known] - 1)
        wrong, count = wrong + int((off > 0.02).sum()), count + int(known.sum())
    if not count:
        raise InputError(f"{scene.root}: no pixel of a view is seen by the one before it")
    psnr = float(-10 * np.log10(max(squared / count, 1e-10)))
    return {"psnr_known": psnr, "wrong_surface_fraction": wrong / count}


def speed(scene: Scene) -> dict[str, Any]:
    """Least milliseconds per 512² view of each implementation, taken turn by turn."""
    images, cameras = load_images(scene, (0, 1))
    image = cv2.resize(images[0], (SIDE, SIDE)).astype(np.float32) / 255
    depth = cv2.resize(load_depth(scene, 0), (SIDE, SIDE), interpolation=cv2.INTER_NEAREST)
    pair = stack([camera.resized(SIDE, SIDE) for camera in cameras])
    source, target = pair[0], pair[1:]
    calls: dict[str, Callable[[], Any]] = {
        "ours": lambda: jax.block_until_ready(warp_points(*ours, source, target)),
        "numpy": lambda: numpy_warp(image, depth, source, target[0]),
        "surfel": lambda: jax.block_until_ready(
            warp_views(image[None], depth[None], pair[:1], target)
        ),
    }
    ours = jax.device_put(image), jax.device_put(depth)
    reason = "torch is not installed here"
    if importlib.util.find_spec("torch"):
        calls["torch"], reason = torch_warp(image, depth, source, target[0]), ""
    seconds = {name: [] for name in calls}
    for turn in range(REPEATS + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn:  # the first one compiles
                seconds[name].append(time.perf_counter() - start)
    ms = {name: 1e3 * min(values) for name, values in seconds.items()}
    numbers = {
        "ms_per_view": ms["ours"], "surfel_ms_per_view": ms["surfel"], "numpy_ms": ms["numpy"],
        "ratio_vs_numpy": ms["ours"] / ms["numpy"],
        "ratio_vs_torch": ms["ours"] / ms["torch"] if "torch" in ms else None,
    }  # fmt: skip
    return numbers | ({"ratio_vs_torch_note": reason} if reason else {"torch_ms": ms["torch"]})


def _matrices(source: Camera, target: Camera) -> tuple[np.ndarray, np.ndarray]:
    motion = target.world_to_camera @ np.linalg.inv(source.world_to_camera)
    a = target.intrinsics @ motion[:3, :3] @ np.linalg.inv(source.intrinsics)
    return a.astype(np.float32), (target.intrinsics @ motion[:3, 3]).astype(np.float32)


def _rays(depth: np.ndarray) -> np.ndarray:
    height, width = depth.shape
    grid = pixel_grid(height, width).reshape(-1, 2)
    return np.concatenate([grid, np.ones_like(grid[:, :1])], -1).T.copy()


def numpy_warp(
    image: np.ndarray, depth: np.ndarray, source: Camera, target: Camera
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The z-buffer in NumPy: image [h·w, 3], depth [h·w], known [h·w]."""
    a, b = _matrices(source, target)
    size = target.width * target.height
    q = a @ (_rays(depth) * depth.reshape(-1)) + b[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        x, y = np.floor(q[0] / q[2]), np.floor(q[1] / q[2])
        inside = (q[2] > 1e-6) & (x >= 0) & (x < target.width) & (y >= 0) & (y < target.height)
    chosen = np.flatnonzero(inside & (depth.reshape(-1) > 0))
    index = y[chosen].astype(np.int64) * target.width + x[chosen].astype(np.int64)
    z = q[2, chosen]
    nearest = np.full(size, np.inf, np.float32)
    np.minimum.at(nearest, index, z)
    wins = z == nearest[index]
    colour = np.zeros((size, 3), np.float32)
    colour[index[wins]] = image.reshape(-1, 3)[chosen[wins]]
    known = np.isfinite(nearest)
    return colour, np.where(known, nearest, 0), known


def torch_warp(
    image: np.ndarray, depth: np.ndarray, source: Camera, target: Camera
) -> Callable[[], Any]:
    """The same in torch: a call without arguments, its inputs ready as tensors."""
    import torch

    a, b = (torch.from_numpy(part) for part in _matrices(source, target))
    colours = torch.from_numpy(image).reshape(-1, 3)
    d, rays = torch.from_numpy(depth.copy()).reshape(-1), torch.from_numpy(_rays(depth))
    width, height = target.width, target.height
    size = width * height

    def call() -> tuple[Any, ...]:
        q = a @ (rays * d) + b[:, None]
        x, y = torch.floor(q[0] / q[2]), torch.floor(q[1] / q[2])
        inside = (q[2] > 1e-6) & (x >= 0) & (x < width) & (y >= 0) & (y < height) & (d > 0)
        index = torch.where(inside, y * width + x, float(size)).long()
        nearest = torch.full((size + 1,), torch.inf)
        nearest.scatter_reduce_(0, index, q[2], "amin")
        wins = torch.nonzero(inside & (q[2] == nearest[index]))[:, 0]
        colour = torch.zeros(size, 3)
        colour[index[wins]] = colours[wins]
        known = torch.isfinite(nearest[:-1])
        return colour, torch.where(known, nearest[:-1], 0.0), known

    return call


if __name__ == "__main__":
    run_command(lambda: app(standalone_mode=False))
