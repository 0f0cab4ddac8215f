"""Is this implementation the official one, to float32 precision? Runs recorded reference outputs.

    python -m tools.parity GOLDENS

GOLDENS is a folder of recorded cases: UNet, autoencoder, CLIP, tokenizer, schedules, whole sampling
runs, and lists of keys of published checkpoints, found by what the files hold. Errors are largest
absolute differences; each case prints its quantity that is closest to its tolerance. The exit code
is 1 if any case fails. `--markdown` writes the table into docs/fidelity.md, between its markers.
"""

from __future__ import annotations

import dataclasses
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from see3d_jax.errors import InputError, run_command
from see3d_jax.files import write_json, write_text

MARKERS = ("<!-- table made by tools.parity: begin -->", "<!-- table made by tools.parity: end -->")


@click.command(
    epilog="""\b
Examples:
  python -m tools.parity goldens
  python -m tools.parity goldens --only sampler --json parity.json
  python -m tools.parity goldens --markdown docs/fidelity.md
"""
)
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write all numbers.")
@click.option("--markdown", type=click.Path(path_type=Path), help="Refresh the table in a page.")
@click.option("--only", default="", help="Only files whose kind:name contains this.")
def app(path: Path, json_file: Path | None, markdown: Path | None, only: str) -> int:
    """Compares with every golden case found under PATH."""
    import jax

    if not path.is_dir():
        raise InputError(f"{path}: no such folder of goldens")
    if markdown is not None:
        _table_place(markdown)  # a page without markers is found out before the work
    results = []
    with jax.default_matmul_precision("highest"):
        for result, seconds in run_all(path, only):
            click.echo(line(result))
            results.append(record(result, seconds))
    if not results:
        raise InputError(f"{path}: holds no goldens" + (f" named like {only!r}" if only else ""))
    counts = {s: sum(r["status"] == s for r in results) for s in ("ok", "FAIL", "skipped")}
    click.echo(", ".join(f"{number} {status}" for status, number in counts.items()))
    if json_file is not None:
        write_json(json_file, {"path": path.name, **counts, "cases": results})
    if markdown is not None:
        before, after = _table_place(markdown)
        write_text(markdown, before + table(results) + after)
    return 1 if counts["FAIL"] else 0


def run_all(path: Path, only: str = "") -> Iterator[tuple[Any, float]]:
    """Runs every case under a folder; yields results and the seconds each took."""
    from tools.parity_cases import Goldens

    with tempfile.TemporaryDirectory(prefix="see3d-parity-") as scratch:
        goldens = Goldens(path, Path(scratch))
        for kind, file in find_cases(path):
            name = file.relative_to(path).with_suffix("").as_posix()
            if only not in f"{kind}:{name}":
                continue
            start = time.perf_counter()
            for result in run_file(kind, name, file, goldens):
                yield result, time.perf_counter() - start
                start = time.perf_counter()


def run_file(kind: str, name: str, file: Path, goldens: Any) -> Iterator[Any]:
    """Results of all cases in a golden file; what breaks is a failed case, not an exception."""
    from see3d_jax.models.release import read_json
    from tools.checkpoint_files import open_tensors
    from tools.parity_cases import Result

    runner = runners().get(kind)
    try:
        if kind == "broken":
            read_json(file)
            open_tensors(file.with_suffix(".safetensors"))
        if runner is None:
            yield Result(name, skipped="not a kind of golden that this tool compares")
            return
        for result in runner(file, read_json(file), goldens):
            yield dataclasses.replace(result, case=f"{name}{result.case}")
    except (InputError, KeyError, ValueError, TypeError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        yield Result(name, {"run": (float("inf"), 0.0)}, note=reason[:300])


def runners() -> dict[str, Any]:
    """How each kind of golden is compared."""
    from tools import parity_cases, parity_flow, parity_sampler

    return {
        "unet": parity_cases.run_unet,
        "vae": parity_cases.run_vae,
        "vae_ldm": parity_cases.run_vae_ldm,
        "text": parity_cases.run_text,
        "vision": parity_cases.run_vision,
        "tokenizer": parity_cases.run_tokenizer,
        "schedule": parity_sampler.run_schedule,
        "sampler": parity_sampler.run_sampler,
        "flow": parity_flow.run_flow,
        "keys": parity_cases.run_keys,
    }


def find_cases(root: Path) -> list[tuple[str, Path]]:
    """(kind, JSON file) of every golden under a folder; else kind "unknown" or "broken"."""
    from see3d_jax.models.release import read_json
    from tools.checkpoint_files import open_tensors

    found = []
    for path in sorted(root.rglob("*.json")):
        tensors = path.with_suffix(".safetensors")
        has_io = path.with_suffix(".io.safetensors").is_file()
        # Vocabularies are JSON objects as well; keys and cases are small.
        if path.stat().st_size > 500_000:
            continue
        try:
            spec = read_json(path)
            if isinstance(spec.get("keys"), dict) and "n_tensors" in spec:
                found.append(("keys", path))
            elif has_io and "config" in spec:
                found.append(("unet", path))
            elif tensors.is_file():
                found.append((_kind(spec, set(open_tensors(tensors).shapes)), path))
        except InputError:
            if tensors.is_file() or has_io:
                found.append(("broken", path))
    order = [*runners(), "unknown", "broken"]
    return sorted(found, key=lambda item: order.index(item[0]))


def _kind(spec: dict[str, Any], names: set[str]) -> str:
    if "num_inference_steps" in spec:
        return "sampler"
    if "alphas_cumprod" in names:
        return "schedule"
    if "raft_in_hw" in spec:
        return "flow"
    if "ddconfig" in spec:
        return "vae_ldm"
    if {"ids", "last_hidden_state"} <= names:
        return "text"
    if "prompts" in spec:
        return "tokenizer"
    if any(re.fullmatch(r"\d+\.pixel_values_\w+", name) for name in names):
        return "vision"
    if any(name.endswith(".decoded") for name in names):
        return "vae"
    return "unknown"


def record(result: Any, seconds: float) -> dict[str, Any]:
    """A result as plain values; errors that are not finite become null."""
    status = "skipped" if result.skipped else "ok" if result.ok else "FAIL"
    errors = {
        name: {"error": error if error < float("inf") else None, "tolerance": limit}
        for name, (error, limit) in result.errors.items()
    }
    note = result.skipped or result.note
    return {
        "case": result.case,
        "status": status,
        "errors": errors,
        "note": note,
        "seconds": round(seconds, 2),
    }


def line(result: Any) -> str:
    """One line for the terminal."""
    if result.skipped:
        return f"skipped  {result.case}: {result.skipped}"
    name, error, limit = result.worst
    status = "ok  " if result.ok else "FAIL"
    note = f"  {result.note}" if result.note else ""
    return f"{status}  {result.case:44} {error:9.2e}  tolerance {limit:7.0e}  ({name}){note}"


def table(results: list[dict[str, Any]]) -> str:
    """The results as a Markdown table, every quantity of every case."""
    lines = ["| case | quantity | max abs error | tolerance | |", "|---|---|---|---|---|"]
    for result in results:
        if result["status"] == "skipped":
            lines.append(f"| {result['case']} | – | – | – | skipped: {result['note']} |")
        for name, value in result["errors"].items():
            error = "not finite" if value["error"] is None else f"{value['error']:.1e}"
            good = value["error"] is not None and value["error"] <= value["tolerance"]
            status = "ok" if good else "FAIL"
            cells = (result["case"], name, error, f"{value['tolerance']:.0e}", status)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _table_place(page: Path) -> tuple[str, str]:
    """What stands before and after the table in a page."""
    text = page.read_text(encoding="utf-8") if page.is_file() else "\n".join(MARKERS)
    if text.count(MARKERS[0]) != 1 or text.count(MARKERS[1]) != 1:
        raise InputError(
            f"{page}: has no place for the table; add the lines {' and '.join(MARKERS)}"
        )
    before, rest = text.split(MARKERS[0])
    after = rest.split(MARKERS[1])[1]
    return f"{before}{MARKERS[0]}\n", f"{MARKERS[1]}{after}"


def main() -> None:
    """Entry point."""
    run_command(lambda: app(standalone_mode=False))


if __name__ == "__main__":
    main()
