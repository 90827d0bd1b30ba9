"""What maps keywords to places besides the model's own evidence: attention, masks of the data, detectors; and spaCy."""

import io
import json
import sys
import types

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from PIL import Image
from quick import quick_jit
from speaking_model import write_speaking_model
from test_build_regions import config_of, png, row, run
from tiny_detectors import write_dino, write_owl, write_sam
from torch_llava import params_of, tiny_config, torch_llava

from napo_jax import build_regions
from napo_jax.build_regions import Job, Options
from napo_jax.command import exit_with_one_line
from napo_jax.data.records import Record
from napo_jax.data.regions import read_region
from napo_jax.models import IMAGE_SLOT, Groups, Llava
from napo_jax.regions.attention import band_of, image_attention
from napo_jax.regions.chunks import find_chunks, name_phrases
from napo_jax.regions.detector import Detector
from napo_jax.regions.evidence import mask_of
from napo_jax.regions.grounders import mask_of_boxes, mask_of_masks, read_mask, read_masks
from napo_jax.sharding import make_mesh


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Has a model, and a file of six rows with masks; one of them has nothing that names a keyword."""
    folder = tmp_path_factory.mktemp("grounders")
    write_speaking_model(folder / "model")
    (folder / "in").mkdir()
    rows = [row(number) for number in range(6)]
    dog = np.zeros((24, 36), bool)
    dog[:6, :9] = True
    for each in rows:
        each["masks"] = [{"label": "dog", "mask": png_of(dog)}, {"label": "a big cat", "mask": png_of(dog[::-1, ::-1])}]
    pq.write_table(pa.Table.from_pylist(rows), folder / "in" / "a.parquet")
    return folder


@pytest.fixture(autouse=True)
def fast_compiles(monkeypatch):
    monkeypatch.setattr(build_regions, "make_mesh", lambda config, _: make_mesh(config, jax.devices()[:1]))


def png_of(mask):
    data = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8) * 255).save(data, "PNG")
    return data.getvalue()


# --- attention


@pytest.fixture(scope="module")
def looks():
    """A tiny model and that of `transformers`, two prefixes of other lengths, and an answer of six tokens to each."""
    config = tiny_config(kv_heads=2, remat="none")
    theirs, rng, count = torch_llava(config, seed=4), np.random.default_rng(1), config.vision.image_tokens
    prefix = np.full((2, 1, count + 7), 3, np.int32)
    for number, start in enumerate((1, 3)):
        prefix[number, 0] = rng.integers(3, 110, count + 7)
        prefix[number, 0, start : start + count] = IMAGE_SLOT
    lengths, answers = np.array([[count + 7], [count + 5]], np.int32), rng.integers(3, 110, (2, 1, 6)).astype(np.int32)
    images = rng.normal(size=(2, 1, 28, 28, 3)).astype(np.float32)
    groups = Groups(images, prefix, lengths, answers, np.array([[6], [5]], np.int32))
    words = np.zeros((2, 2, 6), np.float32)
    words[:, 0, 1:3], words[:, 1, 4] = 1, 1  # a word of two tokens, and one of one
    return Llava(config), params_of(theirs), theirs, groups, words


def test_attention_is_that_of_transformers(looks):
    """Of the word's own tokens to the image tokens, the mean over heads and over the band of layers."""
    model, params, theirs, groups, words = looks
    assert model.config.text.layers == 3
    run = lambda layers: quick_jit(lambda p: image_attention(model, p, groups, words, layers))(params)
    got, last = np.asarray(run((0.0, 0.6))), np.asarray(run((1.0, 1.0)))
    for number in range(2):
        length, said = groups.prefix_lengths[number, 0], groups.answer_lengths[number, 0]
        ids = [*groups.prefix_ids[number, 0, :length], *groups.answer_ids[number, 0, :said]]
        slots = np.flatnonzero(np.array(ids) == IMAGE_SLOT)
        ids = torch.tensor([[theirs.config.image_token_id if i == IMAGE_SLOT else int(i) for i in ids]])
        pixels = torch.from_numpy(groups.images[number].transpose(0, 3, 1, 2).copy())
        with torch.no_grad():
            out = theirs.model(input_ids=ids, pixel_values=pixels, output_attentions=True)
        by_layer = np.stack([layer[0].mean(0).numpy() for layer in out.attentions])  # [L, S, S]
        for word, tokens in enumerate(((1, 2), (4,))):
            want = by_layer[:, [length + token for token in tokens]].mean(1)[:, slots]
            np.testing.assert_allclose(got[number, word], want[:2].mean(0), rtol=1e-3, atol=1e-5)
            np.testing.assert_allclose(last[number, word], want[2], rtol=1e-3, atol=1e-5)
            before = by_layer[:2, [length + token - 1 for token in tokens]].mean((0, 1))[slots]
            assert not np.allclose(before, want[:2].mean(0), rtol=0.01), "not of what predicts the word"
    assert not np.any(image_attention(model, params, groups, np.zeros_like(words)))


def test_a_band_of_layers_has_one_at_least():
    assert [band_of((0.25, 0.75), count).indices(count)[:2] for count in (1, 2, 4, 32, 40)] == [
        (0, 1),
        (0, 2),
        (1, 3),
        (8, 24),
        (10, 30),
    ]
    assert band_of((0.0, 0.0), 4).indices(4)[:2] == (0, 1)
    assert band_of((1.0, 1.0), 4).indices(4)[:2] == (3, 4)


def test_layers_and_share_decide_the_places(looks):
    """Another band is another region; and of one band, a larger share holds a smaller one's places."""
    model, params, _, groups, words = looks
    found = {
        layers: np.asarray(quick_jit(lambda p, layers=layers: image_attention(model, p, groups, words, layers))(params))
        for layers in ((0.0, 0.3), (0.7, 1.0))
    }
    first, last = (evidence[0, 0] for evidence in found.values())
    assert (mask_of(first, 0.3) != mask_of(last, 0.3)).any()
    shares = (0.1, 0.3, 0.6, 0.9)
    masks = [mask_of(last, share) for share in shares]
    for share, mask, larger in zip(shares, masks, masks[1:], strict=False):
        assert last[mask.ravel()].sum() >= share * last.sum() * 0.999999
        assert (larger | mask == larger).all()
        assert larger.sum() > mask.sum()


def test_regions_by_attention(folder):
    rows, summary, said = run(folder, "attention", grounder="attention")
    assert summary["regions"] == {"marked": 5, "no_keyword": 1}
    assert "found by the attention of" in said
    assert all(0 < read_region(one["region"]).mask.sum() < 16 for one in rows if one["region_fault"] is None)
    others, _, _ = run(folder, "attention_last", grounder="attention", layers=(1.0, 1.0), share=0.2)
    assert [one["region"] for one in others] != [one["region"] for one in rows]
    with pytest.raises(ValueError, match=r"was begun with layers \[0\.25, 0\.75\], and not \[0\.0, 1\.0\]"):
        run(folder, "attention", grounder="attention", layers=(0.0, 1.0))


# --- masks of the data


def test_masks_lie_where_the_picture_lies_in_its_square():
    """A picture of 40 x 20: padded by 10 above and below, or cropped by 10 on the left and on the right."""
    left_half = np.zeros((20, 40), bool)
    left_half[:, :20] = True
    padded = mask_of_masks([left_half], 40, 20, "pad", 4)
    assert padded.astype(int).tolist() == [[0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]
    cropped = mask_of_masks([left_half], 40, 20, "crop", 4)
    assert cropped.astype(int).tolist() == [[1, 1, 0, 0]] * 4
    coarse = np.array([[True, False]])  # the same in one row of two
    np.testing.assert_array_equal(mask_of_masks([coarse], 40, 20, "pad", 4), padded)
    np.testing.assert_array_equal(mask_of_masks([np.kron(left_half, np.ones((3, 2), bool))], 40, 20, "pad", 4), padded)
    away = np.zeros((20, 40), bool)
    away[:, :8] = True
    assert not mask_of_masks([away], 40, 20, "crop", 4).any(), "cropped away"
    # Of a cell of 10 x 10, a quarter is enough; less is marked only where nothing else holds more of it.
    quarter, speck, both = (np.zeros((20, 40), bool) for _ in range(3))
    quarter[0:5, 10:15] = True
    speck[0:3, 38:40] = True
    speck[0:3, 37] = True
    assert np.argwhere(mask_of_masks([quarter], 40, 20, "pad", 4)).tolist() == [[1, 1]]
    assert np.argwhere(mask_of_masks([speck], 40, 20, "pad", 4)).tolist() == [[1, 3]]
    both[0:5, 10:15] = True
    both[0:4, 20:26] = True  # 24 of 100
    assert np.argwhere(mask_of_masks([both], 40, 20, "pad", 4)).tolist() == [[1, 1]]
    assert not mask_of_masks([], 40, 20, "pad", 4).any()
    box = np.zeros((20, 40), bool)
    box[3:17, 8:31] = True
    for rule in ("pad", "crop"):
        np.testing.assert_array_equal(
            mask_of_masks([box], 40, 20, rule, 4), mask_of_boxes([(8, 3, 31, 17)], 40, 20, rule, 4)
        )


def test_masks_in_every_form():
    mask = np.random.default_rng(0).random((5, 7)) < 0.4
    packed = {"width": 7, "height": 5, "bits": np.packbits(mask).tobytes()}
    grey = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8)).save(grey, "PNG")  # of 0 and 1, which looks black
    for value in (png_of(mask), grey.getvalue(), mask.astype(int).tolist(), packed):
        np.testing.assert_array_equal(read_mask(value), mask)
    for value in (
        b"no picture",
        packed | {"width": 70},
        packed | {"bits": None},
        {"width": 1},
        [[1, 0], [1]],
        [1],
        "x",
    ):
        assert read_mask(value) is None
    assert read_mask([]) is read_mask(None) is None
    good, bad = {"label": "dog", "mask": [[1]]}, {"label": None, "mask": [[1]]}
    assert [each["label"] for each in read_masks([good, bad, "x", {"label": "cat", "mask": b""}])] == ["dog"]
    assert read_masks(None) == []


def test_regions_by_masks_are_those_of_the_same_boxes(folder):
    rows, summary, said = run(folder, "masks", grounder="masks")
    boxes, _, _ = run(folder, "boxes", grounder="boxes")
    assert [one["region"] for one in rows] == [one["region"] for one in boxes]
    assert summary["regions"] == {"marked": 4, "no_keyword": 1, "not_found": 1}
    assert "found by the masks of the rows" in said


# --- detectors


@pytest.fixture(scope="module")
def detectors(tmp_path_factory):
    folder = tmp_path_factory.mktemp("detectors")
    return str(write_owl(folder / "owl")), str(write_sam(folder / "sam"))


PICTURE = Image.fromarray(np.random.default_rng(8).integers(0, 256, (24, 36, 3), np.uint8))


def test_boxes_are_in_pixels_of_the_picture(detectors):
    """Those of the model, by hand: from middle and size, in shares of width and height."""
    owl, _ = detectors
    detector = Detector(owl, threshold=0.0)
    got = np.array(detector.find(PICTURE, ["dog", "a red hat"]))
    model = transformers.OwlViTForObjectDetection.from_pretrained(owl).eval()
    inputs = transformers.AutoProcessor.from_pretrained(owl)(
        images=PICTURE, text=[["dog", "a red hat"]], return_tensors="pt"
    )
    with torch.no_grad():
        out = model(**inputs)
    x, y, w, h = out.pred_boxes[0].numpy().T
    want = np.stack([(x - w / 2) * 36, (y - h / 2) * 24, (x + w / 2) * 36, (y + h / 2) * 24], axis=1)
    assert len(want) == 16, "one for each patch"
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    scores = torch.sigmoid(out.logits[0]).max(-1).values.numpy()
    some = float(np.sort(scores)[8])
    assert len(Detector(owl, threshold=some).find(PICTURE, ["dog", "a red hat"])) == (scores > some).sum() == 7
    assert Detector(owl, threshold=1.0).find(PICTURE, ["dog"]) == []
    long = " ".join(["dog"] * 40)
    assert len(detector.find(PICTURE, [long])) == 16, "a keyword may be longer than the detector reads"


def test_another_kind_of_detector_reads_the_same_question(tmp_path):
    """Grounding DINO, which takes all keywords as one text."""
    folder = str(write_dino(tmp_path / "dino"))
    boxes = Detector(folder, threshold=0.0).find(PICTURE, ["dog", "a red hat"])
    assert len(boxes) == 10, "one for each query"
    assert np.isfinite(boxes).all()
    assert Detector(folder, threshold=1.0).find(PICTURE, ["dog"]) == []
    model = transformers.GroundingDinoForObjectDetection.from_pretrained(folder).eval()
    inputs = transformers.AutoProcessor.from_pretrained(folder)(
        images=PICTURE, text="dog. a red hat.", return_tensors="pt"
    )
    with torch.no_grad():
        x, y, w, h = model(**inputs).pred_boxes[0].numpy().T
    want = np.stack([(x - w / 2) * 36, (y - h / 2) * 24, (x + w / 2) * 36, (y + h / 2) * 24], axis=1)
    np.testing.assert_allclose(boxes, want, rtol=1e-3, atol=1e-3)


def test_outlines_are_those_that_sam_trusts_most(detectors):
    owl, sam = detectors
    detector, boxes = Detector(owl, sam), [(2.0, 1.0, 20.0, 13.0), (10.0, 4.0, 35.0, 22.0)]
    masks = detector.outline(PICTURE, boxes)
    assert [(mask.shape, mask.dtype) for mask in masks] == [((24, 36), bool)] * 2
    model, processor = (
        transformers.SamModel.from_pretrained(sam).eval(),
        transformers.AutoProcessor.from_pretrained(sam),
    )
    inputs = processor(images=PICTURE, input_boxes=[[list(box) for box in boxes]], return_tensors="pt")
    inputs = inputs.to(torch.float32)
    with torch.no_grad():
        out = model(**inputs)
    large = torch.nn.functional.interpolate(out.pred_masks[0], (64, 64), mode="bilinear", align_corners=False)
    height = int(inputs["reshaped_input_sizes"][0][0])
    large = torch.nn.functional.interpolate(large[..., :height, :], (24, 36), mode="bilinear", align_corners=False)
    for number, mask in enumerate(masks):
        best = int(out.iou_scores[0, number].argmax())
        np.testing.assert_array_equal(mask, (large[number, best] > 0).numpy())
        others = [one for one in range(3) if one != best]
        assert any((mask != (large[number, one] > 0).numpy()).any() for one in others)


class Known:
    """A stand-in for a detector: the boxes it has, and half of each as what is in it."""

    outlines = False

    def __init__(self, *boxes):
        self.boxes, self.asked = list(boxes), []

    def find(self, image, words):
        """Returns them."""
        self.asked.append((image.size, words))
        return self.boxes

    def outline(self, image, boxes):
        """Returns their left halves."""
        masks = np.zeros((len(boxes), *image.size[::-1]), bool)
        for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
            mask[int(top) : int(bottom), int(left) : int(left + right) // 2] = True
        return list(masks)


@pytest.fixture(scope="module")
def job(folder):
    make = lambda rule: Job(
        config_of(folder, image_rule=rule), Options(input=(str(folder / "in"),), output=str(folder / f"job_{rule}"))
    )
    return {rule: make(rule).marker for rule in ("pad", "crop")}


def mark(marker, detector, size=(40, 20), text="A dog and two cats."):
    asked = marker.ask(Record("0" * 48, png(1, size), "What is there?", {"chosen": text}))
    marked = marker.by_detector(detector, asked)
    return marked, marker.region(marked).mask.astype(int).tolist()


def test_a_box_lies_where_the_picture_does(job):
    """By hand, of 4 x 4 patches: the box (20, 0, 40, 10) of a picture of 40 x 20 is its upper right quarter."""
    known = Known((20.0, 0.0, 40.0, 10.0))
    marked, mask = mark(job["pad"], known)
    assert known.asked == [((40, 20), marked.keywords)], "it is asked about the picture itself, and the keywords"
    assert sorted(marked.keywords) == ["dog", "two cats"]
    assert mask == [[0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    _, mask = mark(job["crop"], known)  # of the middle 20 x 20, the right half of the upper half
    assert mask == [[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    _, mask = mark(job["pad"], Known((0.0, 0.0, 20.0, 10.0)), size=(20, 40))
    assert mask == [[0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    _, mask = mark(job["crop"], Known((0.0, 10.0, 20.0, 20.0)), size=(20, 40))
    assert mask == [[1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    known.outlines = True  # what is in it is its left half
    _, mask = mark(job["pad"], known)
    assert mask == [[0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_what_is_not_found_is_the_whole_picture(job):
    marked, mask = mark(job["pad"], Known())
    assert (marked.fault, mask) == ("not_found", [[1] * 4] * 4)
    assert mark(job["crop"], Known((0.0, 0.0, 8.0, 20.0)))[0].fault == "not_found", "cropped away"


def test_regions_by_a_detector(folder, detectors):
    owl, sam = detectors
    rows, summary, said = run(folder, "detected", grounder="detector", detector=owl, threshold=0.0)
    assert summary["regions"] == {"marked": 5, "no_keyword": 1}
    assert f"found by the detector {owl}" in said
    _, none, _ = run(folder, "none", grounder="detector", detector=owl, threshold=1.0)
    assert none["regions"] == {"not_found": 5, "no_keyword": 1}
    outlined, _, _ = run(folder, "outlined", grounder="detector", detector=owl, sam=sam, threshold=0.0)
    assert [one["region"] for one in outlined] != [one["region"] for one in rows]
    with pytest.raises(ValueError, match="was begun with threshold"):
        run(folder, "detected", grounder="detector", detector=owl, threshold=0.5)


def test_without_torch_it_is_one_line(monkeypatch, detectors):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match=r"needs PyTorch, which is not installed: pip install 'napo-jax\[detect\]'"):
        Detector(detectors[0])


# --- spaCy


def spans(text, *phrases):
    """Returns what spaCy's documentation says of noun chunks: spans with a root."""
    found = []
    for phrase, root in phrases:
        start = text.index(phrase)
        token = types.SimpleNamespace(idx=start + phrase.index(root), text=root)
        found.append(types.SimpleNamespace(start_char=start, end_char=start + len(phrase), root=token, text=phrase))
    return found


def phrases_of(text, *phrases):
    return [(span.start_char, span.end_char, span.root.idx) for span in spans(text, *phrases)]


def test_dull_phrases_are_dropped_by_the_same_rule():
    text = (
        "It shows a slice of pizza, the man's left hand, the left side and all the dogs. Two people take a run there."
    )
    found = phrases_of(
        text,
        ("It", "It"),
        ("a slice", "slice"),
        ("pizza", "pizza"),
        ("the man's left hand", "hand"),
        ("the left side", "side"),
        ("all the dogs", "dogs"),
        ("Two people", "people"),
        ("a run", "run"),
    )
    chunks = name_phrases(text, found)
    assert [chunk.text for chunk in chunks] == ["pizza", "man's left hand", "dogs", "Two people", "run"]
    assert [chunk.head for chunk in chunks] == ["pizza", "hand", "dog", "person", "run"]
    by_lists = {chunk.text: chunk for chunk in find_chunks(text)}
    for chunk in chunks:
        assert chunk == by_lists.get(chunk.text, chunk)
        assert text[chunk.start : chunk.end] == chunk.text
    assert len(by_lists.keys() & {chunk.text for chunk in chunks}) >= 4
    # The lists take "hug" for a verb; a parser may know better.
    (chunk,) = name_phrases("They share a hug.", phrases_of("They share a hug.", ("a hug", "hug")))
    assert (chunk.text, chunk.head) == ("hug", "hug")
    assert find_chunks("They share a hug.") == []
    assert name_phrases("Those.", [(0, 5, 0)]) == name_phrases("", []) == []


class StandIn(types.ModuleType):
    """`spacy`, as far as it is used: load(), and noun_chunks of what a pipeline returns."""

    def __init__(self):
        super().__init__("spacy")
        self.loaded = []

    def load(self, name):
        """Returns the one pipeline that is there."""
        if name != "en_core_web_sm":
            raise OSError(f"[E050] Can't find model '{name}'. It doesn't seem to be a Python package.")
        self.loaded.append(name)

        def nlp(text):
            known = (("A dog", "dog"), ("a tree", "tree"), ("It", "It"), ("The man", "man"), ("a cup", "cup"))
            return types.SimpleNamespace(noun_chunks=iter(spans(text, *((p, r) for p, r in known if p in text))))

        nlp.meta = {"lang": "en", "name": "core_web_sm", "version": "3.8.0"}
        return nlp


def test_keywords_by_spacy(folder, monkeypatch):
    spacy = StandIn()
    monkeypatch.setitem(sys.modules, "spacy", spacy)
    rows, _, _ = run(folder, "spacy", grounder="boxes", spacy="en_core_web_sm")
    assert spacy.loaded == ["en_core_web_sm"]
    assert [sorted(one["keywords"]) for one in rows] == [["dog"], [], [], ["dog", "tree"], ["cup", "man"], ["dog"]]
    by_lists, _, _ = run(folder, "lists", grounder="boxes")
    assert len(by_lists[1]["keywords"]) == 2, "the lists find what this stand-in does not"
    assert "en_core_web_sm 3.8.0" in json.dumps(json.loads(next((folder / "spacy").rglob("manifest.json")).read_text()))


@pytest.mark.parametrize(
    ("arguments", "module", "line"),
    [
        (["--spacy", "en_core_web_sm"], None, "needs spaCy, which is not installed: pip install 'napo-jax[spacy]'"),
        (["--spacy", "en_none"], StandIn(), "spaCy has no model 'en_none'"),
        (["--grounder", "detector"], None, "--grounder detector and --detector FOLDER go together"),
        (["--detector", "owl"], None, "--grounder detector and --detector FOLDER go together"),
        (["--grounder", "boxes", "--sam", "sam"], None, "--sam and --threshold are of --grounder detector"),
        (
            ["--grounder", "detector", "--detector", "owl/none"],
            None,
            "owl/none is no folder: models are read from local",
        ),
        (["--grounder", "detector", "--detector", "{}/model"], None, "cannot be read as a AutoModelForZeroShot"),
        (["--layers", "0.8", "0.2"], None, "layers must be two shares of the depth, the lower one first"),
    ],
)
def test_bad_usage_is_one_line_and_exit_2(folder, monkeypatch, arguments, module, line, capsys):
    monkeypatch.setitem(sys.modules, "spacy", module)
    words = ["--config", "configs/debug.py", "--model.path", "{}/model", "--input", "{}/in", "--output", "{}/bad"]
    with pytest.raises(SystemExit) as stop:
        exit_with_one_line(lambda: build_regions.main([word.format(folder) for word in [*words, *arguments]]))
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert line in err
    assert err.count("\n") == 1
