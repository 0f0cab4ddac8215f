"""What a training run needs of a machine: compiles the whole step for it, without having one.

    python -m tools.plan_aot --config configs/webvi3d.py --topology v5e:8x8 --mesh data=8,fsdp=8

Prints, per chip, memory (fits or not), FLOPs and collectives of the compiled step, all read off the
compiled program, and from them estimates the time of a step and the cost of the paper's training.
The assumptions of the estimates are in docs/scaling.md. Topologies: v5e:AxB, v5p:AxBxC, v6e:AxB
(need libtpu: pip install '.[aot]') and h100:N (pip install '.[gpu]'). Any value of the config can
be overridden as in training, --config.data.views=16. Compiling takes minutes and about 5 GiB.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from see3d_jax.errors import InputError, run_command
from see3d_jax.files import write_json

if TYPE_CHECKING:
    import ml_collections

    from tools.plan_cost import Terms
    from tools.plan_topology import Topology

AXES = ("data", "fsdp", "view", "tensor")
# A page of the search is enough to see the trend.
SHOWN = 12
_M_ARENA_MAX = -8  # malloc.h


@click.command(
    context_settings={"ignore_unknown_options": True},
    epilog="""\b
Examples:
  python -m tools.plan_aot --config configs/webvi3d.py --topology v5e:8x8 \\
      --mesh data=8,fsdp=8 --config.data.views=16
  python -m tools.plan_aot --config configs/webvi3d.py --topology v5p:4x4x4 --search --price 2.1
""",
)
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED, metavar="--config FILE …")
@click.option("--topology", "name", required=True, help="The machine, e.g. v5e:8x8 or h100:8.")
@click.option("--mesh", default="", help="e.g. data=8,fsdp=8,view=1; default: all on fsdp.")
@click.option("--search", is_flag=True, help="Try meshes and name the cheapest that fits.")
@click.option("--tries", default=2, show_default=True, help="Meshes that --search compiles.")
@click.option("--rows", default=1, show_default=True, help="Samples per data × fsdp slot.")
@click.option("--latents", is_flag=True, help="Start from latents: leave the autoencoder out.")
@click.option("--utilisation", default=0.7, show_default=True, help="Share of the reachable rate.")
@click.option("--price", type=float, help="US dollars per chip and hour, instead of list prices.")
@click.option("--json", "output", type=click.Path(path_type=Path), help="Also write the numbers.")
def app(
    overrides: tuple[str, ...],
    name: str,
    mesh: str,
    search: bool,
    tries: int,
    rows: int,
    latents: bool,
    utilisation: float,
    price: float | None,
    output: Path | None,
) -> None:
    """Plans training with the config FILE (--config FILE, --config.key=value …)."""
    from see3d_jax.training.config_flags import parse_config
    from tools import plan_topology

    config = parse_config(["plan_aot", *overrides])
    topology = plan_topology.parse_topology(name)
    if min(rows, tries) < 1 or not 0 < utilisation <= 1:
        raise InputError("--rows and --tries must be at least 1, --utilisation in (0, 1]")
    if search and mesh:
        raise InputError("--search finds a mesh itself: leave --mesh out")
    sizes = parse_mesh(mesh, topology, config.data.views)
    # Before anything that imports jax: the compilers read their settings once.
    devices = plan_topology.devices(topology)
    from tools import plan_step
    from tools.plan_cost import Terms

    terms = Terms(
        topology=topology,
        problem=plan_step.sample_problem(config),
        image_size=config.data.image_size,
        rows=rows,
        encoders=not latents,
        utilisation=utilisation,
        price=topology.chip.price if price is None else price,
    )
    if search:
        report = find_mesh(config, terms, devices, tries)
    else:
        report = plan(config, terms, devices, sizes)
    if output is not None:
        write_json(output, report)


def parse_mesh(text: str, topology: Topology, views: int) -> dict[str, int]:
    """ "data=8,fsdp=8" → {"data": 8, "fsdp": 8, "view": 1, "tensor": 1}; empty: all on fsdp.

    Raises InputError for a mesh that does not fit the topology or the views.
    """
    if not text:
        return {"data": 1, "fsdp": topology.size, "view": 1, "tensor": 1}
    sizes = dict.fromkeys(AXES, 1)
    for part in text.split(","):
        axis, _, size = part.strip().partition("=")
        if axis not in sizes or not size.isdecimal() or int(size) < 1:
            raise InputError(f"--mesh {text!r}: expected {'=N,'.join(AXES)}=N, all optional")
        sizes[axis] = int(size)
    product = 1
    for size in sizes.values():
        product *= size
    if product != topology.size:
        raise InputError(
            f"--mesh {text!r}: its axes multiply to {product}, but {topology.name} has "
            f"{topology.size} chips"
        )
    if views % sizes["view"]:
        raise InputError(f"--mesh view={sizes['view']} does not divide config.data.views={views}")
    return sizes


def plan(
    config: ml_collections.ConfigDict, terms: Terms, devices: list[Any], sizes: dict[str, int]
) -> dict[str, Any]:
    """Compiles the step on a mesh, prints what it is and returns it as plain values."""
    from see3d_jax.training.sharding import device_mesh
    from tools import plan_report, plan_step

    mesh = device_mesh([sizes[axis] for axis in AXES], devices)
    compiled = plan_step.compile_step(config, terms.topology, mesh, terms.rows, terms.encoders)
    report = plan_report.report(terms, sizes, compiled)
    for line in plan_report.lines(report):
        click.echo(line)
    return report


def find_mesh(
    config: ml_collections.ConfigDict, terms: Terms, devices: list[Any], tries: int
) -> dict[str, Any]:
    """Ranks all meshes by a guess, compiles the best ones, returns the cheapest that fits.

    Compiles `tries` meshes, and more only as long as none has fitted.
    """
    from tools.plan_cost import ranked_meshes

    ranked = ranked_meshes(terms, config.batch_size)
    click.echo("meshes by predicted cost per 1000 samples (guesses; nothing is compiled yet):")
    for guess in ranked[:SHOWN]:
        click.echo(
            f"  {named(guess.mesh):36} ${1000 * guess.usd_per_sample:9.3f}, about "
            f"{guess.peak_bytes / 2**30:.1f} GiB"
        )
    reports: list[dict[str, Any]] = []
    compiled = 0
    for guess in ranked:
        if guess.peak_bytes > terms.topology.chip.hbm_limit:
            continue
        if compiled >= tries and reports:
            break
        compiled += 1
        try:
            report = plan(config, terms, devices, guess.mesh)
        except InputError as error:  # the guess of its memory was wrong
            click.echo(str(error))
            continue
        if report["memory"]["fits"]:
            reports.append(report)
    if not reports:
        raise InputError(
            f"no mesh of {terms.topology.name} fits {config.data.views} views of "
            f"{config.data.image_size}²; take a larger topology or fewer --rows"
        )
    best = min(reports, key=lambda report: report["time"]["usd_per_sample"])
    click.echo(f"cheapest of the {compiled} compiled: {named(best['mesh'])}")
    return best


def named(sizes: dict[str, int]) -> str:
    """A mesh as one would write it."""
    return ",".join(f"{axis}={size}" for axis, size in sizes.items())


def spare_memory() -> None:
    """Has the threads of this process share one heap, before there are any; with glibc only.

    Heaps of their own, which nothing gives back, made a compilation a quarter larger.
    """
    if sys.platform == "linux":
        options = getattr(ctypes.CDLL(None), "mallopt", None)
        if options is not None:
            options(_M_ARENA_MAX, 1)


def main() -> None:
    """Entry point."""
    spare_memory()
    run_command(lambda: app(standalone_mode=False))


if __name__ == "__main__":
    main()
