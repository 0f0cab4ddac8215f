"""The stage graph: one video file → a verdict with every score, cheapest test first.

    decode and cut → camera motion and parallax (point tracks) → people → non-rigid motion

The paper runs the semantic and the flow stage before the tracks; the set of kept clips is the same
in any order, so the cheap track tests go first and spare most clips the dense flow. Each clip stops
at the first stage after which a rule of data_prep.rules rejects it. Lengths are pixels at 480p.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import numpy as np

from data_prep.dynamics import DynamicMask, choose_pairs, dynamic_mask
from data_prep.flow import make_flow_backend
from data_prep.parallax import PairGeometry, pair_geometry, pair_points, wide_pairs
from data_prep.rules import Thresholds, broken_rule
from data_prep.semantic import (
    Detection,
    detect_over_time,
    dynamic_class_share,
    make_detector,
    settled,
)
from data_prep.track_models import make_tracker
from data_prep.tracking import Tracks, track_radii
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
    """How clips are measured; the same settings, seed and file give the same verdict.

    Attributes:
      seed: of the robust estimators.
      semantic: detector, see data_prep.semantic; a run settles what `auto` means once.
      flow: backend, see data_prep.flow.
      tracker: of points, see data_prep.track_models.
      max_clip_seconds: longer shots are cut into equal clips.
      limits: what decoding one file may cost.
      video_seconds, video_megabytes: what judging one decoded file may cost.
      max_damage: broken places per frame that the decoder may report.
      thresholds: what decides.
      small_radius: tracks within this circle are small.
      still_radius: tracks within this circle do not move at all.
      pair_tolerance: px error of a track under a homography or fundamental matrix.
      travel_turn_residual, travel_parallax_share: enough of either to allow an epipolar geometry
        in the dynamic stage.
      semantic_frames: frames examined per clip.
      flow_pairs: frame pairs examined per clip.
      all_stages: measure everything, also of clips that are rejected already (for calibration).
    """

    seed: int = 0
    semantic: str = "auto"
    flow: str = "dis"
    tracker: str = "lk"
    max_clip_seconds: float = 10.0
    limits: DecodeLimits = dataclasses.field(default_factory=DecodeLimits)
    video_seconds: float = 1800.0
    video_megabytes: int = 8192
    max_damage: float = 0.2
    thresholds: Thresholds = dataclasses.field(default_factory=Thresholds)
    small_radius: float = 20.0
    still_radius: float = 0.7
    pair_tolerance: float = 1.5
    travel_turn_residual: float = 3.0
    travel_parallax_share: float = 0.2
    semantic_frames: int = 7
    flow_pairs: int = 12
    all_stages: bool = False


STAGES = ("video", "viewpoint", "semantic", "dynamics", "kept")  # in the order they run


@dataclasses.dataclass
class Clip:
    """One clip on its way through the stages; `stage` is the one that decided.

    frames: [F, H, W, 3] uint8 RGB inside the black bars; times: [F] seconds in the source;
    seconds: CPU time per stage, kept out of every compared output.
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
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Verdict:
    """What becomes of one video file: its line in decisions.jsonl and its clips."""

    decision: str
    stage: str
    reason: str
    scores: dict[str, object]
    clips: list[Clip]
    notes: tuple[str, ...] = ()

    def stage_seconds(self) -> dict[str, float]:
        """CPU seconds of the clips per stage."""
        return {
            stage: sum(clip.seconds.get(stage, 0.0) for clip in self.clips)
            for stage in STAGES[1:-1]
        }


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
    scores |= {
        **furthest.scores,
        "detector": Path(settled(settings.semantic)).name,
        "thresholds": dataclasses.asdict(settings.thresholds),
    }
    return Verdict(furthest.decision, furthest.stage, reason, scores, clips, video.notes)


def judge_clip(clip: Clip, settings: Settings) -> None:
    """Fills in the scores and verdict of one clip; stops at the first stage that rejects."""
    clip.scores["clip_frames"] = len(clip.frames)
    for stage, measure in {
        "video": lambda clip, settings: None,
        "viewpoint": measure_viewpoint,
        "semantic": measure_people,
        "dynamics": measure_dynamics,
    }.items():
        start = time.process_time()
        measure(clip, settings)
        clip.seconds[stage] = time.process_time() - start
        rule = broken_rule(clip.scores, settings.thresholds)
        if rule is not None and clip.decision == "keep":
            clip.decision, clip.stage, clip.reason = "reject", rule.stage, rule.reason
        if (rule is not None and not settings.all_stages) or len(clip.frames) < 2:
            return


def measure_viewpoint(clip: Clip, settings: Settings) -> None:
    """Point tracks: how far they go, and what geometry explains them."""
    tracks = clip.tracks = make_tracker(settings.tracker)(clip.frames)
    radii = track_radii(tracks, settings.seed)
    clip.scores["tracks"] = len(radii)
    if len(radii) == 0:
        return
    clip.scores |= {
        "median_track_radius": round(float(np.median(radii)), 3),
        "small_track_share": round(float((radii <= settings.small_radius).mean()), 4),
        "still_track_share": round(float((radii < settings.still_radius).mean()), 4),
    }
    if broken_rule(clip.scores, settings.thresholds) is not None and not settings.all_stages:
        return
    pairs = [
        pair_geometry(
            *pair_points(tracks, clip.frames, pair, settings.pair_tolerance, settings.seed),
            tracks.size, settings.pair_tolerance, settings.seed,
        )
        for pair in wide_pairs(tracks)
    ]  # fmt: skip
    if not pairs:  # points are lost too fast for any geometry
        pairs = [PairGeometry(0.0, 0.0, 0.0, 0.0, 0.0)]

    def quantile(name: str, q: float) -> float:
        return round(float(np.quantile([getattr(pair, name) for pair in pairs], q)), 4)

    # parallax may come and go with the speed of the camera; the rest has to hold most of the time
    clip.scores |= {
        "parallax_share": quantile("parallax_share", 0.75),
        "parallax_spread": quantile("parallax_spread", 0.75),
        "turn_residual": quantile("turn_residual", 0.5),
        "travel_residual": quantile("travel_residual", 0.5),
        "rigid_track_share": quantile("rigid_share", 0.5),
    }


def measure_people(clip: Clip, settings: Settings) -> None:
    """Share of the examined frames that show a dynamic class."""
    if settings.semantic == "off":
        return
    detector = make_detector(settings.semantic)
    clip.detections = detect_over_time(clip.frames, detector, settings.semantic_frames)
    clip.scores["people_share"] = round(dynamic_class_share(clip.detections), 4)


def measure_dynamics(clip: Clip, settings: Settings) -> None:
    """Dense flow against the rigid scene: consistency and the paper's S / N."""
    if clip.tracks is None:
        return
    travels = (
        clip.scores.get("turn_residual", 0.0) >= settings.travel_turn_residual
        or clip.scores.get("parallax_share", 0.0) >= settings.travel_parallax_share
    )
    backend = make_flow_backend(settings.flow)
    for pair in choose_pairs(clip.tracks, clip.times, settings.flow_pairs):
        clip.masks.append(dynamic_mask(clip.frames, pair, travels, settings.seed, backend))
    clip.scores |= {
        "flow_consistency": round(float(np.median([mask.consistent for mask in clip.masks])), 4),
        "dynamic_score": round(float(np.mean([mask.score for mask in clip.masks])), 4),
    }
