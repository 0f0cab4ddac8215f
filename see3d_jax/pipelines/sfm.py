"""Cameras of photos that come without any, by structure from motion (pycolmap, extra `sfm`).

The photos are turned upright, shrunk to 1600 pixels and matched pair by pair; COLMAP finds the
cameras and sparse points, and lens distortion is taken out of the pictures. What comes out is a
scene folder like any other, kept beside the result and found again as long as the photos are the
same:
    images/*.jpg  sparse/0/{cameras,images,points3D}.txt  sfm.json (what was matched and found)
When it cannot be done, one line says why: no overlap, no parallax, too few photos, no time.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from see3d_jax.errors import InputError, WorkError
from see3d_jax.files import atomic_path, write_json
from see3d_jax.media import image_size, read_image, upright_jpeg
from see3d_jax.pipelines.inputs import Scene, has_cameras, list_photos, load_scene, unique_names
from see3d_jax.pipelines.matching import Matcher, load_matcher, verified

MAX_SIDE = 1600  # pixels; more finds hardly more points and takes longer
MAX_SECONDS = 3600.0
_FEWEST = 3  # registered photos, where that many are given
_REPORT = "sfm.json"
_WORKER = Path(__file__).with_name("sfm_worker.py")


def open_scene(
    source: str | os.PathLike[str],
    cameras_folder: str | os.PathLike[str] | None,
    matcher: str | os.PathLike[str] | None = None,
) -> Scene:
    """A posed scene as it is; a folder of photos without cameras after structure from motion.

    Args:
      source: folder, or a camera file in it (see `load_scene`).
      cameras_folder: where the cameras of unposed photos are kept; None: such photos are refused.
      matcher: a learned matcher for them (see `pipelines.matching`); default COLMAP's SIFT.

    Raises InputError when the folder holds neither, or says why no cameras can be found.
    """
    folder = Path(source)
    if cameras_folder is None or not folder.is_dir() or has_cameras(folder):
        return load_scene(folder)
    return load_scene(find_cameras(folder, cameras_folder, matcher=matcher))


def beside(output: str | os.PathLike[str]) -> Path:
    """Where the cameras of unposed photos are kept for a result folder: OUTPUT_cameras."""
    output = Path(output)
    return output.with_name(f"{output.name}_cameras")


def find_cameras(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    matcher: str | os.PathLike[str] | None = None,
    seed: int = 0,
    max_seconds: float = MAX_SECONDS,
) -> Path:
    """Structure from motion of the photos in `source`; returns `target`, a scene folder.

    `target` is left as it is when it was made from the same photos. Photos that fit nowhere are
    left out of it and named in its sfm.json and on stderr.

    Raises InputError when the photos do not allow it, WorkError when it takes too long or fails.
    """
    source, target = Path(source), Path(target)
    photos = list_photos(source)
    if len(photos) < 2:
        raise InputError(
            f"{source}: one photo shows no parallax; give it alone (--input PHOTO) with --depth"
        )
    match = load_matcher(matcher) if matcher is not None else None
    key: dict[str, Any] = {"photos": {photo.name: _digest(photo) for photo in photos}, "seed": seed}
    key["matcher"] = matcher and _digest(Path(matcher))
    if _is_ours(target, key):
        return target
    if target.exists() and not (target / _REPORT).is_file():
        raise InputError(f"{target}: exists and holds no cameras of ours; move it away")
    if importlib.util.find_spec("pycolmap") is None:
        raise InputError(
            f"{source}: has no camera file, and finding cameras needs another package; "
            "pip install 'see3d_jax[sfm]', or give transforms.json or a COLMAP model"
        )
    print(f"finding the cameras of {len(photos)} photos ...", file=sys.stderr)
    with atomic_path(target) as scene:
        work = scene.with_name("work")
        names = _prepare(photos, work / "photos")
        sizes = {image_size(work / "photos" / name) for name in names}
        job = {"folder": str(work), "one_camera": len(sizes) == 1, "seed": seed}
        (work / "job.json").write_text(json.dumps(job), encoding="utf-8")
        if match is not None:
            _match_pairs(match, work, names)
        _run_worker(work, source, len(photos), max_seconds)
        found = _read(work / "result.json")
        _check(source, names, found["matches"], found["registered"])
        left_out = sorted(set(names) - set(found["registered"]))
        os.replace(work / "scene", scene)
        write_json(scene / _REPORT, {**key, **found, "left_out": left_out})
    if left_out:
        print(f"found no camera for {', '.join(left_out)}: left out", file=sys.stderr)
    return target


def _prepare(photos: Sequence[Path], folder: Path) -> list[str]:
    """Upright JPEG copies that COLMAP can read; returns their names."""
    names = [f"{stem}.jpg" for stem in unique_names([photo.name for photo in photos])]
    for photo, name in zip(photos, names, strict=True):
        upright_jpeg(photo, folder / name, MAX_SIDE)
    return names


def _match_pairs(match: Matcher, work: Path, names: list[str]) -> None:
    """Writes what a learned matcher finds in all pairs, for the worker: work/matches.npz.

    points_I [N, 2] are the points of photo I, pair_I_J [K, 2] indices into those of I and J. Points
    within a quarter of a pixel are one, so that they can be followed from pair to pair.
    """
    pictures = [read_image(work / "photos" / name) for name in names]
    points: list[dict[tuple[int, int], int]] = [{} for _ in names]
    arrays = {}
    for i, j in itertools.combinations(range(len(names)), 2):
        found = verified(match(pictures[i], pictures[j]), threshold=3.0)
        columns = [
            [table.setdefault(tuple(place), len(table)) for place in np.rint(4 * at).astype(int)]
            for table, at in ((points[i], found.first), (points[j], found.second))
        ]
        if len(found):
            arrays[f"pair_{i}_{j}"] = np.unique(np.array(columns, np.uint32).T, axis=0)
    for i, table in enumerate(points):
        places = np.array(list(table), np.float32).reshape(-1, 2) / 4
        arrays[f"points_{i}"] = places
    np.savez(work / "matches.npz", names=np.array(names), **arrays)


def _run_worker(work: Path, source: Path, count: int, max_seconds: float) -> None:
    """Runs the worker to its end; WorkError says how it failed, with COLMAP's last words."""
    # -P: the worker's folder must not be searched for modules, ours have common names.
    command = [sys.executable, "-P", str(_WORKER), str(work / "job.json")]
    log = work / "log.txt"
    with log.open("w", encoding="utf-8") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
        try:
            code = process.wait(max_seconds)
        except subprocess.TimeoutExpired:
            raise WorkError(
                f"{source}: structure from motion of {count} photos took more than "
                f"{max_seconds:g} s; give fewer photos, or their cameras"
            ) from None
        finally:
            process.kill()  # whatever ends the wait, Ctrl-C too, ends the worker
            process.wait()
    if code == 0:
        return
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    last = next((line for line in reversed(lines) if line.strip()), "it said nothing")
    raise WorkError(f"{source}: structure from motion {how}: {last.strip()[:200]}")


def _check(source: Path, names: list[str], matches: list[list], registered: list[str]) -> None:
    """InputError that says why there is no usable model, if there is none."""
    if not matches:
        raise InputError(
            f"{source}: no two of the {len(names)} photos overlap (none share 15 points that fit "
            "one motion of the camera); each photo must show half of what another one shows"
        )
    first, second, most = max(matches, key=lambda match: match[2])
    if len(matches) == 1 and len(names) > 2:
        raise InputError(
            f"{source}: only one pair of the {len(names)} photos overlaps, {first} and {second} "
            f"({most} common points); each photo must show half of what another one shows"
        )
    if not registered:
        raise InputError(
            f"{source}: photos overlap (best: {first} and {second}, {most} common points) but show "
            "no parallax; move the camera between photos, turning it is not enough"
        )
    if len(registered) < min(_FEWEST, len(names)):
        raise InputError(
            f"{source}: only {', '.join(registered)} of the {len(names)} photos fit together "
            f"({len(matches)} pairs overlap); take more photos in between"
        )


def _is_ours(target: Path, key: dict[str, Any]) -> bool:
    try:
        report = _read(target / _REPORT)
        return all(report[name] == value for name, value in key.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
