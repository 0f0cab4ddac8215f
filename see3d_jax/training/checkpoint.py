"""A workdir: config.json and Orbax checkpoints, each of them whole or absent.

    workdir/config.json                   the full config of the run
    workdir/checkpoints/<step>/state      parameters, EMA, optimizer (Orbax arrays)
    workdir/checkpoints/<step>/input      position in the data stream (JSON)
    workdir/checkpoints/<step>/checksums  of every array of the state (JSON)
    workdir/damaged/<step>                checkpoints that could not be read back

All parts of a step are committed together by one rename, so a run killed at any moment resumes
without repeating or losing a batch. A workdir belongs to one config: it can be continued with other
cadences, more steps or moved data, but not with anything that would change the result.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from see3d_jax.errors import InputError, WorkError
from see3d_jax.files import is_remote, write_json
from see3d_jax.training import distributed
from see3d_jax.training.state import TrainState, as_dict, from_dict

# What may change between two runs in one workdir. The mesh moves results only by rounding.
FREE_KEYS = (
    "num_steps",
    "checkpoint_every",
    "keep_checkpoints",
    "keep_every",
    "log_every",
    "sample_every",
    "data.path",
    "data.threads",
    "data.workers",
    "evaluation",
    "max_skipped_in_row",
    "wandb_project",
    "mesh",
)


def config_values(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The config as plain JSON values (tuples become lists, references are resolved)."""
    return json.loads(json.dumps(config.copy_and_resolve_references().to_dict()))


def check_workdir(workdir: str | os.PathLike[str], config: ml_collections.ConfigDict) -> None:
    """Raises InputError when `workdir` cannot be used for this config. Writes nothing."""
    workdir = epath.Path(workdir)
    path = workdir / "config.json"
    try:
        if workdir.exists() and not workdir.is_dir():
            raise InputError(f"{workdir}: is a file; --workdir needs a folder")
    except ImportError as error:  # of a client for this kind of bucket
        raise InputError(f"{workdir}: cannot be reached: {error}") from error
    _check_writable(workdir)
    if not path.exists():
        if (workdir / "checkpoints").exists():
            raise InputError(
                f"{workdir}: has checkpoints but no config.json, so they cannot be continued; "
                "use another --workdir"
            )
        return
    try:
        saved = _flatten(json.loads(path.read_text()))
    except (ValueError, AttributeError) as error:
        raise InputError(f"{path}: not a config ({error}); use another --workdir") from None
    wanted = _flatten(config_values(config))
    differing = [
        key
        for key in sorted(saved.keys() | wanted.keys())
        if saved.get(key, "absent") != wanted.get(key, "absent")
        and not any(key == free or key.startswith(f"{free}.") for free in FREE_KEYS)
    ]
    if differing:
        key = differing[0]
        more = f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
        raise InputError(
            f"{workdir}: was trained with another config: config.{key} is "
            f"{saved.get(key, 'absent')!r} there and {wanted.get(key, 'absent')!r} now{more}; "
            "use another --workdir or the old value"
        )


def _check_writable(workdir: epath.Path) -> None:
    """Looks at the folder, or at the nearest one above it that exists."""
    if is_remote(workdir):
        return
    folder = next(path for path in (workdir, *workdir.absolute().parents) if path.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{workdir}: cannot be written ({folder} does not allow it)")


def write_config(workdir: str | os.PathLike[str], config: ml_collections.ConfigDict) -> None:
    """Writes config.json."""
    write_json(epath.Path(workdir) / "config.json", config_values(config))


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint read back.

    Attributes:
      step: finished steps.
      state: on the devices.
      position: of the data stream.
    """

    step: int
    state: TrainState
    position: dict[str, Any]


class Checkpoints:
    """Saves in the background and restores the newest good step; a context manager.

    Every process of the run must make the same calls.
    """

    def __init__(self, workdir: str | os.PathLike[str], keep: int, keep_every: int = 0) -> None:
        """Opens (or creates) the folder.

        Args:
          workdir: of the run.
          keep: how many of the newest steps stay.
          keep_every: multiples of this step stay for ever; 0 = none.
        """
        self.folder = epath.Path(workdir).absolute() / "checkpoints"
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, keep_period=keep_every or None, cleanup_tmp_directories=True
            ),
        )
        self._saving: int | None = None  # step on its way to the disk
        _leave_out_late_writes()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            with self._explained():
                self._manager.close()
        else:
            # A save that is under way shall finish, and must not hide what ended the run.
            with contextlib.suppress(Exception):
                self._manager.close()

    def save(self, step: int, state: TrainState, position: dict[str, Any]) -> None:
        """Takes a copy and returns; the commit under `step` happens in the background.

        Waits for the save before it. Raises WorkError when that one failed.
        """
        values = as_dict(state)
        with self._explained():
            self._manager.wait_until_finished()
            self._saving = step
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(_snapshot(values)),
                    input=ocp.args.JsonSave(position),
                    checksums=ocp.args.JsonSave(checksums(values)),
                ),
            )

    def check(self) -> None:
        """Raises WorkError when a save has failed since the last call."""
        with self._explained():
            self._manager.check_for_errors()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax passes on whatever the file system raised
            steps = [step for step in ocp.utils.checkpoint_steps(self.folder)]
            newest = f"the newest good one is step {max(steps)}" if steps else "there is none yet"
            raise WorkError(
                f"{self.folder}: the checkpoint of step {self._saving} could not be saved "
                f"({_reason(error)}); {newest}. Make room (or lower config.keep_checkpoints) and "
                "run the same command again"
            ) from error

    def restore(self, target: TrainState) -> Restored | None:
        """Reads the newest good step onto the shapes and placements of `target`; None if fresh.

        Steps that cannot be read, or whose arrays do not add up to their checksums, are moved to
        workdir/damaged with a warning once an older good one is found. All processes agree on the
        step. Raises InputError when the newest is of another model, or none can be read.
        """
        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            state, position, reason = self._read(step, target)
            if not distributed.everywhere(not reason):
                damaged[step] = reason or "another process cannot read it"
                continue
            self._set_aside(damaged, step)
            return Restored(step, state, position)
        if damaged:
            step, reason = next(iter(damaged.items()))
            raise InputError(
                f"{self.folder}: none of its {len(damaged)} checkpoint(s) can be read ({step}: "
                f"{reason}); use another --workdir"
            )
        return None

    def _read(
        self, step: int, target: TrainState
    ) -> tuple[TrainState | None, dict[str, Any] | None, str]:
        """(state, position, "") of a good step, or (None, None, reason)."""
        folder = self.folder / str(step)
        # Handlers, not the manager: it would wait for processes that have failed to read.
        arrays, values = ocp.StandardCheckpointHandler(), ocp.JsonCheckpointHandler()
        wanted = as_dict(target)
        reason = ""
        try:
            difference = _difference(arrays.metadata(folder / "state").tree, wanted)
            if not difference:
                abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, wanted)
                state = arrays.restore(folder / "state", args=ocp.args.StandardRestore(abstract))
                position = values.restore(folder / "input")
                saved = values.restore(folder / "checksums")
        except Exception as error:  # tensorstore, JSON and Orbax all raise their own kinds
            reason = _reason(error)
        if not distributed.everywhere(not reason):
            return None, None, reason
        if difference:
            raise InputError(
                f"{folder}: is a checkpoint of another model: {difference}; use the config it was "
                "made with or another --workdir"
            )
        wrong = [name for name, value in checksums(state).items() if saved.get(name) != value]
        if wrong:
            return None, None, f"checksum of {wrong[0]} does not match"
        return from_dict(target, state), position, ""

    def _set_aside(self, damaged: dict[int, str], good: int) -> None:
        """Moves damaged steps where nothing mistakes them for good ones; nothing is deleted."""
        if not damaged:
            return
        for step, reason in damaged.items() if distributed.is_lead() else ():
            aside = self.folder.parent / "damaged" / str(step)
            while aside.exists():
                aside = aside.with_name(f"{aside.name}_again")
            aside.parent.mkdir(parents=True, exist_ok=True)
            (self.folder / str(step)).rename(aside)
            logging.warning(
                "%s is damaged (%s): moved to %s; continuing from step %d",
                self.folder / str(step), reason, aside, good,
            )  # fmt: skip
        distributed.barrier("damaged checkpoints are set aside")
        self._manager.reload()


def _snapshot(values: dict[str, Any]) -> dict[str, Any]:
    """Arrays that the next, donating step cannot overwrite while they are being written.

    Orbax returns from `save` when everything is in host memory. On a CPU that is where the arrays
    are anyhow, so that it would keep looking at the training's own buffers.
    """
    if jax.default_backend() != "cpu":
        return values
    return jax.tree.map(jnp.copy, values)


def checksums(values: dict[str, Any]) -> dict[str, int]:
    """One number per array, by its path; any flipped bit changes it.

    Orbax checks its indices but not the arrays. Sums of integers do not depend on their order, so
    a checkpoint can be checked on any mesh, each device looking at its own part.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(values)
    sums = {}
    for path, leaf in flat:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        sums[name] = _checksum(leaf)
        distributed.settle(sums[name])
    return {name: int(value) for name, value in sums.items()}


@jax.jit
def _checksum(array: jax.Array) -> jax.Array:
    """Σ bits · (odd weight by position) mod 2³²; an odd weight leaves no bit out."""
    words = array.view(f"uint{8 * array.dtype.itemsize}").astype(jnp.uint32)
    weight = jnp.ones(array.shape, jnp.uint32)
    stride = 2
    for axis in reversed(range(array.ndim)):
        weight += jnp.uint32(stride % 2**32) * jax.lax.broadcasted_iota(
            jnp.uint32, array.shape, axis
        )
        stride *= array.shape[axis]
    return jnp.sum(words * weight, dtype=jnp.uint32)


def _difference(found: Any, wanted: dict[str, Any]) -> str:
    """The first array that differs in name or shape, in words; "" when there is none."""
    there, here = _shapes(found), _shapes(wanted)
    for name in sorted(there.keys() | here.keys()):
        if there.get(name) != here.get(name):
            return (
                f"{name} is {there.get(name, 'absent')} there and {here.get(name, 'absent')} in "
                "this config"
            )
    return ""


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in flat
    }


@functools.cache  # once per process
def _leave_out_late_writes() -> None:
    """Keeps the tracebacks of writes that end after another one has failed out of the output.

    The first failed write of a save ends Orbax's event loop; TensorStore then gives one error to
    `sys.unraisablehook` for each write still under way, some when all else is over: so for good,
    not for a while. The failure itself is raised and reported.
    """
    report = sys.unraisablehook

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            report(unraisable)

    sys.unraisablehook = hook


def _reason(error: Exception) -> str:
    """An error of a library in one short line: what it says first, and the cause at its end."""
    text = " ".join(str(error).split()).partition(" [tensorstore_spec")[0] or type(error).__name__
    return text if len(text) <= 200 else f"{text[:80]} … {text[-120:]}"
