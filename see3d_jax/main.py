"""Trains the multi-view diffusion model.

    python -m see3d_jax.main --config=configs/tiny.py --workdir=DIR --config.data.path=CLIPS

CLIPS is a folder of shards made by `python -m data_prep.curate` or `python -m data_prep.synthetic`.
Any value of the config file can be overridden as --config.key=value; unknown keys are refused.
Running the same command again continues from the newest checkpoint in DIR, bit for bit.

DIR gets config.json, checkpoints/, metrics.jsonl, events/ (TensorBoard), samples/step_XXXXXX.png
(reference | condition | prediction | truth) and parameters.txt.

Examples:

  # a small model on the CPU, in minutes
  python -m see3d_jax.main --config=configs/tiny.py --workdir=runs/tiny --config.data.path=clips

  # longer, with other cadences and another seed
  python -m see3d_jax.main --config=configs/tiny.py --workdir=runs/long --config.data.path=clips \\
      --config.num_steps=20000 --config.checkpoint_every=1000 --config.seed=7

  # look at the curves
  tensorboard --logdir runs
"""

from __future__ import annotations

import difflib
import runpy
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags, logging
from ml_collections import config_flags

from see3d_jax.errors import InputError, run_command

if TYPE_CHECKING:
    import ml_collections

HELP_FLAGS = ("-h", "-help", "--help", "-helpfull", "--helpfull")


def parse_arguments(argv: list[str]) -> tuple[ml_collections.ConfigDict, Path]:
    """Command line → (locked config with overrides applied, workdir).

    Raises InputError for anything missing, unknown or of the wrong type.
    """
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", None, "Config file.", flag_values=values, sys_argv=argv
    )
    flags.DEFINE_string("workdir", None, "Where the run lives.", flag_values=values)
    _check_config_file(_config_path(argv))
    try:
        rest = values(argv)
    except flags.UnrecognizedFlagError as error:
        raise InputError(f"unknown flag --{error.flagname}{_similar(error, values)}") from None
    except (AttributeError, KeyError) as error:  # how a locked ConfigDict refuses a key
        raise InputError(f"{_unknown_key(argv, error)}") from None
    except (flags.Error, TypeError, ValueError, OSError) as error:
        raise InputError(f"bad argument: {error}") from None
    if len(rest) > 1:
        raise InputError(f"unexpected argument {rest[1]!r}; options look like --config.key=value")
    if not values.workdir:
        raise InputError("--workdir is missing: give a folder for checkpoints and logs")
    return values.config, Path(values.workdir)


def _config_path(argv: list[str]) -> str:
    for index, argument in enumerate(argv[1:], start=1):
        name, equals, value = argument.partition("=")
        if name in ("--config", "-config"):
            return value if equals else "".join(argv[index + 1 : index + 2])
    raise InputError("--config is missing: give a config file, e.g. --config=configs/tiny.py")


def _check_config_file(path: str) -> None:
    """Loads it once by itself, so that its own errors are told apart from bad overrides."""
    if not Path(path).is_file():
        raise InputError(f"{path!r}: no such config file (configs/tiny.py is one)")
    try:
        runpy.run_path(path)["get_config"]()
    except Exception as error:  # a config file is code: anything can go wrong in it
        raise InputError(
            f"{path}: not a usable config file ({type(error).__name__}: {error}); it must be "
            "Python with a function get_config"
        ) from error


def _similar(error: flags.UnrecognizedFlagError, values: flags.FlagValues) -> str:
    close = difflib.get_close_matches(error.flagname, list(values), 1)
    return f"; did you mean --{close[0]}?" if close else "; see --help"


def _unknown_key(argv: list[str], error: Exception) -> str:
    """Names the override that hit a missing key, as the user wrote it."""
    message = " ".join(str(error).strip("'\"").split())
    for argument in argv[1:]:
        key = argument.lstrip("-").partition("=")[0]
        if key.startswith("config.") and key.rpartition(".")[2] in message:
            return f"unknown config key --{key}; the config file lists the keys there are"
    return f"unknown config key: {message}"


def main() -> None:
    """Entry point of `python -m see3d_jax.main`."""
    if any(argument in HELP_FLAGS for argument in sys.argv[1:]):
        print(__doc__)
        sys.exit(0)
    run_command(_run)


def _run() -> int:
    config, workdir = parse_arguments(sys.argv)
    logging.use_absl_handler()
    logging.set_verbosity(logging.WARNING)
    from see3d_jax.training.loop import train  # imports jax; --help and typos should not wait

    train(config, workdir)
    return 0


if __name__ == "__main__":
    main()
