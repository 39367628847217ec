"""LLaVA-NeXT and LLaVA-OneVision at full size: what pictures of any size become, without a pixel."""

import random
from typing import Any

import pytest
from transformers import (
    LlavaNextConfig,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)

from bench.configs import build_llava_tokenizer
from engine.errors import BadConfig
from engine.families.llava_next import LlavaNext
from engine.families.llava_onevision import LlavaOnevision
from engine.families.protocol import Description, Family, ImageTooNarrowError
from tests.engine.families import OnevisionProcessor

NUM_SIZES = 500


def build_next() -> tuple[Family, Any]:
    images = LlavaNextImageProcessorPil(size={"shortest_edge": 336}, crop_size=336)
    processor_class: Any = LlavaNextProcessor
    processor = processor_class(
        image_processor=images,
        tokenizer=build_tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    config = LlavaNextConfig()
    pictures = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    return LlavaNext(Description(config, None, pictures)), processor


def build_onevision() -> tuple[Family, Any]:
    processor_class: Any = OnevisionProcessor
    processor = processor_class(
        image_processor=LlavaOnevisionImageProcessorPil(),
        tokenizer=build_tokenizer(),
        num_image_tokens=729,
        vision_feature_select_strategy="full",
    )
    pictures = {"size": {"height": 384, "width": 384}}
    return LlavaOnevision(Description(LlavaOnevisionConfig(), None, pictures)), processor


def build_tokenizer() -> Any:
    tokenizer_class: Any = PreTrainedTokenizerFast
    return tokenizer_class(tokenizer_object=build_llava_tokenizer(300))


@pytest.mark.parametrize("build", [build_next, build_onevision])
def test_numbers_of_tokens_are_the_processors(build: Any) -> None:
    family, processor = build()
    rng = random.Random("tiles")
    sizes = [(1, 1), (200, 1), (1, 200), (384, 384), (336, 672), (2304, 2304), (1000, 999)]
    while len(sizes) < NUM_SIZES:
        width, height = rng.randint(1, rng.choice((60, 900, 8000))), rng.randint(1, 4000)
        if max(width, height) <= 200 * min(width, height):
            sizes.append((width, height))
    counted = processor._get_num_multimodal_tokens(image_sizes=[(h, w) for w, h in sizes])

    assert counted["num_image_tokens"] == [
        family.plan_picture(*size, None).num_tokens for size in sizes
    ]


@pytest.mark.parametrize("build", [build_next, build_onevision])
def test_strips_are_refused_before_they_are_resampled(build: Any) -> None:
    family, _ = build()
    for size in ((201, 1), (1, 201)):
        with pytest.raises(ImageTooNarrowError):
            family.plan_one_of(3, *size, None)
        with pytest.raises(ImageTooNarrowError):
            family.plan_one_of(1, *size, None)


@pytest.mark.parametrize(
    "pictures",
    [
        {"size": {"shortest_edge": 224}},
        {"crop_size": {"height": 336, "width": 224}},
        {"image_grid_pinpoints": [[336, 672]]},
    ],
)
def test_processor_of_another_model_is_told(pictures: dict[str, Any]) -> None:
    with pytest.raises(BadConfig, match="cuts other tiles than its encoder reads"):
        LlavaNext(Description(LlavaNextConfig(), None, pictures))


def test_encoder_whose_class_token_would_stay_is_told() -> None:
    config = LlavaNextConfig(vision_feature_select_strategy="full")
    with pytest.raises(BadConfig, match="cuts other tiles than its encoder reads"):
        LlavaNext(Description(config, None, {}))
