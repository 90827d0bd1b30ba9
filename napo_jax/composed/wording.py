"""The words by which the picture that a question is about is named among others."""

from napo_jax.data.prompts import IMAGE

# How many pictures each form may have, and the rows and columns of a grid of so many: those of the published code.
GRIDS = {2: (1, 2), 3: (1, 3), 4: (2, 2), 6: (2, 3), 9: (3, 3)}
COUNTS = {"sequence": (2, 3, 4, 5), "grid": tuple(GRIDS), "inset": (2,)}
_ACROSS = {2: ("left", "right"), 3: ("left", "middle", "right")}
_DOWN = {1: ("",), 2: ("top", "bottom"), 3: ("top", "middle", "bottom")}
# One way to say it would teach that way alone.
INSET_WORDS = (
    "In the picture in the middle",
    "In the smaller picture that lies on the other one",
    "Look at the inner picture alone",
    "About the picture within the picture",
    "Leave the picture around it aside and look at the one in the centre",
)


def place_words(count: int, place: int) -> str:
    """Returns where a cell of a grid is, such as "top left".

    Args:
      count: cells of the grid.
      place: of the cell, row by row, from 0.
    """
    rows, columns = GRIDS[count]
    row, column = divmod(place, columns)
    if (rows, columns, row, column) == (3, 3, 1, 1):
        return "centre"
    return f"{_DOWN[rows][row]} {_ACROSS[columns][column]}".strip()


def name_picture(form: str, count: int, place: int, question: str, *, labelled=False, wording=0) -> str:
    """Returns a question with the words that name its picture.

    Args:
      form: "sequence", "grid" or "inset".
      count: how many pictures there are.
      place: of the one that is asked about, from 0.
      question: about one picture; a mark of where it stands in it goes.
      labelled: whether the cells of a grid bear a number, to name them by.
      wording: which of `INSET_WORDS`.
    """
    question = question.replace(IMAGE, "").strip()
    if form == "sequence":
        listed = "".join(f"Image {number}: {IMAGE}\n" for number in range(1, count + 1))
        return f"{listed}In Image {place + 1}: {question}"
    if form == "inset":
        return f"{INSET_WORDS[wording]}: {question}"
    if labelled:
        return f"In Image {place + 1}: {question}"
    return f"In the picture at the {place_words(count, place)}: {question}"
