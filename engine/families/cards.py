"""
What people want to know of a family before they load a checkpoint, in words and numbers.

`darkroom models` and the table of docs/models.md show it. It is data that needs no torch;
tests/engine/test_cards.py compares it with what the adapters do. A new family adds its card here,
and `make docs` writes the page's table anew.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Card:
    """
    Attributes:
        model_types: of all that the card is true of, as `FAMILIES` has them.
        models: that people know by name.
        picture: how a prompt that is written by hand has its first one; None where none is seen.
        clip: the same of a clip; None where its frames are seen as pictures, in conversations only.
        clips: what is to know of clips, where some are seen.
        several: what is to know of several pictures in one prompt.
        embeddings: whether a caller's features are taken in a picture's place, and how.
        sizes: words by which a request sizes pictures, and what holds where neither the request nor
            the checkpoint says; empty where a picture's size is not to choose.
        seen: how large a picture is seen, where it is not to choose.
    """

    model_types: tuple[str, ...]
    models: str
    picture: str | None = None
    clip: str | None = None
    clips: str = "as pictures"
    several: str = "yes"
    embeddings: str = "yes"
    sizes: Mapping[str, int] = field(default_factory=dict)
    seen: str = ""

    @property
    def takes_clips(self) -> bool:
        """As such; otherwise conversations show their frames as pictures, where those are seen."""
        return self.clip is not None


QWEN_PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
QWEN_CLIP = "<|vision_start|><|video_pad|><|vision_end|>"
AREA = {"min_pixels": 56 * 56, "max_pixels": 28 * 28 * 1280}

CARDS: tuple[Card, ...] = (
    Card(("qwen2_vl",), "Qwen2-VL", QWEN_PICTURE, QWEN_CLIP, "yes", sizes=AREA),
    Card(
        ("qwen2_5_vl",),
        "Qwen2.5-VL",
        QWEN_PICTURE,
        QWEN_CLIP,
        "yes, in time by seconds",
        sizes=AREA,
    ),
    Card(
        ("qwen3_vl",),
        "Qwen3-VL, not its mixtures of experts",
        QWEN_PICTURE,
        QWEN_CLIP,
        "yes, each pair of frames behind its moment; sized all together",
        sizes=AREA,
    ),
    Card(
        ("llava",),
        "LLaVA-1.5 and others of its form, with a CLIP or SigLIP encoder",
        "<image>",
        seen="at the one size of its encoder",
    ),
    Card(
        ("llava_next",),
        "LLaVA-NeXT (1.6)",
        "<image>",
        seen="whole, and in tiles of the best of its resolutions",
    ),
    Card(
        ("llava_onevision",),
        "LLaVA-OneVision",
        "<image>",
        "<video>",
        "yes",
        several="yes, each seen whole only, as it was trained",
        seen="whole, and in tiles of the best of its resolutions",
    ),
    Card(
        ("idefics3",),
        "Idefics3 and SmolVLM",
        "<image>",
        embeddings="of one tile",
        seen="in square tiles, each with its row and column, and whole",
    ),
    Card(
        ("smolvlm",),
        "SmolVLM2",
        "<image>",
        "<video>",
        "yes, each frame one tile behind its moment",
        embeddings="of one tile",
        seen="in square tiles, each with its row and column, and whole",
    ),
    Card(
        ("internvl",),
        "InternVL 2.5 and 3, in the form whose names end in -hf",
        "<IMG_CONTEXT>",
        "<video>",
        "yes, each frame one tile behind its number",
        seen="in tiles of the grid nearest to its aspect, and whole",
    ),
    Card(
        ("llava/pixtral",),
        "Pixtral, in the form that transformers loads",
        "[IMG]",
        embeddings="no",
        seen="as it is, where it fits into the checkpoint's square; a token ends each row",
    ),
    Card(
        ("mistral3",),
        "Mistral Small 3.1 and 3.2",
        "[IMG]",
        embeddings="with image_grid_thw",
        seen="as it is, where it fits into the checkpoint's square, four patches in a token",
    ),
    Card(
        ("gemma3",),
        "Gemma 3 with its SigLIP: 4B and larger",
        "<start_of_image>",
        seen="at the one size of its encoder, without pan and scan; what stands around it is written",
    ),
    Card(
        ("phi3_v",),
        "Phi-3.5-vision",
        "<|image_1|>",
        several="yes, numbered in order; num_crops=4 is advised for many",
        sizes={"num_crops": 16},
    ),
    Card(
        ("gemma3_text", "llama", "mistral", "phi3", "qwen2", "qwen3"),
        "text models: Gemma 3, Llama, Mistral, Phi-3 without LongRoPE, Qwen2, 2.5 and 3, and others of "
        "their form",
        clips="no",
        several="no",
        embeddings="no",
    ),
)
