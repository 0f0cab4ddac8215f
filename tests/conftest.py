"""Shared fixtures: small data made on the spot, and the optional folder of real data."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest

# Expected numbers are those of float32 on a CPU, whatever accelerator the machine has.
os.environ.setdefault("JAX_PLATFORMS", "cpu")


# Shared machines are slow at random, which is no bug; CI repeats the same examples every time.
hypothesis.settings.register_profile(
    "shared", deadline=None, derandomize=bool(os.environ.get("CI"))
)
hypothesis.settings.load_profile("shared")


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


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards with six small clips of six sources: enough to train on and to hold some out."""
    from see3d_jax.data import records

    folder = tmp_path_factory.mktemp("clips")
    photos = ("astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field", "camera")
    encoded = [records.encode(moving_crop_clip(photo)) for photo in photos]
    records.write_shards(encoded, folder, num_shards=2)
    return folder
