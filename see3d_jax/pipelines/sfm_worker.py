"""Structure from motion by pycolmap, as a process of its own: `python -P sfm_worker.py JOB.json`.

A process, because COLMAP may abort the interpreter it runs in, and because it has to be stopped
when it takes too long. Reads the job that `pipelines.sfm` wrote (and its matches.npz, if it matched
the photos itself); leaves `result.json` in the job's
folder and, if there is a model, a scene folder `scene` with undistorted images and a pinhole COLMAP
model as text. Imports nothing of this project.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pycolmap


def run(folder: Path, one_camera: bool, seed: int) -> None:
    """Reconstructs the photos in folder/photos; see the module docstring for what is left there."""
    photos = folder / "photos"
    count = len(list(photos.iterdir()))
    best: pycolmap.Reconstruction | None = None
    given = folder / "matches.npz"
    attempts = (False,) if given.is_file() else (False, True)
    for thorough in attempts:  # the second attempt takes several times as long
        place = folder / f"attempt_{int(thorough)}"
        place.mkdir()
        database = place / "database.db"
        if given.is_file():
            _import_matches(photos, database, one_camera, given, seed)
        else:
            _match(photos, database, one_camera, thorough, seed)
        matches = _matched_pairs(database)
        options = pycolmap.IncrementalPipelineOptions()
        options.min_model_size = 2  # 10 by default
        options.num_threads = options.mapper.num_threads = 1  # same photos, same cameras
        options.random_seed = seed
        options.mapper.random_seed = options.triangulation.random_seed = seed
        models = pycolmap.incremental_mapping(database, photos, place, options)
        largest = max(models.values(), key=lambda model: model.num_reg_images(), default=None)
        if largest and (best is None or largest.num_reg_images() > best.num_reg_images()):
            best = largest
        if best and best.num_reg_images() == count:
            break
    result = {"matches": matches, "registered": []}
    if best:
        result |= _write_scene(best, photos, folder)
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


def _match(photos: Path, database: Path, one_camera: bool, thorough: bool, seed: int) -> None:
    """Finds and matches SIFT features in all pairs."""
    pycolmap.set_random_seed(seed)
    extraction = pycolmap.FeatureExtractionOptions()
    matching = pycolmap.FeatureMatchingOptions()
    if thorough:
        extraction.sift.peak_threshold *= 0.5
        matching.guided_matching = True
    verification = pycolmap.TwoViewGeometryOptions()
    verification.ransac.random_seed = seed
    pycolmap.extract_features(
        database, photos, extraction_options=extraction, device=pycolmap.Device.cpu,
        camera_mode=_camera_mode(one_camera),
    )  # fmt: skip
    pycolmap.match_exhaustive(
        database, matching_options=matching, verification_options=verification,
        device=pycolmap.Device.cpu,
    )  # fmt: skip


def _import_matches(photos: Path, database: Path, one_camera: bool, given: Path, seed: int) -> None:
    """Takes the matches that another matcher found; COLMAP verifies them as its own."""
    pycolmap.set_random_seed(seed)
    pycolmap.Database.open(database).close()  # makes the file
    pycolmap.import_images(database, photos, camera_mode=_camera_mode(one_camera))
    with np.load(given) as arrays, pycolmap.Database.open(database) as opened:
        names = arrays["names"].tolist()
        ids = {image.name: image.image_id for image in opened.read_all_images()}
        for number, name in enumerate(names):
            opened.write_keypoints(ids[name], arrays[f"points_{number}"])
        for key in (key for key in arrays.files if key.startswith("pair_")):
            first, second = (names[int(number)] for number in key.split("_")[1:])
            opened.write_matches(ids[first], ids[second], arrays[key])
    verification = pycolmap.TwoViewGeometryOptions()
    verification.ransac.random_seed = seed
    pycolmap.geometric_verification(database, two_view_geometry_options=verification)


def _camera_mode(one_camera: bool) -> pycolmap.CameraMode:
    return pycolmap.CameraMode.SINGLE if one_camera else pycolmap.CameraMode.PER_IMAGE


def _matched_pairs(database: Path) -> list[list]:
    """[name, name, points that fit one relative pose] of every pair of photos that has any."""
    with pycolmap.Database.open(database) as opened:
        names = {image.image_id: image.name for image in opened.read_all_images()}
        ids, counts = opened.read_two_view_geometry_num_inliers()
    pairs = [pycolmap.pair_id_to_image_pair(pair) for pair in ids]
    return [[names[a], names[b], int(n)] for (a, b), n in zip(pairs, counts, strict=True) if n]


def _write_scene(model: pycolmap.Reconstruction, photos: Path, folder: Path) -> dict[str, Any]:
    """Writes folder/scene: images without lens distortion and their cameras; returns numbers."""
    distorted, pinhole, scene = (folder / name for name in ("distorted", "pinhole", "scene"))
    distorted.mkdir()
    model.write(distorted)
    pycolmap.undistort_images(pinhole, distorted, photos, jpeg_quality=95)
    text = scene / "sparse" / "0"
    text.mkdir(parents=True)
    pycolmap.Reconstruction(pinhole / "sparse").write_text(text)
    shutil.move(pinhole / "images", scene / "images")
    return {
        "registered": sorted(image.name for image in model.images.values()),
        "points": model.num_points3D(),
        "mean_reprojection_error": model.compute_mean_reprojection_error(),
        "mean_track_length": model.compute_mean_track_length(),
    }


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    run(Path(job["folder"]), job["one_camera"], job["seed"])
