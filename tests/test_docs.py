"""The documentation: the site builds without a warning and stands alone; formulas, commands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from browser import chromium_page

from tools.docs_math import on_page_markdown

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    pytest.importorskip("mkdocs", reason="pip install '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    return folder


def test_every_page_is_there_and_in_the_menu(site) -> None:
    menu = (site / "index.html").read_text()
    for page in PAGES:
        assert (site / f"{page.stem}.html").is_file()
        assert f'href="{page.stem}.html"' in menu, f"add docs/{page.name} to nav in mkdocs.yml"


def test_nothing_is_loaded_from_elsewhere(site) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text()
        loaded = re.findall(r'<(?:script|img|iframe)[^>]+src="([^"]+)"', text)
        loaded += re.findall(
            r'<link[^>]+rel="(?:stylesheet|icon|preconnect)"[^>]+href="([^"]+)"', text
        )
        assert not [link for link in loaded if link.startswith(("http", "//"))], page


def test_pages_opened_from_disk_can_be_searched(site) -> None:
    with chromium_page(width=400, height=800, scheme="dark") as page:
        page.goto((site / "index.html").as_uri())
        page.keyboard.press("/")
        page.keyboard.type("photos without cameras")
        page.wait_for_selector(".md-search-result__link")
        assert page.locator(".md-search-result__link", has_text="Photos without cameras").count()


def test_formulas_and_functions_are_drawn(site) -> None:
    method = (site / "method.html").read_text()
    assert method.count("<math") >= 12 and "$" not in re.sub(
        r"<[^>]+>", "", method.split("<article")[1]
    )
    api = (site / "api.html").read_text()
    assert 'id="see3d_jax.pipelines.generation.generate"' in api
    assert 'id="see3d_jax.geometry.cameras.Camera"' in api


def test_dollars_in_code_are_no_formula() -> None:
    text = "```sh\necho $A $B\n```\nand `$HOME/$X`, 36 $ and 54 $k; but $x_1$ is.\n\n$$ y $$\n"
    done = on_page_markdown(text)
    assert "echo $A $B" in done and "`$HOME/$X`" in done and "36 $ and 54 $k" in done
    assert done.count("<math") == 2


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_exists(page) -> None:
    text = page.read_text()
    for module in set(
        re.findall(r"python -m ((?:tools|benchmarks|data_prep|see3d_jax)\.\w+)", text)
    ):
        place = ROOT / module.replace(".", "/")
        found = place.with_suffix(".py").is_file() or (place / "__main__.py").is_file()
        assert found, f"{page.name}: {module}"
    for config in set(re.findall(r"configs/\w+(?:/\w+)*\.py", text)):
        assert (ROOT / config).is_file(), f"{page.name}: {config}"
    for file in set(re.findall(r"`((?:see3d_jax/)?(?:geometry|diffusion|models|splatting|pipelines|"
                               r"evaluation)/[\w/]+\.py)`", text)):  # fmt: skip
        assert any((ROOT / top / file).is_file() for top in ("", "see3d_jax")), (
            f"{page.name}: {file}"
        )
