"""From what a step does to how long it takes and what a training run costs; and which mesh is best.

A roofline: products at a share of the rate that the chip can reach on them, memory traffic at full
bandwidth and in the shadow of the products, and collectives at full bandwidth and in the shadow of
nothing. It is an estimate, made without a device; `Work` holds what it is made from. `predict`
guesses `Work` for a mesh without compiling, to say which meshes are worth it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from see3d_jax.models.unet import UNetConfig
from see3d_jax.models.weights import abstract_unet, parameter_count
from see3d_jax.training.flops import forward_flops, model_flops, peak_flops
from tools.plan_topology import Chip, Topology

# float32 parameters, their average and two Adam moments
STATE_BYTES = 16
# Temporaries of the compiled full network per view of 64×64 latents on one device, bytes, seen on
# v5e with 2 to 16 views per device; and those that do not depend on the views.
_VIEW_BYTES, _FIXED_BYTES = 0.16e9, 1.9e9


@dataclasses.dataclass(frozen=True)
class Problem:
    """What one sample is.

    Attributes:
      unet: architecture.
      views: views per sample.
      height, width: size of the latents.
      context_tokens: tokens of context per view.
    """

    unet: UNetConfig
    views: int
    height: int
    width: int
    context_tokens: int

    @property
    def model_flops(self) -> int:
        """FLOPs of a step per sample."""
        return model_flops(self.unet, *self._size)

    @property
    def attention_flops(self) -> int:
        """The part of it that is self-attention."""
        return 3 * forward_flops(self.unet, *self._size).self_attention

    @property
    def _size(self) -> tuple[int, int, int, int]:
        return self.views, self.height, self.width, self.context_tokens


@dataclasses.dataclass(frozen=True)
class Terms:
    """What a plan is made for, and under which assumptions.

    Attributes:
      topology: the machine.
      problem: one sample.
      image_size: its pixels along a side.
      rows: samples per data × fsdp slot.
      encoders: whether a step encodes images itself.
      utilisation: share of the reachable rate that products attain.
      price: US dollars per chip and hour.
    """

    topology: Topology
    problem: Problem
    image_size: int
    rows: int
    encoders: bool
    utilisation: float
    price: float

    def samples(self, mesh: dict[str, int]) -> int:
        """Samples per step."""
        return mesh["data"] * mesh["fsdp"] * self.rows

    def usd_per_sample(self, step_seconds: float, mesh: dict[str, int]) -> float:
        """What one sample costs if a step takes so long."""
        return step_seconds * self.topology.size * self.price / 3600 / self.samples(mesh)


@dataclasses.dataclass(frozen=True)
class Work:
    """What one device does in one step.

    Attributes:
      flops: executed FLOPs.
      attention_flops: those of them spent on self-attention.
      hbm_bytes: bytes read from and written to memory.
      wire_bytes: bytes sent to other devices.
    """

    flops: float
    attention_flops: float
    hbm_bytes: float
    wire_bytes: float


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds per step, by what takes them; see the module docstring."""

    compute: float
    hbm: float
    wire: float

    @property
    def step(self) -> float:
        """The whole step."""
        return max(self.compute, self.hbm) + self.wire


def step_times(work: Work, chip: Chip, utilisation: float) -> Times:
    """Times of one step; `utilisation`: share of the reachable rate that products attain."""
    peak = peak_flops(chip.device_kind)
    assert peak is not None, chip  # every chip of the table is known there
    dense = work.flops - work.attention_flops
    return Times(
        compute=(dense + work.attention_flops / chip.attention_share) / (peak * utilisation),
        hbm=work.hbm_bytes / chip.hbm_bandwidth,
        wire=work.wire_bytes / chip.wire_bandwidth,
    )


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage of the paper's training (512² images).

    Attributes:
      name: how the paper counts it.
      views: views per sample.
      batch: samples per step.
      steps: number of steps.
    """

    name: str
    views: int
    batch: int
    steps: int

    @property
    def samples(self) -> int:
        """Samples of the whole stage."""
        return self.batch * self.steps


# The super-resolution stage is missing because its number of steps was not published.
PAPER_STAGES = (Stage("1", 5, 560, 120_000), Stage("2", 16, 228, 200_000))


def stage_seconds(
    stage: Stage, problem: Problem, work: Work, slots: int, chip: Chip, utilisation: float
) -> float:
    """Seconds that a stage takes on the devices that do `work` on `slots` samples per step.

    Another number of views than the compiled one is scaled: products with the FLOPs of the model,
    memory traffic with the views, weights and gradients on the wire not at all.
    """
    other = dataclasses.replace(problem, views=stage.views)
    dense = (other.model_flops - other.attention_flops) / (
        problem.model_flops - problem.attention_flops
    )
    scaled = Work(
        flops=(work.flops - work.attention_flops) * dense
        + work.attention_flops * other.attention_flops / problem.attention_flops,
        attention_flops=work.attention_flops * other.attention_flops / problem.attention_flops,
        hbm_bytes=work.hbm_bytes * stage.views / problem.views,
        wire_bytes=work.wire_bytes,
    )
    return stage.samples / slots * step_times(scaled, chip, utilisation).step


def meshes(topology: Topology, views: int, batch: int) -> Iterator[dict[str, int]]:
    """Meshes without tensor parallelism that use every chip and no more slots than samples."""
    for view in _divisors(math.gcd(topology.size, views)):
        for fsdp in _divisors(topology.size // view):
            data = topology.size // view // fsdp
            if data * fsdp <= batch:
                yield {"data": data, "fsdp": fsdp, "view": view, "tensor": 1}


@dataclasses.dataclass(frozen=True)
class Guess:
    """A mesh with what it would take and cost, predicted without compiling."""

    mesh: dict[str, int]
    peak_bytes: float
    usd_per_sample: float


def ranked_meshes(terms: Terms, batch: int) -> list[Guess]:
    """Guesses for all sensible meshes, cheapest first; a step takes at most `batch` samples."""
    guesses = []
    for mesh in meshes(terms.topology, terms.problem.views, batch // terms.rows):
        work, peak = predict(terms, mesh)
        step = step_times(work, terms.topology.chip, terms.utilisation).step
        guesses.append(Guess(mesh, peak, terms.usd_per_sample(step, mesh)))
    return sorted(guesses, key=lambda guess: (guess.usd_per_sample, guess.peak_bytes))


def predict(terms: Terms, mesh: dict[str, int]) -> tuple[Work, float]:
    """Guesses the work of a device and its peak memory in bytes, without compiling.

    Weights are split over fsdp × view, gathered twice (forward and backward) and their gradients
    reduce-scattered, in bfloat16; keys and values are gathered over `view`.
    """
    problem, rows = terms.problem, terms.rows
    data, split, view = mesh["data"], mesh["fsdp"] * mesh["view"], mesh["view"]
    parameters = parameter_count(abstract_unet(problem.unet))
    weights = 2 * parameters
    local = rows * problem.views / view
    exchanged = rows * _key_value_bytes(problem)
    wire = 3 * weights * (split - 1) / split + 3 * exchanged * (view - 1) / view
    wire += 2 * weights / split * (data - 1) / data
    # One more forward pass of everything but attention for the recomputation; attention's backward
    # makes its logits again: 7 products instead of 6.
    attention = rows * problem.attention_flops / view * 7 / 6
    dense = rows * (problem.model_flops - problem.attention_flops) / view * 4 / 3
    pixels = problem.height * problem.width / 64**2 * problem.unet.model_channels / 320
    work = Work(dense + attention, attention, 2.5e9 + 9e9 * local * pixels, wire)
    peak = STATE_BYTES * parameters / split + _FIXED_BYTES + _VIEW_BYTES * local * pixels
    return work, peak


def _key_value_bytes(problem: Problem) -> int:
    """bfloat16 keys and values of all self-attentions of one sample."""
    unet, total = problem.unet, 0
    for level, multiple in enumerate(unet.channel_mult):
        tokens = problem.views * problem.height * problem.width // 4**level
        layers = (2 * unet.num_res_blocks + 1) * (2**level in unet.attention_strides)
        layers += level == len(unet.channel_mult) - 1  # the middle
        total += layers * 2 * 2 * tokens * multiple * unet.model_channels
    return total


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
