"""
The table of docs/models.md, made of the families' cards.

`make docs` writes it into the page.
"""

from engine.config import DEFAULT_LIMITS
from engine.families.cards import CARDS, Card
from tests.docs.pages import ROOT

NAME = "docs/models.md"
BEGIN, END = "<!-- families: `make docs` writes this table -->\n", "<!-- end of families -->\n"
HEAD = (
    "`model_type`",
    "models",
    "a picture, a clip in a prompt",
    "several pictures",
    "clips",
    "embeddings",
    "size of pictures",
)


def build_table() -> str:
    rows = [HEAD, ("---",) * len(HEAD), *(_row(card) for card in CARDS)]
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    limits = " and ".join(f"`{name}={number}`" for name, number in DEFAULT_LIMITS.items())
    return (
        f"{table}\nA prompt may hold {limits} where `limit_mm_per_prompt` does not say otherwise.\n"
    )


def _row(card: Card) -> tuple[str, ...]:
    marks = ", ".join(_code(mark) for mark in (card.picture, card.clip) if mark)
    sizes = ", ".join(f"`{word}` {number}" for word, number in card.sizes.items())
    return (
        ", ".join(_code(model_type) for model_type in card.model_types),
        card.models,
        marks or "none: a prompt with one ends in an error",
        card.several,
        card.clips,
        card.embeddings,
        sizes or card.seen,
    )


def _code(text: str) -> str:
    escaped = text.replace("|", "\\|")  # or it would end a cell
    return f"`{escaped}`"


def fill(page: str) -> str:
    """The page with its table as it should be."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{build_table()}{END}{after}"


if __name__ == "__main__":
    path = ROOT / NAME
    path.write_text(fill(path.read_text("utf-8")), "utf-8")
