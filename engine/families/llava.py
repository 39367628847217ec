"""LLaVA-1.5: every picture at one size, one token for each patch, behind a Llama or another text model."""

from typing import Any

from torch import Tensor

from engine.errors import BadConfig
from engine.families.protocol import Description, check_text
from engine.families.resizing import CLIP_DEFAULT, SIGLIP_DEFAULT, Resizing
from engine.families.tiles import OneTile, TileEncoder, Tower, count_patches

# Vicuna's turns, pictures before the words of theirs.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] != 'system' -%}{{ message['role'] | upper }}: {% endif -%}
{%- if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] if part['type'] == 'image' -%}
<image>
{% endfor -%}
{%- for part in message['content'] if part['type'] == 'text' -%}
{{ part['text'] }}
{%- endfor -%}
{%- endif -%}
{%- if message['role'] == 'assistant' -%}{{ eos_token }}{% else %} {% endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}ASSISTANT:{%- endif -%}
"""


def find_template(text_config: Any) -> str | None:
    """For checkpoints that bring no template: Vicuna is a Llama, and others know other turns."""
    return CHAT_TEMPLATE if text_config.model_type == "llama" else None


class Llava(OneTile):
    """Placeholders are one text token; a plan is rows alone."""

    image_placeholder = image_slot = "<image>"

    def __init__(self, description: Description) -> None:
        super().__init__(description)
        check_text(self.text_config)
        self.chat_template = find_template(self.text_config)
        self.config = config = description.config
        self.image_token_id = config.image_token_id
        pictures = description.pictures
        processor = str(pictures.get("image_processor_type", "")).removesuffix("Fast")
        default = SIGLIP_DEFAULT if processor == "SiglipImageProcessor" else CLIP_DEFAULT
        self._pictures = {**default, **pictures}
        self._resizing = Resizing.read(self._pictures)
        vision = config.vision_config
        if (vision.image_size,) * 2 != (self._resizing.height_px, self._resizing.width_px):
            raise BadConfig(
                f"The model's preprocessor_config.json makes pictures of {self._resizing.width_px}x"
                f"{self._resizing.height_px} pixels, and its encoder reads {vision.image_size}x"
                f"{vision.image_size}. Give the model's own preprocessor_config.json."
            )
        num_rows, self._num_patches = count_patches(vision)
        self._drops_first = config.vision_feature_select_strategy == "default"
        self._num_rows = num_rows - int(self._drops_first)

    def attach(self, model: Any) -> None:
        super().attach(model)
        tower, config = model.model.vision_tower, self.config
        self._tower = Tower(tower, config.vision_feature_layer, drops_first=self._drops_first)
        self._projector = model.model.multi_modal_projector
        self._encoder = TileEncoder(
            tower,
            self._pictures,
            self._pictures["image_mean"],
            self._pictures["image_std"],
            tile_patches=self._num_patches,
        )

    def _see(self, pixels: Tensor) -> Tensor:
        return self._projector(self._tower(pixels))  # type: ignore[no-any-return]
