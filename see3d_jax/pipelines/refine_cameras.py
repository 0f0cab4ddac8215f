"""Better cameras for photos whose cameras are nearly right: SIFT tracks and bundle adjustment.

Photos are matched with their neighbours, what fits one motion of the camera is followed through
the views, and `geometry.bundle` moves cameras and points until they agree. Cameras that agree with
the photos already stay exactly as they were given: adjusting them would only add noise.
The cameras of held-out photos are found afterwards among fixed ones: what is held out has no
influence on the others.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from see3d_jax.geometry.bundle import Tracks, adjust
from see3d_jax.geometry.cameras import Camera
from see3d_jax.pipelines.matching import Features, Matches, match_features, sift_features, verified

_NEIGHBOURS = 10  # views that each view is matched with
_FEWEST_POINTS = 50  # followed through the views; with fewer, cameras stay as given
_ENOUGH_POINTS = 500  # of each view: those that most views see
# Distances must fall to less than this share of what they were, or the given cameras stay.
_BETTER = 0.9
# Pixels: cameras that agree so well are right as far as points can tell.
_AGREE = 0.4


@dataclasses.dataclass(frozen=True)
class RefinedCameras:
    """What became of V cameras.

    Attributes:
      poses: [V, 4, 4] float32 world→camera.
      moved: whether the given ones were improved upon; else `poses` are these.
      points: how many points were followed through the training views.
      before, after: median distance of sightings from their points in pixels of the given images,
        with the given and the refined cameras, in the worst training view; None without points.
    """

    poses: np.ndarray
    moved: bool
    points: int
    before: float | None
    after: float | None

    def report(self) -> dict[str, bool | int | float | None]:
        """For metrics.json."""
        pixels = {"pixels_before": self.before, "pixels_after": self.after}
        return {
            "moved": self.moved,
            "points": self.points,
            **{
                name: None if value is None or np.isinf(value) else round(value, 4)
                for name, value in pixels.items()
            },
        }


def refine_cameras(
    images: list[np.ndarray],
    cameras: list[Camera],
    masks: list[np.ndarray | None],
    held_out: np.ndarray,
    scene_size: float,
) -> RefinedCameras:
    """Poses of all V views from what their photos have in common.

    Args:
      images: V photos, uint8 [H, W, 3].
      cameras: of the same sizes; intrinsics stay as they are.
      masks: per view [H, W] bool, True = the photo shows the scene there, or None.
      held_out: [V] bool; these views only find their own camera.
      scene_size: typical distance from cameras to content.
    """
    given = np.stack([np.asarray(camera.world_to_camera, np.float64) for camera in cameras])
    intrinsics = np.stack([np.asarray(camera.intrinsics, np.float64) for camera in cameras])
    features = [
        _masked(sift_features(image), mask) for image, mask in zip(images, masks, strict=True)
    ]
    matches = {
        (i, j): verified(match_features(features[i], features[j]))
        for i, j in neighbours(given, _NEIGHBOURS)
    }
    tracks = longest(follow(matches, ~held_out), _ENOUGH_POINTS)
    count = int(tracks.points.max(initial=-1)) + 1
    if count < _FEWEST_POINTS:
        return RefinedCameras(given.astype(np.float32), False, count, None, None)
    found = adjust(intrinsics, given, tracks, scene_size)
    moved = found.before > _AGREE and found.after < _BETTER * found.before
    poses = found.poses if moved else given
    if moved and held_out.any():
        every = longest(follow(matches, np.ones_like(held_out)), _ENOUGH_POINTS, held_out)
        if len(every):
            poses = adjust(intrinsics, poses, every, scene_size, held_out).poses
    return RefinedCameras(poses.astype(np.float32), moved, count, found.before, found.after)


def _masked(features: Features, mask: np.ndarray | None) -> Features:
    if mask is None:
        return features
    columns, rows = features.pixels.astype(int).T
    return features[mask[rows.clip(0, mask.shape[0] - 1), columns.clip(0, mask.shape[1] - 1)]]


def neighbours(poses: np.ndarray, number: int) -> list[tuple[int, int]]:
    """Pairs i < j of views in which one is among the `number` nearest of the other.

    Of cameras that look within 60° of each other; poses [V, 4, 4].
    """
    eyes = -np.einsum("vji,vj->vi", poses[:, :3, :3], poses[:, :3, 3])
    distance = np.linalg.norm(eyes[:, None] - eyes, axis=-1)
    distance[poses[:, 2, :3] @ poses[:, 2, :3].T < 0.5] = np.inf
    np.fill_diagonal(distance, np.inf)
    pairs = set()
    for view, row in enumerate(distance):
        for other in np.argsort(row, kind="stable")[:number]:
            if np.isfinite(row[other]):
                pairs.add((min(view, int(other)), max(view, int(other))))
    return sorted(pairs)


def follow(matches: dict[tuple[int, int], Matches], used: np.ndarray) -> Tracks:
    """Points followed through the views of which `used` [V] is True.

    Matches that share a spot in a view see one point. A point that would be in two spots of a view
    at once is several that were taken for one, and is left out.
    """
    ends = [
        (view, pixels)
        for pair, found in matches.items()
        if used[list(pair)].all()
        for view, pixels in zip(pair, (found.first, found.second), strict=True)
    ]
    if not sum(len(pixels) for _, pixels in ends):
        return Tracks(np.zeros(0, int), np.zeros(0, int), np.zeros((0, 2)))
    spots = np.concatenate([
        np.column_stack([np.full(len(pixels), view), pixels.astype(np.float64)])
        for view, pixels in ends
    ])  # fmt: skip
    spots, index = np.unique(spots, axis=0, return_inverse=True)
    pieces = np.split(index.reshape(-1), np.cumsum([len(pixels) for _, pixels in ends])[:-1])
    first, second = np.concatenate(pieces[::2]), np.concatenate(pieces[1::2])
    graph = coo_array((np.ones(len(first)), (first, second)), shape=(len(spots),) * 2)
    _, point = connected_components(graph, directed=False)
    # By point and view: a pair that comes twice is a contradiction.
    views = spots[:, 0].astype(int)
    _, where, times = np.unique(
        np.column_stack([point, views]), axis=0, return_inverse=True, return_counts=True
    )
    bad = np.unique(point[times[where.reshape(-1)] > 1])
    return _chosen(Tracks(views, point, spots[:, 1:]), ~np.isin(point, bad))


def longest(tracks: Tracks, number: int, views: np.ndarray | None = None) -> Tracks:
    """The points that are, in some view, among the `number` seen by most views.

    `views` [V] bool: only what these see is asked for; by default all.
    """
    length = np.bincount(tracks.points)
    keep = np.zeros(len(length), bool)
    for view in np.unique(tracks.views) if views is None else np.nonzero(views)[0]:
        seen = tracks.points[tracks.views == view]
        keep[seen[np.argsort(-length[seen], kind="stable")[:number]]] = True
    return _chosen(tracks, keep[tracks.points])


def _chosen(tracks: Tracks, kept: np.ndarray) -> Tracks:
    """The sightings of a mask, their points numbered anew."""
    _, numbers = np.unique(tracks.points[kept], return_inverse=True)
    return Tracks(tracks.views[kept], numbers.reshape(-1), tracks.pixels[kept])
