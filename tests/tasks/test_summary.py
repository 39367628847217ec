"""How texts are put together for the second pass: pure functions."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.summary import (
    CUT_MARK,
    LEAST_ROOM,
    Note,
    Rounds,
    Stitcher,
    Subject,
    build_stitcher,
    format_time,
)


def count_words(text: str) -> int:
    return len(text.split())


def build(room: int, subject: Subject = Subject.VIDEO) -> Stitcher:
    return Stitcher(subject, (), "What?", room, count_words)


def notes_of(lengths: Sequence[int]) -> list[Note]:
    return [Note(n, n + 1, " ".join(["word"] * length)) for n, length in enumerate(lengths)]


def measure(stitcher: Stitcher, group: Sequence[Note]) -> int:
    """The words of a group's lines in its prompt."""
    prompt = stitcher.build_messages(group)[-1]["content"]
    return count_words(prompt[prompt.index("What was answered:\n") + 19 :])


@given(lengths=st.lists(st.integers(0, 80), min_size=2, max_size=60), room=st.integers(20, 400))
def test_each_round_keeps_the_order_fits_and_has_fewer_texts(lengths: list[int], room: int) -> None:
    stitcher, notes = build(room), notes_of(lengths)

    groups = stitcher.group(notes)

    assert [n.start for n in notes] == [n.start for group in groups for n in group]
    assert all(measure(stitcher, group) <= room for group in groups)
    assert len(groups) < len(notes)


@given(lengths=st.lists(st.integers(0, 200), min_size=1, max_size=60), room=st.integers(20, 100))
def test_rounds_come_to_an_end_with_one_text_over_all(lengths: list[int], room: int) -> None:
    rounds = Rounds(build(room), "item")
    asked = rounds.begin(notes_of(lengths))
    names = list(asked)

    while asked:
        name, messages = asked.popitem()
        more = rounds.take(name, f"{len(names)} " + "word " * 200)
        assert not (more and asked), "a round begins when the last one is over"
        last, asked = messages, asked | more
        names += more

    assert rounds.num <= 6
    assert len(set(names)) == len(names)
    if len(lengths) == 1:
        assert (0, notes_of(lengths)[0].text) == (rounds.num, rounds.text)
    else:
        assert str(rounds.text).startswith(f"{len(names)} ")
        assert "[0:00 - " in last[-1]["content"]
        assert f" - {format_time(len(lengths))}]" in last[-1]["content"]


def test_texts_that_fit_are_one_prompt() -> None:
    groups = build(100).group(notes_of([10, 10, 10]))

    assert [3] == [len(group) for group in groups]


def test_long_text_is_cut_at_its_end_and_says_so() -> None:
    ((kept, other),) = build(40).group([Note(0, 1, "a " * 100), Note(1, 2, "b c")])

    assert kept.text.startswith("a a a")
    assert kept.text.endswith(CUT_MARK)
    assert count_words(kept.text) <= 20
    assert "b c" == other.text


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0, "0:00"),
        (9.96, "0:10"),
        (3.333333, "0:03.3"),
        (59.97, "1:00"),
        (60, "1:00"),
        (754.25, "12:34.2"),
        (3599.99, "1:00:00"),
        (3723.5, "1:02:03.5"),
    ],
)
def test_time_reads_as_people_write_it(seconds: float, expected: str) -> None:
    assert expected == format_time(seconds)


MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {
        "role": "user",
        "content": [{"type": "video", "video": b""}, {"type": "text", "text": "Who?"}],
    },
    {"role": "assistant", "content": "A cat."},
    {"role": "user", "content": "And then?"},
]


def build_for(max_model_len: int, max_tokens: int | None) -> Stitcher:
    return build_stitcher(
        Subject.VIDEO,
        MESSAGES,
        max_model_len=max_model_len,
        max_tokens=max_tokens,
        count_tokens=count_words,
    )


def test_summary_is_asked_what_the_parts_were_asked() -> None:
    messages = build_for(1000, None).build_messages([Note(0, 10, "a dog"), Note(10, 20, "a cat")])

    system, user = messages
    assert {"role": "system", "content": "Be brief."} == system
    assert "What was asked:\nWho?\nA cat.\nAnd then?\nWhat was answered:\n" in user["content"]
    assert user["content"].endswith("[0:00 - 0:10] a dog\n[0:10 - 0:20] a cat")


def test_prompt_without_a_question_has_no_empty_one() -> None:
    stitcher = Stitcher(Subject.IMAGES, (), "", 100, count_words)

    (user,) = stitcher.build_messages([Note(1, 1, "a dog"), Note(2, 4, "cats")])
    assert "What was asked:" not in user["content"]
    assert user["content"].endswith("[image 1] a dog\n[images 2 - 4] cats")


def test_answer_keeps_its_room() -> None:
    short, default, long = (build_for(1000, tokens).room for tokens in (10, None, 900))

    assert 240 == short - default  # 10 against a quarter
    assert 250 == default - long  # never more than half
    assert LEAST_ROOM == build_for(100, None).room
