"""The pages: the site builds without a warning and needs no other host, and what they say of flags and errors is so."""

import ast
import contextlib
import html.parser
import importlib.util
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from browser import browse, only_with_browser

from napo_jax import preview
from napo_jax.config import parse

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def tool(name):
    """Returns a module of docs/tools."""
    spec = importlib.util.spec_from_file_location(name, DOCS / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Returns the built site's folder."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


class Fetched(html.parser.HTMLParser):
    """Collects what a page makes a browser fetch, and where its links lead."""

    def __init__(self):
        super().__init__()
        self.fetched, self.links, self.anchors = [], [], set()

    def handle_starttag(self, tag, attributes):
        """Takes one tag."""
        attributes = dict(attributes)
        if tag == "a":
            self.links.append(attributes.get("href") or "")
        elif tag == "link" and attributes.get("rel") not in ("canonical", "prev", "next"):
            self.fetched.append(attributes["href"])
        elif "src" in attributes:
            self.fetched.append(attributes["src"])
        self.anchors.add(attributes.get("id"))


def read(page):
    fetched = Fetched()
    fetched.feed(page.read_text())
    return fetched


def test_every_page_is_in_the_site_and_needs_no_other_host(site):
    elsewhere = {"benchmarks/RESULTS.md": "performance", "launch/README.md": "launch", "CHANGELOG.md": "changes"}
    expected = {path.stem for path in DOCS.glob("*.md")} | {
        page for source, page in elsewhere.items() if (ROOT / source).exists()
    }
    pages = {page.stem: page for page in site.glob("*.html")}
    assert pages.keys() == expected | {"404"}
    navigation = read(pages["index"]).links
    assert not [name for name in expected - {"index"} if f"{name}.html" not in navigation], "not in the navigation"
    for page in site.rglob("*.html"):
        there = read(page)
        assert there.fetched
        for place in there.fetched:
            assert not re.match(r"(\w+:)?//", place), f"{page.name} fetches {place}"
            if page.stem != "404":  # whose place is not known beforehand
                assert (page.parent / place.partition("?")[0]).exists(), (page.name, place)
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)[\s\"']*(https?:)?//", sheet.read_text()), sheet


def test_links_lead_somewhere_on_the_site_and_on_a_git_host(site):
    anchors = {page: read(page).anchors for page in site.rglob("*.html")}
    for page in anchors:
        if page.stem == "404":
            continue
        for link in read(page).links:
            path, _, anchor = link.partition("#")
            if ":" in path or link in ("", "#"):
                continue
            target = (page.parent / path).resolve() if path and path != "." else page
            assert target.exists(), (page.name, link)
            assert not anchor or anchor in anchors.get(target, {anchor}), (page.name, link)
    for source in [*DOCS.glob("*.md"), *ROOT.glob("*.md")]:
        for link in re.findall(r"\]\(((?!https?:)[^)#\s]+)", source.read_text()):
            assert (source.parent / link).exists(), (source.name, link)


@only_with_browser
def test_search_works_from_a_folder_and_a_page_fits_a_phone(site, tmp_path):
    said = browse(tmp_path, f"file://{site}/index.html?q=accumulate", "--dump-dom")
    assert "training.html" in re.search(r"md-search-result__list.*?</ol>", said, re.DOTALL).group()
    names = ("quickstart", "config", "migrating", "troubleshooting")
    frames = "".join(f"<iframe width=390 height=800 src='file://{site}/{name}.html'></iframe>" for name in names)
    wide = "Array.from(frames, (frame) => frame.document.documentElement.scrollWidth)"
    page = tmp_path / "phones.html"
    page.write_text(f"{frames}<script>onload = () => (document.title = {wide})</script>")
    said = browse(tmp_path, f"file://{page}", "--dump-dom", "--allow-file-access-from-files")
    widths = re.search(r"<title>([\d,]+)</title>", said)
    assert widths, "the frames cannot be looked into"
    assert dict(zip(names, map(int, widths.group(1).split(",")), strict=True)) == dict.fromkeys(names, 390)


def test_the_reference_of_flags_is_up_to_date():
    """To write it anew: python docs/tools/config_reference.py."""
    assert (DOCS / "config.md").read_text() == tool("config_reference").render()


def test_the_reference_says_what_help_says(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")  # of a width that leaves no room for two columns of boxes
    with pytest.raises(SystemExit):
        parse(preview.Options, ["--config", str(ROOT / "configs" / "debug.py"), "--help"], description="")
    plain = " ".join(re.sub(r"\x1b\[[\d;]*m|[│╭╮╰╯─]", "", capsys.readouterr().out).split())
    tables = (DOCS / "config.md").read_text().partition("## objective")[0]
    rows = re.findall(r"^\| `(--[\w.-]+)` \| .*? \| .*? \| (.*) \|$", tables, re.MULTILINE)
    assert len(rows) > 60
    for flag, meaning in rows:
        text = meaning.replace("`", "").replace("\\|", "|").replace("\\", "")
        assert flag in plain
        assert " ".join(text.split()) in plain.replace("`", ""), flag


def test_every_flag_that_a_page_names_is_there():
    reference = (DOCS / "config.md").read_text()
    known = set(re.findall(r"`--([\w.-]+)`", reference))
    assert {"data.batch-size", "train.second.path", "decoding.beams", "workdir"} <= known
    groups = {flag.partition(".")[0] for flag in known if "." in flag}
    for page in [*DOCS.glob("*.md"), ROOT / "README.md"]:
        for flag in re.findall(r"--(\w+\.[\w.-]*\w)", page.read_text()):
            group, _, name = flag.partition(".")
            assert flag in known or f"{group}.{name.removeprefix('no-')}" in known, (page.name, flag)
            assert group in groups
    ours = re.findall(r"^\| .*? \| (.*?) \|", (DOCS / "migrating.md").read_text(), re.MULTILINE)
    flags = set(re.findall(r"--([a-z][\w.-]*)", " ".join(ours)))
    assert len(flags) > 40
    assert not {flag for flag in flags if flag not in known}


def test_every_objective_that_the_page_for_newcomers_names_is_there():
    from napo_jax import losses, methods
    from napo_jax.term import Term

    text = (DOCS / "migrating.md").read_text()
    called = re.findall(r"(?:methods\.|objective=)(\w+)\((\w*)", text)
    assert len(called) > 5
    for name, argument in called:
        assert not argument or argument in getattr(methods, name).__annotations__
    for name in re.findall(r"`(\w+_loss)`", text):
        assert hasattr(losses, name)
    for name in re.findall(r"`(\w+)(?:=\"\w+\")?`(?:, `\w+=\"\w+\"`)? of a term", text):
        assert name in Term.__annotations__


def messages():
    """Returns every text of the package's source, with … for what is put in."""

    def shape(node):
        if isinstance(node, ast.JoinedStr):
            return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
        return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None

    trees = [ast.parse(path.read_text()) for path in (ROOT / "napo_jax").rglob("*.py")]
    return {text for tree in trees for node in ast.walk(tree) if (text := shape(node))}


def raised(heading):
    """Returns what is really said in the cases whose text is not of this package."""
    mistyped = lambda: parse(preview.Options, ["--config", "debug", "--data.bach-size", "1"], description="")
    too_large = lambda: jnp.zeros(2**46).block_until_ready()
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError)) as error:
        (mistyped if heading.startswith("Unrecognized") else too_large)()
    return str(error.value)


def test_every_message_that_is_explained_is_one_that_is_said():
    page = (DOCS / "troubleshooting.md").read_text()
    headings = re.findall(r"^### (.*)$", page, re.MULTILINE)
    known, others = messages(), []
    assert len(headings) > 40
    for heading in headings:
        assert re.fullmatch(r"`[^`]+`", heading), heading
        heading = heading.strip("`")
        fixed = [part for part in heading.split("…") if part.strip(" :;,.()")]
        assert fixed, heading
        if any(heading in text or heading.removesuffix("…") in text for text in known):
            continue
        others.append(heading)
        pattern = ".*".join(map(re.escape, heading.split("…")))
        assert re.search(pattern, raised(heading)), heading
    assert others == ["Unrecognized options: …; perhaps you meant …", "RESOURCE_EXHAUSTED: Out of memory"]


def test_the_code_on_the_first_page_prints_what_it_says():
    page = (DOCS / "index.md").read_text()
    ((code, printed),) = re.findall(r"```python\n(.*?)```\n+```text\n(.*?)```", page, re.DOTALL)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(code, {})
    assert said.getvalue() == printed
