import numpy as np
import pytest
from curate_scenes import make, rotated, scene

from data_prep.dynamics import choose_pairs, dynamic_mask, frame_score
from data_prep.flow import flow_pair
from data_prep.tracking import follow_points


def grays(frames):
    return np.stack([frame[..., 1] for frame in frames])


def worst(frames, travels):
    stack = grays(frames)
    pairs = choose_pairs(follow_points(stack), np.arange(len(stack)) / 12, 4)
    masks = [dynamic_mask(np.stack(frames), pair, travels, seed=0) for pair in pairs]
    return float(np.mean([mask.score for mask in masks])), masks


@pytest.mark.parametrize(
    "whole, centre, score",
    [(0.5, 0.5, 2), (0.2, 0.25, 1.5), (0.2, 0.0, 1), (0.06, 0, 0.5), (0.01, 0.15, 0.5), (0, 0, 0)],
)
def test_frame_score_table(whole, centre, score):
    assert frame_score(whole, centre) == score


def test_rigid_parallax_is_not_dynamic():
    score, masks = worst(make("parallax"), travels=True)
    assert score < 0.25 and max(mask.whole for mask in masks) < 0.05


def test_an_object_moving_by_itself_is():
    score, masks = worst(make("mover"), travels=True)
    assert score >= 0.25
    hit = max(masks, key=lambda mask: mask.whole)
    assert hit.whole > 0.05


@pytest.mark.parametrize("turning", [False, True])
def test_a_mover_before_a_standing_or_turning_camera_is_found(turning):
    count = 10
    steps = np.linspace(0, 1, count)
    frames = [scene(0, (90 * s, 40 + 60 * s)) for s in steps]
    if turning:
        frames = [rotated(frame, 6 * s) for frame, s in zip(frames, steps, strict=True)]
    score, _ = worst(frames, travels=False)
    assert score >= 0.25


def test_flow_is_trusted_where_it_closes_the_loop_only():
    flow = flow_pair(scene(0), scene(0.04), 0.5)
    assert 0.5 < flow.consistent.mean() < 0.999  # disocclusions beside the blocks are left out
    noise = np.random.default_rng(0).integers(0, 255, (2, 120, 160, 1), np.uint8)
    noise = np.repeat(noise, 3, axis=-1)
    assert flow_pair(noise[0], noise[1], 0.5).consistent.mean() < 0.3


def test_masks_are_repeatable_and_pairs_stay_inside_the_clip():
    frames = np.stack(make("parallax", 8))
    pairs = choose_pairs(follow_points(grays(frames)), np.arange(8) / 12, 6)
    assert all(0 <= a < 8 and 0 <= b < 8 and a != b for a, b in pairs)
    first, second = (dynamic_mask(frames, pairs[0], True, seed=5) for _ in range(2))
    np.testing.assert_array_equal(first.mask, second.mask)
