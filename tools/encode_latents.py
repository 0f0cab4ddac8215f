"""Adds precomputed latents to clip shards, so that training need not run the VAE on clean images.

    python -m tools.encode_latents --input clips --output clips_512 --weights weights/mvdream

Every frame is cut and scaled to --size exactly as training does (`data.transforms`), encoded, and
stored beside its JPEG in float16: the mean of the codec's posterior times its scaling factor, which
is what training takes without latents too. Use them with --config.data.path=clips_512
--config.data.latents=True. The records name the codec by a fingerprint of its weights, and training
refuses those of another codec or size. At 512² latents add 32 kB to each frame.

OUTPUT gets one shard per shard of INPUT, each written whole or not at all; run it again to go on.
Several machines can share the work (--part). Records that cannot be read are left out and named.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import grain
import numpy as np

from see3d_jax.data import records
from see3d_jax.data.transforms import Size, centre_crop, to_model_range
from see3d_jax.errors import InputError, WorkError, run_command
from see3d_jax.files import atomic_path, write_json

MANIFEST = "latents.json"


@click.command(
    epilog="""\b
Examples:
  python -m tools.encode_latents --input clips --output clips_512 --weights weights/mvdream
  # views of another shape, on the third of four machines
  python -m tools.encode_latents --input clips --output clips_wide \\
      --weights weights/mvdream --size 448x576 --part 2/4
  # for configs/tiny.py, which has a DCT of factor 4 with 8 channels instead of a VAE
  python -m tools.encode_latents --input clips --output clips_64 --dct 4x8 --size 64
"""
)
@click.option("--input", "source", required=True, type=click.Path(path_type=Path))
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Folder of shards.")
@click.option("--weights", type=click.Path(path_type=Path), help="Converted weights with a VAE.")
@click.option("--dct", metavar="FACTORxCHANNELS", help="The DCT codec instead of a VAE.")
@click.option("--size", default="512", show_default=True, help="Pixels: SIDE or HEIGHTxWIDTH.")
@click.option(
    "--batch", default=8, show_default=True, type=click.IntRange(1), help="Frames at once."
)
@click.option("--part", default="0/1", show_default=True, help="K/N: shards K, K + N, K + 2N, …")
def app(
    source: Path,
    output: Path,
    weights: Path | None,
    dct: str | None,
    size: str,
    batch: int,
    part: str,
) -> None:
    """Writes the shards of INPUT, with latents, to OUTPUT."""
    if (weights is None) == (dct is None):
        raise InputError("give either --weights (a VAE) or --dct, e.g. --dct 4x8")
    codec = _dct(dct) if dct else _vae(weights)
    encode_shards(source, output, codec, _pair(size, "--size"), batch, _part(part))


def encode_shards(
    source: Path,
    output: Path,
    codec: Any,
    size: Size,
    batch: int = 8,
    part: tuple[int, int] = (0, 1),
) -> None:
    """Encodes every K + iN-th shard that `output` does not have yet.

    Raises InputError when `output` was made of something else or the size does not fit the codec,
    WorkError when a shard holds no record that can be encoded.
    """
    if any(side < 1 or side % codec.factor for side in size):
        raise InputError(f"--size: {size} must be multiples of the codec's factor {codec.factor}")
    shards = records.shard_paths(source)
    targets = [output / shard.name for shard in shards]
    encoder = Encoder(codec, size, batch)
    _check_manifest(output, encoder, len(shards))
    todo = [i for i in range(part[0], len(shards), part[1]) if not targets[i].exists()]
    for number, i in enumerate(todo):
        clips = _encode_shard(shards[i], targets[i], encoder)
        click.echo(f"{targets[i].name}: {clips} clips ({number + 1} of {len(todo)} shards)")
    if all(target.exists() for target in targets):
        sizes = [target.stat().st_size for target in targets]
        records.write_metadata(output, [len(_open(target)) for target in targets], sum(sizes))
        click.echo(
            f"{output}: all {len(targets)} shards have latents of {size[0]}×{size[1]} pixels"
        )
    elif part == (0, 1):
        raise WorkError(f"{output}: shards are missing")


class Encoder:
    """A codec for frames of clips, compiled once for `batch` views of `size`."""

    def __init__(self, codec: Any, size: Size, batch: int) -> None:
        import jax

        from see3d_jax.models.codec import fingerprint

        self.size, self.batch, self.name = size, batch, fingerprint(codec)
        self._encode = functools.partial(jax.jit(lambda codec, images: codec.encode(images)), codec)
        self._pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())

    def __call__(self, record: records.ClipRecord) -> records.ClipRecord:
        """The record with latents. Raises ValueError when a frame does not decode."""
        crop = centre_crop((record.height, record.width), self.size)
        images = list(self._pool.map(crop.image, record.images))
        latents = [latent for part in self._batches(images) for latent in part]
        return dataclasses.replace(
            record,
            latents=[records.encode_latent(latent) for latent in latents],
            latent_shape=latents[0].shape,
            latent_size=self.size,
            latent_codec=self.name,
        )

    def _batches(self, images: list[np.ndarray]) -> Iterator[np.ndarray]:
        for first in range(0, len(images), self.batch):
            part = [to_model_range(image) for image in images[first : first + self.batch]]
            padded = np.zeros((self.batch, *self.size, 3), np.float32)  # one shape, one program
            padded[: len(part)] = part
            yield np.asarray(self._encode(padded))[: len(part)]


def _encode_shard(source: Path, target: Path, encoder: Encoder) -> int:
    """Writes one shard; returns its number of clips."""
    written, shard = 0, _open(source)
    with contextlib.ExitStack() as stack:
        temporary = stack.enter_context(atomic_path(target))
        writer = stack.enter_context(contextlib.closing(records.shard_writer(temporary)))
        for index in range(len(shard)):
            try:
                record = encoder(records.decode(shard[index], f"{source.name} record {index}"))
            except Exception as error:  # damaged on disk, foreign bytes, an image that is none
                click.echo(f"left out {source.name} record {index}: {error}", err=True)
                continue
            writer.write(records.encode(record))
            written += 1
        if not written:
            raise WorkError(f"{source}: none of its records can be encoded")
    return written


def _open(shard: Path) -> grain.sources.ArrayRecordDataSource:
    try:
        return grain.sources.ArrayRecordDataSource([str(shard)])
    except Exception as error:  # the reader raises bare RuntimeErrors that name no file
        raise InputError(f"{shard}: not a readable ArrayRecord shard ({error})") from None


def _check_manifest(output: Path, encoder: Encoder, shards: int) -> None:
    """Makes sure that all shards of a folder are of one kind."""
    path = output / MANIFEST
    wanted = {"codec": encoder.name, "size": list(encoder.size), "shards": shards}
    if not path.exists():
        if output.is_dir() and any(output.iterdir()):
            raise InputError(f"{output}: is not empty and not of this command; use a new folder")
        write_json(path, wanted)
        return
    try:
        found = json.loads(path.read_text())
    except ValueError:
        raise InputError(f"{path}: is no JSON; use a new folder") from None
    if found != wanted:
        raise InputError(f"{output}: was made with {found}, now asked for {wanted}; use another")


def _vae(weights: Path) -> Any:
    from see3d_jax.models.codec import VaeCodec
    from see3d_jax.models.release import load_release

    config, params = load_release(weights).vae()
    return VaeCodec(params, config)


def _dct(text: str) -> Any:
    from see3d_jax.models.codec import DctCodec

    try:
        return DctCodec(*_pair(text, "--dct"))
    except ValueError as error:
        raise InputError(f"--dct: {error}") from None


def _pair(text: str, option: str) -> tuple[int, int]:
    numbers = text.split("x")
    try:
        first, second = (numbers * 2)[:2] if len(numbers) == 1 else numbers
        return int(first), int(second)
    except ValueError:
        raise InputError(f"{option}: want a number or two like 448x576, got {text!r}") from None


def _part(text: str) -> tuple[int, int]:
    try:
        number, parts = map(int, text.split("/"))
    except ValueError:
        number, parts = -1, 0
    if not 0 <= number < parts:
        raise InputError(f"--part: want K/N with 0 ≤ K < N, got {text!r}")
    return number, parts


def main() -> None:
    """Entry point."""
    run_command(lambda: app(standalone_mode=False))


if __name__ == "__main__":
    main()
