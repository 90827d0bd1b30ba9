"""Scenes of shapes on a grid, drawn by habit or against it, and their pictures.

Each shape has a usual colour, number, half of the picture and companion, as bears are brown and forks lie beside
plates: whoever knows the habits can answer most questions without a look.
"""

import dataclasses
import io

import numpy as np
from PIL import Image, ImageDraw

SIZE, GRID = 64, 4  # pixels of a picture's side, and cells
CELL = SIZE // GRID
COLOURS = {
    "red": (214, 40, 40),
    "green": (44, 160, 64),
    "blue": (40, 90, 214),
    "yellow": (240, 208, 32),
    "purple": (136, 56, 180),
    "orange": (244, 130, 24),
    "white": (246, 246, 246),
    "brown": (120, 72, 36),
}
BACKGROUND = (112, 116, 120)
SIZES = {"small": 5.0, "large": 7.5}  # half of the width, in pixels
MOST = 3  # of one shape
HALVES = ("top", "bottom")


@dataclasses.dataclass(frozen=True)
class Habit:
    """What is usual of a shape."""

    colour: str
    number: int
    half: str
    companion: str | None  # the shape that is usually there too


HABITS = {
    "star": Habit("yellow", 1, "top", "heart"),
    "heart": Habit("orange", 1, "top", "star"),
    "circle": Habit("red", 2, "bottom", "square"),
    "square": Habit("blue", 1, "bottom", "circle"),
    "triangle": Habit("green", 3, "bottom", "ring"),
    "ring": Habit("purple", 2, "top", "triangle"),
    "cross": Habit("white", 1, "top", None),
}
SHAPES = tuple(HABITS)


@dataclasses.dataclass(frozen=True)
class Group:
    """Some things of one shape, alike but for where they are."""

    shape: str
    colour: str
    size: str
    cells: tuple[tuple[int, int], ...]  # row and column of each, from the top left

    @property
    def number(self) -> int:
        """How many there are."""
        return len(self.cells)

    @property
    def half(self) -> str | None:
        """The half of the picture that holds all of them, None if neither does."""
        halves = {HALVES[row >= GRID // 2] for row, _ in self.cells}
        return halves.pop() if len(halves) == 1 else None

    @property
    def is_usual(self) -> bool:
        """Whether its colour is the usual one."""
        return self.colour == HABITS[self.shape].colour


@dataclasses.dataclass(frozen=True)
class Scene:
    """Groups of different shapes; the first is the one that a question is about, if it is about one."""

    groups: tuple[Group, ...]

    def group(self, shape) -> Group | None:
        """Returns the group of a shape, None if there is none."""
        return next((group for group in self.groups if group.shape == shape), None)

    @property
    def absent(self) -> tuple[str, ...]:
        """The shapes that are not in the picture."""
        return tuple(shape for shape in SHAPES if self.group(shape) is None)

    @property
    def missing(self) -> tuple[str, ...]:
        """The companions of what is in the picture that are not there themselves."""
        return tuple(shape for shape in self.absent if self.group(HABITS[shape].companion))


def draw_scene(random: np.random.Generator, *, usual: float = 0.9, first: bool | None = None) -> Scene:
    """Draws a scene of one to three groups.

    Args:
      random: of what is drawn.
      usual: the probability of each habit to be followed.
      first: whether the first group has its usual colour; None: as likely as any.

    Returns:
      `Scene`.
    """
    free = [divmod(int(cell), GRID) for cell in random.permutation(GRID * GRID)]
    groups = []
    for shape in _draw_shapes(random, usual):
        follows = random.random() < usual
        if first is not None and not groups:
            follows = first
        colour = HABITS[shape].colour if follows else _other(random, COLOURS, HABITS[shape].colour)
        groups.append(_draw_group(random, shape, colour, usual, free))
        free = [cell for cell in free if cell not in groups[-1].cells]
    return Scene(tuple(groups))


def by_habit(random: np.random.Generator, shape) -> Group:
    """Returns the group of a shape that whoever knows the habits, and does not look, takes to be there."""
    every = [divmod(cell, GRID) for cell in range(GRID * GRID)]
    return _draw_group(random, shape, HABITS[shape].colour, 1.0, every)


def _draw_shapes(random, usual):
    """Draws which shapes there are: one, its companion, and, half of the time, something that needs no companion."""
    shapes = [str(random.choice(SHAPES))]
    companion = HABITS[shapes[0]].companion
    if companion and random.random() < usual:
        shapes.append(companion)
    if random.random() < 0.5:
        others = [shape for shape in SHAPES if shape not in (shapes[0], companion)]
        alone = [shape for shape in others if HABITS[shape].companion is None]
        shape = str(random.choice(alone if alone and random.random() < usual else others))
        shapes.append(shape)
        if companion is None and random.random() < usual:
            shapes.append(HABITS[shape].companion)
    return shapes


def _draw_group(random, shape, colour, usual, free):
    """Draws how many of a shape there are, how large, and where in free cells."""
    habit = HABITS[shape]
    follows = random.random(2) < usual
    number = habit.number if follows[0] else _other(random, range(1, MOST + 1), habit.number)
    half = habit.half if follows[1] else _other(random, HALVES, habit.half)
    inside = [cell for cell in free if HALVES[cell[0] >= GRID // 2] == half]
    cells = inside[:number] if len(inside) >= number else free[:number]
    return Group(shape, colour, str(random.choice(list(SIZES))), tuple(sorted(cells)))


def recolour(scene: Scene, colour) -> Scene:
    """Returns the same scene with its first group in another colour."""
    first, *others = scene.groups
    return Scene((dataclasses.replace(first, colour=colour), *others))


def render(scene: Scene, seed: int = 0) -> Image.Image:
    """Draws the picture of a scene, RGB of SIZE x SIZE; what hand and light do differently each time is of the seed."""
    random = np.random.default_rng(seed)
    sharp = 4  # drawn larger and made smaller, so that edges are smooth
    shade = tuple(int(value) for value in np.array(BACKGROUND) + random.integers(-12, 13, 3))
    image = Image.new("RGB", (SIZE * sharp, SIZE * sharp), shade)
    canvas = ImageDraw.Draw(image)
    for group in scene.groups:
        for row, column in group.cells:
            middle = (np.array([column, row]) + 0.5) * CELL + random.uniform(-0.8, 0.8, 2)
            radius = SIZES[group.size] * random.uniform(0.94, 1.04)
            colour = tuple(int(v) for v in np.clip(np.array(COLOURS[group.colour]) + random.integers(-8, 9, 3), 0, 255))
            _draw(canvas, group.shape, middle * sharp, radius * sharp, colour)
    return image.resize((SIZE, SIZE), Image.Resampling.BOX)


def encode(image: Image.Image) -> bytes:
    """Returns a picture as PNG."""
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def _other(random, choices, one):
    choices = [choice for choice in choices if choice != one]
    return choices[random.integers(len(choices))]


def _draw(canvas, shape, middle, radius, colour):
    x, y = middle
    box = (x - radius, y - radius, x + radius, y + radius)
    corners = lambda count, turn, *radii: [
        (
            x + radii[i % len(radii)] * np.sin(2 * np.pi * i / count + turn),
            y - radii[i % len(radii)] * np.cos(2 * np.pi * i / count + turn),
        )
        for i in range(count)
    ]
    match shape:
        case "circle":
            canvas.ellipse(box, colour)
        case "ring":
            canvas.ellipse(box, None, colour, width=int(radius * 0.42))
        case "square":
            canvas.rectangle((x - 0.86 * radius, y - 0.86 * radius, x + 0.86 * radius, y + 0.86 * radius), colour)
        case "triangle":
            canvas.polygon(corners(3, 0.0, radius * 1.1), colour)
        case "star":
            canvas.polygon(corners(10, 0.0, radius * 1.1, radius * 0.45), colour)
        case "cross":
            thick = radius * 0.34
            canvas.rectangle((x - thick, y - radius, x + thick, y + radius), colour)
            canvas.rectangle((x - radius, y - thick, x + radius, y + thick), colour)
        case "heart":
            half = radius * 0.56
            for side in (-1, 1):
                left = x + side * half * 0.9
                canvas.ellipse((left - half, y - radius * 0.8, left + half, y - radius * 0.8 + 2 * half), colour)
            canvas.polygon([(x - radius, y - radius * 0.1), (x + radius, y - radius * 0.1), (x, y + radius)], colour)
