"""Writes the plans that `tools.plan_aot --json` saved into docs/scaling.md, as tables.

    python -m tools.plan_table docs/scaling/*.json --markdown docs/scaling.md

One row per file, in the order given. Without --markdown the tables are printed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click

from see3d_jax.errors import InputError, run_command
from see3d_jax.files import write_text
from see3d_jax.training.flops import peak_flops
from tools.plan_topology import CHIPS, GIB, Chip

MARKERS = ("<!-- made by tools.plan_table: begin -->", "<!-- made by tools.plan_table: end -->")
Plan = dict[str, Any]


@click.command(
    epilog="""\b
Examples:
  python -m tools.plan_aot --config configs/webvi3d.py --topology v5e:8x8 --json v5e-64.json
  python -m tools.plan_table v5e-64.json
"""
)
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--markdown", type=click.Path(path_type=Path), help="Refresh the tables of a page.")
def app(files: tuple[Path, ...], markdown: Path | None) -> None:
    """Tables of the plans in FILES."""
    text = tables([read_plan(file) for file in files])
    if markdown is None:
        click.echo(text)
        return
    page = markdown.read_text(encoding="utf-8") if markdown.is_file() else ""
    if any(page.count(marker) != 1 for marker in MARKERS):
        raise InputError(
            f"{markdown}: has no place for the tables; add the lines {' and '.join(MARKERS)}"
        )
    before, after = page.split(MARKERS[0])[0], page.split(MARKERS[1])[1]
    write_text(markdown, f"{before}{MARKERS[0]}\n{text}{MARKERS[1]}{after}")


def read_plan(file: Path) -> Plan:
    """Raises InputError for a file that `tools.plan_aot` did not write."""
    try:
        plan = json.loads(file.read_text(encoding="utf-8"))
        _row(plan, {**MACHINE_COLUMNS, **CHIP_COLUMNS, **COMPILE_COLUMNS})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: not a plan of tools.plan_aot ({error})") from error
    return plan


def tables(plans: list[Plan]) -> str:
    """All tables, in Markdown."""
    parts = (
        ("What a machine does", MACHINE_COLUMNS),
        ("What a chip computes, stores and sends in a step", CHIP_COLUMNS),
        ("What compiling took here, and the command", COMPILE_COLUMNS),
    )
    found = [f"### {title}\n\n{_table(plans, columns)}" for title, columns in parts]
    return "\n".join(
        [*found, f"### What is assumed of a chip\n\n{_table(CHIPS.values(), ASSUMED)}"]
    )


def _mesh(plan: Plan) -> str:
    sizes = [f"{axis} {size}" for axis, size in plan["mesh"].items() if size > 1]
    return ", ".join(sizes) or "1 chip"


def _peak(plan: Plan) -> str:
    memory = plan["memory"]
    fits = "fits" if memory["fits"] else "**does not fit**"
    return f"{memory['peak']:.2f} of {memory['limit']:.2f}, {fits}"


def _sent(*kinds: str) -> Callable[[Plan], str]:
    def total(plan: Plan) -> str:
        found = plan["collectives"].items()
        return f"{sum(c['gib'] for name, c in found if name.split()[0] in kinds):.3f}"

    return total


def _gathered(purpose: str) -> Callable[[Plan], str]:
    def total(plan: Plan) -> str:
        sizes = plan["gathers"].get(purpose, {})
        return ", ".join(f"{size:.2f} {dtype}" for dtype, size in sizes.items()) or "–"

    return total


def _command(plan: Plan) -> str:
    axes = ",".join(f"{axis}={size}" for axis, size in plan["mesh"].items() if axis != "tensor")
    latents = "" if plan["encoders"] else " --latents"
    return f"`--topology {plan['topology']} --mesh {axes}{latents}`"


_WHO = {"chips": lambda p: p["topology"], "mesh": _mesh, "views": lambda p: str(p["views"])}
MACHINE_COLUMNS: dict[str, Callable[[Plan], str]] = {
    **_WHO,
    "samples per step": lambda p: str(p["samples_per_step"]),
    "peak memory, GiB": _peak,
    "step, s": lambda p: f"{p['time']['step']:.2f}",
    "samples/s": lambda p: f"{p['time']['samples_per_second']:.1f}",
    "latent tokens/s": lambda p: f"{p['time']['latent_tokens_per_second'] / 1e6:.2f} M",
    "MFU": lambda p: f"{100 * p['time']['mfu']:.0f} %",
    "paper's stages 1 + 2": lambda p: f"{p['plan']['days']:.1f} days",
    "at $/chip/h": lambda p: f"{p['price']:.2f}",
    "cost": lambda p: f"${p['plan']['usd'] / 1000:,.0f} k",
}
CHIP_COLUMNS: dict[str, Callable[[Plan], str]] = {
    **_WHO,
    "FLOPs, T": lambda p: f"{p['flops']['executed'] / 1e12:.2f}",
    "executed / model": lambda p: f"{p['flops']['ratio']:.3f}",
    "memory traffic, GB": lambda p: f"{p['hbm_bytes'] / 1e9:.1f}" if p["hbm_bytes"] else "–",
    "state + batch, GiB": lambda p: f"{p['memory']['arguments']:.2f}",
    "temporaries, GiB": lambda p: f"{p['memory']['temporaries']:.2f}",
    "weights gathered, GiB": _gathered("weights"),
    "keys and values gathered": _gathered("keys_and_values"),
    "reduce-scatter, GiB": _sent("reduce-scatter"),
    "all-reduce, GiB": _sent("all-reduce"),
    "permute, all-to-all": _sent("collective-permute", "all-to-all"),
    "sent in all, GiB": lambda p: f"{p['wire_bytes'] / 2**30:.2f}",
}
COMPILE_COLUMNS: dict[str, Callable[[Plan], str]] = {
    **_WHO,
    "CPU seconds": lambda p: f"{p['compile']['cpu_seconds']:.0f}",
    "host memory, GiB": lambda p: f"{p['compile']['host_gib']:.1f}",
    "python -m tools.plan_aot --config configs/webvi3d.py …": _command,
}


ASSUMED: dict[str, Callable[[Chip], str]] = {
    "chip": lambda c: c.name,
    "bfloat16 peak, TFLOP/s": lambda c: f"{peak_flops(c.device_kind) / 1e12:.0f}",
    "usable memory, GiB": lambda c: f"{c.hbm_limit / GIB:.2f}",
    "memory, GB/s": lambda c: f"{c.hbm_bandwidth / 1e9:.0f}",
    "one ring, GB/s": lambda c: f"{c.wire_bandwidth / 1e9:.0f}",
    "attention reaches at most": lambda c: f"{100 * c.attention_share:.0f} % of the peak",
    "$/chip/h": lambda c: f"{c.price:.2f}",
}


def _row(plan: Any, columns: dict[str, Callable[[Any], str]]) -> str:
    return "| " + " | ".join(column(plan) for column in columns.values()) + " |"


def _table(plans: Iterable[Any], columns: dict[str, Callable[[Any], str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + [_row(plan, columns) for plan in plans]) + "\n"


def main() -> None:
    """Entry point."""
    run_command(lambda: app(standalone_mode=False))


if __name__ == "__main__":
    main()
