"""
transformers' own `generate` on the same work: static batches, padded on the left.

It gets what makes it fast: pictures decoded and cut in several threads, prompts of a batch sorted
by length where they differ, and its best batch size when several are tried.
"""

import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from bench.workloads import Prompt
from media.images import decode_image

# The model and the image processor for each type of config.
FAMILIES: Mapping[str, tuple[Any, Any]] = {
    "qwen2_vl": (Qwen2VLForConditionalGeneration, Qwen2VLImageProcessorPil),
    "qwen2_5_vl": (Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil),
    "qwen3_vl": (Qwen3VLForConditionalGeneration, Qwen2VLImageProcessorPil),
    "llava": (LlavaForConditionalGeneration, CLIPImageProcessorPil),
}


class Transformers:
    """
    Args:
        folder: of the model.
        is_dummy: whether its weights are drawn, since it has none.
    """

    def __init__(
        self, folder: Path, *, dtype: torch.dtype, device: torch.device, is_dummy: bool
    ) -> None:
        self._device = device
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        config = AutoConfig.from_pretrained(folder)
        model_class, processor_class = FAMILIES[config.model_type]
        self._images = processor_class.from_pretrained(folder)
        if is_dummy:
            for part in (config, config.text_config, config.vision_config):
                part.dtype = dtype
            with device:
                self._model: Any = model_class._from_config(
                    config, dtype=dtype, attn_implementation="sdpa"
                )
        else:
            self._model = model_class.from_pretrained(
                folder, dtype=dtype, attn_implementation="sdpa"
            )
        self._model.to(device).eval()
        self._has_grids = processor_class is Qwen2VLImageProcessorPil
        self._model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
        self._pool = ThreadPoolExecutor(min(16, os.cpu_count() or 1))

    def run(self, prompts: Sequence[Prompt], batch: int) -> float:
        """Seconds for all prompts, from JPEG bytes to the last text."""
        _wait(self._device)
        started = time.perf_counter()
        ordered = sorted(prompts, key=lambda p: (p.line.max_tokens, p.line.sizes))
        for first in range(0, len(ordered), batch):
            self._run_batch(ordered[first : first + batch])
        _wait(self._device)
        return time.perf_counter() - started

    @torch.inference_mode()
    def _run_batch(self, prompts: Sequence[Prompt]) -> list[str]:
        inputs = self._inputs(prompts)
        if self._has_grids:
            self._model.model.rope_deltas = None  # the batch before left its own
        most = max(prompt.line.max_tokens for prompt in prompts)
        made = self._model.generate(
            **inputs,
            max_new_tokens=most,
            min_new_tokens=most,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=self._tokenizer.pad_token_id,
        )
        new_ids = made[:, inputs["input_ids"].shape[1] :].tolist()
        cut = [ids[: p.line.max_tokens] for ids, p in zip(new_ids, prompts, strict=True)]
        return [self._tokenizer.decode(ids, skip_special_tokens=True) for ids in cut]

    def _inputs(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        cut = list(self._pool.map(self._cut, [p for one in prompts for p in one.pictures]))
        counts = iter([count for _, _, count in cut])
        image_id = self._model.config.image_token_id
        rows = []
        for prompt in prompts:
            content = [{"type": "image"}] * len(prompt.pictures)
            text = self._tokenizer.apply_chat_template(
                [
                    {
                        "role": "user",
                        "content": [*content, {"type": "text", "text": prompt.line.text}],
                    }
                ],
                tokenize=False,
                add_generation_prompt=True,
            )
            ids: list[int] = []
            for token_id in self._tokenizer(text)["input_ids"]:
                ids += [token_id] * (next(counts) if token_id == image_id else 1)
            rows.append(ids)
        longest = max(map(len, rows))
        pad = self._tokenizer.pad_token_id
        input_ids = torch.tensor([[pad] * (longest - len(ids)) + ids for ids in rows])
        mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in rows])
        inputs = {"input_ids": input_ids, "attention_mask": mask}
        if cut:
            inputs["pixel_values"] = torch.cat([pixels for pixels, _, _ in cut])
        if self._has_grids:
            inputs["mm_token_type_ids"] = (input_ids == image_id).int()
            if cut:
                inputs["image_grid_thw"] = torch.cat([grid for _, grid, _ in cut])
        return {name: tensor.to(self._device) for name, tensor in inputs.items()}

    def _cut(self, jpeg: bytes) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Pixels, their grid, and the number of tokens."""
        made = self._images([decode_image(jpeg).image], return_tensors="pt")
        pixels = made["pixel_values"]
        if self._has_grids:
            grid = made["image_grid_thw"]
            return pixels, grid, int(grid.prod()) // 4
        patch_px = self._model.config.vision_config.patch_size
        num_tokens = (pixels.shape[-2] // patch_px) * (pixels.shape[-1] // patch_px)
        return pixels, torch.empty(0), num_tokens


def run_best(
    peer: Transformers, prompts: Sequence[Prompt], batches: Sequence[int]
) -> dict[str, Any]:
    """Run the prompts with each batch size; the best of them, and what each took."""
    took: dict[int, float | None] = {}
    for batch in batches:
        try:
            peer.run(prompts[: min(batch, len(prompts))], batch)  # warm
            took[batch] = peer.run(prompts, batch)
        except torch.cuda.OutOfMemoryError:
            took[batch] = None
            torch.cuda.empty_cache()
    ran = {batch: seconds for batch, seconds in took.items() if seconds is not None}
    if not ran:
        return {"peer": "transformers", "peer_error": "no batch size fits the memory"}
    best = min(ran, key=lambda batch: ran[batch])
    return {
        "peer": "transformers",
        "peer_batch": best,
        "peer_prompts": len(prompts),
        "peer_prompts_s": round(len(prompts) / ran[best], 2),
        "peer_prompts_s_by_batch": {
            str(batch): None if seconds is None else round(len(prompts) / seconds, 2)
            for batch, seconds in took.items()
        },
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
