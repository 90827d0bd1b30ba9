"""What the world's model is tested on: the world's own questions, and the same in the files of public benchmarks."""

import json
from pathlib import Path

import numpy as np

from napo_jax.world.questions import HABITUAL, ask, colour_statement, describe, name
from napo_jax.world.scenes import COLOURS, HABITS, SHAPES, Scene, draw_scene, encode, recolour, render

_MOST_PICTURES = 12  # of an instance of VLind-Bench


def write_world(folder, count, *, seed=100):
    """Writes questions about pictures that follow every habit, and the same about those that break the one in question.

    Args:
      folder: to write `world.jsonl` and pictures to.
      count: of questions of either group.
      seed: of all that is drawn.
    """
    folder, rows = Path(folder), []
    for number in range(count):
        kind = HABITUAL[number % len(HABITUAL)]
        for place, (group, usual) in enumerate((("usual", 1.0), ("changed", 0.5))):
            random = _random(seed, 2 * number + place)
            asked = None
            while asked is None or asked.against_habit == (group == "usual"):
                scene = draw_scene(random, usual=usual)
                asked = ask(kind, scene, random)
            path = f"images/{group}_{number}.png"
            _draw(folder / path, scene, seed, 2 * number + place)
            rows.append(
                {"key": f"{group}/{number}", "text": asked.text, "image": path, "group": group}
                | {"kind": asked.kind, "true": asked.true, "habit": asked.habit}
            )
    _write_lines(folder / "world.jsonl", rows)


def write_vlind(folder, count, *, pictures=3, seed=101):
    """Writes instances as VLind-Bench has them: a colour that common sense denies, in words and in pictures.

    Args:
      folder: to write `data.json`, `counterfactual` and `factual` to.
      count: of instances, at most one for each shape and unusual colour.
      pictures: good ones of each instance.
      seed: of all that is drawn.
    """
    folder, rows = Path(folder), []
    every = [(shape, colour) for shape in SHAPES for colour in COLOURS if colour != HABITS[shape].colour]
    if count > len(every) or pictures > _MOST_PICTURES:
        raise ValueError(
            f"there are {len(every)} instances of up to {_MOST_PICTURES} pictures, and not {count} of {pictures}"
        )
    chosen = _random(seed, 0).permutation(len(every))[:count]
    for number, (shape, colour) in enumerate(every[i] for i in chosen):
        random = _random(seed, 1 + number)
        habit = HABITS[shape].colour
        row = {"concept": "color", "context_id": number}
        row |= {"context": colour_statement(shape, colour), "factual_context": colour_statement(shape, habit)}
        row |= {"true_statement": colour_statement(shape, colour), "false_statement": colour_statement(shape, habit)}
        absent = ()
        while not absent:
            scenes = [_scene_of(shape, random) for _ in range(pictures)]
            absent = set(SHAPES).intersection(*(scene.absent for scene in scenes))
        row |= {"existent_noun": shape, "non-existent_noun": str(random.choice(sorted(absent)))}
        row["best_img_id"] = "0"
        row["aggregated_human_label_good_images"] = {str(i): 3 if i < pictures else 0 for i in range(_MOST_PICTURES)}
        for i, scene in enumerate(scenes):
            path = folder / "counterfactual" / "color" / f"{number}_{row['context']}" / f"{i}.jpg"
            _draw(path, recolour(scene, colour), seed, 100 * number + i)
        factual = folder / "factual" / "color" / f"{number}_{row['factual_context']}" / "0.jpg"
        _draw(factual, recolour(scenes[0], habit), seed, 100 * number + 99)
        rows.append(row)
    (folder / "data.json").write_text(json.dumps(rows, indent=1))


def write_pope(folder, pictures, *, seed=102):
    """Writes questions as POPE has them: of each picture one shape that is there and one that is not, three times.

    Args:
      folder: to write `shapes_pope_*.json` and pictures to.
      pictures: how many.
      seed: of all that is drawn.
    """
    folder = Path(folder)
    scenes = [draw_scene(_random(seed, number), usual=0.5) for number in range(pictures)]
    often = sorted(SHAPES, key=lambda shape: -sum(scene.group(shape) is not None for scene in scenes))
    together = {
        shape: sorted(SHAPES, key=lambda other: -sum(_both(scene, shape, other) for scene in scenes))
        for shape in SHAPES
    }
    splits = {"random": [], "popular": [], "adversarial": []}
    for number, scene in enumerate(scenes):
        random, path = _random(seed, pictures + number), f"images/{number}.png"
        _draw(folder / path, scene, seed, number)
        there = scene.groups[0].shape
        first = lambda shapes, scene=scene: next(shape for shape in shapes if shape in scene.absent)
        absent = {
            "random": str(random.choice(scene.absent)),
            "popular": first(often),
            "adversarial": first(together[there]),
        }
        for split, rows in splits.items():
            for shape, label in ((there, "yes"), (absent[split], "no")):
                text = f"Is there a {shape} in the image?"
                rows.append({"question_id": len(rows) + 1, "image": path, "text": text, "label": label})
    for split, rows in splits.items():
        _write_lines(folder / f"shapes_pope_{split}.json", rows)


def write_chair(folder, pictures, *, seed=103):
    """Writes pictures to describe, as Object HalBench and COCO have them, with what is truly in them.

    Args:
      folder: to write `questions.jsonl`, annotations, synonyms and pictures to.
      pictures: how many.
      seed: of all that is drawn.
    """
    folder, rows, annotations, captions = Path(folder), [], [], []
    for number in range(pictures):
        random = _random(seed, number)
        scene = draw_scene(random, usual=0.5)
        path = f"images/{number}.png"
        _draw(folder / path, scene, seed, number)
        question = ask("describe", scene, random)
        rows.append({"image_id": number, "image_path": path, "question": question.text})
        annotations += [{"image_id": number, "category_id": SHAPES.index(group.shape)} for group in scene.groups]
        captions.append({"image_id": number, "caption": describe(scene)})
    _write_lines(folder / "questions.jsonl", rows)
    images = [{"id": number} for number in range(pictures)]
    categories = [{"id": i, "name": shape} for i, shape in enumerate(SHAPES)]
    instances = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "instances_val2014.json").write_text(json.dumps(instances))
    (folder / "captions_val2014.json").write_text(json.dumps({"images": images, "annotations": captions}))
    (folder / "synonyms.txt").write_text("".join(f"{shape}, {name(shape, 2)}\n" for shape in SHAPES))


def _random(seed, number):
    return np.random.default_rng([seed, number])


def _scene_of(shape, random) -> Scene:
    """Returns a scene whose first group is one thing of a shape."""
    while True:
        scene = draw_scene(random)
        if scene.groups[0].shape == shape and scene.groups[0].number == 1:
            return scene


def _both(scene, shape, other):
    return other != shape and scene.group(shape) is not None and scene.group(other) is not None


def _draw(path, scene, seed, number):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = render(scene, seed * 1_000_003 + number)
    if path.suffix == ".jpg":
        image.save(path, "JPEG", quality=95, subsampling=0)
    else:
        path.write_bytes(encode(image))


def _write_lines(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
