"""Packs a small training run into the two files that `--checkpoint` takes and the package ships.

    python -m tools.export_tiny --workdir runs/tiny --output see3d_jax/assets/tiny

The moving average of the newest checkpoint in float16, with what sampling needs of the config and
how it was trained. The files name no folder of the machine, so they can be published as they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from see3d_jax.errors import InputError, run_command

MAX_BYTES = 25_000_000  # what a package may weigh without annoying those who install it


@click.command(
    epilog="""\b
Examples:
  python -m tools.export_tiny --workdir runs/tiny --output packed
  see3d generate --input photo.jpg --depth depth.npy --trajectory orbit \\
      --checkpoint packed --output out/views
"""
)
@click.option("--workdir", required=True, type=click.Path(path_type=Path), metavar="RUN")
@click.option(
    "--output", required=True, type=click.Path(path_type=Path), metavar="DIR",
    help="Where to; an earlier packed model there is replaced.",
)  # fmt: skip
@click.option(
    "--data", default=None, metavar="TEXT",
    help="What it was trained on, in words [default: the names of the folders].",
)  # fmt: skip
@click.option(
    "--command", default=None, metavar="TEXT", help="The command that trained it, for the record."
)
def app(workdir: Path, output: Path, data: str | None, command: str | None) -> None:
    """Packs the newest checkpoint of a training run into DIR: config.json, model.safetensors."""
    from see3d_jax.files import atomic_path, write_json
    from see3d_jax.models import origins, packed
    from see3d_jax.models.release import WEIGHTS
    from see3d_jax.models.unet import UNetConfig
    from see3d_jax.models.weights import parameter_count
    from tools.checkpoint_files import write_safetensors

    if output.exists() and not (output.is_dir() and packed.is_packed(output)):
        if not output.is_dir() or any(output.iterdir()):
            raise InputError(f"{output}: holds something else; give another --output")
    config = origins.read_run_config(workdir)
    step = origins.complete_steps(workdir)[-1]
    try:
        params = origins.read_average(workdir, step, UNetConfig(**config["model"]))
        training: dict[str, Any] = {
            "steps": step,
            "batch_size": config["batch_size"],
            "seed": config["seed"],
            "data": data or ", ".join(_folder_names(config["data"])),
            "parameters": parameter_count(params),
            **({"command": command} if command else {}),
        }
        content, tensors = packed.pack(config, params, training, str(workdir))
    except (KeyError, TypeError) as error:
        raise InputError(f"{workdir / 'config.json'}: describes no model ({error})") from error
    size = sum(tensor.nbytes for tensor in tensors.values())
    if size > MAX_BYTES:
        raise InputError(
            f"{workdir}: its weights take {size / 1e6:.0f} MB in float16; at most "
            f"{MAX_BYTES / 1e6:.0f} MB are packed (use the workdir itself as --checkpoint)"
        )
    plan = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    with atomic_path(output) as folder:
        folder.mkdir()
        write_json(folder / packed.CONFIG, content)
        write_safetensors(folder / WEIGHTS, plan, iter(tensors.items()))
    click.echo(
        f"wrote {output}: step {step}, {training['parameters']:,} parameters, {size / 1e6:.1f} MB"
    )


def _folder_names(data: dict[str, Any]) -> list[str]:
    folders = [entry[0] for entry in data.get("mixture") or ()] or [data.get("path", "")]
    return [Path(folder).name for folder in folders]


def main() -> None:
    """Entry point."""
    run_command(lambda: app(standalone_mode=False))


if __name__ == "__main__":
    main()
