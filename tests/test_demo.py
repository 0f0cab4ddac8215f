"""The demo: its steps resume, stop at the first failure, and the whole chain works (slow)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from see3d_jax.errors import WorkError
from see3d_jax.pipelines.inputs import load_scene
from tools import demo


def step(output: Path, *code: str) -> demo.Step:
    """A command that runs fast: `python -m timeit -n 1 -r 1 CODE` executes any Python statement."""
    return demo.Step("a purpose", output, ("timeit", "-n", "1", "-r", "1", *code))


def touch(path: Path) -> str:
    return f"open({str(path)!r}, 'a').write('x')"


def test_a_finished_step_is_not_repeated_until_its_command_changes(tmp_path, capfd) -> None:
    folder, count = tmp_path / "work", tmp_path / "count"
    folder.mkdir()
    for _ in range(2):
        demo.run(step(folder, touch(count)), tmp_path / ".finished")
    assert count.read_text() == "x" and "already done" in capfd.readouterr().out
    (folder / "old.txt").write_text("of the old command")
    again = f"__import__('os').makedirs({str(folder)!r}, exist_ok=True)"
    demo.run(step(folder, again, touch(count)), tmp_path / ".finished")
    assert count.read_text() == "xx" and not (folder / "old.txt").exists()


def test_a_step_that_stopped_half_way_is_not_done(tmp_path) -> None:
    half = demo.Step(
        "a purpose", tmp_path, ("timeit", "-n", "1", "-r", "1", "pass"), "checkpoints/9"
    )
    with pytest.raises(WorkError, match="before it was done"):
        demo.run(half, tmp_path / ".finished")
    assert not (tmp_path / ".finished").exists()


def test_a_failed_step_stops_the_chain_and_leaves_no_marker(tmp_path) -> None:
    with pytest.raises(WorkError, match="exit code"):
        demo.run(step(tmp_path / "work", "raise SystemExit(3)"), tmp_path)
    assert not list(tmp_path.glob("*.json"))


def test_a_folder_of_others_is_refused(tmp_path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    result = subprocess.run(
        [sys.executable, "-m", "tools.demo", "--output", str(tmp_path), "--fast"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 2 and "not a demo folder" in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.slow
def test_the_whole_chain(tmp_path) -> None:
    """Raw video → clips → training → views → Gaussians → report, in a few steps of each."""
    command = [sys.executable, "-m", "tools.demo", "--output", str(tmp_path / "demo"), "--fast"]
    first = subprocess.run(command, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stdout[-2000:] + first.stderr[-2000:]
    out = tmp_path / "demo"
    for name in (
        "report.html", "clips/decisions.jsonl", "training/config.json", "views/contact_sheet.png",
        "views/video.mp4", "views/metrics.json", "scene/point_cloud.ply", "scene/orbit.mp4",
        "scene_of_views/point_cloud.ply",
    ):  # fmt: skip
        assert (out / name).stat().st_size > 0, name
        assert "report.html" in first.stdout
    assert "<svg" in (out / "report.html").read_text()
    assert len(load_scene(out / "views")) == demo.FAST.views + 1
    scores = json.loads((out / "views/metrics.json").read_text())["methods"]
    # Whatever the model is like, the warp is right where it claims to know.
    assert scores["raw_warp"]["known"]["psnr"] > 25
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0 and again.stdout.count("already done") == 7
