"""What of Pixtral and Mistral 3 tests/engine/families.py does not say."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import LLM
from engine.checkpoint import read_checkpoint
from engine.config import EngineConfig
from engine.errors import BadConfig
from engine.families.pixtral import cut_patches, patch_positions, target_size
from engine.families.protocol import ImageTooNarrowError
from tests.engine.pictures import GREEDY, cut_picture, draw, error_of, token_ids
from tests.engine.tiny_llava import (
    write_tiny_internvl,
    write_tiny_mistral3,
    write_tiny_pixtral,
)

PROMPT = "USER: [IMG]x\nASSISTANT:"
Write = Callable[..., Path]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    with LLM(str(write_tiny_mistral3(tmp_path_factory.mktemp("mistral3")))) as llm:
        yield llm


@pytest.mark.parametrize("merge", [1, 2])
def test_patches_stand_where_their_positions_say(merge: int) -> None:
    rows, columns, patch_px = 3, 2, 4
    height, width = rows * merge * patch_px, columns * merge * patch_px
    pixels = torch.arange(height * width * 3).view(1, height, width, 3)
    patches = cut_patches(pixels, merge, patch_px).view(-1, 3, patch_px, patch_px)
    positions = patch_positions(rows, columns, merge)

    assert rows * columns * merge**2 == len(patches) == len(positions)
    assert len(positions) == len({tuple(place) for place in positions.tolist()})
    for patch, (row, column) in zip(patches, positions.tolist(), strict=True):
        top, left = row * patch_px, column * patch_px
        there = pixels[0, top : top + patch_px, left : left + patch_px]
        assert torch.equal(there.permute(2, 0, 1), patch)
    tokens = positions.reshape(-1, merge**2, 2)
    assert ((tokens - tokens[:, :1]) < merge).all()


def test_pictures_that_came_as_features_say_what_pictures_say(llm: LLM) -> None:
    picture, family = draw(3, 150, 90), llm.engine.checkpoint.family
    visual = cut_picture(family, picture)
    rows, columns = visual.plan.layout
    given = {
        "image_embeds": family.encode([visual])[0],
        "image_grid_thw": torch.tensor([[1, 2 * rows, 2 * columns]]),
    }
    seen, handed = (
        llm.generate(
            {"prompt": PROMPT, "multi_modal_data": {"image": media}}, GREEDY, use_tqdm=False
        )
        for media in (picture, given)
    )
    bare = llm.generate(
        {"prompt": PROMPT, "multi_modal_data": {"image": given["image_embeds"][None]}},
        GREEDY,
        use_tqdm=False,
    )

    assert token_ids(seen) == token_ids(handed)
    assert error_of(bare).startswith("This model's pictures stand in rows: give image_grid_thw")


def test_strip_that_would_lose_its_shorter_side_is_refused() -> None:
    assert (1, 4) == target_size(128, 2, (64, 64), 16)
    with pytest.raises(ImageTooNarrowError) as error:
        target_size(130, 2, (64, 64), 16)
    assert 64 == error.value.max_ratio


def told(name: str, part: str | None = None, **values: Any) -> Mapping[str, Any]:
    return {"name": name, "part": part, "values": values}


@pytest.mark.parametrize(
    ("write", "change", "said"),
    [
        (write_tiny_pixtral, told("config.json", vision_feature_layer=-2), "in another way than"),
        (
            write_tiny_pixtral,
            told("config.json", vision_feature_select_strategy="default"),
            "in another way than",
        ),
        (write_tiny_mistral3, told("config.json", spatial_merge_size=3), "in another way than"),
        (
            write_tiny_mistral3,
            told("config.json", "text_config", model_type="ministral3"),
            "text part is of the type 'ministral3'",
        ),
        (
            write_tiny_pixtral,
            told("processor_config.json", **{"image_break_token": "<row>"}),
            r"it lacks <row> or \[IMG_END\]",
        ),
        (
            write_tiny_mistral3,
            told("config.json", image_token_index=5),
            r"\[IMG\] is not its token 5",
        ),
    ],
)
def test_checkpoint_that_cannot_work_is_told(
    tmp_path: Path, write: Write, change: Mapping[str, Any], said: str
) -> None:
    file = write(tmp_path) / change["name"]
    content = json.loads(file.read_text())
    (content[change["part"]] if change["part"] else content).update(change["values"])
    file.write_text(json.dumps(content))

    with pytest.raises(BadConfig, match=said):
        LLM(str(tmp_path))


# Words as Mistral 3's were split when it was published: three digits in one piece.
SPLITS = {
    "type": "Sequence",
    "pretokenizers": [
        {
            "type": "Split",
            "pattern": {"Regex": r"\p{N}{1,3}|[^\p{N}]+"},
            "behavior": "Isolated",
            "invert": False,
        },
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ],
}
SPACES = {"type": "Metaspace", "replacement": "_", "prepend_scheme": "never", "split": False}


def write_many_words(folder: Path, splits: Mapping[str, Any], version: str | None) -> None:
    """Give a tokenizer over 100,000 tokens, among them a number of two digits."""
    content = json.loads((folder / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    vocab |= {token["content"]: token["id"] for token in content["added_tokens"]}  # they stay there
    vocab |= {word: len(vocab) + n for n, word in enumerate(["12", *map(str, range(100, 100_100))])}
    content["model"]["merges"] = [["1", "2"]]
    content["pre_tokenizer"] = splits
    (folder / "tokenizer.json").write_text(json.dumps(content))
    config = json.loads((folder / "config.json").read_text())
    config["transformers_version"] = version
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("write", "splits", "version", "pieces"),
    [
        (write_tiny_mistral3, SPLITS, "4.50.0.dev0", ["a", "1", "2"]),
        (write_tiny_mistral3, SPLITS, "5.1.0", ["a", "12"]),
        (write_tiny_mistral3, SPACES, "4.50.0.dev0", ["a", "12"]),
        (write_tiny_internvl, SPLITS, None, ["a", "12"]),
    ],
)
def test_words_are_split_as_in_training_without_a_word(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    write: Write,
    splits: Mapping[str, Any],
    version: str | None,
    pieces: Sequence[str],
) -> None:
    """transformers warns of wrong tokens, and goes on with them where nobody tells it otherwise."""
    write_many_words(write(tmp_path), splits, version)
    vendor = logging.getLogger("transformers")
    vendor.addHandler(caplog.handler)
    try:
        tokenizer = read_checkpoint(EngineConfig(str(tmp_path), device="cpu")).tokenizer
    finally:
        vendor.removeHandler(caplog.handler)

    assert ["<s>", *pieces] == tokenizer.convert_ids_to_tokens(tokenizer("a12")["input_ids"])
    assert [] == caplog.messages
