"""Thresholds without self-deception: leave-one-out choice, and the precision-recall curve.

Works on the scores in a decisions.jsonl of `data_prep.curate --all-stages`, judged again by
data_prep.rules. For every labelled video the thresholds are chosen on all the others and that video
is judged with them, so no video has a say in the numbers that decide about it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from data_prep.rules import Thresholds, broken_rule, margin, threshold_of


@dataclasses.dataclass(frozen=True)
class Case:
    """A labelled video: the scores of its clips, whether it must and whether it may be kept."""

    file: str
    clips: tuple[Mapping[str, float], ...]
    must_keep: bool
    may_keep: bool
    may_reject: bool


def keeps(case: Case, thresholds: Thresholds) -> bool:
    """Whether any clip of the video breaks no rule."""
    return any(broken_rule(scores, thresholds) is None for scores in case.clips)


def wrong(case: Case, keep: bool) -> bool:
    """Whether nobody would accept this decision."""
    return not (case.may_keep if keep else case.may_reject)


def counts(decided: Sequence[tuple[Case, bool]]) -> dict[str, float | None]:
    """Precision and recall of keep; recall over the videos that people label keep."""
    kept = [case for case, keep in decided if keep]
    wanted = [(case, keep) for case, keep in decided if case.must_keep]
    right = sum(keep or case.may_reject for case, keep in wanted)
    return {
        "kept": len(kept),
        "precision": sum(case.may_keep for case in kept) / len(kept) if kept else None,
        "recall": right / len(wanted) if wanted else None,
        "strict_recall": sum(keep for _, keep in wanted) / len(wanted) if wanted else None,
    }


def choose_thresholds(cases: Sequence[Case], start: Thresholds) -> Thresholds:
    """One pass over the thresholds: each that is worse than another value moves.

    A threshold stays where no other makes fewer errors: a rule that none of these videos needs
    would otherwise end anywhere. One that moves goes to the middle of its widest best range. The
    candidates are the midpoints between neighbouring scores, so it keeps equal distance from the
    nearest videos on both sides.
    """
    thresholds = start
    for score, name in threshold_of():
        values = sorted({clip[score] for case in cases for clip in case.clips if score in clip})
        if len(values) < 2:
            continue
        candidates = [(a + b) / 2 for a, b in itertools.pairwise(values)]
        errors = [_errors(cases, dataclasses.replace(thresholds, **{name: c})) for c in candidates]
        best = min(errors)
        if _errors(cases, thresholds) <= best:
            continue
        runs, run = [], []
        for index, error in enumerate([*errors, best + 1]):
            if error == best:
                run.append(index)
            elif run:
                runs.append(run)
                run = []
        widest = max(runs, key=lambda run: values[run[-1] + 1] - values[run[0]])
        middle = (values[widest[0]] + values[widest[-1] + 1]) / 2
        thresholds = dataclasses.replace(thresholds, **{name: middle})
    return thresholds


def _errors(cases: Sequence[Case], thresholds: Thresholds) -> int:
    return sum(wrong(case, keeps(case, thresholds)) for case in cases)


def leave_one_out(cases: Sequence[Case], start: Thresholds) -> list[tuple[Case, bool]]:
    """(case, keep) for every case, judged with thresholds chosen on the others."""
    return [
        (case, keeps(case, choose_thresholds([*cases[:index], *cases[index + 1 :]], start)))
        for index, case in enumerate(cases)
    ]


def precision_recall(cases: Sequence[Case], thresholds: Thresholds) -> list[tuple[float, float]]:
    """(recall, precision) as all rules are made stricter or laxer by the same relative margin."""
    best = [max((margin(clip, thresholds) for clip in case.clips), default=-1.0) for case in cases]
    points = []
    for limit in sorted(set(best), reverse=True):
        result = counts([(case, value >= limit) for case, value in zip(cases, best)])
        points.append((float(result["strict_recall"] or 0.0), float(result["precision"] or 0.0)))
    return points


def curve_picture(points: Sequence[tuple[float, float]], chosen: Mapping[str, float | None]) -> str:
    """The curve as SVG, with the thresholds in force as a dot."""
    place = lambda recall, precision: (40 + 240 * recall, 260 - 240 * precision)  # noqa: E731
    line = " ".join("{:.1f},{:.1f}".format(*place(*point)) for point in points)
    x, y = place(float(chosen["strict_recall"] or 0), float(chosen["precision"] or 0))
    ticks = "".join(
        f'<text x="{40 + 240 * v}" y="276" text-anchor="middle">{v:g}</text>'
        f'<text x="34" y="{264 - 240 * v}" text-anchor="end">{v:g}</text>'
        for v in np.linspace(0, 1, 5)
    )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 300 300" width="450" font-size="10" '
        'font-family="sans-serif"><rect width="300" height="300" fill="#fff"/>'
        '<path d="M40 20V260H280" fill="none" stroke="#333"/>'
        f'{ticks}<text x="160" y="292" text-anchor="middle">recall of keep</text>'
        '<text x="10" y="140" transform="rotate(-90 10 140)" text-anchor="middle">precision</text>'
        f'<polyline points="{line}" fill="none" stroke="#2563eb" stroke-width="2"/>'
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="#d33"/></svg>\n'
    )
