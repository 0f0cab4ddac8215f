"""Writes generated views as a folder that people can look at and `see3d reconstruct` can read.

    views/00000.png       the final views           references/NAME.png  the given images
    generated/ composited/ as the model made them / with the known pixels of the warp put back
    warps/ masks/ depth/  the warp, its known pixels (white), its planar depth (16 bit, 0 = hole)
    inpainted/            the warp filled by OpenCV, the baseline to beat
    enlarged/             after super-resolution, if asked for: views/ and their transforms.json
    transforms.json       nerfstudio cameras of views and references    splits.json  held-out views
    sparse/0/             the same cameras as a COLMAP text model, without points
    report.html           the same for reading: contact sheet, cameras, scores, rounds, warnings
    cameras.png           where the cameras are, among the points of the references
    contact_sheet.png video.mp4 run.json metrics.json (when the true images are known)

The folder appears whole or not at all. transforms.json names no `mask_path`: there, nerfstudio and
others would drop the masked pixels, and with them everything that was generated.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from see3d_jax import html
from see3d_jax.errors import InputError
from see3d_jax.files import atomic_path, write_json
from see3d_jax.geometry.cameras import Camera
from see3d_jax.geometry.colmap_files import write_colmap
from see3d_jax.geometry.scene_files import PosedImages, write_transforms
from see3d_jax.media import contact_sheet, write_image, write_mp4
from see3d_jax.pipelines.camera_plot import plot_cameras, scene_points
from see3d_jax.pipelines.generation import Generated
from see3d_jax.pipelines.warps import View

COMMAND = "see3d generate"  # in run.json: how a folder is known to be ours
ROUNDS = "rounds"  # subfolder of finished rounds, there until the result is
_SHEET_VIEWS = 8
_VIDEO_SECONDS_PER_VIEW = 0.25


def check_output_folder(output: str | os.PathLike[str]) -> None:
    """Refuses, before any work, an output folder that holds something we did not write."""
    output = Path(output)
    if output.exists() and not output.is_dir():
        raise InputError(f"{output}: is a file; --output must be a folder")
    if output.is_dir() and any(output.iterdir()):
        try:
            ours = f'"{COMMAND}"' in (output / "run.json").read_text(encoding="utf-8")
        except (OSError, ValueError):
            ours = _only_rounds(output)
        if not ours:
            raise InputError(
                f"{output}: not empty and not a result of `{COMMAND}`; give another --output"
            )


def _only_rounds(output: Path) -> bool:
    """Whether the folder holds nothing but the rounds of a run that was interrupted."""
    return [entry.name for entry in output.iterdir()] == [ROUNDS] and all(
        entry.name.startswith(".") or re.fullmatch(r"\d{5}\.npz", entry.name)
        for entry in (output / ROUNDS).iterdir()
    )


def write_generated(
    result: Generated, output: str | os.PathLike[str], photos: Mapping[str, View] | None = None
) -> Path:
    """Writes the folder described above, replacing an earlier result; returns its path.

    `photos`, by name and each of its own size, take the place of the result's references.
    Raises InputError when `output` holds something else.
    """
    output = Path(output)
    check_output_folder(output)
    stems = [f"{i:05d}" for i in range(len(result.views))]
    photos = _references(result) if photos is None else photos
    with atomic_path(output) as folder:
        folder.mkdir()
        for name, images in (
            ("views", result.views),
            ("generated", result.generated),
            ("composited", result.composited),
            ("warps", result.warps),
            ("inpainted", result.inpainted),
            ("masks", np.where(result.masks, 255, 0).astype(np.uint8)),
        ):
            for stem, image in zip(stems, images, strict=True):
                write_image(folder / name / f"{stem}.png", image)
        for name, photo in photos.items():
            write_image(folder / "references" / f"{name}.png", photo.image)
        _write_cameras(result, photos, folder, stems)
        if result.enlarged is not None:
            _write_enlarged(result.enlarged, result.cameras, folder / "enlarged", stems)
        sheet = _sheet(result, [photo.image for photo in photos.values()])
        write_image(folder / "contact_sheet.png", sheet)
        plot = plot_cameras(
            [photo.camera for photo in photos.values()],
            [result.cameras[i] for i in range(len(stems))],
            *scene_points(list(photos.values())),
        )
        write_image(folder / "cameras.png", plot)
        _write_report(result, folder / "report.html", sheet, plot)
        write_mp4(folder / "video.mp4", _slow(result.views), fps=1 / _VIDEO_SECONDS_PER_VIEW)
        write_json(
            folder / "run.json",
            {"command": COMMAND, "views": stems, "note": _note(result), **result.run},
        )
        if result.metrics is not None:
            write_json(folder / "metrics.json", result.metrics)
    return output


def _references(result: Generated) -> dict[str, View]:
    return {
        name: View(result.references[i], result.reference_depths[i], result.reference_cameras[i])
        for i, name in enumerate(result.reference_names)
    }


def _write_cameras(
    result: Generated, photos: Mapping[str, View], folder: Path, stems: list[str]
) -> None:
    depths = {f"depth/{stem}.png": depth for stem, depth in zip(stems, result.depths, strict=True)}
    depths |= {f"depth/reference_{name}.png": photo.depth for name, photo in photos.items()}
    # 16 bits spread over the range that is there: depth may be in any unit.
    unit = max(float(depth.max()) for depth in depths.values()) / 65535
    for name, depth in depths.items():
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(np.round(depth / unit).astype(np.uint16)).save(folder / name)
    images = PosedImages(
        files=(
            *(f"views/{stem}.png" for stem in stems),
            *(f"references/{name}.png" for name in photos),
        ),
        cameras=(
            *(result.cameras[i] for i in range(len(stems))),
            *(photo.camera for photo in photos.values()),
        ),
        depth_files=tuple(depths),
        depth_unit=unit,
    )
    write_transforms(folder / "transforms.json", images)
    write_colmap(folder / "sparse" / "0", images)  # file names are relative to the folder
    # References are photographs: never hold them out. At least one view is always left to score.
    test = list(range(4, len(stems), 8)) or [len(stems) - 1]
    rest = [i for i in range(len(images.files)) if i not in test]
    write_json(folder / "splits.json", {"test": test, "train_all": rest})


def _write_enlarged(images: np.ndarray, cameras: Camera, folder: Path, stems: list[str]) -> None:
    """A posed scene of its own: pictures and cameras of another size."""
    files = tuple(f"views/{stem}.png" for stem in stems)
    for name, image in zip(files, images, strict=True):
        write_image(folder / name, image)
    height, width = images.shape[1:3]
    large = cameras.resized(width, height)
    write_transforms(
        folder / "transforms.json", PosedImages(files, tuple(large[i] for i in range(len(files))))
    )


def _write_report(result: Generated, file: Path, sheet: np.ndarray, plot: np.ndarray) -> None:
    parts = [
        html.paragraph(_note(result)),
        *(html.paragraph(f"Note: {warning}.") for warning in result.run["warnings"]),
        html.section("Views", html.image(sheet, "by stage")),
        html.section("Cameras", html.image(plot, "from above, from the side; given views in red")),
    ]
    if result.metrics is not None:
        regions = ("all", "known", "hole")
        rows = [
            [name, *("–" if (v := scores[region]["psnr"]) is None else v for region in regions)]
            for name, scores in result.metrics["methods"].items()
        ]
        parts.append(html.section("PSNR (dB)", html.table(["method", *regions], rows)))
    fields = ("views", "anchors", "known_share", "known_by_references")
    rows = [[done[field] for field in fields] for done in result.run["rounds"]]
    parts.append(html.section("Rounds", html.table(fields, rows)))
    rows = [[key, value] for key, value in result.run.items() if key not in ("rounds", "warnings")]
    parts.append(html.section("Settings", html.table(["setting", "value"], rows)))
    html.write_page(file, "Generated views", *parts)


def _note(result: Generated) -> str:
    final = (
        "with the known pixels of the warp put back (--composite)"
        if result.run["composite"]
        else "exactly as the model made them"
    )
    return (
        f"views/ holds {len(result.views)} views {final}; both forms are kept, in generated/ and "
        "composited/."
    )


def _sheet(result: Generated, photos: list[np.ndarray]) -> np.ndarray:
    """Stages as rows, views as columns: the references first, then evenly chosen views."""
    chosen = np.unique(np.linspace(0, len(result.views) - 1, _SHEET_VIEWS).round().astype(int))
    rows = [
        ("warp", result.warps),
        ("known (white)", np.repeat(result.masks[..., None] * np.uint8(255), 3, -1)),
        ("inpainted (Telea)", result.inpainted),
        ("generated", result.generated),
        ("… composited", result.composited),
    ]
    if result.truth is not None:
        rows.append(("truth", result.truth))
    cells = [photos] + [[images[i] for i in chosen] for _, images in rows]
    labels = ["given", *(label for label, _ in rows)]
    return contact_sheet(
        cells,
        row_labels=labels,
        cell_height=max(112, result.views.shape[1]),
    )


def _slow(views: np.ndarray) -> list[np.ndarray]:
    """There and back, so that a player that loops shows no jump; small views are enlarged."""
    order = [*range(len(views)), *range(len(views) - 2, 0, -1)]
    grow = max(1, round(256 / views.shape[1]))
    return [np.repeat(np.repeat(views[i], grow, 0), grow, 1) for i in order]
