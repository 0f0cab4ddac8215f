"""The full training step against PyTorch's on this CPU: time, CPU time, peak memory.

    python -m benchmarks.train_step [--small] [--json FILE]      needs torch (pip install torch)

Both sides take the same step on the same float32 weights: visual condition, UNet, loss on targets,
backward pass, global-norm clipping, AdamW, moving average. Latents of the clean views are given;
ours also encodes the masked views (with the block DCT, which is next to nothing). The losses of the
first steps, with the same noise, must agree to 1e-4 before anything is timed; the later ones depend
on every part of the step. Runs alternate and medians count, as in `benchmarks.unet`. Also timed:
loss alone, and loss with gradient, so that the difference says what the rest costs.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.unet import inputs_and_weights, problem, race, torch_layout
from see3d_jax.errors import InputError, run_command
from see3d_jax.files import write_json

AGREEMENT = 1e-4
CHECKED_STEPS = 3


@click.command(
    epilog="""\b
Examples:
  python -m benchmarks.train_step --small
  python -m benchmarks.train_step --repeats 9 --json train_step.json
"""
)
@click.option("--small", is_flag=True, help="A 1 M-parameter UNet on 16×16 latents.")
@click.option("--repeats", default=7, show_default=True, help="Timed runs of each side.")
@click.option("--json", "output", type=click.Path(path_type=Path), help="Also write the numbers.")
def app(small: bool, repeats: int, output: Path | None) -> None:
    """Prints one line per measurement."""
    try:
        import torch
    except ImportError as error:
        raise InputError("torch is not installed: pip install torch") from error
    report: dict[str, Any] = {"cores": os.cpu_count(), "small": small, "torch": torch.__version__}
    report |= compare(*problem(small), repeats)
    if output is not None:
        write_json(output, report)


def compare(unet: Any, views: int, size: int, repeats: int) -> dict[str, Any]:
    """Times the parts and the whole of both steps; raises if their losses differ."""
    import jax

    from see3d_jax.training.gradient import loss_and_gradient

    ours, theirs = OurSide(unet, views, size), TorchSide(unet, views, size)
    difference = loss_difference(ours, theirs)
    click.echo(f"losses of {CHECKED_STEPS} steps differ by {difference:.1e} of their size")
    if not difference <= AGREEMENT:
        raise InputError(f"losses differ by {difference:.1e} > {AGREEMENT}: not the same step")

    fixed = functools.partial(loss_and_gradient, spec=ours.spec, mesh=ours.mesh)
    arguments = (ours.state.params, ours.batch, ours.frozen, ours.schedule, jax.random.key(1))
    gradient = jax.jit(fixed)
    loss = jax.jit(lambda *inputs: fixed(*inputs)[0])  # XLA drops the backward pass
    report = {"difference": difference}
    pairs = {
        "loss": (lambda: loss(*arguments), theirs.loss),
        "gradient": (lambda: gradient(*arguments), theirs.gradient),
        "step": (ours.step, theirs.step),
    }
    # The state is given up by each step; the parts must not hold on to it.
    ours.state = jax.tree.map(jax.numpy.copy, ours.state)
    for name, (here, there) in pairs.items():
        report[name] = race(f"training {name}", here, there, repeats)
    for side in ("ours", "torch"):
        rest = report["step"][f"{side}_s"] - report["gradient"][f"{side}_s"]
        backward = report["gradient"][f"{side}_s"] - report["loss"][f"{side}_s"]
        click.echo(
            f"{side}: loss {report['loss'][f'{side}_s']:.3f} s, backward pass {backward:.3f} s, "
            f"clipping, AdamW and average {rest:.3f} s"
        )
    return report


def loss_difference(ours: OurSide, theirs: TorchSide) -> float:
    """Takes the first steps on both sides; how far their losses differ, relative."""
    losses = [(ours.step(), theirs.step(ours.noise(i))) for i in range(CHECKED_STEPS)]
    return max(abs(a - b) / b for a, b in losses)


class OurSide:
    """Our step with its state carried along."""

    def __init__(self, unet: Any, views: int, size: int) -> None:
        import jax

        from see3d_jax.diffusion.schedule import make_schedule
        from see3d_jax.models.codec import DctCodec
        from see3d_jax.training.sharding import device_mesh, put_batch
        from see3d_jax.training.state import Frozen, init_state
        from see3d_jax.training.step import make_optimizer, train_step

        self.spec = _spec(unet)
        self.schedule = make_schedule("linear", zero_snr=True)
        self.mesh = device_mesh((1, 1, 1, 1), jax.devices()[:1])
        self.frozen = Frozen(DctCodec(4, unet.out_channels))
        self.batch = put_batch(_batch(self.frozen.codec, views, size), self.mesh, 1)
        params = jax.device_put(inputs_and_weights(unet, views, size)[1])
        self.state = init_state(params, make_optimizer(self.spec.optimizer))
        self.key = jax.random.key(0)
        self._step, self._size, self._views = train_step, size, views

    def step(self) -> float:
        """Takes a step; returns the loss before it."""
        inputs = (self.state, self.batch, self.frozen, self.schedule, self.key)
        self.state, metrics = self._step(*inputs, spec=self.spec, mesh=self.mesh)
        return float(metrics["loss"])

    def noise(self, step: int) -> Any:
        """The noise that step number `step` drew."""
        import jax

        from see3d_jax.diffusion.loss import draw_loss_noise

        shape = (self._size, self._size, self.spec.unet.out_channels)
        return draw_loss_noise(
            jax.random.fold_in(self.key, step), np.arange(1), np.arange(self._views), shape,
            num_timesteps=1000, drop_probability=self.spec.objective.drop_probability,
        )  # fmt: skip


class TorchSide:
    """The same step in torch."""

    def __init__(self, unet: Any, views: int, size: int) -> None:
        import torch

        from benchmarks.torch_training import TorchBatch, TorchTrainer
        from benchmarks.torch_unet import torch_unet
        from see3d_jax.diffusion.schedule import make_schedule
        from see3d_jax.diffusion.visual_condition import condition_timestep, mixing_weight
        from see3d_jax.models.codec import DctCodec
        from see3d_jax.training.inputs import encode_batch

        codec = DctCodec(4, unet.out_channels)
        batch = _batch(codec, views, size)
        encoded = [_nchw(np.asarray(x)[0]) for x in encode_batch(codec, batch)]
        context = torch.zeros(views, 77, unet.context_dim)
        self.batch = TorchBatch(*encoded, torch.from_numpy(batch["is_reference"][0]), context)
        times = np.arange(1000)
        tables = (
            make_schedule("linear", zero_snr=True).alphas_cumprod,
            mixing_weight(times), condition_timestep(times),
        )  # fmt: skip
        network = torch_unet(unet, torch_layout(inputs_and_weights(unet, views, size)[1]))
        tables = (torch.from_numpy(np.array(table)) for table in tables)
        self._trainer = TorchTrainer(network, _spec(unet), *tables)

    def step(self, noise: Any = None) -> float:
        """Takes a step, with our noise or its own; returns the loss before it."""
        from benchmarks.torch_training import TorchNoise

        if noise is not None:
            eps, eps_condition = (_nchw(np.asarray(x)[0]) for x in (noise.eps, noise.eps_condition))
            noise = TorchNoise(int(noise.t[0]), bool(noise.dropped[0]), eps, eps_condition)
        return float(self._trainer.step(self.batch, noise))

    def loss(self) -> Any:
        """The loss alone."""
        import torch

        with torch.no_grad():
            return self._trainer.loss(self.batch, self._trainer.draw(self.batch))

    def gradient(self) -> Any:
        """The loss and its gradient."""
        return self._trainer.gradient(self.batch, self._trainer.draw(self.batch))


def _spec(unet: Any) -> Any:
    from see3d_jax.training.settings import ObjectiveSpec, OptimizerSpec, TrainSpec

    return TrainSpec(
        unet=unet,
        optimizer=OptimizerSpec(1e-4, 1, 0.9, 0.999, 1e-8, 1e-2, 1.0),
        objective=ObjectiveSpec(0.1, "code", 0.2, "prediction", "none"),
        accumulate=1,
        ema_decay=0.999,
        context_tokens=77,
    )


def _batch(codec: Any, views: int, size: int) -> dict[str, np.ndarray]:
    """One sample with one reference: images, masks and clean latents."""
    rng = np.random.default_rng(1)
    side = size * codec.factor
    image = rng.uniform(-1, 1, (1, views, side, side, 3)).astype(np.float32)
    mask = (rng.random((1, views, side, side, 1)) < 0.6).astype(np.float32)
    is_reference = (np.arange(views) < 1)[None]
    mask[is_reference] = 1
    batch = {"image": image, "mask": mask, "is_reference": is_reference}
    return batch | {"latent": np.asarray(codec.encode(image))}


def _nchw(x: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(np.moveaxis(x, -1, 1).copy())


def main() -> None:
    """Entry point."""
    run_command(lambda: app(standalone_mode=False))


if __name__ == "__main__":
    main()
