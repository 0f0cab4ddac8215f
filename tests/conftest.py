"""Shared fixtures: small data made on the spot, and the optional folder of real data."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

import hypothesis
import pytest

FASTER_COMPILATION = "--xla_backend_optimization_level=0"

# Expected numbers are those of float32 on a CPU, whatever accelerator the machine has.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of a test's time is compilation: without LLVM's optimizations it takes a third less, and what
# the workers and the processes they start have in common is compiled once. The arithmetic is the
# same. pytest-xdist's workers inherit all this from the process that collects.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    compiled = tempfile.mkdtemp(prefix="compiled_")
    atexit.register(shutil.rmtree, compiled, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
if FASTER_COMPILATION not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FASTER_COMPILATION}".strip()

# Shared machines are slow at random, which is no bug; CI repeats the same examples every time.
hypothesis.settings.register_profile(
    "shared", deadline=None, derandomize=bool(os.environ.get("CI"))
)
hypothesis.settings.load_profile("shared")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that no worker waits for the other at the end."""
    items.sort(key=lambda item: "training" not in item.path.parts)


@pytest.fixture(scope="module", autouse=True)
def forget_compiled():
    """Compiled programs of finished modules would pile up to gigabytes in a worker."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and reference outputs beside the checkout, where there is one."""
    root = Path(os.environ.get("SEE3D_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not (root / "README.md").is_file():
        pytest.skip(f"no shared data at {root} (set SEE3D_SHARED)")
    return root


def moving_crop_clip(photo: str, frames: int = 12, height: int = 72, width: int = 96):
    """A clip record whose camera glides and zooms over one of scikit-image's photos."""
    import numpy as np
    from PIL import Image
    from skimage import data

    from see3d_jax.data import records

    picture = Image.fromarray(np.asarray(getattr(data, photo)())).convert("RGB")
    images = []
    for phase in np.linspace(0.0, 1.0, frames):
        scale = (0.75 - 0.25 * phase) * min(picture.width / width, picture.height / height)
        box_width, box_height = width * scale, height * scale
        left = phase * (picture.width - box_width)
        top = (0.5 + 0.4 * np.sin(3 * phase)) * (picture.height - box_height)
        box = (left, top, left + box_width, top + box_height)
        frame = picture.resize((width, height), Image.Resampling.LANCZOS, box=box)
        images.append(records.encode_jpeg(np.asarray(frame)))
    return records.ClipRecord(
        clip_id=f"{photo}-0",
        source=f"{photo}.mp4",
        fps=12.0,
        timestamps=np.arange(frames, dtype=np.float32) / 12.0,
        images=images,
        height=height,
        width=width,
    )


def posed_wall_clip(name: str, shift: float, frames: int = 6, height: int = 48, width: int = 64):
    """A clip with exact depth and poses: a camera slides along a wall with a post before it.

    `shift` is the step between frames in metres; the wall is 4 m away, the post 2 m.
    """
    import numpy as np

    from see3d_jax.data import records

    focal = 0.9 * width
    intrinsics = np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]], np.float32)
    x, y = np.meshgrid(
        (np.arange(width) + 0.5 - width / 2) / focal, (np.arange(height) + 0.5 - height / 2) / focal
    )
    images, depths, poses = [], [], []
    for frame in range(frames):
        eye = shift * frame
        depth = np.where(np.abs(2 * x + eye - 0.4) < 0.25, 2.0, 4.0)
        across, along = depth * x + eye, depth * y
        colour = np.stack([np.sin(5 * across), np.sin(4 * along), np.sin(3 * across + along)], -1)
        images.append(records.encode_jpeg(np.round(127.5 + 100 * colour).astype(np.uint8), 98))
        depths.append(records.encode_depth(depth, 1e-3))
        pose = np.eye(4, dtype=np.float32)
        pose[0, 3] = -eye
        poses.append(pose)
    return records.ClipRecord(
        clip_id=f"{name}-0", source=name, fps=12.0,
        timestamps=np.arange(frames, dtype=np.float32) / 12.0,
        images=images, height=height, width=width, depth=depths, depth_unit=1e-3,
        intrinsics=np.tile(intrinsics, (frames, 1, 1)), world_to_camera=np.stack(poses),
    )  # fmt: skip


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards with six small clips of six sources: enough to train on and to hold some out."""
    from see3d_jax.data import records

    folder = tmp_path_factory.mktemp("clips")
    photos = ("astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field", "camera")
    encoded = [records.encode(moving_crop_clip(photo)) for photo in photos]
    records.write_shards(encoded, folder, num_shards=2)
    return folder


def synthetic_scene(
    folder: Path, frames: int, width: int, height: int, supersample: int = 2
) -> Path:
    """A textured room seen by so many cameras, with exact depth: a scene folder in `folder`."""
    from data_prep.synthetic import make_clip

    settings = {
        "seed": 5, "frames": frames, "width": width, "height": height, "fps": 10.0,
        "supersample": supersample,
    }  # fmt: skip
    make_clip(folder, 0, settings)
    return folder / "scenes" / "clip_00000"
