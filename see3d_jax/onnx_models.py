"""Opens ONNX models that the user names: detectors and trackers of curation, depth, matching."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from see3d_jax.errors import InputError

if TYPE_CHECKING:
    import onnxruntime

_ONLY_ERRORS = 3  # severity: onnxruntime warns of harmless things in most exported models


def open_session(
    path: str | os.PathLike[str], option: str, extra: str, threads: int = 0
) -> onnxruntime.InferenceSession:
    """The model, on the GPU when onnxruntime has one; InputError names `option` and the file.

    Args:
      path: .onnx file.
      option: of the command line, that names the file.
      extra: of this package, that installs onnxruntime.
      threads: per operation; 0 = all cores.
    """
    if not os.path.isfile(path):
        raise InputError(f"{option} {path}: no such file")
    try:
        import onnxruntime
    except ImportError:
        raise InputError(
            f"{option} {path}: .onnx files need onnxruntime (pip install 'see3d_jax[{extra}]')"
        ) from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = _ONLY_ERRORS
    wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
    providers = [name for name in wanted if name in onnxruntime.get_available_providers()]
    try:
        return onnxruntime.InferenceSession(os.fspath(path), options, providers=providers)
    except Exception as error:  # the library has a class of error per cause
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"{option} {path}: not an ONNX network ({reason})") from None
