"""Rounds of generation, with an oracle in the model's place: it fills holes with the truth.

What is left to go wrong is the pipeline's own part: anchors, depth, alignment, warps, masks.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest

from data_prep.synthetic import make_clip
from see3d_jax.evaluation.metrics import psnr
from see3d_jax.geometry.cameras import Camera, stack
from see3d_jax.pipelines.coverage import choose_anchors
from see3d_jax.pipelines.inputs import load_depth, load_images, load_scene
from see3d_jax.pipelines.rounds import (
    DepthEstimator,
    Round,
    run_rounds,
    trusted_depth,
    warp_round,
)
from see3d_jax.pipelines.warps import View

FRAMES = 9


@pytest.fixture(scope="module")
def views(tmp_path_factory) -> tuple[View, ...]:
    """A textured room, seen by nine cameras, with exact depth."""
    settings = {
        "seed": 5, "frames": FRAMES, "width": 96, "height": 64, "fps": 10.0, "supersample": 2,
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("synthetic")
    make_clip(folder, 0, settings)
    scene = load_scene(folder / "scenes" / "clip_00000")
    images, cameras = load_images(scene)
    depths = [load_depth(scene, i) for i in range(FRAMES)]
    return tuple(View(*parts) for parts in zip(images, depths, cameras, strict=True))


def cameras_of(views: tuple[View, ...]) -> Camera:
    return stack([view.camera for view in views])


def distorted(depth: np.ndarray) -> np.ndarray:
    """What a monocular network might say: another scale, and not linear in depth."""
    return np.where(depth > 0, 3.0 * np.maximum(depth, 1e-6) ** 0.9, 0).astype(np.float32)


def run_oracle(targets: tuple[View, ...], references: list[View], **options) -> list[Round]:
    def fill(number, anchors, indices, warps, masks):
        truth = np.stack([targets[i].image for i in indices])
        return np.where(masks[..., None], warps, truth)

    def estimate(new, existing):
        known = {np.asarray(v.camera.world_to_camera).tobytes(): v.depth for v in targets}
        return np.stack(
            [distorted(known[np.asarray(v.camera.world_to_camera).tobytes()]) for v in new]
        )

    options.setdefault("fill", fill)
    options.setdefault("estimator", DepthEstimator(estimate, has_scale=False))
    return run_rounds(references, cameras_of(targets), **{"views_per_round": 2, **options})


def known_psnr(warps: np.ndarray, masks: np.ndarray, truth: np.ndarray) -> float:
    """Over the known pixels of all views [m, h, w, 3] together."""
    flat = [v.reshape(-1, *v.shape[2:]) / np.float32(255) for v in (warps, truth)]
    return float(psnr(*flat, masks.reshape(flat[0].shape[:2])))


def drift(rounds: list[Round], targets: tuple[View, ...], references: list[View]) -> list[float]:
    """dB that each round's known pixels lose against the same warp from anchors that are true.

    Both warps go the same way, so that what is left is what the loop itself did to the anchors:
    the views and depths that it made instead of the true ones.
    """
    lost = []
    for done in rounds:
        indices = done.report["views"]
        anchors = [targets[i] for i in done.report["anchors"]]
        cameras = cameras_of(tuple(targets[i] for i in indices))
        warps, masks, _, _ = warp_round(references, anchors, cameras)
        truth = np.stack([targets[i].image for i in indices])
        ideal = known_psnr(warps, masks, truth)
        lost.append(ideal - known_psnr(done.warps, done.masks, truth))
    return lost


def test_an_oracle_loop_hardly_drifts_and_anchors_close_holes(views) -> None:
    targets = views[1:]
    rounds = run_oracle(targets, [views[0]], views_per_round=4)
    assert max(drift(rounds, targets, [views[0]])) < 1.5  # dB; see docs for a long orbit
    last = rounds[-1].report
    assert last["anchors"] and last["known_share"] > last["known_by_references"] + 0.05
    assert rounds[0].report["anchors"] == []
    # Distorted depth was brought back: what the warp did not know has the true depth now.
    done = rounds[0]
    holes = ~done.masks[1] & (done.trusted[1] > 0)
    error = np.abs(done.trusted[1] / np.maximum(targets[1].depth, 1e-6) - 1)[holes]
    assert holes.any() and np.median(error) < 0.03


class Killed(BaseException):
    """Like a signal: nothing in the pipeline may catch it."""


def test_a_killed_run_goes_on_after_its_last_whole_round(views, tmp_path) -> None:
    targets, calls = views[1:7], []

    def fill(number, anchors, indices, warps, masks, dies_at=None):
        if number == dies_at:
            raise Killed
        calls.append(number)
        noise = np.random.default_rng(number).integers(0, 9, warps.shape, np.uint8)
        truth = np.stack([targets[i].image for i in indices])
        return np.where(masks[..., None], warps, truth // 2 + noise)

    whole = run_oracle(targets, [views[0]], fill=fill)
    calls.clear()
    with pytest.raises(Killed):
        run_oracle(
            targets, [views[0]], fill=functools.partial(fill, dies_at=2), folder=tmp_path,
        )  # fmt: skip
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000.npz", "00001.npz"]
    (tmp_path / "00001.npz").write_bytes((tmp_path / "00001.npz").read_bytes()[:100])  # torn
    calls.clear()
    resumed = run_oracle(targets, [views[0]], fill=fill, folder=tmp_path)
    assert calls == [1, 2]
    for mine, other in zip(whole, resumed, strict=True):
        assert mine.report == other.report
        for name in ("generated", "warps", "masks", "depths", "trusted"):
            np.testing.assert_array_equal(getattr(mine, name), getattr(other, name))
    # Other settings, or another reference: nothing of this run is taken.
    for reference, settings in ((views[0], {"seed": 1}), (views[8], {})):
        calls.clear()
        run_oracle(targets, [reference], fill=fill, folder=tmp_path, settings=settings)
        assert calls == [0, 1, 2]


def test_anchors_are_those_that_show_what_is_missing(views) -> None:
    first, last = views[0], views[-1]
    targets = cameras_of(views[-2:])
    blind = View(last.image, np.zeros_like(last.depth), last.camera)
    assert choose_anchors([first], [blind, first, last], targets, 3)[:1] == [2]
    assert choose_anchors([first], [blind, first], targets, 3) == []  # nothing is added
    assert choose_anchors([first], [last, last], targets, 1) == [1]  # the later of equals
    assert choose_anchors([first], [], targets, 3) == []


def test_references_win_over_anchors_that_show_the_same_surface(views) -> None:
    wrong = View(255 - views[0].image, views[0].depth, views[0].camera)
    targets = cameras_of(views[1:3])
    alone, masks, _, _ = warp_round([views[0]], [], targets)
    both, more, _, by_reference = warp_round([views[0]], [wrong], targets)
    np.testing.assert_array_equal(both, alone)
    np.testing.assert_array_equal(more, masks)
    np.testing.assert_array_equal(by_reference, masks)
    # ... but a surface clearly in front of the reference's is not overpainted.
    near = View(wrong.image, wrong.depth * 0.5, wrong.camera)
    hidden, _, depths, _ = warp_round([views[0]], [near], cameras_of(views[:1]))
    covered = np.abs(depths[0] / np.maximum(near.depth, 1e-6) - 1) < 1e-3
    assert covered.mean() > 0.5
    assert np.abs(hidden[0][covered].astype(int) - wrong.image[covered]).mean() < 2


def test_pixels_that_disagree_are_not_warped_on(views) -> None:
    image, depth = views[3].image, views[3].depth
    mask = depth > 0
    mask[:, 60:] = False
    warp, warp_depth = np.where(mask[..., None], image, 0), np.where(mask, depth, 0)
    judge = functools.partial(trusted_depth, has_scale=False)

    good, report = judge(image, warp, mask, warp_depth, distorted(depth))
    assert report["rejected_share"] < 0.05 and report["holes_with_depth"] > 0.9
    repainted = image.copy()
    repainted[10:30, 10:30] = 255 - repainted[10:30, 10:30] // 2
    some, report = judge(repainted, warp, mask, warp_depth, distorted(depth))
    assert (some[14:26, 14:26] > 0).mean() < 0.1 and some[40:60, 10:50].any()
    moved = distorted(depth)
    moved[10:30, 10:30] *= 1.5
    some, _ = judge(image, warp, mask, warp_depth, moved)
    assert (some[10:30, 10:30] > 0).mean() < 0.3 < (good[10:30, 10:30] > 0).mean()
    # A picture that has nothing of the warp is no anchor at all.
    other, report = judge(255 - image, warp, mask, warp_depth, distorted(depth))
    assert report["rejected_share"] > 0.5 and not other.any()
    # All holes: depth without a scale cannot be placed, stereo can; NaN is unknown.
    nothing = np.zeros_like(mask)
    empty = np.zeros_like(image), nothing, np.zeros_like(depth)
    assert not judge(image, *empty, depth)[0].any()
    nan = np.where(np.arange(96) < 48, depth, np.nan)
    placed, report = trusted_depth(image, *empty, nan, has_scale=True)
    np.testing.assert_array_equal(placed, np.where(np.arange(96) < 48, depth, 0))
    assert report["keypoints"] == 0
