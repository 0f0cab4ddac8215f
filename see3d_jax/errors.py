"""How this project fails in front of a user: one clear line, never a traceback.

Anything the *user* got wrong (a missing path, a broken file, an unknown config key) is raised as
`InputError` at the boundary where it is first seen; every command line runs through `run_command`,
which turns it into one line on stderr and a non-zero exit code. Everything else stays a traceback,
because it is our bug and the traceback is what we need to fix it.

Exit codes: 0 success, 1 the work failed (disk full, nothing usable in the input), 2 bad input or
usage, 130 interrupted.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from typing import NoReturn


class InputError(ValueError):
    """A mistake in what the user gave: names the file or field, and what to do about it."""


class WorkError(RuntimeError):
    """Input was well-formed but the work could not be finished (e.g. every file was rejected)."""


def run_command(command: Callable[[], object]) -> NoReturn:
    """Runs a command body and exits the process with the documented code.

    `command` may return an int exit code; None means success. click usage errors are printed in
    one line as well, so that `run_command(lambda: app(standalone_mode=False))` is all a CLI needs.
    """
    import click

    try:
        code = command()
        sys.exit(code if isinstance(code, int) else 0)
    except InputError as error:
        _fail(str(error), 2)
    except WorkError as error:
        _fail(str(error), 1)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.ClickException as error:
        _fail(f"{error.format_message()} (see --help)", error.exit_code or 2)
    except (KeyboardInterrupt, click.Abort):
        _fail("interrupted", 130)
    except OSError as error:  # full disk, no permission, a file where a folder is needed …
        if error.errno is None:
            raise
        where = f"{error.filename}: " if error.filename else ""
        hint = _HINTS.get(error.errno)
        _fail(f"{where}{error.strerror}{f'; {hint}' if hint else ''}", 1)


_HINTS = {
    errno.ENOSPC: "free some space on that disk and run the same command again",
    errno.EDQUOT: "your share of that disk is used up; free some and run the same command again",
    errno.EACCES: "no permission; give another place, or ask its owner",
    errno.EPERM: "no permission; give another place, or ask its owner",
    errno.EROFS: "that place cannot be written to; give another one",
    errno.ENOTDIR: "a file stands where a folder is needed; give another place",
}


def _fail(message: str, code: int) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)
