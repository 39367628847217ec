"""
Qwen2.5-VL: Qwen2-VL whose encoder looks at windows, and whose clips stand in time by seconds.

Most encoder layers see a window of each frame only, so the patches of a window stand together there.
"""

from collections.abc import Sequence
from functools import lru_cache, partial

import numpy as np
import numpy.typing as npt
from torch import Tensor

from engine.errors import BadPrompt
from engine.families.packed import Packing
from engine.families.protocol import AreaLimits, Description, Plan, Positions
from engine.families.qwen2_vl import (
    MERGE,
    TEMPORAL,
    USUAL_FRAME_S,
    Grid,
    Qwen2VL,
)
from engine.uploads import upload

MAX_KNOWN_GRIDS = 256  # whose windows are kept on the host


@lru_cache(maxsize=MAX_KNOWN_GRIDS)
def find_windows(grid: Grid, window: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """
    Windows of a grid, row by row of windows; those at the right and lower edges may be smaller.

    Args:
        window: tokens on a side.

    Returns:
        order: (num_tokens,), the tokens of a picture or clip, those of a window as neighbours.
        sizes: of the windows, in patches.
    """
    rows, columns = grid.rows // MERGE, grid.columns // MERGE
    times, row, column = np.indices((grid.times, rows, columns))
    down, across = -(-rows // window), -(-columns // window)
    window_of = ((times * down + row // window) * across + column // window).ravel()
    return np.argsort(window_of, kind="stable"), np.bincount(window_of) * MERGE**2


class Qwen25VL(Qwen2VL):
    """
    A plan's layout is its `Grid`.

    NOTE: transformers before 5.18 cuts the seconds of a frame pair to whole ones; this is what later
    versions do, and the authors.
    """

    def __init__(self, description: Description) -> None:
        super().__init__(description)
        vision = description.config.vision_config
        self._window: int = vision.window_size // MERGE // self.patch_px
        self._positions_a_second: int = vision.tokens_per_second
        if self._window < 1:
            raise ValueError("a window holds no token")

    def plan_clip(
        self,
        width_px: int,
        height_px: int,
        num_frames: int,
        times_s: Sequence[float] | None,
        frame_s: float | None,
        duration_s: float | None,
        area: AreaLimits | None,
    ) -> Plan:
        """An odd last frame is doubled."""
        seconds = TEMPORAL * (USUAL_FRAME_S if frame_s is None else frame_s)
        return self._plan(
            self.video_token_id,
            width_px,
            height_px,
            area or self.video_area,
            times=-(-num_frames // TEMPORAL),
            # Nothing beyond is a position: see below.
            time_step=min(
                self.text_config.max_position_embeddings, self._positions_a_second * seconds
            ),
        )

    def positions(
        self, num_tokens: int, media: Sequence[tuple[int, Plan]]
    ) -> tuple[Positions, int]:
        """
        Raises:
            BadPrompt: a clip lasts until behind the last position that the model knows.
        """
        positions, delta = super().positions(num_tokens, media)
        most: int = self.text_config.max_position_embeddings
        if positions.max() >= most:
            raise BadPrompt(
                f"lasts longer than to the last of the model's {most} positions",
                where="video",
                remedy="Give a shorter part of the clip, or less in front of it",
            )
        return positions, delta

    def _run(self, packing: Packing, grids: Sequence[Grid], *inputs: Tensor) -> Tensor:
        found = [find_windows(grid, self._window) for grid in grids]
        windows = self.encoder.pack(
            np.concatenate([sizes for _, sizes in found]).tolist(),
            rounds_up=self.repeats is not None,
            window_patches=(self._window * MERGE) ** 2,
        )
        # What fills up a call stays where it is.
        order = np.arange(packing.num_patches // MERGE**2)
        at = 0
        for of_grid, _ in found:
            order[at : at + len(of_grid)] = of_grid + at
            at += len(of_grid)
        see = partial(self._see_windows, packing.max_patches, windows.max_patches)
        on_device = upload(order, self._device)
        return self.encoder.run(packing, self.repeats, see, *inputs, on_device, windows=windows)

    def _see_windows(
        self,
        max_patches: int,
        max_window_patches: int,
        starts: Tensor,
        window_starts: Tensor,
        embedded: Tensor,
        positions: Tensor,
        order: Tensor,
    ) -> Tensor:
        return self._look(  # type: ignore[no-any-return]
            embedded,
            position_ids=positions,
            cu_seqlens=starts,
            max_seqlen=max_patches,
            window_index=order,
            cu_window_seqlens=window_starts,
            max_window_seqlen=max_window_patches,
        ).pooler_output
