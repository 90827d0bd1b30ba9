"""A whole CLIP, held against `transformers`; and pairs of drawn answers by what it says of them."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
import tokenizers
import torch
import transformers
from PIL import Image

from napo_jax import building
from napo_jax.build_ranked import Options, build, choose, main
from napo_jax.command import exit_with_one_line
from napo_jax.config import load_config
from napo_jax.data.images import MEAN, STD
from napo_jax.journal import StoppedError
from napo_jax.metrics import Console
from napo_jax.models.clip_pair import load_clip

WORDS = ("a", "red", "blue", "dog", "cat", "runs", "on", "the", "grass", "?", "what", "is", "this")
LONGEST = 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Has a tiny CLIP with weights far from zero, in the files of `transformers`."""
    folder = tmp_path_factory.mktemp("clip")
    vocabulary = {word: number for number, word in enumerate((*WORDS, "<unk>", "<s>", "</s>"))}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = [("<s>", vocabulary["<s>"]), ("</s>", vocabulary["</s>"])]
    words.post_processor = tokenizers.processors.TemplateProcessing("<s> $A </s>", special_tokens=special)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
    tokenizer.save_pretrained(folder)
    shape = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4}
    text = shape | {"vocab_size": len(vocabulary), "max_position_embeddings": LONGEST, "projection_dim": 12}
    text |= {"bos_token_id": vocabulary["<s>"], "eos_token_id": vocabulary["</s>"]}
    vision = shape | {"hidden_size": 32, "image_size": 24, "patch_size": 8, "projection_dim": 12}
    torch.manual_seed(0)
    model = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 0.5) + ("norm" in name))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(folder):
    return load_clip(folder)


def test_both_towers_are_those_of_transformers(folder, clip):
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = ["a red dog", "", "the cat runs on the grass ?", "a a a a a a a a a a a a", "strange words"]
    pictures = np.random.default_rng(0).integers(0, 256, (3, 24, 24, 3), np.uint8)
    pixels = torch.tensor(((pictures / np.float32(255) - MEAN) / STD).transpose(0, 3, 1, 2).astype(np.float32))
    ids = tokenizer(texts, truncation=True, max_length=LONGEST, padding=True, return_tensors="pt")
    with torch.no_grad():
        out = model(input_ids=ids.input_ids, attention_mask=ids.attention_mask, pixel_values=pixels)
    np.testing.assert_allclose(clip.images(pictures), out.image_embeds, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(clip.texts(texts), out.text_embeds, rtol=1e-4, atol=1e-5)
    assert clip.texts([]).shape == (0, 12)
    many = [texts[number % 5] for number in range(130)]
    np.testing.assert_array_equal(clip.texts(many), clip.texts(texts)[np.arange(130) % 5])


def changed(folder, target, config=None, tensors=None):
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    if config:
        whole = json.loads((target / "config.json").read_text())
        config(whole)
        (target / "config.json").write_text(json.dumps(whole))
    if tensors:
        whole = safetensors.numpy.load_file(target / "model.safetensors")
        tensors(whole)
        safetensors.numpy.save_file(whole, target / "model.safetensors")
    return target


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"config": lambda c: c.update(model_type="siglip")}, "is of the type 'siglip'; expected that of a CLIP"),
        (
            {"config": lambda c: c["text_config"].update(hidden_act="gelu")},
            "text_config.hidden_act: expected 'quick_gelu'",
        ),
        ({"tensors": lambda t: t.pop("visual_projection.weight")}, "has no tensor visual_projection.weight"),
        ({"tensors": lambda t: t.update(other=np.zeros(2, np.float32))}, "has tensors that no CLIP has, such as other"),
    ],
    ids=["type", "activation", "missing", "unknown"],
)
def test_another_model_is_refused(folder, tmp_path, change, line):
    with pytest.raises(ValueError, match=line.replace(".", r"\.")):
        load_clip(changed(folder, tmp_path / "other", **change))


# --- the pairs


@pytest.mark.parametrize(
    ("texts", "scores", "options", "want"),
    [
        (["a b", "c d", "e f"], [20, 25, 22.9], {}, ("c d", "a b", None)),
        (["a b", "c d", "e f"], [20, 25, 24], {"gap": 6.0}, (None, None, "small_gap")),
        (["a b", "c d e f", "e f"], [20, 25, 24], {}, (None, None, "other_lengths")),
        (["a b", "c d e f", "e f g"], [20, 25, 22], {}, ("c d e f", "e f g", None)),
        (["a b", "c d e f"], [20, 25], {"longer": 2.0}, ("c d e f", "a b", None)),
        (["a b", "a b"], [25, 20], {}, (None, None, "all_the_same")),
        (["a b", "c d"], [25, 20], {"least": 26.0}, (None, None, "fits_badly")),
        (["a b", "c d"], [22, 20], {}, ("a b", "c d", None)),  # as much as is asked for
    ],
)
def test_a_pair_by_hand(texts, scores, options, want):
    assert choose(texts, scores, **{"gap": 2.0, "longer": 1.5, "least": 0.0} | options) == want


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")
    rows = []
    for number in range(7):
        data = io.BytesIO()
        pixels = np.random.default_rng(number).integers(0, 256, (30, 40, 3), np.uint8)
        Image.fromarray(pixels).save(data, "PNG")
        answers = ["a red dog", "the blue cat", "a cat runs", "the dog is blue"][number % 2 :]
        rows.append(
            {"image": data.getvalue(), "question": "what is this ?", "chosen": "x", "rejected": "y", "drawn": answers}
        )
    rows[3]["drawn"], rows[5]["image"] = None, b"no picture"
    pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet", row_group_size=3)
    return folder


def run(drawn, clip_folder, output, **options):
    said = io.StringIO()
    options = {"piece": 2, "batch": 2, "gap": 0.0, "longer": 2.0} | options
    whole = Options(input=(str(drawn),), output=str(output), clip=str(clip_folder), **options)
    summary = build(load_config("configs/debug.py"), whole, Console(said))
    file = output / "a.parquet"
    return (pq.read_table(file).to_pylist() if file.exists() else None), summary, said.getvalue()


def test_rows_get_the_answers_that_fit_best_and_least(drawn, folder, clip, tmp_path, monkeypatch):
    rows, summary, said = run(drawn, folder, tmp_path / "out")
    assert summary == {"rows": 7, "pairs": {"ranked": 5, "no_answers": 1, "image_unreadable": 1}}
    assert "--data.columns chosen fits rejected fits_least" in said
    for number, one in enumerate(rows):
        if number in (3, 5):
            assert one["fits"] is one["fits_least"] is one["clip_scores"] is None
            continue
        picture = Image.open(io.BytesIO(one["image"])).resize((32, 24), Image.Resampling.BICUBIC).crop((4, 0, 28, 24))
        cosines = clip.texts(one["drawn"]) @ clip.images(np.array(picture)[None])[0]
        np.testing.assert_allclose(one["clip_scores"], 100 * cosines, atol=0.05)
        assert one["fits"] == one["drawn"][int(np.argmax(cosines))]
        assert one["fits_least"] == one["drawn"][int(np.argmin(cosines))]
    # Stopped, it goes on; other limits need no new scores; other words for CLIP are another output.
    asked = []

    def stop(signal):
        asked.append(signal)
        if len(asked) == 6:
            raise StoppedError("asked", 143)

    monkeypatch.setattr(building, "raise_if_asked", stop)
    with pytest.raises(StoppedError):
        run(drawn, folder, tmp_path / "stopped")
    monkeypatch.undo()
    again, _, said = run(drawn, folder, tmp_path / "stopped")
    assert 0 < int(said.partition(" to go")[0].rpartition(" ")[2]) < 7
    assert again == rows
    assert "all of that is done" in run(drawn, folder, tmp_path / "stopped")[2]
    stricter, summary, said = run(drawn, folder, tmp_path / "stopped", gap=1000.0)
    assert "; 0 to go" in said
    assert summary["pairs"]["small_gap"] == 5
    assert [one["clip_scores"] for one in stricter] == [one["clip_scores"] for one in rows]
    with pytest.raises(ValueError, match="was begun with with_question"):
        run(drawn, folder, tmp_path / "stopped", with_question=True)
    asked_too, _, _ = run(drawn, folder, tmp_path / "asked", with_question=True)
    assert asked_too[0]["clip_scores"] != rows[0]["clip_scores"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "say what to read and where to write"),
        (["--input", "{drawn}", "--output", "{tmp}", "--clip", "{tmp}"], "does not exist; expected it in the folder"),
        (["--input", "{drawn}", "--output", "{tmp}", "--clip", "{clip}", "--answers", "said"], "has no column said"),
        (["--input", "{drawn}", "--output", "{tmp}", "--clip", "{clip}", "--longer", "0.5"], "longer at least 1"),
    ],
)
def test_what_cannot_be_used_is_one_line(drawn, folder, tmp_path, arguments, line, capsys):
    words = [word.format(drawn=drawn, tmp=tmp_path, clip=folder) for word in arguments]
    with pytest.raises(SystemExit) as ended:
        exit_with_one_line(lambda: main(["--config", "configs/debug.py", *words]))
    assert ended.value.code == 2
    assert line in capsys.readouterr().err
