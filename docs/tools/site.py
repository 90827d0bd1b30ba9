"""What mkdocs does not do by itself: pages from outside docs/, links out of docs/, pages that are not there yet.

Pages are written for a git host: their links are relative paths in the repository. On the site a link out of docs/
leads to the page that is made of that file, or to a copy of it.
"""

import logging
import os
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File, InclusionLevel

ROOT = Path(__file__).parents[2]
# Files of the repository that are pages of the site, under docs/ as the site sees it.
ELSEWHERE = {
    "benchmarks/RESULTS.md": "performance.md",
    "launch/README.md": "launch.md",
    "CHANGELOG.md": "changes.md",
}
_CODE = {".py": "python", ".sh": "bash", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml", "": "text"}
_LINK = re.compile(r"(?<!!)(\[[^\]]*\]\()([^)\s#]+)(#[^)\s]*)?(\))")
_log = logging.getLogger("mkdocs.hooks.site")  # below mkdocs, so that --strict counts its warnings


def on_config(config):
    """Fits the navigation to the pages that are there."""
    docs = Path(config.docs_dir)
    there = {page.name for page in docs.glob("*.md")} | {
        page for source, page in ELSEWHERE.items() if (ROOT / source).is_file()
    }
    config.nav, named = _only(config.nav, there)
    if more := sorted(there - named):
        config.nav.append({"More": more})
    return config


def _only(entries, there):
    """Returns navigation without the pages that are not there, and the pages in it."""
    kept, named = [], set()
    for entry in entries:
        (title, target), *_ = entry.items()
        if isinstance(target, list):
            target, inner = _only(target, there)
            named |= inner
        elif target in there:
            named.add(target)
        else:
            continue
        if target:
            kept.append({title: target})
    return kept, named


def on_files(files, config):
    """Adds the pages from elsewhere, and what pages link to outside docs/."""
    for source, page in ELSEWHERE.items():
        if (ROOT / source).is_file():
            files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    pages = list(files.documentation_pages())
    for file in pages:  # which grows: what is published may link on
        for target in _targets(file):
            place = _copy_of(target)
            if _page_of(target) is None and target.is_file() and not files.get_file_from_path(place):
                files.append(published := _publish(target, place, config))
                pages += [published] if published.is_documentation_page() else []
    return files


def on_page_markdown(markdown, page, config, files):
    """Turns links as a git host reads them into links of the site."""
    here = _source_of(page.file.src_uri)
    if here is None:
        return markdown

    def link(match):
        opening, target, anchor, closing = match.groups()
        path = _resolve(here, target)
        if path is None or not path.exists():
            return match.group()  # mkdocs says what is wrong with it
        if path.is_dir():
            return opening.removesuffix("](").removeprefix("[")  # a folder has no page: its name is left
        place = _page_of(path) or _copy_of(path)
        start = posixpath.dirname(page.file.src_uri) or "."
        return f"{opening}{posixpath.relpath(place, start)}{anchor or ''}{closing}"

    return "".join(
        part if number % 2 else _LINK.sub(link, part)
        for number, part in enumerate(re.split(r"(^```.*?^```$)", markdown, flags=re.DOTALL | re.MULTILINE))
    )


def _source_of(uri) -> Path | None:
    """Returns the file of the repository that a page is made of; None for one of code."""
    for source, page in ELSEWHERE.items():
        if uri == page:
            return ROOT / source
    if not uri.startswith("files/"):
        return ROOT / "docs" / uri
    path = ROOT / uri.removeprefix("files/")
    return path if path.is_file() else None


def _page_of(path) -> str | None:
    """Returns the page that is made of a file of the repository, if one is."""
    uri = path.relative_to(ROOT).as_posix()
    if uri == "README.md":
        return "index.md"  # the front page of either
    return ELSEWHERE.get(uri) or (uri.removeprefix("docs/") if uri.startswith("docs/") else None)


def _copy_of(path) -> str:
    """Returns where a file that is no page is published."""
    uri = f"files/{path.relative_to(ROOT).as_posix()}"
    return f"{uri}.md" if path.suffix in _CODE else uri


def _publish(path, place, config):
    """Returns the site's file that is made of one of the repository."""
    if path.suffix not in _CODE:
        return File.generated(config, place, abs_src_path=str(path), inclusion=InclusionLevel.NOT_IN_NAV)
    title, text = path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
    head = "---\nhide: [navigation, toc]\nsearch: {exclude: true}\n---\n"
    page = f"{head}\n# {title}\n\n````{_CODE[path.suffix]}\n{text}````\n"
    return File.generated(config, place, content=page, inclusion=InclusionLevel.NOT_IN_NAV)


def _targets(file):
    """Yields the files of the repository that a page links to."""
    here = _source_of(file.src_uri)
    for _, target, _, _ in _LINK.findall(file.content_string) if here else ():
        if path := _resolve(here, target):
            yield path


def _resolve(here, target) -> Path | None:
    """Returns the path in the repository that a link of a file means; None if it leads elsewhere."""
    if "://" in target or target.startswith(("/", "mailto:")):
        return None
    path = Path(os.path.normpath(here.parent / target))
    if not path.is_relative_to(ROOT):
        _log.warning("%s links out of the repository: %s", here.name, target)
        return None
    return path
