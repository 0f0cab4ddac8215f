"""Super-resolution: groups, what is carried from one to the next, and whose mask is whose."""

from __future__ import annotations

import types

import numpy as np
import pytest

from see3d_jax.diffusion.sampler import SamplerConfig
from see3d_jax.errors import InputError
from see3d_jax.pipelines import superres as module
from see3d_jax.pipelines.pretrained import See3DModel
from see3d_jax.pipelines.superres import enlarge_views, load_superres


def _model(views: int, form: str = "clean") -> See3DModel:
    parts = dict.fromkeys(("unet", "params", "codec", "schedule"))
    sampling = SamplerConfig(weight_form=form)
    return See3DModel(name="", image_size=8, views=views, sampling=sampling, **parts)


@pytest.fixture
def calls(monkeypatch) -> list[types.SimpleNamespace]:
    """Stands in for the network: returns the coarse views one brighter, and keeps what it got."""
    kept = []

    def sample_groups(model, given, warps, masks, seed, first):
        kept.append(types.SimpleNamespace(**locals()))
        return warps + 1

    monkeypatch.setattr(module, "sample_groups", sample_groups)
    return kept


def test_every_group_sees_the_references_and_the_last_two_of_the_group_before(calls) -> None:
    views = np.arange(7, dtype=np.uint8)[:, None, None, None].repeat(4, 1).repeat(6, 2).repeat(3, 3)
    references = np.full((1, 8, 12, 3), 99, np.uint8)
    result = enlarge_views(_model(6), references, views, None, 0)
    assert result.shape == (7, 8, 12, 3)
    np.testing.assert_array_equal(result[:, 0, 0, 0], np.arange(7) + 1)
    assert [call.warps[:, 0, 0, 0].tolist() for call in calls] == [[0, 1, 2], [3, 4, 5], [4, 5, 6]]
    assert [call.given[:, 0, 0, 0].tolist() for call in calls] == [
        [99, 99, 99],
        [99, 2, 3],
        [99, 5, 6],
    ]
    assert all(call.model.views == 6 and call.masks.all() for call in calls)
    assert len({call.first for call in calls}) == 3  # noise of its own


def test_every_view_keeps_its_own_mask(calls) -> None:
    rng = np.random.default_rng(0)
    views = rng.integers(0, 200, (5, 4, 6, 3), np.uint8)
    masks = rng.random((5, 4, 6)) < 0.5
    enlarge_views(_model(5), np.zeros((2, 8, 12, 3), np.uint8), views, masks, 0)
    for call in calls:
        for warp, mask in zip(call.warps, call.masks, strict=True):
            (number,) = (
                i for i, m in enumerate(masks) if np.array_equal(m.repeat(2, 0).repeat(2, 1), mask)
            )
            assert np.abs(warp[::2, ::2].astype(int) - views[number]).mean() < 30


def test_a_model_too_small_to_carry_anything_still_works(calls) -> None:
    views = np.zeros((3, 4, 4, 3), np.uint8)
    result = enlarge_views(_model(2), np.zeros((2, 8, 8, 3), np.uint8), views, None, 0)
    assert len(result) == 3 and [len(call.given) for call in calls] == [2, 2, 2]


def test_wrong_sizes_and_wrong_weights_are_named(monkeypatch, tmp_path) -> None:
    views = np.zeros((3, 4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match=r"references \[R, 8, 8, 3\]"):
        enlarge_views(_model(4), views, views, None, 0)
    monkeypatch.setattr(module, "load_model", lambda folder, **options: _model(4, "code"))
    with pytest.raises(InputError, match="not trained for super-resolution"):
        load_superres(tmp_path, "ddim")


def test_released_weights_give_their_super_resolution_network(monkeypatch, tmp_path) -> None:
    asked = []

    def load_model(folder, **options):
        asked.append(options["unet"])
        return _model(16)

    monkeypatch.setattr(module, "load_model", load_model)
    model, wants_masks = load_superres(tmp_path, "ddim")
    assert (model.views, wants_masks) == (16, False)
    (tmp_path / "release.json").write_text("{}")
    model, wants_masks = load_superres(tmp_path, "ddim")
    assert (model.views, wants_masks) == (8, True) and asked == [None, "SR"]
