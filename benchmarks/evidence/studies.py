"""What each study trains and how it is tested: Tables 3 and 6, data scaling, leakage, solvers.

All variants of a study start from the same pre-trained denoiser (one per seed), which knows the
references and no condition, as See3D starts from MVDream; they have equal budgets and see their
clips in the same order. Choices are made on validation scenes, scores are of test scenes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.evidence.clips import subset, with_uncurated
from benchmarks.evidence.runs import Run
from see3d_jax.diffusion.visual_condition import WEIGHT_FORMS

TINY = "configs/tiny.py"
PRETRAINED = "pretrained"
BASE = "unposed_t"  # the run that all four studies compare with; trained once
# Table 3 names its rows so; the config says which condition, see configs/ablations.
TABLE3 = {"MV-Posed": "posed", "MV-UnposeM": "unposed_m", "MV-UnposeT": "unposed_t"}
POSED_SHARES = (0.0, 0.1, 0.2, 0.6, 1.0)
DATA_SHARES = (0.1, 0.2, 0.4, 0.8, 1.0)
BETAS = (0.05, 0.2, 0.5, 1.0)


@dataclasses.dataclass(frozen=True)
class Budget:
    """What every variant of a study is given.

    Attributes:
      train: folder of posed records.
      pretraining_steps, steps: of the shared start, and of each variant after it.
      seeds: how many runs of each variant.
      depth_noise: deviation of log depth that posed training clips are warped through.
      overrides: values of the config that hold for all runs.
    """

    train: Path
    pretraining_steps: int
    steps: int
    seeds: int
    depth_noise: float
    overrides: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Variant:
    """One row of a table: its name, its runs (one per seed), and the ways the warp may enter."""

    name: str
    runs: tuple[Run, ...]
    forms: tuple[str | None, ...] = (None,)


def pretraining(budget: Budget) -> list[Run]:
    """The shared starts: no condition in any sample, so only references can be looked at."""
    return [
        Run(
            f"{PRETRAINED}_{seed}",
            TINY,
            _common(budget, seed, budget.pretraining_steps)
            | {"data.path": budget.train / "records", "objective.drop_probability": 1.0},
        )
        for seed in range(budget.seeds)
    ]


def table3(budget: Budget, folder: Path) -> list[Variant]:
    """The three conditions of the paper's Table 3; each tested with both ways to show a warp."""
    del folder
    forms = tuple(form for form in WEIGHT_FORMS if form != "paper")
    return [
        Variant(
            name,
            _base_runs(budget) if condition == BASE else _runs(
                budget, f"table3_{condition}", f"configs/ablations/table3_{condition}.py",
                _clips(budget),
            ),
            forms,
        )
        for name, condition in TABLE3.items()
    ]  # fmt: skip


def table6(budget: Budget, folder: Path) -> list[Variant]:
    """MV-UnposeT with growing shares of clips that are shown as warps (the paper's Table 6)."""
    del folder
    records = str(budget.train / "records")
    variants = []
    for share in POSED_SHARES:
        kinds = (("unposed", 1 - share), ("posed", share))
        mixture = tuple((records, weight, kind) for kind, weight in kinds if weight)
        values = {"data.mixture": mixture, "data.depth_noise": budget.depth_noise}
        runs = _runs(budget, f"table6_{share:.1f}", TINY, values) if share else _base_runs(budget)
        variants.append(Variant(f"{share:.0%} posed", runs))
    return variants


def scaling(budget: Budget, folder: Path) -> list[Variant]:
    """Growing shares of the clips, and all of them with as many uncurated ones mixed in."""
    variants = []
    for share in DATA_SHARES:
        if share < 1:
            clips = subset(budget.train / "records", share, folder / f"clips_{share:.1f}")
            runs = _runs(budget, f"scaling_{share:.1f}", TINY, {"data.path": clips})
        else:
            runs = _base_runs(budget)
        variants.append(Variant(f"{share:.0%} of the clips", runs))
    mixed = with_uncurated(budget.train / "records", folder / "clips_uncurated")
    runs = _runs(budget, "scaling_uncurated", TINY, {"data.path": mixed})
    return [*variants, Variant("100% and as many uncurated", runs)]


def leakage(budget: Budget, folder: Path) -> list[Variant]:
    """W_t of the code and of the paper, and β: what the leak of V_t does to the result."""
    del folder
    variants = []
    for form, beta in [("code", beta) for beta in BETAS] + [("paper", 0.2)]:
        values = _clips(budget) | {"objective.weight_form": form, "objective.beta": beta}
        runs = (
            _base_runs(budget)
            if (form, beta) == ("code", 0.2)  # what configs/tiny.py has
            else _runs(budget, f"leakage_{form}_{beta}", TINY, values)
        )
        variants.append(Variant(f"W_t of the {form}, beta {beta}", runs))
    return variants


STUDIES: dict[str, Callable[[Budget, Path], list[Variant]]] = {
    "table3": table3, "table6": table6, "scaling": scaling, "leakage": leakage,
}  # fmt: skip


def _base_runs(budget: Budget) -> tuple[Run, ...]:
    """MV-UnposeT on all clips, as in Table 3."""
    return _runs(budget, BASE, f"configs/ablations/table3_{BASE}.py", _clips(budget))


def _clips(budget: Budget) -> dict[str, Any]:
    return {"data.path": budget.train / "records", "data.depth_noise": budget.depth_noise}


def _runs(budget: Budget, name: str, config: str, values: dict[str, Any]) -> tuple[Run, ...]:
    return tuple(
        Run(f"{name}_{seed}", config, _common(budget, seed, budget.steps) | values,
            init_from=f"{PRETRAINED}_{seed}")
        for seed in range(budget.seeds)
    )  # fmt: skip


def _common(budget: Budget, seed: int, steps: int) -> dict[str, Any]:
    return {
        "num_steps": steps, "seed": seed, "sample_every": 0,
        "checkpoint_every": max(1, steps // 4), "keep_checkpoints": 1, **budget.overrides,
    }  # fmt: skip
