"""The evaluate command: the model's own answers to all questions or no file, and numbers that need no model."""

import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import quick_jit
from speaking_model import write_speaking_model

from napo_jax import answering
from napo_jax.command import exit_with_one_line
from napo_jax.data.images import decode, fit, normalise
from napo_jax.data.prompts import Prompter, load_tokenizer
from napo_jax.decoding import Decoding
from napo_jax.evals.benchmarks import Asked
from napo_jax.evaluate import ScoreOptions, main, score
from napo_jax.generate import Generator, Prompt
from napo_jax.sharding import make_mesh
from napo_jax.speaker import Speaker
from napo_jax.weights import load_pretrained
from napo_jax.world.exams import write_chair, write_pope, write_vlind, write_world

TOKENS = 12


@pytest.fixture(autouse=True)
def fast_compiles(monkeypatch):
    monkeypatch.setattr(jax, "jit", quick_jit)
    use_devices(monkeypatch, 1)


def use_devices(monkeypatch, count):
    monkeypatch.setattr(answering, "make_mesh", lambda config, _: make_mesh(config, jax.devices()[:count]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Has a model, and the world's exams; two of its own questions come without a picture."""
    folder = tmp_path_factory.mktemp("evaluate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "jit", quick_jit)
        write_speaking_model(folder / "model")
    write_world(folder / "world", 3)
    file = folder / "world" / "world.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows += [rows[i] | {"key": f"{rows[i]['group']}/none", "image": None} for i in (0, 1)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_vlind(folder / "vlind", 2, pictures=2)
    write_pope(folder / "pope", 2)
    write_chair(folder / "chair", 2)
    return folder


def flags(folder, benchmark="world", **options):
    """Returns the flags of a benchmark's questions, and further ones."""
    options = {"benchmark": benchmark, "data": folder / benchmark} | options
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def ask(folder, answers, benchmark="world", **options):
    """Asks the model by the command."""
    options = {"checkpoint": folder / "model", "decoding.max-tokens": TOKENS, "slots": 3} | options
    main(["answer", *flags(folder, benchmark, answers=answers, **options)])


def read(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def prompts():
    """What the run of `whole` asks: {number of the question: its prompt}."""
    return {}


@pytest.fixture(scope="module")
def whole(folder, prompts):
    """What an uninterrupted run on one device writes."""
    generate = Generator.__call__

    def keep(prompt):
        prompts[prompt.key] = prompt
        return prompt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "jit", quick_jit)
        patch.setattr(Generator, "__call__", lambda self, asked: generate(self, map(keep, asked)))
        use_devices(patch, 1)
        ask(folder, folder / "whole.jsonl")
    return folder / "whole.jsonl"


def test_answers_are_what_the_model_says_to_each_question_alone(folder, prompts, whole):
    model, params = load_pretrained(folder / "model", dtype=jnp.float32, remat="none")
    tokenizer = load_tokenizer(folder / "model")
    prompter = Prompter(tokenizer, "llava_v1", model.config.vision.image_tokens)
    decoding = Decoding(max_tokens=TOKENS)
    generator = Generator(model, params, decoding, eos=tokenizer.eos_token_id, slots=1, prompt_tokens=400)
    questions, rows = read(folder / "world" / "world.jsonl"), read(whole)
    assert [row["key"] for row in rows] == [question["key"] for question in questions]
    for number, (question, row) in enumerate(zip(questions, rows, strict=True)):
        picture = None
        if question["image"] is not None:
            data = (folder / "world" / question["image"]).read_bytes()
            picture = np.asarray(normalise(fit(decode(data), model.config.vision.image_size, "pad")))
        ids = np.array(prompter.prefix(question["text"], image=picture is not None), np.int32)
        np.testing.assert_array_equal(prompts[number].ids, ids)  # whatever stands there, this model may say the same
        (answer,) = generator([Prompt(0, ids, picture)])
        assert row["text"] == tokenizer.decode(answer.ids, skip_special_tokens=True).strip()
    said = {row["key"]: row["text"] for row in rows}
    assert len(set(said.values())) > 4, "answers are much the same"
    assert said["usual/0"] != said["usual/none"], "the picture does not matter"


def test_a_run_that_was_interrupted_goes_on_elsewhere(folder, whole, monkeypatch, capsys):
    """Five answers and then Ctrl-C; the rest on two devices."""
    file, spell, calls = folder / "stopped.jsonl", Speaker.spell, []

    def stop(self, ids):
        calls.append(ids)
        if len(calls) > 5:
            raise KeyboardInterrupt
        return spell(self, ids)

    monkeypatch.setattr(Speaker, "spell", stop)
    with pytest.raises(KeyboardInterrupt):
        ask(folder, file)
    assert not file.exists()
    with pytest.raises(ValueError, match="names no file"):
        main(["score", *flags(folder, answers=file)])
    monkeypatch.setattr(Speaker, "spell", spell)
    use_devices(monkeypatch, 2)
    capsys.readouterr()
    ask(folder, file, slots=1)
    assert "asks     8 questions of world, 3 to go" in capsys.readouterr().out
    assert file.read_bytes() == whole.read_bytes()


def test_what_is_finished_is_written_again_without_a_model(folder, whole, monkeypatch):
    before = whole.read_bytes()
    whole.unlink()
    monkeypatch.setattr(answering, "load_speaker", None)
    ask(folder, whole)
    assert whole.read_bytes() == before


def test_answers_of_another_model_or_way_of_asking_are_refused(folder, whole):
    other = folder / "other"
    shutil.copytree(folder / "model", other)
    data = bytearray((other / "model.safetensors").read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[start::4] = bytes(byte ^ 1 for byte in data[start::4])  # the last bit of every number
    (other / "model.safetensors").write_bytes(data)
    before = whole.read_bytes()
    for options, message in (
        ({"checkpoint": other}, "source"),
        ({"decoding.beams": 2}, "decoding.beams 1, and not 2"),
        ({"dtype": "bfloat16"}, 'dtype "float32", and not "bfloat16"'),
        ({"template": "vicuna_v1"}, 'template "llava_v1", and not "vicuna_v1"'),
        ({"benchmark": "pope"}, "questions"),
    ):
        with pytest.raises(ValueError, match=f"whole.jsonl.books was begun with {message}"):
            ask(folder, whole, **options)
    assert whole.read_bytes() == before


@pytest.mark.parametrize("change", [{"row": 99}, {"row": -1}, {"name": "usual/9"}, {"text": None}])
def test_an_answer_to_no_question_is_one_line(folder, whole, tmp_path, change):
    shutil.copytree(f"{whole}.books", tmp_path / "a.jsonl.books")
    (piece,) = (tmp_path / "a.jsonl.books" / "pieces").iterdir()
    first, *rest = read(piece)
    write(piece, [first | change, *rest])
    with pytest.raises(ValueError, match=r"a.jsonl.books has an answer to 'usual/.' that is none to these questions"):
        ask(folder, tmp_path / "a.jsonl")


def test_answers_about_other_pictures_are_refused(folder, whole, tmp_path, monkeypatch):
    """Half of the answers are there; pictures that have only moved are the same ones."""
    data = shutil.copytree(folder / "world", tmp_path / "world")
    shutil.copytree(f"{whole}.books", tmp_path / "part.jsonl.books")
    for piece in (tmp_path / "part.jsonl.books" / "pieces").iterdir():
        write(piece, read(piece)[:-2])
    monkeypatch.setattr(answering, "load_speaker", None)
    with pytest.raises(TypeError, match="not callable"):
        ask(folder, tmp_path / "part.jsonl", images=data)
    shutil.copy(data / "images" / "usual_1.png", data / "images" / "usual_0.png")
    for file in (tmp_path / "part.jsonl", whole):
        with pytest.raises(ValueError, match=r"begun with pictures.images/usual_0.png \"\w+\", and not \"\w+\": go on"):
            ask(folder, file, images=data)
    assert not (tmp_path / "part.jsonl").exists()


def test_a_file_of_somebody_else_is_not_written_over(folder, tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text("mine")
    with pytest.raises(ValueError, match=r"mine.jsonl is there, and nothing in .*mine.jsonl.books says how it was"):
        ask(folder, file)
    assert file.read_text() == "mine"


def test_answers_have_somewhere_to_go_before_a_model_is_loaded(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(answering, "load_speaker", None)
    (tmp_path / "file").write_text("")
    for answers, message in ((tmp_path, "is a folder; name a file"), (tmp_path / "file/a.jsonl", "file is no folder")):
        with pytest.raises(ValueError, match=message):
            ask(folder, answers)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model": {"path": 3}}, "config.json has no train, lora: it is not as"),
        (
            {"model": {"path": 3, "size": None}, "train": {"seed": 0}, "lora": {}},
            "config.json has 3 as model.path, expected a text",
        ),
        ([], r"config.json is \[\], expected an object"),
    ],
)
def test_a_run_whose_config_was_changed_is_one_line(folder, tmp_path, config, message):
    (tmp_path / "run" / "checkpoints" / "5").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        ask(folder, tmp_path / "a.jsonl", checkpoint=tmp_path / "run")


def name_pictures(data, name):
    """Gives all questions the same picture."""
    write(data / "world.jsonl", [row | {"image": name} for row in read(data / "world.jsonl")])


@pytest.mark.parametrize(
    ("damage", "options", "message"),
    [
        (
            lambda data: (data / "images" / "usual_1.png").unlink(),
            {},
            "1 of 6 pictures are not in .*images/usual_1",
        ),
        (lambda data: os.truncate(data / "images" / "changed_2.png", 200), {}, "images/changed_2.png: .*fetch it"),
        (lambda data: (data / "world.jsonl").unlink(), {}, "world.jsonl is missing"),
        (lambda data: os.truncate(data / "world.jsonl", 300), {}, "world.jsonl, line 2, is not JSON"),
        (None, {"prompts": "gpt4o"}, "prompts must be one of plain, got gpt4o"),
        (None, {"part": "generative"}, "world has no part: leave it out"),
        (None, {"benchmark": "amber", "part": "half"}, "part must be one of all, generative"),
        (None, {"benchmark": "pope", "splits": "hard"}, "splits must be one or more of adversarial, .*, got hard"),
        (lambda data: (data / "world.jsonl").write_text(""), {}, "/data.* has no (question of world|rows); fetch"),
        (None, {"benchmark": "mme"}, "benchmark"),
        (None, {"images": "elsewhere"}, "6 of 6 pictures are not in .*/elsewhere"),
        (None, {"checkpoint": "nowhere"}, "nowhere"),
        (None, {"decoding.max-tokens": 2000}, "question 'usual/0' has .* leaves room for 48 .* lower it"),
        (None, {"decoding.max-tokens": 5000}, "leaves room for 0 "),
        (lambda data: name_pictures(data, "a" * 4000), {}, "1 of 1 pictures are not in .*first aaa"),
        (lambda data: name_pictures(data, "images"), {}, "1 of 1 pictures are not in .*first images"),
        (None, {"slots": 0}, "slots must be at least 1"),
        (None, {"checkpont": "x"}, "--checkpoint"),
    ],
)
def test_what_cannot_be_asked_is_one_line(folder, tmp_path, capsys, damage, options, message):
    """And no benchmark that is smaller."""
    data = folder / options.get("benchmark", "world")
    if damage is not None:
        data = shutil.copytree(data, tmp_path / "data")
        damage(data)
    with pytest.raises(SystemExit) as error:
        exit_with_one_line(lambda: ask(folder, tmp_path / "a.jsonl", **{"data": data} | options))
    assert error.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line), line
    assert not (tmp_path / "a.jsonl").exists()


def strict(file):
    """Reads JSON as it is defined: without nan."""

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(file.read_text(), parse_constant=refuse)


def test_numbers_say_how_their_answers_were_made(folder, whole, tmp_path, capsys):
    out = tmp_path / "a.json"
    main(["score", *flags(folder, answers=whole, out=out)])
    scored = strict(out)
    assert scored["model"] == str(folder / "model")
    assert scored["dtype"] == "float32"
    assert scored["decoding"] == json.loads(json.dumps(dataclasses.asdict(Decoding(max_tokens=TOKENS))))
    assert (scored["template"], scored["image_rule"]) == ("llava_v1", "pad")
    assert re.fullmatch(r"[0-9a-f]{32}", scored["weights"])
    assert (scored["benchmark"], scored["prompts"], scored["variant"]) == ("world", "plain", "first_sentence")
    assert scored["counts"]["usual"] == [0, 4]
    assert "usual                       0.00  0/4" in capsys.readouterr().out


def test_answers_that_were_changed_name_no_model(folder, whole, tmp_path, capsys):
    file, out = tmp_path / "a.jsonl", tmp_path / "a.json"
    shutil.copytree(f"{whole}.books", f"{file}.books")
    shutil.copy(whole, file)
    main(["score", *flags(folder, answers=file, out=out)])
    assert strict(out)["model"] == str(folder / "model")
    assert "note" not in strict(out)
    write(file, [row | {"text": "Mine."} for row in read(file)])
    capsys.readouterr()
    main(["score", *flags(folder, answers=file, out=out)])
    scored = strict(out)
    assert not {"model", "weights", "dtype", "decoding", "template", "image_rule"} & scored.keys()
    said = f"{file} is not the file that {file}.books wrote, so model, weights and decoding are left out"
    assert scored["note"] == said
    assert f"note                    {said}\n" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "a.jsonl.books" / "manifest.json").read_text())
    (tmp_path / "a.jsonl.books" / "manifest.json").write_text(json.dumps(manifest | {"settings": None}))
    with pytest.raises(ValueError, match=r"a.jsonl.books/manifest.json is damaged \(has null as settings"):
        main(["score", *flags(folder, answers=file)])


def test_numbers_go_where_they_are_to_or_nothing_is_begun(folder, by_hand, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for out in ("a.json", "scores/of/a.json"):
        main(["score", *flags(folder, answers=by_hand, out=out)])
        assert strict(tmp_path / out)["usual"] == 75
    (tmp_path / "file").write_text("")
    for out, message in ((".", "is a folder; name a file"), ("file/a.json", "file is no folder")):
        with pytest.raises(ValueError, match=message):
            main(["score", *flags(folder, answers="nothing is read", out=out)])
    assert sorted(os.listdir(tmp_path)) == ["a.json", "file", "scores"]


def test_numbers_are_not_written_over_what_they_are_made_of(folder, by_hand, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answers = shutil.copy(by_hand, tmp_path / "a.jsonl")
    for given in ("a.jsonl", "*.jsonl", str(tmp_path)):
        with pytest.raises(ValueError, match=r"a.jsonl is what numbers are made of, and would be lost; name another"):
            main(["score", *flags(folder, answers=given, out=f"../{tmp_path.name}/a.jsonl")])
    assert answers.read_bytes() == by_hand.read_bytes()


@pytest.mark.parametrize("at_once", [False, True])
def test_who_reads_the_numbers_may_go(folder, by_hand, tmp_path, monkeypatch, capsys, at_once):
    """As `head` does: no word, and the file is there; whether lines are written at once or wait in a buffer."""
    out = tmp_path / "a.json"
    read_end, write_end = os.pipe()
    os.close(read_end)
    with open(write_end, "w") as pipe:
        pipe.reconfigure(write_through=at_once, line_buffering=at_once)
        monkeypatch.setattr(sys, "stdout", pipe)
        with pytest.raises(SystemExit) as error:
            exit_with_one_line(lambda: main(["score", *flags(folder, answers=by_hand, out=out)]))
    monkeypatch.undo()
    assert error.value.code == 141
    assert capsys.readouterr().err == ""
    assert strict(out)["usual"] == 75

    def fail():
        raise BrokenPipeError("some other pipe")

    with pytest.raises(BrokenPipeError, match="some other pipe"):
        exit_with_one_line(fail)


@pytest.fixture(scope="module")
def by_hand(folder):
    """Answers to the world's questions, with known numbers: one right about a changed picture, and it goes on."""
    rows = read(folder / "world" / "world.jsonl")
    said = [
        {"key": row["key"], "text": row["true"] if row["group"] == "usual" else row["habit"]} for row in rows[:-2]
    ] + [{"key": "usual/none", "text": "No idea."}, {"key": "changed/none", "text": f"{rows[-1]['true']} And more."}]
    return write(folder / "by_hand.jsonl", said[::-1])


def test_the_world_by_hand(folder, by_hand):
    scored = score(ScoreOptions(benchmark="world", data=str(folder / "world"), answers=str(by_hand)))
    expected = {"usual": 75, "changed": 25, "gap": 50, "habit": 75, "flood": 12.5}
    assert {name: scored[name] for name in expected} == expected
    assert scored["counts"]["habit"] == [3, 4]
    assert "model" not in scored, "nobody knows who said it"


def test_two_runs_are_printed_beside_each_other(folder, whole, by_hand, tmp_path, capsys):
    for name, answers in (("a", whole), ("b", by_hand)):
        main(["score", *flags(folder, answers=answers, out=tmp_path / f"{name}.json")])
    capsys.readouterr()
    runs = [str(tmp_path / f"{name}.json") for name in "ab"]
    main(["compare", *runs, "--resamples", "50"])
    said = capsys.readouterr().out
    main(["--compare", *runs, "--resamples", "50"])
    assert capsys.readouterr().out == said
    assert re.search(r"gap +0.00 \[0.00, 0.00\] +50.00 \[.*\] +\+50.00 \[[^\]]*\]$", said, re.MULTILINE), said
    assert re.search(r"usual +0.00 \[0.00, 0.00\] +75.00 \[.*\] +\+75.00 \[.*\] +0/4 +3/4", said), said
    assert f"model: A {folder / 'model'}, B None" in said
    for change in ({"questions": "other"}, {"synonyms": "mine"}, {"similarity": "mine"}):
        (tmp_path / "c.json").write_text(json.dumps(strict(tmp_path / "b.json") | change))
        with pytest.raises(ValueError, match=f"the {next(iter(change))} of the two differ"):
            main(["compare", runs[0], str(tmp_path / "c.json")])


def answer_all(folder, benchmark, text, file):
    """Writes one answer to all questions of a benchmark."""
    questions = Asked(benchmark=benchmark, data=str(folder / benchmark)).questions()
    return write(file, [question.row | {"key": question.key, "text": text} for question in questions])


@pytest.mark.parametrize(
    ("benchmark", "text", "more", "expected"),
    [
        ("vlind", "True.", {"variant": "photorealistic"}, {"CK": 0, "VP": 0, "CB": None, "LP": None}),
        ("pope", "Yes, there is.", {}, {"accuracy": 50, "precision": 50, "recall": 100, "yes_ratio": 100}),
        ("chair", "Nothing.", {"variant": "plain"}, {"CHAIRs": 0, "CHAIRi": None}),
    ],
)
def test_numbers_are_strict_json(folder, tmp_path, capsys, benchmark, text, more, expected):
    file, out = answer_all(folder, benchmark, text, tmp_path / "a.jsonl"), tmp_path / "a.json"
    main(["score", *flags(folder, benchmark, answers=file, out=out, **more)])
    scored = strict(out)
    assert {name: scored[name] for name in expected} == expected
    printed = capsys.readouterr().out
    assert re.search(rf"^warning +{re.escape(scored['warning'])}$", printed, re.MULTILINE), (
        "few questions are no secret"
    )
    for name, value in expected.items():
        assert re.search(rf"^{name} +{'nan' if value is None else f'{value:.2f}'}\b", printed, re.MULTILINE), printed
    given = ScoreOptions(benchmark=benchmark, data=str(folder / benchmark), answers=str(file), **more)
    assert all(math.isnan(score(given)[name]) for name, value in expected.items() if value is None)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ([], "say what to do: answer, judge, unpack, score, compare; got nothing"),
        (["ask"], "got ask"),
        (["score", "--answers", "SHORT"], r"8 questions: 1 have no answer \(first 'changed/1'\)"),
        (["score", "--answers", "CUT"], r"cut.jsonl, line 8, is not JSON"),
        (["score", "--answers", "nothing.jsonl"], "nothing.jsonl names no file"),
        (["score", "--answers", "SHORT", "--variant", "strict"], "variant must be one of first_sentence, got strict"),
        (["score", "--answers", "SHORT", "--replay", "x"], "world has no replay: leave it out"),
        (["compare", "nothing.json", "nothing.json"], "nothing.json is not there; write it with: .* score"),
        (["compare", "SHORT", "SHORT"], "short.jsonl is not JSON"),
        (["compare", "LIST", "LIST"], "list.json holds a JSON list"),
        (["compare", "EMPTY", "EMPTY"], "empty.json without benchmark, .*, items cannot be compared"),
        (["score", "--answers", "TWICE"], "twice.jsonl, line 1: an object has 'text' more than once, 'a' and 'b'"),
        (["compare", "a", "b", "--resamples", "0"], "resamples must be at least 1"),
        (["compare", "a"], "runs|RUNS|required"),
    ],
)
def test_what_cannot_be_scored_is_one_line(folder, by_hand, tmp_path, capsys, command, message):
    rows = [row for row in read(by_hand) if row["key"] != "changed/1"]
    files = {"SHORT": write(tmp_path / "short.jsonl", rows), "LIST": tmp_path / "list.json"}
    files["LIST"].write_text("[]")
    files |= {"EMPTY": tmp_path / "empty.json", "TWICE": tmp_path / "twice.jsonl"}
    files["EMPTY"].write_text("{}")
    files["TWICE"].write_text('{"key": "usual/0", "text": "a", "text": "b"}')
    files["CUT"] = shutil.copy(by_hand, tmp_path / "cut.jsonl")
    os.truncate(files["CUT"], by_hand.stat().st_size - 9)
    command = [str(files.get(word, word)) for word in command]
    with pytest.raises(SystemExit) as error:
        exit_with_one_line(lambda: main([*command, *(flags(folder) if command[:1] == ["score"] else [])]))
    assert error.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line), line


def test_scores_need_no_model_and_touch_no_device(folder, by_hand, tmp_path):
    """With a platform that there is not, whatever looks for a device fails."""
    out = str(tmp_path / "a.json")
    code = (
        "import sys\nfrom napo_jax.evaluate import main\n"
        f"main({['score', *flags(folder, answers=by_hand, out=out)]})\n"
        f"main({['compare', out, out, '--resamples', '9']})\n"
        "names = ('answering', 'decoding', 'generate', 'models', 'model_source', 'weights', 'checkpoint')\n"
        "names = [f'napo_jax.{name}' for name in names] + ['flax', 'orbax', 'transformers', 'safetensors', 'grain']\n"
        "print([name for name in names if name in sys.modules])"
    )
    environment = os.environ | {"JAX_PLATFORMS": "none_such"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
