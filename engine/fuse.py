"""
Swaps the layers of a loaded model for ones that pass over memory less often; weights stay, but for
those of norms that are left to the products around them.

Queries, keys and values come from one matrix product, gates and what they gate from another; norms
take the addition before them along, and large products what is behind them, on GPUs that can; rotary
positions are read from a table and applied in place; a convolution that cuts patches is a product,
too. `engine/kernels` has the pieces. What a layer computes does not change: tests/engine/test_fuse.py
compares each with the one it replaces.

Products in fp8 are an option, and the one thing here that changes numbers by more than rounding.

What it does not know it leaves as it is: another class, another activation, rotary positions that
change with the length. It refuses to know batches and slabs; attention is called as transformers'
own layers call it, by the name in the config. All that a layer asks of the call is whose results
anybody will read, so that the last one computes no others.
"""

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import (
    ACT2FN,
    GELUActivation,
    GELUTanh,
    QuickGELUActivation,
    SiLUActivation,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip import modeling_clip as clip
from transformers.models.idefics3 import modeling_idefics3 as idefics3
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.phi3 import modeling_phi3 as phi3
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen2_5_vl
from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen2_vl
from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen3_vl
from transformers.models.siglip import modeling_siglip as siglip
from transformers.models.smolvlm import modeling_smolvlm as smolvlm

from engine.attention import find_ends
from engine.kernels import (
    activated,
    activations,
    added,
    attended,
    folded,
    in_one,
    norms,
    quantised,
    rope,
    rotated,
    split,
)
from engine.kernels.activated import Activation
from engine.kernels.folded import Behind, Folded, Summed
from engine.kernels.products import PackedLinear, by_blocks
from engine.kernels.quantised import Fp8Linear, Fp8Rows

# Reading rows in 16 bits and writing them in 8 takes as long as a product of about 1200 columns saves
# (3 bytes a number at 2.7 TB/s, products at 750 and 1150 TFLOP/s), and decode steps pay a launch.
LEAST_WIDTH_FOR_A_PASS = 2048
# A GPU's fast products want rows aligned; the inner 3420 of Qwen2.5-VL's encoder is not.
EVEN_WIDTH = 16

Projection = nn.Linear | Fp8Linear | PackedLinear  # a product as it will run


@dataclass(frozen=True, slots=True)
class Fusions:
    """
    Attributes:
        text, vision: whether to swap layers of the text model, and of the vision encoder.
        fp8: the products of these layers in fp8, with scales by row; `quantised.can_multiply` says
            where it runs. A CPU computes what it would give, slowly. Changes what is computed.
        rope_in_attention: text queries and keys reach the attention function before they are
            rotated, with `merged=(heads, cos, sin)`: it calls `rope.rotate_and_store_`, which
            rotates and fills KV rows in one pass. Only for a function that knows this keyword.
        packs: products of a CPU by oneDNN, where they are large enough; see `kernels.products`.
    """

    text: bool = True
    vision: bool = True
    fp8: bool = False
    rope_in_attention: bool = False
    packs: bool = False


class Carried(NamedTuple):
    """Between two halves of fused layers: what the next norm will add up, of one shape."""

    x: Tensor
    delta: Tensor


class InParts(NamedTuple):
    """Carried, of a product that is still in parts, (parts, rows, width) in float32."""

    x: Tensor
    parts: Tensor


def apply(model: nn.Module, fusions: Fusions | None = None) -> Counter[str]:
    """
    Swap what can be swapped, in place, on whatever device the model lives.

    Returns:
        How many modules of each class were swapped. A model that has none of them is unchanged.
    """
    fusions = fusions or Fusions()
    swapped: Counter[str] = Counter()
    _swap_below(model, fusions, swapped)
    for module in model.modules():
        if isinstance(module, qwen3_vl.Qwen3VLVisionModel):  # it looks at some blocks' results
            blocks: Any = module.blocks
            for index in module.deepstack_visual_indexes:
                blocks[index].is_last = True
    if fusions.packs:
        _pack_head(model)
    return swapped


def _swap_below(parent: nn.Module, fusions: Fusions, swapped: Counter[str]) -> None:
    follower: nn.Module | None = None  # the layer behind, where the children are layers
    for name, child in reversed(list(parent.named_children())):
        build = _SWAPS.get(type(child))
        is_last = not isinstance(follower, FusedDecoderLayer | FusedVisionBlock)
        fused = build(child, fusions, is_last) if build else None
        if isinstance(fused, FusedDecoderLayer):
            fused.gives_ends = follower is None
        if fused is None:
            _swap_below(child, fusions, swapped)
        else:
            setattr(parent, name, fused)
            swapped[type(child).__name__] += 1
        follower = (fused or child) if isinstance(parent, nn.ModuleList) else None


def _pack_head(model: Any) -> None:
    """Logits by oneDNN too; of a weight that is the embedding's as well."""
    head = getattr(model, "lm_head", None)
    if isinstance(head, nn.Linear):
        is_tied = model.get_input_embeddings().weight is head.weight
        model.lm_head = PackedLinear.find(head, is_shared=is_tied) or head


# --- pieces ------------------------------------------------------------------------------------------


def merge_linears(linears: list[nn.Linear]) -> nn.Linear:
    """One Linear with the outputs of several, in order. A bias that one lacks is zero."""
    weight = torch.cat([linear.weight.data for linear in linears])
    merged = nn.Linear(
        linears[0].in_features, len(weight), bias=False, device="meta", dtype=weight.dtype
    )
    merged.weight = nn.Parameter(weight, requires_grad=False)
    if any(linear.bias is not None for linear in linears):
        biases: list[Tensor] = [
            linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias
            for linear in linears
        ]
        merged.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
    return merged


def _widen(linear: nn.Linear, missing: int, *, reads: bool = False) -> nn.Linear:
    """A Linear with so many more outputs that are zero, or inputs that it does not heed."""
    if not missing:
        return linear
    rows, columns = (0, missing) if reads else (missing, 0)
    weight = F.pad(linear.weight.data, (0, columns, 0, rows))
    wide = nn.Linear(weight.shape[1], len(weight), bias=False, device="meta", dtype=weight.dtype)
    wide.weight = nn.Parameter(weight, requires_grad=False)
    if linear.bias is not None:
        wide.bias = nn.Parameter(F.pad(linear.bias.data, (0, rows)), requires_grad=False)
    return wide


def _project(linear: nn.Linear, fusions: Fusions) -> Projection:
    """The product as it will run: in fp8 where that is asked for and the widths allow it."""
    of_8_bits = Fp8Linear.find(linear) if fusions.fp8 else None
    return of_8_bits or (PackedLinear.find(linear) if fusions.packs else None) or linear


def _project_attended(linear: nn.Linear, fusions: Fusions) -> Projection:
    """Attention in 16 bits is not quantised on its way, and a narrow product does not earn a pass."""
    is_narrow = linear.out_features < LEAST_WIDTH_FOR_A_PASS
    return _project(linear, replace(fusions, fp8=fusions.fp8 and not is_narrow))


def _scale(linear: nn.Linear, factor: float, *, has_bias: bool = True) -> nn.Linear:
    """A Linear whose weight is so many times as large, and with `has_bias` its bias too."""
    if factor == 1:
        return linear
    scaled = copy.deepcopy(linear)
    scaled.weight.data.mul_(factor)
    if has_bias and scaled.bias is not None:
        scaled.bias.data.mul_(factor)
    return scaled


class FusedRMSNorm(nn.Module):
    """
    RMSNorm, also of a sum.

    Args:
        reader: what reads the result; in fp8, where that is what it multiplies.
    """

    def __init__(self, norm: Any, reader: nn.Module | None = None) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon
        self.pieces: Any = quantised if isinstance(reader, Fp8Linear) else norms

    def forward(self, x: Tensor) -> Tensor | Fp8Rows:
        return self.pieces.rms_norm(x, self.weight, self.eps)  # type: ignore[no-any-return]

    def add_(self, delta: Tensor, x: Tensor) -> Tensor | Fp8Rows:
        """Of delta + x; delta keeps the sum."""
        return self.pieces.add_rms_norm_(delta, x, self.weight, self.eps)  # type: ignore[no-any-return]

    def add_parts(self, parts: Tensor, x: Tensor) -> tuple[Tensor, Tensor | Fp8Rows]:
        """Of x and what stands in parts, (parts, rows, width): their sum, and that of the sum."""
        return self.pieces.add_parts_rms_norm(parts, x, self.weight, self.eps)  # type: ignore[no-any-return]


class FusedLayerNorm(nn.Module):
    """LayerNorm, as FusedRMSNorm."""

    def __init__(self, norm: Any, reader: nn.Module | None = None) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        self.pieces: Any = quantised if isinstance(reader, Fp8Linear) else norms

    def forward(self, x: Tensor) -> Tensor | Fp8Rows:
        return self.pieces.layer_norm(x, self.weight, self.bias, self.eps)  # type: ignore[no-any-return]

    def add_(self, delta: Tensor, x: Tensor) -> Tensor | Fp8Rows:
        """Of delta + x; delta keeps the sum."""
        return self.pieces.add_layer_norm_(delta, x, self.weight, self.bias, self.eps)  # type: ignore[no-any-return]


Arriving = Tensor | Carried | InParts | Summed  # from one half of a layer to the next
Normed = Tensor | Fp8Rows | Summed  # to a product; the last is yet to be normed, by that product


def _enter(norm: FusedRMSNorm | FusedLayerNorm, arriving: Arriving) -> tuple[Tensor, Normed]:
    """A half's input, whole, and its norm."""
    if isinstance(arriving, Carried):
        return arriving.delta, norm.add_(arriving.delta, arriving.x)
    if isinstance(arriving, InParts):
        assert isinstance(norm, FusedRMSNorm)
        return norm.add_parts(arriving.parts, arriving.x)
    if isinstance(arriving, Summed):
        return arriving.x, arriving
    return arriving, norm(arriving)


def leave(ending: Arriving) -> Tensor:
    """What arrives, as one tensor, which nobody else has."""
    if isinstance(ending, Carried):
        return ending.delta.add_(ending.x)
    if isinstance(ending, InParts):
        return norms.add_parts(ending.parts, ending.x)
    return ending.x if isinstance(ending, Summed) else ending


class Adding(nn.Module):
    """
    The product that ends half a layer, and its addition to what the half began with.

    Args:
        norm: one like that behind it, which adds where the product does not.
    """

    def __init__(self, linear: Projection, norm: FusedRMSNorm | FusedLayerNorm) -> None:
        super().__init__()
        self.linear = linear
        is_rms, gives_fp8 = isinstance(norm, FusedRMSNorm), norm.pieces is quantised
        self.least_rows = added.choose(linear, is_rms=is_rms, gives_fp8=gives_fp8)
        self.split = split.choose(linear, gives_fp8=gives_fp8) if is_rms else split.NEVER
        self.least_folded = in_one.NEVER  # rows from which on the norm is left to what is behind it

    def forward(self, inner: Tensor | Fp8Rows, x: Tensor) -> Arriving:
        """(..., depth) and (..., width): what arrives at the next half, with no norm yet."""
        num_rows = x.numel() // x.shape[-1]
        if num_rows >= self.least_folded:
            assert isinstance(self.linear, nn.Linear)
            assert isinstance(inner, Tensor)
            return folded.multiply_and_sum_up(inner, self.linear, x)
        if num_rows >= self.least_rows:
            assert isinstance(self.linear, nn.Linear | Fp8Linear)
            return added.multiply(inner, self.linear, x)
        if self.split.has(num_rows):
            assert isinstance(self.linear, nn.Linear | Fp8Linear)
            return InParts(x, split.multiply(inner, self.linear))
        return Carried(x, self.linear(inner))


class Activated(nn.Module):
    """
    A product and its activation.

    Args:
        linear: plain, in fp8, or packed without an activation of its own.
        reader: the product that reads the result; in fp8, where it multiplies that.
    """

    def __init__(self, linear: Projection, reader: Projection, activation: Activation) -> None:
        super().__init__()
        self.linear, self.activation = linear, activation
        self.gives_fp8 = isinstance(reader, Fp8Linear)
        self.least_rows, self.bound = in_one.NEVER, None
        self.folded: Folded | None = None
        if self.gives_fp8 == isinstance(linear, Fp8Linear):
            self.least_rows = activated.choose(linear, activation)
        if isinstance(linear, Fp8Linear) and self.least_rows != in_one.NEVER:
            self.bound = activated.find_bound(linear, activation)

    @property
    def behind(self) -> Behind:
        return Behind(self.activation, least_rows=self.least_rows)

    def forward(self, x: Normed) -> Tensor | Fp8Rows:
        """(..., depth) -> (..., width), half as wide where half of it are gates."""
        if isinstance(x, Summed):
            assert self.folded is not None
            return self.folded.activate(x, self.activation)
        if self.least_rows == in_one.NEVER:
            activate = activated.activate_in_fp8 if self.gives_fp8 else activated.activate
            return activate(self.linear(x), self.activation)
        if isinstance(self.linear, nn.Linear):
            assert isinstance(x, Tensor)
            return activated.multiply(x, self.linear, self.activation, self.least_rows)
        assert isinstance(self.linear, Fp8Linear)
        rows = quantised.as_rows(x)
        return activated.multiply_in_fp8(
            rows, self.linear, self.activation, self.bound, self.least_rows
        )


class GatedMLP(nn.Module):
    """
    down(silu(gate(x)) * up(x)), with gate and up in one product.

    An inner width that is no multiple of EVEN_WIDTH gets columns of zeros up to the next one.
    """

    def __init__(self, mlp: Any, fusions: Fusions) -> None:
        super().__init__()
        merged, down = getattr(mlp, "gate_up_proj", None), mlp.down_proj  # as in FusedTextAttention
        if merged is None:
            missing = -down.in_features % EVEN_WIDTH
            merged = merge_linears([_widen(x, missing) for x in (mlp.gate_proj, mlp.up_proj)])
            down = _widen(down, missing, reads=True)
        self.reader = _project(merged, fusions)
        self.down = _project(down, fusions)
        self.inner = Activated(self.reader, self.down, "silu_mul")
        self.width = down.out_features

    def forward(self, x: Tensor | Fp8Rows) -> Tensor:
        if isinstance(self.reader, PackedLinear):
            assert isinstance(x, Tensor)
            return by_blocks(lambda rows: self.down(self.inner(rows)), x, self.width)
        return self.down(self.inner(x))  # type: ignore[no-any-return]


class QuickGELUMLP(nn.Module):
    """down(quick_gelu(up(x)))."""

    activation: Activation = "quick_gelu"
    packed_as, slope = "swish", activations.QUICK_GELU  # quick_gelu(x) = swish(slope * x) / slope

    def __init__(self, up: nn.Linear, down: nn.Linear, fusions: Fusions) -> None:
        super().__init__()
        self.reader: Projection
        self.inner: Activated | PackedLinear
        self.width = down.out_features
        may_scale = up.weight.dtype == torch.float32  # 16 bits would round the slope in
        if fusions.packs and may_scale and not fusions.fp8:
            packed = PackedLinear.find(_scale(up, self.slope), self.packed_as)
            if packed is not None:
                self.reader = self.inner = packed
                self.down = _project(_scale(down, 1 / self.slope, has_bias=False), fusions)
                return
        self.reader, self.down = _project(up, fusions), _project(down, fusions)
        self.inner = Activated(self.reader, self.down, self.activation)

    def forward(self, x: Tensor | Fp8Rows) -> Tensor:
        if isinstance(self.inner, PackedLinear):
            assert isinstance(x, Tensor)
            return by_blocks(lambda rows: self.down(self.inner(rows)), x, self.width)
        return self.down(self.inner(x))  # type: ignore[no-any-return]


class GELUTanhMLP(QuickGELUMLP):
    """down(gelu(up(x))), the GELU by tanh."""

    activation = "gelu_tanh"
    packed_as, slope = "gelu", 1.0


def _run_mlp(mlp: GatedMLP | QuickGELUMLP, end: Adding, normed: Normed, x: Tensor) -> Arriving:
    """The second half of a layer. Packed products go block by block, both of them."""
    if isinstance(mlp.reader, PackedLinear):
        return Carried(x, mlp(normed))
    return end(mlp.inner(normed), x)  # type: ignore[no-any-return]


def _fold(
    end: Adding,
    norm: FusedRMSNorm | FusedLayerNorm,
    reader: "Activated | FusedTextAttention | FusedVisionAttention",
) -> None:
    """
    Leave a norm to the products before and behind it, in large calls, if that is faster.

    Its weight and bias go into the product behind it then, in all calls.
    """
    linear, is_rms = reader.linear, isinstance(norm, FusedRMSNorm)
    if not (isinstance(end.linear, nn.Linear) and isinstance(linear, nn.Linear)):
        return
    least_rows = folded.choose(
        end.linear, linear, reader.behind, is_rms=is_rms, least_added=end.least_rows
    )
    if least_rows == in_one.NEVER:
        return
    folded.fold_(linear, norm.weight, norm.bias if isinstance(norm, FusedLayerNorm) else None)
    norm.weight = nn.Parameter(torch.ones_like(norm.weight), requires_grad=False)
    if isinstance(norm, FusedLayerNorm):
        norm.bias = nn.Parameter(torch.zeros_like(norm.bias), requires_grad=False)
    reader.folded = Folded(linear, norm.eps, is_rms=is_rms)
    end.least_folded = least_rows


class ErfGELU(nn.Module):
    """Of any number of rows, without a kernel for each."""

    def forward(self, x: Tensor) -> Tensor:
        return activations.gelu(x)


def _call_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, **more: Any) -> Tensor:
    """(1, heads, T, dim) each -> (1, T, heads, dim), by the function that the config names."""
    attend = ALL_ATTENTION_FUNCTIONS[module.config._attn_implementation]
    attended, _ = attend(module, query, key, value, scaling=module.scaling, dropout=0.0, **more)
    return attended  # type: ignore[no-any-return]


# --- text --------------------------------------------------------------------------------------------


class RotaryTable(nn.Module):
    """
    Angles by table instead of by sines and cosines of every call.

    It gives (1, T, dim / 2) of float32, half of what transformers' own would, for fused attention.
    """

    def __init__(self, rotary: Any, num_positions: int) -> None:
        super().__init__()
        self.num_positions = num_positions
        cos, sin = rope.build_table(rotary.inv_freq, num_positions, rotary.attention_scaling)
        self.cos, self.sin = nn.Buffer(cos, persistent=False), nn.Buffer(sin, persistent=False)
        axis_of = _axes(rotary)
        self.axis_of = nn.Buffer(
            torch.tensor(axis_of, device=rotary.inv_freq.device), persistent=False
        )

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """position_ids: (3, 1, T), or (1, T) where there is one axis."""
        positions = position_ids.reshape(-1, position_ids.shape[-1])
        cos, sin = rope.look_up(positions, self.axis_of, self.cos, self.sin)
        return cos[None], sin[None]


def _axes(rotary: Any) -> list[int]:
    """Which axis of a position turns each pair of numbers: time, row or column."""
    sections = getattr(rotary, "mrope_section", [len(rotary.inv_freq)])
    if not isinstance(rotary, qwen3_vl.Qwen3VLTextRotaryEmbedding):
        return [axis % 3 for axis, count in enumerate(sections) for _ in range(count)]
    # Interleaved: time, row, column, time, row, … until rows and columns have had their share.
    half = len(rotary.inv_freq)
    return [pair % 3 if pair < 3 * sections[pair % 3] and pair % 3 else 0 for pair in range(half)]


class HeadNorms(nn.Module):
    """RMSNorm of each head of queries and of keys, which have a weight each: both in one go."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        weights = [
            norm.weight.data.expand(linear.out_features // attention.head_dim, -1)
            for norm, linear in (
                (attention.q_norm, attention.q_proj),
                (attention.k_norm, attention.k_proj),
            )
        ]
        self.weight = nn.Parameter(torch.cat(weights), requires_grad=False)
        self.one = nn.Buffer(torch.ones_like(self.weight[0]), persistent=False)
        self.eps: float = attention.q_norm.variance_epsilon

    def forward(self, heads: Tensor) -> None:
        """heads: (T, heads + kv_heads, dim), written over."""
        torch.mul(norms.rms_norm(heads, self.one, self.eps), self.weight, out=heads)


class FusedTextAttention(nn.Module):
    """
    Attention of a text layer on one row of tokens, (1, T, width), but for its last product, `out`.

    Of Qwen3 too, which norms each head of queries and keys before it is rotated.
    """

    def __init__(self, attention: Any, fusions: Fusions) -> None:
        super().__init__()
        self.config, self.layer_idx = attention.config, attention.layer_idx
        self.head_dim, self.scaling = attention.head_dim, attention.scaling
        self.num_key_value_groups: int = attention.num_key_value_groups
        # Some families say it for each layer, others in their config alone.
        self.sliding_window = getattr(
            attention, "sliding_window", getattr(attention.config, "sliding_window", None)
        )
        self.is_causal = True
        self.rope_in_attention = fusions.rope_in_attention
        merged = getattr(attention, "qkv_proj", None)  # Phi-3's are merged in the checkpoint
        if merged is None:
            merged = merge_linears([attention.q_proj, attention.k_proj, attention.v_proj])
        num_queries = attention.o_proj.in_features
        self.kv_heads: int = (merged.out_features - num_queries) // 2 // self.head_dim
        self.linear = _project(merged, fusions)
        self.folded: Folded | None = None
        self.out = _project_attended(attention.o_proj, fusions)
        self.head_norms = HeadNorms(attention) if hasattr(attention, "q_norm") else None

    @property
    def behind(self) -> Behind:
        return Behind()

    def forward(
        self,
        x: Normed,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> Tensor:
        product = self.folded if isinstance(x, Summed) else self.linear
        assert product is not None
        projected = product(x)
        heads = projected.view(projected.shape[1], -1, self.head_dim)
        if self.head_norms is not None:
            self.head_norms(heads[:, : -self.kv_heads])
        cos, sin = (angles[0] for angles in position_embeddings)
        if self.rope_in_attention:
            kwargs["merged"] = heads, cos, sin
        else:
            rope.rotate_(heads[:, : -self.kv_heads], cos, sin)
        query, key, value = (
            part.transpose(0, 1)[None]
            for part in heads.tensor_split([-2 * self.kv_heads, -self.kv_heads], dim=1)
        )
        attended = _call_attention(
            self,
            query,
            key,
            value,
            attention_mask=attention_mask,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return attended.reshape(1, len(heads), -1)


class FusedDecoderLayer(nn.Module):
    """A layer of a Llama-like text model. Only without transformers' own cache."""

    def __init__(self, layer: Any, fusions: Fusions, is_last: bool) -> None:
        super().__init__()
        self.attention = FusedTextAttention(layer.self_attn, fusions)
        self.mlp = GatedMLP(layer.mlp, fusions)
        self.attention_norm = FusedRMSNorm(layer.input_layernorm, self.attention.linear)
        self.mlp_norm = FusedRMSNorm(layer.post_attention_layernorm, self.mlp.reader)
        self.attention_end = Adding(self.attention.out, self.mlp_norm)
        self.mlp_end = Adding(self.mlp.down, self.attention_norm)
        _fold(self.attention_end, self.mlp_norm, self.mlp.inner)
        # Of the layer behind, which is alike.
        _fold(self.mlp_end, self.attention_norm, self.attention)
        self.is_last = is_last  # of fused ones: a plain tensor
        self.gives_ends = False  # of all: its result is cut to what the call wants

    def forward(
        self,
        hidden_states: Arriving,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: None = None,
        use_cache: bool | None = False,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Arriving:
        if past_key_values is not None:
            raise ValueError("a fused layer keeps no cache: call the model with use_cache=False")
        x, normed = _enter(self.attention_norm, hidden_states)
        attended = self.attention(normed, position_embeddings, attention_mask, **kwargs)
        ends = find_ends() if self.gives_ends else None
        if ends is not None:
            # Keys and values of all tokens have been kept; of the others nobody reads more.
            x, attended = ends.cut(x), ends.cut(attended)
        x, normed = _enter(self.mlp_norm, self.attention_end(attended, x))
        ending = _run_mlp(self.mlp, self.mlp_end, normed, x)
        return leave(ending) if self.is_last else ending


def _fuse_decoder_layer(layer: Any, fusions: Fusions, is_last: bool) -> nn.Module | None:
    mlp = layer.mlp
    activation = mlp.activation_fn if isinstance(mlp, phi3.Phi3MLP) else mlp.act_fn
    if not (fusions.text and _is_silu(activation)):
        return None
    return FusedDecoderLayer(layer, fusions, is_last)


def _fuse_rms_norm(norm: Any, fusions: Fusions, _is_last: bool) -> nn.Module | None:
    return FusedRMSNorm(norm) if fusions.text else None


def _fuse_rotary(rotary: Any, fusions: Fusions, _is_last: bool) -> nn.Module | None:
    # Other types change the frequencies with the length of the call; and layers that stay
    # transformers' own want transformers' own angles.
    if not fusions.text or rotary.rope_type != "default" or not _has_silu(rotary.config):
        return None
    return RotaryTable(rotary, rotary.config.max_position_embeddings)


# --- vision ------------------------------------------------------------------------------------------


class FusedVisionAttention(nn.Module):
    """Attention of a Qwen-VL encoder block on packed patches, (T, width), but for its last product."""

    def __init__(self, attention: Any, norm: nn.Module, fusions: Fusions) -> None:
        super().__init__()
        fusions = replace(fusions, packs=False)  # of many rows: blocks cost what products save
        self.config, self.scaling = attention.config, attention.scaling
        self.num_heads: int = attention.num_heads
        self.num_key_value_groups = 1
        self.is_causal = False
        linear = _project(attention.qkv, fusions)
        assert not isinstance(linear, PackedLinear)
        self.linear = linear
        self.folded: Folded | None = None
        self.head_dim: int = attention.head_dim
        self.factors: Tensor | None  # of what attention gives, where that is in fp8
        self.out: Projection
        if fusions.fp8 and attended.is_possible(attention.proj, self.head_dim):
            width = attention.proj.in_features
            bias = None if attention.qkv.bias is None else attention.qkv.bias[-width:]
            factors = attended.find_factors(attention.qkv.weight[-width:], bias, norm)
            self.factors = nn.Buffer(factors, persistent=False)
            self.out = attended.read_by(attention.proj, self.factors)
        else:
            self.factors = None
            self.out = _project_attended(attention.proj, fusions)
        # From how many rows on the product rotates what it makes. Its heads may then be interleaved,
        # also where it makes fewer.
        self.least_rows = rotated.choose(linear, self.head_dim, 2 * self.num_heads)
        if self.least_rows != in_one.NEVER:
            rotated.interleave_(linear, self.head_dim, 2 * self.num_heads)

    @property
    def behind(self) -> Behind:
        return Behind(dim=self.head_dim, num_heads=2 * self.num_heads, least_rows=self.least_rows)

    def _make_heads(self, x: Normed, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        """(T, heads of queries, keys and values, dim), the first two rotated."""
        num_rotated = 2 * self.num_heads
        of_heads = *position_embeddings, self.head_dim, num_rotated
        if isinstance(x, Summed):
            assert self.folded is not None
            projected = self.folded.rotate(x, *of_heads)
        elif self.least_rows != in_one.NEVER:
            projected = rotated.multiply(x, self.linear, *of_heads, self.least_rows)
        else:
            projected = self.linear(x)
            heads = projected.view(len(projected), -1, self.head_dim)
            rope.rotate_(heads[:, :num_rotated], *position_embeddings)
        return projected.view(len(projected), -1, self.head_dim)

    def forward(
        self,
        x: Normed,
        position_embeddings: tuple[Tensor, Tensor],
        **kwargs: Any,
    ) -> Tensor | Fp8Rows:
        heads = self._make_heads(x, position_embeddings)
        query, key, value = (part.transpose(0, 1)[None] for part in heads.tensor_split(3, dim=1))
        if self.factors is not None:
            kwargs["fp8_factors"] = self.factors
        found = _call_attention(
            self, query, key, value, attention_mask=None, is_causal=False, **kwargs
        ).reshape(len(heads), -1)
        return found if self.factors is None else attended.quantise(found, self.factors)


class FusedVisionBlock(nn.Module):
    """A block of an encoder of Qwen-VL, whose generations differ in norms and MLP."""

    def __init__(
        self, block: Any, mlp: "GatedMLP | QuickGELUMLP", fusions: Fusions, is_last: bool
    ) -> None:
        super().__init__()
        self.attention = FusedVisionAttention(block.attn, block.norm1, fusions)
        self.mlp = mlp
        norm = FusedLayerNorm if isinstance(block.norm1, nn.LayerNorm) else FusedRMSNorm
        self.attention_norm = norm(block.norm1, self.attention.linear)
        self.mlp_norm = norm(block.norm2, mlp.reader)
        self.attention_end = Adding(self.attention.out, self.mlp_norm)
        self.mlp_end = Adding(mlp.down, self.attention_norm)
        if isinstance(mlp.inner, Activated):
            _fold(self.attention_end, self.mlp_norm, mlp.inner)
        if self.attention.least_rows != in_one.NEVER:  # what is folded rotates
            # Of the block behind, which is alike.
            _fold(self.mlp_end, self.attention_norm, self.attention)
        self.is_last = is_last  # or its result is looked at: a plain tensor

    def forward(
        self,
        hidden_states: Arriving,
        cu_seqlens: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        max_seqlen: int | None = None,
        **kwargs: Any,
    ) -> Arriving:
        # As transformers' own block hands them on; the attention function may know better.
        kwargs |= {
            "cu_seq_lens_q": cu_seqlens,
            "cu_seq_lens_k": cu_seqlens,
            "max_length_q": max_seqlen,
            "max_length_k": max_seqlen,
        }
        x, normed = _enter(self.attention_norm, hidden_states)
        found = self.attention(normed, position_embeddings, **kwargs)
        x, normed = _enter(self.mlp_norm, self.attention_end(found, x))
        ending = _run_mlp(self.mlp, self.mlp_end, normed, x)
        return leave(ending) if self.is_last else ending


class FusedCLIPAttention(nn.Module):
    """Attention of a CLIP or SigLIP layer, (pictures, T, width)."""

    def __init__(self, attention: Any, fusions: Fusions) -> None:
        super().__init__()
        fusions = replace(fusions, packs=False)  # of many rows: blocks cost what products save
        self.config, self.scaling = attention.config, attention.scale
        self.num_heads: int = attention.num_heads
        self.num_key_value_groups = 1
        self.is_causal = False
        merged = merge_linears([attention.q_proj, attention.k_proj, attention.v_proj])
        self.qkv = _project(merged, fusions)
        self.out = _project_attended(attention.out_proj, fusions)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        shape = hidden_states.shape[:-1]
        parts = self.qkv(hidden_states).view(*shape, 3, self.num_heads, -1)
        query, key, value = (part.transpose(1, 2) for part in parts.unbind(2))
        attended = _call_attention(self, query, key, value, attention_mask=attention_mask, **kwargs)
        return self.out(attended.reshape(*shape, -1)), None


class FusedPatches(nn.Module):
    """
    A convolution whose patches lie side by side, as a product: for three colours and patches of fourteen
    rows no library's convolution is fast.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias  # callers read the weight's type
        self.height, self.width = conv.kernel_size
        flat = conv.weight.data.flatten(1)
        self.depth = flat.shape[1]  # of a patch
        flat = F.pad(flat, (0, -self.depth % EVEN_WIDTH))
        self.flat = nn.Buffer(flat, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(pictures, channels, height, width) -> (pictures, outputs, rows, columns) of patches."""
        num, channels, height, width = x.shape
        rows, columns = height // self.height, width // self.width
        whole = x[..., : rows * self.height, : columns * self.width]
        shape = num, channels, rows, self.height, columns, self.width
        in_order = whole.view(shape).permute(0, 2, 4, 1, 3, 5)
        patches = x.new_zeros((num, rows, columns, self.flat.shape[1]))
        patches[..., : self.depth].view(in_order.shape).copy_(in_order)
        return F.linear(patches, self.flat, self.bias).permute(0, 3, 1, 2)


def _fuse_vision_block(block: Any, fusions: Fusions, is_last: bool) -> nn.Module | None:
    if not (fusions.vision and isinstance(block.mlp.act, QuickGELUActivation)):
        return None
    mlp = QuickGELUMLP(block.mlp.fc1, block.mlp.fc2, fusions)
    return FusedVisionBlock(block, mlp, fusions, is_last)


def _fuse_gated_vision_block(block: Any, fusions: Fusions, is_last: bool) -> nn.Module | None:
    if not (fusions.vision and _is_silu(block.mlp.act_fn)):
        return None
    return FusedVisionBlock(block, GatedMLP(block.mlp, fusions), fusions, is_last)


def _fuse_gelu_vision_block(block: Any, fusions: Fusions, is_last: bool) -> nn.Module | None:
    if not (fusions.vision and isinstance(block.mlp.act_fn, GELUTanh)):
        return None
    mlp = GELUTanhMLP(block.mlp.linear_fc1, block.mlp.linear_fc2, fusions)
    return FusedVisionBlock(block, mlp, fusions, is_last)


def _fuse_layer_norm(norm: Any, fusions: Fusions, _is_last: bool) -> nn.Module | None:
    # NOTE: only encoders of the families above have LayerNorm with a weight and a bias.
    if not fusions.vision or norm.weight is None or norm.bias is None:
        return None
    return FusedLayerNorm(norm) if len(norm.normalized_shape) == 1 else None


def _fuse_clip_attention(attention: Any, fusions: Fusions, _is_last: bool) -> nn.Module | None:
    return FusedCLIPAttention(attention, fusions) if fusions.vision else None


def _fuse_clip_mlp(mlp: Any, fusions: Fusions, _is_last: bool) -> nn.Module | None:
    if not fusions.vision:
        return None
    if isinstance(mlp.activation_fn, QuickGELUActivation):
        return QuickGELUMLP(mlp.fc1, mlp.fc2, fusions)
    if isinstance(mlp.activation_fn, GELUTanh):
        return GELUTanhMLP(mlp.fc1, mlp.fc2, fusions)
    return None


def _fuse_gelu(gelu: Any, fusions: Fusions, _is_last: bool) -> nn.Module | None:
    by_erf = getattr(gelu, "approximate", "none") == "none"
    return ErfGELU() if fusions.vision and by_erf else None


def _fuse_patches(conv: Any, fusions: Fusions, _is_last: bool) -> nn.Module | None:
    overlaps = conv.kernel_size != conv.stride or conv.padding not in (0, (0, 0), "valid")
    if not fusions.vision or overlaps or conv.dilation != (1, 1) or conv.groups != 1:
        return None
    return FusedPatches(conv)


def _is_silu(activation: nn.Module) -> bool:
    return isinstance(activation, nn.SiLU | SiLUActivation)


def _has_silu(config: Any) -> bool:
    """Whether the layers of a text model are fused, as `_fuse_decoder_layer` has it."""
    return _is_silu(ACT2FN[config.hidden_act])


_Build = Callable[[Any, Fusions, bool], nn.Module | None]

# CLIP's layers keep their class, because LLaVA asks transformers for the states between them.
_SWAPS: dict[type[nn.Module], _Build] = {
    qwen2_vl.Qwen2VLDecoderLayer: _fuse_decoder_layer,
    qwen2_vl.Qwen2VLRMSNorm: _fuse_rms_norm,
    qwen2_vl.Qwen2VLRotaryEmbedding: _fuse_rotary,
    qwen2_vl.Qwen2VLVisionBlock: _fuse_vision_block,
    qwen2_5_vl.Qwen2_5_VLDecoderLayer: _fuse_decoder_layer,
    qwen2_5_vl.Qwen2_5_VLRMSNorm: _fuse_rms_norm,
    qwen2_5_vl.Qwen2_5_VLRotaryEmbedding: _fuse_rotary,
    qwen2_5_vl.Qwen2_5_VLVisionBlock: _fuse_gated_vision_block,
    qwen3_vl.Qwen3VLTextDecoderLayer: _fuse_decoder_layer,
    qwen3_vl.Qwen3VLTextRMSNorm: _fuse_rms_norm,
    qwen3_vl.Qwen3VLTextRotaryEmbedding: _fuse_rotary,
    qwen3_vl.Qwen3VLVisionBlock: _fuse_gelu_vision_block,
    llama.LlamaDecoderLayer: _fuse_decoder_layer,
    llama.LlamaRMSNorm: _fuse_rms_norm,
    llama.LlamaRotaryEmbedding: _fuse_rotary,
    mistral.MistralDecoderLayer: _fuse_decoder_layer,
    mistral.MistralRMSNorm: _fuse_rms_norm,
    mistral.MistralRotaryEmbedding: _fuse_rotary,
    qwen2.Qwen2DecoderLayer: _fuse_decoder_layer,
    qwen2.Qwen2RMSNorm: _fuse_rms_norm,
    qwen2.Qwen2RotaryEmbedding: _fuse_rotary,
    phi3.Phi3DecoderLayer: _fuse_decoder_layer,
    phi3.Phi3RMSNorm: _fuse_rms_norm,
    phi3.Phi3RotaryEmbedding: _fuse_rotary,
    clip.CLIPAttention: _fuse_clip_attention,
    clip.CLIPMLP: _fuse_clip_mlp,
    siglip.SiglipAttention: _fuse_clip_attention,
    siglip.SiglipMLP: _fuse_clip_mlp,
    idefics3.Idefics3VisionAttention: _fuse_clip_attention,
    idefics3.Idefics3VisionMLP: _fuse_clip_mlp,
    smolvlm.SmolVLMVisionAttention: _fuse_clip_attention,
    smolvlm.SmolVLMVisionMLP: _fuse_clip_mlp,
    nn.Conv2d: _fuse_patches,
    nn.LayerNorm: _fuse_layer_norm,
    nn.GELU: _fuse_gelu,
    GELUActivation: _fuse_gelu,
}
