"""Questions about a scene, with what is true of it, what habit says, and answers in the world's plain English."""

import dataclasses

import numpy as np

from napo_jax.evals.vlind import PROMPTS
from napo_jax.world.scenes import COLOURS, HABITS, HALVES, MOST, SHAPES, Scene, by_habit

NUMBERS = ("zero", "one", "two", "three")
DESCRIBE = "Describe this image."
LOOK = "Look closely."  # said before a question to whoever is to answer by the picture
# Statements as VLind-Bench asks about them: by common sense, perception, context, and the picture.
_VLIND = PROMPTS["released"]
STATEMENTS = {"CK": _VLIND.commonsense, "VP": _VLIND.perception, "CB": _VLIND.context, "LP": _VLIND.image}
HABITUAL = ("colour", "count", "place", "existence")  # kinds that habit has a short answer to
SHORT = (*HABITUAL, "larger")  # kinds that have one
KINDS = (*SHORT, "describe", *STATEMENTS)


@dataclasses.dataclass(frozen=True)
class Asked:
    """A question about a picture."""

    kind: str  # out of KINDS
    text: str
    true: str  # the short answer that the picture, or what the question says, makes true
    habit: str  # the short answer of whoever knows the habits and does not look
    wrong: str  # an answer that is neither true nor, where there is a third one, habit

    @property
    def against_habit(self) -> bool:
        """Whether habit leads astray."""
        return self.true != self.habit


def name(shape, number=1):
    """Returns the word for one or several of a shape: "a star", "two crosses" without their first words."""
    return shape if number == 1 else f"{shape}es" if shape.endswith("s") else f"{shape}s"


def describe(scene: Scene) -> str:
    """Returns a caption that names every group, always in the same order."""
    sentences = []
    for group in sorted(scene.groups, key=lambda group: SHAPES.index(group.shape)):
        where = f" at the {group.half}" if group.half else ""
        amount = "is a" if group.number == 1 else f"are {NUMBERS[group.number]}"
        sentences.append(f"There {amount} {group.size} {group.colour} {name(group.shape, group.number)}{where}.")
    return " ".join(sentences)


def colour_statement(shape, colour) -> str:
    """Returns what is said of a shape's colour, in general and of a picture alike."""
    return f"The {shape} is {colour}."


def ask(kind, scene: Scene, random: np.random.Generator) -> Asked | None:
    """Returns a question of a kind about the scene's first group, None if it has none such.

    Args:
      kind: out of `KINDS`.
      scene: `Scene`.
      random: of what is drawn.
    """
    group = scene.groups[0]
    shape, habit = group.shape, HABITS[group.shape]
    things = name(shape, group.number)
    be = "is" if group.number == 1 else "are"
    another = lambda choices, *but: str(random.choice([choice for choice in choices if choice not in but]))
    match kind:
        case "colour":
            say = lambda colour: f"The {things} {be} {colour}."
            wrong = another(COLOURS, group.colour, habit.colour)
            return Asked(kind, f"What color {be} the {things}?", say(group.colour), say(habit.colour), say(wrong))
        case "count":

            def say(number):
                return f"There {'is' if number == 1 else 'are'} {NUMBERS[number]} {name(shape, number)}."

            wrong = int(another(range(1, MOST + 1), group.number, habit.number))
            text = f"How many {name(shape, 2)} are there?"
            return Asked(kind, text, say(group.number), say(habit.number), say(wrong))
        case "place":
            if group.half is None:
                return None
            say = lambda half: f"The {things} {be} at the {half}."
            wrong = HALVES[1 - HALVES.index(group.half)]
            return Asked(kind, f"Where {be} the {things}?", say(group.half), say(habit.half), say(wrong))
        case "existence":
            there = bool(random.random() < 0.5)
            missed = scene.missing if random.random() < 0.5 else ()
            shape = shape if there else another(missed or scene.absent)
            true, wrong = ("Yes.", "No.") if there else ("No.", "Yes.")
            expected = there or shape in scene.missing
            return Asked(kind, f"Is there a {shape} in the image?", true, "Yes." if expected else "No.", wrong)
        case "larger":
            others = [other for other in scene.groups[1:] if other.size != group.size]
            if not others:
                return None
            pair = [group.shape, others[0].shape]
            larger, smaller = (group, others[0]) if group.size == "large" else (others[0], group)
            say = lambda of: f"The {of.shape} is larger."
            random.shuffle(pair)
            text = f"Which is larger, the {pair[0]} or the {pair[1]}?"
            return Asked(kind, text, say(larger), say(larger), say(smaller))
        case "describe":
            expected = Scene((*scene.groups, *(by_habit(random, shape) for shape in scene.missing)))
            return Asked(kind, DESCRIBE, describe(scene), describe(expected), _misdescribed(scene, random))
        case "VP":
            there = bool(random.random() < 0.5)
            noun = shape if there else another(scene.absent)
            text = STATEMENTS[kind].format(statement=f"There is {noun} in the given image.")
            return Asked(kind, text, *_truth(there, there))
        case "CK" | "LP":
            # Half of the time what habit says, else what the picture shows, or, where that is the same, neither.
            colour = habit.colour
            if random.random() < 0.5:
                colour = another(COLOURS, habit.colour) if group.is_usual else group.colour
            text = STATEMENTS[kind].format(statement=colour_statement(shape, colour))
            usual = colour == habit.colour
            return Asked(kind, text, *_truth(usual if kind == "CK" else colour == group.colour, usual))
        case "CB":
            said = another(COLOURS, habit.colour)
            colour = said if random.random() < 0.5 else habit.colour
            text = STATEMENTS[kind].format(
                context=colour_statement(shape, said), statement=colour_statement(shape, colour)
            )
            return Asked(kind, text, *_truth(colour == said, colour == habit.colour))
    raise ValueError(f"there is no kind of question {kind!r}; there are {', '.join(KINDS)}")


def _truth(true, habit):
    return str(true), str(habit), str(not true)


def _misdescribed(scene, random):
    """Returns a caption with a group that is not there, or one in another colour."""
    first, *others = scene.groups
    if random.random() < 0.5:
        shape = str(random.choice(scene.absent))
        false = dataclasses.replace(first, shape=shape, colour=HABITS[shape].colour)
        return describe(Scene((first, *others, false)))
    colour = str(random.choice([colour for colour in COLOURS if colour != first.colour]))
    return describe(Scene((dataclasses.replace(first, colour=colour), *others)))


def all_words() -> list[str]:
    """Returns every text that the world's language is made of, for its vocabulary."""
    texts = [DESCRIBE, *STATEMENTS.values(), *NUMBERS, *COLOURS, *HALVES]
    texts += [name(shape, number) for shape in SHAPES for number in (1, 2)]
    texts += [
        "What color is are the?",
        "How many are there?",
        "Where",
        "Is there a in the image?",
        "Yes. No. True False",
    ]
    texts += [
        "Which is larger, the or the?",
        "The at the top.",
        "There is a small large There are",
        "in the given image.",
    ]
    texts += ["What can be seen in this picture?"]
    return texts
