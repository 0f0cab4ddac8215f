"""The flags --config=FILE and --config.key=value, the same for every command that takes a config.

A config file is Python with a function get_config. What cannot be used (no such file, an unknown
key, a value of the wrong type) is an InputError that names it. Imports no JAX, so that a typo
answers at once.
"""

from __future__ import annotations

import difflib
import runpy
from collections.abc import Iterable
from pathlib import Path

import ml_collections
from absl import flags
from ml_collections import config_flags

from see3d_jax.errors import InputError


def parse_config(
    argv: list[str], values: flags.FlagValues | None = None
) -> ml_collections.ConfigDict:
    """The locked config of a command line, with overrides applied.

    Args:
      argv: name of the command, then its flags.
      values: flags that the command has besides; they are given their values.
    """
    values = flags.FlagValues() if values is None else values
    config_flags.DEFINE_config_file(
        "config", None, "Config file.", flag_values=values, sys_argv=argv
    )
    keys = _keys(_load(_config_path(argv)))
    try:
        rest = values(argv)
    except flags.UnrecognizedFlagError as error:
        raise InputError(
            f"unknown flag --{error.flagname}{_similar(error.flagname, values, 'see --help')}"
        ) from None
    except (AttributeError, KeyError):  # how a locked ConfigDict refuses a key
        raise InputError(_unknown_key(argv, keys)) from None
    except (flags.Error, TypeError, ValueError, OSError) as error:
        raise InputError(f"bad argument: {error}") from None
    if len(rest) > 1:
        raise InputError(f"unexpected argument {rest[1]!r}; options look like --config.key=value")
    return values.config


def _config_path(argv: list[str]) -> str:
    for index, argument in enumerate(argv[1:], start=1):
        name, equals, value = argument.partition("=")
        if name in ("--config", "-config"):
            return value if equals else "".join(argv[index + 1 : index + 2])
    raise InputError("--config is missing: give a config file, e.g. --config=configs/tiny.py")


def _load(path: str) -> ml_collections.ConfigDict:
    """Loads it once by itself, so that its own errors are told apart from bad overrides."""
    if not Path(path).is_file():
        raise InputError(f"{path!r}: no such config file (configs/tiny.py is one)")
    try:
        return runpy.run_path(path)["get_config"]()
    except Exception as error:  # a config file is code: anything can go wrong in it
        raise InputError(
            f"{path}: not a usable config file ({type(error).__name__}: {error}); it must be "
            "Python with a function get_config"
        ) from error


def _keys(config: ml_collections.ConfigDict, section: str = "config") -> list[str]:
    """Every key and section as a flag names it: config.seed, config.data, config.data.path …"""
    found = []
    for key, value in config.items():
        found.append(f"{section}.{key}")
        if isinstance(value, ml_collections.ConfigDict):
            found += _keys(value, found[-1])
    return found


def _unknown_key(argv: list[str], keys: list[str]) -> str:
    """Names the override that hit a missing key, as the user wrote it, and the nearest there is."""
    for argument in argv[1:]:
        key = argument.lstrip("-").partition("=")[0]
        if key.startswith("config.") and key not in keys:
            hint = _similar(key, keys, "the config file lists the keys there are")
            return f"unknown config key --{key}{hint}"
    return "unknown config key; the config file lists the keys there are"


def _similar(name: str, known: Iterable[str], otherwise: str) -> str:
    close = difflib.get_close_matches(name, list(known), 1, cutoff=0.8)
    return f"; did you mean --{close[0]}?" if close else f"; {otherwise}"
