"""Converts MVDream's weights, where See3D's training starts, into a folder for this project.

    python -m tools.convert_mvdream --input sd-v2.1-base-4view.pt --output weights/mvdream

INPUT is the original checkpoint (LDM layout, a .pt or the same as .safetensors) or a folder in the
diffusers layout (mvdream-sd2.1). The UNet's input grows from 4 channels to See3D's 9: the kernel
slices of the visual condition and the mask start at zero (paper App. C), so that the first step of
training sees MVDream. The camera embedding, which See3D has no use for, is dropped.
The LDM checkpoint has neither tokenizer nor image encoder: add them from their published folders.
"""

from __future__ import annotations

from pathlib import Path

import click

from see3d_jax.errors import run_command


@click.command(
    epilog="""\b
Examples:
  # the original checkpoint; a .pt needs PyTorch (pip install 'see3d_jax[convert]')
  python -m tools.convert_mvdream --input sd-v2.1-base-4view.pt --output weights/mvdream \\
      --tokenizer stable-diffusion-2-1/tokenizer --image-encoder CLIP-ViT-H-14-laion2B-s32B-b79K
  # a diffusers folder, as MVDream itself rather than as a start for See3D
  python -m tools.convert_mvdream --input mvdream-sd2.1 --output weights/mvdream4 \\
      --channels 4 --keep-camera
"""
)
@click.option("--input", "source", required=True, type=click.Path(path_type=Path))
@click.option("--output", required=True, type=click.Path(path_type=Path), help="A new folder.")
@click.option(
    "--channels", type=click.Choice(["9", "4"]), default="9", show_default=True,
    help="Input channels of the UNet; the new ones start at zero.",
)  # fmt: skip
@click.option("--keep-camera", is_flag=True, help="Keep the camera embedding.")
@click.option("--tokenizer", type=click.Path(path_type=Path), help="Published tokenizer folder.")
@click.option(
    "--image-encoder", type=click.Path(path_type=Path), help="Published CLIP ViT-H/14 folder."
)
@click.option(
    "--head-dim", type=click.IntRange(1), default=64, show_default=True,
    help="Width of one attention head; LDM checkpoints do not tell.",
)  # fmt: skip
def app(
    source: Path,
    output: Path,
    channels: str,
    keep_camera: bool,
    tokenizer: Path | None,
    image_encoder: Path | None,
    head_dim: int,
) -> None:
    """Converts MVDream's checkpoint INPUT into the weights folder OUTPUT."""
    from tools.weight_plans import convert_mvdream

    convert_mvdream(
        source,
        output,
        channels=int(channels),
        keep_camera=keep_camera,
        tokenizer=tokenizer,
        image_encoder=image_encoder,
        head_dim=head_dim,
    )


def main() -> None:
    """Entry point."""
    run_command(lambda: app(standalone_mode=False))


if __name__ == "__main__":
    main()
