"""The `see3d` command as a user meets it: help, one-line errors, and what `see3d view` says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from see3d_jax import cli, viewer
from see3d_jax.errors import InputError
from see3d_jax.media import write_image, write_mp4


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "see3d_jax.cli", *map(str, arguments)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def one_line(result: subprocess.CompletedProcess) -> str:
    assert result.returncode != 0
    assert "Traceback" not in result.stderr, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, result.stderr
    return lines[0]


@pytest.mark.parametrize("command", ["", *cli.app.commands])
def test_help_has_examples(command: str) -> None:
    result = CliRunner().invoke(cli.app, [*command.split(), "--help"])
    assert result.exit_code == 0
    assert "Examples:\n" in result.output and f"see3d {command}".strip() in result.output


@pytest.mark.parametrize("name", list(cli.app.commands))
def test_every_command_has_the_same_grammar(name: str) -> None:
    options = [flag for p in cli.app.commands[name].params for flag in p.opts]
    assert {"--quiet", "-q", "--json"} <= set(options)
    for flag in options:
        assert (flag == flag.lower() and "_" not in flag.lstrip("-")) or not flag.startswith("-")


def test_tab_completes_commands_and_options() -> None:
    def complete(words: str, number: int) -> str:
        environment = {**os.environ, "_SEE3D_COMPLETE": "bash_complete", "COMP_WORDS": words,
                       "COMP_CWORD": str(number)}  # fmt: skip
        result = subprocess.run(
            [sys.executable, "-m", "see3d_jax.cli"], env=environment, capture_output=True,
            text=True, check=False,
        )  # fmt: skip
        return result.stdout

    assert "create" in complete("see3d cre", 1)
    assert "--preset" in complete("see3d create --pre", 2)
    assert set(complete("see3d create --preset ", 3).split()) == {
        "plain,draft", "plain,normal", "plain,best",
    }  # fmt: skip


def test_quiet_says_nothing_and_json_says_one_object(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", np.zeros((8, 8, 3), np.uint8))
    quiet = run("view", tmp_path / "a.png", "--quiet")
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")
    said = run("view", tmp_path / "a.png", "--json")
    assert json.loads(said.stdout)["path"].endswith("a.png") and said.stderr == ""
    assert json.loads(run("info", tmp_path / "a.png", "--json").stdout)["title"] == "a picture"


def test_help_does_not_import_the_heavy_libraries() -> None:
    code = (
        "import sys; from see3d_jax import cli\n"
        "bad = {'jax', 'cv2', 'decord', 'flax', 'tensorflow_datasets'} & set(sys.modules)\n"
        "assert not bad, bad"
    )
    start = time.monotonic()
    subprocess.run([sys.executable, "-c", code], check=True)
    assert time.monotonic() - start < 10


def test_version_and_unknown_option() -> None:
    assert run("--version").stdout.startswith("see3d, version ")
    assert "--nope" in one_line(run("generate", "--nope"))


def test_errors_are_one_line_and_leave_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    line = one_line(
        run("generate", "--input", tmp_path / "no.jpg", "--trajectory", "orbit",
            "--checkpoint", tmp_path, "--output", out)
    )  # fmt: skip
    assert "no.jpg" in line and not out.exists()
    assert "nowhere" in one_line(run("view", tmp_path / "nowhere"))
    line = one_line(run("reconstruct", "--input", tmp_path / "none", "--output", out))
    assert "none" in line and not out.exists()


def test_generate_refuses_a_folder_it_did_not_write(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    line = one_line(
        run("generate", "--input", tmp_path, "--trajectory", "orbit", "--checkpoint", tmp_path,
            "--output", tmp_path)
    )  # fmt: skip
    assert "not empty" in line and (tmp_path / "thesis.txt").read_text() == "years of work"


def test_view_recognises_results(tmp_path: Path) -> None:
    def folder(name: str, **files: str) -> Path:
        path = tmp_path / name
        path.mkdir()
        for file, text in files.items():
            (path / file.replace("__", ".")).write_text(text)
        return path

    ply = "ply\nformat ascii 1.0\nelement vertex 3\nproperty float scale_0\nend_header\n"
    scene = folder("a", point_cloud__ply=ply, metrics__json='{"psnr": 21.5, "ssim": 0.8}')
    assert "3 3D Gaussians" in viewer.describe(scene) and "21.50 dB" in viewer.describe(scene)
    assert "3 3D Gaussians" in viewer.describe(scene / "point_cloud.ply")
    views = folder("b", run__json='{"command": "see3d generate", "views": ["00000", "00001"]}')
    assert "2 generated views" in viewer.describe(views)
    workdir = folder("c", metrics__jsonl='{"step": 1, "loss": 2.0}\n')
    assert "training workdir" in viewer.describe(workdir)
    curated = folder(
        "d", decisions__jsonl='{"decision": "keep"}\n{"decision": "error"}\n{"torn', report__html=""
    )
    assert "1 keep, 0 reject, 1 error" in viewer.describe(curated)
    posed = folder("e", transforms__json='{"frames": [{}, {}, {}]}')
    assert "3 views" in viewer.describe(posed)
    together = viewer.describe(tmp_path)
    assert all(f"see3d view {tmp_path / name}" in together for name in "abcde")
    with pytest.raises(InputError, match="no result"):
        viewer.describe(folder("f"))
    bad = folder("g", x__ply="a text file") / "x.ply"
    with pytest.raises(InputError, match="not a PLY"):
        viewer.describe(bad)


class _Checker(HTMLParser):
    """Counts tags and refuses anything loaded from outside the page."""

    VOID = {"meta", "link", "img", "br", "line", "polyline"}

    def __init__(self) -> None:
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        for name, value in attributes:
            if name in ("src", "href"):
                assert value.startswith("data:"), value[:60]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture
def finished_run(tmp_path: Path) -> viewer.RunFolders:
    rng = np.random.default_rng(0)
    for name in ("clips", "training/samples", "views", "scene"):
        (tmp_path / name).mkdir(parents=True)
    clip = {"start_s": 0, "end_s": 2, "decision": "keep", "reason": ""}
    lines = [
        {"path": "a<b>.mp4", "decision": "keep", "stage": None, "reason": None, "clips": [clip]},
        {"path": "b.mp4", "decision": "error", "stage": "decode", "reason": "cut", "clips": []},
    ]
    (tmp_path / "clips/decisions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    losses = [{"step": i, "loss": 1 / (i + 1) + 0.05 * rng.normal()} for i in range(100)]
    (tmp_path / "training/metrics.jsonl").write_text("\n".join(map(json.dumps, losses)))
    picture = rng.uniform(size=(24, 32, 3)).astype(np.float32)
    write_image(tmp_path / "training/samples/000100.png", picture)
    write_image(tmp_path / "views/contact_sheet.png", picture)
    write_mp4(tmp_path / "views/video.mp4", [picture] * 3, fps=4)
    regions = {r: {"psnr": 20.0, "ssim": None} for r in ("all", "known", "hole")}
    scores = {"num_views": 3, "hole_share": 0.25, "methods": {"raw_warp": regions}}
    (tmp_path / "views/metrics.json").write_text(json.dumps(scores))
    (tmp_path / "scene/metrics.json").write_text('{"psnr": 25.0, "ssim": 0.9}')
    return viewer.RunFolders(
        None, tmp_path / "clips", tmp_path / "training",
        {"Views": tmp_path / "views"}, {"Scene": tmp_path / "scene"},
    )  # fmt: skip


def test_report_is_one_self_contained_page(finished_run, tmp_path: Path) -> None:
    viewer.write_report(tmp_path / "r.html", "A run", finished_run, [("python -m x", 12.3)])
    text = (tmp_path / "r.html").read_text()
    checker = _Checker()
    checker.feed(text)
    assert not checker.open
    assert {"svg", "video", "img", "table"} <= set(checker.seen) and "script" not in checker.seen
    assert "a&lt;b&gt;.mp4" in text and "raw warp" in text and "12 s" in text


def test_report_of_a_run_without_any_result_is_still_a_page(tmp_path: Path) -> None:
    empty = viewer.RunFolders(
        tmp_path / "w", tmp_path / "x", tmp_path / "y", {"V": tmp_path / "z"}, {}
    )
    viewer.write_report(tmp_path / "r.html", "Nothing", empty)
    assert "0 videos" in (tmp_path / "r.html").read_text()


@pytest.mark.parametrize("values", [[1.0], [2.0, 2.0, 2.0], [float("nan"), 3.0, 1e30], []])
def test_curves_of_odd_data_draw(values: list[float]) -> None:
    drawn = viewer.curve_svg(range(len(values)), values, "step", "loss")
    assert "nan" not in drawn and "inf" not in drawn.replace("infinite", "")
