"""Mixtures: each folder gets its share of the rows, and each kind of data its own condition."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from conftest import posed_wall_clip

from see3d_jax.data import records
from see3d_jax.data.examples import ExampleSpec
from see3d_jax.data.held_out import held_out_batch
from see3d_jax.data.mixture import DataSource, Mixture, SkippedClips
from see3d_jax.data.pipeline import BatchMaker, training_batches
from see3d_jax.errors import InputError

SPEC = ExampleSpec(
    sizes=((32, 32),), views=3, references=(1,), stride=(1, 3), hole_range=(0.1, 0.9)
)


@pytest.fixture(scope="module")
def posed_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("posed")
    clips = [posed_wall_clip(f"wall{number}", shift=0.05 + 0.02 * number) for number in range(3)]
    records.write_shards([records.encode(clip) for clip in clips], folder)
    return folder


def mixture(*entries):
    return Mixture(tuple(DataSource(str(path), *rest) for path, *rest in entries), 0)


@pytest.mark.parametrize("share", [0.1, 0.2, 0.6])
def test_every_folder_gets_its_share_of_the_rows(clip_folder, posed_folder, share):
    mixed = mixture((clip_folder, 1 - share, "unposed"), (posed_folder, share, "posed"))
    rows = 4000
    kinds = [mixed.candidates(row, np.random.default_rng((0, row)))[0].kind for row in range(rows)]
    deviation = np.sqrt(share * (1 - share) / rows)
    assert abs(kinds.count("posed") / rows - share) < 4 * deviation


def test_weights_are_relative_and_one_folder_takes_everything(clip_folder, posed_folder):
    three_to_one = mixture((clip_folder, 3, "unposed"), (posed_folder, 1, "posed"))
    np.testing.assert_allclose(three_to_one._upper, [0.75, 1.0])
    alone = mixture((posed_folder, 0.6, "posed"))
    assert alone.candidates(5, np.random.default_rng(5))[0].kind == "posed"


def test_bad_clips_do_not_change_the_shares(clip_folder, tmp_path):
    """A row whose clip is bad takes another of the same folder."""
    good = records.encode(posed_wall_clip("wall", shift=0.1))
    records.write_shards([good, b"garbage", b"garbage", b"garbage"], tmp_path)
    mixed = mixture((clip_folder, 0.5, "unposed"), (tmp_path, 0.5, "posed"))
    maker = BatchMaker(mixed, SPEC, 40, 0)
    warped = maker(0)["warped"]
    kinds = [mixed.candidates(row, np.random.default_rng((0, row)))[0].kind for row in range(40)]
    masked = np.where(maker(0)["mask"] > 0.5, maker(0)["image"], -1)
    posed = [kind == "posed" for kind in kinds]
    assert [not np.array_equal(w, m) for w, m in zip(warped, masked)] == posed


def test_each_kind_has_its_condition(clip_folder, posed_folder):
    mixed = mixture((clip_folder, 0.5, "unposed"), (posed_folder, 0.5, "posed"))
    batch = next(training_batches(mixed, SPEC, 16, seed=0))
    assert batch["warped"].shape == batch["image"].shape
    reference = batch["is_reference"]
    np.testing.assert_array_equal(batch["warped"][reference], batch["image"][reference])
    assert (batch["mask"][reference] == 1).all()
    holes = np.broadcast_to(batch["mask"] < 0.5, batch["warped"].shape)
    assert (batch["warped"][holes] == -1).all()
    known = ~holes & ~reference[:, :, None, None, None]
    exact = [
        np.array_equal(*(batch[k][row][known[row]] for k in ("warped", "image")))
        for row in range(16)
    ]
    assert 4 <= sum(exact) <= 12, "about half of the rows show the target itself"
    error = np.abs(batch["warped"] - batch["image"])[~np.array(exact)][known[~np.array(exact)]]
    assert 0 < np.median(error) < 0.1, "the others show the reference in the right place"


def test_only_unposed_data_carries_no_second_image(clip_folder):
    assert "warped" not in next(training_batches(mixture((clip_folder,)), SPEC, 2, seed=0))


def test_super_resolution_is_conditioned_on_whole_coarse_targets(clip_folder):
    batch = next(training_batches(mixture((clip_folder, 1, "superres")), SPEC, 2, seed=0))
    assert (batch["mask"] == 1).all()
    target = ~batch["is_reference"]
    coarse, fine = batch["warped"][target], batch["image"][target]
    blocks = [x.reshape(-1, 16, 2, 16, 2, 3).mean((2, 4)) for x in (coarse, fine)]
    assert 0.01 < np.abs(coarse - fine).mean() < 0.3
    assert np.abs(blocks[0] - blocks[1]).mean() < 0.4 * np.abs(coarse - fine).mean()


def test_posed_data_needs_poses_and_depth(clip_folder):
    mixed = mixture((clip_folder, 1.0, "posed"))
    with pytest.raises(InputError, match="no depth or no poses"):
        held_out_batch(mixed, SPEC, 2, 0, SkippedClips())
    with pytest.raises(InputError, match="no depth or no poses"):
        next(training_batches(mixed, SPEC, 2, seed=0))


def test_noisy_depth_moves_the_warp_and_exact_depth_does_not(posed_folder):
    def error(noise):
        spec = dataclasses.replace(SPEC, depth_noise=noise)
        batch = BatchMaker(mixture((posed_folder, 1.0, "posed")), spec, 6, 0)(0)
        target = ~batch["is_reference"]
        known = np.broadcast_to(batch["mask"] > 0.5, batch["image"].shape)[target]
        return np.abs(batch["warped"] - batch["image"])[target][known].mean()

    assert error(0.3) > 1.5 * error(0.0)


def test_every_step_has_one_of_the_wanted_shapes_for_all_its_rows(clip_folder):
    spec = dataclasses.replace(SPEC, sizes=((32, 32), (24, 40), (40, 24)))
    maker = BatchMaker(mixture((clip_folder,)), spec, 4, 0)
    shapes = [maker(step)["image"].shape[2:4] for step in range(12)]
    assert set(shapes) == set(spec.sizes)
    part = BatchMaker(mixture((clip_folder,)), spec, 4, 0, rows=(2, 3))
    assert [part(step)["image"].shape[2:4] for step in range(4)] == shapes[:4]


def test_the_first_reference_is_prepared_for_the_image_tower(clip_folder):
    def preprocess(images):
        assert images.dtype == np.uint8 and images.shape == (1, 32, 32, 3)
        return images[:, ::4, ::4].astype(np.float32)

    source = mixture((clip_folder,))
    batch = next(training_batches(source, SPEC, 3, seed=0, preprocess=preprocess))
    expected = np.round((batch["image"][:, 0, ::4, ::4] + 1) * 127.5)
    np.testing.assert_array_equal(batch["clip_pixels"], expected)
    evaluation, _ = held_out_batch(source, SPEC, 2, 0, SkippedClips(), preprocess)
    assert evaluation["clip_pixels"].shape == (2, 8, 8, 3)


@pytest.mark.parametrize("entry", [("a", 0.0, "unposed"), ("a", 1.0, "posing"), ("a", -1.0)])
def test_an_impossible_entry_is_named(entry):
    with pytest.raises(InputError, match=r"config\.data\.mixture: 'a'"):
        DataSource(*entry)


def test_a_mixture_of_a_missing_folder_names_it(clip_folder, tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        mixture((clip_folder,), (tmp_path / "nowhere",))


def test_two_folders_with_the_same_clips_are_walked_in_different_orders(clip_folder):
    folders = mixture((clip_folder,), (clip_folder,))
    orders = [[order[i] for i in range(6)] for order in folders._orders]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(6)) and orders[0] != orders[1]
