"""Enforces the import table of the architecture: low layers never import high ones."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Leaves without any meaning of their own in 3D or learning; every layer may use them.
BASE = (
    "see3d_jax.errors", "see3d_jax.files", "see3d_jax.html", "see3d_jax.media",
    "see3d_jax.onnx_models",
)  # fmt: skip
METRICS = ("see3d_jax.evaluation.metrics", "see3d_jax.evaluation.lpips")
# package -> what of ours it may import, besides itself and BASE. First matching prefix wins.
ALLOWED = {
    "see3d_jax.geometry": (),
    "see3d_jax.models": (),
    "see3d_jax.data": ("see3d_jax.geometry",),
    "see3d_jax.diffusion": ("see3d_jax.models",),
    "see3d_jax.evaluation.metrics": ("see3d_jax.models.layers",),
    "see3d_jax.evaluation.lpips": ("see3d_jax.models.layers",),
    "see3d_jax.evaluation.benchmark": ("see3d_jax.pipelines", "see3d_jax.geometry", *METRICS),
    "see3d_jax.splatting": ("see3d_jax.geometry", *METRICS),
    "see3d_jax.training": (
        "see3d_jax.data", "see3d_jax.models", "see3d_jax.diffusion", *METRICS,
    ),
    "see3d_jax.pipelines": (
        "see3d_jax.geometry", "see3d_jax.models", "see3d_jax.diffusion", "see3d_jax.splatting",
        *METRICS,
    ),
    "data_prep": ("see3d_jax.data.records", "see3d_jax.geometry"),
    **dict.fromkeys(BASE, ()),
}  # fmt: skip
ANYTHING = (
    "see3d_jax.main", "see3d_jax.cli", "see3d_jax.viewer", "see3d_jax.viewer_server",
    "see3d_jax.info", "tools", "benchmarks", "configs",
)  # fmt: skip
# third-party module -> where of ours it may be imported
THIRD_PARTY = {
    "cv2": ("data_prep", "see3d_jax.data", "see3d_jax.pipelines", "benchmarks"),
    "decord": ("data_prep", "see3d_jax.data", "see3d_jax.pipelines", "benchmarks"),
    "torch": ("tools", "benchmarks"),
    "tensorflow": (),
}


def _inside(module: str, packages: tuple[str, ...] | list[str]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def _modules() -> list[tuple[str, Path]]:
    found = []
    for top in ("see3d_jax", "data_prep", "tools", "benchmarks", "configs"):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found.append((".".join(p for p in parts if p != "__init__"), path))
    return found


def _imports(path: Path) -> list[str]:
    """Every absolute dotted name that the file imports, also inside functions."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the full name"
            # `from package import module` may import a module: check the longer name as well
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


@pytest.mark.parametrize("module, path", _modules(), ids=lambda value: str(value))
def test_imports_go_downward(module: str, path: Path) -> None:
    for name in _imports(path):
        for third, places in THIRD_PARTY.items():
            assert not _inside(name, [third]) or _inside(module, places), (
                f"{module} imports {name}; {third} is allowed only in {places}"
            )
        if not _inside(name, ["see3d_jax", "data_prep", "tools", "benchmarks", "configs"]):
            continue
        assert not _inside(name, ["see3d_jax.main"]), f"{module} imports main; nothing may"
        command = module.startswith("see3d_jax.cli_")
        if _inside(module, ANYTHING) or command or module == "see3d_jax":
            continue
        layer = next((layer for layer in ALLOWED if _inside(module, [layer])), None)
        assert layer, f"{module} is in no layer of the import table; add it to design and here"
        assert _inside(name, [layer, *ALLOWED[layer], *BASE]), (
            f"{module} ({layer}) imports {name}; allowed: {ALLOWED[layer]}"
        )
        assert not (_inside(module, ["see3d_jax"]) and _inside(name, ["data_prep", "tools"]))


def test_no_tensorflow_or_torch_is_imported_by_the_core() -> None:
    import subprocess
    import sys

    code = (
        "import sys, see3d_jax.cli, see3d_jax.main, data_prep.curate, data_prep.synthetic;"
        "bad = {'tensorflow', 'torch'} & set(sys.modules); assert not bad, bad;"
        "import jax; assert not jax._src.xla_bridge._backends, 'a device was touched at import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
