"""Ten mistakes that everyone makes once: each ends in one line that says what to do."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from test_cli import one_line, run
from weight_fixtures import random_run

from see3d_jax.errors import InputError, WorkError, run_command
from see3d_jax.media import write_image, write_mp4
from see3d_jax.pipelines import stages
from see3d_jax.pipelines.create import create

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return random_run(tmp_path_factory.mktemp("run") / "tiny")


@pytest.fixture
def photo(tmp_path) -> Path:
    write_image(tmp_path / "photo.jpg", skimage.data.chelsea()[:60, :80])
    return tmp_path / "photo.jpg"


def refused(tmp_path, photos, checkpoint, **options) -> str:
    with pytest.raises((InputError, WorkError)) as error:
        create(photos, tmp_path / "out", checkpoint=checkpoint, **options)
    assert not (tmp_path / "out" / "views").exists()
    return " ".join(str(error.value).split())


def test_a_wrong_path(tmp_path, checkpoint) -> None:
    assert "nowhere.jpg: no such photo" in refused(tmp_path, [tmp_path / "nowhere.jpg"], checkpoint)


def test_heic_without_its_package(tmp_path, checkpoint, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / "a.heic").write_bytes(b"")
    np.save(tmp_path / "depth.npy", np.ones((4, 4)))
    said = refused(tmp_path, [tmp_path / "a.heic"], checkpoint, depth=tmp_path / "depth.npy")
    assert "a.heic: HEIC needs another package; pip install pillow-heif, or give a JPEG" in said


def test_one_photo_and_no_depth(tmp_path, photo) -> None:
    said = one_line(run("create", photo, "--output", tmp_path / "out"))
    assert "one photo alone shows no depth; add --depth" in said and "two or more photos" in said
    assert not (tmp_path / "out").exists()


def test_a_video(tmp_path, checkpoint) -> None:
    write_mp4(tmp_path / "clip.mp4", [np.zeros((16, 16, 3), np.uint8)] * 2, fps=2)
    said = refused(tmp_path, [tmp_path / "clip.mp4"], checkpoint)
    assert "is a video; save some frames of it (e.g. `ffmpeg -i clip.mp4" in said


def test_a_folder_of_five_hundred_photos(tmp_path, photo, checkpoint) -> None:
    (tmp_path / "many").mkdir()
    for i in range(500):
        shutil.copyfile(photo, tmp_path / "many" / f"{i:03d}.jpg")
    said = refused(tmp_path, [tmp_path / "many"], checkpoint)
    assert "500 photos are too many" in said and "every 13th" in said
    assert "see3d reconstruct --input" in said


def test_photos_that_do_not_overlap(tmp_path, checkpoint) -> None:
    pytest.importorskip("pycolmap", reason="pip install pycolmap")
    for name in ("astronaut", "coffee"):
        write_image(tmp_path / f"{name}.jpg", getattr(skimage.data, name)()[::2, ::2])
    said = refused(tmp_path, [tmp_path / "astronaut.jpg", tmp_path / "coffee.jpg"], checkpoint)
    assert "overlap" in said and "each photo must show half of what another one shows" in said


def test_a_full_disk(tmp_path, photo, checkpoint, monkeypatch, capsys) -> None:
    np.save(tmp_path / "depth.npy", np.ones((60, 80)))
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(tmp_path)
        patch.setattr(stages.shutil, "disk_usage", lambda place: usage._replace(free=5_000_000))
        said = refused(tmp_path, [photo], checkpoint, depth=tmp_path / "depth.npy")
    assert "the disk is full (5 MB free, 100 MB are needed); free some space" in said

    def fills_up() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out/views/00000.png")

    with pytest.raises(SystemExit) as stop:  # when it fills up half way
        run_command(fills_up)
    assert stop.value.code == 1
    assert "00000.png: No space left on device; free some space" in capsys.readouterr().err


def test_a_taken_port(tmp_path, photo) -> None:
    from see3d_jax.geometry.cameras import Camera, intrinsics_matrix
    from see3d_jax.geometry.scene_files import PosedImages, write_transforms

    camera = Camera(intrinsics_matrix(70, 70, 40, 30), np.eye(4, dtype=np.float32), 80, 60)
    write_transforms(tmp_path / "transforms.json", PosedImages(("photo.jpg",), (camera,)))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = one_line(run("view", tmp_path, "--port", port))
    assert f"--port {port}: is taken" in said and "--port 0 for any that is free" in said


def test_an_old_python(tmp_path) -> None:
    """The check in the Makefile asks the interpreter; one that is too old answers no."""
    for name in ("Makefile", "requirements.txt", "constraints.txt", "pyproject.toml"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    old = tmp_path / "python3.9"
    check = "import sys; sys.version_info = (3, 9, 1, 'final', 0); exec(sys.argv[1])"
    old.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{check}" "$2"\n')
    old.chmod(0o755)
    result = subprocess.run(
        ["make", "install", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert result.returncode == 2 and len(lines) == 1
    assert "needs Python 3.11, 3.12 or 3.13" in lines[0] and "PYTHON=python3.11" in lines[0]
    assert not (tmp_path / ".venv").exists()


def test_no_permission_to_write(tmp_path, photo, checkpoint) -> None:
    np.save(tmp_path / "depth.npy", np.ones((60, 80)))
    place = tmp_path / "locked"
    place.mkdir(mode=0o555)
    with pytest.MonkeyPatch.context() as patch:
        if os.geteuid() == 0:  # root may write everywhere
            patch.setattr(stages.os, "access", lambda *arguments, **options: False)
        with pytest.raises(InputError, match="locked: you may not write here; give another"):
            create([photo], place / "out", checkpoint=checkpoint, depth=tmp_path / "depth.npy")
