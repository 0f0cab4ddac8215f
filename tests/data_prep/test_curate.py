import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from curate_scenes import write

from data_prep.curate import curate, find_videos
from data_prep.evaluate import evaluate, format_table, read_labels
from data_prep.rules import Thresholds
from data_prep.runners import Runner, WorkerLost, run_jobs
from data_prep.stages import Settings
from see3d_jax.data.records import decode_image, read_records
from see3d_jax.errors import InputError, WorkError
from see3d_jax.media import write_mp4

EXPECTED = {
    "cut.mp4": "keep",  # its first shot is the parallax scene
    "mover.mp4": "reject",
    "mover_static_camera.mp4": "reject",
    "one_frame.mp4": "reject",
    "parallax.mp4": "keep",
    "rotation.mp4": "reject",
    "static.mp4": "reject",
    "text.mp4": "error",
    "zero.mov": "error",
    "zoom.mp4": "reject",
}

STRICT = Settings(thresholds=Thresholds(min_parallax_share=1.1, min_turn_residual=1e9))


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for name in EXPECTED:
        kind = name.split(".")[0]
        if kind == "text":
            (folder / name).write_text("not a video")
        elif kind == "zero":
            (folder / name).touch()
        elif kind == "one_frame":
            from curate_scenes import scene

            write_mp4(folder / name, [scene()], 12)
        else:
            write(folder / name, kind)
    return folder


@pytest.fixture(scope="module")
def curated(videos, tmp_path_factory):
    output = tmp_path_factory.mktemp("curated")
    curate(find_videos(str(videos)), output, Settings(), Runner(), shards=2)
    return output


def lines(output):
    return [json.loads(line) for line in (output / "decisions.jsonl").read_text().splitlines()]


def outputs(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


def test_every_kind_of_video_gets_its_verdict(curated):
    assert {line["path"]: line["decision"] for line in lines(curated)} == EXPECTED
    by_name = {line["path"]: line for line in lines(curated)}
    assert "parallax" in by_name["rotation.mp4"]["reason"]
    assert "parallax" in by_name["zoom.mp4"]["reason"]
    assert by_name["static.mp4"]["reason"] == "slideshow or still picture"
    assert "0 bytes" in by_name["zero.mov"]["reason"]
    for line in lines(curated):
        assert set(line) >= {"path", "decision", "stage", "reason", "scores", "clips"}
        if line["clips"]:
            assert line["scores"]["thresholds"]["max_dynamic_score"] == 0.25


def test_no_kept_clip_crosses_the_cut(curated):
    (line,) = [line for line in lines(curated) if line["path"] == "cut.mp4"]
    assert [clip["decision"] for clip in line["clips"]] == ["keep", "reject"]
    assert line["clips"][0]["end_s"] < 14 / 12 <= line["clips"][1]["start_s"] + 1e-3


def test_shards_hold_the_kept_clips(curated):
    records = list(read_records(curated))
    assert {record.source for record in records} == {"cut.mp4", "parallax.mp4"}
    assert len(list(curated.glob("clips-*-of-00002.array_record"))) == 2
    assert records[0].clip_id.endswith(".mp4#000") and records[0].fps == pytest.approx(12, rel=0.01)
    assert decode_image(records[0].images[0]).shape == (records[0].height, records[0].width, 3)


def test_report_is_self_contained_and_filterable(curated):
    text = (curated / "report.html").read_text()
    assert "http://" not in text and "https://" not in text
    for name in EXPECTED:
        assert name in text
    assert '<select id="pick">' in text and "parallax_share" in text


def test_an_interrupted_run_continues_to_the_same_bytes(videos, curated, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(curated, again)
    work = again / ".work" / "videos"
    done = sorted(work.iterdir())
    for folder in done[::3]:
        shutil.rmtree(folder)  # as if killed before these
    (again / "decisions.jsonl").unlink()
    untouched = {p: (p / "result.json").stat().st_mtime_ns for p in work.iterdir()}
    curate(find_videos(str(videos)), again, Settings(), Runner("process", 2), shards=2)
    assert outputs(again) == outputs(curated)
    assert {p: (p / "result.json").stat().st_mtime_ns for p in untouched} == untouched


def test_other_settings_are_judged_anew(videos, curated, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(curated, again)
    one = [item for item in find_videos(str(videos)) if item[1] == "parallax.mp4"]
    (line,) = curate(one, again, STRICT)
    assert line["decision"] == "reject"
    assert not list(again.glob("clips-*")), "shards of the earlier run must not survive"


def test_nothing_readable_fails_and_says_which(videos, tmp_path):
    files = [item for item in find_videos(str(videos)) if EXPECTED[item[1]] == "error"]
    with pytest.raises(WorkError, match=r"none of 2 .*text\.mp4"):
        curate(files, tmp_path / "out", Settings())
    assert len(lines(tmp_path / "out")) == 2


@pytest.mark.parametrize("source, message", [("nowhere", "no such file"), ("x/*.mp4", "matches")])
def test_missing_input_is_one_line(source, message, tmp_path):
    with pytest.raises(InputError, match=message):
        find_videos(str(tmp_path / source))


def test_empty_folder_and_unwritable_output_exit_with_one_line(videos, tmp_path):
    (tmp_path / "file").touch()
    for source, output in ((tmp_path, "out"), (videos, "file")):
        run = subprocess.run(
            [sys.executable, "-m", "data_prep.curate", "--input", source, "--output",
             tmp_path / output],
            capture_output=True, text=True, cwd=Path(__file__).resolve().parents[2],
        )  # fmt: skip
        assert run.returncode != 0
        assert run.stderr.startswith("error: ") and run.stderr.count("\n") == 1


def test_a_full_disk_ends_the_command_in_one_line_and_a_rerun_goes_on(videos, tmp_path):
    """A limit on the size of files stands for the disk: writing the frames fails midway."""
    command = [sys.executable, "-m", "data_prep.curate", "--input", videos / "parallax.mp4",
               "--output", tmp_path / "out", "--runner", "serial"]  # fmt: skip
    root = Path(__file__).resolve().parents[2]
    limit = 2**20  # less than the decoded frames need
    run = subprocess.run(
        command, capture_output=True, text=True, cwd=root,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith("error: ") and "No space left" in run.stderr
    assert "Traceback" not in run.stderr
    assert [p.name for p in (tmp_path / "out").iterdir()] == [".work"], "nothing half-written"
    assert subprocess.run(command, capture_output=True, cwd=root).returncode == 0
    assert [line["decision"] for line in lines(tmp_path / "out")] == ["keep"]


def test_a_file_that_may_not_be_read_is_named_and_the_rest_is_judged(videos, tmp_path, monkeypatch):
    usual = Path.open

    def locked(path, *args, **more):  # as root every file can be read, so chmod proves nothing
        if path.name == "mover.mp4":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return usual(path, *args, **more)

    monkeypatch.setattr(Path, "open", locked)
    files = [(videos / name, name) for name in ("mover.mp4", "one_frame.mp4")]
    found = {line["path"]: line for line in curate(files, tmp_path, Settings())}
    assert found["mover.mp4"]["decision"] == "error"
    assert "Permission denied" in found["mover.mp4"]["reason"]
    assert found["one_frame.mp4"]["decision"] == "reject"


def test_evaluation_counts_against_acceptable_decisions(curated, tmp_path):
    labels = [
        {"file": "v/parallax.mp4", "label": "keep", "acceptable_decisions": ["keep"]},
        {"file": "v/zoom.mp4", "label": "keep", "acceptable_decisions": ["keep"]},  # wrongly
        {"file": "v/rotation.mp4", "label": "keep", "acceptable_decisions": ["keep", "reject"]},
        {"file": "v/cut.mp4", "label": "reject-dynamic",
         "acceptable_decisions": ["reject", "keep-after-split"]},
        {"file": "v/gone.mp4", "label": "keep", "acceptable_decisions": ["keep"]},
    ]  # fmt: skip
    result = evaluate(labels, lines(curated))
    assert result["precision"] == 1.0 and result["kept"] == 2
    assert result["recall"] == pytest.approx(2 / 3)
    assert result["strict_recall"] == pytest.approx(1 / 3)
    assert [row["file"] for row in result["disagreements"]] == ["v/zoom.mp4"]
    assert result["unjudged"] == ["v/gone.mp4"]
    table = format_table(labels, lines(curated)).splitlines()
    assert len(table) == 2 + 4 and table[2].startswith("| cut.mp4 | reject-dynamic | keep |")
    (tmp_path / "bad.json").write_text('{"videos": [{"file": "a"}]}')
    with pytest.raises(InputError, match=r"videos\[0\] has no field 'label'"):
        read_labels(tmp_path / "bad.json")


def die_on_three(number):
    if number == 3:
        import os

        os._exit(9)
    return number * number


def test_a_dying_worker_costs_only_its_own_item():
    results = dict(run_jobs(die_on_three, range(6), Runner("process", 2)))
    assert isinstance(results.pop(3), WorkerLost)
    assert results == {i: i * i for i in (0, 1, 2, 4, 5)}


def test_real_clips_get_their_verdicts(shared, tmp_path):
    names = {"ctl_vp9.webm": "keep", "ctl_zoom.mp4": "reject", "carphone.mp4": "reject",
             "err_truncated_no_moov.mp4": "error"}  # fmt: skip
    files = [(shared / "data" / "videos" / name, name) for name in sorted(names)]
    result = curate(files, tmp_path, Settings())
    assert {line["path"]: line["decision"] for line in result} == names


@pytest.mark.slow
def test_precision_and_recall_on_all_labelled_videos(shared, tmp_path):
    result = curate(
        find_videos(str(shared / "data" / "videos")), tmp_path, Settings(), Runner("process", 2)
    )
    scores = evaluate(read_labels(shared / "data" / "manifest.json"), result)
    assert scores["precision"] >= 0.95 and scores["recall"] >= 0.85, scores["disagreements"]
