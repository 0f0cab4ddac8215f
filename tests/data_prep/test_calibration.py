from data_prep.calibration import (
    Case,
    choose_thresholds,
    counts,
    curve_picture,
    leave_one_out,
    precision_recall,
)
from data_prep.rules import Thresholds

BASE = {"clip_frames": 50, "tracks": 200, "small_track_share": 0.2, "median_track_radius": 30,
        "still_track_share": 0.0, "rigid_track_share": 0.9, "turn_residual": 1.0,
        "flow_consistency": 0.9, "dynamic_score": 0.0}  # fmt: skip


def case(name, parallax, keep):
    return Case(name, ({**BASE, "parallax_share": parallax},), keep, keep, not keep)


CASES = [case(f"k{i}", 0.5 + 0.1 * i, True) for i in range(4)]
CASES += [case(f"r{i}", 0.1 * i, False) for i in range(4)]


def test_a_separating_threshold_is_found_in_the_middle_of_the_gap():
    found = choose_thresholds(CASES, Thresholds())
    assert abs(found.min_parallax_share - 0.4) < 1e-9


def test_a_rule_that_no_video_needs_stays_where_it_is():
    found = choose_thresholds(CASES, Thresholds())
    assert found.max_dynamic_score == Thresholds().max_dynamic_score
    fitting = Thresholds(min_parallax_share=0.35)  # makes no error: nothing to gain
    assert choose_thresholds(CASES, fitting) == fitting


def test_leave_one_out_judges_each_with_the_thresholds_of_the_others():
    assert counts(leave_one_out(CASES, Thresholds())) == {
        "kept": 4, "precision": 1.0, "recall": 1.0, "strict_recall": 1.0}  # fmt: skip
    # one keep among the rejects: chosen with it every video would be right, without it it is lost
    odd = [*CASES, case("odd", 0.05, True)]
    result = counts(leave_one_out(odd, Thresholds()))
    assert result["strict_recall"] < 1.0


def test_the_curve_reaches_further_and_ends_with_everything():
    points = precision_recall(CASES, Thresholds())
    recalls = [recall for recall, _ in points]
    assert recalls == sorted(recalls) and points[-1] == (1.0, 0.5)
    assert curve_picture(points, {"precision": 1.0, "strict_recall": 1.0}).startswith("<svg")
