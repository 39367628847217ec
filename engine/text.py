"""
Token ids to text, one sequence at a time, and the stop strings that may end it.

It knows neither the prompt nor the model: the text of an output is what the tokenizer makes of the
output's ids alone, so it is the same however the sequence was scheduled. Stop strings are sought in
text and not in tokens, so where the borders between tokens fall changes nothing.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from engine.request import SamplingParams

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # stands where bytes are no character, or not yet one
WINDOW_TOKENS = 32  # decoded again for each new token; few enough to be cheap
MAX_UNREAD_TOKENS = 16  # that wait to be decoded together, where no stop string can end in them
MAX_WINDOW_TOKENS = 64  # no character is so long: behind this, broken bytes are shown as they are


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer, fast or slow."""

    def decode(
        self, token_ids: list[int], skip_special_tokens: bool = False, **kwargs: Any
    ) -> str | list[str]: ...

    def convert_ids_to_tokens(self, ids: int) -> str | list[str] | None: ...


def has_token(tokenizer: Tokenizer, token_id: int) -> bool:
    """False for ids that only pad the vocabulary: logits have them, the tokenizer does not."""
    try:
        return token_id >= 0 and tokenizer.convert_ids_to_tokens(token_id) is not None
    except (IndexError, KeyError, OverflowError):  # what a tokenizer says of them is up to it
        return False


def decode(
    tokenizer: Tokenizer,
    token_ids: Sequence[int],
    *,
    skip_special_tokens: bool = True,
    spaces_between_special_tokens: bool = True,
) -> str:
    """The text of these ids; ids without a token have none."""
    return _decode_any(tokenizer, token_ids, skip_special_tokens, spaces_between_special_tokens)


def decode_token(tokenizer: Tokenizer, token_id: int) -> str:
    """The text of one id, special ones included, for `Logprob.decoded_token`."""
    return decode(tokenizer, [token_id], skip_special_tokens=False)


def _decode_any(
    tokenizer: Tokenizer,
    token_ids: Sequence[int],
    skip_special_tokens: bool,
    spaces_between_special_tokens: bool,
) -> str:
    known = {token_id for token_id in set(token_ids) if has_token(tokenizer, token_id)}
    return _decode_known(
        tokenizer,
        [token_id for token_id in token_ids if token_id in known],
        skip_special_tokens,
        spaces_between_special_tokens,
    )


def _decode_known(
    tokenizer: Tokenizer,
    token_ids: list[int],
    skip_special_tokens: bool,
    spaces_between_special_tokens: bool,
) -> str:
    text = tokenizer.decode(
        token_ids,
        skip_special_tokens=skip_special_tokens,
        spaces_between_special_tokens=spaces_between_special_tokens,
    )
    assert isinstance(text, str)  # a list is given for a list of lists
    return text


class Detokenizer:
    """
    One output's text while it grows.

    Push each token as it is chosen; ask `stop_reason` whether a stop string is complete; `finish`
    once, however the output ended. A token that ended the output by its id (end of text, or one of
    `stop_token_ids`) is pushed only if `include_stop_str_in_output` asks to see it.

    NOTE: the pieces returned are for showing progress. With every byte-level tokenizer they add up
    to `text`; one that changes earlier text when more follows (byte fallback on broken bytes) is
    right in `text` after `finish`, which decodes all ids at once.

    Args:
        tokenizer: of the model.
        params: the request's; read for everything about text and stop strings.
        streaming: False if nobody looks at the pieces. Then, unless there are stop strings to
            find, a push costs nothing and the text is made once, in `finish`; with some, text is
            made where one may end.
        pieces: the texts of single tokens that were looked up before, of this tokenizer; added to.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        params: SamplingParams,
        *,
        streaming: bool = True,
        pieces: dict[int, str] | None = None,
    ) -> None:
        self.stop_reason: str | None = None
        self.text = ""  # so far, without what may yet change; complete after `finish`
        self._tokenizer = tokenizer
        self._params = params
        self._pieces = {} if pieces is None else pieces
        self._is_incremental = params.detokenize and (streaming or bool(params.stop_strings))
        # What a stop string may end in; None where every token is looked at as it comes.
        self._ends = None if streaming else _ends_of(params.stop_strings)
        self._ends_in_half = False  # a character, as far as was read
        self._num_tokens = 0
        self._ids: list[int] = []  # where it is incremental, those that have a token
        self._start = 0  # of the window, in tokens
        self._border = 0  # tokens up to here made whole characters
        self._num_read = 0  # characters of the window's text that stand in `text`
        self._num_searched = 0  # no stop string ends within so many characters of `text`
        self._num_returned = 0  # characters of `text`

    def push(self, token_id: int) -> str:
        """
        Take the next token.

        Returns:
            Text that is new and will not change: never half a character, and never what may be the
            beginning of a stop string. Empty after a stop string, whatever is pushed.
        """
        if self.stop_reason is not None:
            return ""
        self._num_tokens += 1
        if not self._is_incremental:
            self._ids.append(token_id)  # those without a token are left out once, in `finish`
            return ""
        if has_token(self._tokenizer, token_id):
            self._ids.append(token_id)
        if self._may_wait(token_id):
            return ""
        self.text += self._read()
        self._search()
        return self._release(len(self.text) - self._num_held())

    def _may_wait(self, token_id: int) -> bool:
        """
        Whether no stop string can end in this token, so that its text is read with a later one.

        Reading decodes a window of tokens, which for a batch of many takes longer than the device
        takes to choose them.
        """
        if self._ends is None:
            return False
        piece = self._pieces.get(token_id)
        if piece is None:
            piece = self._pieces[token_id] = decode_token(self._tokenizer, token_id)
        must_read = (
            # Half a character is read at once, and so is what comes behind and decides what it is.
            self._ends_in_half
            or REPLACEMENT in piece
            or self._num_tokens <= self._params.min_tokens
            or len(self._ids) - self._border >= MAX_UNREAD_TOKENS
        )
        return not must_read and self._ends.isdisjoint(piece)

    def finish(self) -> str:
        """Complete `text`, and return the rest of it: half characters become U+FFFD."""
        if self.stop_reason is None and self._params.detokenize:
            self.text = self._decode(0)
        return self._release(len(self.text))

    def _read(self) -> str:
        """The text that the newest token completed."""
        window = self._decode(self._start)
        num_tokens = len(self._ids) - self._start
        must_move = num_tokens >= MAX_WINDOW_TOKENS
        stable = window if must_move else window.rstrip(REPLACEMENT)
        self._ends_in_half = len(stable) < len(window)
        piece = stable[self._num_read :]
        self._num_read = max(self._num_read, len(stable))
        if must_move or (piece and len(stable) == len(window)):
            if num_tokens >= WINDOW_TOKENS:
                self._move_window(must_move)
            self._border = len(self._ids)
        return piece

    def _move_window(self, must_move: bool) -> None:
        # It starts with a piece that made text, because some tokenizers drop the space before the
        # first word of what they decode: what comes after that piece keeps its own.
        if self._border > self._start:
            self._start = self._border
        elif must_move:
            self._start = len(self._ids) - 1
        self._num_read = len(self._decode(self._start))

    def _search(self) -> None:
        """Find the stop string that is complete first, as if the text came by the character."""
        # As in vLLM, a stop string must end in text that is made after the first min_tokens.
        if self._num_tokens > self._params.min_tokens:
            found = [
                (at + len(stop), at, stop)
                for stop in self._params.stop_strings
                if (at := self.text.find(stop, max(0, self._num_searched + 1 - len(stop)))) >= 0
            ]
            if found:
                end, at, self.stop_reason = min(found)
                self.text = self.text[: end if self._params.include_stop_str_in_output else at]
        self._num_searched = len(self.text)

    def _num_held(self) -> int:
        if self.stop_reason is not None or self._params.include_stop_str_in_output:
            return 0
        return _num_begun(self.text, self._params.stop_strings)

    def _release(self, end: int) -> str:
        piece = self.text[self._num_returned : end]
        self._num_returned = max(self._num_returned, end)
        return piece

    def _decode(self, start: int) -> str:
        read = _decode_known if self._is_incremental else _decode_any
        return read(
            self._tokenizer,
            self._ids[start:],
            self._params.skip_special_tokens,
            self._params.spaces_between_special_tokens,
        )


def _ends_of(stops: Iterable[str]) -> frozenset[str] | None:
    """The last characters of stop strings; None where one is a space, which tokenizers may drop."""
    ends = frozenset(stop[-1] for stop in stops)
    return None if " " in ends else ends


def _num_begun(text: str, stops: Iterable[str]) -> int:
    """How many characters at the end of the text may be the beginning of a stop string."""
    return max(
        (
            length
            for stop in stops
            for length in range(1, min(len(stop), len(text) + 1))
            if text.endswith(stop[:length])
        ),
        default=0,
    )
