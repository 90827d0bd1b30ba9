"""The report counts right, in any order and in little memory, and shows hostile data as text."""

import base64
import html.parser
import io
import json
import pickle
import re

import numpy as np
import pytest
from PIL import Image

from napo_jax.bias.report import Report, Row, Said, as_text, write_page

HOSTILE = "</div></section><script>alert(1)</script><img src=x onerror=alert(2)>\"'>&lt;\x1b[2J\u202e"


def kept(text, tokens=3):
    return Said(text, tokens, None)


def row(number, said, chosen="A red bus.", rejected="A car.", question="What?", image=None):
    return Row(number, question, chosen, rejected, image, {"question_only": said})


def report_of(rows, settings=(), **options):
    report = Report(dict(settings), **options)
    for each in rows:
        report.add(each)
    return report


def jpeg(size, colour="red"):
    data = io.BytesIO()
    Image.new("RGB", size, colour).save(data, "JPEG")
    return data.getvalue()


def test_counts_by_hand():
    rows = [
        # 3 of its 5 words, 2 of its 5 pairs, none of its 3 fours. Rejected: 2 of 4, 1 of 3, 0 of 1.
        row(0, kept("A RED bus, on a street", 9), "The red bus: a red-bus!", "no red bus here", "q"),
        # 2 of 3 words, none of 2 pairs, no fours. No rejected text.
        row(1, kept("Yes. It’s red", 5), "No, it's a red one", None),
        # Nothing to compare with.
        row(2, kept("no", 1), None, "Yes, a cat on a mat"),
        row(3, kept("...", 2), "No", "Yesterday no"),  # no words at all; rejected: 1 of 2, pairs none of 1
        row(4, Said("yes yes", 100, "repeats"), "yes", "yes"),
        row(5, Said("yes no", 200, "repeats"), "yes", "yes"),
        row(6, Said(None, 0, "image_truncated"), "yes", "yes"),
    ]
    summary = report_of(rows).summary()
    assert summary["rows"] == 7
    assert summary["answers"] == {
        "question_only": {
            "rows": 7,
            "kept": 4,
            "faults": {"repeats": 2, "image_truncated": 1},
            "tokens": {"min": 1, "median": 2, "95%": 9, "max": 9},
            "overlap": {
                "answer": {"1": round((3 / 5 + 2 / 3) / 2, 4), "2": round((2 / 5 + 0) / 2, 4), "4": 0.0},
                "rejected": {"1": round((2 / 4 + 1 / 2) / 2, 4), "2": round((1 / 3 + 0) / 2, 4), "4": 0.0},
            },
            "begins": {"answer": {"yes": 0.25, "no": 0.25}, "chosen": {"yes": 0.0, "no": round(2 / 3, 4)}},
        }
    }
    assert list(summary["answers"]["question_only"]["faults"]) == ["repeats", "image_truncated"]


def test_without_a_kept_answer_there_are_no_means():
    summary = report_of([row(0, Said("", 1, "empty"))]).summary()
    answer = summary["answers"]["question_only"]
    assert set(answer["tokens"].values()) == {None}
    assert answer["overlap"]["rejected"] == {"1": None, "2": None, "4": None}
    assert answer["begins"]["chosen"] == {"yes": None, "no": None}
    assert re.search(r"question_only +- +- +- +-\n", as_text(summary))


def test_an_empty_report_is_shown(tmp_path):
    write_page(tmp_path / "page.html", report_of([], {"seed": 0}))
    assert "0 rows" in (tmp_path / "page.html").read_text()
    assert as_text(report_of([]).summary()) == "0 rows"


def random_rows(count, seed=0):
    rng = np.random.default_rng(seed)
    names = np.array(["a", "red", "bus", "yes", "no", "cat", "on", "street"])
    text = lambda: " ".join(rng.choice(names, rng.integers(1, 20)))
    for number in range(count):
        fault = [None, None, None, "cut"][rng.integers(4)]
        said = Said(text(), int(rng.integers(1, 30)), fault)
        yield row(number, said, text(), text(), text(), rng.bytes(1000))


def test_order_does_not_matter(tmp_path):
    rows = list(random_rows(500))
    shuffled = [rows[i] for i in np.random.default_rng(1).permutation(500)]
    summaries = [report_of(some).summary() for some in (rows, rows[::-1], shuffled)]
    texts = {json.dumps(summary) + as_text(summary) for summary in summaries}
    assert len(texts) == 1
    numbers = [sample["number"] for sample in summaries[0]["samples"]]
    assert len({number // 100 for number in numbers}) >= 4  # from all over the input
    for name, some in (("one", rows), ("other", shuffled)):
        write_page(tmp_path / name, report_of(some))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


def test_order_does_not_show_in_a_rounded_mean():
    """As floats, 0.1 + 0.2 + 0.4 in two orders give two means of 400 rows: 0.0017 and 0.0018."""
    chosen = ["0", "0 1", "0 1 2 3", *["x"] * 397]
    rows = [row(number, kept("0 1 2 3 4 5 6 7 8 9"), text) for number, text in enumerate(chosen)]
    one, other = (report_of(some).summary() for some in (rows, [rows[2], rows[0], rows[1], *rows[3:]]))
    assert one == other


def test_memory_is_that_of_samples_and_counters():
    report, sizes = Report({}), {}
    for each in random_rows(4000):
        report.add(each)
        sizes[each.number] = each.number % 1000 == 999 and len(pickle.dumps(report))
    assert sizes[3999] < 1.02 * sizes[999] < 30_000  # 20 rows of a kilobyte and a little


@pytest.mark.parametrize(
    ("good", "bad", "samples", "shown"),
    [
        *[(50, 50, 10, (8, 2)), (50, 1, 10, (9, 1)), (50, 0, 10, (10, 0)), (3, 50, 10, (3, 7)), (3, 4, 10, (3, 4))],
        *[(50, 50, 1, (1, 0)), (0, 50, 1, (0, 1)), (50, 50, 2, (1, 1)), (5, 5, 0, (0, 0))],
    ],
)
def test_samples_show_kept_rows_first_and_a_few_faults(good, bad, samples, shown):
    rows = [row(i, kept("a bus")) for i in range(good)] + [row(100 + i, Said("", 1, "empty")) for i in range(bad)]
    numbers = [sample.number for sample in report_of(rows, samples=samples).samples()]
    firsts, lasts = numbers[: shown[0]], numbers[shown[0] :]
    assert len(numbers) == sum(shown)
    assert firsts == sorted(set(firsts))
    assert lasts == sorted(set(lasts))
    assert all(number < 100 for number in firsts)
    assert all(number >= 100 for number in lasts)


def test_rows_that_cannot_be_counted_are_refused():
    report = report_of([row(0, kept("a"))])
    with pytest.raises(ValueError, match="row 7 has the answers \\['image_only'\\], the rows before it"):
        report.add(Row(7, None, None, None, None, {"image_only": kept("a")}))
    with pytest.raises(ValueError, match="row 8: question_only has neither a text nor a fault"):
        report.add(row(8, Said(None, 0, None)))
    assert report.summary()["rows"] == 1


def hostile_report():
    said = {HOSTILE: Said(HOSTILE, 3, None), "b": Said(HOSTILE, 3, HOSTILE), "c": Said(None, 0, HOSTILE)}
    rows = [Row(0, HOSTILE, HOSTILE, HOSTILE, None, said), Row(1, "\ud800", None, None, b"", said)]
    return report_of(rows, {HOSTILE: HOSTILE, "seed": 1000})


def test_no_text_becomes_markup(tmp_path):
    write_page(tmp_path / "page.html", hostile_report())
    tags, text = [], []
    parser = html.parser.HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.append((tag, dict(attributes)))
    parser.handle_data = text.append
    parser.feed((tmp_path / "page.html").read_text())
    assert {tag for tag, _ in tags}.isdisjoint({"script", "img", "link"})
    policy = next(a["content"] for t, a in tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:;")
    # The settings; four tables with a name, one with two faults; eight in row 0, of which three are not in row 1.
    assert "".join(text).count(HOSTILE) == 2 + 4 + 2 + 8 + 5


def test_no_text_moves_a_terminals_cursor():
    shown = as_text(hostile_report().summary())
    assert all(c.isprintable() for line in shown.split("\n") for c in line)
    assert "<script>alert(1)</script>" in shown
    assert "seed                      1000\n" in shown


def test_a_terminal_sees_numbers_and_samples_in_short():
    shown = as_text(report_of([row(7, kept("red " * 300)), row(8, Said("x\ny", 2, "equal"))]).summary())
    assert re.search(r"\nAnswers +rows +kept +share\n  question_only +2 +1 +50.0%\n", shown)
    assert re.search(r"\nNot kept +rows\n  question_only: equal +1\n", shown)
    assert re.search(r"\n  question_only +100.0% +0.0% +0.0%\n  rejected of these rows +50.0% +0.0% +-\n", shown)
    assert (
        "\nrow 7\n  question: What?\n  chosen: A red bus.\n  rejected: A car.\n  question_only, 3 tokens: red" in shown
    )
    assert shown.endswith("\n  question_only, 2 tokens, not kept (equal): x y")
    assert max(map(len, shown.split("\n"))) < 350


def test_pictures_are_shown_small_and_damage_is_said(tmp_path):
    whole = jpeg((1000, 500), "blue")
    rows = [row(0, kept("a"), image=whole), row(1, kept("a"), image=jpeg((20, 10)))]
    rows += [row(2, kept("a"), image=whole[:-500]), row(3, kept("a"), image=b"<script>"), row(4, kept("a"))]
    write_page(tmp_path / "page.html", report_of(rows))
    page = (tmp_path / "page.html").read_text()
    found = re.findall(r'src="data:image/jpeg;base64,([^"]*)"', page)
    pictures = [Image.open(io.BytesIO(base64.b64decode(data))) for data in found]
    assert [picture.size for picture in pictures] == [(320, 160), (20, 10)]
    assert np.abs(np.asarray(pictures[0]).astype(int) - [0, 0, 255]).max() < 8
    assert re.findall(r'<p class="quiet">(.*?)</p>', page) == [
        "no picture can be shown: image_truncated",
        "no picture can be shown: image_unreadable",
        "no picture",
    ]
