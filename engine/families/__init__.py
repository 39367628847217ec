"""
Model families: one adapter each, which knows what is that family's own and nothing else.

An adapter is a class under `engine.families.protocol.Family` in a file of its own. It says what a
picture becomes in a prompt, cuts pixels on the host, and runs the encoder on the device. What many
share stands beside it: `packed.py` for encoders that read the patches of pictures of any size in one
row, `tiles.py` for those that read pictures of one size, or tiles of them, as dense batches.

To add a family: write the adapter, add its line to FAMILIES and its card to `cards.py`, give
`engine/fuse.py` its modules where they are none of those that it knows, and add one entry to
tests/engine/families.py, which compares it with transformers. docs/adding-a-family.md shows all of
it with a small one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.families.protocol import Family


@dataclass(frozen=True, slots=True)
class Entry:
    """
    Where a family is found, each as "module:name", so that nothing is imported before it is used.

    Attributes:
        family: a class under `protocol.Family`.
        model: what holds the weights: transformers' class, or one of ours with its
            `from_pretrained`.
        config: the class of its config.json; None where transformers knows the model type.
    """

    family: str
    model: str
    config: str | None = None

    def load_family(self) -> "type[Family]":
        return _load(self.family)  # type: ignore[no-any-return]

    def load_model_class(self) -> Any:
        return _load(self.model)

    def load_config_class(self) -> Any:
        return _load(self.config or "transformers:AutoConfig")


_TEXT = "engine.families.text:TextOnly"

# By the `model_type` of a config.json; "type/vision type" goes first where one type has several encoders.
FAMILIES: Mapping[str, Entry] = {
    "gemma3": Entry("engine.families.gemma3:Gemma3", "transformers:Gemma3ForConditionalGeneration"),
    "gemma3_text": Entry(_TEXT, "transformers:Gemma3ForCausalLM"),
    "idefics3": Entry(
        "engine.families.idefics3:Idefics3", "transformers:Idefics3ForConditionalGeneration"
    ),
    "internvl": Entry(
        "engine.families.internvl:InternVL", "transformers:InternVLForConditionalGeneration"
    ),
    "llama": Entry(_TEXT, "transformers:LlamaForCausalLM"),
    "llava": Entry("engine.families.llava:Llava", "transformers:LlavaForConditionalGeneration"),
    "llava/pixtral": Entry(
        "engine.families.pixtral:Pixtral", "transformers:LlavaForConditionalGeneration"
    ),
    "llava_next": Entry(
        "engine.families.llava_next:LlavaNext", "transformers:LlavaNextForConditionalGeneration"
    ),
    "llava_onevision": Entry(
        "engine.families.llava_onevision:LlavaOnevision",
        "transformers:LlavaOnevisionForConditionalGeneration",
    ),
    "mistral": Entry(_TEXT, "transformers:MistralForCausalLM"),
    "mistral3": Entry(
        "engine.families.pixtral:Pixtral", "transformers:Mistral3ForConditionalGeneration"
    ),
    "phi3": Entry(_TEXT, "transformers:Phi3ForCausalLM"),
    "phi3_v": Entry(
        "engine.families.phi3_v:Phi3V",
        "engine.families.phi3_v_model:Phi3VForCausalLM",
        "engine.families.phi3_v_model:Phi3VConfig",
    ),
    "qwen2": Entry(_TEXT, "transformers:Qwen2ForCausalLM"),
    "qwen3": Entry(_TEXT, "transformers:Qwen3ForCausalLM"),
    "qwen2_vl": Entry(
        "engine.families.qwen2_vl:Qwen2VL", "transformers:Qwen2VLForConditionalGeneration"
    ),
    "qwen2_5_vl": Entry(
        "engine.families.qwen2_5_vl:Qwen25VL", "transformers:Qwen2_5_VLForConditionalGeneration"
    ),
    "qwen3_vl": Entry(
        "engine.families.qwen3_vl:Qwen3VL", "transformers:Qwen3VLForConditionalGeneration"
    ),
    "smolvlm": Entry(
        "engine.families.smolvlm:SmolVLM", "transformers:SmolVLMForConditionalGeneration"
    ),
}


def find_entry(config: Mapping[str, Any]) -> Entry | None:
    """The entry for the content of a config.json; None for a model that no family here reads."""
    model_type, vision = config.get("model_type"), config.get("vision_config")
    vision_type = vision.get("model_type") if isinstance(vision, Mapping) else None
    return FAMILIES.get(f"{model_type}/{vision_type}") or FAMILIES.get(str(model_type))


def _load(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)
