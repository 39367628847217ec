"""The page of models has a table that is made of the families' cards."""

from tests.docs.models_page import BEGIN, END, NAME, fill
from tests.docs.pages import read_page


def test_table_is_what_the_cards_say() -> None:
    page = read_page(NAME)

    assert (1, 1) == (page.count(BEGIN), page.count(END))
    assert fill(page) == page, f"{NAME} is older than engine/families/cards.py: run `make docs`"
