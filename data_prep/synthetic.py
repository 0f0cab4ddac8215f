"""Makes synthetic training clips: ray-traced textured scenes with exact depth, poses, intrinsics.

    DIR/scenes/<clip>/images/%05d.png, depth/%05d.png, transforms.json, splits.json
    DIR/videos/<clip>.mp4                    the same frames as raw video, for curation
    DIR/records/clips-*.array_record         posed clips with depth, for training
    DIR/contact_sheet.png

Depth is planar z at pixel centres, uint16 in steps of 0.5 mm; transforms.json has nerfstudio axes.
Clip i of a seed is the same whatever the number of clips or processes; finished clips are kept when
the command runs again.
"""

from __future__ import annotations

import concurrent.futures
import json
import multiprocessing
import os
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np
from PIL import Image

from see3d_jax.errors import InputError, run_command
from see3d_jax.files import atomic_path, write_json
from see3d_jax.media import contact_sheet, read_image, write_image, write_mp4

if TYPE_CHECKING:
    from see3d_jax.data.records import ClipRecord

DEPTH_UNIT = 5e-4  # metres a step: 32 m fit into 16 bits, more than any scene here is deep
_RECIPE = 1  # raise when the same seed would give other clips


def clip_name(index: int) -> str:
    """Name of clip `index`."""
    return f"clip_{index:05d}"


def make_clip(
    output: str | os.PathLike[str], index: int, settings: dict[str, float | int]
) -> ClipRecord:
    """Renders clip `index` into `output` unless it is there already; returns its record.

    `settings` has seed, frames, width, height, fps and supersample. The scene folder and the video
    appear whole or not at all. Raises InputError when the folder holds this clip made otherwise.
    """
    scene_folder = Path(output) / "scenes" / clip_name(index)
    if scene_folder.is_dir():
        _check_same_settings(scene_folder, settings)
    else:
        _render_clip(scene_folder, index, settings)
    video = Path(output) / "videos" / f"{clip_name(index)}.mp4"
    images = [read_image(path) for path in sorted((scene_folder / "images").glob("*.png"))]
    if not video.is_file():
        write_mp4(video, images, settings["fps"])
    return _record(scene_folder, images, settings)


def _check_same_settings(scene_folder: Path, settings: dict) -> None:
    try:
        made_with = json.loads((scene_folder / "transforms.json").read_text()).get("synthetic")
    except (OSError, ValueError) as error:
        raise InputError(f"{scene_folder}: damaged; remove the folder ({error})") from error
    if made_with != {**settings, "recipe": _RECIPE}:
        raise InputError(
            f"{scene_folder}: holds a clip made with other settings; give another --output"
        )


def _render_clip(scene_folder: Path, index: int, settings: dict) -> None:
    from data_prep.raytrace import render
    from data_prep.synthetic_scenes import PATHS, SCENES, camera_path
    from see3d_jax.data.records import encode_depth
    from see3d_jax.geometry.cameras import Camera, intrinsics_matrix
    from see3d_jax.geometry.scene_files import PosedImages, write_transforms

    rng = np.random.default_rng([settings["seed"], index])
    frames, width, height = settings["frames"], settings["width"], settings["height"]
    # kinds take turns so that a handful of clips already has every one
    path = PATHS[index // len(SCENES) % len(PATHS)]
    focal = 0.5 * max(width, height) / np.tan(0.5 * np.radians(rng.uniform(52, 68)))
    intrinsics = intrinsics_matrix(focal, focal, width / 2, height / 2)
    poses = None
    while poses is None:  # a scene too crowded for any path is rare: draw another one
        scene = SCENES[index % len(SCENES)](rng)
        poses = camera_path(scene, path, frames, intrinsics, rng)
    names = [f"{i:05d}.png" for i in range(frames)]
    with atomic_path(scene_folder) as folder:
        (folder / "images").mkdir(parents=True)
        (folder / "depth").mkdir()
        for name, pose in zip(names, poses, strict=True):
            image, depth = render(
                scene.world, intrinsics, pose, width, height, settings["supersample"]
            )
            Image.fromarray(image).save(folder / "images" / name, compress_level=4)
            (folder / "depth" / name).write_bytes(encode_depth(depth, DEPTH_UNIT))
        cameras = tuple(Camera(intrinsics, pose, width, height) for pose in poses)
        extra = {
            "synthetic": {**settings, "recipe": _RECIPE},
            "scene": SCENES[index % len(SCENES)].__name__,
            "trajectory": path,
        }
        write_transforms(
            folder / "transforms.json",
            PosedImages(
                tuple(f"images/{name}" for name in names), cameras,
                tuple(f"depth/{name}" for name in names), None, DEPTH_UNIT, extra=extra,
            ),
        )  # fmt: skip
        write_json(folder / "splits.json", _splits(frames))


def _splits(frames: int) -> dict[str, list[int]]:
    """Every 8th frame is held out; few-view sets are evenly spaced over the rest."""
    train = [i for i in range(frames) if i % 8]
    splits = {"test": list(range(0, frames, 8)), "train_all": train}
    for views in (3, 6, 9):
        if len(train) >= views:
            places = np.linspace(0, len(train) - 1, views).round().astype(int)
            splits[f"train_{views}"] = [train[p] for p in places]
    splits["single"] = [train[len(train) // 2]]
    return splits


def _record(scene_folder: Path, images: list[np.ndarray], settings: dict) -> ClipRecord:
    from see3d_jax.data.records import ClipRecord, encode_jpeg
    from see3d_jax.geometry.scene_files import read_transforms

    posed = read_transforms(scene_folder / "transforms.json")
    return ClipRecord(
        clip_id=f"synthetic-{settings['seed']}-{scene_folder.name}",
        source=f"{scene_folder.name}.mp4",
        fps=float(settings["fps"]),
        timestamps=(np.arange(len(images)) / settings["fps"]).astype(np.float32),
        images=tuple(encode_jpeg(image) for image in images),
        height=settings["height"],
        width=settings["width"],
        depth=tuple((scene_folder / file).read_bytes() for file in posed.depth_files),
        depth_unit=DEPTH_UNIT,
        intrinsics=np.stack([camera.intrinsics for camera in posed.cameras]),
        world_to_camera=np.stack([camera.world_to_camera for camera in posed.cameras]),
    )


def make_dataset(output: str | os.PathLike[str], clips: int, settings: dict, jobs: int) -> Path:
    """Makes `clips` clips in `jobs` processes, their record shards and a contact sheet."""
    from tqdm import tqdm

    from see3d_jax.data.records import encode, write_shards

    output = Path(output)
    if output.is_file():
        raise InputError(f"{output}: is a file; --output must be a folder")
    records: list[bytes | None] = [None] * clips
    bar = tqdm(total=clips, unit="clip", desc="synthetic clips")
    with bar, _executor(min(jobs, clips)) as executor:
        futures = {executor.submit(make_clip, output, i, settings): i for i in range(clips)}
        try:
            for future in concurrent.futures.as_completed(futures):
                records[futures[future]] = encode(future.result())
                bar.update()
        except BaseException:
            executor.shutdown(cancel_futures=True)
            raise
    write_shards(records, output / "records", num_shards=max(1, clips // 64))
    write_image(output / "contact_sheet.png", _sheet(output, clips, settings["frames"]))
    return output


class _InProcess(concurrent.futures.Executor):
    """Runs each task when it is submitted: for one job, without starting a process."""

    def submit(self, function, /, *args, **kwargs) -> concurrent.futures.Future:  # noqa: ANN001
        future: concurrent.futures.Future = concurrent.futures.Future()
        try:
            future.set_result(function(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def _executor(jobs: int) -> concurrent.futures.Executor:
    if jobs <= 1:
        return _InProcess()
    # spawned, not forked: a forked child of a process that runs threads may hang
    context = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context)


def _sheet(output: Path, clips: int, frames: int) -> np.ndarray:
    """Rows of clips: five frames and the depth (near = bright) of the last of them."""
    from see3d_jax.data.records import decode_depth

    rows, labels = [], []
    for index in range(min(clips, 24)):
        folder = output / "scenes" / clip_name(index)
        shown = [f"{i:05d}.png" for i in np.linspace(0, frames - 1, 5).round().astype(int)]
        row = [read_image(folder / "images" / name) for name in shown]
        depth = decode_depth((folder / "depth" / shown[-1]).read_bytes(), DEPTH_UNIT)
        nearness = depth[depth > 0].min() / np.where(depth > 0, depth, np.inf)
        row.append(np.repeat(nearness[..., None], 3, -1))
        rows.append(row)
        labels.append(clip_name(index))
    columns = ["first", "", "middle", "", "last", "its depth"]
    return contact_sheet(rows, labels, columns, cell_height=min(144, rows[0][0].shape[0]))


def _parse_size(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, int]:
    try:
        width, height = (int(part) for part in value.lower().split("x"))
    except ValueError:
        raise click.BadParameter(f"expected WIDTHxHEIGHT such as 192x192, got {value!r}") from None
    if not (16 <= width <= 4096 and 16 <= height <= 4096):
        raise click.BadParameter(f"width and height must be 16 to 4096 pixels, got {value}")
    return width, height


@click.command(
    epilog="""\b
Examples:
  python -m data_prep.synthetic --output /tmp/clips --clips 24
  python -m data_prep.synthetic --output /tmp/held_out --clips 1 --seed 100 --size 320x240
"""
)
@click.option("--output", required=True, type=click.Path(), help="Folder to write into.")
@click.option("--clips", required=True, type=click.IntRange(min=1), help="Number of clips.")
@click.option("--frames", default=36, show_default=True, type=click.IntRange(min=2),
              help="Frames per clip.")  # fmt: skip
@click.option("--size", default="192x192", show_default=True, callback=_parse_size,
              help="WIDTHxHEIGHT in pixels.")  # fmt: skip
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0),
              help="Same seed, same bytes.")  # fmt: skip
@click.option("--fps", default=10.0, show_default=True, type=click.FloatRange(1, 120),
              help="Frame rate of the videos.")  # fmt: skip
@click.option("--supersample", default=2, show_default=True, type=click.IntRange(1, 4),
              help="Rays per pixel along each axis.")  # fmt: skip
@click.option("--jobs", default=None, type=click.IntRange(min=1),
              help="Processes; all cores by default.")  # fmt: skip
def app(
    output: str, clips: int, frames: int, size: tuple[int, int], seed: int, fps: float,
    supersample: int, jobs: int | None,
) -> None:  # fmt: skip
    """Ray-traces textured scenes with exact depth and poses: images, videos and records."""
    settings = {
        "seed": seed, "frames": frames, "width": size[0], "height": size[1], "fps": fps,
        "supersample": supersample,
    }  # fmt: skip
    folder = make_dataset(output, clips, settings, jobs or os.cpu_count() or 1)
    click.echo(f"wrote {clips} clips: {folder}/scenes, {folder}/videos, {folder}/records")
    click.echo(f"look at {folder}/contact_sheet.png")


def main() -> None:
    """Console entry."""
    run_command(lambda: app(standalone_mode=False))


if __name__ == "__main__":
    main()
