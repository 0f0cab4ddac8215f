"""The ablation studies: what is trained on what, scored how, and written where."""

import json
import subprocess
import sys

import numpy as np
import pytest

from benchmarks.evidence import clips, leak, report, runs, studies
from data_prep.synthetic import app as make_clips
from see3d_jax.data.records import decode_image, read_records
from see3d_jax.diffusion.schedule import make_schedule
from see3d_jax.diffusion.visual_condition import mixing_weight
from see3d_jax.errors import WorkError
from see3d_jax.models.codec import DctCodec
from see3d_jax.training.inputs import encode_batch


@pytest.fixture(scope="module")
def posed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("posed")
    make_clips(
        ["--output", str(folder), "--clips", "3", "--frames", "6", "--size", "32x32",
         "--supersample", "1", "--jobs", "1"],
        standalone_mode=False,
    )  # fmt: skip
    return folder


def budget(train, **changes):
    values = {"train": train, "pretraining_steps": 2, "steps": 1, "seeds": 2, "depth_noise": 0.02}
    return studies.Budget(**{**values, "overrides": {"batch_size": 2}, **changes})


@pytest.mark.parametrize("name", ["table3", "table6", "leakage"])
def test_variants_differ_in_one_thing_and_share_their_start(name, tmp_path):
    variants = studies.STUDIES[name](budget(tmp_path), tmp_path)
    starts = [run.init_from for variant in variants for run in variant.runs]
    assert starts == ["pretrained_0", "pretrained_1"] * len(variants)
    assert len({run.name for variant in variants for run in variant.runs}) == len(starts)
    for variant in variants:
        assert [run.overrides["seed"] for run in variant.runs] == [0, 1]
        assert all(run.overrides["num_steps"] == 1 for run in variant.runs)
    if name == "table6":
        shares = [dict((kind, w) for _, w, kind in v.runs[0].overrides.get("data.mixture", ()))
                  for v in variants]  # fmt: skip
        assert [share.get("posed", 0) for share in shares] == list(studies.POSED_SHARES)


def test_a_share_of_the_clips_and_spoiled_ones(posed, tmp_path):
    all_clips = list(read_records(posed / "records"))
    part = list(read_records(clips.subset(posed / "records", 0.67, tmp_path / "part")))
    assert [clip.clip_id for clip in part] == [clip.clip_id for clip in all_clips[:2]]
    mixed = list(read_records(clips.with_uncurated(posed / "records", tmp_path / "mixed")))
    assert len(mixed) == 6
    moving, still = mixed[3], mixed[4]
    frames = np.stack([decode_image(image) for image in still.images]).astype(float)
    assert frames.std(0).mean() < 4
    before = np.stack([decode_image(image) for image in all_clips[0].images]).astype(float)
    after = np.stack([decode_image(image) for image in moving.images]).astype(float)
    changed = (np.abs(after - before).max(-1) > 40).mean((1, 2))
    assert (changed > 0.02).all() and (changed < 0.3).all()


def test_a_run_that_was_told_to_stop_is_not_taken_for_a_finished_one(tmp_path, monkeypatch):
    done = subprocess.CompletedProcess([], 0)  # it saved, and ended without an error
    monkeypatch.setattr(runs.subprocess, "run", lambda *args, **kwargs: done)
    reached = [40]
    monkeypatch.setattr(runs.origins, "complete_steps", lambda workdir: reached)
    run = runs.Run("name", "configs/tiny.py", {"num_steps": 60})
    with pytest.raises(WorkError, match="stopped before its last step"):
        runs.train(run, tmp_path)
    reached.append(60)
    assert runs.train(run, tmp_path) == tmp_path / "name"
    assert (tmp_path / "name.done").is_file()


def test_a_perfect_answer_is_scored_as_one(posed):
    from configs import tiny

    config = tiny.get_config()
    config.data.image_size, config.data.stride, config.data.views = 32, (1, 1), 3
    batch = runs.test_batch(posed / "records", config, depth_noise=0.0)
    assert len(batch["image"]) == 2
    perfect = runs.score(batch, batch["image"], None)
    assert perfect["psnr_all"] == perfect["psnr_hole"] == 100
    assert perfect["ssim"] == pytest.approx(1)
    free = {name: runs.score(batch, x, None) for name, x in runs.baselines(batch).items()}
    black, filled = free["warp, holes black"], free["warp + Telea"]
    assert black["psnr_known"] == pytest.approx(filled["psnr_known"], abs=0.3)
    assert black["psnr_hole"] < filled["psnr_hole"]


def test_what_v_t_tells_in_holes_is_the_share_of_x_t_in_it(posed):
    """By hand: V_t in a hole is (1 − W)·X_t + W·noise, for Gaussian latents of known width."""
    rng = np.random.default_rng(0)
    shape = (4, 2, 48, 48, 3)
    batch = {"image": rng.standard_normal(shape).astype(np.float32),
             "mask": np.zeros((*shape[:-1], 1), np.float32),
             "is_reference": np.zeros(shape[:2], bool)}  # fmt: skip
    batch["mask"][:, :, :24] = 1
    schedule = make_schedule("linear", zero_snr=True)
    codec = DctCodec(1, 3)
    is_reference = batch.pop("is_reference")
    latents = encode_batch(codec, batch)
    width = np.asarray(latents[0]).std((0, 1, 2, 3)) ** 2
    for t in (100, 250, 600):
        share = leak.readable_share(latents, is_reference, schedule, "code", 0.2, t)
        alpha, alpha_c = (schedule.alphas_cumprod[i] for i in (t, t // 5))
        w = float(mixing_weight(np.array(t)))
        signal = (1 - w) ** 2 * alpha * width
        noise = (1 - w) ** 2 * (1 - alpha) + w**2 * (1 - alpha_c)
        expected = (signal / (signal + noise) * width).sum() / width.sum()
        assert share["hole"] == pytest.approx(expected, abs=0.02)
        assert share["known"] > share["hole"]
    shares = leak.readable_share(latents, is_reference, schedule, "clean", 0.2, 250)
    assert shares["hole"] < 0.01


def test_the_page_has_every_number_and_its_command(tmp_path):
    rows = {"MV-UnposeT": {"psnr_all": [20.126, 0.31], "ssim": [0.8, 0.0]}}
    table = {"study": "table3", "command": "python -m benchmarks.evidence table3 --test t",
             "options": {"steps": 5, "seeds": 2}, "rows": rows, "views": 8, "scenes": 4,
             "baselines": {"warp + Telea": {"psnr_all": 19.0, "ssim": 0.7}}}  # fmt: skip
    (tmp_path / "table3.json").write_text(json.dumps(table))
    page = tmp_path / "evidence.md"
    report.app(["--input", str(tmp_path), "--page", str(page)], standalone_mode=False)
    text = page.read_text()
    assert "| MV-UnposeT | 20.13 ± 0.31 | 0.800 ± 0.000 |" in text
    assert "| *warp + Telea* | 19.00 | 0.700 |" in text
    assert "python -m benchmarks.evidence table3 --test t" in text and "25.56" in text
    (tmp_path / "table3.json").write_text("{}")
    with pytest.raises(Exception, match=r"table3.json: is no result of a study"):
        report.app(["--input", str(tmp_path), "--page", str(page)], standalone_mode=False)


@pytest.mark.slow
def test_a_small_study_runs_stops_and_goes_on(posed, tmp_path):
    """Table 3 with one seed and a handful of steps, by the command of the docs."""
    small = ["data.image_size=32", "data.stride=(1,1)", "data.views=3", "data.references=(1,)",
             "model.model_channels=16", "model.norm_groups=8", "model.head_dim=16",
             "batch_size=2"]  # fmt: skip
    command = [sys.executable, "-m", "benchmarks.evidence", "table3", "--train", str(posed),
               "--validation", str(posed), "--test", str(posed), "--output", str(tmp_path),
               "--seeds", "1", "--steps", "4", "--pretraining-steps", "4", "--no-lpips",
               *(f"--set={x}" for x in small)]  # fmt: skip
    subprocess.run(command, check=True)
    first = json.loads((tmp_path / "table3.json").read_text())
    assert set(first["rows"]) == {
        f"{name}, warp {how}" for name in studies.TABLE3
        for how in ("as it is", "through C_t and W_t")
    }  # fmt: skip
    assert (tmp_path / "table3.jpg").is_file()
    times = {path: path.stat().st_mtime for path in (tmp_path / "runs").glob("*.log")}
    subprocess.run(command, check=True)
    assert times == {path: path.stat().st_mtime for path in (tmp_path / "runs").glob("*.log")}
    assert json.loads((tmp_path / "table3.json").read_text())["rows"] == first["rows"]
