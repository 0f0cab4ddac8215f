"""Opens ONNX models that the user names: a detector of stage 2, a point tracker of stage 4."""

from __future__ import annotations

from typing import TYPE_CHECKING

from see3d_jax.errors import InputError

if TYPE_CHECKING:
    import onnxruntime


def open_session(path: str, option: str) -> onnxruntime.InferenceSession:
    """The model, on the GPU when onnxruntime has one; InputError naming `option` and the file."""
    try:
        import onnxruntime
    except ImportError:
        raise InputError(
            f"{option} {path}: .onnx files need onnxruntime (pip install 'see3d_jax[curate]')"
        ) from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # one video per core
    wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
    providers = [name for name in wanted if name in onnxruntime.get_available_providers()]
    try:
        return onnxruntime.InferenceSession(path, options, providers=providers)
    except Exception as error:  # the library has a class of error per cause
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"{option} {path}: cannot be loaded ({reason})") from None
