"""How fast Gaussian splatting is, against gsplat's torch reference and OpenSplat.

    python -m benchmarks.splatting [--points garden.npz] [--colmap DIR [--opensplat BINARY]]
    python -m benchmarks.splatting --points garden.npz --scaling scaling.png

Forward, and forward + backward to all parameters, for 10 k and 50 k Gaussians at 256² and 512²; and
one whole step of a fit. The scene is made as gsplat's tests make theirs: --points is its
assets/test_garden.npz (means3d, colors, viewmats, Ks, width, height), random scales below 0.02,
opacities in [0, 1]; without it, a random cloud. gsplat's path is `gsplat.cuda._torch_impl`:
projection, spherical harmonics and `accumulate`. Its CUDA-only parts are stood in for: the lists
of (Gaussian, pixel) pairs with alpha ≥ 1/255 are made beforehand and not timed, nerfacc's
weights along rays are a torch cumulative sum. Implementations take turns; medians of wall
milliseconds, and medians of CPU milliseconds (all threads). A ratio below 1 means ours is faster.

--scaling measures ours alone instead: forward + backward of 1 k to 500 k Gaussians at 256² and
512², and of 50 k Gaussians at 128² to 1024², each in a process of its own for its peak memory, and
plots all; and whole steps of a fit of 500 k Gaussians at 512² with their peak memory.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import multiprocessing
import resource
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import jax
import jax.numpy as jnp
import numpy as np

from see3d_jax.errors import InputError, WorkError, run_command
from see3d_jax.files import atomic_path, write_json
from see3d_jax.geometry.cameras import Camera, intrinsics_matrix, look_at, stack
from see3d_jax.pipelines import inputs
from see3d_jax.pipelines.reconstruct import reconstruct
from see3d_jax.splatting.binning import count_pairs
from see3d_jax.splatting.fit import FitConfig, TrainingViews, fit
from see3d_jax.splatting.gaussians import SH_C0, Gaussians
from see3d_jax.splatting.processor import COMPILER_OPTIONS, host_mesh, use_all_cores
from see3d_jax.splatting.projection import project_gaussians
from see3d_jax.splatting.render import enough_capacity, render, render_within

NUMBERS, SIDES, REPEATS, FIT_STEPS, TRAINING_STEPS = (10_000, 50_000), (256, 512), 7, 12, 300
SCALING_NUMBERS = (1_000, 5_000, 10_000, 50_000, 100_000, 500_000)  # at each of SIDES
SCALING_SIDES = (128, 256, 512, 1024)  # with NUMBERS[-1] Gaussians
SCALING_REPEATS, SCALING_FIT_STEPS = 5, 3
Call = Callable[[], Any]


@click.command(
    epilog="""\b
Examples:
  python -m benchmarks.splatting --json splatting.json
  python -m benchmarks.splatting --colmap photos/ --opensplat opensplat/build/opensplat
"""
)
@click.option("--points", type=click.Path(path_type=Path), help="gsplat's test_garden.npz.")
@click.option("--colmap", type=click.Path(path_type=Path), help="COLMAP folder for a whole fit.")
@click.option("--opensplat", type=click.Path(path_type=Path), help="OpenSplat's program.")
@click.option("--scaling", type=click.Path(path_type=Path), help="Plot of time against size.")
@click.option("--devices", type=int, help="Split the processor; by default one per core.")
@click.option("--json", "output", type=click.Path(path_type=Path), help="Also write the numbers.")
def app(
    points: Path | None,
    colmap: Path | None,
    opensplat: Path | None,
    scaling: Path | None,
    devices: int | None,
    output: Path | None,
) -> None:
    """Prints times and ratios."""
    if opensplat is not None and colmap is None:
        raise InputError("--opensplat needs --colmap: both train on the same folder")
    if devices is not None and devices < 1:
        raise InputError(f"--devices must be at least 1, got {devices}")
    use_all_cores(devices)
    if scaling is not None:
        measured = measure_scaling(points)
        plot_scaling(measured, scaling)
        if output is not None:
            write_json(output, measured)
        return
    numbers: dict[str, Any] = {"devices": jax.device_count(), "torch_note": _missing()}
    for count in NUMBERS:
        for side in SIDES:
            scene, camera = load_scene(points, count, side)
            numbers |= {f"{count}_{side}_{k}": v for k, v in kernels(scene, camera).items()}
    scene, camera = load_scene(points, NUMBERS[-1], SIDES[-1])
    numbers["fit_step_ms"] = fit_step(scene, camera)
    if colmap is not None:
        numbers |= training(colmap, opensplat)
    for name, value in numbers.items():
        click.echo(f"{name:36} {round(value, 3) if isinstance(value, float) else value}")
    if output is not None:
        write_json(output, numbers)


def load_scene(points: Path | None, count: int, side: int) -> tuple[Gaussians, Camera]:
    """`count` Gaussians as gsplat's tests make them, and a square camera."""
    rng = np.random.default_rng(0)
    if points is None:
        means = rng.uniform(-2, 2, (count, 3))
        colors = rng.uniform(size=(count, 3))
        eye = look_at((0, 0, -4), (0, 0, 0))
        camera = Camera(
            intrinsics_matrix(0.8 * side, 0.8 * side, side / 2, side / 2), eye, side, side
        )
    else:
        try:
            data = np.load(points)
            means, colors = data["means3d"], data["colors"] / 255.0
            size = int(data["width"]), int(data["height"])
            pose, k = (np.float32(data[name][0]) for name in ("viewmats", "Ks"))
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{points}: not gsplat's test_garden.npz ({error})") from None
        camera = Camera(k, pose, *size).resized(side, side)
        near = np.flatnonzero((np.abs(means) < 2).all(1))
        chosen = rng.choice(near, count, replace=count > len(near))
        means, colors = means[chosen], colors[chosen]
    sh = np.zeros((count, 16, 3))
    sh[:, 0] = (colors - 0.5) / SH_C0
    opacities = rng.uniform(0.001, 0.999, count)
    leaves = (
        means, np.log(rng.uniform(1e-6, 0.02, (count, 3))), rng.normal(size=(count, 4)),
        np.log(opacities / (1 - opacities)), sh,
    )  # fmt: skip
    return Gaussians(*(jnp.asarray(x, jnp.float32) for x in leaves)), jax.tree.map(
        jnp.asarray, camera
    )


def kernels(scene: Gaussians, camera: Camera) -> dict[str, float | None]:
    """Times of forward and of forward + backward, ours and gsplat's."""
    forward, both, weights = programs(scene, camera)
    calls: dict[str, Call] = {
        "forward": partial(_finish, forward, scene),
        "backward": partial(_finish, both, scene),
    }
    if not _missing():
        theirs = GsplatSide(scene, camera, np.asarray(weights))
        calls |= {"gsplat_forward": theirs.forward, "gsplat_backward": theirs.backward}
    wall, cpu = take_turns(calls)
    numbers: dict[str, float | None] = {}
    for part in ("forward", "backward"):
        numbers[f"{part}_ms"], numbers[f"{part}_cpu_ms"] = wall[part], cpu[part]
        peer = wall.get(f"gsplat_{part}")
        numbers[f"gsplat_{part}_ms"] = peer
        numbers[f"{part}_ratio_vs_gsplat"] = None if peer is None else wall[part] / peer
    return numbers


def programs(scene: Gaussians, camera: Camera) -> tuple[Callable, Callable, jax.Array]:
    """Compiled forward, and forward + backward of Σ weights · image; the weights [H, W, 3]."""
    mesh = host_mesh()
    needed = count_pairs(
        jax.jit(project_gaussians)(scene, camera),
        camera.width, camera.height, mesh.size if mesh else 1,
    )  # fmt: skip
    capacity = enough_capacity(int(needed))
    weights = np.random.default_rng(1).normal(size=(camera.height, camera.width, 3))
    weights = jnp.asarray(weights, jnp.float32)

    def forward(scene: Gaussians) -> jax.Array:
        return render_within(scene, camera, capacity, mesh=mesh).rgb

    # The weights are an argument: XLA would spend seconds on folding such a large constant.
    @partial(jax.jit, compiler_options=COMPILER_OPTIONS)
    @jax.value_and_grad
    def both(scene: Gaussians, weights: jax.Array) -> jax.Array:
        return (forward(scene) * weights).sum()

    return (
        jax.jit(forward, compiler_options=COMPILER_OPTIONS),
        partial(both, weights=weights),
        weights,
    )


def _finish(program: Callable, scene: Gaussians) -> Any:
    return jax.block_until_ready(program(scene))


def measure_scaling(points: Path | None) -> list[dict[str, float]]:
    """Forward + backward for each size, and a fit of the largest, each in its own process."""
    sizes = [(count, side) for side in SIDES for count in SCALING_NUMBERS]
    sizes += [(NUMBERS[-1], side) for side in SCALING_SIDES if side not in SIDES]
    tasks = [(measure_size, size) for size in sizes]
    tasks.append((measure_fit, (SCALING_NUMBERS[-1], SIDES[-1])))
    rows = []
    for measure, size in tasks:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rows.append(pool.apply(measure, (points, *size)))
        click.echo("  ".join(f"{name} {value:g}" for name, value in rows[-1].items()))
    return rows


def measure_size(points: Path | None, count: int, side: int) -> dict[str, float]:
    """Time of forward + backward, of the first call, and the process's peak memory."""
    scene, camera = load_scene(points, count, side)
    both = programs(scene, camera)[1]
    began = time.process_time()
    _finish(both, scene)
    first = time.process_time() - began
    wall, cpu = take_turns({"both": partial(_finish, both, scene)}, SCALING_REPEATS)
    return {
        "gaussians": count, "side": side, "wall_ms": wall["both"], "cpu_ms": cpu["both"],
        "first_call_cpu_seconds": first, "peak_gib": _peak_gib(),
    }  # fmt: skip


def measure_fit(points: Path | None, count: int, side: int) -> dict[str, float]:
    """Time of a whole step of a fit, and the process's peak memory."""
    step = fit_step(*load_scene(points, count, side), SCALING_FIT_STEPS)
    return {"gaussians": count, "side": side, "fit_step_ms": step, "fit_peak_gib": _peak_gib()}


def _peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def plot_scaling(rows: list[dict[str, float]], path: Path) -> None:
    """Time against Gaussians and against pixels, and memory, on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    rows = [row for row in rows if "cpu_ms" in row]
    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.4), constrained_layout=True)
    by_count = {side: [row for row in rows if row["side"] == side] for side in SIDES}
    by_side = sorted((r for r in rows if r["gaussians"] == NUMBERS[-1]), key=lambda r: r["side"])
    for side, color in zip(SIDES, ("#ea580c", "#2563eb"), strict=True):
        above = side == SIDES[-1]
        _curve(axes[0], by_count[side], "gaussians", "cpu_ms", f"{side}²", color, above)
    pixels = [row | {"pixels": row["side"] ** 2} for row in by_side]
    _curve(axes[1], pixels, "pixels", "cpu_ms", f"{NUMBERS[-1]:,} Gaussians", "#2563eb", True)
    largest = by_count[SIDES[-1]]
    _curve(axes[2], largest, "gaussians", "peak_gib", f"{SIDES[-1]}²", "#2563eb", True)
    axes[0].set(xlabel="Gaussians", ylabel="CPU ms")
    axes[1].set(xlabel="pixels", ylabel="CPU ms")
    axes[2].set(xlabel="Gaussians", ylabel="peak memory, GiB", yscale="linear", ylim=(0, None))
    for axis in axes:
        axis.margins(0.12, 0.2)
        axis.grid(True, which="major", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
        axis.yaxis.set_minor_formatter(ticker.NullFormatter())
    figure.suptitle("Forward + backward of the renderer")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=80)


def _curve(
    axis: Any, rows: list[dict], across: str, up: str, label: str, color: str, above: bool
) -> None:
    """One curve on logarithmic axes with its values beside the points."""
    places = [(row[across], row[up]) for row in rows]
    axis.loglog(*zip(*places, strict=True), "o-", color=color, label=label, markersize=4)
    for place in places:
        text = f"{place[1]:,.0f}" if place[1] >= 10 else f"{place[1]:.2g}"
        axis.annotate(
            text, place, textcoords="offset points", xytext=(0, 6 if above else -13),
            ha="center", fontsize=8, color=color,
        )  # fmt: skip


def take_turns(
    calls: dict[str, Call], repeats: int = REPEATS
) -> tuple[dict[str, float], dict[str, float]]:
    """Median wall and CPU milliseconds of each call; the first turn compiles and is dropped."""
    wall, cpu = ({name: [] for name in calls} for _ in range(2))
    for turn in range(repeats + 1):
        for name, call in calls.items():
            began, busy = time.perf_counter(), time.process_time()
            call()
            if turn:
                wall[name].append(1e3 * (time.perf_counter() - began))
                cpu[name].append(1e3 * (time.process_time() - busy))
    wall, cpu = ({k: float(np.median(v)) for k, v in times.items()} for times in (wall, cpu))
    return wall, cpu


def fit_step(scene: Gaussians, camera: Camera, steps: int = FIT_STEPS) -> float:
    """Median milliseconds of a whole step: render, loss with SSIM, gradient, Adam."""
    image = np.clip(np.asarray(render(scene, camera).rgb) * 255, 0, 255).astype(np.uint8)
    views = TrainingViews(np.stack([image] * 2), stack([camera] * 2))
    config = FitConfig(steps=steps)
    result = fit(views, scene, 4.0, config, progress=False, mesh=host_mesh())
    return 1e3 * result.step_seconds


def training(colmap: Path, opensplat: Path | None) -> dict[str, Any]:
    """A short training of each on one folder: milliseconds per step and seconds of the whole run.

    Both draw full-size photos with as many Gaussians as the folder has points: OpenSplat adds none
    before step 500, ours has all of them after two fifths of the steps. By itself OpenSplat
    would begin with a sixteenth of the pixels, for longer than this.
    """
    scene = inputs.load_scene(colmap)
    if scene.points is None:
        raise InputError(f"{colmap}: has no sparse points, and OpenSplat starts from them")
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        metrics = reconstruct(
            colmap, Path(folder) / "ours", steps=TRAINING_STEPS, max_size=10_000,
            num_gaussians=len(scene.points[0]), sh_degree=3, orbit_frames=1, progress=False,
            mesh=host_mesh(),
        )  # fmt: skip
        numbers = {
            "training_seconds": time.perf_counter() - began, "training_psnr": metrics["psnr"],
            "training_step_ms": metrics["milliseconds_per_step"],
        }  # fmt: skip
        if opensplat is not None:
            command = [str(opensplat), str(colmap), "-n", str(TRAINING_STEPS)]
            command += ["--num-downscales", "0", "--sh-degree", "3", "--cpu"]
            began = time.perf_counter()
            moments = opensplat_steps([*command, "-o", f"{folder}/theirs.ply"])
            numbers["opensplat_seconds"] = time.perf_counter() - began
            numbers["opensplat_step_ms"] = 1e3 * float(np.median(np.diff(moments)))
            for part in ("step_ms", "seconds"):
                ratio = numbers[f"training_{part}"] / numbers[f"opensplat_{part}"]
                numbers[f"training_{part}_ratio_vs_opensplat"] = ratio
    return numbers


def opensplat_steps(command: list[str]) -> list[float]:
    """Runs OpenSplat, which tells of every step on a processor; seconds at which it did."""
    try:
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            lines = process.stdout or ()
            moments = [time.perf_counter() for line in lines if line.startswith("Step ")]
    except OSError as error:
        raise WorkError(f"{command[0]}: {error}") from None
    if process.returncode or len(moments) < 2:
        raise WorkError(f"{command[0]}: ended with code {process.returncode}")
    return moments


def _missing() -> str:
    absent = [name for name in ("torch", "gsplat") if importlib.util.find_spec(name) is None]
    return f"{' and '.join(absent)} not installed here" if absent else ""


class GsplatSide:
    """gsplat's torch reference on the same scene; `forward` and `backward` return the image."""

    def __init__(self, scene: Gaussians, camera: Camera, weights: np.ndarray) -> None:
        import torch

        # `accumulate` imports these two by name; nerfacc itself is CUDA code.
        sys.modules["nerfacc"] = types.SimpleNamespace(
            render_weight_from_alpha=_ray_weights, accumulate_along_rays=_ray_sums
        )
        from gsplat.cuda import _torch_impl

        self._impl, self._weights = _torch_impl, torch.tensor(weights)
        leaves = dataclasses.asdict(scene)
        self._leaves = {k: torch.tensor(np.asarray(v)).requires_grad_() for k, v in leaves.items()}
        self._size = camera.width, camera.height
        self._pose = torch.tensor(np.asarray(camera.world_to_camera))[None]
        self._k = torch.tensor(np.asarray(camera.intrinsics))[None]
        self._position = torch.tensor(np.asarray(camera.position))
        self._pairs = [torch.tensor(x) for x in _pixel_pairs(scene, camera)]

    def forward(self) -> Any:
        """Image [H, W, 3]."""
        import torch

        p, (width, height) = self._leaves, self._size
        covariance, _ = self._impl._quat_scale_to_covar_preci(
            p["quaternions"], p["log_scales"].exp(), compute_preci=False
        )
        _, means, _, conics, _ = self._impl._fully_fused_projection(
            p["means"], covariance, self._pose, self._k, width, height
        )
        colors = self._impl._spherical_harmonics(3, p["means"] - self._position, p["sh"])
        colors = torch.clamp_min(colors + 0.5, 0.0)
        gaussian, pixel = self._pairs
        image, _ = self._impl.accumulate(
            means, conics, torch.sigmoid(p["opacity_logits"])[None], colors[None],
            gaussian, pixel, torch.zeros_like(pixel), width, height,
        )  # fmt: skip
        return image[0]

    def backward(self) -> Any:
        """Image, with the gradients of all parameters computed."""
        for leaf in self._leaves.values():
            leaf.grad = None
        image = self.forward()
        (image * self._weights).sum().backward()
        return image


def _pixel_pairs(scene: Gaussians, camera: Camera) -> tuple[np.ndarray, np.ndarray]:
    """Gaussian and pixel [M] int64 of every pair with alpha ≥ 1/255: by pixel, front to back."""
    projected = jax.tree.map(np.asarray, jax.jit(project_gaussians)(scene, camera))
    (x, y), (wide, high) = projected.means, projected.extents
    opacity, (l11, l21, l22) = projected.opacities, projected.cholesky
    pairs = []
    for i in np.argsort(projected.depths, kind="stable"):
        if wide[i] <= 0:
            continue
        left, top = max(0, int(x[i] - wide[i])), max(0, int(y[i] - high[i]))
        right = min(camera.width, int(x[i] + wide[i]) + 1)
        bottom = min(camera.height, int(y[i] + high[i]) + 1)
        dx = np.arange(left, right) + 0.5 - x[i]
        dy = (np.arange(top, bottom) + 0.5 - y[i])[:, None]
        power = (l11[i] * dx + l21[i] * dy) ** 2 + (l22[i] * dy) ** 2
        rows, columns = np.nonzero(opacity[i] * np.exp(-0.5 * power) >= 1 / 255)
        pixel = (rows + top) * camera.width + columns + left
        pairs.append((np.full(len(pixel), i), pixel))
    gaussian, pixel = (np.concatenate(x) for x in zip(*pairs, strict=True))
    order = np.argsort(pixel, kind="stable")
    return gaussian[order].astype(np.int64), pixel[order].astype(np.int64)


def _ray_weights(alphas: Any, ray_indices: Any, n_rays: int) -> tuple[Any, Any]:
    """Weight and transmittance of samples sorted by ray."""
    import torch

    # In float64: one running sum over all rays, of which every ray takes away its start.
    logs = torch.log1p(-alphas.double())
    before = torch.cumsum(logs, 0) - logs
    first = torch.searchsorted(ray_indices, torch.arange(n_rays))
    transmittance = torch.exp(before - before[first.clamp(max=len(before) - 1)][ray_indices])
    transmittance = transmittance.to(alphas.dtype)
    return alphas * transmittance, transmittance


def _ray_sums(weights: Any, values: Any, ray_indices: Any, n_rays: int) -> Any:
    """Σ weight · value per ray, [n_rays, C]."""
    import torch

    samples = weights[:, None] if values is None else weights[:, None] * values
    return torch.zeros(n_rays, samples.shape[1]).index_add(0, ray_indices, samples)


if __name__ == "__main__":
    run_command(app)
