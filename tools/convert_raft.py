"""Converts RAFT's published weights, small or large, into a file that data_prep.raft loads.

    python -m tools.convert_raft --input raft-small.pth --output weights/raft_small.safetensors

Every tensor is accounted for and every shape checked before anything is written. The batch norms
of the large context encoder are constants at inference: they are folded into its convolutions.
The names are those of the original code, with or without the `module.` of data parallelism.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np

from see3d_jax.errors import InputError, run_command
from tools.checkpoint_files import Tensors, open_tensors, write_safetensors

BATCH_NORM_EPSILON = 1e-5  # PyTorch's default


@click.command(
    epilog="""\b
Examples:
  # a .pth needs PyTorch (pip install 'see3d_jax[convert]')
  python -m tools.convert_raft --input raft-things.pth --output weights/raft_large.safetensors
  python -m data_prep.curate --input videos/ --output curated/ --flow weights/raft_large.safetensors
"""
)
@click.option("--input", "source", required=True, type=click.Path(path_type=Path))
@click.option("--output", required=True, type=click.Path(path_type=Path), help="A .safetensors.")
def app(source: Path, output: Path) -> None:
    """Converts RAFT's weights INPUT into the file OUTPUT."""
    if output.suffix != ".safetensors":
        raise InputError(f"--output {output}: expected a name that ends in .safetensors")
    parameters = convert(open_tensors(source))
    output.parent.mkdir(parents=True, exist_ok=True)
    plan = {name: (value.dtype, value.shape) for name, value in parameters.items()}
    write_safetensors(output, plan, iter(parameters.items()))
    click.echo(f"{len(parameters)} arrays, {sum(v.size for v in parameters.values()):,} numbers")


def convert(source: Tensors) -> dict[str, np.ndarray]:
    """Published tensors → parameters of data_prep.raft; InputError if any is missing or left."""
    from data_prep.raft import LARGE, SMALL, parameter_shapes

    prefix = "module." if all(name.startswith("module.") for name in source.shapes) else ""
    unused = {name.removeprefix(prefix) for name in source.shapes}

    def take(name: str) -> np.ndarray:
        if name not in unused:
            raise InputError(f"{source.path}: is no RAFT checkpoint, it lacks {prefix}{name}")
        unused.discard(name)
        return source.read(prefix + name).astype(np.float32)

    variant = LARGE if "update_block.gru.convz1.weight" in unused else SMALL
    parameters: dict[str, np.ndarray] = {}
    for name in parameter_shapes(variant):
        layer, part = name.rsplit(".", 1)
        if part != "kernel":
            continue
        kernel, bias = take(f"{layer}.weight"), take(f"{layer}.bias")
        norm = _norm_name(layer)
        if norm is not None and f"{norm}.running_var" in unused:
            scale = take(f"{norm}.weight") / np.sqrt(
                take(f"{norm}.running_var") + BATCH_NORM_EPSILON
            )
            bias = (bias - take(f"{norm}.running_mean")) * scale + take(f"{norm}.bias")
            kernel = kernel * scale[:, None, None, None]
            unused.discard(f"{norm}.num_batches_tracked")
            # the norm of a shortcut is stored under a second name as well
            unused -= {name for name in unused if name.startswith(f"{layer[:-1]}1.")
                       and layer.endswith("downsample.0")}  # fmt: skip
        parameters[f"{layer}.kernel"] = np.ascontiguousarray(kernel.transpose(2, 3, 1, 0))
        parameters[f"{layer}.bias"] = bias
    if unused:
        raise InputError(f"{source.path}: holds {len(unused)} unknown tensors: {min(unused)}, …")
    for name, shape in parameter_shapes(variant).items():
        if parameters[name].shape != shape:
            raise InputError(
                f"{source.path}: {name} has shape {parameters[name].shape}, expected {shape}"
            )
    return parameters


def _norm_name(layer: str) -> str | None:
    """The norm that follows a convolution of the context encoder."""
    if not layer.startswith("cnet.") or layer == "cnet.conv2":
        return None
    if layer.endswith(".downsample.0"):
        return layer.removesuffix("downsample.0") + "norm3"
    return layer[: layer.rindex("conv")] + "norm" + layer[-1]


def main() -> None:
    """Entry point."""
    run_command(lambda: app(standalone_mode=False))


if __name__ == "__main__":
    main()
