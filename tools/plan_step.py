"""Compiles the training step of a configuration for devices that are not there, and measures it.

Nothing is allocated: state, batch and frozen networks are shapes with their placements, and the
step is the one that training runs. What comes out are facts of the compiled program: its memory,
what it sends (`plan_hlo`) and what it computes (`plan_jaxpr`).
"""

from __future__ import annotations

import dataclasses
import resource
import time
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from see3d_jax.errors import InputError
from see3d_jax.models.clip_vision import ClipVisionConfig
from see3d_jax.models.codec import Codec, DctCodec, VaeCodec
from see3d_jax.models.context import ImageContext
from see3d_jax.models.vae import VaeConfig
from see3d_jax.models.weights import abstract_clip_vision, abstract_unet, abstract_vae
from see3d_jax.training import settings
from see3d_jax.training.settings import TrainSpec
from see3d_jax.training.sharding import batch_shardings, state_shardings
from see3d_jax.training.state import Frozen, TrainState, init_state
from see3d_jax.training.step import make_optimizer, train_step
from tools.plan_cost import Problem, Work
from tools.plan_hlo import Collective, parse_collectives
from tools.plan_jaxpr import ExecutedFlops, executed_flops
from tools.plan_topology import GIB, Topology

# The default takes XLA's TPU backend a quarter of an hour; this one's memory figures are, where
# both were seen, somewhat higher.
_QUICK = {"exec_time_optimization_effort": -1.0}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Facts of a compiled training step, per device.

    Attributes:
      arguments, outputs, aliased, temporaries: bytes of memory; aliased ones count as both
        arguments and outputs, because the state is updated in place.
      peak: bytes alive at the worst moment.
      flops: executed FLOPs.
      hbm_bytes: bytes read and written outside of Pallas kernels, by XLA's own count; 0: it makes
        none (for GPUs that are not there).
      collectives: what is sent.
      unknown_loops: loops counted as one trip.
      cpu_seconds, wall_seconds: what tracing and compiling took.
      host_bytes: the largest resident set of this process so far.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    peak: int
    flops: ExecutedFlops
    hbm_bytes: float
    collectives: list[Collective]
    unknown_loops: int
    cpu_seconds: float
    wall_seconds: float
    host_bytes: int

    def work(self, problem: Problem, share: float) -> Work:
        """What the roofline needs; `share`: samples per device."""
        attention = self.flops.kernel or share * problem.attention_flops * 7 / 6
        return Work(
            flops=self.flops.total,
            attention_flops=attention,
            hbm_bytes=self.hbm_bytes,
            wire_bytes=sum(one.wire_bytes for one in self.collectives),
        )


def sample_problem(config: ml_collections.ConfigDict) -> Problem:
    """What one sample is. Raises InputError where the config does not fit together."""
    spec = settings.train_spec(config)
    side, rest = divmod(config.data.image_size, _codec_factor(config))
    if rest or side % spec.unet.stride:
        multiple = _codec_factor(config) * spec.unet.stride
        raise InputError(
            f"config.data.image_size: {config.data.image_size} is not a multiple of {multiple}"
        )
    return Problem(spec.unet, config.data.views, side, side, spec.context_tokens)


def compile_step(
    config: ml_collections.ConfigDict, topology: Topology, mesh: Mesh, rows: int, encoders: bool
) -> Compiled:
    """Traces and compiles `train_step`.

    Args:
      config: configuration of a run; its mesh and batch size are not looked at.
      topology: where the mesh's devices come from.
      mesh: see `sharding.device_mesh`.
      rows: samples per data × fsdp slot.
      encoders: whether the step encodes images with the autoencoder, as training does without
        prepared latents; else it starts from latents.

    Raises:
      InputError: the step does not fit the memory of the chip.
    """
    spec = settings.train_spec(config)
    slots = mesh.shape["data"] * mesh.shape["fsdp"]
    frozen, batch = _inputs(config, spec, rows * slots, encoders)
    whole = NamedSharding(mesh, P())
    arguments = (
        _placed(_abstract_state(spec), mesh),
        jax.tree.map(_with_sharding, batch, batch_shardings(batch, mesh)),
        _placed(frozen, mesh),
        _at(settings.noise_schedule(config), whole),
        _at(jax.eval_shape(lambda: jax.random.key(0)), whole),
    )
    start, cpu = time.perf_counter(), time.process_time()
    traced = train_step.trace(*arguments, spec=spec, mesh=mesh)
    flops = executed_flops(traced.jaxpr, mesh.size)
    options = _QUICK if topology.chip.dimensions else {}
    try:
        compiled = traced.lower().compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        sizes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
        raise InputError(
            f"the step does not fit {topology.name} with {sizes}: {_first_sentence(error)}; "
            "split it further (more fsdp or view)"
        ) from error
    memory, costs = compiled.memory_analysis(), compiled.cost_analysis()
    collectives, unknown = parse_collectives(compiled.as_text(), mesh.size)
    return Compiled(
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        peak=memory.peak_memory_in_bytes,
        flops=flops,
        hbm_bytes=float((costs or {}).get("bytes accessed", 0.0)),
        collectives=collectives,
        unknown_loops=unknown,
        cpu_seconds=time.process_time() - cpu,
        wall_seconds=time.perf_counter() - start,
        host_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def _abstract_state(spec: TrainSpec) -> TrainState:
    optimizer = make_optimizer(spec.optimizer)
    return jax.eval_shape(lambda p: init_state(p, optimizer), abstract_unet(spec.unet))


def _inputs(
    config: ml_collections.ConfigDict, spec: TrainSpec, rows: int, encoders: bool
) -> tuple[Frozen, dict[str, Any]]:
    """Frozen networks and a batch, as shapes."""
    size, views = config.data.image_size, config.data.views
    lead = (rows, views)
    batch = {
        "image": jax.ShapeDtypeStruct((*lead, size, size, 3), jnp.float32),
        "mask": jax.ShapeDtypeStruct((*lead, size, size, 1), jnp.float32),
        "is_reference": jax.ShapeDtypeStruct(lead, jnp.bool_),
        "frame": jax.ShapeDtypeStruct(lead, jnp.int32),
    }
    codec, context = _codec(config, spec, encoders), None
    if not encoders:
        side = size // codec.factor
        batch["latent"] = jax.ShapeDtypeStruct((*lead, side, side, codec.channels), jnp.float32)
    elif config.context.image:
        vision = ClipVisionConfig(dtype=config.context.dtype)
        text = jax.ShapeDtypeStruct((spec.context_tokens, spec.unet.context_dim), jnp.float32)
        context = ImageContext(text, abstract_clip_vision(vision), vision)
        pixels = (rows, vision.image_size, vision.image_size, vision.num_channels)
        batch["clip_pixels"] = jax.ShapeDtypeStruct(pixels, jnp.float32)
    return Frozen(codec, context), batch


def _codec(config: ml_collections.ConfigDict, spec: TrainSpec, encoders: bool) -> Codec:
    if encoders and config.codec.kind == "vae":
        vae = VaeConfig(**{k: v for k, v in config.codec.to_dict().items() if k != "kind"})
        return VaeCodec(abstract_vae(vae), vae)
    # Next to nothing to compute, and latents of the right shape.
    return DctCodec(_codec_factor(config), spec.unet.out_channels)


def _codec_factor(config: ml_collections.ConfigDict) -> int:
    return config.codec.factor if config.codec.kind == "dct" else VaeConfig().factor


def _placed(weights: Any, mesh: Mesh) -> Any:
    return jax.tree.map(_with_sharding, weights, state_shardings(weights, mesh))


def _at(tree: Any, sharding: NamedSharding) -> Any:
    return jax.tree.map(lambda leaf: _with_sharding(leaf, sharding), tree)


def _with_sharding(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _first_sentence(error: Exception) -> str:
    """What the compiler says of the memory, in bytes needed and there."""
    text = " ".join(str(error).split()).removeprefix("RESOURCE_EXHAUSTED: ")
    return text.partition(". ")[0][:240]


def gib(size: float) -> float:
    """Bytes in GiB, to three digits after the point."""
    return round(size / GIB, 3)
