"""Where the numbers of a run go: console, metrics.jsonl, TensorBoard events and, if wanted, W&B.

metrics.jsonl has one JSON object per line: {"step", "loss", "grad_norm"} for every step, and rows
with the speed and the held-out scores of the steps where those were measured (docs/training.md
lists them all). It is what reports plot. After a resume, rows of steps that are run again are
dropped, so no loss appears twice.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from types import ModuleType

import jax
import numpy as np
from etils import epath
from tensorboardX import SummaryWriter
from tqdm import tqdm

from see3d_jax.errors import InputError
from see3d_jax.files import is_remote, write_text
from see3d_jax.training.flops import peak_flops


class MetricsLog:
    """Writes scalars and images of one run; a context manager.

    With `writes` false (every process of a run but one) it takes everything and writes nothing.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        first_step: int,
        writes: bool = True,
        wandb_project: str = "",
    ) -> None:
        workdir = epath.Path(workdir)
        self._writes = writes
        self._path = workdir / "metrics.jsonl"
        self._rows: list[str] = []  # what a bucket's metrics.jsonl holds: it cannot be appended to
        if writes and self._path.exists():
            rows = _rows_up_to(self._path, first_step)
            write_text(self._path, "".join(rows))
            self._rows = rows if is_remote(workdir) else []
        try:
            self._events = SummaryWriter(
                str(workdir / "events"), purge_step=first_step + 1, write_to_disk=writes
            )
        except ImportError as error:  # of a client for this kind of bucket
            raise InputError(f"{workdir}: TensorBoard events cannot be written: {error}") from error
        self._wandb = None
        if writes and wandb_project:
            # One id per workdir: running again continues the same curves.
            place = os.fspath(workdir if is_remote(workdir) else workdir.absolute())
            self._wandb = import_wandb(wandb_project).init(
                project=wandb_project, name=workdir.name, resume="allow",
                dir=None if is_remote(workdir) else place,
                id=hashlib.sha256(place.encode()).hexdigest()[:16],
            )  # fmt: skip

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.flush()
        self._events.close()
        if self._wandb is not None:
            self._wandb.finish()

    def flush(self) -> None:
        """Makes everything so far visible to others; to be called now and then."""
        if self._rows:
            write_text(self._path, "".join(self._rows))
        self._events.flush()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one row. Values must be finite numbers."""
        if not self._writes:
            return
        row = {"step": step, **{name: float(value) for name, value in values.items()}}
        line = json.dumps(row, allow_nan=False) + "\n"
        if is_remote(self._path):
            self._rows.append(line)
        else:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line)
        for name, value in values.items():
            self._events.add_scalar(name, float(value), step)
        if self._wandb is not None:
            self._wandb.log({name: float(value) for name, value in values.items()}, step=step)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Adds a uint8 [H, W, 3] picture to the TensorBoard events and W&B."""
        if not self._writes:
            return
        self._events.add_image(name, image, step, dataformats="HWC")
        if self._wandb is not None:
            self._wandb.log({name: import_wandb().Image(image)}, step=step)


def import_wandb(project: str = "") -> ModuleType:
    """The module wandb, an extra; InputError if it is missing."""
    try:
        import wandb
    except ImportError:
        raise InputError(
            f"config.wandb_project is {project!r}, but Weights & Biases is not installed: "
            "pip install '.[log]', or leave it empty"
        ) from None
    return wandb


def _rows_up_to(path: epath.Path, step: int) -> list[str]:
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue  # the last line of a killed run may be half-written
    return kept


class Console:
    """A progress bar on a terminal, one line per report everywhere, and the speed of training.

    Speed counts training only: the first step (which compiles), sampling and saving are left out.
    """

    def __init__(
        self,
        first_step: int,
        num_steps: int,
        batch_size: int,
        prints: bool = True,
        flops_per_sample: float = 0.0,
    ) -> None:
        self._prints = prints
        self._bar = tqdm(
            total=num_steps, initial=first_step, desc="training", unit="step",
            disable=not (prints and sys.stderr.isatty()), smoothing=0.05,
        )  # fmt: skip
        self._num_steps, self._batch_size = num_steps, batch_size
        self._flops_per_sample = flops_per_sample
        self._steps, self._start = 0, time.perf_counter()
        self._paused = self._waited = 0.0
        self._compiled = False

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    @contextlib.contextmanager
    def waiting_for_input(self) -> Iterator[None]:
        """Measures time during which training had no batch to work on."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Takes the time of the block out of the speed figures."""
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start

    def step_done(self) -> None:
        """Counts a step and moves the bar."""
        self._bar.update()
        if self._compiled:
            self._steps += 1
        else:
            self._compiled = True
            self._start, self._paused, self._waited = time.perf_counter(), 0.0, 0.0

    def report(self, step: int, loss: float) -> dict[str, float]:
        """Prints one line; returns samples/s, the share of time spent waiting for input, model
        TFLOP/s of all devices and, where their peak is known, the share of it that is.
        """
        now = time.perf_counter()
        seconds = max(now - self._start - self._paused, 1e-9)
        line = f"step {step}/{self._num_steps}  loss {loss:.4f}"
        speed = {}
        if self._steps:
            rate = self._steps / seconds
            eta = round((self._num_steps - step) / rate)
            speed["samples_per_second"] = rate * self._batch_size
            speed["input_wait_share"] = min(1.0, self._waited / seconds)
            flops = rate * self._batch_size * self._flops_per_sample
            speed["model_tflops_per_second"] = flops / 1e12
            if peak := peak_flops(jax.devices()[0].device_kind):
                speed["model_flops_utilisation"] = flops / (peak * jax.device_count())
            line += (
                f"  {rate:.2f} steps/s  {rate * self._batch_size:.1f} samples/s"
                f"  ETA {eta // 60}:{eta % 60:02d}"
            )
        self.say(line)
        self._steps, self._start, self._paused, self._waited = 0, now, 0.0, 0.0
        return speed

    def say(self, text: str) -> None:
        """Prints a line without breaking the bar."""
        if not self._prints:
            return
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()
