"""A worker's engine decodes where it is told to."""

from contextlib import closing

import pytest

from engine.config import BUNDLED_FOLDER
from media.decoder import Threads
from media.pool import DecoderPool, count_cores
from tasks.engines import EngineOptions, load_engine

pytestmark = pytest.mark.skipif(
    not (BUNDLED_FOLDER / "model.safetensors").is_file(), reason="`make train` makes the model"
)


@pytest.mark.parametrize("number", [None, 1])
def test_worker_decodes_in_processes(number: int | None) -> None:
    options = EngineOptions("darkroom-tiny", device="cpu", num_media_processes=number)

    with closing(load_engine(options)) as engine:
        decoder = engine._llm.engine._decoder

        assert isinstance(decoder, DecoderPool)
        assert (number or min(max(count_cores() - 2, 1), 16)) == decoder.num_processes


def test_none_are_started_where_none_are_wanted() -> None:
    options = EngineOptions("darkroom-tiny", device="cpu", num_media_processes=0)

    with closing(load_engine(options)) as engine:
        assert isinstance(engine._llm.engine._decoder, Threads)
