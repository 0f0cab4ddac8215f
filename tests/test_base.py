"""The leaves that every layer uses: atomic files, one-line errors, pictures, pages."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from html.parser import HTMLParser

import click
import numpy as np
import pytest
from PIL import Image

from see3d_jax import html, media
from see3d_jax.errors import InputError, WorkError, run_command
from see3d_jax.files import atomic_path, write_json


def test_a_failed_write_leaves_the_old_file_and_no_debris(tmp_path):
    target = tmp_path / "result.json"
    write_json(target, {"value": 1})
    with pytest.raises(ZeroDivisionError), atomic_path(target) as temporary:
        temporary.write_text("half")
        _ = 1 / 0
    assert json.loads(target.read_text()) == {"value": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_a_folder_replaces_a_folder(tmp_path):
    target = tmp_path / "out"
    for content in ("first", "second"):
        with atomic_path(target) as temporary:
            temporary.mkdir()
            (temporary / content).write_text(content)
    assert [p.name for p in target.iterdir()] == ["second"]


def test_json_with_nan_is_refused_and_writes_nothing(tmp_path):
    with pytest.raises(ValueError):
        write_json(tmp_path / "bad.json", {"psnr": float("nan")})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error, code",
    [
        (InputError("photo.jpg: no such\n image"), 2),
        (WorkError("all inputs failed"), 1),
        (click.UsageError("no such option: --x"), 2),
        (OSError(errno.ENOSPC, "No space left on device", "a.png"), 1),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "photo.jpg/out"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_user_mistakes_end_in_one_line_and_a_code(error, code, capsys):
    def command():
        raise error

    with pytest.raises(SystemExit) as stopped:
        run_command(command)
    assert stopped.value.code == code
    assert capsys.readouterr().err.count("\n") == 1


def test_our_own_bugs_keep_their_traceback():
    def command():
        raise KeyError("bug")

    with pytest.raises(KeyError):
        run_command(command)


def test_image_round_trip_and_clear_errors(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (13, 17, 3), dtype=np.uint8)
    media.write_image(tmp_path / "a.png", image)
    assert np.array_equal(media.read_image(tmp_path / "a.png"), image)
    (tmp_path / "text.png").write_text("not an image")
    for name in ("text.png", "missing.png"):
        with pytest.raises(InputError, match=name):
            media.read_image(tmp_path / name)


def test_mp4_has_every_frame_odd_sizes_and_the_same_bytes_twice(tmp_path):
    import decord

    frames = [np.full((33, 99, 3), 20 * i, np.uint8) for i in range(7)]
    for name in ("a.mp4", "b.mp4"):
        media.write_mp4(tmp_path / name, frames, fps=10)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    video = decord.VideoReader(str(tmp_path / "a.mp4"))
    assert len(video) == 7 and video[0].shape == (34, 100, 3)
    assert np.abs(video[6].asnumpy().astype(int) - 120).max() <= 3


def test_contact_sheet_places_cells(tmp_path):
    red, green = np.zeros((8, 8, 3)), np.zeros((4, 4, 3))
    red[..., 0], green[..., 1] = 1, 1
    sheet = media.contact_sheet([[red, green], [green]], ["row", "two"], ["a", "b"])
    assert (sheet == [255, 0, 0]).all(-1).sum() == 64
    assert (sheet == [0, 255, 0]).all(-1).sum() == 128


class _Balance(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.text = [], ""

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_a_contact_sheet_does_not_stretch_images_of_another_shape() -> None:
    wide = np.zeros((20, 40, 3), np.uint8)
    sheet = media.contact_sheet([[wide, np.full((40, 20, 3), 255, np.uint8)]], gap=0)
    columns, rows = (np.flatnonzero((sheet == 255).all(-1).any(axis)) for axis in (0, 1))
    assert sheet.shape == (20, 80, 3) and len(rows) == 20
    assert (columns.min(), columns.max()) == (55, 64)  # the middle of its cell


def test_pages_are_balanced_escaped_and_self_contained(tmp_path):
    picture = html.image(np.zeros((4, 4, 3)), 'a "quoted" <caption>')
    html.write_page(
        tmp_path / "p.html",
        "Run <1>",
        html.section("Numbers", html.table(["name"], [["<script>"]]), picture),
    )
    page = (tmp_path / "p.html").read_text()
    parser = _Balance()
    parser.feed(page)
    assert parser.open == [] and "<script>" in parser.text
    assert "<script>" not in page and "http" not in page


def test_make_install_is_instant_when_done():
    """The stamp must depend on nothing that changes by itself."""
    from pathlib import Path

    root = Path(__file__).resolve().parent.parent
    if not (root / ".venv/.installed").exists():
        pytest.skip("not installed through make")
    done = subprocess.run(["make", "-q", "install"], cwd=root)
    assert done.returncode == 0


def test_sixteen_bit_grey_keeps_its_tones(tmp_path):
    levels = np.array([[0, 0x4000], [0x8000, 0xFFFF]], np.uint16)
    Image.fromarray(levels).save(tmp_path / "a.png")
    assert media.read_image(tmp_path / "a.png")[..., 0].tolist() == [[0, 64], [128, 255]]


def test_heic_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / "a.heic").write_bytes(b"")
    for read in (media.read_image, media.image_size):
        with pytest.raises(InputError, match="pip install pillow-heif"):
            read(tmp_path / "a.heic")
