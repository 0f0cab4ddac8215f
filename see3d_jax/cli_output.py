"""What every command of `see3d` says, and how: one grammar for people and for scripts.

Results go to stdout, notes and progress to stderr. `--quiet` leaves only errors; `--json` prints
one JSON object on stdout instead of sentences, and no progress. Errors are one line on stderr
either way, and the exit code tells (see `errors`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import click

_MODE = "see3d_jax.mode"  # in the context: None, "quiet" or "json"


def output_options(command: Callable) -> Callable:
    """Adds --quiet and --json to a command; `say`, `note` and `finish` obey them."""
    for name, flags, text in (
        ("json", ("--json", "as_json"), "One JSON object on stdout, no progress: for scripts."),
        ("quiet", ("-q", "--quiet"), "Say nothing but errors."),
    ):
        command = click.option(
            *flags, is_flag=True, expose_value=False, is_eager=True, help=text,
            callback=_set(name),
        )(command)  # fmt: skip
    return command


def _set(name: str) -> Callable:
    def callback(context: click.Context, parameter: click.Parameter, value: bool) -> None:
        del parameter
        if value:
            context.meta[_MODE] = "json" if "json" in (name, context.meta.get(_MODE)) else name
            os.environ["TQDM_DISABLE"] = "1"  # read when the bars are first imported

    return callback


def _mode() -> str | None:
    context = click.get_current_context(silent=True)
    return context.meta.get(_MODE) if context else None


def shows_progress() -> bool:
    """Whether progress bars are wanted."""
    return _mode() is None


def say(text: str) -> None:
    """A line for people, on stdout."""
    if _mode() is None:
        click.echo(text)


def note(text: str) -> None:
    """A line beside the result, on stderr: a warning, a choice that was made, progress."""
    if _mode() is None:
        click.echo(text, err=True)


def finish(text: str, **values: Any) -> None:
    """The result: a sentence for people, or with --json `values` as one object."""
    if _mode() == "json":
        click.echo(json.dumps(values, default=str, allow_nan=False))
    else:
        say(text)
