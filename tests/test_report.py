"""The report says what the files of a run say, in one page that runs nothing, fetches nothing and fits any screen."""

import base64
import contextlib
import html.parser
import http.server
import importlib.metadata
import io
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
from browser import browse, only_with_browser
from PIL import Image

from napo_jax import report
from napo_jax.command import exit_with_one_line
from napo_jax.report import read_run, write_report
from napo_jax.versions import versions

HOSTILE = '<script>alert(1)</script>"><img src="http://127.0.0.1:PORT/x" onerror=alert(2)>\'&amp;\u2028'


def write_run(folder, steps=120, of=120, terms=("preference", "vision"), held_out=(0, 60, 120), text="ein Hund"):
    """Writes the files that a run of `napo_jax.train` leaves; returns the lines of metrics.jsonl."""
    folder.mkdir(exist_ok=True)
    draw = random.Random(0)
    objective = {"terms": [{"name": t, "loss": "dpo_loss", "preferred": "chosen", "other": text} for t in terms]}
    config = {
        "model": {"path": text, "size": None},
        "data": {"path": [text], "batch_size": 8},
        "lora": {"rank": 0, "targets": ["query", text]},
        "objective": objective,
        "train": {"steps": of},
        text: {text: [{"name": text, text: [["beta", 0.1], [text, None]]}]},
    }
    (folder / "config.json").write_text(json.dumps(config))
    rows = []
    for step in range(1, steps + 1):
        row = {"step": step, "loss": 0.7 - 0.002 * step + draw.gauss(0, 0.05), "gradient_norm": draw.random()}
        row |= {"learning_rate": 1e-7 * (of + 1 - step), "mfu": 0.4 + 0.01 * draw.random()}
        row |= {"examples_per_second": 20 + draw.random(), "tokens_per_second": 61234.5 + step}
        for term in terms:
            row |= {
                f"{term}/margin": -1.5 + 0.05 * step + draw.gauss(0, 1),
                f"{term}/accuracy": draw.randrange(33) / 32,
            }
            row |= {f"{term}/q": draw.random(), f"{term}/weight": draw.random()}
        rows.append(row)
    write_lines(folder / "metrics.jsonl", rows)
    measure = lambda step: (
        {"step": step, "loss": 0.7 - 0.001 * step, "image_ablated/margin": 2 + 0.01 * step}
        | {f"{term}/{kind}": 0.25 + step / 1000 for term in terms for kind in ("margin", "accuracy")}
    )
    write_lines(folder / "held_out.jsonl", [measure(step) for step in held_out if step <= steps])
    return rows


def write_lines(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_score(folder, label, benchmark, **values):
    file = folder / "evals" / label / f"{benchmark}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"benchmark": benchmark, "prompts": "p", "questions": "q"} | values))


def sample(**values):
    return {"picture": None, "question": "Q?", "answers": {}, "before": None, "after": None} | values


class Page(html.parser.HTMLParser):
    """Collects what is on a page: tags with attributes, text, and the numbers with their metrics' names."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.data = [], "", []
        self._skips, self._in_data = False, False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        """Notes a tag."""
        self.tags.append((tag, dict(attributes)))
        self._skips, self._in_data = tag in ("style", "script"), tag == "data"
        if self._in_data:
            self.data.append((dict(attributes).get("title"), dict(attributes)["value"], ""))

    def handle_endtag(self, tag):
        """Leaves a tag."""
        self._skips = self._in_data = False

    def handle_data(self, data):
        """Notes text."""
        if not self._skips:
            self.text += data
        if self._in_data:
            title, value, shown = self.data.pop()
            self.data.append((title, value, shown + data))


def page_of(folder):
    return Page(write_report(folder).read_text())


# In a browser.


@contextlib.contextmanager
def listening():
    """Yields the port of a server, and the list of what it was asked for."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_):
            """Says nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1], asked
        server.shutdown()


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A run with markup in each of its texts, its page in a browser, and what that asked a server for."""
    folder = tmp_path_factory.mktemp("report") / "run"
    with listening() as (port, asked):
        text = HOSTILE.replace("PORT", str(port))
        rows = write_run(folder, terms=("preference", f"bias{text}"), text=text)
        for label in ("before", "now & <u>then", "after"):
            write_score(folder, label, "pope", accuracy=50.0, model=text, variant=text, decoding={text: text})
            if label != "after":
                write_score(folder, label, "own <u>", accuracy=50.0, splits={text: {"accuracy": 1.0}})
        (folder / "versions.json").write_text(json.dumps({text: text}))
        (folder / "not_finite.json").write_text(json.dumps({"step": 121, "metrics": {text: "nan"}, "records": []}))
        Image.new("RGB", (64, 64), "red").save(folder / "red.png")
        texts = {"question": text, "before": text, "after": text, "truth": text, "answers": {text: text}}
        write_lines(folder / "samples.jsonl", [sample(picture="red.png", **texts), sample(picture=text, **texts)])
        page = write_report(folder)
        control = folder / "control.html"
        control.write_text(f'<img src="http://127.0.0.1:{port}/control">')
        browse(folder, control.as_uri(), "--dump-dom")
        assert asked == ["/control"], "the server hears nothing"
        shown = browse(folder, page.as_uri(), "--dump-dom", "--window-size=1280,1000")
        return folder, rows, text, Page(shown), asked[1:]


@only_with_browser
def test_a_browser_shows_text_from_data_as_text_and_asks_for_nothing(hostile):
    folder, _, text, shown, asked = hostile
    assert asked == []
    kinds = [tag for tag, _ in shown.tags]
    assert not {"script", "link", "iframe", "object", "base", "use", "u"} & set(kinds)
    assert kinds.count("img") == 1
    for tag, attributes in shown.tags:
        assert not [name for name in attributes if name.startswith("on") or name in ("href", "srcset")]
        assert attributes.get("src", "data:").startswith("data:"), tag
        assert "url(" not in attributes.get("style", "")
    style = re.search(r"<style>(.*?)</style>", (folder / "report.html").read_text(), re.DOTALL)[1]
    assert "url(" not in style
    assert "@import" not in style
    policy = next(attributes["content"] for tag, attributes in shown.tags if "http-equiv" in attributes)
    assert "default-src 'none'" in policy
    # Model, data and objective; term in four charts and the verdict; tick; samples; config: none is missing.
    assert shown.text.count(text) > 40
    assert "now & <u>then" in shown.text


@only_with_browser
def test_every_number_of_the_last_step_is_that_of_the_file(hostile):
    folder, rows, _, shown, _ = hostile
    last = rows[-1] | {}
    held_out = json.loads((folder / "held_out.jsonl").read_text().splitlines()[-1])
    last |= {f"held out: {name}": value for name, value in held_out.items()}
    found = {title: (value, text) for title, value, text in shown.data if title is not None}
    assert found.keys() == last.keys() - {"step", "held out: step"}
    for name, (value, text) in found.items():
        assert float(value) == last[name], name
        number = text.replace(",", "").replace("−", "-")
        near = float(number[:-1]) / 100 if number.endswith("%") else float(number)
        assert near == pytest.approx(last[name], rel=1e-3, abs=6e-4 if number.endswith("%") else 0), name
    page = (folder / "report.html").read_text()
    assert set(re.findall(r"<th class=.?number.?>(step [^<]*)<", page)) == {"step 120"}
    assert "120 of 120" in shown.text


@only_with_browser
def test_a_phone_scrolls_in_one_direction(hostile):
    """The page, with a script that measures it, in a frame as wide as a small phone; tables scroll on their own."""
    folder, *_ = hostile
    page = (folder / "report.html").read_text()
    script = """<script>const root = document.documentElement;
      parent.postMessage(root.scrollWidth + " of " + innerWidth + " table " + [...document.querySelectorAll(".scroll")]
        .some(box => box.scrollWidth > box.clientWidth), "*")</script>"""
    for name, extra in (("page", ""), ("wide", '<div style="width:361px">wide</div>')):
        altered = re.sub(r'<meta http-equiv="Content-Security-Policy".*?>', "", page)
        altered = altered.replace("</body>", f"{extra}{script}</body>").replace("<details>", "<details open>")
        (folder / f"{name}.html").write_text(altered)
        (folder / "frame.html").write_text(
            "<script>onmessage = event => document.title = event.data</script>"
            f'<iframe width="360" height="640" style="border:0" src="{name}.html"></iframe>'
        )
        found = re.search(r"<title>(.*)</title>", browse(folder, (folder / "frame.html").as_uri(), "--dump-dom"))[1]
        if name == "page":
            assert found == "360 of 360 table true"
        else:
            assert not found.startswith("360 of")


@only_with_browser
def test_light_and_dark_differ(hostile):
    folder, *_ = hostile
    seen = []
    for scheme in (1, 0):
        flags = [f"--blink-settings=preferredColorScheme={scheme}", f"--screenshot={folder}/seen.png"]
        browse(folder, (folder / "report.html").as_uri(), *flags, "--window-size=800,900")
        picture = np.asarray(Image.open(folder / "seen.png").convert("L"), int)
        seen.append((picture[0, 0], np.abs(picture - picture[0, 0]).max()))
    (light, contrast), (dark, other_contrast) = seen
    assert light > 240
    assert dark < 40
    assert min(contrast, other_contrast) > 150


# Charts.


def test_each_metric_has_its_chart(tmp_path):
    write_run(tmp_path)
    page = write_report(tmp_path).read_text()
    figures = dict(re.findall(r'<figure class="chart"><h3>(.*?)</h3>(.*?)</figure>', page, re.DOTALL))
    both, one = ["preference", "vision"], lambda label: [label]
    labels = {title: re.findall(r"</svg></td><td>(.*?)</td>", figure) for title, figure in figures.items()}
    assert labels == {
        "Loss": one("loss"),
        "Margin": both,
        "Accuracy": both,
        "Noise robustness q": both,
        "Weight": both,
        "What the picture adds": one("log-prob"),
        "Learning rate": one("learning rate"),
        "Gradient norm": one("gradient norm"),
        "Examples a second": one("examples/s"),
        "Tokens a second": one("tokens/s"),
        "MFU": one("of the peak"),
    }
    heights = re.findall(r'<text x="-8"[^>]*>([^<]*)<', figures["Accuracy"])
    assert heights == ["0", "20%", "40%", "60%", "80%", "100%"]
    marked = {title for title, figure in figures.items() if 'class="mark"' in figure}
    assert marked == {"Loss", "Margin", "Accuracy", "What the picture adds"}


def test_many_steps_make_a_page_that_can_be_sent(tmp_path):
    terms = ("preference", "language", "vision")
    rows = write_run(tmp_path, 12_000, 12_000, terms, range(0, 12_001, 25))
    rows[5432]["gradient_norm"] = 1000.0
    write_lines(tmp_path / "metrics.jsonl", rows)
    page = write_report(tmp_path).read_text()
    assert len(page) < 1_000_000
    shown = re.search(r"<h3>Gradient norm</h3>.*?</figure>", page, re.DOTALL)[0]
    raw = re.search(r'class="line raw".*?points="(.*?)"', shown)[1]
    top, across = min((int(y), int(x)) for x, y in (pair.split(",") for pair in raw.split()))
    assert top < 60
    assert across == round(1000 * 5433 / 12_000)


# What the files say.


def test_the_verdict_is_of_the_first_and_last_tenth(tmp_path):
    rows = write_run(tmp_path)
    shown = page_of(tmp_path)
    unnamed = [float(value) for title, value, _ in shown.data if title is None]
    want = []
    for name in ("loss", *(f"{term}/{kind}" for term in ("preference", "vision") for kind in ("accuracy", "margin"))):
        want += [np.mean([row[name] for row in rows[part]]) for part in (slice(0, 12), slice(108, 120))]
    np.testing.assert_allclose(unnamed, want)
    assert "first and the last tenth of 120 logged steps, 12 lines each" in shown.text


def test_terms_come_in_the_objectives_order(tmp_path):
    write_run(tmp_path, terms=("zebra", "ape"))
    assert re.findall("zebra|ape", page_of(tmp_path).text.partition("Margin")[2])[:2] == ["zebra", "ape"]


def test_a_run_under_way_is_shown_as_far_as_it_is(tmp_path):
    write_run(tmp_path, 30, of=200, held_out=[0])
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write('{"step": 31, "lüss'.encode()[:-3])
    shown = page_of(tmp_path)
    assert "30 of 200, not finished" in shown.text
    assert "The last line of metrics.jsonl was cut short and is left out." in shown.text
    assert "step 30" in shown.text


def test_a_run_that_has_logged_nothing_is_shown(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    shown = page_of(tmp_path)
    assert "No step has been logged yet." in shown.text
    assert "There is nothing to draw yet." in shown.text
    assert "config.json is not there" in shown.text
    assert "versions of what the run was made with were not recorded" in shown.text
    assert "evaluate score --out WORKDIR/evals/before" in shown.text
    assert "samples.jsonl" in shown.text


def test_steps_of_a_run_that_was_told_epochs(tmp_path):
    write_run(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"train": {"steps": None, "epochs": 4.0}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "120; all of them are 4.0 epochs" in page_of(tmp_path).text
    (tmp_path / "config.json").write_text(json.dumps(config | {"steps": 345}))
    assert "120 of 345, not finished" in page_of(tmp_path).text


def test_what_ended_a_run_is_said_until_it_is_past_it(tmp_path):
    write_run(tmp_path, 30, of=200)
    metrics = {"loss": "nan", "gradient_norm": "2.0"}
    for step, said in ((31, True), (30, False)):
        (tmp_path / "not_finite.json").write_text(json.dumps({"step": step, "records": [1], "metrics": metrics}))
        assert ("Step 31 ended the run: loss nan. Its records" in page_of(tmp_path).text) is said
        assert "ended the run" not in page_of(tmp_path).text or said


def test_whatever_the_numbers_there_is_a_page(tmp_path):
    """As large and as small as there are, and a config that says nothing of use."""
    write_run(tmp_path, 50, held_out=[0])
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for i, row in enumerate(rows):
        row |= {"loss": (1e308, -1e308)[i % 2], "gradient_norm": (5e-324, 0)[i % 2], "mfu": 1e300}
        row |= {"preference/accuracy": 10**400 if i == 7 else 1e308, "preference/margin": 1.7e308}
    write_lines(tmp_path / "metrics.jsonl", rows)
    config = {"steps": "many <u>", "objective": {"terms": 5}, "train": [], "lora": 3, "data": {"path": {}}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for label, value in (("before", 10**400), ("after", 1e308)):
        write_score(tmp_path, label, "own", f1=value, counts={"f1": [value, 1]}, items={"f1": [[value, 1]]})
    shown = page_of(tmp_path)
    assert "50 of many <u>" in shown.text
    assert "Left out, not finite: preference 1 × inf." in shown.text
    for _, attributes in shown.tags:
        assert not re.search("nan|inf", attributes.get("points", "") + attributes.get("y", ""))
    margins = [value for title, value, text in shown.data if title is None and text == "1.7e+308"]
    assert margins == ["1.7e+308"] * 2, "a sum that is infinite makes a mean that is none"
    for terms in ([5, None, {"name": [1]}], {"a": 1}, "x"):
        (tmp_path / "config.json").write_text(json.dumps({"objective": {"terms": terms}}))
        assert "50" in page_of(tmp_path).text


def test_values_that_are_no_numbers_are_left_out_and_counted(tmp_path):
    rows = write_run(tmp_path, held_out=[0, 60])
    for row in rows[4:7]:
        row |= {"vision/margin": None, "not_finite": {"vision/margin": "inf"}}
    rows[7]["vision/margin"] = math.nan
    rows[-1] |= {"vision/margin": None, "not_finite": {"vision/margin": "-inf"}}
    write_lines(tmp_path / "metrics.jsonl", rows)
    shown = page_of(tmp_path)
    assert "Left out, not finite: vision 3 × inf, vision 1 × nan, vision 1 × -inf." in shown.text
    assert "vision/margin" not in {title for title, *_ in shown.data}
    for _, attributes in shown.tags:
        assert not re.search("nan|inf", attributes.get("points", "") + attributes.get("y", ""))
    unnamed = [float(value) for title, value, _ in shown.data if title is None]
    assert unnamed[-2] == pytest.approx(np.mean([row["vision/margin"] for row in (*rows[:4], *rows[8:12])]))


# Benchmarks.


def tables(folder, benchmark):
    """Returns the rows of a benchmark's table, and what is said below."""
    section = re.search(rf"<h3>{benchmark}</h3>(.*?)</section>", write_report(folder).read_text(), re.DOTALL)[1]
    plain = lambda cell: re.sub(r"\s+", " ", re.sub("<[^>]*>", " ", cell)).strip()
    shown, _, below = section.partition("</table>")
    return [[plain(c) for c in re.findall("<t[hd].*?</t[hd]>", row)] for row in shown.split("</tr>")[:-1]], plain(below)


def test_benchmarks_before_and_after(tmp_path):
    write_run(tmp_path)
    counts = {"CK": [7, 10], "VP": [4, 10], "LP": [0, 0], "instances": 10}
    dec = {"beams": 1, "max_tokens": 8, "temperature": 0.0, "top_p": 1.0, "debias": {"picture": "unk", "strength": 1.0}}
    more = {"dtype": "float32", "decoding": dec, "items": {}}
    write_score(tmp_path, "after", "vlind", CK=70.0, VP=40.0, CB=50.0, LP=None, counts=counts, model="new", **more)
    write_score(tmp_path, "before", "vlind", CK=60.0, VP=45.0, CB=50.0, LP=20.0, counts={}, model="old", **more)
    write_score(tmp_path, "a_middle", "vlind", CK=65.0, model="mid", **more)
    rows, below = tables(tmp_path, "vlind")
    assert rows == [
        ["", "before", "a_middle", "after", "after − before"],
        ["CK", "60.00", "65.00", "70.00 7/10", "+10.00 ↑ better"],
        ["VP", "45.00", "-", "40.00 4/10", "−5.00 ↓ worse"],
        ["CB", "50.00", "-", "50.00", "0.00 same"],
        ["LP", "20.00", "-", "- 0/0", "-"],
    ]
    said = "decoding (beams 1, max_tokens 8, temperature 0.0, debias.picture unk)"
    assert below == f"prompts p, dtype float32, {said} before: model old a_middle: model mid after: model new"


def test_which_way_is_better(tmp_path):
    write_run(tmp_path)
    less = {"chair": ("CHAIRs", "CHAIRi"), "world": ("gap", "habit", "flood"), "mmhal": ("rate",)}
    more = {"world": ("usual", "changed"), "mmhal": ("score",), "amber": ("Cover", "f1"), "pope": ("accuracy", "f1")}
    less["amber"] = ("CHAIR", "Hal", "Cog")
    want = [(b, m, "worse") for b, ms in less.items() for m in ms] + [
        (b, m, "better") for b, ms in more.items() for m in ms
    ]
    for label, value in (("before", 1.0), ("after", 2.0)):
        for name in less | more:
            values = dict.fromkeys((*less.get(name, ()), *more.get(name, ()), "yes_ratio"), value)
            write_score(tmp_path, label, name, **values)
    for benchmark, metric, word in want:
        rows = {row[0]: row[-1] for row in tables(tmp_path, benchmark)[0]}
        assert rows[metric] == f"+1.00 ↑ {word}"
    assert {row[0]: row[-1] for row in tables(tmp_path, "pope")[0]}["yes_ratio"] == "+1.00 ↑"


def test_splits_and_unlike_runs(tmp_path):
    write_run(tmp_path)
    split = {"random": {"accuracy": 80.0, "f1": 70.0}}
    items = {"CHAIRs": [[1, 1], [0, 1]]}
    for label, prompts in (("before", "llava"), ("after", "plain")):
        write_score(tmp_path, label, "pope", accuracy=81.0, splits=split, prompts=prompts)
        write_score(tmp_path, label, "chair", CHAIRs=50.0, items=items, questions=label)
    rows, below = tables(tmp_path, "pope")
    assert rows[1:] == [
        ["accuracy", "81.00", "81.00", "-"],
        ["accuracy, random", "80.00", "80.00", "-"],
        ["f1, random", "70.00", "70.00", "-"],
    ]
    assert below == "No difference is shown: prompts differ. before: prompts llava after: prompts plain"
    rows, below = tables(tmp_path, "chair")
    assert rows[1] == ["CHAIRs", "50.00 1/2", "50.00 1/2", "-"]
    assert "questions differ" in below


def test_one_label_has_no_difference(tmp_path):
    write_run(tmp_path)
    write_score(tmp_path, "after", "own", score=3, note="text", on=True)
    assert tables(tmp_path, "own")[0] == [["", "after"], ["score", "3.00"]]


# Samples, config and versions.


def test_pictures_are_embedded_as_large_as_they_can_be_seen(tmp_path):
    write_run(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "small.png")
    Image.fromarray(pixels).resize((900, 600)).save(tmp_path / "large.webp")
    (tmp_path / "broken.jpg").write_bytes((tmp_path / "small.png").read_bytes()[:99])
    names = ["small.png", "large.webp", "broken.jpg", "missing.png", "a\0b", None]
    write_lines(tmp_path / "samples.jsonl", [sample(picture=name) for name in names])
    shown = page_of(tmp_path)
    small, large = (attributes for tag, attributes in shown.tags if tag == "img")
    opened = [Image.open(io.BytesIO(base64.b64decode(image["src"].partition(",")[2]))) for image in (small, large)]
    np.testing.assert_array_equal(np.asarray(opened[0]), pixels)
    assert opened[1].size == (336, 224)
    assert "small" in small["class"].split()
    assert "class" not in large
    assert "img.small { image-rendering: pixelated; }" in (tmp_path / "report.html").read_text()
    for said in (
        "broken.jpg cannot be shown: image_truncated",
        "missing.png cannot be shown: no such file",
        "no picture",
    ):
        assert said in shown.text


def test_what_was_said_before_and_after(tmp_path):
    write_run(tmp_path)
    answers = {"rejected": "R.", "chosen": "C."}
    rows = [sample(question="Q1?", before="B.", after="", truth="T.", answers=answers), *[sample()] * 30]
    write_lines(tmp_path / "samples.jsonl", rows)
    text = page_of(tmp_path).text
    assert "no pictureQ1?beforeB.afternothingin truthT.rejectedR.chosenC.no pictureQ?beforenot askedafternot" in text
    assert "7 more are in samples.jsonl." in text


def test_config_keeps_its_order_and_folds(tmp_path):
    write_run(tmp_path)
    config = {
        "train": {"wandb": None, "steps": 3, "keep": True},
        "model": {"columns": {}, "path": ["b", "a"]},
        "objective": {"terms": [{"name": "t", "options": [["beta", 0.1], ["rule", "paper"]]}]},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "versions.json").write_text(json.dumps({"jax": "0.10.2", "devices": "8 TPU v5e"}))
    shown = page_of(tmp_path)
    want = "Configtrainwandbnonesteps3keepyesmodelcolumnsnonepathb, aobjectiveterms1. tnametoptionsbeta 0.1, rule paper"
    text = shown.text.partition("Config and versions")[2]
    assert text == f"{want}versionjax0.10.2devices8 TPU v5e"
    opened = ["open" in attributes for tag, attributes in shown.tags if tag == "details"]
    assert opened == [False, True, True, True, True, True]


def test_versions_are_those_that_run():
    found = versions()
    for name in ("jax", "jaxlib", "flax", "optax"):
        assert found[name] == importlib.metadata.version(name)
    assert found["python"] == sys.version.split()[0]
    assert found["devices"] == "8 cpu"
    assert list(found) == ["napo_jax", "jax", "jaxlib", "flax", "optax", "python", "devices"]


# The command.


def break_middle(folder):
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 121, "los\n{"step": 122}\n')


def append(name, *rows):
    def do(folder):
        with (folder / name).open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

    return do


def write(name, text):
    def do(folder):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)

    return do


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (shutil.rmtree, "run is not there; name the workdir"),
        (lambda folder: os.remove(folder / "metrics.jsonl"), "run has no metrics.jsonl"),
        (break_middle, r"metrics.jsonl, line 121, is not a JSON object"),
        (append("metrics.jsonl", [1], {"step": 121}), "metrics.jsonl, line 121, is not a JSON object"),
        (append("metrics.jsonl", {"step": 120}), "line 121, has the step 120; steps must be"),
        (append("metrics.jsonl", {"step": 121.5}), "line 121, has the step 121.5"),
        (append("metrics.jsonl", {"loss": 1.0}), "line 121, has the step None"),
        (append("held_out.jsonl", {"step": 999, "loss": "low"}), "held_out.jsonl, line 4: loss is 'low'"),
        (write("evals/before/pope.json", "{"), "evals/before/pope.json is not JSON"),
        (write("evals/before/pope.json", "[]"), "pope.json holds a JSON list"),
        (write("config.json", "{"), "config.json is not JSON"),
        (append("samples.jsonl", sample(), {"answers": {}}), "samples.jsonl, line 2, is no sample"),
        (append("samples.jsonl", sample(answers={"chosen": 3})), "line 1, is no sample"),
        (append("samples.jsonl", sample(before=3)), "line 1, is no sample"),
        (lambda folder: (folder / "report.html").mkdir(), "report.html is a folder; name a file"),
        (
            append("metrics.jsonl", {"step": 121, "not_finite": ["x"]}),
            r"line 121, has \['x'\] as not_finite, expected an",
        ),
        (append("metrics.jsonl", {"step": 10**400}), "metrics.jsonl, line 121, has the step 1000"),
        (write("metrics.jsonl", "[" * 100_000 + "\n"), "metrics.jsonl, line 1, is not a JSON object"),
        (write("config.json", '{"a":' * 60 + "1" + "}" * 60), "config.json nests deeper than 50 levels"),
        (write("not_finite.json", f'{{"step": {10**400}}}'), "not_finite.json has no step"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_2(tmp_path, capsys, harm, message):
    write_run(tmp_path / "run")
    harm(tmp_path / "run")
    with pytest.raises(SystemExit) as stop:
        exit_with_one_line(lambda: report.main(["--workdir", str(tmp_path / "run")]))
    assert stop.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ")
    assert line.count("\n") == 1
    assert re.search(message, line)


def test_a_page_says_whose_it_is(tmp_path):
    """The demo's run, whose folder is called run as others are, by the one that it is in."""
    for folder in ("a", "demo2/run"):
        (tmp_path / folder).mkdir(parents=True)
        write_run(tmp_path / folder, 3)
    heading = lambda page: re.findall("<(?:title|h1)>(.*?)</", page.read_text())[:2]  # charts have titles too
    assert heading(write_report(tmp_path / "a")) == ["Run a"] * 2
    assert heading(write_report(tmp_path / "demo2" / "run")) == ["Run demo2/run"] * 2
    page = tmp_path / "to/be/made.html"
    report.main(["--workdir", str(tmp_path / "a"), "--output", str(page), "--title", "Mine & <u>"])
    assert heading(page) == ["Mine &amp; &lt;u&gt;"] * 2
    with pytest.raises(ValueError, match=r"made.html cannot be written, for .*report.html is no folder"):
        write_report(tmp_path / "a", tmp_path / "a/report.html/made.html")


def test_the_old_page_stays_until_the_new_one_is_whole(tmp_path, monkeypatch):
    write_run(tmp_path)
    old = write_report(tmp_path).read_text()

    def fail(path, run, title):
        path.write_text("<half")
        raise OSError("disk full")

    monkeypatch.setattr("napo_jax.report_page.write_page", fail)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(OSError, match="disk full"):
        write_report(tmp_path)
    assert (tmp_path / "report.html").read_text() == old
    assert sorted(os.listdir(tmp_path)) == before


def test_reading_changes_nothing(tmp_path):
    run = tmp_path / "run"
    write_run(run)
    before = {file.name: file.read_bytes() for file in run.iterdir()}
    read_run(run)
    assert write_report(run, tmp_path / "elsewhere.html").name == "elsewhere.html"
    assert {file.name: file.read_bytes() for file in run.iterdir()} == before


def test_it_is_a_command_that_needs_no_device(tmp_path):
    """A platform that does not exist: whoever asks for a device fails."""
    write_run(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    write_lines(tmp_path / "samples.jsonl", [sample(picture="a.png")])
    write_score(tmp_path, "after", "pope", accuracy=1.0, decoding={"beams": 1})
    page = tmp_path / "a.html"
    command = [sys.executable, "-m", "napo_jax.report", "--workdir", str(tmp_path), "--output", str(page)]
    environment = os.environ | {"JAX_PLATFORMS": "none_such"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True, env=environment)
    assert done.stdout == f"wrote {page}\n"
    assert "120 of 120" in page.read_text()
    assert "data:image/png" in page.read_text()
