"""Where an encoder of Idefics3's puts the patches of a tile."""

import pytest
import torch
from torch import Tensor
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionEmbeddings

from engine.families.idefics3 import place_patches


@pytest.mark.parametrize(("side", "known_side"), [(27, 27), (26, 26), (32, 32), (6, 6), (9, 11)])
def test_patches_stand_where_the_models_own_call_puts_them(side: int, known_side: int) -> None:
    patch_px = 4
    config = Idefics3VisionConfig(
        hidden_size=8, patch_size=patch_px, image_size=known_side * patch_px
    )
    embeddings = Idefics3VisionEmbeddings(config)
    asked: list[Tensor] = []
    embeddings.position_embedding.register_forward_pre_hook(
        lambda _, inputs: asked.append(inputs[0])
    )

    embeddings(
        torch.zeros(1, 3, side * patch_px, side * patch_px),
        torch.ones(1, side, side, dtype=torch.bool),
    )

    assert asked[0][0].tolist() == place_patches(side, known_side).tolist()
