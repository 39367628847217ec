"""
A trainable twin of transformers' Qwen2VLForConditionalGeneration, shaped for drawn micro-batches.

Same parameters under the same names, so that its state is the checkpoint; other arithmetic order:
pictures of one grid go through the encoder as one dense batch, the patch embedding is the Linear
that its Conv3d is, and turns that share pictures are kept apart by a mask. A test compares the
logits of the two.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.families.qwen2_vl import MERGE, PATCH_PX, TEMPORAL, Grid, patch_positions
from models.train import settings as size

Rope = tuple[Tensor, Tensor]


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotary embedding in the halves form; `rope` is (cos, sin), broadcastable to x."""
    cos, sin = rope
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


def frequencies(dim: int, theta: float) -> Tensor:
    return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)


class PatchEmbed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        kernel = (TEMPORAL, PATCH_PX, PATCH_PX)
        self.proj = nn.Conv3d(3, size.VISION_WIDTH, kernel, stride=kernel, bias=False)

    def forward(self, patches: Tensor) -> Tensor:
        """patches: (..., 3, frames, PATCH_PX**2), normalised; one frame stands for two equal ones."""
        weight = self.proj.weight.flatten(3)
        if patches.shape[-2] == 1:
            weight = weight.sum(2, keepdim=True)
        return F.linear(patches.flatten(-3), weight.flatten(1))


class VisionAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(size.VISION_WIDTH, size.VISION_WIDTH * 3)
        self.proj = nn.Linear(size.VISION_WIDTH, size.VISION_WIDTH)

    def forward(self, x: Tensor, rope: Rope) -> Tensor:
        num, length, width = x.shape
        qkv = self.qkv(x).view(num, length, 3, size.VISION_HEADS, -1).permute(2, 0, 3, 1, 4)
        q, k = rotate(qkv[:2], rope)
        y = F.scaled_dot_product_attention(q, k, qkv[2])
        return self.proj(y.transpose(1, 2).reshape(num, length, width))


class VisionMlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        hidden = size.VISION_WIDTH * size.VISION_MLP_RATIO
        self.fc1 = nn.Linear(size.VISION_WIDTH, hidden)
        self.fc2 = nn.Linear(hidden, size.VISION_WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))


class VisionBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(size.VISION_WIDTH, eps=1e-6)
        self.norm2 = nn.LayerNorm(size.VISION_WIDTH, eps=1e-6)
        self.attn, self.mlp = VisionAttention(), VisionMlp()

    def forward(self, x: Tensor, rope: Rope) -> Tensor:
        x = x + self.attn(self.norm1(x), rope)
        return x + self.mlp(self.norm2(x))


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
        self.mean = nn.Buffer((mean * 255).view(3, 1, 1), persistent=False)
        self.std = nn.Buffer((std * 255).view(3, 1, 1), persistent=False)

    def forward(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """patches: (num, patches, 3, frames, PATCH_PX**2), uint8 -> (num * tokens, text width)."""
        positions = torch.from_numpy(patch_positions(Grid(1, *grid))).to(patches.device)
        angles = (positions[..., None].float() * self.inv_freq).flatten(1)
        angles = torch.cat((angles, angles), dim=-1)
        x = self.patch_embed(((patches - self.mean) / self.std).to(self.merger.ln_q.weight.dtype))
        rope = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for block in self.blocks:
            x = block(x, rope)
        return self.merger(x)


class TextAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        head = size.TEXT_WIDTH // size.TEXT_HEADS
        self.q_proj = nn.Linear(size.TEXT_WIDTH, size.TEXT_WIDTH)
        self.k_proj = nn.Linear(size.TEXT_WIDTH, head * size.TEXT_KV_HEADS)
        self.v_proj = nn.Linear(size.TEXT_WIDTH, head * size.TEXT_KV_HEADS)
        self.o_proj = nn.Linear(size.TEXT_WIDTH, size.TEXT_WIDTH, bias=False)

    def forward(self, x: Tensor, rope: Rope, mask: Tensor) -> Tensor:
        num, length, width = x.shape

        def heads(y: Tensor) -> Tensor:
            return y.unflatten(-1, (-1, width // size.TEXT_HEADS)).transpose(1, 2)

        q, k, v = self.q_proj(x), self.k_proj(x), heads(self.v_proj(x))
        q, k = rotate(heads(torch.cat((q, k), dim=-1)), rope).split(
            (size.TEXT_HEADS, size.TEXT_KV_HEADS), dim=1
        )
        shared_by = size.TEXT_HEADS // size.TEXT_KV_HEADS
        k, v = (y.repeat_interleave(shared_by, dim=1) for y in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o_proj(y.transpose(1, 2).reshape(num, length, width))


class TextMlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size.TEXT_WIDTH, size.TEXT_MLP, bias=False)
        self.up_proj = nn.Linear(size.TEXT_WIDTH, size.TEXT_MLP, bias=False)
        self.down_proj = nn.Linear(size.TEXT_MLP, size.TEXT_WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class TextLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.mlp = TextAttention(), TextMlp()
        self.input_layernorm = nn.RMSNorm(size.TEXT_WIDTH, eps=1e-6)
        self.post_attention_layernorm = nn.RMSNorm(size.TEXT_WIDTH, eps=1e-6)

    def forward(self, x: Tensor, rope: Rope, mask: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class LanguageModel(nn.Module):
    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(num_tokens, size.TEXT_WIDTH)
        self.layers = nn.ModuleList(TextLayer() for _ in range(size.TEXT_DEPTH))
        self.norm = nn.RMSNorm(size.TEXT_WIDTH, eps=1e-6)
        head = size.TEXT_WIDTH // size.TEXT_HEADS
        self.inv_freq = nn.Buffer(frequencies(head, size.ROPE_THETA), persistent=False)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """x: (samples, length, width); positions: (3, samples, length); mask: see `turn_mask`."""
        angles = positions[..., None].float() * self.inv_freq
        parts = angles.split(size.MROPE_SECTION, dim=-1)
        mixed = torch.cat([part[axis] for axis, part in enumerate(parts)], dim=-1)
        mixed = torch.cat((mixed, mixed), dim=-1)[:, None]
        rope = mixed.cos().to(x.dtype), mixed.sin().to(x.dtype)
        for layer in self.layers:
            x = layer(x, rope, mask)
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
        num_marks: labels of the second lesson (`marks.LABELS`); its head is no part of a checkpoint.
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

    def features(self, groups: list[tuple[Tensor, tuple[int, int]]]) -> Tensor | None:
        """Groups as in `corpus.MicroBatch` -> (all visual tokens, TEXT_WIDTH)."""
        if not groups:
            return None
        return torch.cat([self.model.visual(patches, grid) for patches, grid in groups])

    def hidden(
        self,
        ids: Tensor,
        positions: Tensor,
        branch: Tensor,
        features: Tensor | None,
        placeholder_rows: Tensor,
    ) -> Tensor:
        """Arguments as in `corpus.MicroBatch` -> (samples, length, TEXT_WIDTH)."""
        text = self.model.language_model
        x = text.embed_tokens(ids)
        if features is not None:
            x = x.flatten(0, 1).index_copy(0, placeholder_rows, features.to(x.dtype)).view_as(x)
        return text(x, positions, turn_mask(branch, x.dtype))

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.model.language_model.embed_tokens.weight)


def turn_mask(branch: Tensor, dtype: torch.dtype) -> Tensor:
    """
    Which token sees which: those before it, in what all turns share or in its own turn.

    Returns:
        (samples, 1, length, length), zero where visible, very negative elsewhere. Padding sees itself.
    """
    length = branch.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=branch.device).tril()
    same = branch[:, :, None] == branch[:, None, :]
    visible = causal & (same | (branch[:, None, :] == 0))
    return torch.zeros(visible.shape, dtype=dtype, device=branch.device).masked_fill_(
        ~visible, -30_000.0
    )[:, None]
