"""Fills warps that are there already: a folder laid out for the official See3D release.

    reference_images/*              photos, the first of which gives the context
    warp_images/warp_NAME.*         views to complete, black where nothing is known
    warp_images/mask_NAME.*         white = known; of the size of its warp

There are no cameras and no depth in it, so none come out: NAME.png in views/ (the result),
generated/ and warps/, masks/, contact_sheet.png, video.mp4 and run.json. The official script
squashes everything to 512²; here the aspect ratio of the warps is kept.
Images are uint8 RGB [h, w, 3], masks bool with True = known.
"""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from see3d_jax.errors import InputError
from see3d_jax.files import atomic_path, write_json
from see3d_jax.media import IMAGE_SUFFIXES, contact_sheet, read_image, write_image, write_mp4
from see3d_jax.pipelines.export import COMMAND, check_output_folder
from see3d_jax.pipelines.generation import working_size
from see3d_jax.pipelines.group_sampling import sample_groups
from see3d_jax.pipelines.pretrained import load_model
from see3d_jax.pipelines.warps import resize_image

_KNOWN = 0.9  # of a pixel, as in the released code
_SHEET_VIEWS = 8


@dataclasses.dataclass(frozen=True)
class ReadyWarps:
    """N warps [h, w, 3] of one size with their masks [h, w], and R references of any size."""

    names: tuple[str, ...]
    references: tuple[np.ndarray, ...]
    warps: tuple[np.ndarray, ...]
    masks: tuple[np.ndarray, ...]


@dataclasses.dataclass(frozen=True)
class Filled:
    """What `fill_ready_warps` returns: [N, h, w, 3] uint8 each, masks [N, h, w] bool.

    `views` is the result: `generated`, with the known pixels of the warps put back if asked for.
    """

    names: tuple[str, ...]
    references: np.ndarray
    warps: np.ndarray
    masks: np.ndarray
    generated: np.ndarray
    views: np.ndarray
    run: dict[str, Any]


def holds_ready_warps(folder: str | os.PathLike[str]) -> bool:
    """Whether the folder is laid out for the official release."""
    return (Path(folder) / "warp_images").is_dir()


def load_ready_warps(folder: str | os.PathLike[str]) -> ReadyWarps:
    """Reads the folder; InputError names what is missing or does not fit."""
    folder = Path(folder)
    references = _pictures(folder / "reference_images")
    files = _pictures(folder / "warp_images")
    warps = {path.stem.removeprefix("warp_"): path for path in files if path.stem[:5] == "warp_"}
    masks = {path.stem.removeprefix("mask_"): path for path in files if path.stem[:5] == "mask_"}
    if not references:
        raise InputError(f"{folder / 'reference_images'}: holds no picture; a reference is needed")
    if not warps:
        raise InputError(f"{folder / 'warp_images'}: holds no picture called warp_*")
    pictures, known = [], []
    for name, path in warps.items():
        if name not in masks:
            raise InputError(f"{path}: has no mask; mask_{name} (white = known) must lie beside it")
        picture, mask = read_image(path), read_image(masks[name])[..., 0]
        if picture.shape[:2] != mask.shape:
            raise InputError(f"{masks[name]}: {_size(mask)}, but its warp is {_size(picture)}")
        if pictures and picture.shape != pictures[0].shape:
            raise InputError(f"{path}: {_size(picture)}, but the warps before are "
                             f"{_size(pictures[0])}; all must be of one size")  # fmt: skip
        pictures.append(picture)
        known.append(mask / 255 > _KNOWN)
    given = tuple(read_image(path) for path in references)
    return ReadyWarps(tuple(warps), given, tuple(pictures), tuple(known))


def fill_ready_warps(
    source: str | os.PathLike[str],
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    sampler: str = "ddim",
    unet: str | None = None,
    prompt: str | None = None,
    size: int | None = None,
    composite: bool | None = None,
    seed: int = 0,
) -> Filled:
    """Completes the warps of a folder; the options are those of `pipelines.generate`.

    Raises InputError for anything wrong with the folder or the options, naming it.
    """
    started = time.monotonic()
    ready = load_ready_warps(source)
    model = load_model(
        checkpoint, unet=unet, references=len(ready.references), sampler=sampler, prompt=prompt
    ).sampled_with(steps, guidance)
    composite = model.composite if composite is None else composite
    rows, columns = ready.masks[0].shape
    side = size or model.image_size
    width, height = working_size(columns, rows, side, model.size_multiple)
    references, warps = (
        np.stack([resize_image(picture, width, height) for picture in pictures])
        for pictures in (ready.references, ready.warps)
    )
    shares = [resize_image(mask.astype(np.float32), width, height) for mask in ready.masks]
    masks = np.stack(shares) > _KNOWN
    warps = np.where(masks[..., None], warps, 0)
    generated = sample_groups(model, references, warps, masks, seed)
    views = np.where(masks[..., None], warps, generated) if composite else generated
    run = {
        "input": str(source), "checkpoint": checkpoint and str(checkpoint), "model": model.name,
        "sampler": sampler, "steps": model.sampling.num_steps, "guidance": model.sampling.guidance,
        "prompt": prompt,
        "composite": composite, "seed": seed, "width": width, "height": height,
        "references": len(references), "known_share": round(float(masks.mean()), 4),
        "seconds": round(time.monotonic() - started, 2),
    }  # fmt: skip
    return Filled(ready.names, references, warps, masks, generated, views, run)


def write_filled(result: Filled, output: str | os.PathLike[str]) -> Path:
    """Writes the folder described above, whole or not at all; returns its path."""
    output = Path(output)
    check_output_folder(output)
    stages = {
        "views": result.views, "generated": result.generated, "warps": result.warps,
        "masks": np.where(result.masks, 255, 0).astype(np.uint8),
    }  # fmt: skip
    shown = np.linspace(0, len(result.names) - 1, min(len(result.names), _SHEET_VIEWS)).astype(int)
    with atomic_path(output) as folder:
        folder.mkdir()
        for stage, pictures in stages.items():
            for name, picture in zip(result.names, pictures, strict=True):
                write_image(folder / stage / f"{name}.png", picture)
        rows = [list(result.references), *([p[i] for i in shown] for p in
                (result.warps, result.generated, result.views))]  # fmt: skip
        labels = ["given", "warp", "generated", "result"]
        sheet = contact_sheet(rows, row_labels=labels, cell_height=max(112, result.views.shape[1]))
        write_image(folder / "contact_sheet.png", sheet)
        write_mp4(folder / "video.mp4", list(result.views), fps=4)
        content = {"command": COMMAND, "views": list(result.names), **result.run}
        write_json(folder / "run.json", content)
    return output


def _pictures(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder (the official layout needs it)")
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)


def _size(picture: np.ndarray) -> str:
    return f"{picture.shape[1]}×{picture.shape[0]}"
