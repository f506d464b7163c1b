"""Let mkdocs publish the pictures of `assets/`, which is not below `docs/`: a hook.

A page links to `../assets/pictures/recipe.jpg`, which is right when the repository is browsed. For
the site, the picture is added as `assets/pictures/recipe.jpg`, and the pages' links are changed to
that.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
IMAGE_LINK_PATTERN = re.compile(r"\]\(\.\./(assets/[^)\s]+\.(?:png|jpg|webp))\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add each existing picture that a page links to; mkdocs warns about missing ones."""
    texts = [page.content_string for page in files.documentation_pages()]
    for name in sorted({name for text in texts for name in IMAGE_LINK_PATTERN.findall(text)}):
        if (ROOT / name).is_file():
            files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    return IMAGE_LINK_PATTERN.sub(r"](\1)", markdown)
