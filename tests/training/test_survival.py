"""Runs that are killed, told to stop or out of disk space, in processes of their own.

Whatever happened, the continued run must equal the uninterrupted one bit for bit: losses, position
in the data and every array of the state.
"""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from test_training import differences, losses_of

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def start(clip_folder):
    """start(workdir, fault=…, overrides=…) runs one training process to its end."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE.parents[1]}",
    }

    def start(workdir, overrides=(), file_limit=None, **options):
        values = {"num_steps": 7, "checkpoint_every": 2, "log_every": 1, **dict(overrides)}
        options |= {"workdir": str(workdir), "data": str(clip_folder), "overrides": values}

        def limit():
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))

        return subprocess.run(
            [sys.executable, str(HERE / "run_process.py"), json.dumps(options)],
            env=environment, capture_output=True, text=True, timeout=300, check=False,
            preexec_fn=limit if file_limit else None,
        )  # fmt: skip

    return start


@pytest.fixture(scope="module")
def straight(start, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("straight") / "run"
    done = start(workdir)
    assert done.returncode == 0, done.stderr[-2000:]
    return workdir


def saved_steps(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir()
                  if path.name.isdecimal())  # fmt: skip


def unfinished(workdir):
    return [path.name for path in (workdir / "checkpoints").iterdir() if "tmp" in path.name]


def assert_continues_like(straight, workdir, start, **options):
    done = start(workdir, **options)
    assert done.returncode == 0, done.stderr[-2000:]
    assert losses_of(workdir) == losses_of(straight)
    assert differences(straight, workdir) == []
    assert not unfinished(workdir)


def test_a_run_killed_before_and_during_a_save_ends_as_if_nothing_had_happened(
    straight, start, tmp_path
):
    for fault, saved, partial in (
        (["commit", 1], [], 1),  # all of step 2 is on the disk, but not under its name
        (["saving", 2], [2], None),  # step 4 is being written, and perhaps just there
    ):
        done = start(tmp_path, fault=fault)
        assert done.returncode == -9, done.stderr[-2000:]
        assert set(saved_steps(tmp_path)) - {4} == set(saved)
        assert partial is None or len(unfinished(tmp_path)) == partial
    assert_continues_like(straight, tmp_path, start)


@pytest.mark.slow
def test_sigterm_saves_and_exits_with_zero(straight, start, tmp_path):
    done = start(tmp_path, fault=["sigterm", 3])
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1].startswith("stopped by a signal at step 3, saved")
    assert saved_steps(tmp_path) == [2, 3]
    assert_continues_like(straight, tmp_path, start)


@pytest.mark.slow
def test_a_full_disk_ends_the_run_with_one_line_and_leaves_the_last_checkpoint(
    straight, start, tmp_path
):
    """A limit on the size of files stands for the full disk: writing fails the same way."""
    start(tmp_path, fault=["committed", 1])
    assert saved_steps(tmp_path) == [2]
    done = start(tmp_path, file_limit=100_000)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1, done.stderr
    assert "the checkpoint of step 4 could not be saved" in done.stderr
    assert "the newest good one is step 2" in done.stderr
    assert saved_steps(tmp_path) == [2]
    assert_continues_like(straight, tmp_path, start)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_kills_at_random_points_change_nothing(straight, start, tmp_path, seed):
    draw = random.Random(seed)
    for _ in range(3):
        kind = draw.choice(["step", "saving", "commit", "committed", "sigterm"])
        done = start(tmp_path, fault=[kind, draw.randint(1, 3)])
        assert done.returncode in (0, -9), done.stderr[-2000:]
    assert_continues_like(straight, tmp_path, start)
