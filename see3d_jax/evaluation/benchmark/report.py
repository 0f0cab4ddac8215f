"""results.json, report.md and report.html of an evaluation: tables, comparisons, pictures.

Every table is of one number of given views: methods as rows, regions × metrics as columns, each
cell a mean over scenes with its 95 % interval (see `statistics`). A second table says who is better
on the hole pixels and by how much, view by view. The page is one file and needs nothing else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from see3d_jax import html
from see3d_jax.evaluation.benchmark.statistics import difference, summary
from see3d_jax.files import write_json, write_text

REGIONS = {
    "all": "all pixels",
    "known": "known to the warp",
    "hole": "holes of the warp",
    "object": "object mask",
}
METRICS = {
    "psnr": ("PSNR ↑", 2, 1),  # heading, digits, sign of better
    "ssim": ("SSIM ↑", 3, 1),
    "lpips_alex": ("LPIPS-Alex ↓", 3, -1),
    "lpips_vgg": ("LPIPS-VGG ↓", 3, -1),
}
_RIVALS = ("telea", "nearest_photo", "gaussians_inputs")
_OURS = ("model", "model_known_kept", "gaussians_model")
_MOST_SHEETS = 24  # pictures in the page

Results = list[dict[str, Any]]


def write_reports(
    output: Path, settings: dict[str, Any], results: Results, failed: list[dict[str, Any]],
    titles: dict[str, str],
) -> dict[str, Any]:  # fmt: skip
    """Writes the three files from the results of all scenes; returns what results.json holds.

    `titles`: the name of each method, in the order of the rows.
    """
    results = sorted(results, key=lambda result: (result["inputs"], result["scene"]))
    tables = {
        str(inputs): tabulate([r for r in results if r["inputs"] == inputs])
        for inputs in sorted({result["inputs"] for result in results})
    }
    content = {
        "settings": settings,
        "tables": tables,
        "scenes": [
            {**{key: value for key, value in result.items() if key != "methods"},
             "means": tabulate([result])["methods"]}
            for result in results
        ],
        "failed": failed,
    }  # fmt: skip
    write_json(output / "results.json", content)
    write_text(output / "report.md", _markdown(content, titles))
    _write_page(output, content, titles)
    return content


def tabulate(results: Results) -> dict[str, Any]:
    """{"methods": {method: {region: {metric: summary}}}, "on_holes": {"A − B": {metric: summary}}}.

    A method that is absent from a scene (3DGS of one photo) is left out of the table.
    """
    if not results:
        return {"methods": {}, "on_holes": {}}
    first = results[0]["methods"]
    names = [name for name in first if all(name in result["methods"] for result in results)]
    regions = [
        region for region in REGIONS if all(region in r["methods"][names[0]] for r in results)
    ]
    metrics = [metric for metric in METRICS if metric in first[names[0]]["all"]]

    def column(name: str, region: str, metric: str) -> list[list[float | None]]:
        return [result["methods"][name][region][metric] for result in results]

    methods = {
        name: {
            region: {metric: summary(column(name, region, metric)) for metric in metrics}
            for region in regions
        }
        for name in names
    }
    on_holes = {
        f"{ours} − {rival}": {
            metric: difference(column(ours, "hole", metric), column(rival, "hole", metric))
            for metric in metrics
        }
        for ours in _OURS
        for rival in _RIVALS
        if ours in names and rival in names
    }
    return {"methods": methods, "on_holes": on_holes}


def verdict(metric: str, value: dict[str, float | int]) -> str:
    """ "better", "worse" or "no clear difference" of a summarised difference."""
    if "low" not in value:
        return "no clear difference"
    sign = METRICS[metric][2]
    if value["low"] * sign > 0 and value["high"] * sign > 0:
        return "better"
    if value["low"] * sign < 0 and value["high"] * sign < 0:
        return "worse"
    return "no clear difference"


# --- the same tables for both files ---------------------------------------------------------------


def _table(table: dict[str, Any], region: str, titles: dict[str, str]) -> tuple[list, list]:
    """(header, rows) of one region; the best mean of each column is marked by a star."""
    methods = {name: of[region] for name, of in table["methods"].items() if region in of}
    metrics = list(next(iter(methods.values()), {}))
    best = {}
    for metric in metrics:
        means = {n: of[metric]["mean"] for n, of in methods.items() if "mean" in of[metric]}
        if means:
            best[metric] = max(means, key=lambda name: means[name] * METRICS[metric][2])
    rows = [
        [titles.get(name, name)]
        + [_cell(of[m], METRICS[m][1]) + (" ★" if best.get(m) == name else "") for m in metrics]
        for name, of in methods.items()
    ]
    return ["method", *(METRICS[metric][0] for metric in metrics)], rows


def _cell(value: dict[str, float | int], digits: int) -> str:
    if "mean" not in value:
        return "–"
    text = f"{value['mean']:.{digits}f}"
    if "low" in value:
        text += f" [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"
    return text


def _hole_table(table: dict[str, Any], titles: dict[str, str]) -> tuple[list, list]:
    rows, metrics = [], []
    for pair, values in table["on_holes"].items():
        ours, rival = pair.split(" − ")
        metrics = list(values)
        rows.append(
            [f"{titles[ours]} − {titles[rival]}"]
            + [f"{_cell(v, METRICS[m][1])}: {verdict(m, v)}" for m, v in values.items()]
        )
    return ["difference", *(METRICS[metric][0] for metric in metrics)], rows


def _scene_table(content: dict[str, Any], inputs: int, titles: dict[str, str]) -> tuple[list, list]:
    """PSNR of every method in every scene, all pixels and holes."""
    scenes = [scene for scene in content["scenes"] if scene["inputs"] == inputs]
    names = [name for name in titles if any(name in scene["means"] for scene in scenes)]
    rows = []
    for scene in scenes:
        cells = []
        for name in names:
            of = scene["means"].get(name)
            parts = (of[region]["psnr"].get("mean") for region in ("all", "hole")) if of else ()
            cells.append(" / ".join("–" if v is None else f"{v:.2f}" for v in parts) or "–")
        known = f"{scene['known_share']:.0%}"
        rows.append([scene["scene"], len(scene["test"]), known, scene["depth_from"], *cells])
    return ["scene", "views", "known", "depth from", *(titles[name] for name in names)], rows


def _notes(content: dict[str, Any]) -> list[str]:
    settings, first = content["settings"], content["scenes"][0]
    notes = [
        f"Benchmark {settings['benchmark']}, checkpoint {Path(settings['checkpoint']).name} "
        f"({first['model']}), {first['steps']} steps of {settings['sampler']}, guidance "
        f"{first['guidance']:g}, seed {settings['seed']}. Made by `{_command(settings)}`.",
        "Means over scenes of means over views, with 95 % bootstrap intervals over scenes and "
        "views; ★ marks the best mean. PSNR in dB, at most 100. Known and hole pixels are those of "
        "the warp; outside a region LPIPS sees the true pixels.",
    ]
    if any(scene["depth_from"] == "neighbours" for scene in content["scenes"]):
        notes.append(
            "Depth from neighbours: the depth of the given views is stereo with frames that are "
            "neither given nor predicted. It is better than what one photo tells by itself."
        )
    if settings["reconstruct"]:
        notes.append(
            "3DGS from given photos and model: fitted to the photos and to the model's views at "
            "the cameras that are scored; the true images there are not used."
        )
    # scene/file says which; where they lie on this machine is in results.json
    splits = sorted({"/".join(scene["split"].split("/")[-2:]) for scene in content["scenes"]})
    notes.append("Splits: " + "; ".join(splits[:6]) + ("; …" if len(splits) > 6 else ""))
    return notes


def _command(settings: dict[str, Any]) -> str:
    """The command without its folders, as far as its options differ from the defaults."""
    words = [f"see3d evaluate --benchmark {settings['benchmark']} --data DIR --output DIR"]
    for name in ("depth", "size", "steps", "guidance", "sampler", "views_per_round", "test_views"):
        if settings[name] not in (None, "auto", "ddim"):
            words.append(f"--{name.replace('_', '-')} {settings[name]}")
    if settings["reconstruct"]:
        words.append(
            f"--reconstruct --fit-steps {settings['fit_steps']} --gaussians {settings['gaussians']}"
        )
    return " ".join([*words, *(f"--inputs {n}" for n in settings["inputs"])])


def _sections(content: dict[str, Any], titles: dict[str, str]) -> list[tuple[str, list, list]]:
    """(heading, header, rows) of every table in reading order."""
    found = []
    for inputs, table in content["tables"].items():
        views = f"{inputs} given view{'s' * (inputs != '1')}"
        for region, words in REGIONS.items():
            header, rows = _table(table, region, titles)
            if rows:
                found.append((f"{views}: {words}", header, rows))
        header, rows = _hole_table(table, titles)
        if rows:
            found.append((f"{views}: who is better in the holes", header, rows))
        header, rows = _scene_table(content, int(inputs), titles)
        found.append((f"{views}: PSNR of each scene, all / holes", header, rows))
    if content["failed"]:
        rows = [[f["scene"], f["inputs"], f["reason"]] for f in content["failed"]]
        found.append(("Left out", ["scene", "given", "reason"], rows))
    return found


def _markdown(content: dict[str, Any], titles: dict[str, str]) -> str:
    parts = [f"# Evaluation: {content['settings']['benchmark']}", *_notes(content)]
    for heading, header, rows in _sections(content, titles):
        lines = [header, ["---"] * len(header), *rows]
        escaped = ([str(cell).replace("|", "\\|") for cell in line] for line in lines)
        parts += [f"## {heading}", "\n".join(f"| {' | '.join(line)} |" for line in escaped)]
    return "\n\n".join(parts) + "\n"


def _write_page(output: Path, content: dict[str, Any], titles: dict[str, str]) -> None:
    parts = [html.paragraph(note) for note in _notes(content)]
    parts += [
        html.section(heading, html.table(header, rows))
        for heading, header, rows in _sections(content, titles)
    ]
    for scene in content["scenes"][:_MOST_SHEETS]:
        name, inputs = scene["scene"], scene["inputs"]
        picture = output / "scenes" / name / f"inputs_{inputs}" / "sheet.jpg"
        if picture.is_file():
            caption = f"{name}, {inputs} given: rows are methods, columns predicted views"
            parts.append(html.section(f"{name}, {inputs} given", html.image(picture, caption)))
    more = len(content["scenes"]) - _MOST_SHEETS
    if more > 0:
        parts.append(html.paragraph(f"{more} more scenes have their sheet.jpg in scenes/."))
    html.write_page(
        output / "report.html", f"Evaluation: {content['settings']['benchmark']}", *parts
    )
