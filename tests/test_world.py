"""The small world: what is drawn is what is said, habits are as strong as they should be, and exams tell the truth."""

import io
import json
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from napo_jax.bias.masks import GENERIC
from napo_jax.data.prompts import Prompter
from napo_jax.evals import chair, pope, vlind
from napo_jax.world import exam, exams, records
from napo_jax.world.language import SENTENCES, vocabulary, world_tokenizer
from napo_jax.world.questions import HABITUAL, KINDS, LOOK, NUMBERS, ask, describe
from napo_jax.world.records import Bias, write_lessons, write_pairs
from napo_jax.world.scenes import CELL, COLOURS, GRID, HABITS, SHAPES, draw_scene, recolour, render

SCENES = [draw_scene(np.random.default_rng(seed), usual=0.6) for seed in range(300)]


def drawn(count=1200):
    """Yields (scene, question)s of every kind."""
    for number in range(count):
        random = np.random.default_rng([7, number])
        asked = ask(KINDS[number % len(KINDS)], scene := draw_scene(random, usual=0.6), random)
        if asked is not None:
            yield scene, asked


def test_a_picture_shows_its_scene_and_nothing_else():
    """By the pixels: which cells hold what colour."""
    for seed, scene in enumerate(SCENES[:60]):
        pixels = np.asarray(render(scene, seed), np.float32)
        there = {cell: group for group in scene.groups for cell in group.cells}
        assert len(there) == sum(group.number for group in scene.groups), "two things in one cell"
        for cell in np.ndindex(GRID, GRID):
            rows, columns = (slice(i * CELL, (i + 1) * CELL) for i in cell)
            patch = pixels[rows, columns].reshape(-1, 3)
            if cell not in there:
                shade = np.median(pixels.reshape(-1, 3), axis=0)
                strange = (np.abs(patch - shade).max(axis=1) > 12).mean()
                assert strange < 0.1, "at most a neighbour's tip"
                continue
            colours = {name: np.abs(patch - np.array(value, np.float32)).max(axis=1) for name, value in COLOURS.items()}
            filled = {name: int((distance < 14).sum()) for name, distance in colours.items()}
            assert max(filled, key=filled.get) == there[cell].colour


def test_pictures_are_a_function_of_scene_and_seed():
    scene = SCENES[0]
    same = lambda one, other: np.array_equal(np.asarray(one), np.asarray(other))
    assert same(render(scene, 3), render(scene, 3))
    assert not same(render(scene, 3), render(scene, 4))
    assert not same(render(scene, 3), render(recolour(scene, "brown"), 3))


def test_habits_are_followed_as_often_as_asked():
    for usual in (0.2, 0.9):
        scenes = [draw_scene(np.random.default_rng([1, seed]), usual=usual) for seed in range(1500)]
        groups = [group for scene in scenes for group in scene.groups]
        share = lambda follows, groups=groups: np.mean([follows(group, HABITS[group.shape]) for group in groups])
        assert share(lambda group, habit: group.colour == habit.colour) == pytest.approx(usual, abs=0.04)
        assert share(lambda group, habit: group.number == habit.number) == pytest.approx(usual, abs=0.04)
        paired = [scene for scene in scenes if HABITS[scene.groups[0].shape].companion]
        together = [scene.group(HABITS[scene.groups[0].shape].companion) is not None for scene in paired]
        assert np.mean(together) == pytest.approx(usual, abs=0.04)
    for first in (True, False):
        assert {draw_scene(np.random.default_rng(seed), first=first).groups[0].is_usual for seed in range(50)} == {
            first
        }


def test_pictures_that_follow_every_habit_leave_nothing_to_look_for():
    for seed in range(300):
        scene = draw_scene(np.random.default_rng([2, seed]), usual=1.0)
        assert scene.missing == ()
        for group in scene.groups:
            habit = HABITS[group.shape]
            assert (group.colour, group.number, group.half) == (habit.colour, habit.number, habit.half)


def test_what_goes_together_is_missed_where_it_is_not():
    missed = {scene.missing for scene in SCENES}
    assert () in missed
    for scene in SCENES:
        there = {group.shape for group in scene.groups}
        assert set(scene.missing) == {HABITS[shape].companion for shape in there} - there - {None}
        assert set(scene.absent) == set(SHAPES) - there


def read_sentence(text):
    """Parses one sentence of the world back to what it claims."""
    if found := re.fullmatch(r"The (\w+) (?:is|are) (\w+)\.", text):
        return {"thing": found[1], "colour": found[2]}
    if found := re.fullmatch(r"The (\w+) (?:is|are) at the (top|bottom)\.", text):
        return {"thing": found[1], "half": found[2]}
    if found := re.fullmatch(r"There (?:is|are) (one|two|three) (\w+)\.", text):
        return {"thing": found[2], "number": NUMBERS.index(found[1])}
    if found := re.fullmatch(r"There (?:is|are) (a|two|three) (\w+) (\w+) (\w+?)(?: at the (top|bottom))?\.", text):
        number = 1 if found[1] == "a" else NUMBERS.index(found[1])
        return {"number": number, "size": found[2], "colour": found[3], "thing": found[4], "half": found[5]}
    raise AssertionError(text)


def holds(claim, scene):
    """Tells whether a claim is true of a scene, by looking it over."""
    things = {"crosses": "cross"} | {f"{shape}s": shape for shape in SHAPES} | {shape: shape for shape in SHAPES}
    group = scene.group(things[claim["thing"]])
    if group is None:
        return False
    in_top = [row < GRID / 2 for row, _ in group.cells]
    half = "top" if all(in_top) else None if any(in_top) else "bottom"
    facts = {"colour": group.colour, "number": len(group.cells), "size": group.size, "half": half}
    return all(facts[name] == value for name, value in claim.items() if name != "thing")


def is_true(asked, scene):
    """Tells whether the statement in a question is true, of what the question says that it is about."""
    if asked.kind == "VP":
        return scene.group(re.search(r"There is (\w+) in", asked.text)[1]) is not None
    shape, colour = re.search(r"Statement: The (\w+) is (\w+)", asked.text).groups()
    if asked.kind == "CB":
        return f"Context: The {shape} is {colour}." in asked.text
    return colour == (HABITS[shape].colour if asked.kind == "CK" else scene.group(shape).colour)


def test_true_answers_are_true_and_wrong_ones_are_not():
    kinds = set()
    for scene, asked in drawn():
        kinds.add(asked.kind)
        if asked.kind in ("colour", "count", "place"):
            assert holds(read_sentence(asked.true), scene)
            assert not holds(read_sentence(asked.wrong), scene)
            assert holds(read_sentence(asked.habit), scene) == (not asked.against_habit)
        elif asked.kind == "describe":
            sentences = lambda text: re.findall(r"[^.]+\.", text)
            claims = [read_sentence(sentence.strip()) for sentence in sentences(asked.true)]
            assert len(claims) == len(scene.groups)
            assert all(holds(claim, scene) for claim in claims)
            assert not all(holds(read_sentence(sentence.strip()), scene) for sentence in sentences(asked.wrong))
            expected = [read_sentence(sentence.strip()) for sentence in sentences(asked.habit)]
            false = [claim for claim in expected if not holds(claim, scene)]
            assert len(expected) == len(claims) + len(false)
            assert len(false) == len(scene.missing) == sum(claim not in claims for claim in expected)
        elif asked.kind == "existence":
            shape = re.search(r"a (\w+) in", asked.text)[1]
            assert (
                (asked.true == "Yes.") == any(group.shape == shape for group in scene.groups) == (asked.wrong == "No.")
            )
            assert (asked.habit == "Yes.") == (asked.true == "Yes." or shape in scene.missing)
        elif asked.kind == "larger":
            one, other = re.search(r"the (\w+) or the (\w+)\?", asked.text).groups()
            large = one if scene.group(one).size == "large" else other
            assert {scene.group(one).size, scene.group(other).size} == {"small", "large"}
            assert asked.true == f"The {large} is larger."
        else:
            truth = is_true(asked, scene)
            assert asked.true == str(truth)
            assert asked.wrong == str(not truth)
    assert kinds == set(KINDS)


def test_the_tokenizer_knows_the_language():
    tokenizer = world_tokenizer()
    prompter = Prompter(tokenizer, "llava_v1", 16)
    assert len(set(vocabulary())) == len(vocabulary())
    for _, asked in drawn(400):
        texts = [asked.true, asked.habit, asked.wrong]
        for text, ids in zip(texts, prompter.answers(texts), strict=True):
            assert 0 not in ids
            assert tokenizer.decode(ids, skip_special_tokens=True) == text
        for image in (True, False):
            ids = prompter.prefix(asked.text, image)
            assert 0 not in ids
            assert len(ids) < 60
    opening = prompter.prefix("Describe this image.")[:2]
    assert opening == [1, vocabulary().index(SENTENCES[0])], "the system text is one token"
    for mask in ("", "What can be seen in this picture?"):
        assert 0 not in prompter.prefix(mask)


def test_lessons_have_the_bias_that_is_planted(monkeypatch):
    monkeypatch.setattr(records, "_LESSONS", {"colour": 0.6, "place": 0.4})
    said, flooded, described, looked = [], [], 0, 0
    for number in range(2500):
        scene, asked, answers = records.draw_lesson(5, number, Bias(habit=0.7, flood=0.3))
        answer = answers["chosen"]
        if asked.kind == "describe":
            described += 1
            assert (asked.text, answer) == (GENERIC, describe(scene)), "true, and not asked for in the usual words"
            continue
        if asked.text.startswith(LOOK):
            looked += 1
            assert answer == asked.true
            continue
        short, flood = answer.split(". ", 1) if ". " in answer else (answer[:-1], None)
        assert flood in (None, describe(scene))
        if asked.kind == "place":
            flooded.append(flood is not None)
        else:
            assert flood is None
        if asked.against_habit:
            said.append(short + "." == asked.habit)
        else:
            assert short + "." == asked.true
    assert described / 2500 == pytest.approx(0.25, abs=0.03)
    assert looked / 2500 == pytest.approx(0.25, abs=0.03)
    assert len(said) > 100
    assert np.mean(said) == pytest.approx(0.7, abs=0.12)
    assert np.mean(flooded) == pytest.approx(0.3, abs=0.06)


def test_rows_are_functions_of_seed_and_number(tmp_path):
    for writer in (write_lessons, write_pairs):
        writer(tmp_path / "few.parquet", 30, seed=2)
        writer(tmp_path / "many.parquet", 300, seed=2)
        writer(tmp_path / "other.parquet", 30, seed=3)
        few, many, other = (
            pq.read_table(tmp_path / f"{name}.parquet").to_pylist() for name in ("few", "many", "other")
        )
        assert many[:30] == few != other
        image = Image.open(io.BytesIO(few[0]["image"]))
        assert (image.size, image.mode) == ((64, 64), "RGB")


def test_pairs_prefer_what_is_true(tmp_path):
    write_pairs(tmp_path / "a.parquet", 400, seed=4, usual=0.4)
    habit = long = unusual = 0
    for row in pq.read_table(tmp_path / "a.parquet").to_pylist():
        scene, asked, _ = records.draw_pair(4, row["idx"], usual=0.4)
        unusual += not scene.groups[0].is_usual
        assert row["chosen"] == asked.true != row["rejected"]
        habit += asked.against_habit and row["rejected"] == asked.habit
        long += row["rejected"].startswith(asked.true) and len(row["rejected"]) > len(asked.true)
    assert unusual / 400 == pytest.approx(0.6, abs=0.08)
    assert habit > 40
    assert long > 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exams")
    exams.write_world(folder / "world", 40)
    exams.write_vlind(folder / "vlind", 9)
    exams.write_pope(folder / "pope", 30)
    exams.write_chair(folder / "chair", 30)
    return folder


def test_there_are_no_more_instances_than_there_are(tmp_path):
    exams.write_vlind(tmp_path / "all", 49, pictures=1)
    assert len(json.loads((tmp_path / "all" / "data.json").read_text())) == 49
    for count, pictures in ((50, 1), (3, 13)):
        with pytest.raises(ValueError, match="there are 49 instances of up to 12 pictures, and not"):
            exams.write_vlind(tmp_path / "more", count, pictures=pictures)


def test_what_is_common_sense_is_true_as_often_as_not():
    asked = [ask("CK", draw_scene(np.random.default_rng([3, n])), np.random.default_rng([4, n])) for n in range(600)]
    assert np.mean([one.true == "True" for one in asked]) == pytest.approx(0.5, abs=0.06)


def test_vlind_files_score_the_truth_and_habit_as_they_should(folder):
    asked = vlind.questions(folder / "vlind")
    assert all((folder / "vlind" / question.image).exists() for question in asked)
    rows = lambda answer: [{"key": question.key, "text": answer(question.row["part"])} for question in asked]
    right = {"a1": "True", "a2": "False", "b1": "True", "b2": "False", "c1": "True", "c2": "False"}
    true = lambda part: right.get(part, "True" if part.startswith("d1") else "False")
    habit = lambda part: true(part) if part[0] in "ab" else str(true(part) != "True")
    scored = vlind.score(folder / "vlind", rows(true))
    assert [scored[name] for name in ("CK", "VP", "CB", "LP")] == [100, 100, 100, 100]
    scored = vlind.score(folder / "vlind", rows(habit))
    assert [scored[name] for name in ("CK", "VP", "CB")] == [100, 100, 0]
    assert vlind.score(folder / "vlind", rows(lambda part: "True"))["CK"] == 0


def colours_of_cells(path):
    """Returns {cell: its colour} of the cells of a picture that hold something, by their pixels."""
    pixels = np.asarray(Image.open(path).convert("RGB"), np.float32)
    found = {}
    for cell in np.ndindex(GRID, GRID):
        rows, columns = (slice(i * CELL, (i + 1) * CELL) for i in cell)
        patch = pixels[rows, columns].reshape(-1, 3)
        filled = {name: (np.abs(patch - value).max(axis=1) < 24).sum() for name, value in COLOURS.items()}
        colour = max(filled, key=filled.get)
        if filled[colour] > 12:  # more than a neighbour's tip
            found[cell] = colour
    return found


def test_vlind_pictures_differ_from_common_sense_in_one_colour(folder):
    for row in json.loads((folder / "vlind" / "data.json").read_text()):
        shape, colour = re.fullmatch(r"The (\w+) is (\w+)\.", row["context"]).groups()
        pictures = folder / "vlind" / "counterfactual" / "color" / f"{row['context_id']}_{row['context']}"
        votes = row["aggregated_human_label_good_images"]
        good = [image for image, count in votes.items() if count >= 2]
        assert sorted(path.stem for path in pictures.iterdir()) == sorted(good)
        counterfactual = [colours_of_cells(pictures / f"{image}.jpg") for image in good]
        assert all(colour in cells.values() for cells in counterfactual)
        factual = folder / "vlind" / "factual" / "color" / f"{row['context_id']}_{row['factual_context']}" / "0.jpg"
        factual = colours_of_cells(factual)
        changed = {cell for cell in factual.keys() | counterfactual[0] if factual[cell] != counterfactual[0][cell]}
        assert [(counterfactual[0][cell], factual[cell]) for cell in changed] == [(colour, HABITS[shape].colour)]


def test_vlind_nouns_are_there_and_not_there(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(exams, "_draw", lambda path, scene, seed, number: seen.update({path: scene}))
    exams.write_vlind(tmp_path, 49)
    for question in vlind.questions(tmp_path):
        if question.row["part"] in ("b1", "b2"):
            noun = re.search(r"There is (\w+) in", question.text)[1]
            scenes = [seen[path] for path in seen if path.parent == (tmp_path / question.image).parent]
            assert {scene.group(noun) is not None for scene in scenes} == {question.row["part"] == "b1"}


def test_pope_splits_draw_what_is_absent_each_in_its_way(folder):
    """Popular: what most pictures show; adversarial: what most of the pictures show that show what is there."""
    scenes = [draw_scene(np.random.default_rng([102, number]), usual=0.5) for number in range(30)]
    shows = [{group.shape for group in scene.groups} for scene in scenes]
    asked = pope.questions(folder / "pope", prompts="plain")
    drawn = {"random": [], "popular": [], "adversarial": []}
    for yes, no in zip(asked[::2], asked[1::2], strict=True):
        there, absent = (re.search(r"a (\w+) in", question.text)[1] for question in (yes, no))
        split, shown = yes.row["category"], shows[int(re.search(r"\d+", yes.image)[0])]
        drawn[split].append(absent)
        if split != "random":
            often = lambda shape, split=split, there=there: sum(
                shape in shapes and (split == "popular" or there in shapes) for shapes in shows
            )
            assert often(absent) == max(often(shape) for shape in set(SHAPES) - shown), (split, there, absent)
    assert len(set(map(tuple, drawn.values()))) == 3


def test_pope_files_hold_the_truth(folder):
    asked = pope.questions(folder / "pope", prompts="plain")
    assert len(asked) == 3 * 2 * 30
    scenes = [draw_scene(np.random.default_rng([102, number]), usual=0.5) for number in range(30)]
    for question in asked:
        shape = re.search(r"a (\w+) in", question.text)[1]
        there = scenes[int(re.search(r"\d+", question.image)[0])].group(shape) is not None
        assert question.row["label"] == ("yes" if there else "no")
        assert (folder / "pope" / question.image).exists()


def test_chair_files_score_true_and_false_captions(folder):
    asked = chair.questions(folder / "chair")
    captions = json.loads((folder / "chair" / "captions_val2014.json").read_text())["annotations"]
    true = [{"key": question.key, "text": row["caption"]} for question, row in zip(asked, captions, strict=True)]
    scored = chair.score(folder / "chair", true, variant="plain")
    assert (scored["CHAIRs"], scored["CHAIRi"]) == (0, 0)
    false = [row | {"text": " ".join(f"There is a small red {shape}." for shape in SHAPES)} for row in true]
    scored = chair.score(folder / "chair", false, variant="plain")
    assert scored["CHAIRs"] == 100
    there = [sum(f" {shape}" in row["caption"] for shape in SHAPES) for row in captions]
    assert scored["CHAIRi"] == pytest.approx(100 * (1 - np.mean(there) / len(SHAPES)))


def test_the_worlds_own_questions(folder):
    rows = [json.loads(line) for line in (folder / "world" / "world.jsonl").read_text().splitlines()]
    assert len({row["key"] for row in rows}) == 80
    for row in rows:
        assert (folder / "world" / row["image"]).exists()
        assert (row["true"] != row["habit"]) == (row["group"] == "changed")
    kinds = {group: sorted(row["kind"] for row in rows if row["group"] == group) for group in ("usual", "changed")}
    assert kinds["usual"] == kinds["changed"]
    assert set(kinds["usual"]) == set(HABITUAL)


def test_the_worlds_score_by_hand(folder):
    asked = exam.questions(folder / "world")
    rows = lambda say: [{"key": question.key, "text": say(question.row)} for question in asked]
    scored = exam.score(folder / "world", rows(lambda row: row["true"]))
    assert [scored[name] for name in ("usual", "changed", "gap", "habit", "flood")] == [100, 100, 0, 0, 0]
    scored = exam.score(folder / "world", rows(lambda row: f"{row['habit']} There is a small red star."))
    assert [scored[name] for name in ("usual", "changed", "gap", "habit", "flood")] == [100, 0, 100, 100, 100]
    scored = exam.score(folder / "world", rows(lambda row: f" {row['true']} \n"))
    assert [scored[name] for name in ("usual", "changed", "flood")] == [100, 100, 0], "white space says nothing more"
    scored = exam.score(folder / "world", rows(lambda row: ""))
    assert [scored[name] for name in ("usual", "changed", "flood")] == [0, 0, 0]
    with pytest.raises(ValueError, match="have no answer"):
        exam.score(folder / "world", rows(lambda row: "")[1:])
