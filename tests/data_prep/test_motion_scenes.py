"""Curation on ray-traced clips whose motion is known, not only on the videos it was tuned with."""

import numpy as np
import pytest
from motion_scenes import FPS, Scenes, film

from data_prep.stages import Clip, Settings, judge_clip, judge_video
from see3d_jax.media import write_mp4

QUICK = ["keep_slide_in_hand", "reject_box_turned_before_hand", "reject_passing_before_turn",
         "reject_water_before_slide"]  # fmt: skip


def judged(seed, name):
    frames = np.stack(film(seed, name))
    clip = Clip(frames, np.arange(len(frames)) / FPS)
    judge_clip(clip, Settings(semantic="off"))
    return clip


@pytest.mark.parametrize("name", QUICK)
def test_verdict_on_a_known_motion(name):
    clip = judged(11, name)
    assert clip.decision == name.split("_")[0], (clip.reason, clip.scores)


def test_a_slideshow_with_pans_is_no_camera(tmp_path):
    write_mp4(tmp_path / "slides.mp4", film(11, "reject_slideshow"), FPS)
    verdict = judge_video(tmp_path / "slides.mp4", tmp_path, Settings(semantic="off"))
    assert verdict.decision == "reject" and len(verdict.clips) == 3


@pytest.mark.slow
def test_precision_and_recall_on_every_known_motion():
    clips = [(seed, name) for seed in (12, 13) for name in Scenes(seed).clips()]
    kept = [(seed, name) for seed, name in clips if judged(seed, name).decision == "keep"]
    wanted = [clip for clip in clips if clip[1].startswith("keep")]
    right = [clip for clip in kept if clip in wanted]
    # measured 14 of 15: a slide before a turning camera passes (docs/curation.md)
    assert len(right) >= 0.9 * len(kept), set(kept) - set(wanted)
    assert len(right) >= 0.85 * len(wanted), set(wanted) - set(kept)
