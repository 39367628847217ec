"""What is said of families before anything is loaded is what their adapters do."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import torch

from engine import LLM, SamplingParams
from engine.checkpoint import read_checkpoint
from engine.config import EngineConfig
from engine.families import FAMILIES
from engine.families.cards import CARDS, Card
from tests.engine.families import CASES
from tests.engine.pictures import draw
from tests.engine.tiny import write_tiny_qwen2_vl
from tests.engine.tiny_llava import write_tiny_llava, write_tiny_pixtral
from tests.engine.tiny_phi3_v import write_tiny_phi3_v
from tests.engine.tiny_qwen import QWEN2_5_VL, QWEN3_VL, write_tiny_qwen

ONE = SamplingParams(temperature=0, max_tokens=1)
SIZES = ("min_pixels", "max_pixels", "size", "num_crops")  # in a checkpoint's files
WRITERS: Mapping[str, Callable[[Path], Path]] = {
    **{case.model_type: partial(case.write, changes=case.changes) for case in CASES.values()},
    "llava": write_tiny_llava,
    "llava/pixtral": write_tiny_pixtral,
    "qwen2_vl": write_tiny_qwen2_vl,
    "qwen2_5_vl": partial(write_tiny_qwen, shape=QWEN2_5_VL),
    "qwen3_vl": partial(write_tiny_qwen, shape=QWEN3_VL),
    "phi3_v": write_tiny_phi3_v,
}
MODEL_TYPES = [model_type for card in CARDS for model_type in card.model_types]


def card_of(model_type: str) -> Card:
    (card,) = [card for card in CARDS if model_type in card.model_types]
    return card


def test_every_family_has_one_card() -> None:
    assert sorted(FAMILIES) == sorted(MODEL_TYPES)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_marks_clips_and_sizes_are_those_of_the_adapter(model_type: str, tmp_path: Path) -> None:
    card, folder = card_of(model_type), WRITERS[model_type](tmp_path)
    path = folder / "preprocessor_config.json"
    if card.sizes:
        told = json.loads(path.read_text())
        path.write_text(json.dumps({key: told[key] for key in told if key not in SIZES}))
    family = read_checkpoint(EngineConfig(str(folder), device="cpu")).family
    area = family.image_area

    assert (card.picture or "") == (family.image_written or family.image_slot)
    assert (card.clip or "") == family.video_slot
    assert dict(card.sizes) == ({} if area is None else asdict(area))
    assert bool(card.picture) == (bool(card.sizes) != bool(card.seen))
    seen = ("image", card.picture), ("video", card.clip)
    assert tuple(name for name, mark in seen if mark) == family.modalities
    assert card.takes_clips == card.clips.startswith("yes")
    assert (card.picture is None) == (card.clips == "no")


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_pictures_and_embeddings_are_taken_where_the_card_says_so(
    model_type: str, tmp_path: Path
) -> None:
    card, folder = card_of(model_type), WRITERS[model_type](tmp_path)
    with LLM(str(folder), limit_mm_per_prompt={"image": 2}, device="cpu") as llm:
        features = torch.randn(1, 4, llm.engine.checkpoint.family.feature_size)
        grid = torch.tensor([[1, 4, 4]])
        mark = card.picture or ""
        second = mark.replace("_1", "_2")
        several = {"prompt": f"{mark}{second}a", "multi_modal_data": {"image": [draw(1), draw(2)]}}
        bare, with_grid = (
            {"prompt": f"{mark}a", "multi_modal_data": {"image": image}}
            for image in (
                torch.randn(1, 5, features.shape[2]),  # no tile of any has so many
                {"image_embeds": features, "image_grid_thw": grid},
            )
        )
        are_taken = [
            llm.generate(one, ONE, use_tqdm=False)[0].error is None
            for one in (several, bare, with_grid)
        ]

    assert card.several.startswith("yes") == are_taken[0]
    assert (card.embeddings == "yes") == are_taken[1]
    if card.embeddings != "yes":
        assert (card.embeddings == "with image_grid_thw") == are_taken[2]
