"""One training process, as a test starts it: a small run that can be told to die somewhere.

    python run_process.py '{"workdir": …, "data": …, "overrides": {…}, "fault": [kind, count],
                            "join": [coordinator, number of processes, number of this one]}'

Faults strike at the `count`-th time, counted from 1 in this process: `step` kills it (SIGKILL) when
that step is about to be taken, `sigterm` sends SIGTERM there; `saving` kills it when a save has
returned and is being written in the background, `commit` and `committed` right before and after the
rename that makes a checkpoint visible.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import sys


def install_fault(kind: str, count: int) -> None:
    from see3d_jax.training import checkpoint, loop

    calls = itertools.count(1)
    number = signal.SIGTERM if kind == "sigterm" else signal.SIGKILL

    def strike():
        if next(calls) == count:
            os.kill(os.getpid(), number)

    def before(function):
        return lambda *args, **kwargs: (strike(), function(*args, **kwargs))[1]

    def after(function):
        return lambda *args, **kwargs: (function(*args, **kwargs), strike())[0]

    def at_commit(wrap):
        rename, struck = os.rename, wrap(os.rename)

        def renamed(source, target, **kwargs):
            is_commit = re.search(r"checkpoints/\d+/?$", str(target))
            return (struck if is_commit else rename)(source, target, **kwargs)

        os.rename = renamed

    if kind in ("step", "sigterm"):
        loop.train_step = before(loop.train_step)
    elif kind == "saving":
        checkpoint.Checkpoints.save = after(checkpoint.Checkpoints.save)
    else:
        at_commit({"commit": before, "committed": after}[kind])


def main() -> None:
    from test_training import minuscule

    from see3d_jax.main import prepare_logging, run_training
    from see3d_jax.training import distributed, loop, sharding

    options = json.loads(sys.argv[1])
    prepare_logging()
    sharding.MIN_SPLIT_BYTES = 1024  # so that small weights are split as large ones are
    if "fault" in options:
        install_fault(*options["fault"])
    config = minuscule(options["data"], **options["overrides"])

    def run() -> None:
        distributed.start(*options.get("join", ()))
        loop.train(config, options["workdir"])

    run_training(run)


if __name__ == "__main__":
    main()
