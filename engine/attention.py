"""
Attention inside unmodified transformers modules: which token sees which rows is known only here.

The modules are called on one row of tokens, (1, tokens, hidden), that belong to many sequences; the
engine says through a context, set around the call, whose they are. Two functions are registered
with transformers, one for text and one for vision encoders. Their names contain `flash`, because
encoders split their input by picture, with a wait for the device in every layer, for any other name.

Axes: T tokens of one call, heads, kv_heads, dim. K and V of a layer: (rows, kv_heads, dim).
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface

from engine.errors import BadConfig
from engine.kernels import pictures
from engine.kernels.decode import DecodeAttention
from engine.kernels.prompts import PrefillAttention
from engine.kernels.rope import rotate_and_store_
from engine.kernels.rows import read, store_

TEXT_ATTENTION = "darkroom_flash_text"
VISION_ATTENTION = "darkroom_flash_vision"
# What layers hand on that the context says, or that says nothing about scores.
SAID_OTHERWISE = ("position_ids", "use_cache", "cu_seq_lens_k", "max_length_q", "max_length_k")
MAX_RUN = 1024  # tokens of text that have a mask of their own, which is as wide as the prompt
DENSE_BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


@dataclass(slots=True)
class Ends:
    """
    The tokens of a call whose hidden states anybody will read: the last of each prompt.

    Attributes:
        rows: (n,), int64, device: their places among the call's.
        are_cut: whether the last layer gave these alone, as a fused one does.
    """

    rows: Tensor
    are_cut: bool = False

    def cut(self, hidden: Tensor) -> Tensor:
        """(1, T, hidden) -> (1, n, hidden)."""
        self.are_cut = True
        return hidden.index_select(1, self.rows)


@dataclass(frozen=True, slots=True)
class TextContext:
    """
    Whose tokens a text call holds.

    Attributes:
        keys, values: one (rows, kv_heads, dim) tensor a layer.
        write_rows: (T,), int64: the row that each token's key and value go to.
        starts: first row of each sequence's slab.
        lens: rows in use by each sequence once this call has written.
        num_queries: tokens of each sequence in this call; they are its last ones. Rows of those before
            them, of a piece of a prompt, were written by earlier calls.
        device_spans: the same as int32 tensors (query_starts, slab_starts, lens), for the kernels
            that read them on the device; None where the loops below are used. With them, starts,
            lens and num_queries may be empty if the greatest ones are named:
        max_queries, max_rows: at least the greatest of num_queries and lens. Constants of a kernel.
        decode_kernel: for calls of one token a sequence; None where `_attend_flash` takes them too.
        prefill_kernel: for calls of more tokens a sequence; None where `_attend_flash` takes these,
            as it does where a layer has a window, and with read_rows.
        read_rows: (rows,), int64, of rows in fp8, which flash does not take: those that a prefill looks
            at, sequence by sequence. Slabs in device_spans then begin at places among these.
        extras: (num_layers, T, hidden), what the first layers' results have added, as `find_extra`
            tells the family's hooks; None where no token has any.
        both_ways: for each sequence of a prefill, in order: where pictures begin and end, among its
            tokens of this call, that attend to those behind them too. Empty where all tokens look
            back only; never together with device_spans.
        ends: where a prefill looks at some tokens' results only; None where at all of them.
    """

    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    write_rows: Tensor
    starts: Sequence[int]
    lens: Sequence[int]
    num_queries: Sequence[int]
    device_spans: tuple[Tensor, Tensor, Tensor] | None = None
    max_queries: int | None = None
    max_rows: int | None = None
    decode_kernel: DecodeAttention | None = None
    prefill_kernel: PrefillAttention | None = None
    read_rows: Tensor | None = None
    extras: Tensor | None = None
    both_ways: Sequence[Sequence[tuple[int, int]]] = ()
    ends: Ends | None = None


@dataclass(frozen=True, slots=True)
class VisionContext:
    """
    Attributes:
        runs: (num_pictures, num_patches each) of neighbours of equal size, in order; a frame pair
            of a video counts as a picture. Empty where the call is a batch, a picture a row.
        starts: (pictures + 1,), int32, device: where each begins, for the kernel that takes any
            sizes at once; None where every run is a dense batch.
        cut: which of our kernels for that, and how it is cut; None for torch's. Of a batch: None
            where it is a dense one.
        windows: of an encoder some of whose layers look at a window of each picture only: the
            starts that these layers hand on, by which they are known, and what they attend to.
    """

    runs: Sequence[tuple[int, int]]
    starts: Tensor | None = None
    cut: pictures.Cut | pictures.HopperCut | None = None
    windows: "tuple[Tensor, VisionContext] | None" = None
    # Of batches, by number and size of pictures: one layer makes them for all of this call.
    _batch_starts: dict[tuple[int, int], Tensor] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def find_batch_starts(self, num: int, size: int, device: torch.device) -> Tensor:
        """`starts` of as many pictures, all of one size."""
        key = num, size
        if key not in self._batch_starts:
            starts = torch.arange(num + 1, dtype=torch.int32, device=device) * size
            self._batch_starts[key] = starts
        return self._batch_starts[key]


class _Current(threading.local):
    text: TextContext | None = None
    vision: VisionContext | None = None


_current = _Current()


@contextmanager
def using(context: TextContext | VisionContext) -> Iterator[None]:
    """Set the context of the calls inside the block, in this thread alone."""
    name = "text" if isinstance(context, TextContext) else "vision"
    setattr(_current, name, context)
    try:
        yield
    finally:
        setattr(_current, name, None)


def find_extra(layer: int) -> Tensor | None:
    """(T, hidden): what the call's tokens have added behind a layer; None where there is nothing."""
    context = _current.text
    if context is None or context.extras is None:
        return None
    extra, ends = context.extras[layer], context.ends
    return extra if ends is None or not ends.are_cut else extra.index_select(0, ends.rows)


def find_ends() -> Ends | None:
    """Whose results the last layer may leave out: all but these; None where all are wanted."""
    return None if _current.text is None else _current.text.ends


def attend_text(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    merged: tuple[Tensor, Tensor, Tensor] | None = None,
    sliding_window: int | None = None,
    is_causal: bool = True,
    **others: Any,
) -> tuple[Tensor, None]:
    """
    Store this call's keys and values in their rows, then attend over each sequence's own rows.

    Args:
        query: (1, heads, T, dim). key, value: (1, kv_heads, T, dim).
        merged: of fused layers, whose queries and keys are not rotated yet: all heads as one
            (T, heads + 2 * kv_heads, dim), of which the three above are views, and the angles.
        sliding_window: of a layer that looks at so many rows only, each token's own the last of
            them. Rows before are kept: the slab is one for all layers.

    Returns:
        (1, T, heads, dim), and no weights.

    Raises:
        BadConfig: the layer asks for something that is not built.
    """
    _refuse({**others, "is_causal=False": not is_causal})
    context = _current.text
    assert context is not None
    assert attention_mask is None
    layer: int = module.layer_idx  # type: ignore[assignment]
    keys, values = context.keys[layer], context.values[layer]
    if merged is not None:
        rotate_and_store_(*merged, keys, values, context.write_rows)
    else:
        store_(keys, context.write_rows, key[0].transpose(0, 1))
        store_(values, context.write_rows, value[0].transpose(0, 1))
    if context.device_spans is not None:
        return _attend_spans(query, keys, values, context, scaling, sliding_window), None
    if len(context.lens) == query.shape[2]:
        return _attend_decode(query, keys, values, context, scaling, sliding_window), None
    return _attend_prefill(query, keys, values, context, scaling, sliding_window), None


def _refuse(others: Mapping[str, Any]) -> None:
    """
    Nothing that a layer asks for is left out in silence: its scores may be bounded, or have sinks.

    Raises:
        BadConfig: what it asks for is not built.
    """
    for name, value in others.items():
        is_off = value is None or (isinstance(value, int | float) and not value)
        if not is_off and name not in SAID_OTHERWISE:
            raise BadConfig(
                f"The model's attention asks for {name}, which is not supported: its answers would "
                "be others."
            )


def _attend_prefill(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    context: TextContext,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """Prompts, or pieces of prompts, one after the other."""
    sizes = list(context.num_queries)
    attended = []
    queries = torch.split(query, sizes, dim=2)
    spans = context.both_ways or [()] * len(sizes)
    for q, start, length, both_ways in zip(
        queries, context.starts, context.lens, spans, strict=True
    ):
        k, v = (
            rows[start : start + length].to(q.dtype).transpose(0, 1)[None]
            for rows in (keys, values)
        )
        size, band = q.shape[2], None
        # All of them: a whole mask of a long text would be as large as its square.
        if context.both_ways or size < length:
            attended.append(_attend_runs(q, k, v, both_ways, scaling, window))
            continue
        if window is not None and window < size:
            band = torch.ones(size, size, dtype=torch.bool, device=q.device)
            band = band.tril().triu(1 - window)
        attended.append(
            F.scaled_dot_product_attention(
                q, k, v, attn_mask=band, is_causal=band is None, scale=scaling, enable_gqa=True
            )
        )
    return torch.cat(attended, dim=2).transpose(1, 2)


def _attend_runs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    both_ways: Sequence[tuple[int, int]],
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """
    One prompt, a run of text or a picture at a time: text looks back, a picture's tokens at all of it.

    Also where flash takes all other calls: it cannot mix the two in one.

    Args:
        query: (1, heads, T, dim), of the last T tokens. key, value: (1, kv_heads, tokens, dim).
        both_ways: where pictures begin and end among the T.

    Returns:
        (1, heads, T, dim).
    """
    # Kernels that take a mask and hold no whole matrix of scores want as many heads on both sides.
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    attended = []
    past = key.shape[2] - query.shape[2]
    for begin, end, is_picture in _cut_runs(query.shape[2], both_ways):
        first, last = max(0, past + begin - window + 1) if window else 0, past + end
        rows = torch.arange(past + begin, last, device=query.device)[:, None]
        columns = torch.arange(first, last, device=query.device)
        is_seen = (columns <= rows) | is_picture
        if window is not None:
            is_seen &= columns > rows - window
        q, k, v = query[:, :, begin:end], key[:, :, first:last], value[:, :, first:last]
        attended.append(F.scaled_dot_product_attention(q, k, v, attn_mask=is_seen, scale=scaling))
    return torch.cat(attended, dim=2)


def _cut_runs(size: int, both_ways: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, bool]]:
    """Begin and end of each picture, and of text of at most MAX_RUN tokens around them."""
    at = 0
    for begin, end in [*both_ways, (size, size)]:
        for first in range(at, begin, MAX_RUN):
            yield first, min(first + MAX_RUN, begin), False
        if begin < end:
            yield begin, end, True
        at = end


def _attend_decode(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    context: TextContext,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """
    One token a sequence. The heads of a group stand as query rows of their KV head: no copy of K
    and V for each head, and no padding to the longest sequence.
    """
    _, heads, num_seqs, dim = query.shape
    kv_heads = keys.shape[1]
    grouped = query[0].transpose(0, 1).reshape(num_seqs, kv_heads, heads // kv_heads, dim)
    attended = []
    for index, (start, length) in enumerate(zip(context.starts, context.lens, strict=True)):
        first = start if window is None else start + max(0, length - window)
        attended.append(
            F.scaled_dot_product_attention(
                grouped[index : index + 1],
                keys[first : start + length].to(query.dtype).transpose(0, 1)[None],
                values[first : start + length].to(query.dtype).transpose(0, 1)[None],
                scale=scaling,
            )
        )
    return torch.cat(attended).reshape(1, num_seqs, heads, dim)


def _scale(query: Tensor, scaling: float | None) -> float:
    """For our kernels, which know no default as torch's do. query: (..., dim)."""
    return float(query.shape[-1] ** -0.5) if scaling is None else scaling


def _attend_spans(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    context: TextContext,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """Over all sequences at once, by what a kernel reads on the device."""
    if context.max_queries == 1 and context.decode_kernel is not None:
        return _attend_kernel(query, keys, values, context, scaling, window)
    if context.prefill_kernel is None or window is not None or context.read_rows is not None:
        return _attend_flash(query, keys, values, context, scaling, window)
    assert context.device_spans is not None
    scale = _scale(query, scaling)
    most = context.max_queries or max(context.num_queries)
    return context.prefill_kernel(
        query[0].transpose(0, 1), keys, values, *context.device_spans, most, scale
    )[None]


def _attend_flash(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    context: TextContext,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """
    Prefill and decode in one kernel over all sequences, on a GPU in half precision.

    The operator is private to torch: `can_use_flash` asks for it by name, and a GPU test compares it
    with the loops above. The kernel takes each slab's offset from the starts, which need not rise,
    and its length from `seqused_k`.
    """
    assert context.device_spans is not None
    query_starts, slab_starts, lens = context.device_spans
    if context.read_rows is not None:
        keys, values = (read(rows, context.read_rows, query.dtype) for rows in (keys, values))
    attended, *_ = torch.ops.aten._flash_attention_forward(
        query[0].transpose(0, 1),
        keys,
        values,
        query_starts,
        slab_starts,
        context.max_queries or max(context.num_queries),
        context.max_rows or max(context.lens),
        0.0,
        True,
        False,
        scale=scaling,
        window_size_left=None if window is None else window - 1,
        window_size_right=None if window is None else 0,
        seqused_k=lens,
    )
    return attended[None]  # type: ignore[no-any-return]


def _attend_kernel(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    context: TextContext,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """Decode in a kernel of our own: straight on the slabs, all heads of a group together."""
    assert context.device_spans is not None
    assert context.decode_kernel is not None
    _, slab_starts, lens = context.device_spans
    queries = query[0].transpose(0, 1)
    scale = _scale(query, scaling)
    most, slab_starts = context.max_rows or max(context.lens), slab_starts[: len(lens)]
    if window is not None and window < most:  # a shorter slab, which begins later
        slab_starts, lens = slab_starts + (lens - window).clamp(min=0), lens.clamp(max=window)
        most = window
    return context.decode_kernel(queries, keys, values, slab_starts, lens, most, scale)[None]


def can_use_flash(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether torch's own FlashAttention takes these tensors."""
    return (
        device.type == "cuda"
        and dtype in (torch.float16, torch.bfloat16)
        and head_dim % 8 == 0
        and head_dim <= 256
        and hasattr(torch.ops.aten, "_flash_attention_forward")
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def attend_vision(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    fp8_factors: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """
    Every patch attends to its own picture: all in one kernel, or neighbours of equal size as one dense
    batch, as the context says.

    Args:
        query, key, value: (1, heads, patches, dim), or a batch of pictures instead of 1.
        cu_seq_lens_q: the starts that this layer hands on; read only to know layers with windows.
        fp8_factors: (heads * dim,): the result may be in fp8, times these; see kernels/attended.py.

    Returns:
        (1, patches, heads, dim), and no weights.

    Raises:
        BadConfig: the layer asks for something that is not built.
    """
    _refuse(others)
    context = _current.vision
    assert context is not None
    assert attention_mask is None
    if not context.runs:
        if context.cut is not None:
            attended = _try_attend_batch(query, key, value, context, context.cut, scaling)
            if attended is not None:
                return attended, None
        batch = F.scaled_dot_product_attention(query, key, value, scale=scaling)
        return batch.transpose(1, 2), None
    if context.windows is not None and cu_seq_lens_q is context.windows[0]:
        context = context.windows[1]
    if context.starts is not None:
        return _attend_varlen(query, key, value, context, scaling, fp8_factors), None
    runs, start = [], 0
    for num_pictures, num_patches in context.runs:
        end = start + num_pictures * num_patches
        q, k, v = (
            x[0, :, start:end].reshape(-1, num_pictures, num_patches, x.shape[-1]).transpose(0, 1)
            for x in (query, key, value)
        )
        out = F.scaled_dot_product_attention(q, k, v, scale=scaling)
        runs.append(out.transpose(1, 2).flatten(0, 1))
        start = end
    return (runs[0] if len(runs) == 1 else torch.cat(runs))[None], None


def _try_attend_batch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    context: VisionContext,
    cut: pictures.Cut | pictures.HopperCut,
    scaling: float | None,
) -> Tensor | None:
    """
    A batch as pictures that follow each other, which costs nothing where they lie so in memory.

    Args:
        query, key, value: (pictures, heads, patches, dim).

    Returns:
        (pictures, patches, heads, dim); None where they lie otherwise.
    """
    num, _, size, _ = query.shape
    by_row = [x.transpose(1, 2) for x in (query, key, value)]
    if any(x.stride(0) != size * x.stride(1) for x in by_row):
        return None
    q, k, v = (x.flatten(0, 1) for x in by_row)
    if not pictures.takes(q, k, v):
        return None
    scale = _scale(query, scaling)
    starts = context.find_batch_starts(num, size, query.device)
    return pictures.attend(q, k, v, starts, size, scale, cut).view(by_row[0].shape)


def _attend_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    context: VisionContext,
    scaling: float | None,
    fp8_factors: Tensor | None,
) -> Tensor:
    """Pictures of any sizes in one kernel: ours, or torch's own, private as in `_attend_flash`."""
    assert context.starts is not None
    most = max(num_patches for _, num_patches in context.runs)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if context.cut is not None and pictures.takes(q, k, v):
        scale = _scale(q, scaling)
        return pictures.attend(q, k, v, context.starts, most, scale, context.cut, fp8_factors)[None]
    attended, *_ = torch.ops.aten._flash_attention_forward(
        q,
        k,
        v,
        context.starts,
        context.starts,
        most,
        most,
        0.0,
        False,
        False,
        scale=scaling,
    )
    return attended[None]  # type: ignore[no-any-return]


@contextmanager
def dense_kernels(device: torch.device) -> Iterator[None]:
    """
    Let cuDNN go first for what is left to dense batches on a GPU, as it is the fastest of torch's: 358
    TFLOP/s against 255 of its FlashAttention, and 457 of our kernel for Hopper, which takes such batches
    itself (8 x 3996 patches, heads of 80, H100, 2026-11-28).
    """
    if device.type != "cuda":
        yield
        return
    with sdpa_kernel(DENSE_BACKENDS, set_priority=True):
        yield


AttentionInterface.register(TEXT_ATTENTION, attend_text)
AttentionInterface.register(VISION_ATTENTION, attend_vision)
