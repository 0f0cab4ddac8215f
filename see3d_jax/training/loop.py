"""The training run, top to bottom: restore → batch → step → log → save → sample, until done.

Reads shards through `data.pipeline`, writes a workdir (see `checkpoint`), and can be stopped at any
moment: killed, it continues from the newest checkpoint bit for bit; on SIGTERM it saves first. The
stream position saved with step n is that of the batches of steps ≤ n, so none is lost or repeated.
Every process of a run executes this same loop (see `distributed`); only the lead logs.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import numpy as np
from clu import parameter_overview
from etils import epath

from see3d_jax.data.held_out import held_out_batch
from see3d_jax.data.mixture import Mixture, SkippedClips
from see3d_jax.data.pipeline import training_batches
from see3d_jax.errors import WorkError
from see3d_jax.files import write_text
from see3d_jax.media import write_image
from see3d_jax.models.weights import init_unet, parameter_count
from see3d_jax.training import checkpoint, distributed, settings
from see3d_jax.training.evaluate import evaluate
from see3d_jax.training.metrics_log import Console, MetricsLog, import_wandb
from see3d_jax.training.settings import TrainSpec
from see3d_jax.training.sharding import local_rows, make_mesh, put_batch, put_whole, state_shardings
from see3d_jax.training.state import TrainState, init_state
from see3d_jax.training.step import make_optimizer, train_step


def train(config: ml_collections.ConfigDict, workdir: str | os.PathLike[str]) -> None:
    """Trains to `config.num_steps`, continuing whatever `workdir` (a folder or bucket path) holds.

    Raises InputError, before anything is written, when the config, the workdir or the data cannot
    be used; WorkError when losses stay non-finite or a checkpoint cannot be saved.
    """
    workdir = epath.Path(workdir)
    # Everything that can be refused is looked at first.
    settings.check_counts(config)
    checkpoint.check_workdir(workdir, config)
    spec = settings.train_spec(config)
    schedule, evaluation = settings.noise_schedule(config), settings.evaluation(config)
    perceptual = settings.perceptual(config)
    if config.wandb_project:
        import_wandb(config.wandb_project)
    mesh = make_mesh(config)
    settings.check_origin(config, spec.unet)
    frozen = settings.frozen_networks(config, spec.unet)
    frozen = frozen.replace(perceptual=settings.loss_network(config))
    example = settings.example_spec(config, frozen.codec)
    skipped, clips = SkippedClips(), Mixture(settings.data_sources(config), config.seed)
    preprocess = settings.preprocess(frozen)
    frozen = put_whole(frozen, state_shardings(frozen, mesh))
    eval_batch, held_out = held_out_batch(
        clips, example, config.data.held_out, config.seed, skipped, preprocess
    )
    batches = training_batches(
        clips, example, config.batch_size, config.seed, held_out,
        threads=config.data.threads, workers=config.data.workers, preprocess=preprocess,
        skipped=skipped, rows=local_rows(mesh, config.batch_size),
    )  # fmt: skip

    run_key = jax.random.key(config.seed)
    fresh = functools.partial(_fresh_state, config, spec)
    shardings = state_shardings(jax.eval_shape(fresh), mesh)

    lead = distributed.is_lead()
    distributed.barrier("all have looked at the workdir")
    if lead:
        checkpoint.write_config(workdir, config)
    with contextlib.ExitStack() as stack:
        stack.callback(batches.close)
        checkpoints = stack.enter_context(
            checkpoint.Checkpoints(workdir, config.keep_checkpoints, config.keep_every)
        )
        restored = checkpoints.restore(_abstract(fresh, shardings))
        if restored:
            step, state = restored.step, restored.state
            batches.set_state(restored.position)
        else:
            # Op by op: compiling hundreds of small random draws takes longer than running them.
            params = settings.initial_params(config, spec.unet)
            first = init_state(params, make_optimizer(spec.optimizer))
            step, state = 0, put_whole(first, shardings)
        log = stack.enter_context(MetricsLog(workdir, step, lead, config.wandb_project))
        flops = settings.flops_per_sample(config, spec, frozen.codec)
        console = stack.enter_context(
            Console(step, config.num_steps, config.batch_size, lead, flops)
        )
        stop = stack.enter_context(distributed.stop_signal())
        if lead:
            overview = parameter_overview.get_parameter_overview(state.params, include_stats=False)
            write_text(workdir / "parameters.txt", overview + "\n")
        console.say(
            f"{parameter_count(state.params):,} parameters, {len(clips)} clips, "
            f"{len(held_out.names)} source video(s) held out, "
            + (f"continuing from step {step}" if step else f"new run in {workdir}")
        )
        if step >= config.num_steps:
            console.say(f"nothing to do: step {step} of {config.num_steps} is reached")

        unseen: list[tuple[int, dict[str, jax.Array]]] = []  # metrics still on the device
        # The signal is asked once a step: one that arrives later ends the next step.
        done = step >= config.num_steps
        while not done:
            with console.waiting_for_input():
                batch = put_batch(next(batches), mesh, config.batch_size)
            state, metrics = train_step(
                state, batch, frozen, schedule, run_key, spec=spec, mesh=mesh
            )
            distributed.settle(metrics)
            step += 1
            unseen.append((step, metrics))
            console.step_done()
            done = stop.agreed(step) or step == config.num_steps

            if due(step, config.log_every) or due(step, config.checkpoint_every) or done:
                checkpoints.check()
                losses = write_losses(log, console, unseen, config.max_skipped_in_row, workdir)
                unseen.clear()
                if due(step, config.log_every) or done:
                    speed = console.report(step, float(np.mean(losses)) if losses else np.nan)
                    counts = {
                        "skipped_steps": int(metrics["skipped"]),
                        "skipped_clips": distributed.total(len(skipped)),
                    }
                    log.scalars(step, speed | counts)
                    log.flush()
            if due(step, config.checkpoint_every) or done:
                with console.paused():
                    checkpoints.save(step, state, batches.get_state())
            if due(step, config.sample_every) or (step == config.num_steps and config.sample_every):
                with console.paused():
                    scores, grid = evaluate(
                        state.ema_params, eval_batch, frozen, schedule, run_key,
                        spec=spec, mesh=mesh, evaluation=evaluation, perceptual=perceptual,
                    )  # fmt: skip
                    log.scalars(step, scores)
                    log.image(step, "samples", grid)
                    if lead:
                        write_image(workdir / "samples" / f"step_{step:06d}.png", grid)
                console.say(
                    "held-out PSNR {heldout_psnr:.2f} dB (copy of nearest reference "
                    "{heldout_psnr_copy:.2f}, condition alone {heldout_psnr_condition:.2f})".format(
                        **scores
                    )
                )
    # Here the last save has reached the disk.
    if step < config.num_steps and lead:
        print(f"stopped by a signal at step {step}, saved; run again to continue", flush=True)


def due(step: int, every: int) -> bool:
    """Whether something done every `every` steps (0 = never) is to be done at `step`."""
    return every > 0 and step % every == 0


def write_losses(
    log: MetricsLog,
    console: Console,
    unseen: list[tuple[int, dict[str, jax.Array]]],
    max_skipped_in_row: int,
    workdir: epath.Path,
) -> list[float]:
    """Fetches and writes the metrics of every step; returns the finite losses.

    A step whose loss or gradient was not finite has changed nothing; it is named and not logged.
    Raises WorkError at the `max_skipped_in_row`-th in a row, which is before the next save.
    """
    losses = []
    for step, metrics in unseen:
        loss, norm, in_row = (
            metrics[name].item() for name in ("loss", "grad_norm", "skipped_in_row")
        )
        if in_row >= max_skipped_in_row:
            raise WorkError(
                f"{workdir}: stopped at step {step}: the loss ({loss}) or the gradient norm "
                f"({norm}) was not finite {in_row} times in a row (config.max_skipped_in_row). "
                "Lower config.optimizer.learning_rate in a new --workdir, or look at the data"
            )
        if in_row:
            console.say(f"step {step} is skipped: loss {loss}, gradient norm {norm}")
            continue
        log.scalars(step, {"loss": loss, "grad_norm": norm})
        losses.append(loss)
    return losses


def _fresh_state(config: ml_collections.ConfigDict, spec: TrainSpec) -> TrainState:
    return init_state(init_unet(spec.unet, config.seed), make_optimizer(spec.optimizer))


def _abstract(fresh: Callable[[], TrainState], shardings: Any) -> TrainState:
    """Shapes, dtypes and placements of a state that need not be computed."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(fresh),
        shardings,
    )
