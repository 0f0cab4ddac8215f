"""Training as a user meets it: it learns, it resumes bit for bit, it refuses what cannot work."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import moving_crop_clip

from benchmarks import held_out
from configs import tiny
from see3d_jax.data import records
from see3d_jax.errors import InputError, WorkError
from see3d_jax.pipelines.pretrained import load_model
from see3d_jax.training import loop
from tools import compare_checkpoints


def minuscule(data, **overrides):
    """configs/tiny.py at a size that compiles in seconds: 16² images, 3 views."""
    config = tiny.get_config()
    config.update_from_flattened_dict(
        {
            "batch_size": 2,
            "num_steps": 6,
            "checkpoint_every": 3,
            "log_every": 2,
            "sample_every": 0,
            "data.path": str(data),
            "data.image_size": 16,
            "data.views": 3,
            "data.held_out": 2,
            "codec.channels": 4,
            "model.model_channels": 16,
            "model.channel_mult": (1,),  # one level: attention in the middle only
            "model.attention_strides": (),
            "model.head_dim": 16,
            "model.norm_groups": 4,
            "evaluation.sampler_steps": 2,
            **overrides,
        }
    )
    return config.lock()


def losses_of(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def differences(first, second):
    (step, leaves), (step_other, other) = map(compare_checkpoints.newest_leaves, (first, second))
    assert step == step_other
    return compare_checkpoints.compare(leaves, other)


@pytest.fixture(scope="module")
def finished(clip_folder, tmp_path_factory) -> Path:
    """A run of six steps without interruption."""
    workdir = tmp_path_factory.mktemp("runs") / "straight"
    loop.train(minuscule(clip_folder, sample_every=6), workdir)
    return workdir


def test_a_run_leaves_everything_it_promises(finished):
    assert sorted(int(p.name) for p in (finished / "checkpoints").iterdir()) == [3, 6]
    assert list(losses_of(finished)) == [1, 2, 3, 4, 5, 6]
    assert json.loads((finished / "config.json").read_text())["data"]["views"] == 3
    assert "input_blocks" in (finished / "parameters.txt").read_text()
    assert list((finished / "events").glob("events.out.tfevents.*"))
    assert (finished / "samples" / "step_000006.png").stat().st_size > 1000
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    scores = next(row for row in rows if "heldout_psnr" in row)
    assert {
        "heldout_psnr_copy",
        "heldout_psnr_hole_inpainted",
        "heldout_ssim_condition",
    } <= scores.keys()


def test_a_finished_run_is_scored_again_with_other_numbers_of_steps(finished, tmp_path):
    command = ["--workdir", str(finished), "--steps", "2", "--steps", "5"]
    held_out.app([*command, "--json", str(tmp_path / "rows.json")], standalone_mode=False)
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    logged = json.loads((finished / "metrics.jsonl").read_text().splitlines()[-1])
    expected = {
        "model, 2 steps": "", "nearest reference, copied": "_copy",
        "condition, as it is shown": "_condition",
        "condition, holes filled by Telea": "_inpainted",
    }  # fmt: skip
    for name, method in expected.items():
        assert rows[name] == pytest.approx({key: logged[key + method] for key in rows[name]})
    assert rows["model, 5 steps"] != rows["model, 2 steps"]
    put_back = rows["model, 2 steps, known pixels put back"]
    assert put_back["heldout_psnr_known"] == 100
    assert put_back["heldout_psnr_hole"] == pytest.approx(logged["heldout_psnr_hole"])
    best = rows["best that the codec can show"]["heldout_psnr"]
    assert rows["model, 2 steps"]["heldout_psnr"] < best < 100


def test_a_resumed_run_is_bit_identical_to_a_straight_one(finished, clip_folder, tmp_path):
    loop.train(minuscule(clip_folder, num_steps=3), tmp_path)
    # other cadences, more threads and a moved folder must not matter
    moved = shutil.copytree(clip_folder, tmp_path / "moved")
    loop.train(minuscule(moved, log_every=1, checkpoint_every=2, **{"data.threads": 1}), tmp_path)
    assert losses_of(tmp_path) == losses_of(finished)
    assert differences(finished, tmp_path) == []


def test_a_run_killed_between_saves_repeats_the_lost_steps_exactly(
    finished, clip_folder, tmp_path, monkeypatch
):
    real_step, calls = loop.train_step, []

    def killed_at_the_fifth_step(*args, **kwargs):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real_step(*args, **kwargs)

    monkeypatch.setattr(loop, "train_step", killed_at_the_fifth_step)
    with contextlib.suppress(KeyboardInterrupt):
        loop.train(minuscule(clip_folder, log_every=1), tmp_path)
    assert max(losses_of(tmp_path)) == 4, "a step beyond the checkpoint was logged already"
    monkeypatch.undo()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # the half line that a kill can leave
    loop.train(minuscule(clip_folder, log_every=1), tmp_path)
    assert losses_of(tmp_path) == losses_of(finished)
    assert differences(finished, tmp_path) == []


@pytest.mark.parametrize("moment, saved", [("train_step", "1"), ("write_losses", "2")])
def test_sigterm_saves_and_the_next_run_continues(
    finished, clip_folder, tmp_path, monkeypatch, moment, saved
):
    """A signal during a step ends the run after it; one while logging, after the next step."""
    real = getattr(loop, moment)

    def signalled(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    monkeypatch.setattr(loop, moment, signalled)
    loop.train(minuscule(clip_folder, log_every=1), tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [saved]
    monkeypatch.undo()
    loop.train(minuscule(clip_folder), tmp_path)
    assert differences(finished, tmp_path) == []


def test_another_seed_gives_another_run(finished, clip_folder, tmp_path):
    loop.train(minuscule(clip_folder, seed=1), tmp_path)
    assert losses_of(tmp_path) != losses_of(finished)
    worst, name = compare_checkpoints.largest_difference(
        compare_checkpoints.newest_leaves(finished)[1],
        compare_checkpoints.newest_leaves(tmp_path)[1],
    )
    assert worst > 0 and name


def test_it_learns_to_fill_masked_views(clip_folder, tmp_path):
    config = minuscule(clip_folder, num_steps=120, checkpoint_every=120, log_every=40)
    loop.train(config, tmp_path)
    losses = list(losses_of(tmp_path).values())
    assert np.mean(losses[-20:]) < 0.8 * np.mean(losses[:10])


@pytest.mark.parametrize(
    "key, value", [("seed", 5), ("batch_size", 4), ("optimizer.learning_rate", 0.5)]
)
def test_a_workdir_of_another_config_is_refused(finished, clip_folder, key, value):
    before = (finished / "config.json").read_bytes()
    with pytest.raises(InputError, match=rf"another config: config\.{key} is .* there and {value}"):
        loop.train(minuscule(clip_folder, **{key: value}), finished)
    assert (finished / "config.json").read_bytes() == before


def test_refused_runs_write_nothing(tmp_path, clip_folder):
    short = tmp_path / "short"
    records.write_shards([records.encode(moving_crop_clip("coffee", frames=2))], short)
    (tmp_path / "empty").mkdir()
    for data, message in (
        (tmp_path / "nowhere", "no such folder"),
        (tmp_path / "empty", r"holds no clips-\*"),
        (short, "none of its 1 clips"),
        ("", r"config\.data\.path is empty"),
    ):
        with pytest.raises(InputError, match=message):
            loop.train(minuscule(data), tmp_path / "run")
    with pytest.raises(InputError, match=r"config\.num_steps"):
        loop.train(minuscule(clip_folder, num_steps=0), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_workdir_that_cannot_be_written_is_refused_first(clip_folder, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file/a/run: cannot be written \(.*file does not allow"):
        loop.train(minuscule(clip_folder), tmp_path / "file" / "a" / "run")


def poison(monkeypatch, steps):
    """Makes the images of these steps (counted from 1) not a number."""
    real, calls = loop.put_batch, itertools.count(1)

    def put(batch, *placement):
        bad = np.nan if next(calls) in steps else 0.0
        return real(batch | {"image": batch["image"] + np.float32(bad)}, *placement)

    monkeypatch.setattr(loop, "put_batch", put)


def test_a_step_that_is_not_finite_is_skipped_and_named(clip_folder, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, {2})
    loop.train(minuscule(clip_folder, num_steps=3, log_every=3), tmp_path)
    assert list(losses_of(tmp_path)) == [1, 3]
    assert "step 2 is skipped: loss nan" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["skipped_steps"] == 1
    leaves = compare_checkpoints.newest_leaves(tmp_path)[1]
    assert all(np.isfinite(leaf).all() for leaf in leaves.values())


def test_a_run_that_only_skips_stops_before_the_next_save(clip_folder, tmp_path, monkeypatch):
    poison(monkeypatch, range(2, 100))
    config = minuscule(clip_folder, checkpoint_every=4, log_every=50, max_skipped_in_row=3)
    with pytest.raises(
        WorkError, match=r"at step 4: the loss \(nan\).* 3 times in a row.*learning"
    ):
        loop.train(config, tmp_path)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_damaged_newest_checkpoint_is_set_aside_and_its_steps_are_run_again(
    finished, clip_folder, tmp_path, caplog
):
    workdir = shutil.copytree(finished, tmp_path / "run")
    for file in (workdir / "checkpoints" / "6" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"checkpoints/6: cannot be restored"):
        load_model(workdir)
    assert load_model(workdir, step=3).name == "training step 3"
    loop.train(minuscule(clip_folder), workdir)
    (warning,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert "checkpoints/6 is damaged" in warning and "continuing from step 3" in warning
    assert (workdir / "damaged" / "6" / "state").is_dir()
    assert losses_of(workdir) == losses_of(finished)
    assert differences(finished, workdir) == []


def test_the_trained_model_is_read_back_with_its_average(finished):
    model = load_model(finished)
    assert (model.name, model.image_size, model.views) == ("training step 6", 16, 3)
    assert model.size_multiple == 4
    leaves = compare_checkpoints.newest_leaves(finished)[1]
    name = "input_blocks/0/0/weight"
    average = np.asarray(model.params["input_blocks"]["0"]["0"]["weight"])
    np.testing.assert_array_equal(average, leaves[f"state/ema_params/{name}"])
    assert (average != leaves[f"state/params/{name}"]).any()
    context = model.context(np.zeros((16, 16, 3), np.uint8), 2)
    out = jax.jit(model.apply)(
        model.params, np.zeros((1, 2, 4, 4, 9), np.float32), np.zeros((1, 2), np.int32), context
    )
    assert out.shape == (1, 2, 4, 4, 4)


@pytest.mark.parametrize("state", ["missing", "empty", "no checkpoint", "not json", "no config"])
def test_a_partial_workdir_is_no_model(tmp_path, finished, state):
    workdir = tmp_path / "run"
    if state != "missing":
        workdir.mkdir()
    if state == "no checkpoint":
        shutil.copy(finished / "config.json", workdir)
    if state == "not json":
        (workdir / "config.json").write_text("{")
    if state == "no config":
        (workdir / "checkpoints" / "3").mkdir(parents=True)
    with pytest.raises(InputError, match="run"):
        load_model(workdir)
