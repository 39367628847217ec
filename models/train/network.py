"""
A trainable twin of transformers' Qwen2VLForConditionalGeneration, shaped for packed batches.

Same parameters under the same names, so that its state is the checkpoint; other arithmetic order:
all pictures go through the encoder as one row of patches and all texts through the language model as
one row of tokens, the patch embedding is the Linear that its Conv3d is, and a still picture's patch
is read once for its two equal frames. A test compares the logits of the two.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.families.qwen2_vl import MERGE, PATCH_PX, TEMPORAL
from models.train import settings as size
from models.train.packing import Packed, Room
from models.train.ragged import Turns, attend_runs, attend_turns

Rope = tuple[Tensor, Tensor]
RARE = -6.0  # logit of a mark before anything is learnt: few tokens have any one of them


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotary embedding in the halves form. x: (T, heads, dim); rope: (cos, sin), each (T, 1, dim)."""
    cos, sin = rope
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


def frequencies(dim: int, theta: float) -> Tensor:
    return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)


def rope_of(angles: Tensor, dtype: torch.dtype) -> Rope:
    """angles: (T, dim / 2)."""
    whole = torch.cat((angles, angles), dim=-1)[:, None]
    return whole.cos().to(dtype), whole.sin().to(dtype)


class PatchEmbed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        kernel = (TEMPORAL, PATCH_PX, PATCH_PX)
        self.proj = nn.Conv3d(3, size.VISION_WIDTH, kernel, stride=kernel, bias=False)

    def forward(self, patches: Tensor, seconds: Tensor, second_rows: Tensor) -> Tensor:
        """
        Args:
            patches: (patches, 3 * PATCH_PX**2), normalised: pictures, and first frames of pairs.
            seconds: (pairs, 3 * PATCH_PX**2), normalised: second frames, of the patches at
                `second_rows`; for any other patch both frames are equal.
        """
        first, second = self.proj.weight.flatten(3).unbind(2)
        x = F.linear(patches, (first + second).flatten(1))
        x = torch.cat((x, x.new_zeros(1, x.shape[1])))  # the last row takes what is filler
        before = patches[second_rows.clamp(max=len(patches) - 1)]
        pairs = F.linear(before, first.flatten(1)) + F.linear(seconds, second.flatten(1))
        return x.index_copy(0, second_rows, pairs)[:-1]


class VisionAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(size.VISION_WIDTH, size.VISION_WIDTH * 3)
        self.proj = nn.Linear(size.VISION_WIDTH, size.VISION_WIDTH)


class VisionMlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        hidden = size.VISION_WIDTH * size.VISION_MLP_RATIO
        self.fc1 = nn.Linear(size.VISION_WIDTH, hidden)
        self.fc2 = nn.Linear(hidden, size.VISION_WIDTH)


class VisionBlock(nn.Module):
    """In two halves, before and after attention, so that each can be compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(size.VISION_WIDTH, eps=1e-6)
        self.norm2 = nn.LayerNorm(size.VISION_WIDTH, eps=1e-6)
        self.attn, self.mlp = VisionAttention(), VisionMlp()

    def before(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.attn.qkv(self.norm1(x)).view(len(x), 3, size.VISION_HEADS, -1).unbind(1)
        return rotate(q, rope), rotate(k, rope), v

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        x = x + self.attn.proj(y.flatten(1))
        wide = self.mlp.fc1(self.norm2(x))
        return x + self.mlp.fc2(wide * torch.sigmoid(1.702 * wide))


class Merger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        width = size.VISION_WIDTH * MERGE**2
        self.ln_q = nn.LayerNorm(size.VISION_WIDTH, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(width, width), nn.GELU(), nn.Linear(width, size.TEXT_WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.ln_q(x).reshape(-1, size.VISION_WIDTH * MERGE**2))


class Visual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed()
        self.blocks = nn.ModuleList(VisionBlock() for _ in range(size.VISION_DEPTH))
        self.merger = Merger()
        head = size.VISION_WIDTH // size.VISION_HEADS
        self.inv_freq = nn.Buffer(frequencies(head // 2, 10_000.0), persistent=False)
        mean, std = torch.tensor(size.IMAGE_MEAN), torch.tensor(size.IMAGE_STD)
        each = PATCH_PX**2
        self.mean = nn.Buffer((mean * 255).repeat_interleave(each), persistent=False)
        self.std = nn.Buffer((std * 255).repeat_interleave(each), persistent=False)

    def embed(self, batch: Packed) -> Tensor:
        dtype = self.merger.ln_q.weight.dtype
        patches, seconds = (
            ((pixels - self.mean) / self.std).to(dtype) for pixels in (batch.patches, batch.seconds)
        )
        return self.patch_embed(patches, seconds, batch.second_rows)

    def forward(self, batch: Packed, longest_run: int) -> Tensor:
        """(patches / 4, text width): the features of all pictures, in order."""
        x = self.embed(batch)
        rope = rope_of((batch.at[..., None].float() * self.inv_freq).flatten(1), x.dtype)
        for block in cast("list[VisionBlock]", self.blocks):
            q, k, v = block.before(x, rope)
            x = block.after(x, attend_runs(q, k, v, batch.run_starts, longest_run))
        return self.merger(x)


class TextAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        head = size.TEXT_WIDTH // size.TEXT_HEADS
        self.q_proj = nn.Linear(size.TEXT_WIDTH, size.TEXT_WIDTH)
        self.k_proj = nn.Linear(size.TEXT_WIDTH, head * size.TEXT_KV_HEADS)
        self.v_proj = nn.Linear(size.TEXT_WIDTH, head * size.TEXT_KV_HEADS)
        self.o_proj = nn.Linear(size.TEXT_WIDTH, size.TEXT_WIDTH, bias=False)


class TextMlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size.TEXT_WIDTH, size.TEXT_MLP, bias=False)
        self.up_proj = nn.Linear(size.TEXT_WIDTH, size.TEXT_MLP, bias=False)
        self.down_proj = nn.Linear(size.TEXT_MLP, size.TEXT_WIDTH, bias=False)


class TextLayer(nn.Module):
    """In two halves, as VisionBlock is."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.mlp = TextAttention(), TextMlp()
        self.input_layernorm = nn.RMSNorm(size.TEXT_WIDTH, eps=1e-6)
        self.post_attention_layernorm = nn.RMSNorm(size.TEXT_WIDTH, eps=1e-6)

    def before(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        head = size.TEXT_WIDTH // size.TEXT_HEADS
        attention, x = self.self_attn, self.input_layernorm(x)
        q, k, v = (
            project(x).unflatten(-1, (-1, head))
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        return rotate(q, rope), rotate(k, rope), v

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        x = x + self.self_attn.o_proj(y.flatten(1))
        normed = self.post_attention_layernorm(x)
        gated = F.silu(self.mlp.gate_proj(normed)) * self.mlp.up_proj(normed)
        return x + self.mlp.down_proj(gated)


class LanguageModel(nn.Module):
    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(num_tokens, size.TEXT_WIDTH)
        self.layers = nn.ModuleList(TextLayer() for _ in range(size.TEXT_DEPTH))
        self.norm = nn.RMSNorm(size.TEXT_WIDTH, eps=1e-6)
        head = size.TEXT_WIDTH // size.TEXT_HEADS
        self.inv_freq = nn.Buffer(frequencies(head, size.ROPE_THETA), persistent=False)

    def forward(self, x: Tensor, axes: Tensor, turns: Turns) -> Tensor:
        """x: (T, width); axes: (3, T), positions in time, rows and columns."""
        angles = axes[..., None].float() * self.inv_freq
        parts = angles.split(size.MROPE_SECTION, dim=-1)
        rope = rope_of(torch.cat([part[axis] for axis, part in enumerate(parts)], dim=-1), x.dtype)
        for layer in cast("list[TextLayer]", self.layers):
            q, k, v = layer.before(x, rope)
            x = layer.after(x, attend_turns(q, k, v, turns))
        return self.norm(x)


class Body(nn.Module):
    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        self.visual = Visual()
        self.language_model = LanguageModel(num_tokens)


class TinyQwen2VL(nn.Module):
    """
    Head and embedding are one matrix; `hidden` gives what the head reads.

    Args:
        num_marks: outputs of the second lesson (`marks.NUM_MARKS`); its head is no part of a checkpoint.
    """

    def __init__(self, num_tokens: int, num_marks: int = 1) -> None:
        super().__init__()
        self.model = Body(num_tokens)
        self.mark_head = nn.Linear(size.TEXT_WIDTH, num_marks)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding | nn.Conv3d):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        nn.init.constant_(self.mark_head.bias, RARE)

    def features(self, batch: Packed, room: Room) -> Tensor:
        """(patches / 4, TEXT_WIDTH)."""
        return self.model.visual(batch, room.run)

    def hidden(self, batch: Packed, features: Tensor, room: Room) -> Tensor:
        """(T, TEXT_WIDTH), with the features in the places of the placeholders."""
        text = self.model.language_model
        x = text.embed_tokens(batch.ids)
        x = torch.cat((x, x.new_zeros(1, x.shape[1])))  # the last row takes what is filler
        x = x.index_copy(0, batch.feature_rows, features.to(x.dtype))[:-1]
        turns = Turns(
            parts=batch.part_starts,
            longest_part=max(room.sample, room.turn),
            samples=batch.sample_starts,
            longest_sample=room.sample,
            sample_turns=batch.sample_turn_starts,
            longest_sample_turns=room.turn * room.asked_of_one,
            num_shared=room.shared,
        )
        return text(x, batch.axes, turns)

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.model.language_model.embed_tokens.weight)
