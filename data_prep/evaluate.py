"""Measures curation decisions against labels given by people: precision and recall of `keep`.

Labels are JSON: {"videos": [{"file", "label", "acceptable_decisions", ...}]}, where
`acceptable_decisions` lists every verdict that a person would accept; `keep-after-split` accepts a
keep whose clips do not cross the cut. A file is matched by its path, else by its name alone.

    precision = kept videos whose keep is acceptable / kept videos
    recall    = videos labelled keep with an acceptable decision / videos labelled keep

Borderline videos accept both, so `strict` recall also counts only real keeps.
"""

from __future__ import annotations

import collections
import json
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import click

from see3d_jax.errors import InputError, run_command
from see3d_jax.files import write_json, write_text

if TYPE_CHECKING:
    from data_prep.calibration import Case

EXAMPLES = """
Examples:

\b
  python -m data_prep.evaluate --labels manifest.json --decisions curated/decisions.jsonl
  python -m data_prep.evaluate --labels manifest.json --decisions d.jsonl --output scores.json
  python -m data_prep.curate --input videos/ --output all/ --all-stages
  python -m data_prep.evaluate --labels manifest.json --decisions all/decisions.jsonl \\
      --leave-one-out --picture curve.svg --table table.md
"""


@click.command(epilog=EXAMPLES)
@click.option("--labels", required=True, type=click.Path(path_type=Path), help="Label JSON.")
@click.option("--decisions", required=True, type=click.Path(path_type=Path),
              help="decisions.jsonl of a curation run.")  # fmt: skip
@click.option("--output", type=click.Path(path_type=Path), help="Also write the numbers here.")
@click.option("--leave-one-out", is_flag=True, help="Choose thresholds on all other videos, for "
              "each video; needs decisions of curate --all-stages.")  # fmt: skip
@click.option("--table", type=click.Path(path_type=Path), help="Every video with its label, "
              "decision and reason, as Markdown.")  # fmt: skip
@click.option("--picture", type=click.Path(path_type=Path), help="Precision-recall curve as SVG; "
              "needs decisions of curate --all-stages.")  # fmt: skip
def app(
    labels: Path,
    decisions: Path,
    output: Path | None,
    leave_one_out: bool,
    table: Path | None,
    picture: Path | None,
) -> None:
    """Precision and recall of curation, with the table of disagreements."""
    from data_prep import calibration
    from data_prep.rules import Thresholds

    named, decided = read_labels(labels), read_decisions(decisions)
    result = evaluate(named, decided)
    click.echo(format_result(result))
    cases = make_cases(named, decided)
    if leave_one_out:
        out = calibration.leave_one_out(cases, Thresholds())
        result["leave_one_out"] = calibration.counts(out)
        wrong = [case.file for case, keep in out if calibration.wrong(case, keep)]
        result["leave_one_out"]["wrong"] = wrong
        click.echo(f"leave-one-out: {json.dumps(result['leave_one_out'])}")
    if table is not None:
        write_text(table, format_table(named, decided))
    if picture is not None:
        points = calibration.precision_recall(cases, Thresholds())
        chosen = {"precision": result["precision"], "strict_recall": result["strict_recall"]}
        write_text(picture, calibration.curve_picture(points, chosen))
    if output is not None:
        write_json(output, result)


def read_labels(path: Path) -> list[dict]:
    """The `videos` of a label file. Raises InputError naming the file and field."""
    try:
        videos = json.loads(path.read_text())["videos"]
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError):
        raise InputError(f'{path}: expected JSON with a list "videos"') from None
    for index, video in enumerate(videos):
        for field in ("file", "label", "acceptable_decisions"):
            if field not in video:
                raise InputError(f"{path}: videos[{index}] has no field {field!r}")
    return videos


def read_decisions(path: Path) -> list[dict]:
    """The lines of a decisions.jsonl. Raises InputError naming the file and line."""
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    decisions = []
    for number, line in enumerate(lines, 1):
        try:
            decision = json.loads(line)
            decision["path"], decision["decision"], decision["clips"]
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path}: line {number} is no decision of data_prep.curate") from None
        decisions.append(decision)
    return decisions


def evaluate(labels: Sequence[dict], decisions: Sequence[dict]) -> dict:
    """Labels and decisions → precision, recall, counts, confusion per label, disagreements."""
    confusion: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    stages: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    disagreements, unjudged = [], []
    kept = kept_right = wanted = wanted_right = wanted_kept = agreed = 0
    for label, decision in _paired(labels, decisions):
        if decision is None:
            unjudged.append(label["file"])
            continue
        right = is_acceptable(decision, label["acceptable_decisions"])
        keep = decision["decision"] == "keep"
        agreed += right
        kept += keep
        kept_right += keep and right
        if label["label"] == "keep":
            wanted += 1
            wanted_right += right
            wanted_kept += keep
        confusion[label["label"]][decision["decision"]] += 1
        stages[decision.get("stage", "")][label["label"]] += 1
        if not right:
            disagreements.append(
                {
                    "file": label["file"],
                    "label": label["label"],
                    "acceptable": label["acceptable_decisions"],
                    "decision": decision["decision"],
                    "stage": decision.get("stage", ""),
                    "reason": decision.get("reason", ""),
                }
            )
    return {
        "videos": len(labels) - len(unjudged),
        "agreed": agreed,
        "kept": kept,
        "precision": kept_right / kept if kept else None,
        "recall": wanted_right / wanted if wanted else None,
        "strict_recall": wanted_kept / wanted if wanted else None,
        "confusion": {label: dict(counts) for label, counts in sorted(confusion.items())},
        "stages": {stage: dict(labels) for stage, labels in sorted(stages.items())},
        "disagreements": disagreements,
        "unjudged": unjudged,
    }


def make_cases(labels: Sequence[dict], decisions: Sequence[dict]) -> list[Case]:
    """Labelled videos with the scores of their clips; those without a decision are left out."""
    from data_prep.calibration import Case

    cases = []
    for label, decision in _paired(labels, decisions):
        if decision is None:
            continue
        accepted = label["acceptable_decisions"]
        kept = {"decision": "keep", "scores": decision.get("scores", {})}
        cases.append(
            Case(
                file=label["file"],
                clips=tuple(clip["scores"] for clip in decision["clips"]),
                must_keep=label["label"] == "keep",
                may_keep=is_acceptable(kept, accepted),
                may_reject="reject" in accepted or "error" in accepted,
            )
        )
    return cases


def _paired(
    labels: Sequence[dict], decisions: Sequence[dict]
) -> Iterator[tuple[dict, dict | None]]:
    """Every label with the decision on its file: found by its path, else by its name alone."""
    by_path = {decision["path"]: decision for decision in decisions}
    by_name = {PurePosixPath(decision["path"]).name: decision for decision in decisions}
    for label in labels:
        file = label["file"]
        yield label, by_path.get(file) or by_name.get(PurePosixPath(file).name)


def is_acceptable(decision: dict, acceptable: Sequence[str]) -> bool:
    """Whether a person would accept this decision."""
    if decision["decision"] in acceptable:
        return True
    was_split = decision.get("scores", {}).get("shots", 0) > 1
    return decision["decision"] == "keep" and was_split and "keep-after-split" in acceptable


def format_result(result: dict) -> str:
    """The numbers as text."""

    def share(value: float | None) -> str:
        return "undefined" if value is None else f"{value:.3f}"

    lines = [
        f"{result['videos']} labelled videos judged, {result['agreed']} decisions acceptable",
        f"keep: precision {share(result['precision'])} of {result['kept']} kept, "
        f"recall {share(result['recall'])} (strict {share(result['strict_recall'])})",
        f"{'label':22}{'keep':>6}{'reject':>8}{'error':>7}",
    ]
    for label, counts in result["confusion"].items():
        numbers = [counts.get(name, 0) for name in ("keep", "reject", "error")]
        lines.append(f"{label:22}{numbers[0]:6}{numbers[1]:8}{numbers[2]:7}")
    for stage, labels in result["stages"].items():
        told = ", ".join(f"{count} {label}" for label, count in sorted(labels.items()))
        lines.append(f"decided by {stage}: {told}")
    for row in result["disagreements"]:
        lines.append(
            f"wrong: {row['file']} labelled {row['label']}, decided {row['decision']} "
            f"({row['stage']}: {row['reason']})"
        )
    if result["unjudged"]:
        lines.append(f"no decision for {len(result['unjudged'])}: {', '.join(result['unjudged'])}")
    return "\n".join(lines)


def format_table(labels: Sequence[dict], decisions: Sequence[dict]) -> str:
    """Markdown: a row per labelled video that has a decision, sorted by name."""
    rows = []
    for label, decision in _paired(labels, decisions):
        if decision is not None:
            name = PurePosixPath(label["file"]).name
            rows.append(
                f"| {name} | {label['label']} | {decision['decision']} | "
                f"{decision.get('stage', '')} | {decision.get('reason', '')} |"
            )
    head = ["| video | label | decision | stage | reason |", "|---|---|---|---|---|"]
    return "\n".join([*head, *sorted(rows)]) + "\n"


def main() -> None:
    """Entry point."""
    run_command(lambda: app(standalone_mode=False))


if __name__ == "__main__":
    main()
