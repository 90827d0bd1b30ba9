"""Object HalBench and CHAIR: which objects a description names that are not in the picture.

What is in a picture is what COCO's instances and all of its reference captions name. Objects stand for their synonyms.
"""

import base64
from collections.abc import Callable, Iterable, Iterator

from etils import epath

from napo_jax.evals.answers import Question, choose, join, misfit, read_data, read_object, read_rows
from napo_jax.evals.chair_words import (
    Vocabulary,
    find_listed_objects,
    find_objects,
    is_short,
    parse_list,
    read_vocabulary,
)
from napo_jax.evals.judge import Judge, match_replies, read_template, record_replies
from napo_jax.evals.nlp import Language, nltk_language, plain, spacy_language

NAME = "chair"
PROMPTS = {"official": "{question}"}

# How the objects of an answer are found.
VARIANTS = {
    "released": "every mention counts; words by NLTK",  # what NaPO's published scripts run
    "judged": "the objects that a judge lists, each once; words by spaCy",  # what RLHF-V and RLAIF-V report
    "plain": "every mention counts; words by the endings of plurals",  # needs no data; comparable with itself alone
}

# What is read of COCO's files.
_COCO = {
    "instances": {
        "images": [{"id": int}],
        "annotations": [{"image_id": int, "category_id": int}],
        "categories": [{"id": int, "name": str}],
    },
    "captions": {"images": [{"id": int}], "annotations": [{"image_id": int, "caption": str}]},
}
_FILES = ("obj_halbench_300_with_image.jsonl", "questions.jsonl")
_PUBLISHED = (300,)  # questions of Object HalBench
_TAGGER = "en_core_web_trf"


def questions(data, *, prompts="official") -> list[Question]:
    """Reads what is asked.

    Args:
      data: the folder of `obj_halbench_300_with_image.jsonl`, or of a `questions.jsonl` with the same fields.
      prompts: a name out of `PROMPTS`.
    """
    asked = []
    for number, row in enumerate(_read_questions(data)):
        text = choose(PROMPTS, prompts, "prompts").replace("{question}", row["question"])
        beside = {"question_id": number, "image_id": row["image_id"], "prompt": text}
        asked.append(Question(str(number), text, row.get("image_path", f"{row['image_id']}.jpg"), beside))
    return asked


def sizes(asked) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Returns how many questions there are, and how many in Object HalBench, by what is counted."""
    return {"questions": (len(asked), _PUBLISHED)}


def write_pictures(data, folder) -> int:
    """Writes the pictures that the question file holds in base64 to a folder, by the names that `questions` gives.

    Returns:
      How many there were.
    """
    folder = epath.Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; name a folder to write pictures to")
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for number, row in enumerate(_read_questions(data), 1):
        if "image_path" in row:
            continue
        name = f"{row['image_id']}.jpg"
        try:
            picture = base64.b64decode(row["image"], validate=True)
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{data}: question {number} has no image_path and no image in base64") from None
        if written.setdefault(name, picture) != picture:
            raise ValueError(f"{data}: question {number} has another picture than one before of the same image_id")
        (folder / name).write_bytes(picture)
    return len(written)


def ask_judge(
    data, rows, template, judge: Judge, name: str, *, prompts="official", at_once=1, tries=3
) -> Iterator[dict]:
    """Yields the rows of a replay file: what a judge lists of each answer.

    Args:
      data: the folder of the benchmark.
      rows: the answers.
      template: path of the judge's prompt, with `{question}` and `{answer}` in it.
      judge: what replies with a JSON list of objects.
      name: of the judge, with its version.
      prompts: a name out of `PROMPTS`.
      at_once: how many replies are waited for at a time.
      tries: how often the judge is asked for a reply that can be read.
    """
    asked = questions(data, prompts=prompts)
    captions = _join(asked, rows)
    fill = read_template(template, ("question", "answer"))
    texts = {
        q.key: fill({"question": q.row["prompt"], "answer": captions[q.key]})
        for q in asked
        if not is_short(captions[q.key])
    }
    for key, caption in captions.items():
        if key not in texts:
            yield {"key": key, "text": caption, "judge": name, "reply": "[]"}
    yield from record_replies(judge, name, texts, captions, parse_list, tries=tries, at_once=at_once)


def score(
    data,
    rows,
    *,
    prompts="official",
    variant="released",
    replay=None,
    language: Language | None = None,
    tagger: Language | None = None,
) -> dict:
    """Turns answers into numbers.

    Args:
      data: the folder of the questions, with `instances_*2014.json` and `captions_*2014.json` of COCO, and
        `synonyms_refine.txt` or `synonyms.txt`.
      rows: answers by `key`, or by `image_id` and `prompt` or `question`, as the released code writes them.
      prompts: a name out of `PROMPTS`.
      variant: a name out of `VARIANTS`.
      replay: path of the rows of `ask_judge`, where the variant is "judged".
      language: reads answers and reference captions, if not what the variant says.
      tagger: reads what a judge lists, if not spaCy.

    Returns:
      A dict for JSON, in percent but for avg_word_len. CHAIRs is the share of answers that name what is not there,
      CHAIRs_refine ("response") the same of those that name any object, CHAIRi ("mention") the share of mentions.
    """
    choose(VARIANTS, variant, "variant")
    if (variant == "judged") != (replay is not None):
        raise ValueError(f"chair: the replies of a judge go with the variant 'judged' and no other, got {variant!r}")
    asked = questions(data, prompts=prompts)
    captions = _join(asked, rows)
    vocabulary = _read_synonyms(data)
    language = language or (plain([*vocabulary.nodes, *vocabulary.pairs]) if variant == "plain" else nltk_language())
    read = lambda text: find_objects(language.lemmas(text.lower()), vocabulary)
    made_by = {"language": language.name, "synonyms": vocabulary.source}
    if variant == "judged":
        tagger = tagger or spacy_language(_TAGGER)
        replies, made_by["judge"] = match_replies(asked, read_rows(replay), captions)
        made_by["tagger"] = tagger.name
        listed = lambda key: find_listed_objects(captions[key], parse_list(replies[key]), vocabulary, tagger)
        named = {key: listed(key) for key in captions}
    else:
        named = {key: read(caption) for key, caption in captions.items()}
    there = read_ground_truth(data, {question.row["image_id"] for question in asked}, vocabulary, read)
    counted = [_count(captions[q.key], named[q.key], there[q.row["image_id"]]) for q in asked]
    return {"prompts": prompts, "variant": variant, **made_by, **_report(counted)}


def read_ground_truth(
    data, image_ids: Iterable[int], vocabulary: Vocabulary, read: Callable[[str], list[str]]
) -> dict[int, set[str]]:
    """Returns the nodes that are in each picture.

    Args:
      data: the folder of COCO's annotations, of one split or of both.
      image_ids: of the pictures.
      vocabulary: gives the node of a category.
      read: a caption -> the nodes that it names.

    Raises:
      ValueError: a picture is not in the files of both kinds.
    """
    found = {image_id: set() for image_id in image_ids}
    for kind in ("instances", "captions"):
        listed = set()
        for split in ("train", "val"):
            file = epath.Path(data) / f"{kind}_{split}2014.json"
            if not file.exists():
                continue
            content = read_object(file, "fetch COCO's own file", _COCO[kind])
            listed |= {image["id"] for image in content["images"]}
            names = {category["id"]: category["name"] for category in content.get("categories", [])}
            if unknown := sorted(name for name in names.values() if name not in vocabulary.nodes):
                raise ValueError(f"{vocabulary.source} lacks {unknown[0]!r}, a category of {file}; bring all synonyms")
            for annotation in content["annotations"]:
                if (nodes := found.get(annotation["image_id"])) is None:
                    continue
                if kind == "captions":
                    nodes.update(read(annotation["caption"]))
                elif (category := annotation["category_id"]) in names:
                    nodes.add(vocabulary.nodes[names[category]])
                else:
                    raise ValueError(f"{file} has no category {category}, which it names; fetch COCO's own file")
        if missing := sorted(found.keys() - listed):
            raise ValueError(
                f"{len(missing)} pictures (first {missing[0]}) are in no {kind}_train2014.json or {kind}_val2014.json "
                f"of {data}; both come with COCO's annotations of 2014"
            )
    return found


def _read_synonyms(data):
    try:
        return read_vocabulary(data)
    except UnicodeDecodeError:
        raise ValueError(f"the list of synonyms in {data} is not UTF-8; fetch it again") from None


def _read_questions(data):
    there = [file for name in _FILES if (file := epath.Path(data) / name).exists()]
    if len(there) != 1:
        raise ValueError(
            f"{data} must hold one of {' and '.join(_FILES)}, has {len(there)}; the first comes with RLHF-V and RLAIF-V"
        )
    rows = read_data(there[0], {"image_id": (int, str), "question": str})
    for number, row in enumerate(rows, 1):
        if "image_path" in row and (wrong := misfit(row, {"image_path": str})):
            raise ValueError(f"{there[0]}, question {number}, {wrong}; mend it")
        try:
            row["image_id"] = int(row["image_id"])
        except ValueError:
            raise ValueError(f"{there[0]}, question {number}, has no image_id that is a number of COCO's") from None
    return rows


def _join(asked, rows):
    """Returns {key: the answer, as the official script strips it}."""
    keys = {(q.row["image_id"], q.row["prompt"]): q.key for q in asked}
    found = [row if "key" in row else _with_key(row, keys) for row in rows]
    return {key: text.replace("Assistant:", "").strip() for key, text in join(asked, found).items()}


def _with_key(row, keys):
    """Returns an answer of the released code with its question's key: its question_id begins anew in each shard."""
    asked = "prompt" if "prompt" in row else "question"
    try:
        if misfit(row, {"image_id": (int, str), asked: str}):
            raise ValueError
        name = (int(row["image_id"]), row[asked])
    except ValueError:
        raise ValueError(f"an answer must have a key, or image_id and prompt; one has {', '.join(row)}") from None
    text = row["text"] if "text" in row else row.get("answer")
    return {"key": keys.get(name, f"{name[0]}: {name[1]}"), "text": text}


def _count(caption, named, there):
    """Returns what the metrics are sums of, for one answer."""
    wrong = sum(node not in there for node in named)
    return {
        "answers": 1,
        "naming": int(bool(named)),
        "hallucinated": int(wrong > 0),
        "mentions": len(named),
        "wrong_mentions": wrong,
        "found": len(there.intersection(named)),
        "there": len(there),
        "words": len(caption.strip().split(" ")),
    }


def _report(counted):
    total = {name: sum(count[name] for count in counted) for name in counted[0]}
    parts = {
        "CHAIRs": ("hallucinated", "answers"),
        "CHAIRs_refine": ("hallucinated", "naming"),
        "CHAIRi": ("wrong_mentions", "mentions"),
        "obj_rec": ("found", "there"),
        "avg_word_len": ("words", "answers"),
    }
    share = {name: _divide(total[above], total[below]) for name, (above, below) in parts.items()}
    items = {name: [[c[above], c[below]] for c in counted] for name, (above, below) in parts.items()}
    # The official script takes these from one, and percent come last.
    for name, wrong in (("correct_rate", "CHAIRs_refine"), ("object_correct_rate", "CHAIRi")):
        share[name] = 1 - share[wrong]
        items[name] = [[below - above, below] for above, below in items[wrong]]
    value = {name: s if name == "avg_word_len" else s * 100 for name, s in share.items()}
    scorer = ("CHAIRs", "CHAIRs_refine", "CHAIRi", "avg_word_len")
    return {
        **value,
        "official": {
            "scorer": {name: f"{value[name]:.1f}" for name in scorer},
            "summary": {name: f"{value[name]:.2f}" for name in value if name != "CHAIRs"},
        },
        "counts": total,
        "items": items,
    }


def _divide(numerator, denominator):
    return numerator / denominator if denominator else float("nan")
