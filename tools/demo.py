"""The whole way from raw video to a Gaussian scene, as a user would run it, in minutes on a CPU.

    python -m tools.demo --output demo_output

Every step is one of the project's own commands, printed before it runs, so that the demo is also
a list of examples. Input is ray-traced here (nothing is downloaded): some videos to train on, and
one scene the model never sees, whose true images say how good the generated views are. A step that
finished leaves a marker in OUTPUT/.finished and is not repeated by the next run unless its command
has changed; delete the folder to start over.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import click

from see3d_jax.errors import InputError, WorkError, run_command
from see3d_jax.files import write_json

_MARKERS = ".finished"


@dataclasses.dataclass(frozen=True)
class Size:
    """How much work each step does. The defaults fit 12 minutes on 2 cores, install included.

    Attributes:
      clips: ray-traced training videos.
      train_steps, sample_every: length of the training run, and its sample grids.
      views, sampling_steps: generated views, denoising steps for each group of them.
      scene_steps, views_steps: optimisation steps of the two Gaussian scenes.
      gaussians: size of each scene.
    """

    clips: int = 24
    train_steps: int = 1500
    sample_every: int = 500
    views: int = 11
    sampling_steps: int = 10
    scene_steps: int = 500
    views_steps: int = 250
    gaussians: int = 6000


FAST = Size(
    clips=3, train_steps=2, sample_every=2, views=3, sampling_steps=2,
    scene_steps=4, views_steps=3, gaussians=200,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Step:
    """One command of the chain: what it is for, the folder it writes, the arguments.

    `result`, inside `output`, exists only when the work is complete: a training run that was told
    to stop saves and exits without an error, too.
    """

    purpose: str
    output: Path
    arguments: tuple[str, ...]
    result: str = "."

    @property
    def name(self) -> str:
        """Name of the marker file."""
        return self.output.name

    @property
    def line(self) -> str:
        """The command as one would type it."""
        if self.arguments[0] == "see3d_jax.cli":  # what the console script `see3d` runs
            return shlex.join(("see3d", *self.arguments[1:]))
        return shlex.join(("python", "-m", *self.arguments))


def steps(output: Path, size: Size, seed: int) -> list[Step]:
    """The chain, in order."""
    videos, curated, training = (output / name for name in ("videos", "clips", "training"))
    unseen, views = output / "unseen_scene", output / "views"
    scene, scene_of_views = output / "scene", output / "scene_of_views"
    held_out = unseen / "scenes" / "clip_00000"
    return [
        Step("ray-trace videos to train on", videos, (
            "data_prep.synthetic", "--output", str(videos), "--clips", str(size.clips),
            "--seed", str(seed),
        )),
        Step("ray-trace one scene that training never sees", unseen, (
            "data_prep.synthetic", "--output", str(unseen), "--clips", "1",
            "--seed", str(seed + 1000),
        )),
        Step("choose the videos worth training on, and cut them into clips", curated, (
            "data_prep.curate", "--input", str(videos / "videos"), "--output", str(curated),
            "--workers", "2",
        )),
        Step("train a small multi-view diffusion model on the clips", training, (
            "see3d_jax.main", "--config=configs/tiny.py", f"--workdir={training}",
            f"--config.data.path={curated}", f"--config.num_steps={size.train_steps}",
            f"--config.seed={seed}",
            f"--config.sample_every={size.sample_every}",
        ), f"checkpoints/{size.train_steps}"),
        Step("generate views of the unseen scene from one of its images", views, (
            "see3d_jax.cli", "generate", "--input", str(held_out), "--reference", "18",
            "--trajectory", str(held_out / "transforms.json"), "--checkpoint", str(training),
            "--output", str(views), "--views", str(size.views),
            "--steps", str(size.sampling_steps), "--seed", str(seed), "--composite",
        )),
        Step("fit 3D Gaussians to the true images of the unseen scene", scene, (
            "see3d_jax.cli", "reconstruct", "--input", str(held_out), "--output", str(scene),
            "--steps", str(size.scene_steps), "--gaussians", str(size.gaussians),
            "--max-size", "192",
            "--seed", str(seed),
        )),
        Step("fit 3D Gaussians to the generated views", scene_of_views, (
            "see3d_jax.cli", "reconstruct", "--input", str(views),
            "--output", str(scene_of_views), "--steps", str(size.views_steps),
            "--gaussians", str(size.gaussians), "--seed", str(seed),
        )),
    ]  # fmt: skip


def run(step: Step, markers: Path) -> float:
    """Runs a step unless its marker says that this very command succeeded; returns its seconds."""
    marker = markers / f"{step.name}.json"
    done = _finished(marker)
    result = step.output / step.result
    if done is not None and done["command"] == step.line and result.exists():
        print(f"  already done ({done['seconds']:.0f} s); delete {marker} to repeat", flush=True)
        return done["seconds"]
    if done is not None:  # another command's result: it would be refused or mixed with the new one
        marker.unlink()
        shutil.rmtree(step.output, ignore_errors=True)
    start = time.monotonic()
    code = subprocess.run([sys.executable, "-m", *step.arguments], check=False).returncode
    seconds = time.monotonic() - start
    if code:
        raise WorkError(f"the step above ended with exit code {code}: {step.line}")
    if not result.exists():
        raise WorkError(
            f"the step above stopped before it was done; run again to go on: {step.line}"
        )
    write_json(marker, {"command": step.line, "seconds": seconds})
    print(f"  took {seconds:.0f} s", flush=True)
    return seconds


def _finished(marker: Path) -> dict | None:
    try:
        return json.loads(marker.read_text())
    except (OSError, ValueError):
        return None


@click.command(
    epilog="""\b
Examples:
  python -m tools.demo --output demo_output
  python -m tools.demo --output fast_demo --fast     # checks the plumbing, learns nothing
""",
)
@click.option("--output", type=click.Path(path_type=Path), required=True, metavar="DIR")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--fast", is_flag=True, help="A few steps of everything: for tests.")
def app(output: Path, seed: int, fast: bool) -> None:
    """Raw videos in; a trained model, novel views and a Gaussian scene out; report.html on top."""
    from see3d_jax.viewer import RunFolders, write_report

    if output.exists() and not output.is_dir():
        raise InputError(f"{output}: is a file; --output must be a folder")
    if output.is_dir() and any(output.iterdir()) and not (output / _MARKERS).is_dir():
        raise InputError(f"{output}: not empty and not a demo folder; give another --output")
    (output / _MARKERS).mkdir(parents=True, exist_ok=True)
    chain = steps(output, FAST if fast else Size(), seed)
    timings = []
    for number, step in enumerate(chain, 1):
        print(f"\n[{number}/{len(chain)}] {step.purpose}\n  $ {step.line}", flush=True)
        timings.append((step.line, run(step, output / _MARKERS)))
    folders = {step.name: step.output for step in chain}
    report = output / "report.html"
    write_report(
        report,
        "See3D in JAX: one run, from raw video to a Gaussian scene",
        RunFolders(
            videos=folders["videos"],
            curation=folders["clips"],
            training=folders["training"],
            generations={"New views of a scene it never saw": folders["views"]},
            reconstructions={
                "Gaussians from the true images": folders["scene"],
                "Gaussians from the generated views": folders["scene_of_views"],
            },
        ),
        timings,
        introduction="Ray-traced videos were curated and cut into clips; a small multi-view "
        "diffusion model was trained on them for minutes on a CPU, and generated views of a scene "
        "it had never seen from one image. Its views are rough and shown as they are, beside "
        "baselines that need no model and the truth.",
    )
    total = sum(seconds for _, seconds in timings)
    print(f"\nAll {len(chain)} steps done in {total / 60:.1f} minutes. What was written:")
    for path, what in (
        (report, "start here: everything on one page; open it in a browser"),
        (folders["clips"] / "report.html", "what curation kept and why"),
        (folders["training"], f"tensorboard --logdir {folders['training']}"),
        (folders["views"] / "contact_sheet.png", "warp, mask, inpainted, generated, truth"),
        (folders["views"] / "video.mp4", "the generated views"),
        (folders["scene"] / "orbit.mp4", "a flight around the Gaussian scene"),
        (folders["scene"] / "point_cloud.ply", "drag it into any 3DGS viewer"),
        (folders["scene_of_views"] / "orbit.mp4", "the scene made of generated views"),
    ):
        if path.exists():
            print(f"  {path!s:44s} {what}")
    print(f"More on any of these: see3d view {output}/FOLDER")


def main() -> None:
    """Entry point of `python -m tools.demo`."""
    run_command(lambda: app(standalone_mode=False))


if __name__ == "__main__":
    main()
