"""Folders of the official layout: what is known stays known, and what is wrong is named."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

from see3d_jax import cli
from see3d_jax.errors import InputError
from see3d_jax.media import read_image, write_image
from see3d_jax.pipelines import ready_warps
from see3d_jax.pipelines.ready_warps import fill_ready_warps, load_ready_warps


@pytest.fixture
def folder(tmp_path):
    """Two warps of 96 × 48, known in their left half."""
    root = tmp_path / "official"
    write_image(root / "reference_images/0.jpg", np.full((60, 80, 3), 200, np.uint8))
    for name in ("a", "b"):
        picture = np.full((48, 96, 3), 90, np.uint8)
        mask = np.zeros((48, 96), np.uint8)
        mask[:, :48] = 255
        write_image(root / f"warp_images/warp_{name}.png", picture)
        write_image(root / f"warp_images/mask_{name}.png", mask)
    return root


@pytest.fixture
def model(monkeypatch):
    """A model that paints every hole white, and remembers what it was given."""
    seen = SimpleNamespace(composite=False, name="white", image_size=64, size_multiple=8,
                           sampling=SimpleNamespace(guidance=2.0, num_steps=25))  # fmt: skip

    def fill(_, given, warps, masks, *rest):
        seen.given, seen.warps, seen.masks = given, warps, masks
        return np.full_like(warps, 255)

    seen.sampled_with = lambda steps, guidance: seen
    monkeypatch.setattr(ready_warps, "load_model", lambda *_, **options: seen)
    monkeypatch.setattr(ready_warps, "sample_groups", fill)
    return seen


def test_warps_are_filled_at_their_own_aspect(folder, model, tmp_path):
    result = CliRunner().invoke(
        cli.app, ["generate", "--input", str(folder), "--checkpoint", "x", "--composite",
                  "--output", str(tmp_path / "out")],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert model.given.shape == (1, 48, 88, 3) and model.warps.shape == (2, 48, 88, 3)
    assert model.masks[:, :, :43].all() and not model.masks[:, :, 44:].any()
    assert not model.warps[~model.masks].any()  # holes are black, whatever the file shows there
    view = read_image(tmp_path / "out/views/a.png")
    assert (view[:, :43] == 90).all() and (view[:, 44:] == 255).all()
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "views", "generated", "warps", "masks", "contact_sheet.png", "video.mp4", "run.json",
    }  # fmt: skip


def test_options_without_meaning_are_refused(folder, model, tmp_path):
    result = CliRunner().invoke(
        cli.app, ["generate", "--input", str(folder), "--checkpoint", "x", "--trajectory", "orbit",
                  "--output", str(tmp_path / "out")],
    )  # fmt: skip
    assert result.exit_code == 2 and "--trajectory has no meaning" in result.output


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda f: shutil.rmtree(f / "reference_images"), "reference_images: no such folder"),
        (lambda f: (f / "reference_images/0.jpg").unlink(), "holds no picture; a reference"),
        (lambda f: (f / "warp_images/mask_b.png").unlink(), "warp_b.png: has no mask; mask_b"),
        (lambda f: write_image(f / "warp_images/mask_b.png", np.zeros((9, 9))),
         "mask_b.png: 9×9, but its warp is 96×48"),
        (lambda f: [write_image(f / f"warp_images/{k}_b.png", np.zeros((9, 9)))
                    for k in ("warp", "mask")], "warp_b.png: 9×9, but the warps before are 96×48"),
    ],
)  # fmt: skip
def test_broken_folders_are_named(folder, spoil, message):
    spoil(folder)
    with pytest.raises(InputError, match=message):
        load_ready_warps(folder)


def test_without_ready_warps_a_trajectory_is_needed(tmp_path):
    result = CliRunner().invoke(
        cli.app, ["generate", "--input", "x.jpg", "--checkpoint", "x", "--output", str(tmp_path)]
    )
    assert result.exit_code == 2 and "--trajectory" in result.output


def test_from_python_the_model_alone_is_returned(folder, model):
    result = fill_ready_warps(folder, checkpoint="x")
    assert result.names == ("a", "b") and (result.views == 255).all()
    assert result.run["guidance"] == 2.0
