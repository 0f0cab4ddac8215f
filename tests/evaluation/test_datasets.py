"""Each benchmark's own layout is read right: a drawn point is where its camera says it is."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import benchmark_layouts as made
import numpy as np
import pytest

from see3d_jax import cli_evaluate
from see3d_jax.errors import InputError
from see3d_jax.evaluation.benchmark.datasets import BENCHMARKS, choose_split, find_scenes
from see3d_jax.evaluation.benchmark.prepare import prepare, read_masks
from see3d_jax.geometry.cameras import project
from see3d_jax.media import read_image
from see3d_jax.pipelines.inputs import load_scene

# benchmark, how its folder is made (the folder of scenes is given)
LAYOUTS = {
    "llff": ("llff", lambda f: made.write_llff(f / "fern")),
    "dtu of smaller pictures": ("dtu", lambda f: made.write_dtu(f / "scan8")),
    "dtu": ("dtu", lambda f: made.write_dtu(f / "scan8", larger=1)),
    "mipnerf360": ("mipnerf360", lambda f: made.write_mipnerf360(f / "garden")),
    "realestate10k": ("realestate10k", lambda f: made.write_realestate(f)),
    "co3d isotropic": ("co3d", lambda f: made.write_co3d(f)),
    "co3d bounds": ("co3d", lambda f: made.write_co3d(f, "ndc_norm_image_bounds")),
    "co3d by default": ("co3d", lambda f: made.write_co3d(f, "default")),
    "tanks of mvsnet": ("tanks_and_temples", lambda f: made.write_mvsnet(f / "family")),
    "tanks of colmap": ("tanks_and_temples", lambda f: made.write_mipnerf360(f / "truck")),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_a_known_point_projects_to_where_it_is_drawn(case, tmp_path: Path) -> None:
    name, write = LAYOUTS[case]
    cameras = write(tmp_path)
    (entry,) = find_scenes(name, tmp_path)
    scene = entry.load()
    assert len(scene) == len(cameras) == 5
    for i, (path, camera) in enumerate(zip(scene.image_paths, scene.cameras, strict=True)):
        image = read_image(path)
        assert image.shape[:2] == (camera.height, camera.width)
        found, depth = project(camera, made.POINT[None].astype(np.float32))
        assert depth[0] > 0
        np.testing.assert_allclose(found[0], made.seen_at(image), atol=0.51)  # of drawing
        expected = cameras[i].resized(camera.width, camera.height)
        np.testing.assert_allclose(camera.world_to_camera, expected.world_to_camera, atol=2e-5)
        np.testing.assert_allclose(camera.intrinsics, expected.intrinsics, rtol=1e-4)


def test_a_scene_folder_itself_may_be_given(tmp_path: Path) -> None:
    made.write_llff(tmp_path / "fern")
    assert [entry.name for entry in find_scenes("llff", tmp_path / "fern")] == ["fern"]


def test_photos_are_read_at_the_smallest_size_that_is_enough(tmp_path, monkeypatch) -> None:
    made.write_llff(tmp_path / "fern")
    (entry,) = find_scenes("llff", tmp_path)
    monkeypatch.setattr("see3d_jax.evaluation.benchmark.layouts.ENOUGH_PIXELS", 32)
    assert {path.parent.name for path in entry.load().image_paths} == {"images_2"}
    monkeypatch.setattr("see3d_jax.evaluation.benchmark.layouts.ENOUGH_PIXELS", 33)
    assert {path.parent.name for path in entry.load().image_paths} == {"images"}


def test_dtu_has_the_views_and_masks_of_the_literature(tmp_path: Path) -> None:
    made.write_dtu(tmp_path / "scan8", count=49)
    (entry,) = find_scenes("dtu", tmp_path)
    scene = entry.load()
    split = choose_split(BENCHMARKS["dtu"], entry, scene, 3)
    assert split.given == (25, 22, 28) and len(split.test) == 25 and 1 in split.test
    assert not {3, 16, 39, 40, 0} & set(split.test)
    task = prepare(scene, split, tmp_path / "work", "stereo", False)
    masks = read_masks(task, 48, 32)
    assert masks.shape == (25, 32, 48) and masks[:, :, :24].all() and not masks[:, :, 24:].any()


def test_splits_come_from_reconfusion_files_before_any_rule(tmp_path: Path) -> None:
    made.write_llff(tmp_path / "data/fern")
    (entry,) = find_scenes("llff", tmp_path / "data")
    scene, benchmark = entry.load(), BENCHMARKS["llff"]
    by_rule = choose_split(benchmark, entry, scene, 3)
    assert by_rule.test == (0,) and len(by_rule.given) == 3 and "rule" in by_rule.source
    file = tmp_path / "splits/fern/train_test_split_2.json"
    file.parent.mkdir(parents=True)
    file.write_text('{"train_ids": [3, 1], "test_ids": [0, 1, 4]}')
    found = choose_split(benchmark, entry, scene, 2, tmp_path / "splits")
    assert found.given == (3, 1) and found.test == (0, 4) and found.source == str(file)
    for content, word in (
        ('{"train_ids": [3, 9], "test_ids": [0]}', "9"),
        ('{"train_ids": [3], "test_ids": [0]}', "gives 1"),
        ('{"train_ids": [3, 1]}', "test_ids"),
        ("no json", "train_ids"),
    ):
        file.write_text(content)
        with pytest.raises(InputError, match=word) as error:
            choose_split(benchmark, entry, scene, 2, tmp_path / "splits")
        assert str(file) in str(error.value)


def test_real_photos_use_their_own_splits(shared: Path) -> None:
    entries = {entry.name: entry for entry in find_scenes("folder", shared / "data/posed")}
    assert list(entries) == ["co3d_apple", "fox", "sceaux_castle"]
    fox = entries["fox"].load()
    splits = [choose_split(BENCHMARKS["folder"], entries["fox"], fox, n) for n in (1, 3)]
    assert [split.given for split in splits] == [(25,), (1, 25, 49)]
    assert splits[0].test == (0, 8, 16, 24, 32, 40, 48)


def test_a_folder_of_reconfusion_is_read_whatever_the_benchmark(tmp_path: Path) -> None:
    cameras = made.write_llff(tmp_path / "raw/fern")
    (entry,) = find_scenes("llff", tmp_path / "raw")
    scene = entry.load()
    split = choose_split(BENCHMARKS["llff"], entry, scene, 3)
    prepared = prepare(scene, split, tmp_path / "released", "stereo", False)
    reread = load_scene(prepared.given)
    assert len(reread) == 3 and find_scenes("dtu", prepared.given)[0].load().names == reread.names
    np.testing.assert_allclose(
        reread.cameras[0].world_to_camera, cameras[split.given[0]].world_to_camera, atol=1e-5
    )


BROKEN = {
    "poses_bounds.npy": ("llff", made.write_llff, lambda f: np.save(f, np.zeros((5, 16)))),
    "poses_bounds.npy of others": ("llff", made.write_llff, lambda f: np.save(f, np.ones((4, 17)))),
    "cameras.npz": ("dtu", made.write_dtu, lambda f: np.savez(f, world_mat_0=np.eye(4))),
    "cameras.npz cut off": ("dtu", made.write_dtu, lambda f: f.write_bytes(b"PK")),
    "cams/00000002_cam.txt": ("tanks_and_temples", made.write_mvsnet, Path.unlink),
    "cams/00000001_cam.txt": (
        "tanks_and_temples", made.write_mvsnet, lambda f: f.write_text("extrinsic\n1 2 3"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_named(case, tmp_path: Path) -> None:
    name, write, spoil = BROKEN[case]
    write(tmp_path / "scene")
    file = tmp_path / "scene" / case.split(" ")[0]
    spoil(file)
    (entry,) = find_scenes(name, tmp_path)
    with pytest.raises(InputError) as error:
        entry.load()
    assert str(file) in str(error.value)


def test_a_broken_clip_or_category_is_named(tmp_path: Path) -> None:
    made.write_realestate(tmp_path)
    file = tmp_path / "0f3a.txt"
    file.write_text(file.read_text().replace(" 0.000000000", "", 1))
    with pytest.raises(InputError, match="line 2"):
        find_scenes("realestate10k", tmp_path)[0].load()
    made.write_co3d(tmp_path / "co3d")
    file = tmp_path / "co3d/apple/frame_annotations.jgz"
    with gzip.open(file, "rt") as stream:
        frames = json.load(stream)
    del frames[0]["viewpoint"]["focal_length"]
    with gzip.open(file, "wt") as stream:
        json.dump(frames, stream)
    with pytest.raises(InputError, match="focal_length"):
        find_scenes("co3d", tmp_path / "co3d")[0].load()
    file.write_bytes(b"not gzip")
    with pytest.raises(InputError, match="frame_annotations"):
        find_scenes("co3d", tmp_path / "co3d")


def test_nothing_there_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no scene of DTU"):
        find_scenes("dtu", tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        find_scenes("dtu", tmp_path / "none")
    made.write_llff(tmp_path / "fern")
    with pytest.raises(InputError, match=r"--scene horns.*fern"):
        find_scenes("llff", tmp_path, ("horns",))


def test_the_command_knows_every_benchmark() -> None:
    assert set(cli_evaluate.BENCHMARK_NAMES) == set(BENCHMARKS)
