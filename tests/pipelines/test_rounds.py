"""Rounds of generation, with an oracle in the model's place: it fills holes with the truth.

What is left to go wrong is the pipeline's own part: anchors, depth, alignment, warps, masks.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
from conftest import synthetic_scene

from benchmarks.loop import distorted, judge, oracle_rounds, summary, true_views
from see3d_jax.geometry.cameras import Camera, intrinsics_matrix, look_at, stack
from see3d_jax.pipelines import rounds as rounds_module
from see3d_jax.pipelines.coverage import choose_anchors
from see3d_jax.pipelines.inputs import load_depth, load_images, load_scene
from see3d_jax.pipelines.matched_depth import keypoint_depths
from see3d_jax.pipelines.rounds import Round, trusted_depth, warp_round
from see3d_jax.pipelines.warps import View, resize_depth, warp_references

FRAMES = 9


@pytest.fixture(scope="module")
def views(tmp_path_factory) -> tuple[View, ...]:
    """A textured room, seen by nine cameras, with exact depth."""
    scene = load_scene(synthetic_scene(tmp_path_factory.mktemp("synthetic"), FRAMES, 96, 64))
    images, cameras = load_images(scene)
    depths = [load_depth(scene, i) for i in range(FRAMES)]
    return tuple(View(*parts) for parts in zip(images, depths, cameras, strict=True))


def cameras_of(views: tuple[View, ...]) -> Camera:
    return stack([view.camera for view in views])


def run_oracle(targets: tuple[View, ...], references: list[View], **options) -> list[Round]:
    return oracle_rounds(references, list(targets), **{"views_per_round": 2, **options})


def test_an_oracle_loop_does_not_drift_and_anchors_close_holes(views) -> None:
    targets, references = views[1:], [views[0]]
    rounds = run_oracle(targets, references)
    figures = summary([judge(done, references, list(targets)) for done in rounds])
    assert figures["drift_db"] < 1 and figures["wrong_surface_fraction"] < 0.01
    last = rounds[-1].report
    assert last["anchors"] and last["known_share"] > last["known_by_references"] + 0.05
    assert rounds[0].report["anchors"] == []
    # Distorted depth was brought back: what the warp did not know has the true depth now.
    done = rounds[0]
    holes = ~done.masks[1] & (done.trusted[1] > 0)
    error = np.abs(done.trusted[1] / np.maximum(targets[1].depth, 1e-6) - 1)[holes]
    assert holes.any() and np.median(error) < 0.03


@pytest.mark.slow
@pytest.mark.parametrize("depth", ["exact", "curve"])
def test_an_orbit_of_24_views_drifts_by_less_than_1_db(shared, depth) -> None:
    first, *targets = true_views(shared / "data/rendered/room", 24, 240)
    rounds = oracle_rounds([first], targets, 4, depth)
    figures = summary([judge(done, [first], targets) for done in rounds])
    assert figures["drift_db"] < 1 and figures["first_minus_last_db"] < 1
    assert figures["wrong_surface_fraction"] < 0.005
    # ... and not because nothing is known any more
    assert min(row["known"] for row in figures["rounds"]) > 0.45


def test_nothing_is_known_through_space_that_nobody_has_seen(views) -> None:
    """A wall seen past the side of a box, where only the wall was photographed."""
    height, width = views[0].depth.shape
    k = intrinsics_matrix(80, 80, width / 2, height / 2)
    cameras = [
        Camera(k, look_at(eye, (0, 0, 3)), width, height) for eye in ((0, 0, 0), (2.5, 0, 1.5))
    ]
    depth = np.full((height, width), 4.0, np.float32)
    depth[22:42, 36:60] = 2.0
    front = View(views[0].image, depth, cameras[0])
    target = stack(cameras[1:])
    _, known, depths, _ = warp_round([front], [], target)
    _, drawn, _ = warp_references([front], target)
    assert known.sum() < drawn.sum() and not (known & ~drawn).any()
    # The other side's picture of the space behind the box makes it known that nothing is there.
    aside = View(views[1].image, depths[0] * 0 + 3.0, cameras[1], np.zeros((height, width), bool))
    _, more, _, _ = warp_round([front], [aside], target)
    assert more.sum() > known.sum()


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


def test_matches_tie_depth_where_the_warp_says_nothing(tmp_path) -> None:
    """Eq. 4: depth that is bent differently in every view comes back in the holes, too."""
    scene = load_scene(synthetic_scene(tmp_path, 4, 240, 160, supersample=1))
    images, cameras = load_images(scene)
    depths = [load_depth(scene, i) for i in range(4)]
    views = [View(*parts) for parts in zip(images, depths, cameras, strict=True)]
    noise = np.random.default_rng(0).integers(0, 256, images[0].shape, np.uint8)
    strange = dataclasses.replace(views[0], image=noise)
    keypoints = keypoint_depths(views[1:3], [views[0], views[3], strange])
    view, points = views[1], keypoints[0]
    valid = np.asarray(points.depths.valid) > 0
    column, row = np.asarray(points.pixels)[valid].astype(int).T
    true = view.depth[row, column]
    error = np.abs(np.asarray(points.depths.depth)[valid] / true - 1)
    claimed = np.asarray(points.depths.deviation)[valid]
    assert (claimed < 0.02).sum() > 40 and np.median(error[claimed < 0.02]) < 0.01
    assert 0.3 < np.median(error / claimed) < 1.5  # a Gaussian has 0.67
    support = np.asarray(points.depths.support)
    assert support[:3, valid].sum() > 1.5 * valid.sum() and support[3].sum() < 3

    mask = np.zeros(view.depth.shape, bool)
    mask[:, :80] = True
    warp_depth = np.where(mask, view.depth, 0)
    estimate = distorted(view.depth, bent=True)
    errors = []
    for matched in (None, points):
        trusted, report = trusted_depth(
            view.image, view.image, mask, warp_depth, estimate, False, matched
        )
        errors.append(np.median(np.abs(trusted / view.depth - 1)[~mask]))
        assert report["keypoints"] >= 1024
    assert errors[1] < 0.01 < 2 * errors[1] < errors[0], errors


def test_depth_keeps_planes_and_edges_when_resized() -> None:
    def plane(width: int, height: int) -> np.ndarray:
        y, x = np.mgrid[:height, :width] + 0.5
        return (1 / (0.3 + 0.1 * x / width - 0.05 * y / height)).astype(np.float32)

    depth = plane(48, 36)
    for size in ((24, 18), (48, 36), (64, 50)):
        inside = slice(2, -2)
        np.testing.assert_allclose(
            resize_depth(depth, *size)[inside, inside], plane(*size)[inside, inside], rtol=1e-5
        )
    depth[:, 20:] += 3
    depth[7] = 0
    depth[9, 3] = np.nan
    resized = resize_depth(depth, 31, 23)
    near, far = resized[:, :12], resized[:, 14:]
    assert near.max() < 5 < far[far > 0].min() and np.isfinite(resized).all()
    assert (resized == 0).any() and (resized == 0).mean() < 0.1


def test_a_walk_that_leaves_the_first_view_keeps_its_memory(monkeypatch) -> None:
    """Sideways along an endless wall: every round stands on the last, and old views are let go."""
    height, width, step = 32, 48, 0.5
    k = intrinsics_matrix(40, 40, width / 2, height / 2)
    depth = np.full((height, width), 4.0, np.float32)

    def view(number: int) -> View:
        pose = np.eye(4, dtype=np.float32)
        pose[0, 3] = -step * number
        column = (np.arange(width) + 0.5 - width / 2) / 40 * 4 + step * number
        row = (np.arange(height) + 0.5 - height / 2) / 40 * 4
        colour = 128 + 80 * np.sin(3 * column)[None, :, None] * np.cos(4 * row)[:, None, None]
        image = np.repeat(colour, 3, -1).astype(np.uint8)
        return View(image, depth, Camera(k, pose, width, height))

    monkeypatch.setattr(rounds_module, "_CANDIDATES", 6)
    seen, choose = [], rounds_module.choose_anchors

    def counted(references, candidates, *rest):
        seen.append(len(candidates))
        return choose(references, candidates, *rest)

    monkeypatch.setattr(rounds_module, "choose_anchors", counted)
    targets = [view(number) for number in range(1, 25)]
    rounds = oracle_rounds([view(0)], targets, 4)
    assert max(seen) == 6  # not 20: views at work do not grow with the path
    figures = [judge(done, [view(0)], targets) for done in rounds]
    assert figures[0]["by_reference"] > 0.5 and figures[-1]["by_reference"] == 0
    for done, row in zip(rounds[1:], figures[1:], strict=True):
        assert done.report["anchors"] and row["known"] > 0.5
        assert row["psnr"] > 30 and row["wrong_surface"] < 0.01
