"""Folders of weights: planning what goes in, then writing all of it or nothing.

A part is one component (a UNet, the autoencoder, …) with its configuration and the plan of its
tensors. Plans are checked against the configuration before anything is written.
"""

from __future__ import annotations

import collections
import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from see3d_jax.errors import InputError
from see3d_jax.files import atomic_path, write_json
from see3d_jax.models.release import FORMAT, WEIGHTS, read_json, torch_shapes
from tools.checkpoint_files import Tensors, open_tensors, write_safetensors
from tools.checkpoint_layouts import Piece, Rule, check, pieces, result_shape

_WEIGHT_FILES = (
    "diffusion_pytorch_model.safetensors",
    "model.safetensors",
    "diffusion_pytorch_model.fp16.safetensors",
    "model.fp16.safetensors",
    "diffusion_pytorch_model.bin",
    "pytorch_model.bin",
)


@dataclasses.dataclass(frozen=True)
class Part:
    """One component and how its tensors come about.

    Attributes:
      name: sub-folder, e.g. "unet/single".
      spec: its config.json.
      tensors: where the weights are read from.
      pieces: what becomes of them, in the order of the source.
      dropped: source tensors that are left out, with the reason.
    """

    name: str
    spec: Mapping[str, Any]
    tensors: Tensors
    pieces: list[Piece]
    dropped: Mapping[str, str]

    @property
    def parameters(self) -> int:
        """How many numbers the result has."""
        shapes = (result_shape(piece, self.tensors.shapes) for piece in self.pieces)
        return sum(int(np.prod(shape, dtype=np.int64)) for shape in shapes)

    def write(self, path: Path, progress: Callable[[], object] = lambda: None) -> None:
        """Writes the tensors as a safetensors file, one at a time."""

        def run() -> Iterator[tuple[str, np.ndarray]]:
            for piece in self.pieces:
                yield piece.target, piece.cut(self.tensors.read(piece.source))
                progress()

        plan = {
            piece.target: (
                self.tensors.dtypes[piece.source],
                result_shape(piece, self.tensors.shapes),
            )
            for piece in self.pieces
        }
        write_safetensors(path, plan, run())


def make_part(
    name: str, spec: Mapping[str, Any], tensors: Tensors, rule: Rule, prefix: str = ""
) -> Part:
    """Plans a component; InputError lists what is missing, left over or of the wrong shape."""
    what = f"{tensors.path}: {name}"
    found, dropped = pieces(tensors.shapes, rule, prefix)
    try:
        wanted = torch_shapes(name.split("/")[0], spec)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{what}: its configuration describes no such network ({error})") from None
    check(found, tensors.shapes, wanted, what)
    return Part(name, spec, tensors, found, dropped)


def find_weights(folder: Path) -> Tensors:
    """Opens the weights in a component's folder, whatever the file is called."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    for name in _WEIGHT_FILES:
        if (folder / name).is_file():
            return open_tensors(folder / name)
    raise InputError(f"{folder}: holds no weights (looked for {', '.join(_WEIGHT_FILES)})")


def folder_part(
    name: str,
    folder: Path,
    rule: Rule,
    change: Mapping[str, Any] | None = None,
    remove: tuple[str, ...] = (),
) -> Part:
    """Plans a component from a published folder of config.json and weights.

    Args:
      name: sub-folder of the result.
      folder: the published folder.
      rule: names of its tensors.
      change, remove: fields of the configuration to set, and to leave out.
    """
    tensors = find_weights(folder)
    spec = {**read_json(folder / "config.json"), **(change or {})}
    return make_part(name, {k: x for k, x in spec.items() if k not in remove}, tensors, rule)


def check_new(output: Path) -> None:
    """InputError if the output exists already: nothing is ever overwritten."""
    if output.exists():
        raise InputError(f"{output}: exists already; delete it or give another --output")


def write_weights_folder(
    output: Path,
    layout: str,
    parts: list[Part],
    copies: Mapping[str, Path | Mapping[str, Any]],
    *,
    quiet: bool = False,
) -> None:
    """Writes the folder that `see3d_jax.models.release` reads, and says what went into it.

    Args:
      output: the new folder.
      layout: "see3d" or "mvdream", what `tools.export_diffusers` turns it back into.
      parts: the components with weights.
      copies: other files by their place in the folder: a path, or the content as JSON.
      quiet: no progress bar, no summary.
    """
    import click
    from tqdm import tqdm

    check_new(output)
    total = sum(len(part.pieces) for part in parts)
    with atomic_path(output) as temporary, tqdm(total=total, unit="tensor", disable=quiet) as bar:
        for part in parts:
            bar.set_description(part.name)
            write_json(temporary / part.name / "config.json", dict(part.spec))
            part.write(temporary / part.name / WEIGHTS, bar.update)
        copy_files(temporary, copies)
        info = {
            "format": FORMAT,
            "layout": layout,
            "components": {
                part.name: {"tensors": len(part.pieces), "parameters": part.parameters}
                for part in parts
            },
        }
        write_json(temporary / "release.json", info)
    if quiet:
        return
    for part in parts:
        click.echo(f"{part.name}: {len(part.pieces)} tensors, {part.parameters:,} parameters")
        for reason, count in collections.Counter(part.dropped.values()).items():
            click.echo(f"  left out: {count} tensors ({reason})")
    click.echo(f"wrote {output}")


def copy_files(folder: Path, copies: Mapping[str, Path | Mapping[str, Any]]) -> None:
    """Puts small files into a folder: copies of files, or new JSON files."""
    for place, content in copies.items():
        if isinstance(content, Path):
            if not content.is_file():
                raise InputError(f"{content}: no such file")
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(content, folder / place)
        else:
            write_json(folder / place, dict(content))


def files_of(folder: Path, names: tuple[str, ...], place: str) -> dict[str, Path]:
    """The small files of a published folder by their place in the result; all must exist."""
    return {f"{place}/{name}": folder / name for name in names}
