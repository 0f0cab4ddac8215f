"""Training runs of a study and their scores on warps of scenes that no run has seen.

Every run is `python -m see3d_jax.main` in a workdir of its own: one that was killed goes on, one
that is finished is not repeated, and so a study can be stopped at any time. Scores are those of
sampled target views whose condition is the references warped through a depth that is wrong by a few
percent, as it is in use.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from configs import embedded
from see3d_jax.data.held_out import held_out_batch
from see3d_jax.data.inpainting import inpaint
from see3d_jax.data.mixture import DataSource, Mixture, SkippedClips
from see3d_jax.data.pipeline import Batch
from see3d_jax.diffusion.schedule import Schedule
from see3d_jax.errors import InputError, WorkError
from see3d_jax.evaluation.lpips import Lpips, lpips
from see3d_jax.evaluation.metrics import psnr, ssim
from see3d_jax.models import origins
from see3d_jax.models.codec import Codec
from see3d_jax.models.packed import EMBEDDED, read_packed_params
from see3d_jax.models.unet import UNetConfig
from see3d_jax.training import settings
from see3d_jax.training.evaluate import nearest_reference, sample_views, shown_images
from see3d_jax.training.sharding import make_mesh

REGIONS = ("all", "known", "hole")
_ALL_TEST_CLIPS = 1 << 16


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
      name: its workdir within the study.
      config: file under configs/.
      overrides: values of the config by dotted name.
      init_from: name of the run that it starts from, or "".
    """

    name: str
    config: str
    overrides: dict[str, Any]
    init_from: str = ""


def train(run: Run, folder: Path) -> Path:
    """Trains `run` in folder/name unless it is finished; returns the workdir.

    Raises WorkError with the last line that a run printed which failed, or was told to stop.
    """
    workdir = folder / run.name
    done = folder / f"{run.name}.done"
    if done.is_file():
        return workdir
    values = dict(run.overrides)
    if run.init_from:
        values["init_from"] = str(folder / run.init_from)
    command = [
        sys.executable, "-m", "see3d_jax.main", f"--config={run.config}", f"--workdir={workdir}",
        *(f"--config.{name}={value}" for name, value in values.items()),
    ]  # fmt: skip
    log = folder / f"{run.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as out:
        code = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, check=False).returncode
    stopped = not code and origins.complete_steps(workdir)[-1] < values["num_steps"]
    if code or stopped:  # a run that is told to stop saves, and ends without an error
        last = [line for line in log.read_text().splitlines() if line.strip()][-1:]
        how = "stopped before its last step" if stopped else f"exit code {code}"
        raise WorkError(f"{' '.join(command)}: {how} ({''.join(last)}); see {log}")
    done.touch()
    return workdir


@dataclasses.dataclass(frozen=True)
class Trained:
    """A finished run, ready to sample from."""

    config: ml_collections.ConfigDict
    params: Any

    @classmethod
    def load(cls, workdir: Path, step: int | None = None) -> Trained:
        """Reads the moving average of a workdir's checkpoint, the newest by default."""
        config = ml_collections.ConfigDict(origins.read_run_config(workdir))
        unet = settings.train_spec(config).unet
        step = origins.complete_steps(workdir)[-1] if step is None else step
        return cls(config, origins.read_average(workdir, step, unet))

    @classmethod
    def embedded(cls) -> Trained:
        """The model inside the package; how its clips were cut is in configs/embedded.py."""
        config = embedded.get_config()
        return cls(config, read_packed_params(EMBEDDED, UNetConfig(**config.model.to_dict())))

    def codec_and_schedule(self) -> tuple[Codec, Schedule]:
        """What the run encodes images with, and its noise schedule."""
        codec = settings.codec(self.config, settings.train_spec(self.config).unet)
        return codec, settings.noise_schedule(self.config)

    def sample(
        self, batch: Batch, seed: int, weight_form: str | None = None, **sampler: Any
    ) -> np.ndarray:
        """Target views [B, V, h, w, 3] in [−1, 1]; references as the codec shows them.

        `weight_form`: how the warp enters, as of `visual_condition.mixing_weight`; default as the
        run was trained. `sampler`: other settings of SamplerConfig than the run's own.
        """
        spec = settings.train_spec(self.config)
        form = weight_form or spec.objective.weight_form
        spec = dataclasses.replace(
            spec, objective=dataclasses.replace(spec.objective, weight_form=form)
        )
        own = settings.evaluation(self.config).sampler
        own = dataclasses.replace(own, **({"weight_form": form} | sampler))
        mesh = make_mesh(self.config)
        frozen = settings.frozen_networks(self.config, spec.unet)
        placed = {name: jnp.asarray(value) for name, value in batch.items()}
        schedule = settings.noise_schedule(self.config)
        images = sample_views(
            self.params, placed, frozen, schedule, jax.random.key(seed),
            spec=spec, mesh=mesh, sampler=own,
        )  # fmt: skip
        return np.asarray(images)


def test_batch(folder: Path, config: ml_collections.ConfigDict, depth_noise: float) -> Batch:
    """One example of every clip in `folder` (but one), conditioned on warps of the references."""
    spec = settings.example_spec(config)
    spec = dataclasses.replace(spec, depth_noise=depth_noise, latents=None)
    clips = Mixture((DataSource(str(folder), kind="posed"),), seed=0)
    skipped = SkippedClips()
    batch, held_out = held_out_batch(clips, spec, _ALL_TEST_CLIPS, 0, skipped)
    if not held_out.names:
        raise InputError(f"{folder}: needs at least two clips to test on")
    return batch


@dataclasses.dataclass(frozen=True)
class Scenes:
    """Views of scenes that no run has seen: `test` to report, `validation` to choose by."""

    test: Batch
    validation: Batch

    @classmethod
    def load(
        cls, folders: dict[str, Path], config: ml_collections.ConfigDict, depth_noise: float
    ) -> Scenes:
        """From folders of data_prep.synthetic by name of the split."""
        return cls(
            **{
                split: test_batch(folder / "records", config, depth_noise)
                for split, folder in folders.items()
            }
        )

    def examine(
        self, model: Trained, seed: int, perceptual: Lpips | None, composite: bool = False,
        **sampler: Any,
    ) -> tuple[dict[str, float], np.ndarray]:  # fmt: skip
        """Scores of a model on both splits, and its images of the test views.

        `composite`: the known pixels of the warp are put back into what the model made.
        """
        made = []
        for batch in (self.test, self.validation):
            images = model.sample(batch, seed, **sampler)
            made.append(put_back(batch, images) if composite else images)
        return self.score(*made, perceptual), made[0]

    def score(
        self, test: np.ndarray, validation: np.ndarray, perceptual: Lpips | None
    ) -> dict[str, float]:
        """Scores of the test images, and as validation_NAME what choices are made by."""
        scores = score(self.test, test, perceptual)
        chosen_by = score(self.validation, validation, perceptual)
        return scores | {
            f"validation_{name}": chosen_by[name]
            for name in ("psnr_all", "psnr_hole", "lpips_hole")
            if name in chosen_by
        }


def put_back(batch: Batch, images: np.ndarray) -> np.ndarray:
    """The images [B, V, h, w, 3] with what the condition knows of the targets in its place."""
    known = (batch["mask"] > 0.5) & ~batch["is_reference"][..., None, None, None]
    return np.where(known, shown_images(batch), images)


def baselines(batch: Batch) -> dict[str, np.ndarray]:
    """What costs nothing, by name: images [B, V, h, w, 3] in [−1, 1]."""
    shown = shown_images(batch)
    known = batch["mask"][..., 0] > 0.5
    flat = inpaint(_unit(shown).reshape(-1, *shown.shape[2:]), known.reshape(-1, *known.shape[2:]))
    return {
        "nearest reference": nearest_reference(batch),
        "warp, holes black": shown,
        "warp + Telea": flat.reshape(shown.shape) * 2 - 1,
    }


def score(batch: Batch, images: np.ndarray, perceptual: Lpips | None) -> dict[str, float]:
    """Means over target views: psnr_{all,known,hole} in dB, ssim, lpips_{all,hole}.

    lpips_hole is LPIPS after the known pixels have been replaced by the truth: what the holes add.
    """
    target = ~batch["is_reference"]
    truth, made = _unit(batch["image"][target]), _unit(images[target])
    known = batch["mask"][target][..., 0] > 0.5
    pixels = {"all": np.ones_like(known), "known": known, "hole": ~known}
    scores = {"ssim": float(np.mean(ssim(made, truth)))}
    for region in REGIONS:
        some = pixels[region].any((1, 2))
        values = psnr(made[some], truth[some], pixels[region][some])
        scores[f"psnr_{region}"] = float(np.minimum(values, 100.0).mean())
    if perceptual is not None:
        in_holes = np.where(known[..., None], truth, made)
        for region, shown in (("all", made), ("hole", in_holes)):
            pairs = zip(shown.astype(np.float32), truth)
            scores[f"lpips_{region}"] = float(np.mean([lpips(perceptual, *p) for p in pairs]))
    return scores


def _unit(images: np.ndarray) -> np.ndarray:
    return (np.clip(images, -1, 1) * np.float32(0.5) + np.float32(0.5)).astype(np.float32)


def spread(rows: list[dict[str, float]]) -> dict[str, list[float]]:
    """{name: [mean, standard deviation]} over runs that differ by their seed."""
    return {
        name: [
            float(np.mean([row[name] for row in rows])),
            float(np.std([row[name] for row in rows], ddof=1)) if len(rows) > 1 else 0.0,
        ]
        for name in rows[0]
    }
