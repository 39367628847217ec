"""
The slow, obvious, right path: one prompt at a time through transformers' own `generate`.

The engine's tests compare with it token for token, and benchmarks take it as the baseline. It
knows nothing of batches, slabs, families or our cutting of patches, and imports none of them, so
that a bug there cannot hide in both. All that it shares with the fast path is the checkpoint and
the decoded pictures. It reads Qwen2-VL, Qwen2.5-VL and Qwen3-VL.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Resampling
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    Qwen2VLImageProcessorPil,
    Qwen3VLProcessor,
)
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.models.qwen3_vl.video_processing_qwen3_vl import (
    Qwen3VLVideoProcessor,
    smart_resize,
)
from transformers.utils.hub import cached_file
from transformers.video_utils import VideoMetadata

from media.decoded import Frames, RGBImage

EDGES = ("shortest_edge", "longest_edge")
PixelLimits = dict[str, int]
"""
Area after resampling, in pixels, both inclusive: `shortest_edge` the least, `longest_edge` the most.
Of one picture or frame; for clips of Qwen3-VL, of all frames together.
"""
USUAL_FPS = 2.0  # of frames that came without times


class Reference:
    """
    One checkpoint with a model of its own: configs are shared by reference inside transformers, and
    the engine marks those of its model.

    Args:
        model: a folder, or a name on the hub.
    """

    def __init__(
        self, model: str | Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> None:
        # Not AutoProcessor nor AutoImageProcessor: both ask for torchvision, in one version or other.
        # Any: transformers annotates its models and tokenizers for itself, not for callers.
        self.tokenizer: Any = AutoTokenizer.from_pretrained(model)
        self.image_processor = Qwen2VLImageProcessorPil.from_pretrained(model)
        self.image_size = {edge: self.image_processor.size[edge] for edge in EDGES}
        self.model: Any = AutoModelForImageTextToText.from_pretrained(
            model, dtype=dtype, attn_implementation="sdpa"
        )
        self.model.to(device).eval()  # type: ignore[arg-type]
        self._type: str = self.model.config.model_type
        usual = Qwen3VLVideoProcessor.size if self._type == "qwen3_vl" else self.image_size
        self.video_size = _load_video_size(model, default=usual)
        self.eos_ids = self.model.generation_config.eos_token_id
        # The checkpoint's may sample or punish repetition, and `generate` fills gaps from it.
        self.model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]

    def chat_prompt(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Return the text of a conversation, one placeholder a picture or clip, ready to answer."""
        text: str = self.tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True
        )
        return text

    @torch.inference_mode()
    def generate(
        self,
        prompt: str | list[int],
        *,
        images: Sequence[RGBImage] = (),
        videos: Sequence[Frames] = (),
        max_tokens: int,
        ignore_eos: bool = False,
        size: PixelLimits | None = None,
    ) -> list[int]:
        """
        Answer one prompt greedily.

        Args:
            prompt: text or token ids, with one `<|image_pad|>` for each of `images` and one
                `<|video_pad|>` for each of `videos`, in their order.
            size: in place of the checkpoint's limits, for pictures and clips alike.

        Returns:
            The new token ids, a final end-of-sequence token included if one was generated.

        Raises:
            ValueError: placeholders and media differ in number, or one is over 200 times as long
                as it is wide.
        """
        inputs = self.encode(prompt, images, videos, size=size)
        eos_ids = None if ignore_eos else self.eos_ids
        ids = self._run(inputs, max_new_tokens=max_tokens, eos_token_id=eos_ids).sequences
        new_ids: list[int] = ids[0, inputs["input_ids"].shape[1] :].tolist()
        return new_ids

    @torch.inference_mode()
    def logprobs(
        self,
        prompt: str | list[int],
        images: Sequence[RGBImage],
        videos: Sequence[Frames],
        output_ids: Sequence[int],
        *,
        size: PixelLimits | None = None,
    ) -> Tensor:
        """
        Judge an answer that somebody else gave: what would each of its tokens have been here?

        The answer is forced through `generate` a token at a time, so that every token stands where
        it would have stood. Other ways are faster and wrong: one pass over prompt and answer takes
        a placeholder among the answer's tokens for a picture, and a pass over the answer alone,
        with the prompt in the cache, stands elsewhere after a long clip (transformers 5.17 to 5.23:
        `forward` goes on from the latest moment of the clip, `generate` from the prompt's last token).

        Args:
            output_ids: at least one.

        Returns:
            (len(output_ids), vocab), float32, on the host: the logarithm of each token's
            probability after the prompt and the output_ids before it.
        """
        inputs = self.encode(prompt, images, videos, size=size)
        num_prompt_tokens = inputs["input_ids"].shape[1]
        made = self._run(
            inputs,
            max_new_tokens=len(output_ids),
            eos_token_id=None,
            output_logits=True,
            prefix_allowed_tokens_fn=lambda _, ids: [output_ids[len(ids) - num_prompt_tokens]],
        )
        assert made.logits is not None
        return torch.cat(made.logits).float().log_softmax(-1).cpu()

    def encode(
        self,
        prompt: str | list[int],
        images: Sequence[RGBImage] = (),
        videos: Sequence[Frames] = (),
        *,
        size: PixelLimits | None = None,
    ) -> dict[str, Tensor]:
        """
        Return what the model takes: `input_ids` with every placeholder repeated once for each
        token of its picture or clip, `attention_mask`, `mm_token_type_ids` (0 text, 1 picture, 2
        clip), and for each modality in use its normalised patches and (time, rows, columns) grids.
        """
        ids = prompt if isinstance(prompt, list) else self.tokenizer(prompt)["input_ids"]
        inputs: dict[str, Tensor] = {}
        image_grids, video_grids = torch.empty(0, 3), torch.empty(0, 3)
        if images:
            cut = self.image_processor(
                [image.image for image in images],
                size=size or self.image_size,
                return_tensors="pt",
            )
            image_grids = cut["image_grid_thw"]
            inputs |= {"pixel_values": cut["pixel_values"], "image_grid_thw": image_grids}
        config = self.model.config
        if videos:
            clips = [self._cut_clip(clip, size or self.video_size) for clip in videos]
            video_grids = torch.tensor([grid for _, grid in clips])
            inputs["pixel_values_videos"] = torch.cat([patches for patches, _ in clips])
            inputs["video_grid_thw"] = video_grids
            pairs_s = [self._frames_a_patch / _metadata(clip).sampled_fps for clip in videos]
            if self._type == "qwen2_5_vl":
                inputs["second_per_grid_ts"] = torch.tensor(pairs_s)
            elif self._type == "qwen3_vl":
                ids = self._tell_times(ids, videos)
                # Each pair of frames has a placeholder now.
                video_grids = video_grids.repeat_interleave(video_grids[:, 0], dim=0)
                video_grids[:, 0] = 1
        ids = self._expand(ids, config.image_token_id, image_grids)
        ids = self._expand(ids, config.video_token_id, video_grids)
        inputs["input_ids"] = torch.tensor([ids])
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == config.image_token_id).int()
        inputs["mm_token_type_ids"] += 2 * (inputs["input_ids"] == config.video_token_id).int()
        return {name: tensor.to(self.model.device) for name, tensor in inputs.items()}

    def _run(self, inputs: dict[str, Tensor], **options: Any) -> GenerateDecoderOnlyOutput:
        self.model.model.rope_deltas = None  # the prompt before left its own
        made: GenerateDecoderOnlyOutput = self.model.generate(
            **inputs,
            **options,
            do_sample=False,
            pad_token_id=self.tokenizer.pad_token_id,  # not used by one prompt, but asked for
            return_dict_in_generate=True,
        )
        return made

    def _cut_clip(self, clip: Frames, size: PixelLimits) -> tuple[Tensor, list[int]]:
        """
        Cut one clip as transformers' video processor does, without torchvision and with PIL's bicubic.

        Returns:
            patches: (times * rows * columns, channels * frames a patch * pixels), normalised.
            grid: times, rows and columns, in patches.
        """
        frames_a_patch = self._frames_a_patch
        images = [frame.image for frame in clip.images]
        if self._type == "qwen3_vl":
            height, width = smart_resize(
                max(frames_a_patch, len(images)),  # one alone is refused, and made two of elsewhere
                *images[0].size[::-1],
                temporal_factor=frames_a_patch,
                factor=self.image_processor.patch_size * self.image_processor.merge_size,
                min_pixels=size["shortest_edge"],
                max_pixels=size["longest_edge"],
            )
            images = [image.resize((width, height), Resampling.BICUBIC) for image in images]
            size = dict.fromkeys(EDGES, height * width)
        cut = self.image_processor(images, size=size, return_tensors="pt")
        _, rows, columns = cut["image_grid_thw"][0].tolist()
        # A still picture comes with its only frame repeated: (frame, patch, channel, copy, pixel).
        shape = (clip.num_frames, rows * columns, 3, frames_a_patch, -1)
        frames = cut["pixel_values"].view(shape)[:, :, :, 0]
        num_missing = -clip.num_frames % frames_a_patch
        frames = torch.cat([frames, *[frames[-1:]] * num_missing])
        # (time, frame, patch, channel, pixel) -> (time, patch, channel, frame, pixel)
        pairs = frames.reshape(-1, frames_a_patch, *frames.shape[1:])
        patches = pairs.permute(0, 2, 3, 1, 4)
        return patches.flatten(0, 1).flatten(1), [len(patches), rows, columns]

    @property
    def _frames_a_patch(self) -> int:
        frames_a_patch: int = self.image_processor.temporal_patch_size
        return frames_a_patch

    def _tell_times(self, ids: list[int], clips: Sequence[Frames]) -> list[int]:
        """Put moments and a placeholder for each pair of frames in the place of each clip's one."""
        marks = ("<|vision_start|>", "<|video_pad|>", "<|vision_end|>")
        pair = self.tokenizer.convert_tokens_to_ids(marks)
        told: list[list[int]] = []
        for clip in clips:
            known = _metadata(clip)
            moments = Qwen3VLProcessor._calculate_timestamps(
                None,  # type: ignore[arg-type]  # it reads nothing of the processor
                list(known.frames_indices or range(clip.num_frames)),
                known.fps or USUAL_FPS,
                self._frames_a_patch,
            )
            texts = [self.tokenizer(f"<{moment:.1f} seconds>")["input_ids"] for moment in moments]
            told.append([index for text in texts for index in (*text, *pair)])
        following = iter(told)
        placeholder = self.model.config.video_token_id
        return [new for id_ in ids for new in (next(following) if id_ == placeholder else [id_])]

    def _expand(self, ids: list[int], placeholder: int, grids: Tensor) -> list[int]:
        counts = (grids.prod(dim=1) // self.image_processor.merge_size**2).int().tolist()
        if ids.count(placeholder) != len(counts):
            raise ValueError(
                f"The prompt has {ids.count(placeholder)} "
                f"{self.tokenizer.convert_ids_to_tokens(placeholder)} for {len(counts)} media."
            )
        following = iter(counts)
        return [
            copy for id_ in ids for copy in [id_] * (next(following) if id_ == placeholder else 1)
        ]


def _metadata(clip: Frames) -> VideoMetadata:
    if clip.fps is None or clip.indices is None or clip.source_num_frames is None:
        return VideoMetadata(total_num_frames=clip.num_frames, fps=USUAL_FPS)
    return VideoMetadata(
        total_num_frames=clip.source_num_frames, fps=clip.fps, frames_indices=list(clip.indices)
    )


def _load_video_size(model: str | Path, default: PixelLimits) -> PixelLimits:
    """Read a clip's limits, which not every checkpoint has apart from a picture's."""
    path = cached_file(
        model, "video_preprocessor_config.json", _raise_exceptions_for_missing_entries=False
    )
    written = json.loads(Path(path).read_text()) if path else {}
    size = {**default, **written.get("size", {})}
    older = (written.get("min_pixels"), written.get("max_pixels"))  # the names before `size`
    return {edge: area or size[edge] for edge, area in zip(EDGES, older, strict=True)}
