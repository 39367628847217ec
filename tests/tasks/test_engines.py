"""A worker's engine starts with what it needs, decodes where it is told to, and its ends are judged."""

import json
import os
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from uuid import UUID

import pytest

from bench.phi3_v import write_phi3_v
from cli.errors import CannotStartError, ExitCode
from cli.service import reported
from engine.config import BUNDLED_FOLDER
from engine.errors import BadConfig, ResultError
from engine.inputs import refused
from engine.request import SamplingParams
from media import pool
from media.decoder import Threads
from media.errors import (
    DecodeMemoryError,
    DecoderFailedError,
    DecodeTimeoutError,
    ImageUnreadableError,
    MediaError,
)
from media.pool import DecoderPool, count_cores
from storage.ids import ItemId, LeaseId
from storage.items import Fence
from tasks.engines import EngineOptions, Prompt, load_engine
from tasks.errors import DecodersLostError
from tasks.retry import Act, judge
from tests.tasks.fakes import RED_DOT

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


def test_what_a_decoder_says_is_a_text_that_databases_keep() -> None:
    """A process that was taken over chooses the words of a refusal."""
    failure = judge(ImageUnreadableError("half a pair \ud800 and \0")).as_failure(
        Fence(ItemId(1), LeaseId(UUID(int=1)), 1)
    )

    assert "half a pair ? and \ufffd" == failure.message


@needs_model
def test_what_an_engine_computes_in_is_said_in_the_stamp() -> None:
    options = EngineOptions(
        "darkroom-tiny",
        device="cpu",
        num_media_processes=0,
        quantization="fp8",
        kv_cache_dtype="fp8",
        enable_prefix_caching=True,
    )
    messages = [{"role": "user", "content": "What is it? " * 9}]
    prompts = [Prompt(name, messages, SamplingParams(max_tokens=1)) for name in "ab"]
    with closing(load_engine(options)) as engine:
        first, again = (result for prompt in prompts for result in engine.stream([prompt]))
        usage = engine.read_usage()

    assert first.stamp is not None
    assert ("fp8", "float8_e4m3fn") == (first.stamp.quantization, first.stamp.kv_cache_dtype)
    assert 0 == first.num_cached_tokens
    assert again.num_cached_tokens
    assert again.num_cached_tokens == usage.num_cached_tokens


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


@needs_model
def test_worker_whose_decoders_do_not_start_any_more_is_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pool, "GIVE_UP_S", 0.0)
    options = EngineOptions("darkroom-tiny", device="cpu", num_media_processes=1)
    picture = {"type": "image_url", "image_url": {"url": RED_DOT}}
    messages = [{"role": "user", "content": [picture]}]
    prompt = Prompt("a", messages, SamplingParams(max_tokens=1))
    with closing(load_engine(options)) as engine:
        decoder = engine._llm.engine._decoder
        assert isinstance(decoder, DecoderPool)
        assert [None] == [result.error for result in engine.stream([prompt])]

        decoder._entry = "tests.media.bad_child:never_ready"
        for pid in decoder.pids:
            os.kill(pid, signal.SIGKILL)

        with pytest.raises(DecodersLostError):
            list(engine.stream([prompt]))
        with pytest.raises(DecodersLostError):
            engine.measure_clip(b"clip")


@needs_model
def test_worker_whose_decoders_do_not_start_yet_is_started_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    defaults = pool.DecoderPool.__init__.__kwdefaults__
    assert defaults is not None
    monkeypatch.setitem(defaults, "entry", "tests.media.bad_child:never_ready")

    with pytest.raises(CannotStartError, match="num_media_processes=1") as caught, reported():
        load_engine(EngineOptions("darkroom-tiny", device="cpu", num_media_processes=1))

    assert ExitCode.UNREACHABLE is caught.value.code


def test_model_that_cannot_hold_a_conversation_is_refused_before_it_is_loaded(
    tmp_path: Path,
) -> None:
    folder = write_phi3_v(tmp_path)  # of full size, and no weights that could be loaded
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))

    with pytest.raises(BadConfig, match="has no chat template") as caught:
        load_engine(EngineOptions(str(folder), max_model_len=64, device="cpu"))
    with pytest.raises(BadConfig, match="it has no weights in safetensors"):
        load_engine(
            EngineOptions(str(folder), max_model_len=64, device="cpu", chat_template="{{ 1 }}")
        )

    assert "\n" not in str(caught.value)


def test_worker_of_the_cpu_queue_loads_no_decoder() -> None:
    program = (
        "import sys, tasks.engines, tasks.worker\n"
        "print(*{'torch', 'numpy', 'PIL', 'media.pool'}.intersection(sys.modules))"
    )

    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )

    assert "" == done.stdout.strip()


def test_worker_of_an_unknown_family_is_told_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "florence2"}')

    with pytest.raises(BadConfig, match="The model type 'florence2' has no adapter") as caught:
        load_engine(EngineOptions(str(tmp_path), device="cpu"))

    assert "qwen2_vl" in str(caught.value)
    assert "docs/adding-a-family.md shows how one is added." in str(caught.value)
