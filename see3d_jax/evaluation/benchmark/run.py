"""The evaluation: every scene of a benchmark, every number of given views, model and baselines.

    scene ─ split ─ prepare ─► generate ─► views at the test cameras      generation only
                                 │ views + given photos ─ reconstruct ─► renders   after 3DGS

Baselines, in the same run on the same warps: the nearest given photo, the raw warp (black holes),
the warp filled by OpenCV (Telea), and with `reconstruct` 3D Gaussians fitted to the given photos
alone. The cameras of the test views are known to every method, their images to none.

One folder per scene and number of given views, whole or absent:
    OUTPUT/scenes/NAME/inputs_N/{result.json, sheet.jpg, METHOD/*.png, masks/*.png}
A folder that is there is not made again, so a run that was stopped goes on where it was. A scene
that fails is reported with its reason, and tried again by the next run; the others go on.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from see3d_jax.errors import InputError, WorkError
from see3d_jax.evaluation.benchmark.datasets import (
    BENCHMARKS,
    SceneEntry,
    Split,
    choose_split,
    find_scenes,
)
from see3d_jax.evaluation.benchmark.prepare import (
    DEPTH_SOURCES,
    Task,
    prepare,
    read_masks,
    write_pictures,
)
from see3d_jax.evaluation.benchmark.report import write_reports
from see3d_jax.evaluation.lpips import Lpips, load_lpips
from see3d_jax.files import atomic_path, write_json
from see3d_jax.media import contact_sheet, read_image, write_image
from see3d_jax.pipelines.baselines import nearest_reference, score_views
from see3d_jax.pipelines.generation import Generated, generate
from see3d_jax.pipelines.pretrained import checkpoint_folder
from see3d_jax.pipelines.reconstruct import reconstruct as fit_gaussians

COMMAND = "see3d evaluate"  # in run.json: how a folder is known to be ours
# What is compared; the key is the folder of its pictures and its name in results.json.
METHODS = {
    "nearest_photo": "nearest given photo",
    "raw_warp": "raw warp",
    "telea": "warp + Telea inpainting",
    "model": "model",
    "model_known_kept": "model, known pixels put back",
    "gaussians_inputs": "3DGS from the given photos",
    "gaussians_model": "3DGS from given photos and model",
}
_SHEET_VIEWS = 4
_SHEET_HEIGHT = 160


@dataclasses.dataclass(frozen=True)
class Settings:
    """What an evaluation is made with; two runs that share a folder share all of this.

    Attributes:
      benchmark: key of `BENCHMARKS`.
      checkpoint: as of `generate`.
      inputs: numbers of given views, each a table.
      depth: of the given views: one of `DEPTH_SOURCES` or the file of a depth network (.onnx).
      size, steps, guidance, sampler, views_per_round, seed: as of `generate`.
      test_views: at most so many views are predicted per scene, evenly chosen; None = all.
      reconstruct: also fit 3D Gaussians.
      fit_steps, gaussians: of these fits.
      networks: of LPIPS; empty = without.
    """

    benchmark: str
    checkpoint: str | None
    inputs: tuple[int, ...]
    depth: str = "auto"
    size: int | None = None
    steps: int | None = None
    guidance: float | None = None
    sampler: str = "ddim"
    views_per_round: int | None = None
    test_views: int | None = None
    reconstruct: bool = False
    fit_steps: int = 2000
    gaussians: int = 15_000
    networks: tuple[str, ...] = ("alex", "vgg")
    seed: int = 0


def evaluate(
    settings: Settings,
    data: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    splits: str | os.PathLike[str] | None = None,
    scenes: Sequence[str] = (),
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Runs a benchmark and writes results.json, report.md and report.html into `output`.

    Args:
      settings: what to run.
      data: folder of the benchmark's scenes (layouts: docs/evaluation.md).
      output: an empty or absent folder, or one of an evaluation with the same settings.
      splits: folder with SCENE/train_test_split_N.json.
      scenes: names of the scenes to run; default all.
      say: gets one line per scene.

    Returns the content of results.json. Raises InputError for settings, data or an output folder
    that cannot be used, before any work; WorkError when no scene could be finished.
    """
    _check(settings)
    output = Path(output)
    entries = find_scenes(settings.benchmark, Path(data), tuple(scenes))
    networks = [load_lpips(name) for name in settings.networks]
    _claim(output, settings)
    jobs = [(entry, inputs) for inputs in settings.inputs for entry in entries]
    results, failed = [], []
    for number, (entry, inputs) in enumerate(jobs, start=1):
        folder = output / "scenes" / entry.name / f"inputs_{inputs}"
        label = f"[{number}/{len(jobs)}] {entry.name}, {inputs} given"
        if (folder / "result.json").is_file():
            results.append(_read_result(folder))
            say(f"{label}: done before")
            continue
        started = time.monotonic()
        try:
            results.append(_run_scene(settings, entry, inputs, folder, splits, networks))
            say(f"{label}: {time.monotonic() - started:.0f} s")
        except KeyboardInterrupt:
            raise
        except Exception as error:  # whatever is wrong with one scene, the others can be measured
            reason = str(error) if isinstance(error, InputError) else repr(error)
            failed.append({"scene": entry.name, "inputs": inputs, "reason": reason})
            say(f"{label}: left out: {reason}")
    if not results:
        raise WorkError(f"no scene could be evaluated; the first: {failed[0]['reason']}")
    return write_reports(output, _plain(settings), results, failed, METHODS)


def _check(settings: Settings) -> None:
    if settings.benchmark not in BENCHMARKS:
        raise InputError(f"--benchmark {settings.benchmark}: expected one of {list(BENCHMARKS)}")
    if not settings.inputs or min(settings.inputs) < 1:
        raise InputError(f"--inputs must be at least 1, got {settings.inputs}")
    for name in ("steps", "views_per_round", "test_views", "fit_steps", "gaussians"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if settings.depth not in DEPTH_SOURCES and not settings.depth.endswith(".onnx"):
        raise InputError(
            f"--depth {settings.depth}: expected {', '.join(DEPTH_SOURCES)} or an .onnx file"
        )
    if settings.depth.endswith(".onnx") and not Path(settings.depth).is_file():
        raise InputError(f"--depth {settings.depth}: no such file")
    if not checkpoint_folder(settings.checkpoint).is_dir():
        raise InputError(f"--checkpoint {settings.checkpoint}: no such folder")


def _plain(settings: Settings) -> dict[str, Any]:
    """The settings as JSON values, with the full path of the checkpoint."""
    plain = json.loads(json.dumps(dataclasses.asdict(settings)))
    return {**plain, "checkpoint": str(checkpoint_folder(settings.checkpoint).resolve())}


def _claim(output: Path, settings: Settings) -> None:
    """Makes the folder ours, or checks that it is and was made with the same settings."""
    wanted = _plain(settings)
    file = output / "run.json"
    if not file.is_file():
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise InputError(
                f"{output}: not empty and not a result of `{COMMAND}`; give another --output"
            )
        write_json(file, {"command": COMMAND, "settings": wanted})
        return
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        there = content["settings"] if content["command"] == COMMAND else None
    except (OSError, ValueError, KeyError, TypeError):
        there = None
    if there is None:
        raise InputError(f"{output}: not a result of `{COMMAND}`; give another --output")
    for name, value in wanted.items():
        # More tables may be added to a folder: they share nothing but the scenes.
        if name != "inputs" and there.get(name) != value:
            raise InputError(
                f"{output}: was made with {name} = {there.get(name)}, now it is {value}; give "
                "another --output"
            )


def _run_scene(
    settings: Settings, entry: SceneEntry, inputs: int, folder: Path,
    splits: str | os.PathLike[str] | None, networks: Sequence[Lpips],
) -> dict[str, Any]:  # fmt: skip
    """One scene with so many given views: writes its folder and returns its result.json."""
    started = time.monotonic()
    scene = entry.load()
    benchmark = BENCHMARKS[settings.benchmark]
    split = choose_split(benchmark, entry, scene, inputs, splits and Path(splits))
    split = _thinned(split, settings.test_views)
    is_model = settings.depth.endswith(".onnx")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".work_", dir=folder.parent) as temporary:
        work = Path(temporary)
        task = prepare(scene, split, work, settings.depth, is_model)
        done = generate(
            task.given, trajectory=str(task.targets), truth=task.targets,
            checkpoint=settings.checkpoint, references=list(range(inputs)),
            depth=settings.depth if is_model else None, size=settings.size, steps=settings.steps,
            guidance=settings.guidance, sampler=settings.sampler,
            views_per_round=settings.views_per_round, seed=settings.seed,
        )  # fmt: skip
        pictures = _candidates(done)
        if settings.reconstruct:
            pictures |= _fits(settings, done, work)
    regions = {"all": np.ones_like(done.masks), "known": done.masks, "hole": ~done.masks}
    objects = read_masks(task, done.run["width"], done.run["height"])
    if objects is not None:
        regions["object"] = objects
    result = {
        "scene": entry.name, "inputs": inputs, "split": split.source,
        "given": [scene.names[i] for i in split.given], "test": list(task.names),
        "depth_from": task.depth_from, "size": [done.run["width"], done.run["height"]],
        "known_share": round(float(done.masks.mean()), 4), "model": done.run["model"],
        "steps": done.run["steps"], "guidance": done.run["guidance"],
        "warnings": done.run["warnings"],
        "methods": {
            name: score_views(done.truth, regions, images, networks)
            for name, images in pictures.items()
        },
        "seconds": round(time.monotonic() - started, 1),
    }  # fmt: skip
    _write_scene(folder, result, done, pictures, task)
    return result


def _thinned(split: Split, most: int | None) -> Split:
    if most is None or len(split.test) <= most:
        return split
    kept = np.linspace(0, len(split.test) - 1, most).round().astype(int)
    return dataclasses.replace(split, test=tuple(split.test[i] for i in kept))


def _candidates(done: Generated) -> dict[str, np.ndarray]:
    """What `generate` made and its baselines: [N, h, w, 3] uint8 by key of `METHODS`."""
    nearest = nearest_reference(done.cameras, done.reference_cameras)
    return {
        "nearest_photo": done.references[nearest],
        "raw_warp": done.warps,
        "telea": done.inpainted,
        "model": done.generated,
        "model_known_kept": done.composited,
    }


def _fits(settings: Settings, done: Generated, work: Path) -> dict[str, np.ndarray]:
    """Renders at the test cameras of Gaussians fitted without and with what the model made."""
    count = len(done.truth)
    given = {
        f"given_{i:03d}": (image, done.reference_cameras[i])
        for i, image in enumerate(done.references)
    }
    made = {f"made_{i:03d}": (done.composited[i], done.cameras[i]) for i in range(count)}
    test = {f"test_{i:03d}": (done.truth[i], done.cameras[i]) for i in range(count)}
    renders = {}
    for name, train in (("gaussians_inputs", given), ("gaussians_model", {**given, **made})):
        if len(train) < 2:
            continue  # one photo alone has no shape
        source = write_pictures(work / name, train, test)
        fit_gaussians(
            source, work / f"{name}_fit", steps=settings.fit_steps,
            num_gaussians=settings.gaussians, max_size=max(done.truth.shape[1:3]),
            seed=settings.seed, orbit_frames=1, progress=False,
        )  # fmt: skip
        folder = work / f"{name}_fit" / "renders"
        renders[name] = np.stack([read_image(folder / f"{stem}.png") for stem in test])
    return renders


def _write_scene(
    folder: Path, result: dict[str, Any], done: Generated, pictures: dict[str, np.ndarray],
    task: Task,
) -> None:  # fmt: skip
    shown = np.unique(np.linspace(0, len(done.truth) - 1, _SHEET_VIEWS).round().astype(int))
    rows = {METHODS[name]: images for name, images in pictures.items()} | {"truth": done.truth}
    cells = [[images[i] for i in shown] for images in rows.values()]
    sheet = contact_sheet(
        [list(done.references[:_SHEET_VIEWS]), *cells],
        row_labels=["given", *rows], cell_height=_SHEET_HEIGHT,
    )  # fmt: skip
    with atomic_path(folder) as whole:
        whole.mkdir()
        for name, images in {**pictures, "truth": done.truth}.items():
            for i, image in enumerate(images):
                write_image(whole / name / f"{i:03d}.png", image)
        for i, mask in enumerate(done.masks):
            write_image(whole / "masks" / f"{i:03d}.png", np.where(mask, 255, 0).astype(np.uint8))
        write_image(whole / "sheet.jpg", sheet, quality=85)
        write_json(whole / "result.json", result)


def _read_result(folder: Path) -> dict[str, Any]:
    file = folder / "result.json"
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
        return {**result, "scene": result["scene"], "methods": result["methods"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{file}: cannot be read ({error}); remove its folder to have it made again"
        ) from error
