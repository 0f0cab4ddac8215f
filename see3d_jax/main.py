"""Trains the multi-view diffusion model.

    python -m see3d_jax.main --config=configs/tiny.py --workdir=DIR --config.data.path=CLIPS

CLIPS is a folder of shards made by `python -m data_prep.curate` or `python -m data_prep.synthetic`.
Any value of the config file can be overridden as --config.key=value; unknown keys are refused.
Running the same command again continues from the newest checkpoint in DIR, bit for bit.

DIR gets config.json, checkpoints/, metrics.jsonl, events/ (TensorBoard), samples/step_XXXXXX.png
(reference | condition | prediction | truth) and parameters.txt. It may be a bucket (gs://…).

Of several processes each runs this command. On TPU pods and under SLURM they find each other;
anywhere else give --coordinator=HOST:PORT --num_processes=N --process_id=I, or the variables
JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. --num_processes=1 looks for nobody.

Examples:

  # a small model on the CPU, in minutes
  python -m see3d_jax.main --config=configs/tiny.py --workdir=runs/tiny --config.data.path=clips

  # longer, with other cadences and another seed
  python -m see3d_jax.main --config=configs/tiny.py --workdir=runs/long --config.data.path=clips \\
      --config.num_steps=20000 --config.checkpoint_every=1000 --config.seed=7

  # two processes on one machine, as a rehearsal
  for i in 0 1; do python -m see3d_jax.main --config=configs/tiny.py --workdir=runs/two \\
      --config.data.path=clips --coordinator=localhost:1234 --num_processes=2 --process_id=$i & done

  # look at the curves
  tensorboard --logdir runs
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from absl import flags, logging
from etils import epath

from see3d_jax.errors import InputError, run_command
from see3d_jax.training.config_flags import parse_config

if TYPE_CHECKING:
    import ml_collections

HELP_FLAGS = ("-h", "-help", "--help", "-helpfull", "--helpfull")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The command line.

    Attributes:
      config: locked, with overrides applied.
      workdir: folder or bucket path of the run.
      coordinator, num_processes, process_id, join_seconds: see `training.distributed.start`.
    """

    config: ml_collections.ConfigDict
    workdir: epath.Path
    coordinator: str
    num_processes: int | None
    process_id: int | None
    join_seconds: int


def parse_arguments(argv: list[str]) -> Arguments:
    """Raises InputError for anything missing, unknown or of the wrong type."""
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "Where the run lives.", flag_values=values)
    flags.DEFINE_string("coordinator", None, "host:port of process 0.", flag_values=values)
    flags.DEFINE_integer("num_processes", None, "Processes in all.", flag_values=values)
    flags.DEFINE_integer("process_id", None, "Number of this process.", flag_values=values)
    flags.DEFINE_integer("join_seconds", 300, "How long to wait for all.", flag_values=values)
    parse_config(argv, values)
    if not values.workdir:
        raise InputError("--workdir is missing: give a folder for checkpoints and logs")
    environment = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
    coordinator, count, index = (os.environ.get(name) for name in environment)
    return Arguments(
        config=values.config,
        workdir=epath.Path(values.workdir),
        coordinator=values.coordinator or coordinator or "",
        num_processes=_number(values.num_processes, count, environment[1]),
        process_id=_number(values.process_id, index, environment[2]),
        join_seconds=values.join_seconds,
    )


def _number(flag: int | None, variable: str | None, name: str) -> int | None:
    if flag is not None or not variable:
        return flag
    if not variable.isdecimal():
        raise InputError(f"environment variable {name}: want a number, got {variable!r}")
    return int(variable)


def main() -> None:
    """Entry point of `python -m see3d_jax.main`."""
    if any(argument in HELP_FLAGS for argument in sys.argv[1:]):
        print(__doc__)
        sys.exit(0)
    run_training(_run)


def run_training(command: Callable[[], object]) -> NoReturn:
    """`run_command`, and a process that has failed goes at once.

    An orderly end would wait for the other processes of the run, which wait for this one; and reads
    and writes that were given up would print tracebacks meanwhile.
    """
    try:
        run_command(command)
    except SystemExit as end:
        if end.code:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(int(end.code))
        raise


def _run() -> int:
    arguments = parse_arguments(sys.argv)
    prepare_logging()
    # These import jax; --help and typos should not wait.
    from see3d_jax.training import distributed
    from see3d_jax.training.loop import train

    distributed.start(
        arguments.coordinator,
        arguments.num_processes,
        arguments.process_id,
        arguments.join_seconds,
    )
    train(arguments.config, arguments.workdir)
    return 0


def prepare_logging() -> None:
    """Warnings on stderr, and of a failure only the one line that `run_command` prints.

    Orbax logs the traceback of what it then raises, asyncio those of the reads and writes that were
    given up with it, and these in turn report to an event loop that is gone.
    """
    flags.FLAGS.mark_as_parsed()  # or absl says that nobody parsed them
    logging.use_absl_handler()
    logging.set_verbosity(logging.WARNING)
    logging.get_absl_handler().addFilter(lambda record: not record.exc_info)
    unhandled = sys.excepthook

    def report(kind: type[BaseException], error: BaseException, trace: object) -> None:
        if str(error) != "Event loop is closed":
            unhandled(kind, error, trace)

    sys.excepthook = report


if __name__ == "__main__":
    main()
