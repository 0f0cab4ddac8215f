"""What `tools.plan_aot` found about one mesh: as plain values for JSON, and as lines to read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from see3d_jax.training.flops import peak_flops
from tools import plan_cost
from tools.plan_cost import Terms
from tools.plan_hlo import Collective, totals
from tools.plan_step import Compiled, gib

# Where gathers come from, by the scope that the training step gives them.
PURPOSES = ("weights", "keys_and_values")


def report(terms: Terms, sizes: dict[str, int], compiled: Compiled) -> dict[str, Any]:
    """Everything found, as plain values; sizes in GiB, times in seconds."""
    chip, problem, size = terms.topology.chip, terms.problem, terms.topology.size
    samples = terms.samples(sizes)
    work = compiled.work(problem, samples / size)
    times = plan_cost.step_times(work, chip, terms.utilisation)
    model = problem.model_flops * samples / size
    tokens = problem.views * problem.height * problem.width
    usd = terms.usd_per_sample(times.step, sizes)
    return {
        "topology": terms.topology.name,
        "chips": size,
        "mesh": sizes,
        "views": problem.views,
        "image_size": terms.image_size,
        "encoders": terms.encoders,
        "samples_per_step": samples,
        "memory": _memory(compiled, chip.hbm_limit),
        "flops": {
            "executed": compiled.flops.total,
            "model": model,
            "ratio": compiled.flops.total / model,
            "convolution": compiled.flops.convolution,
            "matmul": compiled.flops.matmul,
            "kernel": compiled.flops.kernel,
        },
        "hbm_bytes": compiled.hbm_bytes,
        "wire_bytes": work.wire_bytes,
        "collectives": {
            name: {
                "operations": entry["operations"],
                "gib": gib(entry["bytes"]),
                "wire_gib": gib(entry["wire_bytes"]),
                "largest_mib": round(entry["largest"] / 2**20, 3),
            }
            for name, entry in totals(compiled.collectives).items()
        },
        "gathers": _gathers(compiled.collectives),
        "unknown_loops": compiled.unknown_loops,
        "time": {
            "utilisation": terms.utilisation,
            "compute": times.compute,
            "hbm": times.hbm,
            "wire": times.wire,
            "step": times.step,
            "samples_per_second": samples / times.step,
            "latent_tokens_per_second": samples * tokens / times.step,
            "mfu": model / times.step / peak_flops(chip.device_kind),
            "usd_per_sample": usd,
        },
        "plan": _plan(terms, compiled, samples),
        "price": terms.price,
        "compile": {
            "cpu_seconds": round(compiled.cpu_seconds, 1),
            "wall_seconds": round(compiled.wall_seconds, 1),
            "host_gib": gib(compiled.host_bytes),
        },
    }


def _memory(compiled: Compiled, limit: int) -> dict[str, Any]:
    # What XLA lays out; the TPU compiler refuses by itself what does not fit.
    laid_out = compiled.arguments + compiled.outputs - compiled.aliased + compiled.temporaries
    return {
        "arguments": gib(compiled.arguments),
        "temporaries": gib(compiled.temporaries),
        "peak": gib(compiled.peak),
        "limit": gib(limit),
        "fits": laid_out <= limit,
    }


def _gathers(collectives: list[Collective]) -> dict[str, Any]:
    """{purpose: {dtype: GiB}} of the all-gathers."""
    found: dict[str, dict[str, float]] = {}
    for one in collectives:
        if one.kind == "all-gather":
            words = re.split(r"[/()]", one.scope)  # "…/jvp(weights)/all_gather"
            purpose = next((p for p in PURPOSES if p in words), "other")
            entry = found.setdefault(purpose, {})
            entry[one.dtype] = entry.get(one.dtype, 0) + one.total_bytes
    return {
        purpose: {dtype: gib(size) for dtype, size in entry.items()}
        for purpose, entry in found.items()
    }


def _plan(terms: Terms, compiled: Compiled, samples: int) -> dict[str, Any]:
    chip, size = terms.topology.chip, terms.topology.size
    work = compiled.work(terms.problem, samples / size)
    stages = []
    for stage in plan_cost.PAPER_STAGES:
        days = (
            plan_cost.stage_seconds(stage, terms.problem, work, samples, chip, terms.utilisation)
            / 86400
        )
        stages.append(
            {
                "stage": stage.name,
                "views": stage.views,
                "samples": stage.samples,
                "days": days,
                "usd": days * 24 * size * terms.price,
            }
        )
    return {
        "stages": stages,
        "days": sum(stage["days"] for stage in stages),
        "usd": sum(stage["usd"] for stage in stages),
    }


def lines(found: dict[str, Any]) -> Iterator[str]:
    """A report to read."""
    axes = " ".join(f"{axis}={size}" for axis, size in found["mesh"].items())
    encoders = "" if found["encoders"] else ", from latents"
    yield (
        f"{found['topology']} ({found['chips']} chips), {axes}: {found['views']} views of "
        f"{found['image_size']}²{encoders}, {found['samples_per_step']} samples per step"
    )
    memory, flops, time = found["memory"], found["flops"], found["time"]
    yield (
        f"  memory per chip   arguments {memory['arguments']:.2f}, temporaries "
        f"{memory['temporaries']:.2f}, peak {memory['peak']:.2f} GiB of {memory['limit']:.2f}: "
        f"{'fits' if memory['fits'] else 'DOES NOT FIT'}"
    )
    yield (
        f"  FLOPs per chip    executed {flops['executed'] / 1e12:.1f} T, model "
        f"{flops['model'] / 1e12:.1f} T, ratio {flops['ratio']:.3f}"
    )
    for name, entry in found["collectives"].items():
        yield f"  {name:28} {entry['gib']:8.3f} GiB in {entry['operations']} operations"
    for purpose, entry in found["gathers"].items():
        parts = ", ".join(f"{size:.3f} GiB {dtype}" for dtype, size in entry.items())
        yield f"  gathers of {purpose}: {parts}"
    if found["unknown_loops"]:
        yield f"  {found['unknown_loops']} loops of unknown length are counted as one trip"
    traffic = f"{time['hbm']:.3f}" if found["hbm_bytes"] else "not told by XLA"
    yield (
        f"  estimated step    {time['step']:.3f} s (products {time['compute']:.3f}, memory "
        f"{traffic}, wire {time['wire']:.3f}), MFU {100 * time['mfu']:.1f} %"
    )
    yield (
        f"                    {time['samples_per_second']:.2f} samples/s, "
        f"{time['latent_tokens_per_second'] / 1e6:.2f} M latent tokens/s, "
        f"${1000 * time['usd_per_sample']:.3f} per 1000 samples at ${found['price']}/chip/h"
    )
    for stage in found["plan"]["stages"]:
        yield (
            f"  paper's stage {stage['stage']}   {stage['samples'] / 1e6:.1f} M samples of "
            f"{stage['views']} views: {stage['days']:.1f} days, ${stage['usd']:,.0f}"
        )
    yield f"  both stages       {found['plan']['days']:.1f} days, ${found['plan']['usd']:,.0f}"
    compiling = found["compile"]
    yield (
        f"  compiled in       {compiling['cpu_seconds']:.0f} CPU-s, "
        f"{compiling['host_gib']:.1f} GiB of this machine's memory"
    )
