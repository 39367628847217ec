"""A permit's work, in this process: every item ends once, in the right way."""

import base64
import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any, Self

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session
from structlog.testing import capture_logs

from engine.errors import MediaRefused
from engine.request import ImageUsed, Result, Stamp
from engine.usage import EngineUsage
from media.errors import FetchFailedError, FetchTooLargeError, MediaError
from media.fetched import Fetched, FetchReport
from media.hosts import say_paused
from media.limits import FETCH_LIMITS, IMAGE_LIMITS, ImageLimits, VideoLimits
from storage import items, jobs, served
from storage.blobs import Blobs
from storage.db import clock
from storage.errors import (
    BlobMissingError,
    BlobsUnavailableError,
    DatabaseBusyError,
    DatabaseRefusedError,
    StorageError,
)
from storage.ids import JobId
from storage.items import Ended, Fence, Outcome
from storage.states import ItemState, JobState
from storage.tables import Item, Job
from tasks import prefetch, run, worker
from tasks.app import TaskName
from tasks.config import Config, MediaLimits
from tasks.engines import Prompt
from tasks.errors import DecodersLostError
from tasks.expand import expand
from tasks.finish import finish
from tasks.lines import build_line
from tasks.places import Places
from tasks.prefetch import EXPECTED_IMAGE_BYTES, EXPECTED_VIDEO_BYTES, NUM_PLACES, Preparer
from tasks.run import Runner
from tasks.stores import Stores
from tasks.submit import parse_submission, submit
from tests.storage.rows import let_backoff_end, let_leases_end, put_in_fast_lane
from tests.tasks.fakes import (
    MODEL,
    RED_DOT,
    InstantEngine,
    RecordingDispatcher,
    SeeingEngine,
    build_request,
)
from tests.waiting import wait_until

NUM_FETCH_THREADS = 4

Fetch = Callable[[str, ImageLimits | VideoLimits], bytes]


def fetch_nothing(url: str, limits: ImageLimits | VideoLimits) -> bytes:
    raise AssertionError(url)


def bring(content: bytes) -> Fetched:
    digest = hashlib.sha256(content).hexdigest()
    report = FetchReport("https", "host", "image/png", len(content), digest, 1.5, 0, 1, None)
    return Fetched(content, "image/png", report)


class Rig:
    """A job and what runs it."""

    def __init__(self, stores: Stores, dispatcher: RecordingDispatcher, config: Config) -> None:
        self.stores, self.dispatcher, self.config = stores, dispatcher, config

    def make(self, *requests: dict[str, Any], **options: Any) -> JobId:
        given = {"requests": list(requests), **options}
        job = submit(self.stores, self.dispatcher, parse_submission(given)).job.id
        expand(self.stores, self.dispatcher, self.config, job)
        return job

    def make_chat(self, text: str, **body: Any) -> JobId:
        """A job of the fast lane, as the API makes one."""
        given = parse_submission({"requests": [build_request("chat", text, **body)]})
        job = submit(self.stores, self.dispatcher, given).job.id
        put_in_fast_lane(self.stores.database, job)
        expand(self.stores, self.dispatcher, self.config, job)
        return job

    @contextmanager
    def runner(
        self,
        engine: InstantEngine,
        *,
        fetch: Fetch = fetch_nothing,
        num_places: int = NUM_PLACES,
        **words: Any,
    ) -> Iterator[Runner]:
        with ThreadPoolExecutor(NUM_FETCH_THREADS) as pool:

            def fetch_with_reports(
                wanted: Mapping[str, ImageLimits | VideoLimits],
                tenant: str,
                *,
                is_fast: bool = False,
            ) -> dict[str, Fetched | FetchFailedError]:
                ended: dict[str, Fetched | FetchFailedError] = {}
                for url, limits in wanted.items():
                    try:
                        ended[url] = bring(fetch(url, limits))
                    except FetchFailedError as error:
                        ended[url] = error
                        break
                return ended

            preparer = Preparer(
                self.stores,
                MODEL,
                engine.limits,
                engine.defaults,
                fetch_with_reports,
                pool,
                engine.measure_clip,
                places=Places(num_places),
            )
            runner = Runner(
                self.stores, self.dispatcher, self.config, engine, preparer, worker="w", **words
            )
            runner.start()
            try:
                yield runner
            finally:
                runner.stop()

    def run(self, engine: InstantEngine | None = None, **words: Any) -> None:
        """Permit after permit, until nothing can run."""
        with self.runner(engine or InstantEngine(), **words) as runner:
            while runner.run_chunk():
                pass

    def job(self, job: JobId) -> Job:
        with self.stores.database.read() as session:
            found = jobs.find(session, job)
        assert found is not None
        return found

    def ended(self, job: JobId) -> list[Ended]:
        with self.stores.database.read() as session:
            return items.list_by_line(session, job)

    def count(self, job: JobId) -> dict[ItemState, int]:
        with self.stores.database.read() as session:
            return jobs.count_items(session, job)


@pytest.fixture
def rig(stores: Stores, dispatcher: RecordingDispatcher, config: Config) -> Rig:
    return Rig(stores, dispatcher, config)


def test_worker_that_found_work_goes_on_though_no_permit_is_left(rig: Rig) -> None:
    job = rig.make(*(build_request(f"r-{n}") for n in range(3 * rig.config.chunk_items)))

    with rig.runner(InstantEngine()) as runner:
        runner.run_permits()  # the dispatcher of these tests has no broker, and so no permit

    assert {ItemState.COMPLETED: 3 * rig.config.chunk_items} == rig.count(job)


def test_job_runs_to_its_artifacts_in_input_order(rig: Rig) -> None:
    words = ["one", "a bad picture", "three"] * 20
    job = rig.make(*(build_request(f"r-{n}", word) for n, word in enumerate(words)))

    rig.run()
    assert rig.dispatcher.count(TaskName.FINISH) == 1
    assert JobState.COMPLETED == finish(rig.stores, job)
    assert finish(rig.stores, job) is None

    found = rig.job(job)
    assert (40, 20) == (found.num_completed, found.num_failed)
    output, errors = read_artifacts(rig, found)
    assert [f"r-{n}" for n in range(60) if n % 3 != 1] == [line["custom_id"] for line in output]
    assert [f"r-{n}" for n in range(60) if n % 3 == 1] == [line["custom_id"] for line in errors]
    body = output[0]["response"]["body"]
    assert "> one" == body["choices"][0]["message"]["content"]
    assert {
        "prompt_tokens": 7,
        "completion_tokens": 3,
        "total_tokens": 10,
        "prompt_tokens_details": {"cached_tokens": 0},  # an engine that says nothing of it
    } == body["usage"]
    assert 400 == errors[0]["response"]["status_code"]
    assert "image_unreadable" == errors[0]["response"]["body"]["error"]["code"]


def test_prompt_tokens_that_were_copied_are_told_of_each_line_and_of_the_job(rig: Rig) -> None:
    job = rig.make(
        build_request("r-1"),
        build_request("r-2", num_images=1),
        build_request("r-3", "bad picture"),
    )

    rig.run(SeeingEngine())
    finish(rig.stores, job)

    found = rig.job(job)
    output, _ = read_artifacts(rig, found)
    usages = [line["response"]["body"]["usage"] for line in output]
    assert [{"cached_tokens": 2}] * 2 == [usage["prompt_tokens_details"] for usage in usages]
    assert 4 == found.num_cached_tokens


def read_artifacts(rig: Rig, job: Job) -> tuple[list[Any], list[Any]]:
    number = job.finish_attempt
    return tuple(  # type: ignore[return-value]
        [
            json.loads(line)
            for line in rig.stores.blobs.read(
                f"{job.tenant_id}/{job.id}/{name}.{number}.jsonl"
            ).splitlines()
        ]
        for name in ("output", "errors")
    )


def test_all_failed_leaves_no_output_file(rig: Rig) -> None:
    job = rig.make(build_request("a", "a bad picture"))

    rig.run()
    finish(rig.stores, job)

    found = rig.job(job)
    assert JobState.COMPLETED == found.state
    assert found.output_file_id is None
    assert found.error_file_id is not None


def test_transient_failure_is_tried_again_and_ends_after_its_attempts(rig: Rig) -> None:
    job = rig.make(build_request("a", "bad luck"), build_request("b", "a bad picture"))

    for _ in range(3):
        rig.run()
        let_backoff_end(rig.stores.database)

    first, second = rig.ended(job)
    assert ("engine_failure", 3) == (first.error_code, first.attempt)
    assert ("image_unreadable", 1) == (second.error_code, second.attempt)


def test_bug_in_a_task_charges_what_the_engine_had_and_spares_the_rest(rig: Rig) -> None:
    job = rig.make(build_request("a", "bad code"), *(build_request(f"r-{n}") for n in range(5)))

    for _ in range(4):
        rig.run()
        let_backoff_end(rig.stores.database)

    assert {ItemState.COMPLETED: 5, ItemState.FAILED: 1} == rig.count(job)
    assert "internal_error" == rig.ended(job)[0].error_code


class LosingBlobs:
    """Some of the blobs cannot be read, or are gone."""

    def __init__(self, blobs: Blobs) -> None:
        self._blobs = blobs
        self.errors: dict[str, StorageError] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._blobs, name)

    def read(self, key: str, **where: Any) -> bytes:
        if key in self.errors:
            raise self.errors[key]
        return self._blobs.read(key, **where)


@pytest.mark.parametrize("is_ahead", [False, True])
def test_store_that_is_down_delays_its_items_charges_none_and_holds_up_no_other(
    rig: Rig, is_ahead: bool
) -> None:
    blobs: Any = LosingBlobs(rig.stores.blobs)
    rig.stores = Stores(rig.stores.database, blobs)
    url = {"type": "image_url", "image_url": {"url": "https://example.org/cat.png"}}
    messages = [{"role": "user", "content": [url, {"type": "text", "text": "cat"}]}]
    near = rig.make(build_request("near", messages=messages))
    far = rig.make(build_request("far", "far"), build_request("farther", "farther"))
    blobs.errors[rig.job(far).manifest_key] = BlobsUnavailableError()
    fetched = threading.Event()

    def fetch(url: str, limits: ImageLimits | VideoLimits) -> bytes:
        fetched.wait(0.2)  # the other manifest is asked for meanwhile
        return base64.b64decode(RED_DOT.split(",")[1])

    engine = AheadEngine() if is_ahead else InstantEngine()
    sent = rig.dispatcher.count(TaskName.RUN_CHUNK)
    with rig.runner(engine, fetch=fetch) as runner:
        assert 3 == runner.run_chunk()
        assert 0 == runner.run_chunk()  # not again at once, as it would be down all the same
        blobs.errors.clear()
        let_backoff_end(rig.stores.database)
        assert 2 == runner.run_chunk()

    assert sent == rig.dispatcher.count(TaskName.RUN_CHUNK)
    assert {ItemState.COMPLETED: 1} == rig.count(near)
    assert [("> far", 2), ("> farther", 2)] == [(one.text, one.attempt) for one in rig.ended(far)]
    with rig.stores.database.read() as session:
        assert [0, 0, 0] == list(session.scalars(select(Item.charged)))


class AheadEngine(InstantEngine):
    """Takes all that there is before it answers, as the real one may."""

    def stream(self, prompts: Iterable[Prompt]) -> Iterator[Result]:
        taken: list[Prompt] = []
        failed: Exception | None = None
        try:
            taken.extend(prompts)
        except StorageError as error:
            failed = error
        yield from super().stream(taken)
        if failed is not None:
            raise failed


class ReadingEngine(InstantEngine):
    """Reads what is given as a callable before it answers, as the real one does."""

    def answer(self, prompt: Prompt) -> Result:
        try:
            prompt.messages[0]["content"][1]["image"]()
        except MediaError as error:
            refused = MediaRefused(str(error), code=error.code, retryable=error.retryable)
            return Result.failed(prompt.name, refused)
        return super().answer(prompt)


def test_uploaded_file_that_cannot_be_read_now_charges_nobody_however_often(rig: Rig) -> None:
    blobs: Any = LosingBlobs(rig.stores.blobs)
    rig.stores = Stores(rig.stores.database, blobs)
    given = parse_submission({"requests": [build_request("x")]})
    upload = submit(rig.stores, rig.dispatcher, given).job
    part = {"type": "image_file", "image_file": {"file_id": f"file-{upload.input_file_id.hex}"}}
    content = [{"type": "text", "text": "cat"}, part]
    job = rig.make(build_request("a", messages=[{"role": "user", "content": content}]))

    blobs.errors[upload.manifest_key] = BlobsUnavailableError()
    for _ in range(5):
        rig.run(ReadingEngine())  # once each time, for it waits
        let_backoff_end(rig.stores.database)
        assert {ItemState.PENDING: 1} == rig.count(job)
    blobs.errors.clear()
    rig.run(ReadingEngine())

    assert [("> cat", 6)] == [(one.text, one.attempt) for one in rig.ended(job)]


def test_upload_that_is_too_large_for_a_picture_is_never_read(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = parse_submission({"requests": [build_request("x")]})
    upload = submit(rig.stores, rig.dispatcher, given).job
    part = {"type": "image_file", "image_file": {"file_id": f"file-{upload.input_file_id.hex}"}}
    job = rig.make(
        build_request("a", messages=[{"role": "user", "content": [part]}]), build_request("b")
    )
    monkeypatch.setattr(prefetch, "IMAGE_LIMITS", replace(IMAGE_LIMITS, max_bytes=10))
    engine = InstantEngine()

    rig.run(engine)

    assert ["image_too_large", None] == [one.error_code for one in rig.ended(job)]
    assert 1 == len(engine.prompts)


def test_lines_whose_manifest_is_gone_fail_and_spare_the_rest(rig: Rig) -> None:
    blobs: Any = LosingBlobs(rig.stores.blobs)
    rig.stores = Stores(rig.stores.database, blobs)
    gone, there = rig.make(build_request("gone")), rig.make(build_request("there", "there"))
    blobs.errors[rig.job(gone).manifest_key] = BlobMissingError()

    rig.run()

    assert ["input_file_missing"] == [one.error_code for one in rig.ended(gone)]
    assert ["> there"] == [one.text for one in rig.ended(there)]


def test_bug_while_a_picture_is_fetched_leaves_no_item_in_the_air(rig: Rig) -> None:
    url = {"type": "image_url", "image_url": {"url": "https://example.org/cat.png"}}
    messages = [{"role": "user", "content": [url, {"type": "text", "text": "cat"}]}]
    job = rig.make(build_request("r-0", messages=messages), build_request("r-1", "bad code"))
    is_met = threading.Event()

    def fetch(url: str, limits: ImageLimits | VideoLimits) -> bytes:
        assert is_met.wait(60)
        time.sleep(0.2)  # for the engine, to end of it
        return base64.b64decode(RED_DOT.split(",")[1])

    with rig.runner(InstantEngine(on_prompt=lambda _: is_met.set()), fetch=fetch) as runner:
        assert 2 == runner.run_chunk()

    assert {ItemState.PENDING: 2} == rig.count(job)


def test_bug_over_one_item_costs_its_neighbours_no_try(rig: Rig) -> None:
    def fetch(url: str, limits: ImageLimits | VideoLimits) -> bytes:
        if "bug" in url:
            raise ZeroDivisionError
        time.sleep(0.1)
        return b"a picture"

    urls = [f"https://host/{name}" for name in ("a", "bug", "b")]
    job = rig.make(*(build_request(url, messages=show(url)) for url in urls))

    rig.run(fetch=fetch)

    assert {ItemState.COMPLETED: 2, ItemState.PENDING: 1} == rig.count(job)
    with rig.stores.database.read() as session:
        assert [0, 1, 0] == list(session.scalars(select(Item.charged).order_by(Item.line)))


def test_chunks_share_the_engine_and_a_long_one_holds_up_no_other(rig: Rig) -> None:
    job = rig.make(*(build_request(f"r-{n}", f"text {n}") for n in range(32)))
    door = threading.Event()

    def wait_at_first(text: str) -> None:
        if text == "text 0":
            assert door.wait(60)

    with rig.runner(InstantEngine(on_prompt=wait_at_first)) as runner:
        slow = threading.Thread(target=runner.run_chunk)
        slow.start()
        while not runner.num_in_flight:
            pass
        assert 16 == runner.run_chunk()
        assert {ItemState.COMPLETED: 16, ItemState.LEASED: 16} == rig.count(job)
        door.set()
        slow.join()

    assert {ItemState.COMPLETED: 32} == rig.count(job)


def test_fast_lane_does_not_wait_for_chunks_in_flight_and_goes_first_in_the_engine(
    rig: Rig,
) -> None:
    rig.make(*(build_request(f"r-{n}", "bulk") for n in range(16)))
    door = threading.Event()

    def wait_in_bulk(text: str) -> None:
        assert text == "hello" or door.wait(60)

    engine = InstantEngine(on_prompt=wait_in_bulk)
    with rig.runner(engine) as runner:
        slow = threading.Thread(target=runner.run_chunk)
        slow.start()
        while not runner.num_in_flight:
            pass
        bulk = rig.make(*(build_request(f"r-{n}", "bulk") for n in range(3)))
        chat = rig.make_chat("hello")

        assert 1 == runner.run_chunk(is_fast=True)
        assert {ItemState.COMPLETED: 1} == rig.count(chat)
        assert 0 == runner.run_chunk(is_fast=True), "bulk is none of its business"
        assert {ItemState.PENDING: 3} == rig.count(bulk)
        door.set()
        slow.join()

    assert {jobs.FAST_LANE: 1, 0: 16} == Counter(prompt.priority for prompt in engine.prompts)


def test_lost_leases_are_let_go_and_fenced(rig: Rig) -> None:
    job = rig.make(*(build_request(f"r-{n}", f"text {n}") for n in range(4)))

    def lose_leases(text: str) -> None:
        if text == "text 1":
            let_leases_end(rig.stores.database)
            with rig.stores.database.write() as session:
                items.expire_leases(session)

    with rig.runner(InstantEngine(on_prompt=lose_leases)) as runner:
        thread = threading.Thread(target=runner.run_chunk)
        thread.start()
        while thread.is_alive():
            thread.join(0.1)
            runner.beat()

        assert 0 == runner.num_in_flight
    let_backoff_end(rig.stores.database)
    rig.run()

    assert {ItemState.COMPLETED: 4} == rig.count(job)


def test_engine_stops_working_on_items_that_were_lost(rig: Rig) -> None:
    job = rig.make(*(build_request(f"r-{n}", f"text {n}") for n in range(2)))
    begun, door = threading.Event(), threading.Event()

    def wait(text: str) -> None:
        begun.set()
        assert door.wait(60)

    engine = InstantEngine(on_prompt=wait)
    with rig.runner(engine) as runner:
        thread = threading.Thread(target=runner.run_chunk)
        thread.start()
        assert begun.wait(60)
        cancel(rig, job)
        runner.beat()

        assert 0 == runner.num_in_flight
        assert {f"{item}.1" for item in (1, 2)} == engine.aborted
        door.set()
        thread.join()


def test_beat_says_what_the_engine_has_done_until_the_worker_leaves(rig: Rig) -> None:
    engine = InstantEngine()
    with rig.runner(engine) as runner:
        runner.beat()
        before = list_reports(rig)
        engine.usage = EngineUsage(1.0, 2.0, 3.5, 36, 100, 60, 4, 0.5, None, 3, 2, 1)
        with capture_logs() as logs:
            runner.beat()
            engine.usage = replace(engine.usage, num_tokens=90)
            runner.beat()
        (during,) = list_reports(rig)

    assert [] == before  # an engine that does not count
    assert (MODEL, 0) == (during.model, during.number)
    assert asdict(engine.usage) == during.usage
    assert [("w", 0)] == [
        (log["worker"], log["number"]) for log in logs if log["event"] == "worker_numbered"
    ]
    assert [] == list_reports(rig)


def test_worker_whose_engine_cannot_say_what_it_does_goes_on_leasing(rig: Rig) -> None:
    class Silent(InstantEngine):
        def read_usage(self) -> EngineUsage | None:
            raise RuntimeError

    rig.make(build_request("r-1", "text"))
    with rig.runner(Silent()) as runner:
        runner._last_beat -= rig.config.lease_s  # it was late before
        with pytest.raises(RuntimeError):
            runner.beat()

        assert 1 == runner.run_chunk()


def list_reports(rig: Rig) -> list[served.Reported]:
    with rig.stores.database.read() as session:
        return served.list_reports(session)


def test_engine_that_finishes_nothing_is_given_up_and_what_it_had_runs_alone(rig: Rig) -> None:
    rig.make(*(build_request(f"r-{n}", f"text {n}") for n in range(4)))
    rig.config = rig.config.model_copy(update={"stall_s": 1.5, "heartbeat_s": 0.1})
    given_up, door = threading.Event(), threading.Event()

    def hang(text: str) -> None:
        assert text == "text 0" or door.wait(60)

    with rig.runner(InstantEngine(on_prompt=hang), on_engine_lost=given_up.set) as runner:
        thread = threading.Thread(target=runner.run_chunk)
        thread.start()
        assert given_up.wait(60)
        door.set()
        thread.join()
    let_backoff_end(rig.stores.database)

    with rig.stores.database.write() as session:
        free = items.lease(session, model=MODEL, worker="w", max_items=9)
        alone = items.lease(session, model=MODEL, worker="w", max_items=9)
    assert free is not None
    assert alone is not None
    assert ([3, 4], False) == ([item.line for item in free.items], free.is_alone)
    assert ([2], True) == ([item.line for item in alone.items], alone.is_alone)


def test_items_that_wait_for_a_host_or_for_room_make_no_engine_look_dead(rig: Rig) -> None:
    rig.config = rig.config.model_copy(
        update={"stall_s": 0.5, "heartbeat_s": 0.1, "max_media_bytes": 1}
    )
    job = rig.make(*(build_request(f"r-{n}", messages=show(f"https://host/{n}")) for n in range(2)))
    given_up, door = threading.Event(), threading.Event()

    def fetch(url: str, limits: ImageLimits | VideoLimits) -> bytes:
        assert door.wait(60)
        return b"late"

    with rig.runner(InstantEngine(), fetch=fetch, on_engine_lost=given_up.set) as runner:
        thread = threading.Thread(target=runner.run_chunk)
        thread.start()
        assert not given_up.wait(2.0)
        door.set()
        thread.join()

    assert {ItemState.COMPLETED: 2} == rig.count(job)


def test_item_that_waited_for_a_host_is_no_suspect_when_the_device_is_lost(rig: Rig) -> None:
    waiting = build_request("waiting", messages=show("https://host/a"))
    rig.make(waiting, build_request("unlucky", "lose the device"))
    door = threading.Event()

    def fetch(url: str, limits: ImageLimits | VideoLimits) -> bytes:
        assert door.wait(60)
        return b"late"

    with rig.runner(InstantEngine(), fetch=fetch, on_engine_lost=door.set) as runner:
        runner.run_chunk()

    with rig.stores.database.read() as session:
        found = {item.custom_id: item for item in session.scalars(select(Item))}
    assert {"waiting": False, "unlucky": True} == {n: i.is_suspect for n, i in found.items()}
    assert {"waiting": 0, "unlucky": 1} == {n: i.num_crashes for n, i in found.items()}


def test_commit_that_fails_half_way_repeats_the_other_half_only(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = rig.make(build_request("a"), build_request("b", "a bad picture"))
    monkeypatch.setattr(run, "COMMIT_RETRY_S", 0.01)
    commit = Runner.commit_failures
    tries: list[int] = []

    def fail_once(self: Runner, failures: Any) -> None:
        tries.append(len(failures))
        if len(tries) == 1:
            raise DatabaseBusyError
        commit(self, failures)

    monkeypatch.setattr(Runner, "commit_failures", fail_once)
    with rig.runner(InstantEngine()) as runner:
        runner.run_chunk()

    assert [1, 1] == tries
    assert 0 == runner.num_fenced
    assert {ItemState.COMPLETED: 1, ItemState.FAILED: 1} == rig.count(job)
    assert 1 == rig.dispatcher.count(TaskName.FINISH)


def test_result_that_the_database_refuses_fails_its_item_and_holds_up_no_other(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = rig.make(build_request("a"), build_request("b", "no database takes it"))
    commit = Runner.commit_completions

    def refuse(self: Runner, completions: Any) -> None:
        if any("no database takes it" in one.text for one in completions):
            raise DatabaseRefusedError
        commit(self, completions)

    monkeypatch.setattr(Runner, "commit_completions", refuse)
    with rig.runner(InstantEngine()) as runner:
        for _ in range(rig.config.max_attempts):
            runner.run_chunk()
            let_backoff_end(rig.stores.database)

    good, bad = rig.ended(job)
    assert (ItemState.COMPLETED, ItemState.FAILED) == (good.state, bad.state)
    assert ("internal_error", rig.config.max_attempts) == (bad.error_code, bad.attempt)


def test_chunk_that_ends_after_nobody_commits_waits_for_nobody(rig: Rig) -> None:
    begun, door = threading.Event(), threading.Event()

    def fetch(url: str, limits: ImageLimits | VideoLimits) -> bytes:
        begun.set()
        assert door.wait(60)
        raise say_paused(5.0)

    job = rig.make(build_request("a", messages=show("https://host/a")))
    with rig.runner(InstantEngine(), fetch=fetch) as runner:
        thread = threading.Thread(target=runner.run_chunk)
        thread.start()
        assert begun.wait(60)
        runner.stop()
        door.set()
        thread.join(30)
        assert not thread.is_alive()
        assert {ItemState.LEASED: 1} == rig.count(job)
        assert runner.give_back(10.0)

    assert {ItemState.PENDING: 1} == rig.count(job)


def test_bug_in_a_commit_ends_neither_the_thread_nor_the_items(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = rig.make(build_request("a"))
    with rig.runner(InstantEngine()) as runner:
        with monkeypatch.context() as patched:
            patched.setattr(Runner, "commit_completions", lambda self, completions: 1 // 0)
            runner.run_chunk()
        assert {ItemState.LEASED: 1} == rig.count(job)
        let_leases_end(rig.stores.database)
        with rig.stores.database.write() as session:
            items.expire_leases(session)
        let_backoff_end(rig.stores.database)
        runner.run_chunk()

    assert {ItemState.COMPLETED: 1} == rig.count(job)


def test_stop_string_that_no_jsonb_holds_comes_back_in_the_stamp_all_the_same(rig: Rig) -> None:
    job = rig.make(build_request("a", stop=["end\0", "\\u0000"]))

    rig.run(StampingEngine())

    details = rig.ended(job)[0].details or {}
    assert ["end\ufffd", "\\u0000"] == details["stamp"]["sampling"]["stop"]


class StampingEngine(InstantEngine):
    """Says how it drew, as the real one does."""

    def answer(self, prompt: Prompt) -> Result:
        sampling = {"stop": list(prompt.params.stop_strings)}
        stamp = Stamp("m", None, "float32", "cpu", "0", sampling)
        return replace(super().answer(prompt), stamp=stamp)


def test_idle_worker_finds_work_without_a_permit(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    job = rig.make(*(build_request(f"r-{n}") for n in range(40)))
    monkeypatch.setattr(worker, "IDLE_S", 0.01)
    with rig.runner(InstantEngine()) as runner:
        stop = threading.Event()
        thread = threading.Thread(target=worker.look_when_idle, args=(runner, stop))
        thread.start()
        while rig.count(job) != {ItemState.COMPLETED: 40}:
            assert thread.is_alive()
        stop.set()
        thread.join()


def test_deadline_holds_while_the_database_does_not_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class StuckRunner:
        num_in_flight = 1
        worker = "w"

        def drain(self) -> None:
            never.wait(60)

        abandon = drain

        def give_back(self, within_s: float) -> bool:
            return never.wait(60)

    never, exited = threading.Event(), threading.Event()
    codes: list[int] = []

    def leave(code: int) -> None:
        codes.append(code)
        exited.set()

    monkeypatch.setattr("tasks.worker.os._exit", leave)
    monkeypatch.setattr(worker, "GIVE_BACK_S", 0.05)
    drain = worker.Drain(StuckRunner(), 0.05)  # type: ignore[arg-type]
    drain.on_signal()

    assert exited.wait(60)
    never.set()
    assert [worker.ExitCode.DEADLINE] == codes


def test_drain_gives_back_at_once_what_was_not_begun_without_a_charge(rig: Rig) -> None:
    job = rig.make(*(build_request(f"r-{n}", f"text {n}") for n in range(16)))
    begun, door = threading.Event(), threading.Event()

    def wait(text: str) -> None:
        begun.set()
        assert door.wait(60)

    with rig.runner(InstantEngine(on_prompt=wait)) as runner:
        thread = threading.Thread(target=runner.run_chunk)
        thread.start()
        assert begun.wait(60)
        runner.drain()

        assert {ItemState.PENDING: 15, ItemState.LEASED: 1} == rig.count(job)
        assert 0 == runner.run_chunk()
        door.set()
        thread.join()

    assert {ItemState.PENDING: 15, ItemState.COMPLETED: 1} == rig.count(job)
    with rig.stores.database.write() as session:
        chunk = items.lease(session, model=MODEL, worker="w", max_items=99)
    assert chunk is not None
    assert {0} == {item.charged for item in chunk.items}


def test_worker_that_ends_gives_back_what_a_failed_release_left(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = rig.make(*(build_request(f"r-{n}") for n in range(4)))
    begun, door = threading.Event(), threading.Event()

    def wait(text: str) -> None:
        begun.set()
        assert door.wait(60)

    def refuse(*args: Any, **words: Any) -> Any:
        raise DatabaseBusyError

    released = items.release_all
    answers = [refuse, refuse, released]
    monkeypatch.setattr(items, "release", refuse)
    monkeypatch.setattr(items, "release_all", lambda *a, **words: answers.pop(0)(*a, **words))
    with rig.runner(InstantEngine(on_prompt=wait)) as runner:
        thread = threading.Thread(target=runner.run_chunk)
        thread.start()
        assert begun.wait(60)
        runner.drain()
        door.set()
        thread.join()
    assert {ItemState.LEASED: 3, ItemState.COMPLETED: 1} == rig.count(job)

    assert runner.give_back(60.0)
    assert {ItemState.PENDING: 3, ItemState.COMPLETED: 1} == rig.count(job)
    with rig.stores.database.read() as session:
        assert {0} == set(session.scalars(select(Item.charged)))


def test_lease_that_is_under_way_when_a_worker_ends_is_given_back_and_none_follows(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = rig.make(*(build_request(f"r-{n}") for n in range(4)))
    leasing, door = threading.Event(), threading.Event()
    lease = items.lease

    def lease_slowly(*args: Any, **words: Any) -> Any:
        leasing.set()
        assert door.wait(60)
        return lease(*args, **words)

    def refuse(*args: Any, **words: Any) -> Any:
        raise DatabaseBusyError

    monkeypatch.setattr(items, "lease", lease_slowly)
    monkeypatch.setattr(items, "release", refuse)  # so that nobody else gives it back
    said: list[bool] = []
    with rig.runner(InstantEngine()) as runner:
        threads = [threading.Thread(target=runner.run_chunk)]
        threads[0].start()
        assert leasing.wait(60)
        threads.append(threading.Thread(target=lambda: said.append(runner.give_back(60.0))))
        threads[1].start()
        assert runner.is_draining.wait(60)
        assert 0 == runner.run_chunk()
        assert [] == said
        door.set()
        threads[1].join()

        assert [True] == said
        assert {ItemState.PENDING: 4} == rig.count(job)
        threads[0].join()
    assert {ItemState.PENDING: 4} == rig.count(job)


def test_lease_that_never_comes_back_is_not_said_to_be_given_back(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.make(build_request("a"))
    leasing, door = threading.Event(), threading.Event()

    def hang(*args: Any, **words: Any) -> None:
        leasing.set()
        assert door.wait(60)

    with rig.runner(InstantEngine()) as runner:
        monkeypatch.setattr(runner, "_lease", hang)
        thread = threading.Thread(target=runner.run_chunk)
        thread.start()
        assert leasing.wait(60)
        assert not runner.give_back(0.01)
        door.set()
        thread.join()
        assert runner.give_back(60.0)


def test_deadline_gives_back_what_the_engine_has(rig: Rig) -> None:
    job = rig.make(*(build_request(f"r-{n}", f"text {n}") for n in range(3)))
    begun, door = threading.Event(), threading.Event()

    def wait(text: str) -> None:
        begun.set()
        assert door.wait(60)

    with rig.runner(InstantEngine(on_prompt=wait)) as runner:
        thread = threading.Thread(target=runner.run_chunk)
        thread.start()
        assert begun.wait(60)
        runner.drain()
        runner.abandon()

        assert {ItemState.PENDING: 3} == rig.count(job)
        door.set()
        thread.join()

    assert {ItemState.PENDING: 3} == rig.count(job)
    rig.run()
    assert {ItemState.COMPLETED: 3} == rig.count(job)


def test_lost_device_makes_suspects_that_run_alone(rig: Rig) -> None:
    job = rig.make(
        *(build_request(f"r-{n}", "lose the device" if n == 1 else "good") for n in range(4))
    )
    exits: list[int] = []

    for _ in range(12):
        with rig.runner(InstantEngine(), on_engine_lost=lambda: exits.append(1)) as runner:
            while runner.run_chunk():
                pass
        let_backoff_end(rig.stores.database)

    assert {ItemState.COMPLETED: 3, ItemState.FAILED: 1} == rig.count(job)
    assert "worker_crash" == rig.ended(job)[1].error_code
    assert 3 == len(exits)


@pytest.mark.parametrize("is_measured", [False, True])
def test_lost_decoders_end_the_worker_and_cost_no_item_anything(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, is_measured: bool
) -> None:
    clip = {"type": "video_url", "video_url": {"url": "http://host/clip"}, "segments": {"count": 2}}
    content = [clip] if is_measured else "lose the decoders"
    unlucky = build_request("x", messages=[{"role": "user", "content": content}])
    job = rig.make(build_request("a"), unlucky, build_request("b"))
    engine, ends = InstantEngine(), []

    def measure(encoded: bytes) -> tuple[float, ...]:
        raise DecodersLostError

    monkeypatch.setattr(engine, "measure_clip", measure)
    words: dict[str, Any] = {
        "fetch": lambda *_: b"clip",
        "on_engine_lost": lambda: ends.append(rig.count(job)),
    }

    with capture_logs() as logs, rig.runner(engine, **words) as runner:
        while runner.run_chunk():
            pass

    assert [ItemState.LEASED not in counts for counts in ends] == [True]
    assert ["decoders_lost"] == [log["event"] for log in logs if log["log_level"] == "error"]
    with rig.stores.database.write() as session:
        free = items.lease(session, model=MODEL, worker="another", max_items=9)
    assert free is not None
    assert not free.is_alone
    assert {0} == {item.charged for item in free.items}


def test_nothing_is_leased_while_a_suspect_runs_alone(rig: Rig) -> None:
    job = rig.make(*(build_request(f"r-{n}", f"text {n}") for n in range(6)))
    with rig.stores.database.write() as session:
        chunk = items.lease(session, model=MODEL, worker="dead", max_items=4)
        assert chunk is not None
        items.report_crash(session, [item.fence for item in chunk.items])
    let_backoff_end(rig.stores.database)
    leased: list[int] = []

    def look(text: str) -> None:
        if text not in ("text 4", "text 5"):  # which are no suspects
            time.sleep(0.2)  # for the other threads, to lease what they can
            leased.append(rig.count(job)[ItemState.LEASED])

    with rig.runner(InstantEngine(on_prompt=look)) as runner, ThreadPoolExecutor(3) as threads:

        def work() -> None:
            while runner.run_chunk():
                pass

        for done in [threads.submit(work) for _ in range(3)]:
            done.result()

    assert [1, 1, 1, 1] == leased
    assert {ItemState.COMPLETED: 6} == rig.count(job)


def test_images_come_from_urls_and_files_and_bad_ones_end_their_item_only(rig: Rig) -> None:
    upload = submit(
        rig.stores, rig.dispatcher, parse_submission({"requests": [build_request("x")]})
    ).job
    file_url = f"file-{upload.input_file_id.hex}"

    def image(url: str) -> list[Any]:
        part = {"type": "image_url", "image_url": {"url": url, "detail": "low"}}
        return [{"role": "user", "content": [{"type": "text", "text": url}, part]}]

    def fetch(url: str, limits: ImageLimits | VideoLimits) -> bytes:
        if "gone" in url:
            raise FetchFailedError("Failed to fetch media from URL: 404.")
        return url.encode()

    urls = ["https://host/a", "https://host/gone", file_url, "file-" + "0" * 32]
    job = rig.make(*(build_request(f"r-{n}", messages=image(url)) for n, url in enumerate(urls)))
    engine = InstantEngine()
    rig.run(engine, fetch=fetch)

    ended = rig.ended(job)
    assert [None, "image_fetch_failed", None, "file_not_found"] == [one.error_code for one in ended]
    parts = {
        prompt.messages[0]["content"][0]["text"]: prompt.messages[0]["content"][1]
        for prompt in engine.prompts
    }
    low = {"type": "image", "detail": "low"}
    assert {**low, "image": b"https://host/a"} == parts["https://host/a"]
    assert {**low, "image": parts[file_url]["image"]} == parts[file_url]
    assert rig.stores.blobs.read(upload.manifest_key) == parts[file_url]["image"]()


def test_clips_come_from_urls_files_and_lines_with_what_is_asked_of_their_frames(rig: Rig) -> None:
    upload = submit(
        rig.stores, rig.dispatcher, parse_submission({"requests": [build_request("x")]})
    ).job
    options = {"num_frames": 4, "fps": 2, "start_s": 1, "end_s": 9.5, "keyframes": True}
    asked = {**options, "dedupe_frames": 1.5, "max_pixels": None}
    file_url = f"file-{upload.input_file_id.hex}"
    urls = ["https://host/a.mp4", file_url, "data:video/mp4;base64,AAAA"]
    parts = [{"type": "video_url", "video_url": {"url": url}, **asked} for url in urls]
    requests = [
        build_request(f"{n}", messages=[{"role": "user", "content": [part]}])
        for n, part in enumerate(parts)
    ]
    job = rig.make(*requests)
    engine = InstantEngine()

    def fetch_itself(url: str, limits: ImageLimits | VideoLimits) -> bytes:
        assert isinstance(limits, VideoLimits)
        return url.encode()

    rig.run(engine, fetch=fetch_itself)

    assert {ItemState.COMPLETED: 3} == rig.count(job)
    contents = [prompt.messages[0]["content"] for prompt in engine.prompts]
    seen = [content[0] for content in contents if isinstance(content, list)]  # x has only a text
    sources = [part.get("video", part.get("video_url")) for part in seen]
    assert b"https://host/a.mp4" in sources
    assert {"url": urls[2]} in sources
    assert [rig.stores.blobs.read(upload.manifest_key)] == [s() for s in sources if callable(s)]
    sampling = {**options, "dedupe_frames": 1.5}
    assert [sampling] * 3 == [{key: part.get(key) for key in sampling} for part in seen]
    assert not any("max_pixels" in part for part in seen)


def test_address_of_a_clip_that_is_shown_as_a_picture_too_may_bring_a_clip(rig: Rig) -> None:
    def fetch(url: str, limits: ImageLimits | VideoLimits) -> bytes:
        assert isinstance(limits, VideoLimits)
        return b"a clip"

    url = {"url": "https://host/a.gif"}
    content = [
        {"type": "video_url", "video_url": url},
        {"type": "image_url", "image_url": url},
    ]
    job = rig.make(build_request("a", messages=[{"role": "user", "content": content}]))
    rig.run(fetch=fetch)

    assert {ItemState.COMPLETED: 1} == rig.count(job)


def test_objects_are_fetched_in_the_name_of_their_tenant(rig: Rig) -> None:
    rig.config = rig.config.model_copy(update={"media_s3_buckets": ("s3://photographs",)})
    asked: list[tuple[str, str]] = []

    def fetch(
        wanted: Mapping[str, ImageLimits | VideoLimits], tenant: str, *, is_fast: bool = False
    ) -> dict[str, Fetched]:
        asked.extend((url, tenant) for url in wanted)
        return {url: bring(url.encode()) for url in wanted}

    part = {"type": "video_url", "video_url": {"url": "s3://photographs/a.mp4"}}
    request = build_request("a", messages=[{"role": "user", "content": [part]}])
    job = rig.make(request, tenant="somebody")
    engine = InstantEngine()
    with ThreadPoolExecutor(4) as pool:
        preparer = Preparer(
            rig.stores, MODEL, engine.limits, engine.defaults, fetch, pool, engine.measure_clip
        )
        runner = Runner(rig.stores, rig.dispatcher, rig.config, engine, preparer, worker="w")
        runner.start()
        runner.run_chunk()
        runner.stop()

    assert {ItemState.COMPLETED: 1} == rig.count(job)
    assert [("s3://photographs/a.mp4", "somebody")] == asked


def test_item_whose_host_asked_for_a_pause_waits_for_it_and_loses_no_try(rig: Rig) -> None:
    is_paused = True

    def fetch(url: str, limits: ImageLimits | VideoLimits) -> bytes:
        if is_paused:
            raise say_paused(200.0)
        return b"a picture"

    job = rig.make(build_request("a", messages=show("https://host/a")))
    for _ in range(5):
        rig.run(fetch=fetch)
        with rig.stores.database.read() as session:
            (item,) = session.scalars(select(Item))
            now = session.scalars(select(clock())).one()
            assert (ItemState.PENDING, 0) == (item.state, item.charged)
            assert 100 < item.not_before - now <= 200
        let_backoff_end(rig.stores.database)
    is_paused = False
    rig.run(fetch=fetch)

    assert {ItemState.COMPLETED: 1} == rig.count(job)


def test_items_of_a_host_that_asked_for_a_pause_go_back_together(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_together: list[int] = []
    release = items.release

    def note(session: Session, fences: Sequence[Fence], *, wait_s: float = 0.0) -> Outcome:
        num_together.append(len(fences))
        return release(session, fences, wait_s=wait_s)

    def fetch(url: str, limits: ImageLimits | VideoLimits) -> bytes:
        raise say_paused(200.0)

    monkeypatch.setattr(items, "release", note)
    job = rig.make(*(build_request(f"{n}", messages=show(f"https://host/{n}")) for n in range(16)))
    rig.config = rig.config.model_copy(update={"commit_s": 5.0})
    with rig.runner(InstantEngine(), fetch=fetch) as runner:
        runner.run_chunk()

    assert {ItemState.PENDING: 16} == rig.count(job)
    assert 16 == sum(num_together)
    assert len(num_together) <= 2


def test_bytes_of_pictures_are_bounded_over_all_chunks_and_free_in_the_end(rig: Rig) -> None:
    def image(number: int) -> list[Any]:
        part = {"type": "image_url", "image_url": {"url": f"https://host/{number}"}}
        return [{"role": "user", "content": [{"type": "text", "text": f"{number}"}, part]}]

    job = rig.make(*(build_request(f"r-{n}", messages=image(n)) for n in range(32)))
    # For two pictures that have not come yet, and what is kept for the fast lane.
    room = 2 * (EXPECTED_IMAGE_BYTES + 1000) * 8 // 7
    rig.config = rig.config.model_copy(update={"max_media_bytes": room})
    now, most, held = 0, 0, []
    lock = threading.Lock()

    def fetch(url: str, limits: ImageLimits | VideoLimits) -> bytes:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.002)
        held.append(runner.num_media_bytes)
        with lock:
            now -= 1
        return b"x" * 100

    with rig.runner(InstantEngine(), fetch=fetch) as runner:
        threads = [threading.Thread(target=runner.run_chunk) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert 0 == runner.num_media_bytes

    assert {ItemState.COMPLETED: 32} == rig.count(job)
    assert most <= 2
    assert EXPECTED_IMAGE_BYTES < max(held) <= room


def test_large_picture_waits_for_room_with_nothing_in_hand_and_comes(rig: Rig) -> None:
    large = bytes(EXPECTED_IMAGE_BYTES + 1)
    asked: list[tuple[str, int]] = []

    def fetch(url: str, limits: ImageLimits | VideoLimits) -> bytes:
        asked.append((url, limits.max_bytes))
        content = large if "large" in url else b"small"
        if len(content) > limits.max_bytes:
            raise FetchTooLargeError
        return content

    urls = [f"https://host/{name}" for name in ("large-1", "large-2", "small")]
    job = rig.make(*(build_request(f"r-{n}", messages=show(url)) for n, url in enumerate(urls)))
    rig.config = rig.config.model_copy(update={"max_media_bytes": 2 * EXPECTED_IMAGE_BYTES})
    with rig.runner(InstantEngine(), fetch=fetch) as runner:
        runner.run_chunk()
        assert 0 == runner.num_media_bytes

    assert {ItemState.COMPLETED: 3} == rig.count(job)
    assert ("https://host/small", IMAGE_LIMITS.max_bytes) not in asked
    assert {
        ("https://host/large-1", most) for most in (EXPECTED_IMAGE_BYTES, IMAGE_LIMITS.max_bytes)
    } <= {*asked}


def test_pictures_beside_a_large_one_are_let_go_while_it_waits_for_room(rig: Rig) -> None:
    class Counted(bytes):
        num_held = 0

        def __new__(cls, content: bytes) -> Self:
            cls.num_held += 1
            return super().__new__(cls, content)

        def __del__(self) -> None:
            type(self).num_held -= 1

    held: list[int] = []

    def fetch(url: str, limits: ImageLimits | VideoLimits) -> bytes:
        if "large" not in url:
            held.append(Counted.num_held)
            return Counted(b"small")
        if limits.max_bytes < IMAGE_LIMITS.max_bytes:
            raise FetchTooLargeError
        return b"large"

    content = [
        part for name in ("small", "large") for part in show(f"https://host/{name}")[0]["content"]
    ]
    rig.config = rig.config.model_copy(update={"limit_mm_per_prompt": MediaLimits(image=2)})
    job = rig.make(build_request("a", messages=[{"role": "user", "content": content}]))
    rig.run(fetch=fetch)

    assert {ItemState.COMPLETED: 1} == rig.count(job)
    assert [0, 0] == held  # at the second time nothing of the first is left


def test_few_large_ones_hold_up_no_small_one(rig: Rig) -> None:
    door = threading.Event()

    def fetch(url: str, limits: ImageLimits | VideoLimits) -> bytes:
        assert "clip" not in url or door.wait(60)
        return b"here"

    def show_clip(url: str) -> list[Any]:
        return [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": url}}]}]

    clips = [show_clip(f"https://host-{number}/clip") for number in range(2)]
    messages = [*clips, show("https://host/picture")]
    job = rig.make(*(build_request(f"{n}", messages=one) for n, one in enumerate(messages)))
    room = EXPECTED_VIDEO_BYTES * 3 // 2  # for one clip that has not come yet, and some pictures
    rig.config = rig.config.model_copy(update={"max_media_bytes": room})
    with rig.runner(InstantEngine(), fetch=fetch) as runner:
        thread = threading.Thread(target=runner.run_chunk)
        thread.start()
        wait_until(lambda: rig.count(job).get(ItemState.COMPLETED, 0) >= 1)
        door.set()
        thread.join()
        assert 0 == runner.num_media_bytes

    assert {ItemState.COMPLETED: 3} == rig.count(job)


def show(url: str) -> list[Any]:
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]


def test_pictures_of_one_item_are_bounded_together(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefetch, "IMAGE_LIMITS", ImageLimits(max_bytes=100))
    monkeypatch.setattr(prefetch, "VIDEO_LIMITS", VideoLimits(max_bytes=100))
    monkeypatch.setattr(prefetch, "EXPECTED_IMAGE_BYTES", 10)
    words = {"max_media_bytes": 150, "limit_mm_per_prompt": MediaLimits(image=2)}
    rig.config = rig.config.model_copy(update=words)

    def fetch(url: str, limits: ImageLimits | VideoLimits) -> bytes:
        num_bytes = int(url.rpartition("-")[2])
        if num_bytes > limits.max_bytes:
            raise FetchTooLargeError
        return bytes(num_bytes)

    def ask(*sizes: int) -> dict[str, Any]:
        urls = [f"https://host/{place}-{size}" for place, size in enumerate(sizes)]
        content = [part for url in urls for part in show(url)[0]["content"]]
        return build_request(f"{sizes}", messages=[{"role": "user", "content": content}])

    job = rig.make(ask(100), ask(90, 60), ask(90, 61), ask(101))
    with rig.runner(InstantEngine(), fetch=fetch) as runner:
        runner.run_chunk()
        assert 0 == runner.num_media_bytes

    ended = rig.ended(job)
    assert [None, None, "fetch_too_large", "fetch_too_large"] == [one.error_code for one in ended]
    assert "together" in (ended[2].error_message or "")
    assert "together" not in (ended[3].error_message or "")


def test_host_that_lets_us_wait_holds_up_no_other_of_its_chunk(rig: Rig) -> None:
    door = threading.Event()

    def fetch(url: str, limits: ImageLimits | VideoLimits) -> bytes:
        assert "slow" not in url or door.wait(60)
        return b"here"

    hosts = [*["slow"] * 12, *["quick"] * 4]
    job = rig.make(
        *(build_request(f"{n}", messages=show(f"https://{h}/{n}")) for n, h in enumerate(hosts))
    )
    with rig.runner(InstantEngine(), fetch=fetch, num_places=NUM_FETCH_THREADS) as runner:
        thread = threading.Thread(target=runner.run_chunk)
        thread.start()
        wait_until(lambda: rig.count(job).get(ItemState.COMPLETED, 0) >= 4)
        assert {ItemState.COMPLETED: 4, ItemState.LEASED: 12} == rig.count(job)
        door.set()
        thread.join()
        assert 0 == runner.num_media_bytes

    assert {ItemState.COMPLETED: 16} == rig.count(job)


def test_slow_host_behind_quick_ones_has_no_more_than_its_share(rig: Rig) -> None:
    door = threading.Event()

    def fetch(url: str, limits: ImageLimits | VideoLimits) -> bytes:
        assert "slow" not in url or door.wait(60)
        return b"here"

    def ask(name: str, *urls: str) -> dict[str, Any]:
        content = [part for url in urls for part in show(url)[0]["content"]]
        return build_request(name, messages=[{"role": "user", "content": content}])

    most = FETCH_LIMITS.max_connections_per_item
    rig.config = rig.config.model_copy(update={"limit_mm_per_prompt": MediaLimits(image=most + 1)})
    mixed = (
        ask(name, *(f"https://{name}/{n}" for n in range(most)), f"https://slow/{name}")
        for name in ("a", "b")
    )
    job = rig.make(*mixed, ask("c", "https://c/"))
    with rig.runner(InstantEngine(), fetch=fetch, num_places=most + 1) as runner:
        thread = threading.Thread(target=runner.run_chunk)
        thread.start()
        wait_until(lambda: rig.count(job).get(ItemState.COMPLETED, 0) >= 1)
        door.set()
        thread.join()

    assert {ItemState.COMPLETED: 3} == rig.count(job)


def test_chat_waits_for_no_picture_of_bulk_work(rig: Rig) -> None:
    door = threading.Event()
    num_waiting = 0

    def fetch(url: str, limits: ImageLimits | VideoLimits) -> bytes:
        nonlocal num_waiting
        num_waiting += "bulk" in url
        assert "bulk" not in url or door.wait(60)
        return b"here"

    bulk = [rig.make(build_request(f"{n}", messages=show(f"https://bulk-{n}/"))) for n in range(4)]
    num_places = NUM_FETCH_THREADS - 1
    with rig.runner(InstantEngine(), fetch=fetch, num_places=num_places) as runner:
        threads = [threading.Thread(target=runner.run_chunk) for _ in bulk]
        for thread in threads:
            thread.start()
        wait_until(lambda: num_waiting >= num_places)
        chat = rig.make_chat("", messages=show("https://host/a"))
        runner.run_chunk(is_fast=True)  # where no stand-in was quicker
        wait_until(lambda: {ItemState.COMPLETED: 1} == rig.count(chat))
        assert [{ItemState.LEASED: 1}] * 4 == [rig.count(job) for job in bulk]
        door.set()
        for thread in threads:
            thread.join()

    assert [{ItemState.COMPLETED: 1}] * 4 == [rig.count(job) for job in bulk]


def test_chunk_that_only_waits_for_hosts_lets_others_run_beside_it(rig: Rig) -> None:
    num_waiting = rig.config.chunk_items
    door = threading.Event()

    def fetch(url: str, limits: ImageLimits | VideoLimits) -> bytes:
        assert door.wait(60)
        return b"late"

    waiting = rig.make(
        *(build_request(f"r-{n}", messages=show(f"https://host/{n}")) for n in range(num_waiting))
    )
    others = rig.make(*(build_request(f"r-{n}") for n in range(3 * rig.config.chunk_items)))
    with rig.runner(InstantEngine(), fetch=fetch) as runner:
        thread = threading.Thread(target=runner.run_chunk)  # one thread, and one permit
        thread.start()
        wait_until(
            lambda: rig.count(others).get(ItemState.COMPLETED, 0) >= 3 * rig.config.chunk_items,
            limit_s=60,
        )
        assert {ItemState.LEASED: num_waiting} == rig.count(waiting)
        assert thread.is_alive()
        door.set()
        thread.join()

    assert {ItemState.COMPLETED: num_waiting} == rig.count(waiting)


def test_chunk_beside_which_no_thread_can_be_started_waits_alone(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = rig.make(build_request("a", messages=show("https://host/a")))
    tried, start = threading.Event(), threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "stand-in":
            tried.set()
            raise RuntimeError("can't start new thread")
        start(thread)

    def fetch(url: str, limits: ImageLimits | VideoLimits) -> bytes:
        assert tried.wait(60)
        return b"late"

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with rig.runner(InstantEngine(), fetch=fetch) as runner:
        assert 1 == runner.run_chunk()

    (ended,) = rig.ended(job)
    assert (ItemState.COMPLETED, 1) == (ended.state, ended.attempt)


def test_chunk_whose_items_are_lost_waits_for_no_host(rig: Rig) -> None:
    begun, door = threading.Event(), threading.Event()
    num_fetched = 0

    def fetch(url: str, limits: ImageLimits | VideoLimits) -> bytes:
        nonlocal num_fetched
        num_fetched += 1
        begun.set()
        assert door.wait(60)
        return b"late"

    requests = (build_request(f"{n}", messages=show(f"https://host/{n}")) for n in range(20))
    job = rig.make(*requests)
    with rig.runner(InstantEngine(), fetch=fetch) as runner:
        thread = threading.Thread(target=runner.run_chunk)
        thread.start()
        assert begun.wait(60)
        cancel(rig, job)
        runner.beat()
        thread.join(30)
        assert not thread.is_alive()
        assert 0 == runner.num_media_bytes
        door.set()

    assert {ItemState.CANCELLED: 20} == rig.count(job)
    assert num_fetched <= NUM_FETCH_THREADS  # those that were waiting for a thread are not begun


def test_drain_ends_also_what_runs_beside_a_chunk_that_waits(rig: Rig) -> None:
    door = threading.Event()
    begun = threading.Event()

    def fetch(url: str, limits: ImageLimits | VideoLimits) -> bytes:
        assert door.wait(60)
        return b"late"

    def wait_too(text: str) -> None:
        begun.set()
        assert door.wait(60)

    waiting = rig.make(build_request("a", messages=show("https://host/a")))
    other = rig.make(build_request("b", "b"))
    with rig.runner(InstantEngine(on_prompt=wait_too), fetch=fetch) as runner:
        thread = threading.Thread(target=runner.run_chunk)
        thread.start()
        assert begun.wait(60)
        runner.drain()
        runner.abandon()
        assert [{ItemState.PENDING: 1}] * 2 == [rig.count(job) for job in (waiting, other)]
        door.set()
        thread.join()

    assert [{ItemState.PENDING: 1}] * 2 == [rig.count(job) for job in (waiting, other)]


def test_policy_leaves_images_out_and_says_so(rig: Rig) -> None:
    job = rig.make(build_request("a", num_images=5), image_policy="sample")
    engine = InstantEngine()
    rig.run(engine)

    content = engine.prompts[0].messages[0]["content"]
    assert ["text", "image_url"] == [part["type"] for part in content]  # the default limit is 1
    details = rig.ended(job)[0].details or {}
    assert {"policy": "sample", "num_given": 5, "num_used": 1} == details["image_policy"]


def test_result_says_where_its_media_came_from_and_keeps_their_addresses_out(rig: Rig) -> None:
    upload = submit(
        rig.stores, rig.dispatcher, parse_submission({"requests": [build_request("x")]})
    ).job
    file_url = f"file-{upload.input_file_id.hex}"
    urls = ["https://host/a?signature=hush", RED_DOT, file_url, "https://host/a?signature=hush"]
    content = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    content.append({"type": "video_url", "video_url": {"url": "data:video/jpeg;base64,AA=="}})
    rig.config = rig.config.model_copy(update={"limit_mm_per_prompt": MediaLimits(image=4)})

    class WideEngine(InstantEngine):
        """Takes four pictures."""

        @property
        def limits(self) -> MediaLimits:
            return MediaLimits(image=4)

    job = rig.make(build_request("a", messages=[{"role": "user", "content": content}]))
    rig.run(WideEngine(), fetch=lambda url, limits: b"a picture")

    (ended,) = rig.ended(job)
    line = build_line(job, MODEL, ended)
    fetched = {
        "kind": "image",
        "scheme": "https",
        "host": "host",
        "media_type": "image/png",
        "num_bytes": 9,
        "sha256": hashlib.sha256(b"a picture").hexdigest(),
        "fetch_ms": 1.5,
        "num_redirects": 0,
        "num_tries": 1,
    }
    manifest = rig.stores.blobs.read(upload.manifest_key)
    assert [
        fetched,
        {"kind": "image", "scheme": "data", "media_type": "image/png", "num_bytes": 85},
        {
            "kind": "image",
            "scheme": "file_id",
            "num_bytes": len(manifest),
            "sha256": hashlib.sha256(manifest).hexdigest(),
        },
        fetched,
        {"kind": "video", "scheme": "data", "media_type": "video/jpeg"},
    ] == line["media"]
    assert "hush" not in json.dumps(line)


def test_failure_says_where_its_media_came_from_as_far_as_they_came(rig: Rig) -> None:
    def fetch(url: str, limits: ImageLimits | VideoLimits) -> bytes:
        if "gone" not in url:
            return b"a picture"
        error = FetchFailedError("Failed to fetch media from URL: HTTP 404 error. Check it.")
        report = FetchReport("https", "gone.test", None, 0, None, 2.5, 1, 1, error.code)
        error.facts = asdict(report)
        raise error

    job = rig.make(
        build_request("a", messages=show("https://gone.test/?signature=hush")),
        build_request("b", "a bad picture", num_images=1),
        build_request("c", "bad luck"),
    )
    for _ in range(3):
        rig.run(fetch=fetch)
        let_backoff_end(rig.stores.database)

    gone, bad, unlucky = (build_line(job, MODEL, ended) for ended in rig.ended(job))
    assert [
        {
            "kind": "image",
            "scheme": "https",
            "host": "gone.test",
            "num_bytes": 0,
            "fetch_ms": 2.5,
            "num_redirects": 1,
            "num_tries": 1,
            "error_code": "image_fetch_failed",
        }
    ] == gone["media"]
    assert "hush" not in json.dumps(gone)
    assert 400 == gone["response"]["status_code"]
    assert [("data", 85)] == [(one["scheme"], one["num_bytes"]) for one in bad["media"]]
    assert "media" not in unlucky


def test_sizes_stand_beside_where_media_came_from(rig: Rig) -> None:
    class SeeingEngine(InstantEngine):
        """Says that it has seen a picture."""

        def answer(self, prompt: Prompt) -> Result:
            seen = ImageUsed(0, width=5, height=7, used_width=28, used_height=28, num_tokens=1)
            return replace(super().answer(prompt), images=(seen,))

    job = rig.make(build_request("a", num_images=1))
    rig.run(SeeingEngine())

    (media,) = (rig.ended(job)[0].details or {})["media"]
    assert (5, 7, "data") == (media["width"], media["height"], media["scheme"])


def cancel(rig: Rig, job: JobId) -> None:
    with rig.stores.database.write() as session:
        jobs.cancel(session, rig.job(job).tenant_id, job)
        while items.end_page(session, job, ItemState.CANCELLED).items:
            pass


def test_cancelled_job_gets_its_files(rig: Rig) -> None:
    job = rig.make(*(build_request(f"r-{n}") for n in range(20)))
    with rig.runner(InstantEngine()) as runner:
        runner.run_chunk()
    cancel(rig, job)

    assert JobState.CANCELLED == finish(rig.stores, job)

    output, errors = read_artifacts(rig, rig.job(job))
    assert (16, 4) == (len(output), len(errors))
    assert {"batch_cancelled"} == {line["error"]["code"] for line in errors}
