"""The comparison of RAFT behind `tools.parity`: recorded flows of the official weights.

A golden holds consecutive frames and, per pair, the flow at 1/8 resolution, at full resolution with
the padding still on, and resized to the frames in both directions. The weights are found by their
name, raft-*.pth or .safetensors, in a folder above. The masks and matrices beside the flows belong
to the official filter, which ours replaces, and are not compared.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.raft import LARGE, SMALL, estimate, network, pad, parameter_shapes, resize
from see3d_jax.errors import InputError
from tools.checkpoint_files import open_tensors
from tools.convert_raft import convert
from tools.parity_cases import Goldens, Result

MEAN_TOLERANCE = 1e-4
TOLERANCE = 1e-3  # px
# An ill-conditioned clip moves as far between two of PyTorch's own kernels: allow several times it.
KERNEL_SPREADS = 6.0


def run_flow(path: Path, spec: Mapping[str, Any], goldens: Goldens) -> Iterator[Result]:
    """Every pair of frames of one file."""
    weights = [
        file
        for suffix in (".safetensors", ".pth")  # the second kind needs torch
        for folder in (path.parent, *path.resolve().parents[1:3])
        for file in sorted(folder.glob(f"raft-*{suffix}"))
    ]
    if not weights:
        raise InputError(f"{path}: no RAFT weights (raft-*.pth) in or above its folder")
    if weights[0].suffix == ".pth" and importlib.util.find_spec("torch") is None:
        yield Result("", skipped=f"{weights[0].name} needs torch: pip install torch")
        return
    parameters = convert(open_tensors(weights[0]))
    shapes = {name: value.shape for name, value in parameters.items()}
    variant = LARGE if shapes == parameter_shapes(LARGE) else SMALL
    arrays = open_tensors(path.with_suffix(".safetensors"))
    spread = KERNEL_SPREADS * spec.get("verify", {}).get("other_conv_kernels_flow_up_max_abs", 0.0)
    limit = max(TOLERANCE, spread)
    mean_limit = MEAN_TOLERANCE * limit / TOLERANCE
    left, right, above, below = spec["pad_lrtb"]
    height, width = spec["raft_in_hw"]
    size = (height - above - below, width - left - right)
    for pair in sorted(spec["pairs"], key=int):
        first, second = (arrays.read(f"frame{int(pair) + i}_u8") for i in (0, 1))
        ours = {
            "flow_fwd": estimate(parameters, variant, first, second, size, spec["iters"]),
            "flow_bwd": estimate(parameters, variant, second, first, size, spec["iters"]),
        }
        if f"pair{pair}.fwd_low" in arrays.shapes:
            padded = [pad(resize(frame, size)) for frame in (first, second)]
            for name, flow in zip(
                ("fwd_low", "fwd_up_padded"),
                network(parameters, variant, *padded, spec["iters"]),
            ):
                ours[name] = np.asarray(flow).transpose(0, 3, 1, 2)
        errors = {}
        for name, flow in ours.items():
            difference = np.abs(flow - arrays.read(f"pair{pair}.{name}"))
            errors[name] = (float(difference.max()), limit)
            errors[f"{name} (mean)"] = (float(difference.mean()), mean_limit)
        yield Result(f"/pair{pair}", errors)
