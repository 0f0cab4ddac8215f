"""The inspection commands show what is there, good or bad."""

from __future__ import annotations

import pytest
from click.testing import CliRunner
from conftest import moving_crop_clip, posed_wall_clip
from PIL import Image

from see3d_jax.data import records
from tools import inspect_records


def run(*arguments):
    done = CliRunner().invoke(inspect_records.app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.exception
    return done.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records")
    clips = [moving_crop_clip("coffee"), posed_wall_clip("wall", 0.1)]
    records.write_shards([*map(records.encode, clips), b"garbage"], folder)
    return folder


def test_every_record_gets_a_line(folder):
    lines = run("clips", folder).splitlines()
    assert lines[0] == "0: coffee-0: 12 frames of 96×72 from coffee.mp4"
    assert lines[1].endswith("6 frames of 64×48 from wall, posed, depth")
    assert "not a see3d_jax clip record" in lines[2] and lines[3] == "3 records"


@pytest.mark.parametrize("kind", ["unposed", "posed", "superres"])
def test_a_batch_is_drawn(folder, tmp_path, kind):
    path = tmp_path / "batch.png"
    run("batch", folder, "--output", path, "--kind", kind, "--views", 3, "--size", 32)
    assert Image.open(path).height > 6 * 32


def test_masks_are_drawn(tmp_path):
    run("masks", "--output", tmp_path / "masks.png")
    assert Image.open(tmp_path / "masks.png").width > 5 * 112
