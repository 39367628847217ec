"""Ids to text with a byte-level BPE tokenizer made here: whole characters, stop strings, padding ids."""

from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from engine.request import SamplingParams
from engine.text import (
    MAX_WINDOW_TOKENS,
    Detokenizer,
    decode,
    decode_token,
    has_token,
)

SPECIAL = ["<s>", "</s>", "<|image_pad|>"]
CORPUS = ["a picture of a cat and a dog 😀 naïve 東京", "the cat sat on the mat. END of story\n"]
SPACE = "\u2581"  # how SentencePiece writes a space


def build_byte_level() -> PreTrainedTokenizerFast:
    """Every byte has a token, as in GPT-2 and Qwen; a character may take up to four."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIAL,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 5, trainer)
    return wrap(tokenizer)


def build_byte_fallback() -> PreTrainedTokenizerFast:
    """Words first and bytes where there is none, as in Llama; drops the first word's space."""
    words = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), SPACE, f"{SPACE}a", f"{SPACE}b"]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={word: index for index, word in enumerate([*words, "a", "b"])},
            merges=[],
            byte_fallback=True,
        )
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return wrap(tokenizer)


def wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    names = dict(zip(("bos_token", "eos_token", "pad_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)  # type: ignore[no-untyped-call]


def find_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    token_id = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(token_id, int)
    return token_id


BYTE_LEVEL = build_byte_level()
BYTE_FALLBACK = build_byte_fallback()
NUM_IDS = len(BYTE_LEVEL) + 20  # the vocabulary is padded: the last 20 ids have no token

random_ids = st.lists(st.integers(0, NUM_IDS - 1), max_size=150)
lively_text = st.text(st.sampled_from("ab é東😀END.\n"), max_size=40)


def encode(text: str) -> list[int]:
    ids: list[int] = BYTE_LEVEL.encode(text, add_special_tokens=False)
    return ids


def run(
    ids: Sequence[int],
    params: SamplingParams | None = None,
    *,
    tokenizer: PreTrainedTokenizerFast = BYTE_LEVEL,
    streaming: bool = True,
) -> tuple[Detokenizer, list[str]]:
    """The detokenizer at the end, and the pieces it gave: one a token, then the last."""
    detokenizer = Detokenizer(tokenizer, params or SamplingParams(), streaming=streaming)
    pieces = [detokenizer.push(token_id) for token_id in ids]
    return detokenizer, [*pieces, detokenizer.finish()]


# Characters


def test_character_of_many_tokens_comes_when_its_last_byte_does() -> None:
    ids = encode("😁")
    assert len(ids) > 1

    _, pieces = run(ids)

    assert [*[""] * (len(ids) - 1), "😁", ""] == pieces


def test_half_a_character_at_the_end_is_shown_as_broken() -> None:
    ids = encode("a😁")[:-1]

    detokenizer, pieces = run(ids)

    assert ("a\N{REPLACEMENT CHARACTER}", "a") == (detokenizer.text, "".join(pieces[:-1]))


@given(random_ids, st.booleans())
@example([200] * (3 * MAX_WINDOW_TOKENS), True)  # bytes that never become a character
@example([2] * (3 * MAX_WINDOW_TOKENS), True)  # tokens without text
@example(encode("😁 cat ") * MAX_WINDOW_TOKENS, True)
def test_text_and_its_pieces_equal_the_tokenizers_own_decoding(
    ids: list[int], skip_special_tokens: bool
) -> None:
    params = SamplingParams(skip_special_tokens=skip_special_tokens)

    detokenizer, pieces = run(ids, params)

    expected = BYTE_LEVEL.decode(ids, skip_special_tokens=skip_special_tokens)
    assert expected == detokenizer.text
    assert expected == "".join(pieces)


@given(lively_text)
def test_text_comes_back_as_it_was_and_never_with_half_a_character(text: str) -> None:
    detokenizer, pieces = run(encode(text))

    assert text == detokenizer.text
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)


@given(st.lists(st.integers(0, len(BYTE_FALLBACK) - 1), max_size=100))
def test_text_equals_the_decoding_of_a_tokenizer_with_byte_fallback(ids: list[int]) -> None:
    detokenizer, _ = run(ids, tokenizer=BYTE_FALLBACK)

    assert BYTE_FALLBACK.decode(ids, skip_special_tokens=True) == detokenizer.text


def test_spaces_between_words_stay_where_a_tokenizer_drops_the_first() -> None:
    word = find_id(BYTE_FALLBACK, f"{SPACE}a")
    image = find_id(BYTE_FALLBACK, "<|image_pad|>")
    ids = [word, image, word] * MAX_WINDOW_TOKENS

    detokenizer, pieces = run(ids, tokenizer=BYTE_FALLBACK)

    assert " ".join("a" * (2 * MAX_WINDOW_TOKENS)) == detokenizer.text
    assert detokenizer.text == "".join(pieces)


@given(random_ids)
def test_text_made_only_at_the_end_is_the_same(ids: list[int]) -> None:
    streamed, _ = run(ids)

    lazy, pieces = run(ids, streaming=False)

    assert streamed.text == lazy.text
    assert [*[""] * len(ids), lazy.text] == pieces


def test_nothing_is_decoded_where_no_text_is_wanted() -> None:
    detokenizer, pieces = run(encode("a cat"), SamplingParams(detokenize=False))

    assert ("", "") == (detokenizer.text, "".join(pieces))


# Ids without a token


@pytest.mark.parametrize("token_id", [len(BYTE_LEVEL), NUM_IDS, 2**40, -1])
def test_id_without_a_token_has_no_text_and_disturbs_none(token_id: int) -> None:
    first, *rest = encode("😁")

    detokenizer, _ = run([first, token_id, *rest])

    assert not has_token(BYTE_LEVEL, token_id)
    assert ("😁", "") == (detokenizer.text, decode_token(BYTE_LEVEL, token_id))


def test_tokenizer_that_raises_for_unknown_ids_is_understood() -> None:
    class Strict:
        def decode(
            self, token_ids: list[int], skip_special_tokens: bool = False, **kwargs: object
        ) -> str:
            return "".join("abc"[token_id] for token_id in token_ids)

        def convert_ids_to_tokens(self, ids: int) -> str:
            return "abc"[ids]

    text = decode(Strict(), [0, 3, 2])

    assert "ac" == text


def test_decoded_token_shows_special_tokens_too() -> None:
    ids = [find_id(BYTE_LEVEL, token) for token in SPECIAL]

    texts = [decode_token(BYTE_LEVEL, token_id) for token_id in ids]

    assert SPECIAL == texts


# Stop strings


def stop_by_hand(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """Read a character at a time: (text before the stop string that is complete first, which)."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(lively_text, st.lists(st.text(st.sampled_from("ab é😀EN"), min_size=1, max_size=4)))
def test_stop_strings_are_found_as_if_the_text_came_by_the_character(
    text: str, stops: list[str]
) -> None:
    expected = stop_by_hand(text, stops)

    detokenizer, pieces = run(encode(text), SamplingParams(stop=stops))

    assert expected == (detokenizer.text, detokenizer.stop_reason)
    assert expected[0] == "".join(pieces)


@given(lively_text, st.text(st.sampled_from("ab é😀"), min_size=1, max_size=3))
def test_stop_string_stays_where_it_is_asked_for(text: str, stop: str) -> None:
    before, found = stop_by_hand(text, [stop])

    detokenizer, pieces = run(
        encode(text), SamplingParams(stop=stop, include_stop_str_in_output=True)
    )

    assert before + (found or "") == detokenizer.text == "".join(pieces)


def test_stop_string_across_borders_of_tokens_is_cut_from_the_text() -> None:
    ids = [*encode("a cat E"), *encode("N"), *encode("D of")]

    detokenizer, _ = run(ids, SamplingParams(stop=["nothing", "END"]))

    assert ("a cat ", "END") == (detokenizer.text, detokenizer.stop_reason)


def test_text_that_may_begin_a_stop_string_is_held_back_until_it_does_not() -> None:
    detokenizer = Detokenizer(BYTE_LEVEL, SamplingParams(stop="END"))

    pieces = [detokenizer.push(encode(letter)[0]) for letter in "xEENy"]

    assert ["x", "", "E", "", "ENy"] == pieces


def test_text_held_back_comes_at_the_end() -> None:
    _, pieces = run(encode("x") + encode("E") + encode("N"), SamplingParams(stop="END"))

    assert ["x", "", "", "EN"] == pieces


def test_tokens_after_a_stop_string_change_nothing() -> None:
    detokenizer, _ = run(encode("a. b. c"), SamplingParams(stop="."))
    before = (detokenizer.text, detokenizer.stop_reason)

    piece = detokenizer.push(encode("a")[0])

    assert ("", before) == (piece, (detokenizer.text, detokenizer.stop_reason))
    assert ("a", ".") == before


def test_stop_string_is_found_without_streaming() -> None:
    detokenizer, _ = run(encode("a cat. b"), SamplingParams(stop="."), streaming=False)

    assert ("a cat", ".") == (detokenizer.text, detokenizer.stop_reason)


def test_stop_string_among_the_first_min_tokens_is_passed_over() -> None:
    ids = [encode(letter)[0] for letter in "x.y.z"]

    detokenizer, _ = run(ids, SamplingParams(stop=".", min_tokens=2))

    assert ("x.y", ".") == (detokenizer.text, detokenizer.stop_reason)


def test_stop_string_that_ends_behind_min_tokens_may_begin_before() -> None:
    ids = [encode(letter)[0] for letter in "xEND"]

    detokenizer, _ = run(ids, SamplingParams(stop="END", min_tokens=3))

    assert ("x", "END") == (detokenizer.text, detokenizer.stop_reason)


def test_ids_without_a_token_count_for_min_tokens() -> None:
    ids = [NUM_IDS, NUM_IDS, *encode(".")]

    detokenizer, _ = run(ids, SamplingParams(stop=".", min_tokens=2))

    assert "." == detokenizer.stop_reason


def test_stop_string_hidden_in_special_tokens_is_found_only_where_they_are_shown() -> None:
    ids = [*encode("a"), find_id(BYTE_LEVEL, "<|image_pad|>"), *encode("b")]

    hidden, _ = run(ids, SamplingParams(stop="image"))
    shown, _ = run(ids, SamplingParams(stop="image", skip_special_tokens=False))

    assert ("ab", None) == (hidden.text, hidden.stop_reason)
    assert ("a<|", "image") == (shown.text, shown.stop_reason)


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, BYTE_FALLBACK])
@given(
    any_ids=random_ids,
    text=lively_text,
    stops=st.lists(
        st.sampled_from([".", "a", "at", "END", "東", "\n", "b a", "t ", "�"]), max_size=3
    ),
    min_tokens=st.integers(0, 5),
    keeps=st.booleans(),
)
def test_text_that_nobody_watches_ends_where_it_would_if_somebody_did(
    tokenizer: PreTrainedTokenizerFast,
    any_ids: list[int],
    text: str,
    stops: list[str],
    min_tokens: int,
    keeps: bool,
) -> None:
    # Byte fallback makes other text of bytes that are no character when more of them follow.
    ids = any_ids if tokenizer is BYTE_LEVEL else tokenizer(text)["input_ids"]
    params = SamplingParams(
        stop=stops, min_tokens=min_tokens, include_stop_str_in_output=keeps, max_tokens=200
    )
    watched = Detokenizer(tokenizer, params)
    unwatched = Detokenizer(tokenizer, params, streaming=False)
    ends: list[int | None] = []
    for detokenizer in (watched, unwatched):
        end = None
        for place, token_id in enumerate(ids):
            detokenizer.push(token_id)
            if detokenizer.stop_reason is not None:
                end = place
                break
        detokenizer.finish()
        ends.append(end)

    assert ends[0] == ends[1]
    assert watched.stop_reason == unwatched.stop_reason
    assert watched.text == unwatched.text


def test_a_window_is_decoded_only_where_a_stop_string_may_end() -> None:
    num_decoded = 0

    class Counting:
        def decode(self, *args: object, **kwargs: object) -> object:
            nonlocal num_decoded
            num_decoded += 1
            return BYTE_LEVEL.decode(*args, **kwargs)  # type: ignore[arg-type]

        def convert_ids_to_tokens(self, ids: int) -> object:
            return BYTE_LEVEL.convert_ids_to_tokens(ids)

    pieces: dict[int, str] = {}
    ids = encode("the cat sat on the mat " * 8)
    for _ in range(2):
        num_decoded = 0
        detokenizer = Detokenizer(
            Counting(),  # type: ignore[arg-type]
            SamplingParams(stop=["END", "."]),
            streaming=False,
            pieces=pieces,
        )
        for token_id in ids:
            detokenizer.push(token_id)

    assert num_decoded < len(ids) / 8
