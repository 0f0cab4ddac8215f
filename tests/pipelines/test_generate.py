"""Generation end to end on a small ray-traced scene with exact depth, and everything around it.

The model here has random weights (no checkpoint needed): what is tested is that warps, masks,
cameras, scores and files are right, which does not depend on how good the model is.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import skimage.data
from click.testing import CliRunner
from conftest import synthetic_scene
from hypothesis import given
from hypothesis import strategies as st

from see3d_jax import cli
from see3d_jax.diffusion.sampler import SamplerConfig
from see3d_jax.diffusion.schedule import make_schedule
from see3d_jax.errors import InputError
from see3d_jax.geometry.cameras import Camera, intrinsics_matrix, look_at, stack
from see3d_jax.geometry.colmap_files import read_colmap
from see3d_jax.media import read_image, write_image
from see3d_jax.models.codec import build_codec
from see3d_jax.models.unet import UNetConfig
from see3d_jax.models.weights import init_unet
from see3d_jax.pipelines import generation as module
from see3d_jax.pipelines import superres
from see3d_jax.pipelines.baselines import inpaint, nearest_reference, score
from see3d_jax.pipelines.export import check_output_folder, write_generated
from see3d_jax.pipelines.generation import generate, working_size
from see3d_jax.pipelines.group_sampling import group_targets, sample_groups
from see3d_jax.pipelines.inputs import load_depth, load_images, load_scene
from see3d_jax.pipelines.pretrained import See3DModel

FRAMES = 7


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> Path:
    """A textured room, seen by seven cameras in 3:2 format, with exact depth."""
    return synthetic_scene(tmp_path_factory.mktemp("synthetic"), FRAMES, 96, 64)


@pytest.fixture(scope="module")
def random_model() -> See3DModel:
    unet = UNetConfig(
        in_channels=25, out_channels=12, model_channels=16, channel_mult=(1, 2), num_res_blocks=1,
        attention_strides=(2,), head_dim=16, context_dim=4, norm_groups=8,
    )  # fmt: skip
    return See3DModel(
        name="random", sampling=SamplerConfig(guidance=0.0), unet=unet, params=init_unet(unet, 0),
        codec=build_codec({"kind": "dct", "factor": 4, "channels": 12}),
        schedule=make_schedule("linear", zero_snr=True, prediction="v"), image_size=40, views=4,
    )  # fmt: skip


@pytest.fixture
def model(random_model, monkeypatch) -> See3DModel:
    monkeypatch.setattr(module, "load_model", lambda folder, **options: random_model)
    return random_model


def run(scene: Path, **options):
    defaults = {"trajectory": str(scene / "transforms.json"), "checkpoint": "unused", "steps": 2}
    return generate(scene, **{**defaults, **options})


@pytest.mark.parametrize("preconditioning", ["none", "gaussian", "filled"])
def test_a_model_with_a_head_start_is_sampled_with_it(random_model, preconditioning) -> None:
    """The network is silent: only the head start can tell what the known half looks like."""
    photo = cv2.resize(skimage.data.astronaut(), (40, 40), interpolation=cv2.INTER_AREA)
    masks = np.zeros((1, 40, 40), bool)
    masks[:, 20:] = True
    silent = dataclasses.replace(random_model, preconditioning=preconditioning)
    silent = silent.sampled_with(steps=4, guidance=0.0)
    warps = np.where(masks[..., None], photo, 0)
    made = sample_groups(silent, photo[None], warps, masks, seed=0)
    error = np.abs(made[0].astype(float) - photo)[24:].mean()  # not beside the hole
    assert error > 40 if preconditioning == "none" else error < 20


def test_result_folder_holds_what_it_promises_and_opens_as_a_scene(scene, model, tmp_path) -> None:
    result = run(scene, composite=True)
    n, h, w = result.masks.shape
    assert (n, h, w) == (FRAMES - 1, 32, 48)  # 3:2 kept, area near 40², multiples of 8
    out = write_generated(result, tmp_path / "out")
    for name in ("views", "generated", "composited", "warps", "masks", "inpainted"):
        assert len(list((out / name).glob("*.png"))) == n
    assert {p.name for p in out.iterdir() if p.is_file()} == {
        "cameras.png", "contact_sheet.png", "metrics.json", "report.html", "run.json",
        "splits.json", "transforms.json", "video.mp4",
    }  # fmt: skip
    report = (out / "report.html").read_text()
    known = result.metrics["methods"]["raw_warp"]["known"]["psnr"]
    assert str(known) in report and "data:image" in report
    reopened = load_scene(out)
    images, cameras = load_images(reopened)
    assert len(images) == n + 1
    np.testing.assert_allclose(
        np.stack([c.world_to_camera for c in cameras[:n]]),
        result.cameras.world_to_camera,
        atol=1e-5,
    )
    np.testing.assert_array_equal(images[0], result.views[0])
    colmap = read_colmap(out / "sparse" / "0")
    theirs = dict(zip(colmap.files, colmap.cameras, strict=True))
    for file, mine in zip(reopened.image_paths, reopened.cameras, strict=True):
        other = theirs.pop(str(file.relative_to(out)))
        np.testing.assert_allclose(other.world_to_camera, mine.world_to_camera, atol=1e-5)
        np.testing.assert_allclose(other.intrinsics, mine.intrinsics, rtol=1e-5)
    assert not theirs
    # Never a photograph among the held-out views, and never nothing.
    assert all(i < n for i in reopened.splits["test"]) and reopened.splits["test"]
    # The final views are the warp where it is known, and the model's pixels elsewhere.
    known = result.masks
    np.testing.assert_array_equal(result.views[known], result.warps[known])
    np.testing.assert_array_equal(result.views[~known], result.generated[~known])
    run_file = json.loads((out / "run.json").read_text())
    assert run_file["composite"] is True and run_file["seed"] == 0 and run_file["num_views"] == n


def test_known_pixels_of_the_warp_show_the_truth(scene, model) -> None:
    result = run(scene)
    scores = result.metrics["methods"]
    # Exact depth: known pixels are the true ones up to resampling; the model's are not (untrained).
    assert scores["raw_warp"]["known"]["psnr"] > 30
    assert scores["raw_warp"]["known"]["psnr"] > scores["nearest_reference"]["known"]["psnr"] + 3
    for filled in ("generated_composited", "inpainted_warp"):
        assert scores[filled]["known"]["psnr"] == scores["raw_warp"]["known"]["psnr"]
    assert 0.02 < result.metrics["hole_share"] < 0.9
    np.testing.assert_array_equal(result.views, result.composited)  # its codec loses details
    np.testing.assert_array_equal(run(scene, composite=False).views, result.generated)
    assert not np.any(result.warps[~result.masks])  # holes are black, as in training


def test_more_references_leave_fewer_holes(scene, model) -> None:
    one = run(scene, references=(0,), views=3)
    two = run(scene, references=(0, "00006"), views=3)
    assert two.reference_names == ("00000", "00006") and len(two.references) == 2
    assert two.metrics["hole_share"] < one.metrics["hole_share"]
    assert two.metrics["methods"]["raw_warp"]["known"]["psnr"] > 30


def test_posed_photos_without_depth_get_it_from_stereo(scene, model, tmp_path) -> None:
    posed = shutil.copytree(scene, tmp_path / "posed")
    content = json.loads((posed / "transforms.json").read_text())
    for frame in content["frames"]:
        del frame["depth_file_path"]
    (posed / "transforms.json").write_text(json.dumps(content))
    result = run(posed, trajectory=str(posed / "transforms.json"), references=(1, 2, 3))
    assert result.run["depth_from"] == "stereo"
    true_depth = np.stack([load_depth(load_scene(scene), i) for i in (1, 2, 3)])
    true_depth = true_depth[:, 1::2, 1::2]  # the working size is half
    known = (result.reference_depths > 0) & (true_depth > 0)
    assert known.mean() > 0.3
    assert np.median(np.abs(result.reference_depths / true_depth - 1)[known]) < 0.05
    scores = result.metrics["methods"]
    assert scores["raw_warp"]["known"]["psnr"] > scores["nearest_reference"]["known"]["psnr"]
    with pytest.raises(InputError, match="two or more --reference"):
        run(posed, trajectory="orbit", references=(1,))


def test_same_seed_same_bits_and_another_seed_another_view(scene, model) -> None:
    first, again, other = (run(scene, views=3, seed=s) for s in (3, 3, 4))
    np.testing.assert_array_equal(first.views, again.views)
    assert np.any(first.views != other.views)
    np.testing.assert_array_equal(first.warps, other.warps)


@pytest.mark.parametrize("trajectory", ["orbit", "forward"])
def test_one_photo_with_a_depth_file(scene, model, tmp_path, trajectory) -> None:
    depth = np.full((64, 96), 3.0, np.float32)
    depth[:, 40:60] = 2.0
    depth[:5] = np.nan  # unknown sky
    np.save(tmp_path / "depth.npy", depth)
    result = generate(
        scene / "images/00000.png", depth=tmp_path / "depth.npy", trajectory=trajectory,
        checkpoint="unused", views=3, steps=2, fov=60,
    )  # fmt: skip
    assert result.views.shape == (3, 32, 48, 3) and result.metrics is None
    focal = np.asarray(result.reference_cameras.intrinsics)[0, 0, 0]
    assert math.isclose(2 * math.degrees(math.atan(24 / focal)), 60, abs_tol=1e-3)
    assert 0.3 < result.masks.mean() < 1


def test_a_photo_of_the_trajectory_file_takes_its_camera_and_is_scored(scene, model) -> None:
    photo = generate(
        scene / "images/00000.png", depth=scene / "depth/00000.png",
        trajectory=str(scene / "transforms.json"), checkpoint="unused", steps=2,
    )  # fmt: skip
    folder = run(scene)
    np.testing.assert_array_equal(photo.warps, folder.warps)
    assert photo.metrics == folder.metrics


def test_truth_of_another_folder(scene, model, tmp_path) -> None:
    cameras = tmp_path / "path.json"
    shutil.copy(scene / "transforms.json", cameras)  # cameras only: no images beside it
    without = run(scene, trajectory=str(cameras), views=3)
    assert without.metrics is None
    scored = run(scene, trajectory=str(cameras), views=3, truth=scene)
    assert scored.metrics["num_views"] == 3
    content = json.loads(cameras.read_text())
    for frame in content["frames"]:
        frame["transform_matrix"][0][3] += 5.0
    cameras.write_text(json.dumps(content))
    with pytest.raises(InputError, match="no image with the pose"):
        run(scene, trajectory=str(cameras), views=3, truth=scene)


def test_bad_input_is_named(scene, model, tmp_path) -> None:
    photo = scene / "images/00000.png"
    np.save(tmp_path / "small.npy", np.ones((10, 10), np.float32))
    np.save(tmp_path / "nan.npy", np.full((64, 96), np.nan, np.float32))
    for wrong, options in {
        "at least 1, got 0": {"views": 0},
        "--steps": {"steps": 0},
        "--fov": {"fov": 200.0},
        "--size": {"size": 3},
        "--guidance": {"guidance": float("nan")},
        "frames 0 to 6": {"references": ("99",)},
        "neither one of orbit": {"trajectory": "zigzag"},
        "only one --reference": {"references": (0, 1), "depth": tmp_path / "small.npy"},
        "10×10": {"depth": tmp_path / "small.npy"},
        "no pixel has": {"depth": tmp_path / "nan.npy"},
        "no such depth": {"depth": tmp_path / "absent.npy"},
    }.items():
        with pytest.raises(InputError, match=wrong):
            run(scene, **options)
    with pytest.raises(InputError, match="--depth"):
        generate(photo, trajectory="orbit", checkpoint="unused")
    broken = tmp_path / "broken.json"
    broken.write_text('{"frames": [')
    with pytest.raises(InputError, match=r"broken\.json"):
        run(scene, trajectory=str(broken))
    tall = json.loads((scene / "transforms.json").read_text())
    tall |= {"w": 64, "h": 96}
    for frame in tall["frames"]:
        frame |= {"w": 64, "h": 96}
    broken.write_text(json.dumps(tall))
    with pytest.raises(InputError, match="aspect"):
        run(scene, trajectory=str(broken))


def test_command_line_without_a_checkpoint_is_one_line_and_writes_nothing(scene, tmp_path) -> None:
    arguments = ["generate", "--input", scene, "--trajectory", "orbit", "--checkpoint",
                 tmp_path / "nothing", "--output", tmp_path / "out"]  # fmt: skip
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments])
    assert isinstance(result.exception, InputError) and "nothing" in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_command_line_writes_and_replaces_its_own_result(scene, model, tmp_path) -> None:
    arguments = ["generate", "--input", scene, "--trajectory", scene, "--checkpoint", "unused",
                 "--output", tmp_path / "out", "--views", 3, "--steps", 2]  # fmt: skip
    for _ in range(2):
        result = CliRunner().invoke(cli.app, [str(a) for a in arguments])
        assert result.exit_code == 0, result.exception
    assert "raw warp" in result.output
    assert [p.name for p in tmp_path.iterdir()] == ["out"]  # no temporary folder is left


def test_a_failure_while_writing_keeps_the_old_result(scene, model, tmp_path, monkeypatch) -> None:
    from see3d_jax.pipelines import export

    result = run(scene, views=3)
    out = write_generated(result, tmp_path / "out")
    before = sorted(p.relative_to(out) for p in out.rglob("*"))

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "write_mp4", full)
    with pytest.raises(OSError):
        write_generated(result, out)
    assert sorted(p.relative_to(out) for p in out.rglob("*")) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_paths_through_references_and_through_keyframes(scene, model, tmp_path) -> None:
    through = run(scene, trajectory="interpolate", references=(0, 6), views=3)
    assert [loaded.shape[0] for loaded in (through.views, through.references)] == [3, 2]
    ends = np.asarray(through.cameras.world_to_camera)[[0, 2]]
    np.testing.assert_allclose(ends, through.reference_cameras.world_to_camera, atol=1e-5)
    assert through.masks[[0, 2]].mean() > 0.7  # on the photos: all but edges is known
    with pytest.raises(InputError, match="two or more --reference"):
        run(scene, trajectory="interpolate")
    keys = tmp_path / "keys.csv"
    keys.write_text("x,y,z,qw,qx,qy,qz\n0,0,0,1,0,0,0\n0.2,0,0,1,0,0,0\n")
    spline = run(scene, trajectory=str(keys), views=5)
    centres = np.linalg.inv(np.asarray(spline.cameras.world_to_camera))[:, :3, 3]
    np.testing.assert_allclose(centres[:, 0], [0, 0.05, 0.1, 0.15, 0.2], atol=1e-6)


def test_odd_paths_and_depths_are_named_in_the_report(scene, model, tmp_path) -> None:
    depth = load_depth(load_scene(scene), 0)
    depth[:16] = np.nan
    np.save(tmp_path / "depth.npy", depth)
    path = tmp_path / "path.csv"
    far = float(np.nanmax(depth)) * 1.5  # through the wall that the photo shows
    rows = [f"0,0,{z},1,0,0,0" for z in (0.0, far, far)] + ["0,0,0,0,0,1,0"]  # ..., and around
    path.write_text("x,y,z,qw,qx,qy,qz\n" + "\n".join(rows) + "\n")
    result = generate(
        scene / "images/00000.png", depth=tmp_path / "depth.npy", trajectory=str(path),
        checkpoint="unused", steps=1,
    )  # fmt: skip
    unknown, wall, hole = result.run["warnings"]
    assert "25% of its pixels have no depth" in unknown and "reference 00000" in unknown
    assert wall.startswith("views 1-2: the camera stands behind a surface")
    assert hole.startswith("views 1-3: nothing that is given")
    report = (write_generated(result, tmp_path / "out") / "report.html").read_text()
    assert all(part in report for part in ("25% of its pixels", "through a wall", "all hole"))
    assert run(scene, views=2, steps=1).run["warnings"] == []


def test_views_are_enlarged_into_a_scene_of_their_own(scene, model, tmp_path, monkeypatch) -> None:
    large = dataclasses.replace(model, sampling=SamplerConfig(guidance=0.0, weight_form="clean"))
    monkeypatch.setattr(superres, "load_model", lambda folder, **options: large)
    result = run(scene, views=3, sr="unused", steps=1)
    assert result.enlarged.shape == (3, 64, 96, 3) and result.run["sr"] == "unused"
    reopened = load_scene(write_generated(result, tmp_path / "out") / "enlarged")
    images, cameras = load_images(reopened)
    np.testing.assert_array_equal(images[2], result.enlarged[2])
    np.testing.assert_allclose(
        cameras[2].intrinsics, result.cameras[2].resized(96, 64).intrinsics, rtol=1e-5
    )


def test_output_folders_of_others_are_refused(tmp_path) -> None:
    check_output_folder(tmp_path / "new")
    check_output_folder(tmp_path)  # empty
    (tmp_path / "run.json").write_text('{"command": "something else"}')
    with pytest.raises(InputError, match="not empty"):
        check_output_folder(tmp_path)
    with pytest.raises(InputError, match="is a file"):
        check_output_folder(tmp_path / "run.json")


@given(st.integers(1, 60), st.integers(1, 20))
def test_groups_cover_every_target_in_one_size(targets: int, per_group: int) -> None:
    groups = group_targets(targets, per_group)
    assert {len(group) for group in groups} == {min(targets, per_group)}
    assert sorted({i for group in groups for i in group}) == list(range(targets))
    assert len(groups) == math.ceil(targets / min(targets, per_group))


@given(st.integers(64, 4000), st.integers(64, 4000), st.sampled_from([64, 128, 512]))
def test_working_size_keeps_area_and_aspect(width: int, height: int, side: int) -> None:
    w, h = working_size(width, height, side, 16)
    assert w % 16 == 0 and h % 16 == 0
    if 1 / 3 < width / height < 3:  # snapping to multiples costs less than half a multiple each
        assert abs(math.log(w / h * height / width)) < math.log(1 + 16 / side) * 2.2
        assert 0.5 < w * h / side**2 < 2


def test_score_tells_regions_apart() -> None:
    truth = np.random.default_rng(0).integers(0, 255, (2, 32, 32, 3), np.uint8)
    masks = np.zeros((2, 32, 32), bool)
    masks[0, :, :16] = True  # the second view has no known pixel
    wrong = truth.copy()
    wrong[:, :, 16:] = 255 - wrong[:, :, 16:]
    regions = score(truth, masks, {"half": wrong, "perfect": truth})["methods"]
    assert regions["half"]["known"]["psnr"] == 100.0 and regions["half"]["hole"]["psnr"] < 20
    assert regions["perfect"]["all"] == {"psnr": 100.0, "ssim": 1.0}
    everything = score(truth[:1], np.ones((1, 32, 32), bool), {"half": wrong[:1]})
    assert everything["methods"]["half"]["hole"] == {"psnr": None, "ssim": None}
    json.dumps(everything, allow_nan=False)


def test_nearest_reference_looks_the_same_way() -> None:
    k = intrinsics_matrix(30, 30, 16, 16)
    cameras = [
        Camera(k, look_at(eye, (0, 0, 0)), 32, 32)
        for eye in ((0, 0, -3), (3, 0, 0), (0.5, 0, -3), (3, 0, 0.4))
    ]
    found = nearest_reference(stack(cameras[2:]), stack(cameras[:2]))
    np.testing.assert_array_equal(found, [0, 1])


def test_inpainting_keeps_what_is_known_and_survives_an_empty_warp() -> None:
    warp = np.random.default_rng(0).integers(1, 255, (24, 24, 3), np.uint8)
    mask = np.ones((24, 24), bool)
    mask[8:12, 8:12] = False
    filled = inpaint(np.where(mask[..., None], warp, 0).astype(np.uint8), mask)
    np.testing.assert_array_equal(filled[mask], warp[mask])
    assert filled[~mask].min() > 0
    assert inpaint(np.zeros_like(warp), np.zeros_like(mask)).std() == 0


def test_real_photos_with_exact_depth(shared, model) -> None:
    room = shared / "data" / "rendered" / "room"
    result = run(room, references=("012",), views=3)
    assert result.views.shape == (3, 32, 48, 3)
    scores = result.metrics["methods"]
    # Cameras up to 100 degrees away, a tenth of the photos' size: lower than for the small scene.
    assert scores["raw_warp"]["known"]["psnr"] > 25, scores
    assert scores["raw_warp"]["known"]["psnr"] > scores["nearest_reference"]["known"]["psnr"] + 5


def test_references_must_not_be_changed_by_writing(scene, model, tmp_path) -> None:
    result = run(scene, views=3)
    out = write_generated(dataclasses.replace(result, truth=None, metrics=None), tmp_path / "o")
    np.testing.assert_array_equal(read_image(out / "references/00000.png"), result.references[0])
    assert not (out / "metrics.json").exists()
    write_image(out / "views/00000.png", result.views[0])


def test_rounds_build_on_each_other_and_go_on_after_a_kill(
    scene, model, tmp_path, monkeypatch
) -> None:
    class Killed(BaseException):
        pass

    def dies_in_the_second_round(*arguments):
        if arguments[-1] > 0:
            raise Killed
        return sample(*arguments)

    sample, out = module.sample_groups, tmp_path / "out"
    arguments = ["generate", "--input", scene, "--trajectory", scene, "--checkpoint", "unused",
                 "--output", out, "--views-per-round", 3, "--steps", 1]  # fmt: skip
    arguments = [str(a) for a in arguments]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(module, "sample_groups", dies_in_the_second_round)
        CliRunner().invoke(cli.app, arguments)
    assert [p.name for p in out.rglob("*") if p.is_file()] == ["00000.npz"]
    calls = []
    monkeypatch.setattr(
        module, "sample_groups", lambda *args: calls.append(args[-1]) or sample(*args)
    )
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.exception
    assert len(calls) == 1 and calls[0] > 0  # the first round was not made again
    rounds = json.loads((out / "run.json").read_text())["rounds"]
    assert [done["views"] for done in rounds] == [[0, 1, 2], [3, 4, 5]]
    assert not (out / "rounds").exists()
    (out / "run.json").unlink()
    with pytest.raises(InputError, match="not empty"):
        check_output_folder(out)
