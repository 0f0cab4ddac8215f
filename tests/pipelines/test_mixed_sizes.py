"""Photos of different sizes, upright and lying, through depth, warp, generation and the fit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import synthetic_scene
from weight_fixtures import random_run

from see3d_jax.geometry.cameras import stack
from see3d_jax.geometry.scene_files import PosedImages, write_transforms
from see3d_jax.media import image_size, read_image, write_image
from see3d_jax.pipelines import create as module
from see3d_jax.pipelines.create import create
from see3d_jax.pipelines.create_plan import Preset
from see3d_jax.pipelines.depth import stereo
from see3d_jax.pipelines.generation import _reshaped
from see3d_jax.pipelines.inputs import load_depth, load_images, load_scene
from see3d_jax.pipelines.warps import View, middle_of, warp_references

WINDOWS = ((0, 0, 64, 48), (16, 0, 32, 48), (8, 6, 48, 36))  # left, top, width, height


@pytest.fixture(scope="module")
def views(tmp_path_factory) -> list[View]:
    """Three photos of a room with exact depth; the second is upright, the third smaller."""
    scene = load_scene(synthetic_scene(tmp_path_factory.mktemp("room"), 3, 64, 48, supersample=1))
    images, cameras = load_images(scene)
    return [
        View(
            images[i][top : top + height, left : left + width],
            load_depth(scene, i)[top : top + height, left : left + width],
            cameras[i].window(left, top, width, height),
        )
        for i, (left, top, width, height) in enumerate(WINDOWS)
    ]


def test_parts_of_a_photo_warp_as_the_whole_does(views) -> None:
    whole = views[0]
    parts = [
        View(whole.image[:, :40], whole.depth[:, :40], whole.camera.window(0, 0, 40, 48)),
        View(whole.image[10:, 30:], whole.depth[10:, 30:], whole.camera.window(30, 10, 34, 38)),
    ]
    target = stack([views[1].camera.window(-16, 0, 64, 48)])
    one, two = warp_references([whole], target), warp_references(parts, target)
    known = one[1] & two[1]
    assert known.mean() > 0.8 * one[1].mean() > 0.3
    np.testing.assert_allclose(two[2][known], one[2][known], rtol=1e-3)
    assert np.abs(two[0].astype(int) - one[0])[known].mean() < 1


def test_stereo_between_upright_and_lying_photos(views) -> None:
    found = stereo([view.image for view in views], [view.camera for view in views])
    assert len({depth.shape for depth in found}) == 1
    truth = warp_references([views[0]], stack([views[0].camera.resized(*found[0].shape[::-1])]))[2]
    known = (found[0] > 0) & (truth[0] > 0)
    assert known.mean() > 0.06  # little is confirmed in pictures this small
    assert np.median(np.abs(found[0] / np.maximum(truth[0], 1e-9) - 1)[known]) < 0.05


def test_the_middle_of_a_photo_is_a_photo_of_a_smaller_sensor(views) -> None:
    part = middle_of(views[1], (64, 48), 16, 12)  # the middle half of the upright photo
    assert part.image.shape == (12, 16, 3) and part.depth.shape == (12, 16)
    expected = views[1].camera.window(0, 12, 32, 24).resized(16, 12)
    np.testing.assert_allclose(part.camera.intrinsics, expected.intrinsics)
    whole = middle_of(views[0], (64, 48), 16, 16)
    np.testing.assert_allclose(whole.camera.intrinsics, views[0].camera.resized(16, 16).intrinsics)


def test_a_turned_phone_keeps_its_lens_on_the_path(views) -> None:
    camera = views[0].camera
    turned = camera.window(8, -8, 48, 64)
    focal = np.asarray(camera.intrinsics)[0, 0]
    path = _reshaped(turned, camera)
    assert (path.width, path.height) == (64, 48)
    np.testing.assert_allclose(path.intrinsics, camera.intrinsics, atol=1e-3 * focal)


@pytest.mark.slow
def test_a_scene_is_created_from_photos_of_three_sizes(views, tmp_path, monkeypatch) -> None:
    preset = Preset(views=3, views_per_round=None, side=48, steps=3, gaussians=200)
    monkeypatch.setitem(module.PRESETS, "draft", preset)
    given = tmp_path / "given"
    files = tuple(f"{i}.png" for i in range(3))
    for name, view in zip(files, views, strict=True):
        write_image(given / name, view.image)
        np.save(given / f"{name}.npy", view.depth)
    posed = PosedImages(
        files,
        tuple(view.camera for view in views),
        depth_files=tuple(f"{name}.npy" for name in files),
        depth_unit=1.0,
    )
    write_transforms(given / "transforms.json", posed)
    run = random_run(tmp_path / "run", **{"model.channel_mult": (1,)})
    made = create([given], tmp_path / "out", preset="draft", checkpoint=run)
    assert "differ in size (64×48, 32×48, 48×36)" in made.notes[0]
    assert "differ in size" in made.report.read_text()
    references = Path(made.output / "views/references")
    assert [image_size(references / name) for name in files] == [w[2:] for w in WINDOWS]
    np.testing.assert_array_equal(read_image(references / "1.png"), views[1].image)
    scene = load_scene(made.output / "views")
    for camera, view in zip(scene.cameras[3:], views, strict=True):
        np.testing.assert_allclose(camera.intrinsics, view.camera.intrinsics, atol=1e-3)
    aspects = {camera.width / camera.height for camera in scene.cameras[:3]}
    assert aspects == {scene.cameras[0].width / scene.cameras[0].height}
    fitted = json.loads((made.output / "gaussians/metrics.json").read_text())
    assert fitted["num_train_views"] == 5
