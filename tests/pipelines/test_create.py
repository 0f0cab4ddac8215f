"""`see3d create` end to end on a small ray-traced scene with random weights: plumbing only."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import plyfile
import pytest
import skimage.data
from click.testing import CliRunner
from conftest import synthetic_scene
from weight_fixtures import random_run

from see3d_jax import cli
from see3d_jax.errors import InputError, WorkError
from see3d_jax.files import write_json
from see3d_jax.geometry.colmap_files import read_colmap
from see3d_jax.media import write_image
from see3d_jax.pipelines import create as module
from see3d_jax.pipelines import create_plan
from see3d_jax.pipelines.create import create
from see3d_jax.pipelines.inputs import load_scene
from see3d_jax.pipelines.stages import Stages, digest
from see3d_jax.splatting.formats import read_ply

TINY = create_plan.Preset(views=3, views_per_round=None, side=32, steps=4, gaussians=200)


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> Path:
    return synthetic_scene(tmp_path_factory.mktemp("synthetic"), 3, 48, 48, supersample=1)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return random_run(tmp_path_factory.mktemp("run") / "tiny", **{"model.channel_mult": (1,)})


@pytest.fixture(scope="module")
def patched():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(module.PRESETS, "draft", TINY)
        patch.setattr(module, "FIT_SIDE", 48)
        yield patch


@pytest.fixture(scope="module")
def created(scene, run, patched, tmp_path_factory):
    plans = []
    output = tmp_path_factory.mktemp("created") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "reconstruct", _fails)
        with pytest.raises(WorkError):  # stopped in its last stage …
            create([scene], output, preset="draft", checkpoint=run, announce=plans.append)
    lines = []
    made = create([scene], output, preset="draft", checkpoint=run, report=lines.append)
    assert [line for line in lines if "already done" in line] == [
        line for line in lines if line.split(":")[0] in ("scene", "views")
    ]  # … the stages before it are not done again
    return made, plans[0]


def _fails(*arguments, **options):
    raise WorkError("the power went out")


def test_every_promised_file_is_there_and_opens(created, scene) -> None:
    made, _ = created
    count = read_ply(made.gaussians).count
    assert count == len(plyfile.PlyData.read(made.gaussians)["vertex"]) > 0
    assert made.video.read_bytes()[4:8] == b"ftyp"
    views = load_scene(made.output / "views")
    assert len(views) == TINY.views + 3 and views.depth_paths is not None
    assert len(read_colmap(made.output / "views/sparse/0").cameras) == len(views)
    text = made.report.read_text()
    assert 'id="see3d-splats"' in text and 'src="http' not in text and "scene.splat" not in text
    record = json.loads((made.output / "create.json").read_text())
    assert record["seconds"].keys() == {"scene", "views", "gaussians"}
    given = load_scene(scene)
    kept = load_scene(made.output / "scene")
    np.testing.assert_allclose(
        np.stack([c.world_to_camera for c in kept.cameras]),
        np.stack([c.world_to_camera for c in given.cameras]), atol=1e-5,
    )  # fmt: skip


def test_the_plan_names_every_stage_and_what_is_missing(created) -> None:
    _, plan = created
    assert [step.name for step in plan.steps] == ["scene", "views", "gaussians"]
    assert 1 < plan.seconds < 3600 and 0.5 < plan.memory < 8
    text = plan.text()
    assert "about" in text and "GB of memory" in text
    assert "depth network" in text and "--depth MODEL.onnx" in text


def test_a_finished_run_repeats_nothing_and_a_change_repeats_what_depends_on_it(
    created, scene, run, monkeypatch
) -> None:
    made, _ = created
    called = []
    for name in ("_make_scene", "_make_views", "reconstruct"):
        monkeypatch.setattr(module, name, lambda *a, name=name, **k: called.append(name))
    again = create([scene], made.output, preset="draft", checkpoint=run)
    assert not called and again.seconds == made.seconds
    stages = Stages(made.output)
    stages.run(
        "scene", {"other": "photos"}, lambda target: called.append("scene") or target.mkdir()
    )
    assert called == ["scene"]
    stages.run("views", {}, lambda target: called.append("views") or target.mkdir())
    assert called == ["scene", "views"]  # its own key may be the same: what it builds on is not


def test_a_checkpoint_that_was_trained_on_is_another_model(run, tmp_path) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(run, workdir)
    before = create_plan.read_network(workdir, 1, None).weights
    newer = before.with_name(str(int(before.name) + 1))
    shutil.copytree(before, newer, copy_function=shutil.copy)  # with times of its own
    after = create_plan.read_network(workdir, 1, None).weights
    assert digest(before) == digest(before) != digest(after)


@pytest.fixture
def photo(tmp_path) -> Path:
    path = tmp_path / "photo.jpg"
    write_image(path, skimage.data.astronaut()[:64, :96])
    return path


def test_plan_of_one_photo_from_the_command_line(photo, run, tmp_path) -> None:
    np.save(tmp_path / "depth.npy", np.full((64, 96), 2.0, np.float32))
    arguments = ["create", str(photo), "--depth", str(tmp_path / "depth.npy"), "--checkpoint",
                 str(run), "--output", str(tmp_path / "out"), "--plan", "--json"]  # fmt: skip
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert [step["name"] for step in plan["steps"]] == ["scene", "views", "gaussians"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"photo\.jpg: one photo alone shows no depth; add --depth"),
        ({"depth": "none.npy"}, r"none\.npy: no such depth file"),
        ({"depth_kind": "metric"}, "--depth-kind says what a depth model outputs"),
        ({"preset": "ultra"}, "--preset ultra: expected one of"),
        ({"views": 1}, "--views must be at least 3"),
        ({"trajectory": "swirl", "depth": "photo.jpg"}, "--trajectory swirl: neither one of"),
    ],
)
def test_what_is_wrong_is_said_before_any_work(photo, run, tmp_path, options, message) -> None:
    if options.get("depth") == "photo.jpg":
        options = {**options, "depth": photo}
    with pytest.raises(InputError, match=message):
        create([photo], tmp_path / "out", checkpoint=run, **options)
    assert not (tmp_path / "out").exists()


def test_several_photos_take_no_depth_map_and_no_folder_between_them(photo, run, tmp_path) -> None:
    with pytest.raises(InputError, match="is a folder; give one folder alone"):
        create([photo, tmp_path], tmp_path / "out", checkpoint=run)
    np.save(tmp_path / "depth.npy", np.ones((4, 4)))
    with pytest.raises(InputError, match="a depth map is of one photo; for 2 photos"):
        create([photo, photo], tmp_path / "out", checkpoint=run, depth=tmp_path / "depth.npy")


def test_a_folder_of_others_is_refused(photo, run, tmp_path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").touch()
    np.save(tmp_path / "depth.npy", np.ones((64, 96)))
    with pytest.raises(InputError, match="not empty and not a result"):
        create([photo], tmp_path / "out", checkpoint=run, depth=tmp_path / "depth.npy")


def test_stages_of_a_killed_run_are_done_again(tmp_path) -> None:
    def dies(target: Path) -> None:
        target.mkdir()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Stages(tmp_path / "out").run("a", {"x": 1}, dies)
    done = []
    stages = Stages(tmp_path / "out")
    stages.run("a", {"x": 1}, lambda target: done.append(write_json(target / "b.json", 1)))
    assert done and stages.repeated == ["a"]


@pytest.mark.slow
def test_three_real_photos_without_cameras(shared, run, tmp_path) -> None:
    photos = sorted((shared / "data/posed/sceaux_castle/images").glob("*.jpg"))[:5:2]
    command = [
        sys.executable,
        "-m",
        "see3d_jax.cli",
        "create",
        *map(str, photos),
        "--preset",
        "draft",
        "--checkpoint",
        str(run),
        "--output",
        str(tmp_path / "out"),
        "--json",
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    values = json.loads(result.stdout)
    assert Path(values["report"]).stat().st_size > 200_000
    known = json.loads((tmp_path / "out/views/run.json").read_text())["known_share"]
    assert known > 0.25  # stereo found the castle
