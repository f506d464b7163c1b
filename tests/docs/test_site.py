"""The site of `docs/` builds without a warning, shows its pictures, and describes the whole public
API."""

import html
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dreambooth_moslora

ROOT = Path(__file__).resolve().parents[2]
API = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
built_by = pytest.mark.extra("mkdocs", "material", "mkdocstrings", "ruff")  # docs/requirements.txt


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False)
    assert built.returncode == 0, built.stderr.decode()
    return out


@built_by
def test_every_page_is_built_and_every_picture_is_there(site):
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"}
    assert {path.parent.name for path in site.glob("*/index.html")} == pages
    assert not (site / "requirements.txt").exists()
    block_count = 0
    for page in site.rglob("*.html"):
        for name in re.findall(r'<img[^>]* src="([^":]+)"', page.read_text(encoding="utf-8")):
            assert (page.parent / name).is_file(), f"{page}: {name}"
            block_count += 1
    assert block_count >= 5


@built_by
def test_the_api_page_has_docstrings_and_whole_signatures(site):
    page = (site / "api" / "index.html").read_text(encoding="utf-8")
    for name in set(dreambooth_moslora.__all__) - {"__version__"}:
        assert re.search(rf'id="dreambooth_moslora\.[a-z_.]+\.{name}"', page), name
    assert "Raises UserError" in page
    signatures = re.findall(r'<div class="[^"]*doc-signature.*?</pre>', page, re.S)
    signature_texts = [re.sub(r"<[^>]+>", "", text) for text in signatures]
    lines = [html.unescape(line) for text in signature_texts for line in text.splitlines()]
    assert len(signature_texts) > 8 and max(map(len, lines)) <= 72, max(lines, key=len)


def test_the_api_page_names_what_the_package_exports():
    documented_names = {
        target.rpartition(".")[2] for target in re.findall(r"^::: (\S+)$", API, re.MULTILINE)
    }
    assert documented_names == set(dreambooth_moslora.__all__) - {"__version__"}
