"""`see3d info`: what it says of each kind of file and folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from click.testing import CliRunner
from weight_fixtures import random_run, see3d_release

from see3d_jax import cli
from see3d_jax.errors import InputError
from see3d_jax.geometry.cameras import Camera, intrinsics_matrix
from see3d_jax.geometry.scene_files import PosedImages, write_transforms
from see3d_jax.info import explain
from see3d_jax.media import write_image
from see3d_jax.splatting.formats import write_ply, write_splat
from see3d_jax.splatting.gaussians import from_points
from tools import convert_see3d, export_tiny


def test_a_training_run_and_what_is_packed_of_it(tmp_path: Path) -> None:
    run = random_run(tmp_path / "run", step=40)
    (run / "metrics.jsonl").write_text('{"step": 40, "loss": 0.25, "heldout_psnr": 17.5}\n{"to')
    facts = explain(run)
    assert facts.kind == "training run" and facts.rows["checkpoints"] == [40]
    assert facts.rows["loss"] == 0.25 and facts.rows["heldout psnr"] == 17.5
    assert facts.rows["trained on"] == "/somewhere/clips"
    assert any(f"--checkpoint {run}" in command for command in facts.next)
    arguments = ["--workdir", str(run), "--output", str(tmp_path / "packed")]
    assert CliRunner().invoke(export_tiny.app, arguments).exit_code == 0
    packed = explain(tmp_path / "packed")
    assert packed.kind == "packed model" and packed.rows["steps"] == 40
    assert packed.rows["parameters"] == facts.rows["parameters"] > 1000
    shutil.rmtree(run / "checkpoints")
    assert "none is complete" in explain(run).rows["checkpoints"]


def test_released_weights(tmp_path: Path) -> None:
    see3d_release(tmp_path / "published")
    arguments = ["--input", str(tmp_path / "published"), "--output", str(tmp_path / "weights")]
    assert CliRunner().invoke(convert_see3d.app, arguments).exit_code == 0
    facts = explain(tmp_path / "weights")
    assert facts.kind == "weights" and {"single", "sparse"} <= set(facts.rows["UNets"])
    assert "parameters" in facts.rows["vae"]


def test_record_shards_as_a_folder_and_alone(clip_folder: Path, tmp_path: Path) -> None:
    facts = explain(clip_folder)
    assert (facts.kind, facts.rows["clips"], facts.rows["shards"]) == ("records", 6, 2)
    assert facts.rows["frames"] == "12 of 96×72 at 12 per s" and facts.rows["poses"] is False
    shard = sorted(clip_folder.glob("*.array_record"))[0]
    assert explain(shard).rows["clips"] == 3
    (tmp_path / "clips-00000-of-00001.array_record").write_bytes(b"no shard at all" * 9)
    with pytest.raises(InputError, match="no whole ArrayRecord file"):
        explain(tmp_path)


def test_gaussians_in_both_formats(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    points = rng.normal(size=(40, 3)), rng.uniform(size=(40, 3))
    scene = from_points(*points, 50, 1)
    write_ply(tmp_path / "a.ply", scene)
    write_splat(tmp_path / "a.splat", scene)
    for name in ("a.ply", "a.splat"):
        facts = explain(tmp_path / name)
        assert facts.kind == "gaussians" and facts.rows["Gaussians"] == 40
        assert max(facts.rows["extent"]) == pytest.approx(4, abs=2)
    assert "degree 1" in explain(tmp_path / "a.ply").rows["colour"]
    (tmp_path / "b.ply").write_text("ply\nformat ascii 1.0\nelement vertex 7\nend_header\n")
    assert "point cloud of 7 points" in explain(tmp_path / "b.ply").title


def test_scenes_cameras_and_results(tmp_path: Path) -> None:
    camera = Camera(intrinsics_matrix(64, 64, 64, 48), np.eye(4, dtype=np.float32), 128, 96)
    for name in ("a.png", "b.png"):
        write_image(tmp_path / name, skimage.data.astronaut()[:96, :128])
    write_transforms(tmp_path / "transforms.json", PosedImages(("a.png", "b.png"), (camera,) * 2))
    facts = explain(tmp_path)
    assert (facts.rows["views"], facts.rows["depth maps"]) == (2, False)
    assert facts.rows["field of view"].startswith("90°")
    assert explain(tmp_path / "transforms.json").title == "cameras"
    made = tmp_path / "made"
    (made / "gaussians").mkdir(parents=True)
    (made / "gaussians/metrics.json").write_text(
        '{"command": "see3d reconstruct", "psnr": 20.5, "num_gaussians": 9, "per_view": []}'
    )
    content = {"command": "see3d create", "photos": ["a.png"], "preset": "draft", "views": 6,
               "seconds": {"views": 3.0}, "notes": []}  # fmt: skip
    (made / "create.json").write_text(json.dumps(content))
    assert explain(made).rows["held-out PSNR, dB"] == 20.5
    assert explain(made / "gaussians").kind == "reconstruction"
    (tmp_path / "views").mkdir()
    run = {"command": "see3d generate", "views": ["0", "1"], "width": 8, "height": 4, "steps": 25}
    (tmp_path / "views/run.json").write_text(json.dumps(run))
    assert explain(tmp_path / "views").rows["views"] == "2 of 8×4"


def test_text_for_people_json_for_programs_and_one_line_for_neither(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", np.zeros((4, 4, 3)))
    facts = explain(tmp_path / "a.png")
    assert facts.text().startswith(f"{tmp_path / 'a.png'}: a picture")
    result = CliRunner().invoke(cli.app, ["info", str(tmp_path / "a.png"), "--json"])
    assert json.loads(result.stdout) == facts.values()
    (tmp_path / "x.xyz").touch()
    for path, message in (("x.xyz", "not a result"), ("gone", "no such file or folder")):
        with pytest.raises(InputError, match=message):
            explain(tmp_path / path)
