"""Builds the site from pages and figures where they are in the repository.

README.md is the front page. Pages link to each other, to figures and to model cards by
relative paths that a repository browser resolves. The site's root is `docs/`; files
outside it that a page links to are copied to the same path under that root.
"""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
FRONT = "README.md"
# The path of a link without what leads to it from README.md or from docs/.
LINK = re.compile(r"(?<=\]\()(?:\.\./|docs/)?(?=\w)([^)#:]+)(?=[)#])")


def on_files(files, config):
    """Adds the front page and the files of the repository that pages link to."""
    pages = [ROOT / FRONT, *Path(config.docs_dir).glob("*.md")]
    linked = {path for page in pages for path in LINK.findall(page.read_text("utf-8"))}
    for path in sorted(linked | {FRONT}):
        if files.get_file_from_path(path) is None and (ROOT / path).is_file():
            files.append(
                File(path, str(ROOT), config.site_dir, config.use_directory_urls)
            )
    return files


def on_page_markdown(markdown, page, **_):
    """Makes links relative to the site's root; every page but linked ones is there."""
    return markdown if "/" in page.file.src_uri else LINK.sub(r"\1", markdown)
