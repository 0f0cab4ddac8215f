"""Curation: clips per core-hour, the share of each stage, and the official recipe's floor.

The official filter runs RAFT (large, 20 iterations, long side 768, both directions) on every pair
of consecutive frames, at most 200 frames. That floor is RAFT-large's time for one direction, here
in JAX with random weights (its time does not depend on them), times all pairs of the same videos.
Ours is the CPU time of `data_prep.curate` in one process, early exits included. With --workers the
same videos are curated by one process and by N in turn: parallel efficiency is the wall time of one
over N times that of N, medians of the repeats; the CPU seconds beside it show what N processes cost
each other where the machine has other work too.

    python -m benchmarks.curate --input videos/
    python -m benchmarks.curate --input videos/ --workers 2 --repeats 3
"""

from __future__ import annotations

import dataclasses
import functools
import json
import tempfile
import time
from pathlib import Path

import click
import numpy as np

from see3d_jax.errors import run_command

LONG_SIDE, SHORT_SIDE, ITERATIONS, MAX_FRAMES = 768, 432, 20, 200
TRACKED_POINTS, TRACK_ITERATIONS = 100, 6


@click.command()
@click.option("--input", "source", required=True, help="Videos, as for data_prep.curate.")
@click.option("--workers", default=1, type=click.IntRange(1), show_default=True,
              help="Above 1: also measure parallel efficiency with so many processes.")  # fmt: skip
@click.option("--repeats", default=2, type=click.IntRange(1), show_default=True)
def app(source: str, workers: int, repeats: int) -> None:
    """Prints the CPU cost of curating INPUT beside RAFT's floor on the same machine."""
    if workers > 1:
        print_efficiency(source, workers, repeats)
        return
    runs, ratios = [], []
    for _ in range(repeats):  # in turn, so that both see the same machine
        runs.append(curate_once(source, 1))
        ratios.append((raft_seconds(), runs[-1]))
    best = min(runs, key=lambda run: run.cpu)
    click.echo(
        f"{best.clips} clips, {best.cpu:.1f} CPU s: {3600 * best.clips / best.cpu:.0f} clips per "
        "core-hour"
    )
    for name, seconds in best.stages.items():
        click.echo(f"  {name}: {seconds / best.cpu:.0%}")
    click.echo(f"  decoding and the rest: {1 - sum(best.stages.values()) / best.cpu:.0%}")
    one = float(np.median([seconds for seconds, _ in ratios]))
    ratio = float(np.median([2 * run.pairs * seconds / run.cpu for seconds, run in ratios]))
    click.echo(
        f"RAFT-large at {LONG_SIDE} px: {one:.2f} CPU s and {raft_flops() / 1e12:.2f} TFLOP per "
        f"direction; official floor {2 * best.pairs * one:.0f} CPU s for {best.pairs} pairs = "
        f"{ratio:.1f} × ours"
    )
    click.echo(
        f"CoTracker3 (offline, {TRACKED_POINTS} points, computed from its layers): "
        f"{cotracker_flops() / 1e12:.3f} TFLOP per frame"
    )


@dataclasses.dataclass(frozen=True)
class Run:
    """One curation: wall and CPU seconds, CPU per stage, clips, and RAFT pairs of the recipe."""

    wall: float
    cpu: float
    stages: dict[str, float]
    clips: int
    pairs: int


def curate_once(source: str, workers: int) -> Run:
    """Curates the videos into a folder that is thrown away."""
    from data_prep.curate import curate, find_videos
    from data_prep.runners import Runner
    from data_prep.stages import Settings

    stages: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        where = Runner("process" if workers > 1 else "serial", workers)
        lines = curate(find_videos(source), Path(folder), Settings(), where)
        wall = time.perf_counter() - start
        for file in Path(folder).glob(".work/videos/*/timing.json"):
            for name, seconds in json.loads(file.read_text()).items():
                stages[name] = stages.get(name, 0.0) + seconds
    frames = (line["scores"].get("frames", 0) for line in lines)
    pairs = sum(max(0, min(MAX_FRAMES, count) - 1) for count in frames)
    clips = sum(len(line["clips"]) for line in lines)
    return Run(wall, stages.pop("cpu_seconds"), stages, clips, pairs)


def print_efficiency(source: str, workers: int, repeats: int) -> None:
    """Parallel efficiency by wall time, and the CPU time that both ways took."""
    pairs = [(curate_once(source, 1), curate_once(source, workers)) for _ in range(repeats)]
    one, many = (
        {name: float(np.median([getattr(run, name) for run in runs])) for name in ("wall", "cpu")}
        for runs in zip(*pairs, strict=True)
    )
    click.echo(
        f"1 worker: {one['wall']:.1f} s wall, {one['cpu']:.1f} CPU s; {workers} workers: "
        f"{many['wall']:.1f} s wall, {many['cpu']:.1f} CPU s\n"
        f"parallel efficiency {one['wall'] / (workers * many['wall']):.2f} by wall time, "
        f"{one['cpu'] / many['cpu']:.2f} by CPU time"
    )


@functools.cache
def _raft_inputs() -> tuple[dict[str, np.ndarray], np.ndarray]:
    from data_prep.raft import LARGE, parameter_shapes

    generator = np.random.default_rng(0)
    parameters = {
        name: generator.normal(0, 0.01, shape).astype(np.float32)
        for name, shape in parameter_shapes(LARGE).items()
    }
    return parameters, generator.uniform(0, 255, (2, 1, SHORT_SIDE, LONG_SIDE, 3)).astype(
        np.float32
    )


def raft_seconds() -> float:
    """CPU seconds of RAFT-large on one pair, one direction, without compiling."""
    from data_prep.raft import LARGE, network

    parameters, pair = _raft_inputs()
    for _ in range(2):  # the first may compile
        start = time.process_time()
        network(parameters, LARGE, pair[0], pair[1], ITERATIONS)[1].block_until_ready()
    return time.process_time() - start


def raft_flops() -> float:
    """Multiplications and additions of RAFT-large's convolutions and products, one direction."""
    import jax

    from data_prep.raft import LARGE, network
    from tools.plan_jaxpr import executed_flops

    parameters, pair = _raft_inputs()
    run = lambda p, a, b: network(p, LARGE, a, b, ITERATIONS)  # noqa: E731
    return executed_flops(jax.make_jaxpr(run)(parameters, *pair)).total


def cotracker_flops(points: int = TRACKED_POINTS, iterations: int = TRACK_ITERATIONS) -> float:
    """Multiplications and additions of CoTracker3 (offline) per frame of 384 × 512 pixels.

    Computed from the layer sizes of the published network (Karaev et al. 2024), which no package
    registry carries; attention scores, norms and resampling are left out (under 3 %).
    """

    def residual(size: int, inner: int, out: int) -> int:  # two blocks of two 3 × 3 convolutions
        return 9 * size * (inner * out + 3 * out * out)

    height, width = 384, 512
    at = [height * width // 4**level for level in range(5)]  # pixels from full to a sixteenth
    encoder = 49 * 3 * 64 * at[1] + residual(at[1], 64, 64) + residual(at[2], 64, 96)
    encoder += residual(at[3], 96, 128) + residual(at[4], 128, 128)
    encoder += at[2] * (9 * (128 + 128 + 96 + 64) * 256 + 256 * 128)

    window, hidden, layers, virtual = 7**2, 384, 3, 64
    block, key_value = 12 * hidden**2, 2 * hidden**2
    cross = block - key_value  # queries, projection and MLP; keys and values are the other side's
    correlation = 4 * (window**2 * 128 + window**2 * hidden + hidden * 256)
    point = correlation + 1110 * hidden + layers * (block + cross + key_value)
    virtual_point = layers * (2 * block + cross + key_value)
    return 2 * (encoder + iterations * (points * point + virtual * virtual_point))


def main() -> None:
    """Entry point."""
    run_command(lambda: app(standalone_mode=False))


if __name__ == "__main__":
    main()
