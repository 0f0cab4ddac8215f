"""The paper's ablations at a scale that a laptop can rerun, each with its spread over seeds.

    python -m data_prep.synthetic --output data/train --clips 80 --seed 100
    python -m data_prep.synthetic --output data/validation --clips 24 --seed 8
    python -m data_prep.synthetic --output data/test --clips 24 --seed 7
    python -m benchmarks.evidence table3 --train data/train --validation data/validation \\
        --test data/test --output evidence

Studies: table3, table6, scaling, leakage (they train); solvers (of --checkpoint) and embedded (of
the model inside the package) train nothing. With --checkpoint, the workdir that the latter was made
in, embedded also draws how its kept checkpoints came to be.
A study that was stopped goes on where it was. Choices between rows are to be made by the scores on
validation scenes; those on test scenes are for reporting. OUTPUT/STUDY.json and .jpg are what
`python -m benchmarks.evidence.report` makes docs/evidence.md of.
"""

from __future__ import annotations

import ast
import json
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

from see3d_jax.errors import InputError, run_command

_PATH = click.Path(path_type=Path)
STUDIES = ("embedded", "table3", "table6", "scaling", "leakage", "solvers")
SOLVERS = (
    ("ddim", "official", "DDIM, as released"), ("ddim", "spaced", "DDIM"),
    ("dpmpp_2m", "quadratic", "DPM-Solver++(2M)"),
)  # fmt: skip
CALLS = (1, 2, 4, 10, 20, 50)
EMBEDDED_CALLS = (1, 2, 4, 8)


@click.command()
@click.argument("study", type=click.Choice(STUDIES))
@click.option("--train", type=_PATH, help="Folder of data_prep.synthetic to train on.")
@click.option("--validation", type=_PATH, required=True, help="Another, to choose by.")
@click.option("--test", type=_PATH, required=True, help="Another, of other scenes, to report.")
@click.option("--output", type=_PATH, required=True, help="Runs, scores and pictures.")
@click.option("--steps", default=1000, show_default=True, help="Training steps of a variant.")
@click.option("--pretraining-steps", default=1000, show_default=True, help="Of the shared start.")
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(1), help="Runs each.")
@click.option("--depth-noise", default=0.03, show_default=True, help="Depth error, training, test.")
@click.option("--checkpoint", type=_PATH, help="Workdir: for solvers, or a curve.")
@click.option("--lpips/--no-lpips", default=True, show_default=True, help="AlexNet.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Of every config.")
def app(
    study: str, validation: Path, test: Path, output: Path, lpips: bool, **options: Any
) -> None:
    """Trains what STUDY compares, scores it on warps of unseen scenes, keeps table and picture."""
    from see3d_jax.evaluation.lpips import load_lpips
    from see3d_jax.files import write_json

    perceptual = load_lpips("alex") if lpips else None
    path = output / f"{study}.json"
    unseen = {"validation": validation, "test": test}
    if study == "solvers":
        if options["checkpoint"] is None:
            raise InputError("solvers: give --checkpoint, the workdir of a training run")
        table = solvers(unseen, output, options, perceptual)
    elif study == "embedded":
        table = embedded(unseen, output, options, perceptual)
    else:
        if options["train"] is None:
            raise InputError(f"{study}: give --train, a folder of data_prep.synthetic")
        before = json.loads(path.read_text())["seconds"] if path.is_file() else 0.0
        table = trained(study, unseen, output, options, perceptual, before)
    places = {name: options[name] for name in ("train", "checkpoint")} | unseen
    command = f"python -m benchmarks.evidence {study} " + " ".join(
        f"--{name} {value}" for name, value in (places | {"output": output}).items() if value
    )
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in options.items()}
    write_json(path, {"study": study, "command": command, "options": settings, **table})
    click.echo(f"wrote {path}")


def trained(
    study: str, unseen: dict[str, Path], output: Path, options: dict, perceptual: Any, before: float
) -> dict[str, Any]:
    """Rows of a study that trains: {"rows", "baselines", "views", "seconds"}."""
    from benchmarks.evidence import leak, runs, studies

    budget = studies.Budget(
        options["train"], options["pretraining_steps"], options["steps"], options["seeds"],
        options["depth_noise"], dict(map(_override, options["overrides"])),
    )  # fmt: skip
    folder = output / "runs"
    start = time.perf_counter()
    for run in studies.pretraining(budget):
        click.echo(f"{run.name} …")
        runs.train(run, folder)
    rows: dict[str, Any] = {}
    pictures: dict[str, np.ndarray] = {}
    scenes = None
    for variant in studies.STUDIES[study](budget, output / "data"):
        found: dict[str, list[dict[str, float]]] = {}
        for seed, run in enumerate(variant.runs):
            click.echo(f"{run.name} …")
            model = runs.Trained.load(runs.train(run, folder))
            if scenes is None:
                scenes = runs.Scenes.load(unseen, model.config, budget.depth_noise)
            for form in variant.forms:
                scores, images = scenes.examine(model, seed, perceptual, weight_form=form)
                name = variant.name + {None: "", "clean": ", warp as it is"}.get(
                    form, ", warp through C_t and W_t"
                )
                found.setdefault(name, []).append(scores)
                if seed == 0:
                    pictures[name] = images
        for name, scores in found.items():
            rows[name] = runs.spread(scores)
            click.echo(f"  {name}: " + _line(rows[name]))
    table = _table(scenes, rows, pictures, perceptual, output / f"{study}.jpg")
    if study == "leakage":
        table["curves"] = leak.curves(scenes.test, *model.codec_and_schedule())
        leak.plot(table["curves"], str(output / "leakage_curves.png"))
    return table | {"seconds": round(before + time.perf_counter() - start)}


def solvers(
    unseen: dict[str, Path], output: Path, options: dict, perceptual: Any
) -> dict[str, Any]:
    """Quality against the number of UNet calls, by solver and spacing."""
    from benchmarks.evidence import runs
    from see3d_jax.diffusion.sampler import SamplerConfig, sampling_steps

    model = runs.Trained.load(options["checkpoint"])
    scenes = runs.Scenes.load(unseen, model.config, options["depth_noise"])
    rows, pictures = {}, {}
    for solver, timesteps, name in SOLVERS:
        for steps in CALLS:
            if steps == 1 and solver != "ddim":
                continue
            chosen = {"solver": solver, "timesteps": timesteps, "num_steps": steps}
            calls = len(sampling_steps(SamplerConfig(**chosen))[0])
            label = f"{name}, {calls} calls"
            rows[label], images = _sampled(scenes, model, label, options, perceptual, chosen)
            rows[label]["calls"] = [calls, 0.0]
            if steps in (2, 50):
                pictures[label] = images
    return _table(scenes, rows, pictures, perceptual, output / "solvers.jpg")


def embedded(
    unseen: dict[str, Path], output: Path, options: dict, perceptual: Any
) -> dict[str, Any]:
    """The model inside the package as `see3d generate` uses it: known pixels are put back."""
    from benchmarks.evidence import runs

    model = runs.Trained.embedded()
    scenes = runs.Scenes.load(unseen, model.config, options["depth_noise"])
    rows, pictures = {}, {}
    for steps in EMBEDDED_CALLS:
        chosen = {"composite": True, "num_steps": steps}
        label = f"model, {steps} call{'s' * (steps > 1)}"
        rows[label], pictures[label] = _sampled(scenes, model, label, options, perceptual, chosen)
    table = _table(scenes, rows, pictures, perceptual, output / "embedded.jpg")
    if options["checkpoint"] is None:
        return table
    from see3d_jax.models.origins import complete_steps

    steps = complete_steps(options["checkpoint"])
    found = [
        scenes.examine(
            runs.Trained.load(options["checkpoint"], step), 0, perceptual,
            composite=True, num_steps=1,
        )[0]
        for step in steps
    ]  # fmt: skip
    table["curve"] = {"step": list(steps), **{key: [s[key] for s in found] for key in found[0]}}
    _draw_curve(output / "embedded_curves.png", table)
    return table


def _draw_curve(path: Path, table: dict[str, Any]) -> None:
    """Hole pixels of validation and test scenes over the kept checkpoints, Telea dashed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    curve, telea = table["curve"], table["baselines"]["warp + Telea"]
    names = [name for name in ("psnr_hole", "lpips_hole") if name in curve]
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
        for split, prefix, colour in (("validation", "validation_", "C0"), ("test", "", "C1")):
            axes.plot(curve["step"], curve[prefix + name], color=colour, marker=".", label=split)
            axes.axhline(telea[prefix + name], color=colour, ls="--", lw=1)
        title = {"psnr_hole": "PSNR in holes, dB", "lpips_hole": "LPIPS in holes"}[name]
        axes.set(title=title, xlabel="training steps")
        axes.grid(alpha=0.3)
    figure.axes[0].legend(title="dashed: warp + Telea")
    figure.savefig(path, dpi=110)


def _sampled(
    scenes: Any, model: Any, label: str, options: dict, perceptual: Any, chosen: dict[str, Any]
) -> tuple[dict[str, list[float]], np.ndarray]:
    """One row: scores of a model over seeds, sampled as `chosen`; and the first seed's images."""
    from benchmarks.evidence import runs

    made = [scenes.examine(model, seed, perceptual, **chosen) for seed in range(options["seeds"])]
    row = runs.spread([scores for scores, _ in made])
    click.echo(f"  {label}: " + _line(row))
    return row, made[0][1]


def _table(
    scenes: Any, rows: dict[str, Any], pictures: dict[str, np.ndarray],
    perceptual: Any, picture: Path,
) -> dict[str, Any]:  # fmt: skip
    """What every study ends with: its rows beside the baselines of the same views, and a sheet."""
    from benchmarks.evidence import runs

    batch = scenes.test
    free, free_validation = runs.baselines(batch), runs.baselines(scenes.validation)
    _picture(picture, batch, free | pictures)
    return {
        "rows": rows,
        "baselines": {
            name: scenes.score(x, free_validation[name], perceptual) for name, x in free.items()
        },
        "views": int((~batch["is_reference"]).sum()),
        "scenes": len(batch["is_reference"]),
    }


def _override(text: str) -> tuple[str, Any]:
    name, sign, value = text.partition("=")
    if not sign:
        raise InputError(f"--set {text}: want KEY=VALUE, e.g. batch_size=2")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _line(scores: dict[str, list[float]]) -> str:
    names = ("psnr_all", "psnr_known", "psnr_hole", "lpips_hole")
    return "  ".join(
        f"{name} {scores[name][0]:.2f} ± {scores[name][1]:.2f}" for name in names if name in scores
    )


def _picture(path: Path, batch: dict[str, np.ndarray], columns: dict[str, np.ndarray]) -> None:
    """One row per test scene (six at most): its first target, by every method."""
    from see3d_jax.media import contact_sheet, write_image

    everything = columns | {"truth": batch["image"]}
    rows = []
    for scene in range(min(6, len(batch["image"]))):
        target = int(np.argmin(batch["is_reference"][scene]))
        cells = (images[scene, target] for images in everything.values())
        rows.append([np.clip(cell / 2 + 0.5, 0, 1) for cell in cells])
    write_image(path, contact_sheet(rows, column_labels=tuple(everything), cell_height=112))


def main() -> None:
    """Console entry."""
    run_command(lambda: app(prog_name="python -m benchmarks.evidence", standalone_mode=False))


if __name__ == "__main__":
    main()
