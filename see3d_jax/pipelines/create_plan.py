"""What `see3d create` is going to do, how long it takes here, and what would make it better.

Times and memory are estimates ("about"): work counted from the settings, divided by the speed of
the device as a matrix product measures it. The constants were fitted to runs on two CPU cores.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from see3d_jax.errors import InputError
from see3d_jax.models import origins
from see3d_jax.models.packed import is_packed
from see3d_jax.models.release import WEIGHTS, load_release, read_spec
from see3d_jax.models.unet import UNetConfig
from see3d_jax.models.weights import abstract_unet, apply_unet, parameter_count
from see3d_jax.pipelines.pretrained import (
    RELEASE_GUIDANCE,
    RELEASE_SIZE,
    RELEASE_STEPS,
    RELEASE_VIEWS,
    checkpoint_folder,
    released_unet,
)

_COMPILING = 20.0  # seconds on this host for each of the two programs
_NETWORK_SHARE = 0.35  # of the speed of a matrix product that the network reaches
_SIDE = 1024  # of the matrices that tell the speed
_BASE_MEMORY = 1.0  # GB: Python, JAX, compiled programs


@dataclasses.dataclass(frozen=True)
class Preset:
    """How much work to put in.

    Attributes:
      views: generated views; views_per_round: None, or so many build on those before.
      side: views are made at this many pixels squared, or the model's size if that is larger.
      steps, gaussians: of the fit.
    """

    views: int
    views_per_round: int | None
    side: int
    steps: int
    gaussians: int


PRESETS = {
    "draft": Preset(views=6, views_per_round=None, side=96, steps=300, gaussians=5_000),
    "normal": Preset(views=12, views_per_round=None, side=128, steps=1000, gaussians=12_000),
    "best": Preset(views=24, views_per_round=8, side=192, steps=3000, gaussians=30_000),
}
FIT_SIDE = 320  # pixels, the longer side of the photos in the fit


@dataclasses.dataclass(frozen=True)
class Network:
    """The model in a checkpoint as its configuration tells it, without reading the weights.

    Attributes:
      weights: file or folder that they are in; a run that goes on gets another.
      unet: architecture.
      factor: pixels to a latent, along a side.
      image_size, views: of a training example.
      calls: of the network, for a group of views.
    """

    weights: Path
    unet: UNetConfig
    factor: int
    image_size: int
    views: int
    calls: int

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return parameter_count(abstract_unet(self.unet))

    @property
    def max_references(self) -> int:
        """Photos that condition every group: at least one place is left for a new view."""
        return max(1, min(8, self.views - 1))


def read_network(checkpoint: Path | None, references: int, steps: int | None) -> Network:
    """InputError for a folder that holds no model, as `load_model` raises it."""
    folder = checkpoint_folder(checkpoint)
    if (folder / "release.json").is_file():
        release = load_release(folder)
        name = released_unet(release, references)
        if name not in release.unets:
            raise InputError(f"{folder}: holds no UNet")
        weights = folder / "unet" / name
        unet = read_spec("unet", weights / "config.json")
        calls = (steps or RELEASE_STEPS) * (1 + bool(RELEASE_GUIDANCE))
        return Network(weights, unet, 8, RELEASE_SIZE, RELEASE_VIEWS, calls)
    config = origins.read_config(folder)
    if is_packed(folder):
        weights = folder / WEIGHTS
    else:
        weights = folder / "checkpoints" / str(origins.complete_steps(folder)[-1])
    try:
        evaluation = config["evaluation"]
        return Network(
            weights,
            UNetConfig(**config["model"]),
            config["codec"].get("factor", 8),
            config["data"]["image_size"],
            config["data"]["views"],
            (steps or evaluation["sampler_steps"]) * (1 + bool(evaluation["guidance"])),
        )
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{folder / 'config.json'}: does not describe a model of this release ({error})"
        ) from error


@dataclasses.dataclass(frozen=True)
class Step:
    """One stage: its name, what it does, and about how many seconds it takes."""

    name: str
    what: str
    seconds: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """What will be done.

    Attributes:
      steps: in order.
      memory: GB that it takes at most, about; available: GB that the machine has.
      device: what it runs on.
      advice: what each missing optional part would add, and how to get it.
    """

    steps: tuple[Step, ...]
    memory: float
    available: float
    device: str
    advice: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """Of all steps."""
        return sum(step.seconds for step in self.steps)

    def text(self) -> str:
        """For people, some lines."""
        width = max(len(step.what) for step in self.steps)
        lines = [
            f"  {step.name:10s} {step.what:{width}s}  {duration(step.seconds)}"
            for step in self.steps
        ]
        total = (
            f"  on {self.device}: {duration(self.seconds)}, about {self.memory:.1f} GB of memory "
            f"({self.available:.0f} GB there)"
        )
        better = ["What would make it better:", *(f"  - {line}" for line in self.advice)]
        return "\n".join([*lines, total, *(better if self.advice else [])])


def make_plan(
    *, photos: int, posed: bool, depth: Path | None, checkpoint: Path | None, network: Network,
    preset: Preset, views: int, aspect: float = 4 / 3,
) -> Plan:  # fmt: skip
    """The plan of one run; `aspect` is width / height of the photos.

    On a second run finished stages cost nothing: the estimate is that of a first one.
    """
    speed, device = device_speed()
    host = host_speed() / 100e9  # 1 = the two cores it was fitted on
    steps = []
    if not posed and photos > 1:
        pairs = photos * (photos - 1) / 2
        what = f"cameras of {photos} photos by structure from motion"
        steps.append(Step("cameras", what, (8 + 2 * photos + 0.6 * pairs) / host))
    learned = depth is not None and depth.suffix.lower() == ".onnx"
    source = "the network" if learned else "the file" if depth else "what the photos have"
    if not depth and photos > 1:
        source = "stereo between the photos, where they have none"
    steps.append(Step("scene", f"depth from {source}", (4 + 5 * photos * (photos > 1)) / host))
    references = min(photos, network.max_references)
    side = max(preset.side, network.image_size)
    groups = -(-views // max(1, network.views - references))
    work = groups * network.calls * call_flops(network, side, references)
    seconds = _COMPILING / host + work / (speed * _NETWORK_SHARE) + 0.5 * views / host
    model = "the small model inside the package" if checkpoint is None else str(checkpoint)
    steps.append(Step("views", f"{views} new views by {model}", seconds))
    pixels = FIT_SIDE**2 / aspect
    per_step = (0.03 + 2.5e-7 * pixels + 3e-6 * preset.gaussians) / host
    what = f"{preset.gaussians:,} Gaussians in {preset.steps} steps"
    steps.append(Step("gaussians", what, _COMPILING / host + preset.steps * per_step))
    activations = 60 * network.views * (side / network.factor) ** 2 * network.unet.model_channels
    memory = _BASE_MEMORY + (4 * network.parameters + activations * 4) / 1e9
    memory = max(memory, 1.5 + 3e-5 * preset.gaussians)
    return Plan(
        tuple(steps), memory, _machine_memory(), device, _advice(photos, learned, checkpoint)
    )


def _advice(photos: int, learned: bool, checkpoint: Path | None) -> tuple[str, ...]:
    lines = []
    if photos > 1 and not learned:
        package = "" if importlib.util.find_spec("onnxruntime") else (
            "pip install 'see3d_jax[depth]', then "
        )  # fmt: skip
        lines.append(
            "a depth network: depth also where photos do not overlap (stereo leaves holes there); "
            f"{package}--depth MODEL.onnx, an export of Depth Anything V2, MoGe or Metric3D "
            "(docs/inputs.md)"
        )
    if checkpoint is None:
        lines.append(
            "released See3D weights: content in the holes instead of patches of colour; download "
            "See3D's folder, python -m tools.convert_see3d --input See3D --output weights/see3d, "
            "then --checkpoint weights/see3d (866 M weights: wants a GPU or TPU)"
        )
    if photos == 1:
        lines.append("more photos, taken from other places: less has to be made up")
    return tuple(lines)


@functools.lru_cache(maxsize=8)
def call_flops(network: Network, side: int, references: int) -> float:
    """Floating point operations of one call of the network for one group of views."""
    h = max(network.unet.stride, round(side / network.factor))
    h -= h % network.unet.stride
    views = max(network.views, references + 1)
    shapes = (
        (1, views, h, h, network.unet.in_channels), (1, views), (1, views, 1,
         network.unet.context_dim),
    )  # fmt: skip
    values = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    lowered = jax.jit(functools.partial(apply_unet, network.unet)).lower(
        abstract_unet(network.unet), *values
    )
    return float((lowered.cost_analysis() or {}).get("flops", 0.0))


@functools.cache
def device_speed() -> tuple[float, str]:
    """(float32 operations per second of a matrix product, name) of the first device."""
    device = jax.devices()[0]
    ones = jnp.ones((_SIDE, _SIDE), jnp.float32)
    product = jax.jit(lambda x: x @ x)
    product(ones).block_until_ready()
    name = device.device_kind
    if device.platform == "cpu":
        name = f"a CPU with {os.cpu_count()} cores"
    return _speed(lambda: product(ones).block_until_ready()), name


@functools.cache
def host_speed() -> float:
    """The same of this machine's processor, where matching, compiling and drawing happen."""
    ones = np.ones((_SIDE, _SIDE), np.float32)
    return _speed(lambda: ones @ ones)


def _speed(product: Callable[[], object]) -> float:
    return 2 * _SIDE**3 / min(_timed(product) for _ in range(5))


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _machine_memory() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


def duration(seconds: float) -> str:
    """In words, one digit or two: "about 40 s", "about 3 min", "about 2 h".

    >>> duration(42.0), duration(200.0), duration(9000.0)
    ('about 42 s', 'about 3 min', 'about 2.5 h')
    """
    if seconds < 90:
        return f"about {max(1, round(seconds))} s"
    if seconds < 5400:
        return f"about {round(seconds / 60)} min"
    return f"about {seconds / 3600:.1f} h"
