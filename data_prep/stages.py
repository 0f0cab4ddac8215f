"""The stage graph: one video file → a verdict with every score, cheapest test first.

    decode and cut → camera motion and parallax (point tracks) → people → non-rigid motion

The paper runs the semantic and the flow stage before the tracks; the set of kept clips is the same
in any order, so the cheap track tests go first and spare most clips the dense flow. Each clip stops
at the first stage that rejects it. All thresholds live in `Settings`; lengths are pixels at 480p.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from data_prep.dynamics import DynamicMask, choose_pairs, dynamic_mask
from data_prep.flow import make_flow_backend
from data_prep.semantic import Detection, detect_over_time, dynamic_class_share, make_detector
from data_prep.tracking import Tracks, follow_points, pair_geometry, track_radii, wide_pairs
from data_prep.video import (
    DecodeError,
    DecodeLimits,
    decode,
    find_shots,
    picture_area,
    split_long,
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that decides; the same settings, seed and file give the same verdict.

    Attributes:
      seed: of the robust estimators.
      semantic: detector, see data_prep.semantic.
      flow: backend, see data_prep.flow.
      max_clip_seconds: longer shots are cut into equal clips.
      min_frames: shorter clips are rejected.
      limits: what decoding one file may cost.
      max_damage: broken places per frame that the decoder may report.
      small_radius, small_share, min_median_radius: paper: reject when more than `small_share` of
        the tracks stay within `small_radius` px and the typical radius is under 5 px.
      still_radius, still_share: points that do not move at all beside others that do betray a
        standing camera in front of a mover. A logo or caption stays below this share.
      min_rigid_share: share of tracks that any rigid motion must explain.
      pair_tolerance: px error of a track under a homography or fundamental matrix.
      min_parallax_share: share of tracks that only an epipolar geometry explains.
      min_turn_residual: px by which a homography must differ from a turning and zooming camera to
        prove that the camera travelled past a flat scene.
      travel_turn_residual, travel_parallax_share: enough of either to allow an epipolar geometry
        in the dynamic stage.
      semantic_frames, max_people_share: frames examined; paper: reject above one half.
      flow_pairs: frame pairs examined per clip.
      min_flow_consistency: share of pixels whose forward and backward flow must agree.
      max_dynamic_score: paper: reject when S ≥ 0.25 N.
    """

    seed: int = 0
    semantic: str = "opencv"
    flow: str = "dis"
    max_clip_seconds: float = 10.0
    min_frames: int = 8
    limits: DecodeLimits = dataclasses.field(default_factory=DecodeLimits)
    max_damage: float = 0.2
    small_radius: float = 20.0
    small_share: float = 0.4
    min_median_radius: float = 5.0
    still_radius: float = 0.7
    still_share: float = 0.15
    min_rigid_share: float = 0.6
    pair_tolerance: float = 1.5
    min_parallax_share: float = 0.08
    min_turn_residual: float = 8.0
    travel_turn_residual: float = 3.0
    travel_parallax_share: float = 0.2
    semantic_frames: int = 7
    max_people_share: float = 0.5
    flow_pairs: int = 12
    min_flow_consistency: float = 0.3
    max_dynamic_score: float = 0.25


STAGES = ("video", "viewpoint", "semantic", "dynamics", "kept")  # in the order they run


@dataclasses.dataclass
class Clip:
    """One clip on its way through the stages; `stage` is the one that decided.

    frames: [F, H, W, 3] uint8 RGB inside the black bars; times: [F] seconds in the source.
    """

    frames: np.ndarray
    times: np.ndarray
    decision: str = "keep"
    stage: str = "kept"
    reason: str = "static scene, moving camera"
    scores: dict[str, float] = dataclasses.field(default_factory=dict)
    tracks: Tracks | None = None
    detections: dict[int, list[Detection]] = dataclasses.field(default_factory=dict)
    masks: list[DynamicMask] = dataclasses.field(default_factory=list)

    def reject(self, stage: str, reason: str) -> bool:
        """Notes the verdict; returns False so that stages can end with it."""
        self.decision, self.stage, self.reason = "reject", stage, reason
        return False


@dataclasses.dataclass
class Verdict:
    """What becomes of one video file: its line in decisions.jsonl and its clips."""

    decision: str
    stage: str
    reason: str
    scores: dict[str, object]
    clips: list[Clip]
    notes: tuple[str, ...] = ()


def judge_video(path: Path, scratch: Path, settings: Settings) -> Verdict:
    """Runs all stages on one file. Frames live in `scratch` as long as the verdict is used."""
    import cv2

    cv2.setNumThreads(1)  # one video per core; also keeps results independent of the core count
    try:
        video = decode(path, scratch, settings.limits)
    except DecodeError as error:
        return Verdict("error", "video", str(error), {}, [])
    if video.damage > settings.max_damage * len(video.frames):
        reason = f"too damaged: {video.damage} broken places in {len(video.frames)} frames"
        return Verdict("error", "video", reason, {"frames": len(video.frames)}, [], video.notes)
    shots = find_shots(video)
    clips = []
    for shot in shots:
        for part in split_long(shot, video.times, settings.max_clip_seconds):
            frames = video.frames[part.start : part.stop]
            rows, columns = picture_area(frames)
            clip = Clip(frames[:, rows, columns], video.times[part.start : part.stop])
            judge_clip(clip, settings)
            clips.append(clip)
    scores: dict[str, object] = {
        "frames": len(video.frames),
        "near_duplicates": video.duplicates,
        "shots": len(shots),
        "clips_kept": sum(clip.decision == "keep" for clip in clips),
    }
    if not clips:
        return Verdict("reject", "video", "only flat frames", scores, [], video.notes)
    furthest = max(clips, key=lambda clip: (STAGES.index(clip.stage), len(clip.frames)))
    reason = furthest.reason
    if furthest.stage == "video" and video.duplicates > len(video.frames):
        reason = "slideshow or still picture"
    scores.update(furthest.scores, thresholds=_thresholds(settings))
    return Verdict(furthest.decision, furthest.stage, reason, scores, clips, video.notes)


def judge_clip(clip: Clip, settings: Settings) -> None:
    """Fills in the verdict of one clip; stops at the first stage that rejects."""
    import cv2

    clip.scores["clip_frames"] = len(clip.frames)
    if len(clip.frames) < settings.min_frames:
        clip.reject("video", "too few different frames")
        return
    grays = np.stack(
        [cv2.cvtColor(np.ascontiguousarray(f), cv2.COLOR_RGB2GRAY) for f in clip.frames]
    )
    _ = (
        _camera_travels(clip, grays, settings)
        and _no_people(clip, settings)
        and _rigid_scene(clip, settings)
    )


def _camera_travels(clip: Clip, grays: np.ndarray, settings: Settings) -> bool:
    tracks = clip.tracks = follow_points(grays)
    radii = track_radii(tracks, settings.seed)
    clip.scores["tracks"] = len(radii)
    if len(radii) < 20:
        return clip.reject("viewpoint", "too few points can be followed")
    median_radius = float(np.median(radii))
    small = float((radii <= settings.small_radius).mean())
    still = float((radii < settings.still_radius).mean())
    clip.scores |= {
        "median_track_radius": round(median_radius, 3),
        "small_track_share": round(small, 4),
        "still_track_share": round(still, 4),
    }
    if small > settings.small_share and median_radius < settings.min_median_radius:
        return clip.reject("viewpoint", "camera hardly moves")
    if still >= settings.still_share:
        return clip.reject("viewpoint", "camera stands while something moves")
    pairs = [
        pair_geometry(tracks, first, second, settings.pair_tolerance, settings.seed)
        for first, second in wide_pairs(tracks)
    ]
    if not pairs:
        return clip.reject("viewpoint", "points are lost too fast")
    rigid = float(np.median([pair.epipolar_share for pair in pairs]))
    parallax = float(np.quantile([pair.parallax_share for pair in pairs], 0.75))
    turn = float(np.quantile([pair.turn_residual for pair in pairs], 0.75))
    clip.scores |= {
        "rigid_track_share": round(rigid, 4),
        "parallax_share": round(parallax, 4),
        "turn_residual": round(turn, 3),
    }
    if rigid < settings.min_rigid_share:
        return clip.reject("viewpoint", "points follow no rigid motion")
    if parallax < settings.min_parallax_share and turn < settings.min_turn_residual:
        return clip.reject("viewpoint", "no parallax: camera only turns or zooms")
    return True


def _no_people(clip: Clip, settings: Settings) -> bool:
    if settings.semantic == "off":
        return True
    detector = make_detector(settings.semantic)
    clip.detections = detect_over_time(clip.frames, detector, settings.semantic_frames)
    share = dynamic_class_share(clip.detections)
    clip.scores["people_share"] = round(share, 4)
    if share > settings.max_people_share:
        return clip.reject("semantic", "people in more than half of the frames")
    return True


def _rigid_scene(clip: Clip, settings: Settings) -> bool:
    travels = (
        clip.scores["turn_residual"] >= settings.travel_turn_residual
        or clip.scores["parallax_share"] >= settings.travel_parallax_share
    )
    backend = make_flow_backend(settings.flow)
    for pair in choose_pairs(clip.tracks, clip.times, settings.flow_pairs):
        clip.masks.append(dynamic_mask(clip.frames, pair, travels, settings.seed, backend))
    consistency = float(np.median([mask.consistent for mask in clip.masks]))
    score = float(np.mean([mask.score for mask in clip.masks]))
    clip.scores |= {
        "flow_consistency": round(consistency, 4),
        "dynamic_score": round(score, 4),
    }
    if consistency < settings.min_flow_consistency:
        return clip.reject("dynamics", "flow cannot be trusted (water, leaves, blur)")
    if score >= settings.max_dynamic_score:
        return clip.reject("dynamics", "something moves in the scene")
    return True


def _thresholds(settings: Settings) -> dict[str, float]:
    names = (
        "min_frames", "small_radius", "small_share", "min_median_radius", "still_radius",
        "still_share", "min_rigid_share", "pair_tolerance", "min_parallax_share",
        "min_turn_residual", "max_people_share", "min_flow_consistency", "max_dynamic_score",
    )  # fmt: skip
    return {name: getattr(settings, name) for name in names}
