"""A workdir: config.json and Orbax checkpoints, each of them whole or absent.

    workdir/config.json               the full config of the run
    workdir/checkpoints/<step>/state  parameters, EMA, optimizer (Orbax arrays)
    workdir/checkpoints/<step>/input  position in the data stream (JSON)

State and position are committed together by one rename, so a run killed at any moment resumes
without repeating or losing a batch. A workdir belongs to one config: it can be continued with other
cadences, more steps or moved data, but not with anything that would change the result.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jax
import ml_collections
import orbax.checkpoint as ocp

from see3d_jax.errors import InputError
from see3d_jax.files import write_json
from see3d_jax.training.state import TrainState, as_dict, from_dict

# What may change between two runs in one workdir. The mesh moves results only by rounding.
FREE_KEYS = (
    "num_steps",
    "checkpoint_every",
    "keep_checkpoints",
    "log_every",
    "sample_every",
    "data.path",
    "data.threads",
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
    workdir = Path(workdir)
    path = workdir / "config.json"
    if workdir.exists() and not workdir.is_dir():
        raise InputError(f"{workdir}: is a file; --workdir needs a folder")
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


def write_config(workdir: str | os.PathLike[str], config: ml_collections.ConfigDict) -> None:
    """Writes config.json."""
    write_json(Path(workdir) / "config.json", config_values(config))


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


class Checkpoints:
    """Saves and restores (state, input position) pairs; a context manager."""

    def __init__(self, workdir: str | os.PathLike[str], keep: int) -> None:
        self.folder = Path(workdir).absolute() / "checkpoints"
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                # Saving in the background would read buffers that the next step has donated.
                enable_async_checkpointing=False,
                cleanup_tmp_directories=True,
            ),
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exception: object) -> None:
        self._manager.close()

    def latest_step(self) -> int | None:
        """Newest complete step, or None in a fresh workdir."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, position: dict[str, Any]) -> None:
        """Commits both under `step`; returns when they are on disk."""
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(as_dict(state)), input=ocp.args.JsonSave(position)
            ),
        )
        self._manager.wait_until_finished()

    def restore(self, step: int, target: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Reads a step onto the devices and shardings of `target` (arrays or abstract arrays).

        Raises InputError naming the step's folder when it is damaged or of another model.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, as_dict(target))
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(abstract), input=ocp.args.JsonRestore()
                ),
            )
        except Exception as error:  # tensorstore, JSON and Orbax all raise their own kinds
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"{self.folder / str(step)}: cannot be restored ({reason}); delete this folder to "
                "continue from the checkpoint before it"
            ) from error
        return from_dict(target, restored["state"]), restored["input"]
