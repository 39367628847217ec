"""The sizes of darkroom-tiny: what its checkpoint's configs say, in one place."""

from engine.families.protocol import AreaLimits

AREA = AreaLimits(min_pixels=112 * 112, max_pixels=224 * 224)  # 16 to 64 tokens a picture

VISION_WIDTH = 192
VISION_DEPTH = 6
VISION_HEADS = 6
VISION_MLP_RATIO = 3

TEXT_WIDTH = 256
TEXT_DEPTH = 6
TEXT_HEADS = 4
TEXT_KV_HEADS = 2
TEXT_MLP = 640
MROPE_SECTION = (8, 12, 12)
ROPE_THETA = 10_000.0
MAX_POSITIONS = 4096

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
SYSTEM_PROMPT = "You are a helpful assistant."
