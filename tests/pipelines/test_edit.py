"""Editing: the edit arrives where it belongs, and nothing else changes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import synthetic_scene

from see3d_jax import cli
from see3d_jax.diffusion.sampler import SamplerConfig
from see3d_jax.errors import InputError
from see3d_jax.media import read_image, write_image
from see3d_jax.pipelines import edit as module
from see3d_jax.pipelines.edit import edit, load_edit, warp_edit
from see3d_jax.pipelines.inputs import load_depth, load_images, load_scene
from see3d_jax.pipelines.pretrained import See3DModel

REFERENCE, FRAMES = 2, 5
GREY = 90  # what the stand-in for the model makes


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> Path:
    return synthetic_scene(tmp_path_factory.mktemp("synthetic"), FRAMES, 96, 64)


@pytest.fixture
def model(monkeypatch) -> None:
    @dataclasses.dataclass(frozen=True)
    class Stub(See3DModel):
        size_multiple = 8

    parts = dict.fromkeys(("unet", "params", "codec", "schedule"))
    stub = Stub(name="stub", image_size=78, views=4, sampling=SamplerConfig(), **parts)
    monkeypatch.setattr(module, "load_model", lambda folder, **options: stub)
    monkeypatch.setattr(
        module, "sample_groups", lambda model, given, warps, *rest: np.full_like(warps, GREY)
    )


@pytest.fixture
def files(scene, tmp_path) -> dict[str, Path]:
    """The middle frame with the colours of a part of it inverted."""
    photo = read_image(scene / f"images/0000{REFERENCE}.png")
    region = np.zeros(photo.shape[:2], bool)
    region[16:48, 24:72] = True
    edited = np.where(region[..., None], 255 - photo, photo)
    paths = {"edited": tmp_path / "edited.png", "region": tmp_path / "region.png"}
    write_image(paths["edited"], edited)
    write_image(paths["region"], np.where(region, 255, 0).astype(np.uint8))
    return paths


def test_the_edit_arrives_in_every_photo_and_the_rest_stays(scene, model, files) -> None:
    result = edit(scene, reference=REFERENCE, checkpoint="unused", **files)
    assert result.views.shape == (FRAMES - 1, 64, 96, 3)
    opened = load_scene(scene)
    photos = np.stack(load_images(opened, tuple(i for i in range(FRAMES) if i != REFERENCE))[0])
    new, outside = result.depths > 0, result.masks & (result.depths == 0)
    for view, photo, inside, rest in zip(result.views, photos, new, outside, strict=True):
        np.testing.assert_array_equal(view[rest], photo[rest])
        assert inside.mean() > 0.1 and rest.mean() > 0.4
        error = (view.astype(float) - (255 - photo))[inside] / 255
        assert -10 * np.log10(np.mean(error**2)) > 25  # the true inverted colours
    holes = ~result.masks
    assert 0 < holes.mean() < 0.2 and (result.views[holes] == GREY).all()
    assert result.run["warnings"] == []


def test_what_stands_in_front_of_the_region_stays_there(scene, files) -> None:
    opened = load_scene(scene)
    change = load_edit(opened, REFERENCE, files["edited"], files["region"], None, 96)
    images, cameras = load_images(opened, (1,))
    photo, camera = np.stack(images), module.stack(cameras)
    depth = load_depth(opened, 1)[None]
    open_view = warp_edit(change, photo, depth, camera)
    in_front = depth.copy()
    in_front[:, :, :48] *= 0.5  # something near covers the left half of this view
    covered = warp_edit(change, photo, in_front, camera)
    assert open_view[3][:, :, :40].any() and not covered[3][:, :, :40].any()
    np.testing.assert_array_equal(covered[0][:, :, :40], photo[:, :, :40])
    np.testing.assert_array_equal(covered[3][:, :, 56:], open_view[3][:, :, 56:])


def test_a_changed_shape_lands_elsewhere_and_leaves_a_hole(scene, model, files, tmp_path) -> None:
    depth = load_depth(load_scene(scene), REFERENCE)
    depth[16:48, 24:72] *= 0.6
    np.save(tmp_path / "depth.npy", depth)
    flat = edit(scene, reference=REFERENCE, checkpoint="unused", views=2, **files)
    raised = edit(
        scene, reference=REFERENCE, checkpoint="unused", views=2,
        edited_depth=tmp_path / "depth.npy", **files,
    )  # fmt: skip
    assert (flat.depths > 0).any() and ((flat.depths > 0) != (raised.depths > 0)).mean() > 0.02
    assert (~raised.masks).mean() > (~flat.masks).mean()


def test_bad_edits_are_named(scene, model, files, tmp_path) -> None:
    write_image(tmp_path / "small.png", np.zeros((10, 10, 3), np.uint8))
    write_image(tmp_path / "black.png", np.zeros((64, 96), np.uint8))
    np.save(tmp_path / "small.npy", np.ones((10, 10), np.float32))
    outside = np.ones((64, 96), np.float32)
    outside[10:50, 20:80] = np.nan
    np.save(tmp_path / "none.npy", outside)
    for wrong, options in {
        "frames 0 to 4": {"reference": 9},
        "small.png: is 10×10": {"edited": tmp_path / "small.png"},
        "absent.png: no such image": {"region": tmp_path / "absent.png"},
        "no pixel is white": {"region": tmp_path / "black.png"},
        "small.npy: depth map is 10×10": {"edited_depth": tmp_path / "small.npy"},
        "no edited pixel has depth": {"edited_depth": tmp_path / "none.npy"},
        "at least 1, got 0": {"views": 0},
    }.items():
        with pytest.raises(InputError, match=wrong):
            edit(scene, **{"reference": REFERENCE, "checkpoint": "unused", **files, **options})


def test_command_line(scene, model, files, tmp_path) -> None:
    arguments = ["edit", "--input", scene, "--reference", REFERENCE, "--checkpoint", "unused",
                 "--edited", files["edited"], "--region", files["region"], "--views", 2,
                 "--output", tmp_path / "out"]  # fmt: skip
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.exception
    assert "2 edited views" in result.output
    reopened = load_scene(tmp_path / "out")
    assert len(reopened) == 3 and (tmp_path / "out/report.html").is_file()
