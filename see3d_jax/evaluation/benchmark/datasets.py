"""The benchmarks by name: where their scenes are in a folder, how they are read and split.

Sparse views (LLFF, DTU, Mip-NeRF 360) and single view (Tanks and Temples, RealEstate10K, CO3D) of
the paper, and "folder": any posed scenes. A scene that has transforms.json is read as that whatever
the benchmark (ReconFusion's release of all of them is such). Which views are given and which are
predicted is said by, first that exists:
    train_test_split_N.json   {"train_ids", "test_ids"}, ReconFusion's files, in the scene's folder
                              or in SPLITS/SCENE
    splits.json               {"test", "train_N" or "single"} in the scene's folder
    the benchmark's own rule  see `Benchmark.rule`; the report names it
Indices count the frames in the order of transforms.json, else by file name.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from see3d_jax.errors import InputError
from see3d_jax.evaluation.benchmark import layouts
from see3d_jax.geometry.colmap_files import find_colmap_model
from see3d_jax.pipelines.inputs import Scene, has_cameras, load_scene

# DTU as in RegNeRF and all that followed: these are given, in this order; those never scored.
_DTU_GIVEN = (25, 22, 28, 40, 44, 48, 0, 8, 13)
_DTU_BAD = (3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 36, 37, 38, 39)
_VIDEO_TARGETS = 24  # with the given one, a clip of 25 frames
_TEST_EVERY = 8


@dataclasses.dataclass(frozen=True)
class Split:
    """Which frames of a scene are given and which are predicted.

    Attributes:
      given, test: frame indices, disjoint.
      source: the file or rule they are from.
    """

    given: tuple[int, ...]
    test: tuple[int, ...]
    source: str


@dataclasses.dataclass(frozen=True)
class SceneEntry:
    """A scene of a benchmark, not yet read.

    Attributes:
      name: unique, usable as the name of a folder.
      folder: where its split files are.
      load: reads it.
    """

    name: str
    folder: Path
    load: Callable[[], Scene]


Rule = Callable[[int, int], tuple[tuple[int, ...], tuple[int, ...], str]]
"""(frames in the scene, how many are given) → given, test, the rule in words."""


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """What is known about a benchmark.

    Attributes:
      title: for people.
      inputs: how many views are given, each a table of its own.
      find: folder → its scenes.
      rule: the split of a scene that has no split file.
    """

    title: str
    inputs: tuple[int, ...]
    find: Callable[[Path], list[SceneEntry]]
    rule: Rule


def find_scenes(name: str, folder: Path, wanted: tuple[str, ...] = ()) -> list[SceneEntry]:
    """The scenes of benchmark `name` in `folder`, all or the wanted ones. Raises InputError."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder (--data)")
    scenes = BENCHMARKS[name].find(folder)
    if not scenes:
        raise InputError(
            f"{folder}: no scene of {BENCHMARKS[name].title} found; the layouts are in "
            "docs/evaluation.md"
        )
    known = {scene.name: scene for scene in scenes}
    for scene in wanted:
        if scene not in known:
            raise InputError(
                f"--scene {scene}: {folder} has {', '.join(list(known)[:8])}"
                f"{' …' if len(known) > 8 else ''}"
            )
    return [known[scene] for scene in dict.fromkeys(wanted)] if wanted else scenes


def choose_split(
    benchmark: Benchmark, entry: SceneEntry, scene: Scene, inputs: int, splits: Path | None = None
) -> Split:
    """The split of a scene for so many given views. Raises InputError naming file and field."""
    places = [entry.folder] if splits is None else [splits / entry.name, entry.folder]
    for place in places:
        file = place / f"train_test_split_{inputs}.json"
        if file.is_file():
            given, test = _read_lists(file, "train_ids", "test_ids")
            return _checked(given, test, len(scene), inputs, str(file))
    field = next(
        (name for name in (f"train_{inputs}", *(("single",) if inputs == 1 else ()))
         if scene.splits and name in scene.splits and "test" in scene.splits), None,
    )  # fmt: skip
    if field is not None:
        where = f"{scene.root / 'splits.json'} ({field})"
        return _checked(scene.splits[field], scene.splits["test"], len(scene), inputs, where)
    given, test, words = benchmark.rule(len(scene), inputs)
    return _checked(given, test, len(scene), inputs, words)


def _checked(given: tuple, test: tuple, frames: int, inputs: int, source: str) -> Split:
    for index in (*given, *test):
        if type(index) is not int or not 0 <= index < frames:
            raise InputError(f"{source}: {index!r} is no index of the {frames} frames")
    test = tuple(dict.fromkeys(index for index in test if index not in set(given)))
    if len(set(given)) != inputs or not test:
        raise InputError(
            f"{source}: gives {len(set(given))} views and leaves {len(test)} to predict; "
            f"{inputs} and at least 1 are needed"
        )
    return Split(tuple(dict.fromkeys(given)), test, source)


def _read_lists(file: Path, *names: str) -> list[tuple]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return [tuple(content[name]) for name in names]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: expected {' and '.join(names)} ({error})") from error


# --- rules ----------------------------------------------------------------------------------------


def _every_eighth(frames: int, inputs: int) -> tuple[tuple[int, ...], tuple[int, ...], str]:
    """NeRF's: every 8th frame is predicted; given are some of the others, evenly spaced."""
    test = tuple(range(0, frames, _TEST_EVERY))
    rest = [i for i in range(frames) if i % _TEST_EVERY]
    if len(rest) < inputs:
        return tuple(rest), test, f"{frames} frames"
    spaced = np.linspace(0, len(rest) - 1, inputs) if inputs > 1 else [(len(rest) - 1) / 2]
    given = tuple(rest[round(float(i))] for i in spaced)
    return given, test, "rule: every 8th frame is predicted, given evenly among the others"


def _dtu(frames: int, inputs: int) -> tuple[tuple[int, ...], tuple[int, ...], str]:
    """RegNeRF's, with up to nine given views."""
    if frames != 49:
        return _every_eighth(frames, inputs)
    test = tuple(i for i in range(frames) if i not in (*_DTU_GIVEN, *_DTU_BAD))
    return _DTU_GIVEN[:inputs], test, "rule: RegNeRF's views of DTU"


def _video(frames: int, inputs: int, stride: int = 1) -> tuple[tuple[int, ...], tuple, str]:
    """From the first frame: those that follow are predicted."""
    if inputs != 1:
        return _every_eighth(frames, inputs)
    test = tuple(range(stride, frames, stride))[:_VIDEO_TARGETS]
    return (0,), test, f"rule: the first frame is given, up to 24 at a stride of {stride} follow"


# --- where scenes are ---------------------------------------------------------------------------


def _entry(folder: Path, load: Callable[[Path], Scene], name: str | None = None) -> SceneEntry:
    if (folder / "transforms.json").is_file():
        load = load_scene
    return SceneEntry(name or folder.name, folder, functools.partial(load, folder))


def _subfolders(folder: Path) -> list[Path]:
    """The folder itself and those in it, sorted."""
    inside = (path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
    return [folder, *sorted(inside)]


def _by_marker(marks: Callable[[Path], bool], load: Callable[[Path], Scene]) -> Callable:
    def find(folder: Path) -> list[SceneEntry]:
        places = _subfolders(folder)
        if marks(folder):
            places = [folder.resolve()]
        return [
            _entry(place, load)
            for place in places
            if marks(place) or (place / "transforms.json").is_file()
        ]

    return find


def _load_dtu(folder: Path) -> Scene:
    masks = [
        place / "idrmasks" / folder.name / below
        for place in (folder.parent, folder.parent.parent)
        for below in (".", "mask")
    ]
    return layouts.read_dtu(folder, masks)


def _load_tanks(folder: Path) -> Scene:
    if (folder / "cams").is_dir():
        return layouts.read_mvsnet(folder)
    return layouts.read_colmap_photos(folder)


def _is_tanks(folder: Path) -> bool:
    return (folder / "cams").is_dir() or find_colmap_model(folder) is not None


def _find_realestate(folder: Path) -> list[SceneEntry]:
    found = []
    for file in sorted([*folder.glob("*.txt"), *(folder / "cameras").glob("*.txt")]):
        places = [folder / below / file.stem for below in ("", "frames", "images")]
        frames = next((place for place in places if place.is_dir()), None)
        if frames is not None:
            load = functools.partial(layouts.read_realestate, file, frames)
            found.append(SceneEntry(file.stem, frames, load))
    return found or _by_marker(lambda _: False, load_scene)(folder)


def _find_co3d(folder: Path) -> list[SceneEntry]:
    found = []
    for category in _subfolders(folder):
        if not (category / "frame_annotations.jgz").is_file():
            continue
        category = category.resolve()
        for sequence, frames in layouts.read_co3d_category(category).items():
            load = functools.partial(layouts.read_co3d, category.parent, frames)
            name = f"{category.name}_{sequence}"
            found.append(SceneEntry(name, category / sequence, load))
    return found or _by_marker(lambda _: False, load_scene)(folder)


_find_colmap = _by_marker(
    lambda folder: find_colmap_model(folder) is not None, layouts.read_colmap_photos
)
BENCHMARKS = {
    "llff": Benchmark(
        "LLFF", (3, 6, 9),
        _by_marker(lambda f: (f / "poses_bounds.npy").is_file(), layouts.read_llff), _every_eighth,
    ),
    "dtu": Benchmark(
        "DTU", (3, 6, 9), _by_marker(lambda f: (f / "cameras.npz").is_file(), _load_dtu), _dtu
    ),
    "mipnerf360": Benchmark("Mip-NeRF 360", (3, 6, 9), _find_colmap, _every_eighth),
    "tanks_and_temples": Benchmark(
        "Tanks and Temples", (1,), _by_marker(_is_tanks, _load_tanks), _video
    ),
    "realestate10k": Benchmark(
        "RealEstate10K", (1,), _find_realestate, functools.partial(_video, stride=4)
    ),
    "co3d": Benchmark("CO3D", (1,), _find_co3d, functools.partial(_video, stride=2)),
    "folder": Benchmark(
        "posed folders", (1, 3), _by_marker(has_cameras, load_scene), _every_eighth
    ),
}  # fmt: skip
