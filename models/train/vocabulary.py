"""
The tokenizer of darkroom-tiny: byte-level BPE whose merges only ever start at a word's beginning.

Every word of the sentences that the model reads and writes is one token after a space; a printed
word, which stands behind a quotation mark, stays a row of single letters, as it is seen.
"""

import json
import random
import re
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from models.train import corpus, photos
from models.train.scenes import NUMBERS, sentence
from models.train.settings import SPECIAL_TOKENS, SYSTEM_PROMPT

SPACE = "Ġ"  # how byte-level BPE writes a space


def sentences(num: int) -> list[str]:
    """Questions and answers of every kind, from a fixed seed."""
    rng = random.Random("vocabulary")
    texts = [SYSTEM_PROMPT, corpus.NO_IMAGE, "Picture 1: ", *photos.NAMES]
    for _ in range(num):
        samples = [
            corpus.scene_sample(rng, (96, 96)),
            corpus.photo_sample(rng, (64, 64)),
            corpus.images_sample(rng, [(84, 84)] * 8),
            corpus.motion_sample(rng, (84, 84), 2, is_video=True),
        ]
        for sample in samples:
            for question, answer in sample.turns:
                texts += [re.sub(r'"[^"]*"', "", answer), question]
                texts += [question.replace("colour", "color").replace("centre", "center")]
    texts += [*corpus.DESCRIBE, *corpus.DESCRIBE_EACH, *corpus.DESCRIBE_CLIP, *corpus.READ]
    texts += [sentence(number) for number in NUMBERS]
    return texts


def words_of(texts: list[str]) -> list[str]:
    """Words after a space (with the mark for it), and words that begin a text with a capital."""
    found = set()
    for text in texts:
        for match in re.finditer(r"( ?)([A-Za-z]+|\d+)", text):
            space, word = match.groups()
            if space:
                found.add(SPACE + word)
            elif len(word) > 1 and word[0].isupper() and word[1:].islower():
                found.add(word)
    return sorted(found)


def build() -> Tokenizer:
    """Bytes first, then one token for every beginning of every word, then the special tokens."""
    vocabulary = {
        symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    merges: list[tuple[str, str]] = []
    for word in words_of(sentences(600)):
        for end in range(2, len(word) + 1):
            if word[:end] not in vocabulary:
                vocabulary[word[:end]] = len(vocabulary)
                merges.append((word[: end - 1], word[end - 1]))
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    return tokenizer


def main(folder: Path = Path("models/darkroom-tiny")) -> None:
    tokenizer = build()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    print(json.dumps({"vocabulary": tokenizer.get_vocab_size()}))


if __name__ == "__main__":
    main()
