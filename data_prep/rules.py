"""What decides: one ordered table of rules on the scores of a clip, and the thresholds they use.

Stages measure, this file judges. So `data_prep.evaluate` can judge the stored scores again under
other thresholds, and a clip's reason is always the first rule that it breaks. Lengths are pixels at
480p (short side = 480). A rule without its scores (its stage did not run) does not speak.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Scores = Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """Every number that decides.

    Attributes:
      min_frames: shorter clips are rejected.
      min_tracks: fewer points that can be followed say nothing.
      small_share, min_median_radius: paper: reject when more than `small_share` of the tracks stay
        within a small circle and the typical radius is under 5 px.
      still_share: points that do not move at all beside others that do betray a standing camera in
        front of a mover. A logo or caption stays below this share.
      min_parallax_share: share of tracks that only an epipolar geometry explains.
      min_parallax_spread: share of these with less than half of the larger parallaxes. A scene has
        depths of all sizes; one object that slides along before a turning camera has one.
      min_turn_residual: px by which a homography must differ from a turning and zooming camera to
        prove that the camera travelled, even past a flat scene.
      min_travel_residual: the same for what is behind: below it the camera stayed where it was.
      min_rigid_share: share of tracks that one rigid scene must explain in three frames.
      max_people_share: paper: reject when more than half of the frames show a dynamic class.
      min_flow_consistency: share of pixels whose forward and backward flow must agree.
      max_dynamic_score: paper: reject when S ≥ 0.25 N.
      some_dynamic_score, clear_rigid_share: a little motion in the flow may be noise, and so may a
        few points that fit no rigid scene; both together are not. The first is two frames of
        twelve at the paper's lowest score, and a bit.
    """

    min_frames: float = 8
    min_tracks: float = 20
    small_share: float = 0.4
    min_median_radius: float = 5.0
    still_share: float = 0.15
    min_parallax_share: float = 0.2
    min_parallax_spread: float = 0.3
    min_turn_residual: float = 3.5
    min_travel_residual: float = 0.6
    min_rigid_share: float = 0.7
    max_people_share: float = 0.5
    min_flow_consistency: float = 0.7
    max_dynamic_score: float = 0.25
    some_dynamic_score: float = 0.1
    clear_rigid_share: float = 0.85


@dataclasses.dataclass(frozen=True)
class Rule:
    """One way to be rejected.

    Attributes:
      stage: whose scores it reads.
      reason: for people.
      limits: score → (threshold, +1 if the score must not be below it, −1 if not above). The rule
        is broken when every one of them is.
      inclusive: the threshold itself is bad as well.
    """

    stage: str
    reason: str
    limits: Mapping[str, tuple[str, int]]
    inclusive: bool = False

    def margin(self, scores: Scores, thresholds: Thresholds) -> float | None:
        """Distance from being broken as a share of the threshold, negative when broken."""
        margins = []
        for score, (name, sign) in self.limits.items():
            if score not in scores:
                return None
            threshold = getattr(thresholds, name)
            margins.append(sign * (scores[score] - threshold) / max(abs(threshold), 1e-9))
        return max(margins)

    def broken(self, scores: Scores, thresholds: Thresholds) -> bool:
        """Whether the clip is rejected by this rule."""
        margin = self.margin(scores, thresholds)
        return margin is not None and (margin <= 0 if self.inclusive else margin < 0)


RULES = (
    Rule("video", "too few different frames", {"clip_frames": ("min_frames", 1)}),
    Rule("viewpoint", "too few points can be followed", {"tracks": ("min_tracks", 1)}),
    Rule("viewpoint", "camera hardly moves", {"small_track_share": ("small_share", -1),
                                              "median_track_radius": ("min_median_radius", 1)}),
    Rule("viewpoint", "camera stands while something moves",
         {"still_track_share": ("still_share", -1)}, inclusive=True),
    Rule("viewpoint", "no parallax: camera only turns or zooms",
         {"parallax_share": ("min_parallax_share", 1), "turn_residual": ("min_turn_residual", 1)}),
    Rule("viewpoint", "something moves before a camera that only turns or zooms",
         {"parallax_spread": ("min_parallax_spread", 1),
          "travel_residual": ("min_travel_residual", 1)}),
    Rule("viewpoint", "points follow no rigid motion",
         {"rigid_track_share": ("min_rigid_share", 1)}),
    Rule("semantic", "people or animals in more than half of the frames",
         {"people_share": ("max_people_share", -1)}),
    Rule("dynamics", "flow cannot be trusted (water, leaves, blur)",
         {"flow_consistency": ("min_flow_consistency", 1)}),
    Rule("dynamics", "something moves in the scene", {"dynamic_score": ("max_dynamic_score", -1)},
         inclusive=True),
    Rule("dynamics", "something moves a little, in the flow and in the points",
         {"dynamic_score": ("some_dynamic_score", -1),
          "rigid_track_share": ("clear_rigid_share", 1)}),
)  # fmt: skip


def broken_rule(scores: Scores, thresholds: Thresholds) -> Rule | None:
    """The first rule that a clip breaks, in the order in which the stages run."""
    return next((rule for rule in RULES if rule.broken(scores, thresholds)), None)


def margin(scores: Scores, thresholds: Thresholds) -> float:
    """How safely a clip is kept (> 0) or how far it is from being kept (< 0)."""
    margins = [rule.margin(scores, thresholds) for rule in RULES]
    return min((value for value in margins if value is not None), default=-1.0)


def recorded_thresholds(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The thresholds that a run noted in its decisions; empty when no video got that far."""
    noted = (line["scores"].get("thresholds") for line in lines)
    return next((thresholds for thresholds in noted if thresholds is not None), {})


def threshold_of() -> Iterator[tuple[str, str]]:
    """(score, threshold) of every rule."""
    for rule in RULES:
        for score, (name, _) in rule.limits.items():
            yield score, name
