"""MkDocs hook: pages link to files of the repository as on any code host, and the site takes those files in.

A link that leaves docs/ (`../train/flops.py`) would be broken in a site made of docs/ alone. Every such file is added
under `repository/`, Markdown as a page, and links are turned towards it. A link to nothing stays as it is, so that
MkDocs reports it. Also writes out `decisions/*.md` in the nav.
"""

import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
PREFIX = "repository/"
DECISIONS = "decisions/*.md"
# The path of an inline link or image; not of a link with a scheme, nor to a heading of the same page.
PATH = re.compile(r"(?<=\]\()(?![a-z]+:)[^)#\s]+")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Lists the decision notes, which grow by one now and then."""
    notes = sorted(path.relative_to(config.docs_dir).as_posix() for path in Path(config.docs_dir).glob(DECISIONS))

    def written_out(entries: list[dict[str, Any]]) -> None:
        for entry in entries:
            for title, pages in entry.items():
                if pages == DECISIONS:
                    entry[title] = notes
                elif isinstance(pages, list):
                    written_out(pages)

    written_out(config.nav)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds what is linked to, and what that links to in turn."""
    waiting = [file for file in files if file.src_uri.endswith(".md")]
    while waiting:
        file = waiting.pop()
        for target in _targets(file):
            if target.startswith("docs/") or files.get_file_from_path(PREFIX + target):
                continue
            added = File.generated(config, PREFIX + target, abs_src_path=str(ROOT / target))
            files.append(added)
            if target.endswith(".md"):
                waiting.append(added)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links between docs/ and the rest towards where the site has them."""
    del config, files

    def turned(match: re.Match[str]) -> str:
        target = _resolved(page.file.src_uri, match.group())
        if target is None:
            return match.group()
        in_site = target.removeprefix("docs/") if target.startswith("docs/") else PREFIX + target
        return posixpath.relpath(in_site, posixpath.dirname(page.file.src_uri))

    return PATH.sub(turned, markdown)


def _targets(file: File) -> Iterator[str]:
    for match in PATH.finditer(Path(os.fspath(file.abs_src_path)).read_text(encoding="utf-8")):
        target = _resolved(file.src_uri, match.group())
        if target is not None:
            yield target


def _resolved(source: str, link: str) -> str | None:
    """Path in the repository of the file that a page of the site links to; None if there is no such file."""
    own = source.removeprefix(PREFIX) if source.startswith(PREFIX) else f"docs/{source}"
    target = posixpath.normpath(posixpath.join(posixpath.dirname(own), link))
    return target if not target.startswith("..") and (ROOT / target).is_file() else None
