"""Our input pipeline against a torch DataLoader doing the same work on the same CPU.

    python -m benchmarks.input_pipeline [--size 512 --size 256] [--json FILE]    needs torch

Both sides draw 5 frames of a 480p clip of 20, cut the centre square, scale it, convert to float in
[−1, 1], draw irregular masks with the same function, and collate batches of 4 clips; each uses as
many threads (ours) or worker processes (torch) as there are cores. The torch side is what one would
write: a Dataset over a folder of JPEG files, Pillow's decoder and bilinear antialiased resize (as
torchvision does), a DataLoader with persistent workers. It reads single files and we whole records,
which favours torch. Windows alternate, so that a busy machine hurts both; medians count. Images per
second and core is the throughput over the number of cores; images per CPU second does not change
when other programs use the machine.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import cv2
import numpy as np
from PIL import Image

from see3d_jax.data import records
from see3d_jax.data.examples import ExampleSpec, empty_batch, fill_example
from see3d_jax.data.masks import random_mask
from see3d_jax.data.mixture import DataSource, Mixture
from see3d_jax.data.pipeline import training_batches
from see3d_jax.data.transforms import centre_crop, choose_frames, to_model_range
from see3d_jax.errors import InputError, run_command
from see3d_jax.files import write_json

VIEWS, BATCH, CLIPS, FRAMES = 5, 4, 16, 20
FRAME_SIZE = (480, 854)


@click.command(
    epilog="""\b
Examples:
  python -m benchmarks.input_pipeline
  python -m benchmarks.input_pipeline --size 256 --repeats 9 --json input.json
"""
)
@click.option("--size", "sizes", multiple=True, type=int, help="Square views; 512 and 256 if none.")
@click.option("--batches", default=12, show_default=True, help="Batches per timed window.")
@click.option("--repeats", default=5, show_default=True, help="Timed windows of each side.")
@click.option("--json", "output", type=click.Path(path_type=Path), help="Also write the numbers.")
def app(sizes: tuple[int, ...], batches: int, repeats: int, output: Path | None) -> None:
    """Prints one line per size, and what our side spends its time on."""
    try:
        import torch
    except ImportError as error:
        raise InputError("torch is not installed: pip install torch") from error
    cores = len(os.sched_getaffinity(0))
    report: dict[str, Any] = {"cores": cores, "torch": torch.__version__, "sizes": {}}
    with tempfile.TemporaryDirectory() as folder:
        write_clips(Path(folder))
        for size in sizes or (512, 256):
            report["sizes"][size] = compare(Path(folder), size, batches, repeats, cores)
    if output is not None:
        write_json(output, report)


def write_clips(folder: Path) -> None:
    """The same frames twice: clip records in `shards`, single files in `files/CLIP/FRAME.jpg`."""
    encoded = []
    for clip in range(CLIPS):
        images = [records.encode_jpeg(frame) for frame in _frames(clip)]
        place = folder / "files" / f"{clip:03d}"
        place.mkdir(parents=True)
        for number, image in enumerate(images):
            (place / f"{number:03d}.jpg").write_bytes(image)
        encoded.append(
            records.encode(
                records.ClipRecord(
                    clip_id=f"clip{clip}", source=f"clip{clip}.mp4", fps=12.0,
                    timestamps=np.arange(FRAMES, dtype=np.float32) / 12, images=images,
                    height=FRAME_SIZE[0], width=FRAME_SIZE[1],
                )
            )
        )  # fmt: skip
    records.write_shards(encoded, folder / "shards", num_shards=2)


def _frames(clip: int) -> Iterator[np.ndarray]:
    """A window that moves over a photo, with a little sensor noise: about 0.1 MB per JPEG."""
    from skimage import data

    height, width = FRAME_SIZE
    photo = Image.fromarray((data.astronaut, data.coffee, data.chelsea, data.rocket)[clip % 4]())
    rng = np.random.default_rng(clip)
    box = 0.5 * min(photo.width, photo.height * width / height)
    for phase in np.linspace(0, 1, FRAMES):
        left, top = phase * (photo.width - box), phase * (photo.height - box * height / width)
        part = (left, top, left + box, top + box * height / width)
        frame = np.asarray(photo.resize((width, height), Image.Resampling.BICUBIC, box=part))
        noisy = frame + rng.normal(0, 3, frame.shape)
        yield np.clip(np.round(noisy), 0, 255).astype(np.uint8)


def compare(folder: Path, size: int, batches: int, repeats: int, cores: int) -> dict[str, Any]:
    """Alternating windows of both sides at one size."""
    spec = _spec(size)
    mixture = Mixture((DataSource(str(folder / "shards")),), 0)
    with contextlib.closing(training_batches(mixture, spec, BATCH, 0, threads=cores)) as ours:
        theirs = iter(torch_loader(folder / "files", spec, cores))
        sides = {"ours": (ours, []), "torch": (theirs, [w.pid for w in theirs._workers])}
        found: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
        for _ in range(repeats):
            for side, (source, pids) in sides.items():
                found[side].append(_window(source, pids, batches))
        del theirs, source, sides  # ends the workers
    result: dict[str, Any] = {}
    for side, runs in found.items():
        wall, cpu = np.median(runs, axis=0)
        result[f"{side}_per_core"] = float(BATCH * VIEWS * batches / wall / cores)
        result[f"{side}_per_cpu_second"] = float(BATCH * VIEWS * batches / cpu)
    for measure in ("per_core", "per_cpu_second"):
        result[f"ratio_{measure}"] = result[f"ours_{measure}"] / result[f"torch_{measure}"]
    click.echo(
        f"{size:4}²  images/s per core: ours {result['ours_per_core']:6.1f}, torch "
        f"{result['torch_per_core']:6.1f}, ratio {result['ratio_per_core']:.2f};  per CPU second: "
        f"{result['ours_per_cpu_second']:6.1f} and {result['torch_per_cpu_second']:6.1f}, ratio "
        f"{result['ratio_per_cpu_second']:.2f}"
    )
    result["stages_ms_per_image"] = stages(mixture, spec)
    total = sum(result["stages_ms_per_image"].values())
    for name, spent in result["stages_ms_per_image"].items():
        click.echo(f"       {name:24}{spent:7.2f} ms per image {spent / total:6.0%}")
    return result


def _spec(size: int) -> ExampleSpec:
    return ExampleSpec(
        sizes=((size, size),), views=VIEWS, references=(1,), stride=(1, 4), hole_range=(0.1, 0.9)
    )


def torch_loader(folder: Path, spec: ExampleSpec, workers: int) -> Any:
    """The DataLoader one would write for the same batches, over a folder of JPEG files."""
    import torch

    size = spec.sizes[0][0]

    class Clips(torch.utils.data.Dataset):
        def __init__(self) -> None:
            self.clips = [sorted(clip.iterdir()) for clip in sorted(folder.iterdir())]

        def __len__(self) -> int:
            return 10**6  # epochs do not matter here

        def __getitem__(self, index: int) -> dict[str, Any]:
            files = self.clips[index % len(self.clips)]
            rng = np.random.default_rng(index)
            frames = choose_frames(rng, len(files), spec.views, spec.stride)
            images = torch.stack([self._image(files[frame]) for frame in frames])
            masks = torch.ones(spec.views, 1, size, size)
            for view in range(1, spec.views):
                mask = random_mask(rng, size, size, spec.hole_range)
                masks[view] = torch.from_numpy(mask).permute(2, 0, 1)
            is_reference = torch.arange(spec.views) < 1
            return {"image": images, "mask": masks, "is_reference": is_reference, "frame": frames}

        def _image(self, path: Path) -> torch.Tensor:
            image = Image.open(path).convert("RGB")
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            image = image.crop((left, top, left + side, top + side))
            image = image.resize((size, size), Image.Resampling.BILINEAR)
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
            return pixels.float().div_(127.5).sub_(1)

    return torch.utils.data.DataLoader(
        Clips(), BATCH, shuffle=True, num_workers=workers, persistent_workers=True
    )


def _window(source: Iterator[Any], pids: list[int], batches: int) -> tuple[float, float]:
    """Seconds and CPU seconds for some batches, after those that were prefetched while waiting."""
    for _ in range(6):
        next(source)
    start, cpu = time.perf_counter(), _cpu_seconds(pids)
    for _ in range(batches):
        next(source)
    return time.perf_counter() - start, _cpu_seconds(pids) - cpu


def _cpu_seconds(pids: list[int]) -> float:
    """CPU time so far of this process and of `pids`."""
    spent = time.process_time()
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        spent += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return spent


def stages(mixture: Mixture, spec: ExampleSpec, examples: int = 40) -> dict[str, float]:
    """CPU milliseconds per image of each part of our side, on one thread."""
    folder, rng = mixture.folders[0], np.random.default_rng(0)
    size = spec.sizes[0]
    crop = centre_crop(FRAME_SIZE, size)
    spent = dict.fromkeys(
        ("read", "decode", "crop and scale", "to float", "masks", "the rest"), 0.0
    )
    batch = empty_batch(spec, 1, size, False)
    row = {key: value[0] for key, value in batch.items()}

    def timed(name: str, run: Callable[..., Any], *inputs: Any) -> Any:
        start = time.thread_time()
        result = run(*inputs)
        spent[name] += time.thread_time() - start
        return result

    for number in range(examples):
        record = timed("read", folder.__getitem__, number % len(folder))
        for view, frame in enumerate(choose_frames(rng, FRAMES, VIEWS, spec.stride)):
            jpeg = np.frombuffer(record.images[frame], np.uint8)
            whole = timed("decode", cv2.imdecode, jpeg, crop.decode_flags)
            image = timed("crop and scale", crop.scaled, whole)
            timed("to float", to_model_range, image, row["image"][view])
            if view:
                timed("masks", random_mask, rng, *size, spec.hole_range)
        timed("the rest", fill_example, row, record, rng, spec)
    spent["the rest"] -= sum(spent.values()) - spent["read"] - spent["the rest"]
    return {name: 1e3 * seconds / examples / VIEWS for name, seconds in spent.items()}


def main() -> None:
    """Entry point."""
    run_command(lambda: app(standalone_mode=False))


if __name__ == "__main__":
    main()
