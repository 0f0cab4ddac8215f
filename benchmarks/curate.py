"""Curation: clips per core-hour, the share of each stage, and the official recipe's floor.

The official filter runs RAFT (large, 20 iterations, long side 768, both directions) on every pair
of consecutive frames, at most 200 frames. That floor is RAFT-large's time for one direction, here
in JAX with random weights (its time does not depend on them), times all pairs of the same videos.
Ours is the CPU time of `data_prep.curate` in one process, early exits included.

    python -m benchmarks.curate --input videos/
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

import click
import numpy as np

from see3d_jax.errors import run_command

LONG_SIDE, SHORT_SIDE, ITERATIONS, MAX_FRAMES = 768, 432, 20, 200


@click.command()
@click.option("--input", "source", required=True, help="Videos, as for data_prep.curate.")
@click.option("--repeats", default=2, type=click.IntRange(1), show_default=True)
def app(source: str, repeats: int) -> None:
    """Prints the CPU cost of curating INPUT beside RAFT's floor on the same machine."""
    from data_prep.curate import curate, find_videos
    from data_prep.stages import Settings

    with tempfile.TemporaryDirectory() as folder:
        lines = curate(find_videos(source), Path(folder), Settings())
        shares: dict[str, float] = {}
        for file in Path(folder).glob(".work/videos/*/timing.json"):
            for name, seconds in json.loads(file.read_text()).items():
                shares[name] = shares.get(name, 0.0) + seconds
    total = shares.pop("cpu_seconds")
    clips = sum(len(line["clips"]) for line in lines)
    frames = (line["scores"].get("frames", 0) for line in lines)
    pairs = sum(max(0, min(MAX_FRAMES, count) - 1) for count in frames)
    one = raft_seconds(repeats)
    floor = 2 * pairs * one
    click.echo(f"{clips} clips, {total:.1f} CPU s: {3600 * clips / total:.0f} clips per core-hour")
    for name, seconds in shares.items():
        click.echo(f"  {name}: {seconds / total:.0%}")
    click.echo(f"  decoding and the rest: {1 - sum(shares.values()) / total:.0%}")
    click.echo(
        f"RAFT-large at {LONG_SIDE} px: {one:.2f} CPU s per direction; official floor "
        f"{floor:.0f} CPU s for {pairs} pairs = {floor / total:.1f} × ours"
    )


def raft_seconds(repeats: int) -> float:
    """Least CPU seconds of RAFT-large on one pair, one direction."""
    from data_prep.raft import LARGE, network, parameter_shapes

    generator = np.random.default_rng(0)
    parameters = {
        name: generator.normal(0, 0.01, shape).astype(np.float32)
        for name, shape in parameter_shapes(LARGE).items()
    }
    pair = generator.uniform(0, 255, (2, 1, SHORT_SIDE, LONG_SIDE, 3)).astype(np.float32)
    times = []
    for _ in range(repeats + 1):  # the first compiles
        start = time.process_time()
        network(parameters, LARGE, pair[0], pair[1], ITERATIONS)[1].block_until_ready()
        times.append(time.process_time() - start)
    return min(times[1:])


def main() -> None:
    """Entry point."""
    run_command(lambda: app(standalone_mode=False))


if __name__ == "__main__":
    main()
