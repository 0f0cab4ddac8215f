"""Planning without a device: what is refused and how, and that the estimates add up."""

from __future__ import annotations

import dataclasses
import json

import pytest

from see3d_jax.errors import InputError
from see3d_jax.models.unet import UNetConfig
from tools import plan_aot, plan_cost, plan_table, plan_topology
from tools.plan_cost import PAPER_STAGES, Problem, Terms, Work, predict, ranked_meshes, step_times
from tools.plan_hlo import Collective
from tools.plan_jaxpr import ExecutedFlops
from tools.plan_report import lines, report
from tools.plan_step import Compiled
from tools.plan_topology import CHIPS, GIB, parse_topology

CONFIG = ["--config", "configs/webvi3d.py"]
PROBLEM = Problem(UNetConfig(), views=16, height=64, width=64, context_tokens=77)


def terms(topology="v5e:8x8", **changes):
    made = Terms(
        parse_topology(topology), PROBLEM, image_size=512, rows=1, encoders=False,
        utilisation=0.5, price=2.0,
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


def mesh(data=1, fsdp=1, view=1):
    return {"data": data, "fsdp": fsdp, "view": view, "tensor": 1}


@pytest.mark.parametrize(
    "name, shape", [("v5e:8x8", (8, 8)), ("v5p:4x4x8", (4, 4, 8)), ("h100:16", (16,))]
)
def test_a_topology_is_a_chip_and_an_arrangement(name, shape):
    topology = parse_topology(name)
    assert (topology.shape, topology.chip.name) == (shape, name.partition(":")[0])


@pytest.mark.parametrize("name", ["v9:8x8", "v5e", "v5e:8", "v5p:4x4", "v5e:0x4", "h100:12", "x"])
def test_what_is_no_topology_is_refused_with_its_name(name):
    with pytest.raises(InputError, match=f"--topology '{name}'"):
        parse_topology(name)


@pytest.mark.parametrize(
    "text, message",
    [
        ("data=8,fsdp=4", r"multiply to 32, but v5e:8x8 has 64"),
        ("fsdp=4,view=16", None),
        ("fsdp=2,view=32", r"view=32 does not divide config.data.views=16"),
        ("rows=64", r"expected data=N,fsdp=N"),
        ("fsdp=-1", r"expected data=N,fsdp=N"),
    ],
)
def test_a_mesh_must_use_every_chip_and_divide_the_views(text, message):
    topology = parse_topology("v5e:8x8")
    if message is None:
        assert plan_aot.parse_mesh(text, topology, 16) == mesh(fsdp=4, view=16)
    else:
        with pytest.raises(InputError, match=message):
            plan_aot.parse_mesh(text, topology, 16)
    assert plan_aot.parse_mesh("", topology, 16) == mesh(fsdp=64)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([*CONFIG, "--topology", "v5e:8x8", "--config.data.wievs=16"], r"--config\.data\.wievs"),
        ([*CONFIG, "--topology", "v5e:8x8", "--serach"], r"unknown flag --serach"),
        (["--topology", "v5e:8x8"], r"--config is missing"),
        ([*CONFIG, "--topology", "v5e:8x8", "--utilisation", "2"], r"--utilisation"),
        ([*CONFIG, "--topology", "v5e:8x8", "--search", "--mesh", "fsdp=64"], r"leave --mesh out"),
    ],
)
def test_the_command_line_says_what_is_wrong(arguments, message):
    with pytest.raises(InputError, match=message):
        plan_aot.app(arguments, standalone_mode=False)


def test_a_missing_compiler_says_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    monkeypatch.setattr(plan_topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install '\.\[aot\]'"):
        plan_topology.devices(parse_topology("v5e:2x4"))
    monkeypatch.setenv("TPU_LIBRARY_PATH", str(tmp_path / "libtpu.so"))
    with pytest.raises(InputError, match=r"TPU_LIBRARY_PATH=.*no such file"):
        plan_topology.devices(parse_topology("v5e:2x4"))


@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda chip: chip.name)
def test_times_are_work_by_rate(chip):
    work = Work(flops=3e14, attention_flops=2e14, hbm_bytes=1e11, wire_bytes=5e9)
    times = step_times(work, chip, utilisation=0.5)
    assert times.step == max(times.compute, times.hbm) + times.wire
    assert times.wire == 5e9 / chip.wire_bandwidth
    # Attention is slow where 64-wide heads leave the matrix unit half empty.
    plain = step_times(dataclasses.replace(work, attention_flops=0.0), chip, utilisation=0.5)
    assert times.compute / plain.compute == pytest.approx(1 / 3 + 2 / 3 / chip.attention_share)


def test_predictions_scale_with_the_mesh():
    alone, _ = predict(terms("v5e:1x1"), mesh())
    split, split_peak = predict(terms("v5e:2x4"), mesh(fsdp=8))
    views, views_peak = predict(terms("v5e:2x4"), mesh(view=8))
    assert alone.wire_bytes == 0
    assert split.flops == alone.flops and views.flops == alone.flops / 8
    weights = 2 * 865_925_124
    assert split.wire_bytes == pytest.approx(3 * weights * 7 / 8)
    # Keys and values of 16 views, 0.69 GiB: gathered twice, their gradients scattered.
    assert views.wire_bytes - split.wire_bytes == pytest.approx(3 * 0.6885 * GIB * 7 / 8, rel=1e-3)
    assert views_peak < split_peak


def test_the_search_ranks_every_mesh_that_keeps_the_batch_and_the_cheapest_first():
    found = ranked_meshes(terms("v5e:4x4"), batch=8)
    assert all(guess.mesh["data"] * guess.mesh["fsdp"] <= 8 for guess in found)
    sizes = [guess.mesh["data"] * guess.mesh["fsdp"] * guess.mesh["view"] for guess in found]
    assert set(sizes) == {16}
    costs = [guess.usd_per_sample for guess in found]
    assert costs == sorted(costs)
    # Splitting views costs their keys and values on the wire and saves no arithmetic.
    assert found[0].mesh["view"] == 2


def test_a_price_is_of_chips_and_hours():
    assert terms(price=3.6).usd_per_sample(1.0, mesh(data=8, fsdp=8)) == pytest.approx(0.001)


def compiled(**changes):
    gather = Collective(
        "all-gather", "bf16", bytes=2**20, group=8, times=3, members=tuple(range(8)),
        scope="jit(train_step)/jvp(weights)/all_gather",
    )  # fmt: skip
    made = Compiled(
        arguments=2 * GIB, outputs=2 * GIB, aliased=2 * GIB, temporaries=4 * GIB, peak=5 * GIB,
        flops=ExecutedFlops(convolution=3e13, matmul=1e13, kernel=1.1e14), hbm_bytes=1.5e11,
        collectives=[gather], unknown_loops=0, cpu_seconds=100.0, wall_seconds=200.0,
        host_bytes=5 * GIB,
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


def test_a_report_is_json_and_its_parts_agree():
    found = report(terms(), mesh(data=8, fsdp=8), compiled())
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["flops"]["ratio"] == pytest.approx(1.5e14 / PROBLEM.model_flops)
    assert found["gathers"] == {"weights": {"bf16": 0.003}}
    time, plan = found["time"], found["plan"]
    assert time["samples_per_second"] == pytest.approx(64 / time["step"])
    assert time["mfu"] == pytest.approx(PROBLEM.model_flops / time["step"] / 197e12)
    stage = plan["stages"][1]  # the one compiled here: nothing is scaled
    assert stage["days"] * 86400 == pytest.approx(PAPER_STAGES[1].samples / 64 * time["step"])
    assert stage["usd"] == pytest.approx(stage["days"] * 24 * 64 * 2.0)
    assert plan["usd"] == pytest.approx(sum(part["usd"] for part in plan["stages"]))
    text = "\n".join(lines(found))
    assert "peak 5.00 GiB of 15.75: fits" in text and "gathers of weights: 0.003 GiB bf16" in text


def test_what_does_not_fit_says_so_and_loops_counted_once_are_named():
    found = report(terms(), mesh(fsdp=64), compiled(temporaries=20 * GIB, unknown_loops=2))
    text = "\n".join(lines(found))
    assert "DOES NOT FIT" in text and "2 loops of unknown length" in text


def test_a_compiler_that_counts_no_traffic_is_said_to_count_none(tmp_path):
    found = report(terms("h100:8"), mesh(fsdp=8), compiled(hbm_bytes=0.0))
    assert "memory not told by XLA" in "\n".join(lines(found))
    file = tmp_path / "h100-8.json"
    file.write_text(json.dumps(found))
    rows = plan_table.tables([plan_table.read_plan(file)]).splitlines()
    names = next(row for row in rows if "memory traffic, GB" in row).split(" | ")
    cells = rows[rows.index(" | ".join(names)) + 2].split(" | ")
    assert dict(zip(names, cells))["memory traffic, GB"] == "–"


def test_a_search_compiles_until_one_fits_and_returns_the_cheapest(monkeypatch, capsys):
    tried = []

    def plan(config, made, devices, sizes):
        tried.append(sizes)
        if len(tried) == 1:
            raise InputError("the step does not fit v5e:8x8")
        return {
            "mesh": sizes,
            "memory": {"fits": True},
            "time": {"usd_per_sample": 5 - len(tried)},
        }

    monkeypatch.setattr(plan_aot, "plan", plan)
    config = plan_aot_config()
    best = plan_aot.find_mesh(config, terms(), [], tries=3)
    assert len(tried) == 3 and best["mesh"] == tried[2]
    assert "cheapest of the 3 compiled" in capsys.readouterr().out


def plan_aot_config():
    from see3d_jax.training.config_flags import parse_config

    return parse_config(["plan", *CONFIG, "--config.data.views=16"])


def test_the_paper_stages_are_those_of_the_paper():
    assert [(s.views, s.batch, s.steps) for s in plan_cost.PAPER_STAGES] == [
        (5, 560, 120_000), (16, 228, 200_000)
    ]  # fmt: skip


def test_saved_plans_become_the_tables_of_a_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{plan_table.MARKERS[0]}\nold\n{plan_table.MARKERS[1]}\nafter\n")
    file = tmp_path / "v5e-64.json"
    file.write_text(json.dumps(report(terms(), mesh(data=8, fsdp=8), compiled())))
    for _ in range(2):  # again changes nothing
        plan_table.app([str(file), "--markdown", str(page)], standalone_mode=False)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert text.count("| v5e:8x8 | data 8, fsdp 8 | 16 |") == 3
    assert "`--topology v5e:8x8 --mesh data=8,fsdp=8,view=1 --latents`" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    widths = {row.count("|") for row in rows[:3]}
    assert len(widths) == 1


def test_other_files_and_pages_without_a_place_are_refused(tmp_path):
    file, page = tmp_path / "plan.json", tmp_path / "page.md"
    file.write_text("{}")
    with pytest.raises(InputError, match=r"plan\.json: not a plan"):
        plan_table.app([str(file)], standalone_mode=False)
    file.write_text(json.dumps(report(terms(), mesh(fsdp=64), compiled())))
    with pytest.raises(InputError, match=r"page\.md: has no place"):
        plan_table.app([str(file), "--markdown", str(page)], standalone_mode=False)
