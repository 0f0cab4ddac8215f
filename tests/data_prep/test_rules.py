from data_prep.rules import RULES, Thresholds, broken_rule, margin

GOOD = {"clip_frames": 50, "tracks": 200, "small_track_share": 0.2, "median_track_radius": 30,
        "still_track_share": 0.0, "rigid_track_share": 0.9, "parallax_share": 0.4,
        "parallax_spread": 0.4, "turn_residual": 2.0, "travel_residual": 2.0,
        "people_share": 0.0, "flow_consistency": 0.9, "dynamic_score": 0.0}  # fmt: skip


def reason(**scores):
    rule = broken_rule({**GOOD, **scores}, Thresholds())
    return None if rule is None else rule.reason


def test_a_good_clip_breaks_no_rule_and_each_rule_can_be_broken():
    assert reason() is None and margin(GOOD, Thresholds()) > 0
    bad = [{"clip_frames": 7}, {"tracks": 19}, {"small_track_share": 0.5, "median_track_radius": 4},
           {"still_track_share": 0.15}, {"parallax_share": 0.05},
           {"parallax_spread": 0.1, "travel_residual": 0.3},
           {"rigid_track_share": 0.5}, {"people_share": 0.6}, {"flow_consistency": 0.2},
           {"dynamic_score": 0.25}, {"dynamic_score": 0.15, "rigid_track_share": 0.8}]  # fmt: skip
    assert [reason(**scores) for scores in bad] == [rule.reason for rule in RULES]
    for scores in bad:
        assert margin({**GOOD, **scores}, Thresholds()) <= 0


def test_rules_with_two_scores_need_both_broken():
    assert reason(small_track_share=0.9, median_track_radius=10) is None
    assert reason(parallax_share=0.0, turn_residual=20.0) is None
    assert reason(dynamic_score=0.2) is None, "a small mover, or noise of the flow"
    assert reason(rigid_track_share=0.75) is None, "noise of the tracks"


def test_the_paper_limits_are_exact():
    assert reason(people_share=0.5) is None, "only more than half rejects"
    assert reason(dynamic_score=0.25) is not None, "S = 0.25 N is dropped"


def test_scores_that_were_not_measured_do_not_speak():
    assert broken_rule({"clip_frames": 50, "tracks": 200}, Thresholds()) is None
