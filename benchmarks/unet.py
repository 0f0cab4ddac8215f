"""Our UNet and attention against PyTorch's on this CPU: time, peak memory; bf16's error.

    python -m benchmarks.unet [--small] [--json FILE]      needs torch (pip install torch)
    python -m benchmarks.unet --devices 2                  views spread over two JAX devices
    python -m benchmarks.unet --bf16 [--small]             does not

Both sides run the same architecture on the same float32 weights and inputs, with the same number of
threads; outputs must agree to 1e-4 before anything is timed. Runs alternate, so that a busy machine
hurts both; medians count. "step" is forward and backward of a mean squared error, no optimizer.
Memory is the rise of the process's resident peak during a run (Linux). Ratios: ours / torch's.
UNetConfig.remat is left off: blocks keep their matrix products and compute the rest again.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

from see3d_jax.errors import InputError, run_command
from see3d_jax.files import write_json

AGREEMENT = 1e-4
SHORT = 0.2  # seconds


@click.command(
    epilog="""\b
Examples:
  python -m benchmarks.unet --small
  python -m benchmarks.unet --tokens 4096 --tokens 16384 --json unet.json
  python -m benchmarks.unet --bf16
"""
)
@click.option("--small", is_flag=True, help="A 1 M-parameter UNet on 16×16 latents.")
@click.option("--bf16", is_flag=True, help="Only bf16's error against float32; no torch needed.")
@click.option("--repeats", default=7, show_default=True, help="Timed runs of each side.")
@click.option(
    "--devices",
    default=1,
    show_default=True,
    help="JAX devices to split the processor into, for the UNet's views.",
)
@click.option(
    "--tokens",
    multiple=True,
    type=int,
    help="Attention lengths instead of 4096, 16384 and 65536; 0 for none.",
)
@click.option("--json", "output", type=click.Path(path_type=Path), help="Also write the numbers.")
def app(
    small: bool, bf16: bool, repeats: int, devices: int, tokens: tuple[int, ...],
    output: Path | None,
) -> None:  # fmt: skip
    """Prints one line per measurement."""
    if devices > 1:
        import jax

        jax.config.update("jax_num_cpu_devices", devices)
    config, views, size = problem(small)
    report: dict[str, Any] = {"cores": os.cpu_count(), "devices": devices, "small": small}
    if bf16:
        report["bf16"] = bf16_errors(config, views, size)
        for name, value in report["bf16"].items():
            click.echo(f"{name:42}{value:.3e}")
    else:
        try:
            import torch
        except ImportError as error:
            raise InputError("torch is not installed: pip install torch, or use --bf16") from error
        report["torch"] = torch.__version__
        report["unet"] = compare_unets(config, views, size, repeats)
        lengths = [n for n in (tokens or (4096, 16384, 65536)) if n]
        report["attention"] = [compare_attention(n, min(repeats, 3)) for n in lengths]
    if output is not None:
        write_json(output, report)


def problem(small: bool) -> tuple[Any, int, int]:
    """The architecture (38,803,460 weights, or 1 M), views, and latent height = width."""
    from see3d_jax.models.unet import UNetConfig

    if small:
        shape = {"model_channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1}
        return UNetConfig(**shape, head_dim=16, context_dim=64), 4, 16
    return UNetConfig(model_channels=64), 4, 32


def inputs_and_weights(config: Any, views: int, size: int) -> tuple[tuple[np.ndarray, ...], Any]:
    """Random inputs (x, t, context) of one sample, and weights without zeroed layers."""
    import jax

    from see3d_jax.models.weights import abstract_unet

    rng = np.random.default_rng(0)

    def draw(leaf: Any) -> np.ndarray:
        if leaf.ndim == 1:  # biases and norms
            return 0.1 * rng.standard_normal(leaf.shape, np.float32)
        fan_in = np.prod(leaf.shape[:-1])
        return rng.standard_normal(leaf.shape, np.float32) / np.float32(np.sqrt(fan_in))

    params = jax.tree.map(draw, abstract_unet(config))
    params = jax.tree.map_with_path(lambda path, x: x + 1 if _is_norm_scale(path, x) else x, params)
    x = rng.standard_normal((1, views, size, size, config.in_channels), np.float32)
    context = rng.standard_normal((1, views, 77, config.context_dim), np.float32)
    return (x, np.full((1, views), 500), context), params


def _is_norm_scale(path: Any, x: np.ndarray) -> bool:
    return x.ndim == 1 and path[-1].key == "weight"


def compare_unets(config: Any, views: int, size: int, repeats: int) -> dict[str, Any]:
    """Times forward and step of both UNets; raises if their outputs differ."""
    import jax
    import jax.numpy as jnp
    import torch
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    from benchmarks.torch_unet import torch_unet

    (x, t, context), params = inputs_and_weights(config, views, size)
    network = torch_unet(config, torch_layout(params))
    mesh = jax.make_mesh((jax.device_count(),), ("view",), (AxisType.Auto,))
    params = jax.device_put(params, NamedSharding(mesh, P()))
    rows = [
        torch.from_numpy(np.moveaxis(x[0], -1, 1).copy()),
        torch.from_numpy(t[0]),
        torch.from_numpy(context[0]),
    ]

    apply = spread_over_views(config, views, mesh)
    ours = jax.jit(apply)

    @jax.jit
    def our_step(params: Any, x: jax.Array, t: jax.Array, context: jax.Array) -> tuple:
        loss = lambda p: jnp.square(apply(p, x, t, context)).mean()  # noqa: E731
        return jax.value_and_grad(loss)(params)

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return network(*rows, views)

    names, weights = zip(*network.named_parameters())

    def step() -> tuple[torch.Tensor, ...]:
        # Not backward(): gradients kept from the run before would hide in the memory it starts at.
        return torch.autograd.grad(network(*rows, views).square().mean(), weights)

    got = np.moveaxis(np.asarray(ours(params, x, t, context))[0], -1, 1)
    difference = float(np.abs(got - forward().numpy()).max())
    _, gradients = our_step(params, x, t, context)
    theirs = dict(zip(names, (gradient.numpy() for gradient in step())))
    wrong = sum(
        float(np.square(g - theirs[name]).sum()) for name, g in torch_layout(gradients).items()
    )
    gap = np.sqrt(wrong / sum(float(np.square(g).sum()) for g in theirs.values()))
    del gradients, theirs
    click.echo(f"UNet outputs differ by {difference:.1e}, gradients by {gap:.1e} of their norm")
    if not difference <= AGREEMENT:
        raise InputError(f"outputs differ by {difference:.1e} > {AGREEMENT}: not the same network")
    report = {"difference": difference, "gradient_difference": float(gap)}
    report["forward"] = race("UNet forward", lambda: ours(params, x, t, context), forward, repeats)
    report["step"] = race("UNet step", lambda: our_step(params, x, t, context), step, repeats)
    return report


def spread_over_views(config: Any, views: int, mesh: Any) -> Callable[..., Any]:
    """(params, x, t, context) → the UNet's output, each JAX device working on a part of the views.

    XLA runs the operations of one device of a CPU one after the other and splits only large ones.
    """
    import jax
    from jax.sharding import PartitionSpec as P

    from see3d_jax.models.unet import Parts
    from see3d_jax.models.weights import apply_unet

    if mesh.size == 1:
        return functools.partial(apply_unet, config)
    if views % mesh.size:
        raise InputError(f"--devices {mesh.size} does not divide {views} views")
    of_views = P(None, "view")
    return jax.shard_map(
        functools.partial(apply_unet, config, parts=Parts(view_axis="view")),
        mesh=mesh,
        in_specs=(P(), of_views, of_views, of_views),
        out_specs=of_views,
        check_vma=False,
    )


def compare_attention(tokens: int, repeats: int) -> dict[str, Any]:
    """Times self-attention of `tokens` tokens, 1 head of 64, against torch's SDPA."""
    import jax
    import torch
    import torch.nn.functional as F

    from see3d_jax.models.attention import attention

    q, k, v, d_out = np.random.default_rng(0).standard_normal((4, 1, tokens, 1, 64), np.float32)
    ours = jax.jit(attention)

    @jax.jit
    def our_step(q: jax.Array, k: jax.Array, v: jax.Array, d_out: jax.Array) -> tuple:
        return jax.vjp(attention, q, k, v)[1](d_out)

    # as torch's own users hold them: a view with heads first
    theirs = [torch.from_numpy(y).transpose(1, 2) for y in (q, k, v, d_out)]
    leaves = [y.clone().requires_grad_() for y in theirs[:3]]

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return F.scaled_dot_product_attention(*theirs[:3])

    def step() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(F.scaled_dot_product_attention(*leaves), leaves, theirs[3])

    arrays = [jax.device_put(y) for y in (q, k, v, d_out)]
    difference = float(np.abs(ours(*arrays[:3]) - forward().transpose(1, 2).numpy()).max())
    if not difference <= AGREEMENT:
        raise InputError(f"attention at {tokens} tokens differs from torch's by {difference:.1e}")
    name = f"attention {tokens}"
    return {
        "tokens": tokens,
        "difference": difference,
        "forward": race(f"{name} forward", lambda: ours(*arrays[:3]), forward, repeats),
        "step": race(f"{name} fwd+bwd", lambda: our_step(*arrays), step, repeats),
    }


def bf16_errors(config: Any, views: int, size: int) -> dict[str, float]:
    """Root mean square error of bf16 compute relative to the float32 result's deviation.

    One call of the UNet, and whole runs of the sampler with the official 53 calls (guidance 2) and
    10 second-order ones, on the same weights and noise. Weights are random: a trained network,
    whose runs contract towards images, has less room to drift.
    """
    import dataclasses

    import jax

    from see3d_jax.diffusion.sampler import SamplerConfig, sample
    from see3d_jax.diffusion.schedule import make_schedule
    from see3d_jax.models.weights import apply_unet

    (x, t, context), params = inputs_and_weights(config, views, size)
    params = jax.device_put(params)
    schedule = make_schedule(zero_snr=True)
    latents, mask = x[..., :4], (x[..., 8:] > 0).astype(np.float32)
    is_reference = (np.arange(views) < 1)[None]

    def outputs(dtype: str) -> dict[str, np.ndarray]:
        unet = dataclasses.replace(config, dtype=dtype)

        @functools.partial(jax.jit, static_argnums=0)
        def run(sampler: SamplerConfig, params: Any) -> jax.Array:
            denoise = lambda *inputs: apply_unet(unet, params, *inputs)  # noqa: E731
            inputs = (latents, mask, is_reference, context, jax.random.key(0))
            return sample(denoise, schedule, sampler, *inputs)[~is_reference]

        one = jax.jit(functools.partial(apply_unet, unet))(params, x, t, context)
        official = run(SamplerConfig(50, "official"), params)
        few = run(SamplerConfig(10, "quadratic", "dpmpp_2m"), params)
        found = {"one call": one, "53 official calls": official, "10 second-order calls": few}
        return {name: np.asarray(value, np.float64) for name, value in found.items()}

    exact, half = outputs("float32"), outputs("bfloat16")
    return {
        f"bf16 error, {name}": float(np.sqrt(np.mean((half[name] - y) ** 2)) / y.std())
        for name, y in exact.items()
    }


def race(
    name: str, ours: Callable[[], Any], theirs: Callable[[], Any], repeats: int
) -> dict[str, float]:
    """Medians of alternating runs after one unmeasured run each, and one line of report.

    A short run starts its turn with an unmeasured one: it finds the other side's data in the caches
    and the other side's threads on the cores, which a caller of only one of the two never does.
    """
    import jax

    sides = {"ours": lambda: jax.block_until_ready(ours()), "torch": theirs}
    taken: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    for run in sides.values():
        run()
    start = time.perf_counter()
    sides["ours"]()
    short = time.perf_counter() - start < SHORT
    for _ in range(repeats):
        for side, run in sides.items():
            if short:
                run()
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            taken[side].append((time.perf_counter() - wall, time.process_time() - cpu))
    result = {}
    for side, times in taken.items():
        result[f"{side}_s"], result[f"{side}_cpu_s"] = map(float, np.median(times, 0))
    result["ratio"] = result["ours_s"] / result["torch_s"]
    result["cpu_ratio"] = result["ours_cpu_s"] / result["torch_cpu_s"]
    result |= {f"{side}_extra_gib": _peak_rise(run) for side, run in sides.items()}
    result["memory_ratio"] = result["ours_extra_gib"] / max(result["torch_extra_gib"], 1e-9)
    click.echo(
        f"{name:26} ours {result['ours_s']:8.3f} s, torch {result['torch_s']:8.3f} s, "
        f"ratio {result['ratio']:5.2f} (CPU time {result['cpu_ratio']:.2f});  "
        f"extra memory {result['ours_extra_gib']:.3f} against "
        f"{result['torch_extra_gib']:.3f} GiB, ratio {result['memory_ratio']:5.2f}"
    )
    return result


def _peak_rise(run: Callable[[], Any]) -> float:
    """How far the resident set rises above its present size during a run, GiB."""
    import ctypes
    import gc

    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # give back what earlier runs only freed
        Path("/proc/self/clear_refs").write_text("5")  # forget the old peak
        before = _status("VmRSS")
        run()
        return (_status("VmHWM") - before) / 2**20
    except OSError:
        return float("nan")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def torch_layout(params: Any) -> dict[str, np.ndarray]:
    """Our parameter tree as {torch name: array in torch's layout}."""
    import jax

    def turn(x: np.ndarray) -> np.ndarray:
        return x.transpose(3, 2, 0, 1) if x.ndim == 4 else x.T

    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return {".".join(key.key for key in path): turn(np.asarray(leaf)) for path, leaf in leaves}


def main() -> None:
    """Entry point."""
    run_command(lambda: app(standalone_mode=False))


if __name__ == "__main__":
    main()
