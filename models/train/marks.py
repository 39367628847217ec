"""
What stands where in a picture: a second lesson for the vision encoder, while it trains.

Sentences alone say too little about pixels: a run learnt to write them long before it saw, and never
learnt to read. So each visual token is also asked which shapes and letters have their centre in each
quarter of it: letters are narrower than a token. The head that answers goes with the training.
"""

from dataclasses import dataclass

from engine.families.qwen2_vl import MERGE, Grid
from models.train.scenes import COLOURS, SHAPES, Scene

CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
LABELS: tuple[str, ...] = (
    *(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES),
    "small",
    "large",
    *CHARACTERS,
)
NUM_MARKS = MERGE**2 * len(LABELS)  # a label in a quarter of a token
_NUMBER = {label: number for number, label in enumerate(LABELS)}


@dataclass(frozen=True, slots=True)
class Mark:
    """
    Attributes:
        across, down: where the centre is, as shares of the picture's width and height, 0 to 1.
        labels: numbers into LABELS.
    """

    across: float
    down: float
    labels: tuple[int, ...]


def scene_marks(scene: Scene) -> list[Mark]:
    return [
        Mark(
            thing.x / scene.width_px,
            thing.y / scene.height_px,
            (_NUMBER[thing.noun], _NUMBER[thing.size]),
        )
        for thing in scene.things
    ]


def character_mark(character: str, across: float, down: float) -> Mark:
    return Mark(across, down, (_NUMBER[character],))


def mark_number(mark: Mark, grid: Grid) -> tuple[int, list[int]]:
    """
    Where a mark falls in a picture of this grid.

    Returns:
        The visual token, counted within the picture, and for each label its number below NUM_MARKS.
    """
    row = min(grid.rows - 1, int(mark.down * grid.rows))
    column = min(grid.columns - 1, int(mark.across * grid.columns))
    token = row // MERGE * (grid.columns // MERGE) + column // MERGE
    quarter = row % MERGE * MERGE + column % MERGE
    return token, [quarter * len(LABELS) + label for label in mark.labels]
