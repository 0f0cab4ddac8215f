import numpy as np
import pytest
import skimage.data
from curate_scenes import scene

from data_prep.semantic import (
    Detection,
    detect_over_time,
    detect_people,
    dynamic_class_share,
    make_detector,
)
from see3d_jax.errors import InputError


def test_a_face_is_found_and_objects_are_not():
    astronaut = skimage.data.astronaut()
    assert [d.label for d in detect_people(astronaut)].count("face") == 1
    assert detect_people(np.ascontiguousarray(scene())) == []
    assert detect_people(skimage.data.coffee()) == []


def test_tiny_frames_are_no_problem():
    assert detect_people(np.zeros((24, 32, 3), np.uint8)) == []


def test_off_finds_nothing_and_unknown_names_are_refused():
    assert make_detector("off")(skimage.data.astronaut()) == []
    with pytest.raises(InputError, match="opencv, off or"):
        make_detector("yolo")


def test_share_counts_frames_not_detections():
    person = Detection("person", 2.0, (0, 0, 1, 1))
    frames = np.arange(10, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)
    found = detect_over_time(frames, lambda f: [person] * 3 if f[0, 0, 0] > 4 else [], samples=10)
    assert dynamic_class_share(found) == 0.5
    assert dynamic_class_share({}) == 0.0
