"""What a file or folder is: `see3d info`. Facts read from it, and what can be done with it next.

Things are known by what is in them, not by their names. Nothing large is read: of checkpoints and
weights the configuration, of record shards the first record.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from see3d_jax.errors import InputError
from see3d_jax.viewer import describe, read_json, read_json_lines


@dataclasses.dataclass(frozen=True)
class Facts:
    """What was found out about a path.

    Attributes:
      path: the file or folder; kind: one word for programs; title: the same for people.
      rows: label → value, plain JSON values, in order of interest.
      next: commands that take it.
    """

    path: Path
    kind: str
    title: str
    rows: dict[str, Any]
    next: tuple[str, ...] = ()

    def text(self) -> str:
        """For people: some lines."""
        width = max((len(label) for label in self.rows), default=0)
        lines = [f"{self.path}: {self.title}"]
        lines += [f"  {label:{width}s}  {_shown(value)}" for label, value in self.rows.items()]
        lines += [f"  next: {command}" for command in self.next]
        return "\n".join(lines)

    def values(self) -> dict[str, Any]:
        """For programs: one JSON object."""
        return {
            "path": str(self.path), "kind": self.kind, "title": self.title, "facts": self.rows,
            "next": list(self.next),
        }  # fmt: skip


def explain(path: Path) -> Facts:
    """Facts about a path. Raises InputError when it is missing or nothing we know."""
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    for recognise in _OF_FILES if path.is_file() else _OF_FOLDERS:
        facts = recognise(path)
        if facts is not None:
            return facts
    text = describe(path).splitlines()  # videos, pictures, reports, folders of results
    title = text[0].removeprefix(f"{path}: ")
    return Facts(path, "result", title, {"inside": [line.strip() for line in text[1:]]})


# --- models -------------------------------------------------------------------------------------


def _released(path: Path) -> Facts | None:
    if not (path / "release.json").is_file():
        return None
    from see3d_jax.models.release import load_release

    release = load_release(path)
    parts = {
        name: f"{part['parameters']:,} parameters"
        for name, part in release.info.get("components", {}).items()
    }
    rows = {"UNets": release.unets, **parts, "size": _size(path)}
    return Facts(
        path, "weights", "converted released weights", rows,
        (f"see3d generate --input PHOTO --depth DEPTH --trajectory orbit --checkpoint {path} "
         "--output DIR",),
    )  # fmt: skip


def _packed(path: Path) -> Facts | None:
    from see3d_jax.models.packed import is_packed, read_packed_config

    if not is_packed(path):
        return None
    config = read_packed_config(path)
    rows = {**config["training"], **_model_rows(config), "size": _size(path)}
    return Facts(
        path, "packed model", "a packed model (tools.export_tiny)", rows,
        (f"see3d create PHOTO… --checkpoint {path} --output DIR",),
    )  # fmt: skip


def _workdir(path: Path) -> Facts | None:
    config = read_json(path / "config.json")
    if not config or "model" not in config or "data" not in config:
        return None
    from see3d_jax.models import origins
    from see3d_jax.models.unet import UNetConfig
    from see3d_jax.models.weights import abstract_unet, parameter_count

    try:
        steps = origins.complete_steps(path)
    except InputError:
        steps = []
    last: dict[str, Any] = {}
    for line in read_json_lines(path / "metrics.jsonl"):
        last.update(line)
    scores = {
        name.replace("_", " "): last[name]
        for name in ("loss", "heldout_loss", "heldout_psnr")
        if isinstance(last.get(name), int | float)
    }
    try:
        parameters = parameter_count(abstract_unet(UNetConfig(**config["model"])))
    except (TypeError, ValueError) as error:
        raise InputError(f"{path / 'config.json'}: describes no model ({error})") from error
    data = config["data"]
    rows = {
        "checkpoints": steps or "none is complete yet",
        "steps in all": config.get("num_steps"),
        "parameters": parameters,
        **_model_rows(config),
        "trained on": data.get("path") or [entry[0] for entry in data.get("mixture") or ()],
        "seed": config.get("seed"),
        **scores,
    }
    following = (
        (f"see3d generate --input PHOTO --depth DEPTH --trajectory orbit --checkpoint {path} "
         "--output DIR", f"python -m tools.export_tiny --workdir {path} --output DIR")
        if steps else (f"python -m see3d_jax.main --config=CONFIG --workdir={path}",)
    )  # fmt: skip
    return Facts(path, "training run", "a training run", rows, following)


def _model_rows(config: dict[str, Any]) -> dict[str, Any]:
    codec = config.get("codec", {})
    side = config["data"]["image_size"]
    return {
        "images": f"{side}×{side} pixels, {config['data']['views']} views at a time",
        "codec": f"{codec.get('kind')}, 1/{codec.get('factor', 8)} of the size",
        "condition": config.get("condition"),
        "sampled with": f"{config['evaluation']['sampler_steps']} steps, guidance "
        f"{config['evaluation']['guidance']}",
    }


# --- data ---------------------------------------------------------------------------------------


def _records(path: Path) -> Facts | None:
    from see3d_jax.data.records import SHARD_GLOB

    if path.is_file() and path.suffix != ".array_record":
        return None
    if path.is_dir() and not any(path.glob(SHARD_GLOB)):
        return None
    from array_record.python.array_record_module import ArrayRecordReader

    from see3d_jax.data.records import decode, shard_paths

    shards = shard_paths(path)
    counts, first = [], None
    for shard in shards:
        try:
            reader = ArrayRecordReader(str(shard))
            counts.append(reader.num_records())
            serialised = reader.read([0])[0] if first is None and counts[-1] else None
            reader.close()
        except Exception as error:  # the library has no exceptions of its own
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{shard}: is no whole ArrayRecord file ({reason})") from None
        if serialised is not None:
            first = decode(serialised, f"{shard}[0]")
    rows: dict[str, Any] = {"clips": sum(counts), "shards": len(shards), "size": _size(path)}
    if first is not None:
        rows |= {
            "first clip": first.clip_id,
            "from": first.source,
            "frames": f"{len(first.images)} of {first.width}×{first.height} at {first.fps:g} per s",
            "poses": bool(first.posed),
            "depth": bool(first.depth),
            "latents": first.latent_codec or False,
        }
    folder = path if path.is_dir() else path.parent
    return Facts(
        path, "records", "training clips (ArrayRecord)", rows,
        (f"python -m see3d_jax.main --config=configs/tiny.py --workdir=DIR "
         f"--config.data.path={folder}", f"python -m tools.inspect_records clips {folder}"),
    )  # fmt: skip


# --- scenes -------------------------------------------------------------------------------------


def _gaussians(path: Path) -> Facts | None:
    from see3d_jax.splatting.formats import FORMATS, read_gaussians
    from see3d_jax.splatting.gaussians import sh_degree_of

    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        return None
    if suffix == ".ply" and b"scale_0" not in path.open("rb").read(8192):
        facts = describe(path)
        return Facts(path, "points", facts.splitlines()[0].removeprefix(f"{path}: "), {})
    scene = read_gaussians(path)
    means = np.asarray(scene.means)
    opacity = 1 / (1 + np.exp(-np.asarray(scene.opacity_logits, np.float64)))
    low, high = np.quantile(means, [0.01, 0.99], axis=0)
    rows = {
        "Gaussians": scene.count,
        "colour": f"spherical harmonics of degree {sh_degree_of(scene.sh.shape[1])}",
        "extent": [round(float(v), 4) for v in high - low],
        "middle": [round(float(v), 4) for v in np.median(means, 0)],
        "median size": round(float(np.exp(np.median(np.asarray(scene.log_scales)))), 5),
        "median opacity": round(float(np.median(opacity)), 3),
        "size": _size(path),
    }
    return Facts(
        path, "gaussians", "a scene of 3D Gaussians", rows, (f"see3d view {path}",)
    )  # fmt: skip


def _created(path: Path) -> Facts | None:
    made = read_json(path / "create.json")
    if not made or made.get("command") != "see3d create":
        return None
    scores = read_json(path / "gaussians" / "metrics.json") or {}
    rows = {
        "photos": made["photos"],
        "preset": made["preset"],
        "new views": made["views"],
        "Gaussians": scores.get("num_gaussians"),
        "held-out PSNR, dB": scores.get("psnr"),
        "seconds": made["seconds"],
        "notes": made["notes"] or "none",
        "page": (path / "report.html").resolve().as_uri(),
    }
    return Facts(
        path, "created scene", "a scene of see3d create", rows, (f"see3d view {path}",)
    )  # fmt: skip


def _generated(path: Path) -> Facts | None:
    run = read_json(path / "run.json")
    if not run or run.get("command") != "see3d generate":
        return None
    shown = ("input", "trajectory", "depth_from", "model", "sampler", "steps", "guidance", "seed",
             "known_share", "warnings")  # fmt: skip
    rows = {
        "views": f"{len(run.get('views', []))} of {run.get('width')}×{run.get('height')}",
        **{name.replace("_", " "): run[name] for name in shown if name in run},
    }
    return Facts(
        path, "generated views", "generated views", rows,
        (f"see3d view {path}", f"see3d reconstruct --input {path} --output DIR"),
    )  # fmt: skip


def _reconstructed(path: Path) -> Facts | None:
    scores = read_json(path / "metrics.json")
    if not scores or scores.get("command") != "see3d reconstruct":
        return None
    rows = {
        name.replace("_", " "): value
        for name, value in scores.items()
        if name not in ("command", "per_view") and not isinstance(value, dict)
    }
    return Facts(
        path, "reconstruction", "a reconstructed scene", rows,
        (f"see3d view {path}", f"see3d info {path / 'point_cloud.ply'}"),
    )  # fmt: skip


def _posed(path: Path) -> Facts | None:
    from see3d_jax.pipelines.inputs import has_cameras, load_scene

    if path.is_file() and path.suffix != ".json":
        return None
    if path.is_dir() and not has_cameras(path):
        return None
    if path.is_file() and not {"frames"} & (read_json(path) or {}).keys():
        return None
    if path.is_file():  # cameras may come without pictures, e.g. a path of see3d view
        from see3d_jax.geometry.scene_files import read_transforms

        posed = read_transforms(path)
        cameras, more = posed.cameras, {}
    else:
        scene = load_scene(path)
        cameras = scene.cameras
        more = {
            "depth maps": scene.depth_paths is not None,
            "masks": scene.mask_paths is not None,
            "sparse points": len(scene.points[0]) if scene.points else 0,
            "held out": len(scene.held_out()[1]),
        }
    sizes = Counter((int(c.width), int(c.height)) for c in cameras)
    centres = np.stack([
        -np.asarray(c.world_to_camera)[:3, :3].T @ np.asarray(c.world_to_camera)[:3, 3]
        for c in cameras
    ])  # fmt: skip
    first = cameras[0]
    fov = 2 * np.degrees(np.arctan(0.5 * first.width / float(np.asarray(first.intrinsics)[0, 0])))
    rows = {
        "views": len(cameras),
        "sizes": [f"{count} of {w}×{h}" for (w, h), count in sizes.most_common(4)],
        "field of view": f"{fov:.0f}° across (first view)",
        "extent of the cameras": [round(float(v), 4) for v in np.ptp(centres, axis=0)],
        **more,
    }
    commands = (
        (f"see3d reconstruct --input {path} --output DIR",
         f"see3d generate --input {path} --trajectory orbit --output DIR", f"see3d view {path}")
        if path.is_dir() else
        (f"see3d generate --input PHOTO --depth DEPTH --trajectory {path} --output DIR",)
    )  # fmt: skip
    kind = "a posed scene" if path.is_dir() else "cameras"
    return Facts(path, "scene", kind, rows, commands)


_OF_FILES: tuple[Callable[[Path], Facts | None], ...] = (_gaussians, _records, _posed)
_OF_FOLDERS: tuple[Callable[[Path], Facts | None], ...] = (
    _released, _packed, _workdir, _records, _created, _generated, _reconstructed, _posed,
)  # fmt: skip


def _size(path: Path) -> str:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.3g} {unit}" if unit != "bytes" else f"{size} bytes"
        size /= 1000


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        items = [_shown(item) for item in value[:8]]
        shown = ("; " if any(" " in item for item in items) else ", ").join(items)
        return shown + (f", … {len(value)} in all" if len(value) > 8 else "") if value else "none"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(item)}" for key, item in value.items())
    return "–" if value is None else str(value)
