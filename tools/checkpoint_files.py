"""Reading and writing checkpoint files one tensor at a time.

A full model is 1.3 billion numbers; here at most one tensor of it is in memory. `.safetensors` is
the preferred input. `.pt`, `.ckpt` and `.bin` are pickles: they are read through PyTorch (the extra
`convert`) with `weights_only=True`, memory-mapped, and refused if they hold anything but tensors.
The library's writer wants the whole file in memory, so the format (8 bytes of length, a JSON
header, raw little-endian tensors) is written here.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from see3d_jax.errors import InputError
from see3d_jax.files import atomic_path

PICKLES = (".pt", ".pth", ".ckpt", ".bin")
_BFLOAT16 = np.dtype(jnp.bfloat16)
_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": _BFLOAT16,
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Tensors:
    """The tensors of a file, by name, read when asked for.

    Attributes:
      path: where they are from, for messages.
      shapes: shape of every tensor.
      dtypes: type of every tensor.
      read: gives one tensor as a NumPy array of its stored type.
    """

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, np.dtype]
    read: Callable[[str], np.ndarray]


def open_tensors(path: Path) -> Tensors:
    """Opens a checkpoint; InputError if it is missing, broken or of another kind."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    if path.suffix in PICKLES:
        return _open_pickle(path)
    raise InputError(f"{path}: expected .safetensors or one of {', '.join(PICKLES)}")


def write_safetensors(
    target: Path,
    plan: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    tensors: Iterator[tuple[str, np.ndarray]],
) -> None:
    """Writes a safetensors file atomically, in the order of the plan, one tensor at a time.

    Args:
      target: the file.
      plan: type and shape of every tensor.
      tensors: (name, value) in the same order.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in plan.items():
        size = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        span = [offset, offset + size]
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": span}
        offset += size
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensors start aligned
    with atomic_path(target) as temporary, temporary.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for (name, (dtype, shape)), (given, value) in zip(plan.items(), tensors, strict=True):
            if (given, value.dtype, value.shape) != (name, dtype, tuple(shape)):
                raise ValueError(
                    f"planned {name} {dtype}{shape}, got {given} {value.dtype}{value.shape}"
                )
            file.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)


def _open_safetensors(path: Path) -> Tensors:
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: is no whole safetensors file ({reason})") from None
    slices = {name: file.get_slice(name) for name in file.keys()}
    unknown = {part.get_dtype() for part in slices.values()} - _DTYPES.keys()
    if unknown:
        raise InputError(f"{path}: holds tensors of types {sorted(unknown)}, which are not weights")
    return Tensors(
        path=path,
        shapes={name: tuple(part.get_shape()) for name, part in slices.items()},
        dtypes={name: _DTYPES[part.get_dtype()] for name, part in slices.items()},
        read=file.get_tensor,
    )


def _open_pickle(path: Path) -> Tensors:
    try:
        import torch
    except ImportError:
        raise InputError(
            f"{path}: reading {path.suffix} files needs PyTorch (pip install "
            "'see3d_jax[convert]'); .safetensors files do not"
        ) from None
    try:
        state = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except pickle.UnpicklingError as error:
        if "weights only" in str(error).lower():
            raise InputError(
                f"{path}: refused: besides tensors it holds objects that would run code when "
                "loaded; get it as .safetensors, or save its state dict alone"
            ) from None
        raise InputError(f"{path}: is no PyTorch checkpoint, or a damaged one") from None
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"{path}: is no whole PyTorch checkpoint ({reason})") from None
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]  # Lightning wraps it
    if not isinstance(state, dict) or not state:
        raise InputError(f"{path}: holds no state dict (a dictionary of tensors)")
    strange = [str(name) for name, x in state.items() if not isinstance(x, torch.Tensor)]
    if strange:
        raise InputError(f"{path}: {strange[0]} is not a tensor; expected a plain state dict")

    def read(name: str) -> np.ndarray:
        value = state[name].detach().contiguous()
        if value.dtype == torch.bfloat16:
            return value.view(torch.int16).numpy().view(_BFLOAT16)
        return value.numpy()

    return Tensors(
        path=path,
        shapes={name: tuple(value.shape) for name, value in state.items()},
        dtypes={
            name: _BFLOAT16
            if value.dtype == torch.bfloat16
            else torch.empty(0, dtype=value.dtype).numpy().dtype
            for name, value in state.items()
        },
        read=read,
    )
