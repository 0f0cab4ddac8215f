"""Are two training runs bit-identical? Compares the newest checkpoints of two workdirs.

    python -m tools.compare_checkpoints A B

Every array of the train state is compared by structure, shape, dtype and bits (so NaNs and signed
zeros count), and so is the position in the data stream. Prints the largest difference and the leaf
it is in. Exit code 0 only when all is identical, 1 when something differs, 2 on bad input.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import numpy as np

from see3d_jax.errors import InputError, run_command


@click.command(
    epilog="""\b
Examples:
  # an uninterrupted run against one that was killed and continued
  python -m tools.compare_checkpoints runs/straight runs/resumed
"""
)
@click.argument("first", type=click.Path(path_type=Path))
@click.argument("second", type=click.Path(path_type=Path))
def app(first: Path, second: Path) -> int:
    """Compares the newest checkpoints of workdirs FIRST and SECOND leaf by leaf.

    Exits 0 only when they are bit-identical.
    """
    (step_a, leaves_a), (step_b, leaves_b) = newest_leaves(first), newest_leaves(second)
    click.echo(f"{first}: step {step_a}, {len(leaves_a)} leaves")
    click.echo(f"{second}: step {step_b}, {len(leaves_b)} leaves")
    differences = compare(leaves_a, leaves_b)
    for line in differences[:10]:
        click.echo(line)
    if len(differences) > 10:
        click.echo(f"… and {len(differences) - 10} more differing leaves")
    worst, name = largest_difference(leaves_a, leaves_b)
    click.echo(f"largest difference: {worst:g}" + (f" in {name}" if worst else ""))
    click.echo("DIFFERENT" if differences else "bit-identical")
    return 1 if differences else 0


def newest_leaves(workdir: Path) -> tuple[int, dict[str, np.ndarray]]:
    """Step number, and every leaf of the newest complete checkpoint by its path."""
    import jax
    import orbax.checkpoint as ocp

    folder = workdir.absolute() / "checkpoints"
    if not workdir.is_dir():
        raise InputError(f"{workdir}: no such training folder")
    steps = ocp.utils.checkpoint_steps(folder) if folder.is_dir() else []
    if not steps:
        raise InputError(f"{workdir}: has no complete checkpoint")
    newest = max(steps)
    # Said explicitly: a checkpoint of several processes does not fit the one that looks at it.
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def whole(array: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=here)

    try:
        with (
            ocp.StandardCheckpointer() as arrays,
            ocp.Checkpointer(ocp.JsonCheckpointHandler()) as values,
        ):
            path = folder / str(newest) / "state"
            saved = ocp.StandardCheckpointHandler().metadata(path).tree
            tree = {
                "state": arrays.restore(path, jax.tree.map(whole, saved)),
                "input": values.restore(folder / str(newest) / "input"),
            }
    except Exception as error:  # tensorstore and Orbax raise their own kinds
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{folder / str(newest)}: cannot be read ({reason})") from error
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return newest, {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in flat
    }


def compare(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> list[str]:
    """One line per leaf that is missing or differs in shape, dtype or any bit."""
    lines = [f"only in the first: {name}" for name in sorted(first.keys() - second.keys())]
    lines += [f"only in the second: {name}" for name in sorted(second.keys() - first.keys())]
    for name in sorted(first.keys() & second.keys()):
        a, b = first[name], second[name]
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            lines.append(f"{name}: {a.dtype}{a.shape} against {b.dtype}{b.shape}")
        elif a.tobytes() != b.tobytes():
            lines.append(f"{name}: differs by up to {_difference(a, b):g}")
    return lines


def largest_difference(
    first: dict[str, np.ndarray], second: dict[str, np.ndarray]
) -> tuple[float, str]:
    """The largest absolute difference over comparable leaves, and the leaf it is in."""
    return max(
        (
            (_difference(first[name], second[name]), name)
            for name in first.keys() & second.keys()
            if first[name].shape == second[name].shape
        ),
        default=(0.0, ""),
    )


def _difference(a: Any, b: Any) -> float:
    if a.dtype.kind not in "fiubc" or b.dtype.kind not in "fiubc" or not a.size:
        return 0.0
    if a.tobytes() == b.tobytes():
        return 0.0
    difference = np.abs(a.astype(np.float64) - b.astype(np.float64))
    return float(np.where(np.isnan(difference), np.inf, difference).max())


def main() -> None:
    """Entry point."""
    run_command(lambda: app(standalone_mode=False))


if __name__ == "__main__":
    main()
