"""Kills, limits and broken machines: whatever happens, a rerun ends with the same bytes."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from curate_scenes import write

from data_prep import shards
from data_prep.curate import curate, find_videos, read_settings
from data_prep.runners import LimitExceeded, Runner, limited, run_jobs
from data_prep.shards import balanced
from data_prep.stages import Settings
from see3d_jax.errors import InputError, WorkError

ROOT = Path(__file__).resolve().parents[2]


def outputs(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for index in range(4):
        write(folder / f"{index}.mp4", ("parallax", "rotation")[index % 2])
    return folder


@pytest.fixture(scope="module")
def undisturbed(videos, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed")
    curate(find_videos(str(videos)), output, Settings())
    return outputs(output)


def start(videos, output, *more):
    return subprocess.Popen(
        [sys.executable, "-m", "data_prep.curate", "--input", videos, "--output", output, *more],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip


def wait_for_results(output, count, seconds=90):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if len(list(output.glob(".work/videos/*/result.json"))) >= count:
            return
        time.sleep(0.02)
    pytest.fail(f"no {count} results within {seconds} s")


def children(pid):
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_killed_serial_driver_continues_to_the_same_bytes(videos, undisturbed, tmp_path):
    process = start(videos, tmp_path, "--runner", "serial")
    wait_for_results(tmp_path, 1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "decisions.jsonl").exists()
    curate(find_videos(str(videos)), tmp_path, Settings())
    assert outputs(tmp_path) == undisturbed


def test_a_killed_pool_driver_leaves_no_orphans(videos, undisturbed, tmp_path):
    process = start(videos, tmp_path, "--workers", "2")
    wait_for_results(tmp_path, 1)
    workers = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    end = time.monotonic() + 10
    while any(_working(pid) for pid in workers) and time.monotonic() < end:
        time.sleep(0.05)
    assert not [pid for pid in workers if _working(pid)]
    curate(find_videos(str(videos)), tmp_path, Settings(), Runner("process", 2))
    assert outputs(tmp_path) == undisturbed


def _working(pid):
    try:
        text = Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return False
    return "spawn_main" in text


@pytest.mark.slow
def test_a_killed_worker_changes_nothing(videos, undisturbed, tmp_path):
    process = start(videos, tmp_path, "--workers", "2")
    time.sleep(3.0)
    for pid in [pid for pid in children(process.pid) if _working(pid)][:1]:
        os.kill(pid, signal.SIGKILL)
    assert process.wait(timeout=300) == 0
    assert outputs(tmp_path) == undisturbed


@pytest.mark.slow
def test_a_killed_ray_node_changes_nothing(videos, undisturbed, tmp_path):
    ray = pytest.importorskip("ray", reason="the extra curate")
    from ray.cluster_utils import Cluster

    os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'tests/data_prep'}"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    second = cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        killed = threading.Event()

        def kill_after_the_first_result():
            wait_for_results(tmp_path, 1)
            cluster.remove_node(second, allow_graceful=False)
            killed.set()

        threading.Thread(target=kill_after_the_first_result, daemon=True).start()
        curate(find_videos(str(videos)), tmp_path, Settings(), Runner("ray"))
        assert killed.wait(60)
        assert outputs(tmp_path) == undisturbed
    finally:
        ray.shutdown()
        cluster.shutdown()


def double(number):
    return 2 * number


def test_time_and_memory_limits_say_what_was_exceeded():
    with pytest.raises(LimitExceeded, match=r"longer than 0\.2 s"), limited(0.2, 4096):
        while True:
            time.sleep(0.01)
    with pytest.raises(LimitExceeded, match="more than 64 MB"), limited(60, 64):
        np.zeros(2**28, np.uint8)
    np.zeros(2**28, np.uint8)  # the limit is gone


def test_a_video_over_its_limit_is_quarantined(videos, tmp_path):
    with pytest.raises(WorkError, match=r"judging it took longer than 0\.05 s"):
        curate([(videos / "0.mp4", "0.mp4")], tmp_path, Settings(video_seconds=0.05))


def test_a_full_disk_ends_the_run_and_leaves_nothing_half_written(videos, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards, "clip_record", full)
    with pytest.raises(OSError, match="No space left"):
        curate(find_videos(str(videos)), tmp_path, Settings())
    assert not list(tmp_path.glob("clips-*")) and not (tmp_path / "decisions.jsonl").exists()
    stored = list((tmp_path / ".work" / "videos").iterdir())  # only those that need no clip
    assert {json.loads((f / "result.json").read_text())["decision"] for f in stored} <= {"reject"}


def test_balanced_shards_have_nearly_equal_sizes():
    sizes = list(np.random.default_rng(0).integers(1, 100, 103))
    order = balanced(sizes, 8)
    assert sorted(order) == list(range(103))
    totals = [sum(sizes[i] for i in order[shard::8]) for shard in range(8)]
    assert max(totals) - min(totals) <= max(sizes)
    assert balanced([], 0) == []


def test_lists_and_tables_of_paths_are_inputs(videos, tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    (tmp_path / "list.txt").write_text(f"# mine\n{videos / '1.mp4'}\n\n{videos / '0.mp4'}\n")
    assert [name for _, name in find_videos(str(tmp_path / "list.txt"))] == ["0.mp4", "1.mp4"]
    table = pa.table({"path": [str(videos / "2.mp4")]})
    pyarrow.parquet.write_table(table, tmp_path / "m.parquet")
    assert [name for _, name in find_videos(str(tmp_path / "m.parquet"))] == ["2.mp4"]
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(InputError, match="lists no videos"):
        find_videos(str(tmp_path / "empty.txt"))


def test_settings_come_from_a_file_and_unknown_ones_are_named(tmp_path):
    path = tmp_path / "c.json"
    path.write_text('{"flow_pairs": 5, "thresholds": {"min_frames": 3}}')
    found = read_settings(path)
    assert found.flow_pairs == 5 and found.thresholds.min_frames == 3
    path.write_text('{"thresholds": {"min_frame": 3}}')
    with pytest.raises(InputError, match=r"unknown setting thresholds\.min_frame"):
        read_settings(path)


def test_runners_agree():
    for runner in (Runner(), Runner("process", 2)):
        assert dict(run_jobs(double, range(5), runner)) == {i: 2 * i for i in range(5)}
