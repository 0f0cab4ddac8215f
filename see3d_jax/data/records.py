"""The record schema: one record = one static-scene clip, in ArrayRecord shards TFDS reads too.

A record is a TFDS-serialised example, and every shard folder carries TFDS metadata, so the same
files open with `grain.sources.ArrayRecordDataSource`, with `tfds.builder_from_directory(folder)`,
and with `read_records` here; none of the three needs TensorFlow.

    folder/clips-00000-of-00004.array_record   records, group_size 1 (random access)
    folder/features.json, dataset_info.json    TFDS metadata

Frames stay JPEG bytes: decoding is the reader's choice, so that a training job decodes only the
frames it draws. Depth, intrinsics and poses are present for all frames or for none (the paper's
WebVi3D is pose-free; posed 3D data and synthetic scenes have all three). So are latents, which
`tools/encode_latents.py` adds: the frames as the training codec encodes them, at one size. Records
from before there were latents stay readable.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from see3d_jax.errors import InputError
from see3d_jax.files import atomic_path

if TYPE_CHECKING:
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter

SCHEMA_VERSION = 1
SHARD_GLOB = "clips-*-of-*.array_record"
_SPLIT = "clips"
_LATENT_TYPE = np.dtype("<f2")
_SHARD_TEMPLATE = "{SPLIT}-{SHARD_X_OF_Y}.{FILEFORMAT}"
_importing = threading.Lock()


@dataclasses.dataclass(frozen=True)
class ClipRecord:
    """One clip of F ≥ 2 frames of one static scene.

    Attributes:
      clip_id: unique within a dataset; stable across reruns.
      source: where it came from (file name of the raw video), for audits and removal requests.
      fps: frame rate of `images` (after temporal downsampling); 0 where it has no meaning.
      timestamps: [F] float32 seconds in the source video.
      images: F JPEG files, RGB, all of size (height, width).
      depth: none, or F single-channel uint16 PNG files; planar z = value · depth_unit, 0 = no hit.
      depth_unit: metres (or scene units) per depth step.
      intrinsics: [F or 0, 3, 3] float32 pixels.
      world_to_camera: [F or 0, 4, 4] float32, OpenCV axes.
      latents: none, or F float16 arrays of shape [h, w, c] (C order, little-endian): the mean of
        the codec's posterior times its scaling factor, of the frame cropped to `latent_size`.
      latent_shape: (h, w, c); (0, 0, 0) without latents.
      latent_size: height and width in pixels of what was encoded.
      latent_codec: fingerprint of the codec with its weights; see `models.codec.fingerprint`.
    """

    clip_id: str
    source: str
    fps: float
    timestamps: np.ndarray
    images: Sequence[bytes]
    height: int
    width: int
    depth: Sequence[bytes] = ()
    depth_unit: float = 1e-3
    intrinsics: np.ndarray = dataclasses.field(
        default_factory=lambda: np.zeros((0, 3, 3), np.float32)
    )
    world_to_camera: np.ndarray = dataclasses.field(
        default_factory=lambda: np.zeros((0, 4, 4), np.float32)
    )
    latents: Sequence[bytes] = ()
    latent_shape: tuple[int, int, int] = (0, 0, 0)
    latent_size: tuple[int, int] = (0, 0)
    latent_codec: str = ""

    def __post_init__(self) -> None:
        frames = len(self.images)
        if frames < 2:
            raise ValueError(f"record {self.clip_id}: a clip needs at least 2 frames, got {frames}")
        if len(self.timestamps) != frames:
            raise ValueError(
                f"record {self.clip_id}: {frames} images but {len(self.timestamps)} timestamps"
            )
        for name in ("depth", "intrinsics", "world_to_camera", "latents"):
            length = len(getattr(self, name))
            if length not in (0, frames):
                raise ValueError(
                    f"record {self.clip_id}: {name} must have 0 or {frames} entries, got {length}"
                )

    @property
    def posed(self) -> bool:
        """True when intrinsics and poses are present."""
        return len(self.world_to_camera) > 0 and len(self.intrinsics) > 0

    def latent(self, frame: int) -> np.ndarray:
        """Latent of one frame, [h, w, c] float32. Raises ValueError when it has another size."""
        flat = np.frombuffer(self.latents[frame], _LATENT_TYPE)
        return flat.reshape(self.latent_shape).astype(np.float32)


def encode(record: ClipRecord) -> bytes:
    """ClipRecord → serialised record; the same record gives the same bytes in every process."""
    values = {
        "version": SCHEMA_VERSION,
        **{f.name: getattr(record, f.name) for f in dataclasses.fields(ClipRecord)},
        # TFDS image features take file objects for bytes that are encoded already.
        "images": [io.BytesIO(image) for image in record.images],
        "depth": [io.BytesIO(depth) for depth in record.depth],
        "latents": list(record.latents),
        "latent_shape": np.asarray(record.latent_shape, np.int32),
        "latent_size": np.asarray(record.latent_size, np.int32),
        "timestamps": np.asarray(record.timestamps, np.float32),
        "intrinsics": np.asarray(record.intrinsics, np.float32),
        "world_to_camera": np.asarray(record.world_to_camera, np.float32),
    }
    with _importing:
        features = _features()
    serialised = features.serialize_example(features.encode_example(values))
    # TFDS leaves the order of a protobuf's map entries to chance.
    return _example_type().FromString(serialised).SerializeToString(deterministic=True)


def decode(serialised: bytes, origin: str = "record") -> ClipRecord:
    """Serialised record → ClipRecord, images left as bytes.

    Raises InputError naming `origin` when the bytes are no record or of an unknown version.
    """
    example = _example_type()
    try:
        # Directly, because TFDS's own parser builds an array per image first: 0.6 against 1.4 ms.
        stored = example.FromString(serialised).features.feature
        version = stored["version"].int64_list.value[0]
        if version == SCHEMA_VERSION:
            return _from_features(stored)
    except Exception as error:  # whatever protobuf or NumPy raise on foreign bytes
        raise InputError(
            f"{origin}: not a see3d_jax clip record ({type(error).__name__}); "
            "make shards with `python -m data_prep.curate`"
        ) from error
    raise InputError(
        f"{origin}: record schema version {version} is unknown to this release (it reads "
        f"{SCHEMA_VERSION}); curate again or use the matching see3d_jax release"
    )


def _example_type() -> Any:
    """The protobuf message of a record.

    One thread at a time: TFDS imports its parts when they are first used, and two threads that do
    so at once can wait for each other for ever, or see a module that is half there.
    """
    with _importing:
        from tensorflow_datasets.proto import tf_example_pb2

        return tf_example_pb2.Example


def _from_features(stored: Mapping[str, Any]) -> ClipRecord:
    """The fields of a record out of a protobuf map; what older records lack stays empty."""

    def numbers(name: str, *shape: int) -> np.ndarray:
        return np.array(stored[name].float_list.value, np.float32).reshape(-1, *shape)

    def integers(name: str, default: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(stored[name].int64_list.value) if name in stored else default

    def text(name: str, default: str | None = None) -> str:
        missing = name not in stored and default is not None
        return default if missing else stored[name].bytes_list.value[0].decode()

    def files(name: str) -> tuple[bytes, ...]:
        return tuple(stored[name].bytes_list.value) if name in stored else ()

    return ClipRecord(
        clip_id=text("clip_id"),
        source=text("source"),
        fps=float(numbers("fps")[0]),
        timestamps=numbers("timestamps"),
        images=files("images"),
        height=stored["height"].int64_list.value[0],
        width=stored["width"].int64_list.value[0],
        depth=files("depth"),
        depth_unit=float(numbers("depth_unit")[0]),
        intrinsics=numbers("intrinsics", 3, 3),
        world_to_camera=numbers("world_to_camera", 4, 4),
        latents=files("latents"),
        latent_shape=integers("latent_shape", (0, 0, 0)),
        latent_size=integers("latent_size", (0, 0)),
        latent_codec=text("latent_codec", ""),
    )


def write_shards(
    records: Sequence[bytes] | Iterator[bytes], folder: str | os.PathLike[str], num_shards: int = 1
) -> list[Path]:
    """Writes serialised records round-robin into `num_shards` shards plus TFDS metadata.

    Shards are written under temporary names and renamed when complete. Record i goes to shard
    i mod num_shards, so the bytes depend only on the records and their order.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"clips-{i:05d}-of-{num_shards:05d}.array_record" for i in range(num_shards)]
    lengths, num_bytes = [0] * num_shards, 0
    with contextlib.ExitStack() as stack:
        temporary = [stack.enter_context(atomic_path(path)) for path in paths]
        writers = [shard_writer(path) for path in temporary]
        try:
            for index, record in enumerate(records):
                shard = index % num_shards
                writers[shard].write(record)
                lengths[shard] += 1
                num_bytes += len(record)
        finally:
            for writer in writers:
                writer.close()
    for stale in set(folder.glob(SHARD_GLOB)) - set(paths):
        stale.unlink()
    write_metadata(folder, lengths, num_bytes)
    return paths


def shard_writer(path: Path) -> ArrayRecordWriter:
    """Opens a new shard; write serialised records, then close it."""
    from array_record.python.array_record_module import ArrayRecordWriter

    return ArrayRecordWriter(str(path), "group_size:1")  # one record per chunk: random access


def shard_paths(folder: str | os.PathLike[str]) -> list[Path]:
    """Sorted shards of a dataset folder (or a single shard file given by path)."""
    folder = Path(folder)
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder of clip shards")
    paths = sorted(folder.glob(SHARD_GLOB))
    if not paths:
        raise InputError(
            f"{folder}: holds no {SHARD_GLOB}; make some with `python -m data_prep.curate`"
        )
    return paths


def read_records(folder: str | os.PathLike[str]) -> Iterator[ClipRecord]:
    """Yields every record of a dataset folder, shard by shard."""
    from array_record.python.array_record_module import ArrayRecordReader

    for path in shard_paths(folder):
        reader = ArrayRecordReader(str(path))
        try:
            for index, serialised in enumerate(reader.read_all()):
                yield decode(serialised, f"{path}[{index}]")
        finally:
            reader.close()


def encode_jpeg(image: np.ndarray, quality: int = 92) -> bytes:
    """RGB uint8 [H, W, 3] → JPEG bytes (4:4:4: thin structures carry the multi-view signal)."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def decode_image(data: bytes) -> np.ndarray:
    """Image bytes → RGB uint8 [H, W, 3]."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def encode_latent(latent: np.ndarray) -> bytes:
    """[h, w, c] → float16 bytes as `ClipRecord.latents` holds them."""
    return np.ascontiguousarray(latent, _LATENT_TYPE).tobytes()


def encode_depth(depth: np.ndarray, unit: float) -> bytes:
    """Planar z [H, W] → uint16 PNG bytes in steps of `unit`; non-finite, ≤ 0 and too far → 0."""
    steps = np.where(np.isfinite(depth) & (depth > 0), depth / unit, 0.0)
    steps = np.where(steps > np.iinfo(np.uint16).max, 0.0, steps)
    buffer = io.BytesIO()
    Image.fromarray(np.round(steps).astype(np.uint16)).save(buffer, "PNG")
    return buffer.getvalue()


def decode_depth(data: bytes, unit: float) -> np.ndarray:
    """uint16 PNG bytes → planar z [H, W] float32, 0 = no hit."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image, np.float32) * np.float32(unit)


@functools.cache
def _features() -> tfds.features.FeaturesDict:
    """The schema."""
    import tensorflow_datasets as tfds

    f = tfds.features
    image = f.Image(shape=(None, None, 3), encoding_format="jpeg")
    depth = f.Image(shape=(None, None, 1), dtype=np.uint16, encoding_format="png")
    return f.FeaturesDict(
        {
            "version": f.Scalar(np.int32),
            "clip_id": f.Text(),
            "source": f.Text(),
            "fps": f.Scalar(np.float32),
            "timestamps": f.Tensor(shape=(None,), dtype=np.float32),
            "images": f.Sequence(image),
            "height": f.Scalar(np.int32),
            "width": f.Scalar(np.int32),
            "depth": f.Sequence(depth),
            "depth_unit": f.Scalar(np.float32),
            "intrinsics": f.Tensor(shape=(None, 3, 3), dtype=np.float32),
            "world_to_camera": f.Tensor(shape=(None, 4, 4), dtype=np.float32),
            "latents": f.Sequence(f.Text()),  # bytes and text have the same wire format
            "latent_shape": f.Tensor(shape=(3,), dtype=np.int32),
            "latent_size": f.Tensor(shape=(2,), dtype=np.int32),
            "latent_codec": f.Text(),
        }
    )


def write_metadata(folder: Path, shard_lengths: list[int], num_bytes: int) -> None:
    """Writes the TFDS metadata of a folder whose shards, in order, hold so many records."""
    import tensorflow_datasets as tfds

    template = tfds.core.ShardedFileTemplate(
        template=_SHARD_TEMPLATE,
        data_dir=folder,
        dataset_name="clips",
        split=_SPLIT,
        filetype_suffix="array_record",
    )
    split = tfds.core.SplitInfo(
        name=_SPLIT,
        shard_lengths=shard_lengths,
        num_bytes=num_bytes,
        filename_template=template,
    )
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=_features(),
        split_infos=[split],
        filename_template=_SHARD_TEMPLATE,
        check_data=False,  # the check would read the data back through TensorFlow
    )
