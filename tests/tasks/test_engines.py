"""A worker's engine decodes where it is told to, and what ends there is judged."""

from contextlib import closing

import pytest

from engine.config import BUNDLED_FOLDER
from engine.errors import ResultError
from engine.inputs import refused
from media.decoder import Threads
from media.errors import DecodeMemoryError, DecoderFailedError, DecodeTimeoutError, MediaError
from media.pool import DecoderPool, count_cores
from tasks.engines import EngineOptions, load_engine
from tasks.retry import Act, judge

needs_model = pytest.mark.skipif(
    not (BUNDLED_FOLDER / "model.safetensors").is_file(), reason="`make train` makes the model"
)


@needs_model
@pytest.mark.parametrize("number", [None, 1])
def test_worker_decodes_in_processes(number: int | None) -> None:
    options = EngineOptions("darkroom-tiny", device="cpu", num_media_processes=number)

    with closing(load_engine(options)) as engine:
        decoder = engine._llm.engine._decoder

        assert isinstance(decoder, DecoderPool)
        assert (number or min(max(count_cores() - 2, 1), 16)) == decoder.num_processes


@needs_model
def test_none_are_started_where_none_are_wanted() -> None:
    options = EngineOptions("darkroom-tiny", device="cpu", num_media_processes=0)

    with closing(load_engine(options)) as engine:
        assert isinstance(engine._llm.engine._decoder, Threads)


@pytest.mark.parametrize(
    ("error", "act"),
    [
        (DecoderFailedError(), Act.RETRY),  # it may have been the machine's fault
        (DecodeTimeoutError(), Act.RETRY),
        (DecodeMemoryError(), Act.FAIL),  # the file's: it is given the same memory each time
    ],
)
def test_ends_of_decoders_are_judged_by_whose_fault_they_may_be(
    error: MediaError, act: Act
) -> None:
    refusal = refused(error)
    told = ResultError(refusal.code, str(refusal), retryable=refusal.retryable)

    assert act is judge(told).act
    assert error.code == judge(told).code
