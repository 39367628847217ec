"""Items that are asked in parts: each part once, whatever happens between, and one text in the end."""

import base64
import json
import math
import threading
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from sqlalchemy import select, text

from engine.errors import EngineError, EngineFailure, MediaRefused
from media.limits import ImageLimits, VideoLimits
from storage import items, jobs, parts, tenants
from storage.errors import CommitUnknownError, DatabaseBusyError
from storage.ids import JobId
from storage.items import Ended
from storage.parts import Answer
from storage.states import ItemState, JobState
from storage.tables import Item
from tasks.config import MediaLimits
from tasks.engines import Prompt
from tasks.errors import DeviceLostError
from tasks.finish import finish
from tests.media.files import encode, picture
from tests.storage.rows import let_backoff_end, let_leases_end
from tests.tasks.fakes import RED_DOT, SeeingEngine, build_request
from tests.tasks.test_run import Rig, rig

__all__ = ["rig"]

clips = pytest.importorskip("tests.media.clips")


# What has nothing to do with SQL of its own is tried on one of the two databases.
on_sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


@cache
def build_clip(num_frames: int = 300, shade: int = 0) -> bytes:
    """A frame a second."""
    picture = clips.shades(1, 32, 32)[0] + shade
    made: bytes = clips.clip([picture] * num_frames, fps=1, options={"g": "10"})
    return made


def build_item(
    segments: Any,
    *,
    custom_id: str = "clip",
    num_frames: int = 300,
    url: str | None = None,
    before: tuple[dict[str, Any], ...] = (),
    **body: Any,
) -> dict[str, Any]:
    url = url or "data:video/mp4;base64," + base64.b64encode(build_clip(num_frames)).decode()
    part = {"type": "video_url", "video_url": {"url": url}, "segments": segments}
    content = [part, {"type": "text", "text": "What happens?"}]
    messages = [*before, {"role": "user", "content": content}]
    return build_request(custom_id, messages=messages, **body)


def read_parts(rig: Rig, ended: Ended) -> list[Answer]:
    with rig.stores.database.read() as session:
        return parts.list_by_item(session, [ended.item]).get(ended.item, [])


def read_line(rig: Rig, job: JobId, state: JobState = JobState.COMPLETED) -> Any:
    """The one line of a job of one item, in whichever file it stands."""
    assert state is finish(rig.stores, job)
    found = rig.job(job)
    name = "output" if found.output_file_id else "errors"
    (line,) = rig.stores.blobs.read(f"{found.tenant_id}/{found.id}/{name}.1.jsonl").splitlines()
    return json.loads(line)


def harm_once(name: str, error: EngineError) -> Callable[[Prompt], EngineError | None]:
    left = [error]
    return lambda prompt: left.pop() if prompt.name.endswith(f".{name}") and left else None


def harm_always(*names: str, error: EngineError) -> Callable[[Prompt], EngineError | None]:
    return lambda prompt: error if prompt.name.split(".", 2)[2] in names else None


def test_five_minutes_become_thirty_timed_parts_and_a_summary(rig: Rig) -> None:
    job = rig.make(
        build_item({"seconds": 10}, before=({"role": "system", "content": "Be brief."},))
    )
    engine = SeeingEngine()

    rig.run(engine)
    line = read_line(rig, job)

    assert 31 == len(engine.prompts)
    assert list(range(1, 31)) == [part["number"] for part in line["parts"]]
    for n, part in enumerate(line["parts"]):
        assert (10.0 * n, 10.0 * n + 10) == (part["start_s"], part["end_s"])
        assert [10.0 * n + second for second in range(10)] == part["frame_times_s"]
        assert f"seen from {10 * n} to {10 * n + 9}" == part["text"]
        assert "stop" == part["finish_reason"]
        assert 10 == part["images"][0]["num_frames"]
    body = line["response"]["body"]
    assert "whole 30" == body["choices"][0]["message"]["content"]
    assert {
        "prompt_tokens": 217,
        "completion_tokens": 93,
        "total_tokens": 310,
        "prompt_tokens_details": {"cached_tokens": 62},
    } == body["usage"]
    system, asked = engine.prompts[-1].messages
    assert {"role": "system", "content": "Be brief."} == system
    assert "What happens?" in asked["content"]
    assert "\n[0:00 - 0:10] seen from 0 to 9\n[0:10 - 0:20] seen from 10" in asked["content"]
    assert asked["content"].endswith("\n[4:50 - 5:00] seen from 290 to 299")
    assert (217, 62) == (rig.job(job).num_prompt_tokens, rig.job(job).num_cached_tokens)
    (media,) = line["media"]
    assert ("video", "data", len(build_clip())) == (
        media["kind"],
        media["scheme"],
        media["num_bytes"],
    )


@on_sqlite
def test_window_of_a_clip_is_cut_and_not_the_clip(rig: Rig) -> None:
    request = build_item({"seconds": 10})
    request["body"]["messages"][0]["content"][0] |= {"start_s": 100, "end_s": 125, "fps": 0.5}
    job = rig.make(request)

    rig.run(SeeingEngine())
    line = read_line(rig, job)

    assert [(100, 110), (110, 120), (120, 125)] == [
        (part["start_s"], part["end_s"]) for part in line["parts"]
    ]
    assert [5, 5, 3] == [len(part["frame_times_s"]) for part in line["parts"]]
    assert [100, 125] == [
        line["parts"][0]["frame_times_s"][0],
        line["parts"][2]["frame_times_s"][-1],
    ]


@on_sqlite
def test_parts_come_beside_other_items_and_their_images(rig: Rig) -> None:
    job = rig.make(
        build_request("first", "one"),
        build_item({"count": 3}, num_frames=9),
        build_request("last", "two"),
    )

    rig.run(SeeingEngine())

    assert ["whole 0", "whole 3", "whole 0"] == [ended.text for ended in rig.ended(job)]
    first, clip, _ = rig.ended(job)
    assert [] == read_parts(rig, first)
    assert [(0, 3), (3, 6), (6, 9)] == [(a.start_s, a.end_s) for a in read_parts(rig, clip)]


def test_part_that_fails_is_asked_again_alone(rig: Rig) -> None:
    job = rig.make(build_item({"seconds": 10}))
    engine = SeeingEngine(harm=harm_once("7", EngineFailure()))

    with rig.runner(engine) as runner:
        assert 1 == runner.run_chunk()  # and no more: the delay before the next try may be short
    assert {ItemState.PENDING: 1} == rig.count(job)
    assert 30 == len(engine.prompts)
    let_backoff_end(rig.stores.database)
    rig.run(engine)

    assert ["7", "s1.0"] == engine.names[30:]
    (ended,) = rig.ended(job)
    assert ("whole 30", 2) == (ended.text, ended.attempt)
    assert (217, 62) == (ended.num_prompt_tokens, ended.num_cached_tokens)
    assert 31 * 7 == ended.num_prompt_tokens


@on_sqlite
def test_summary_that_fails_is_asked_again_without_any_part(rig: Rig) -> None:
    job = rig.make(build_item({"seconds": 10}))
    engine = SeeingEngine(harm=harm_once("s1.0", EngineFailure()))

    rig.run(engine)
    let_backoff_end(rig.stores.database)
    rig.run(engine)

    assert ["s1.0", "s1.0"] == engine.names[30:]
    assert ["whole 30"] == [ended.text for ended in rig.ended(job)]


@on_sqlite
def test_part_that_failed_for_good_keeps_its_error_and_costs_no_other(rig: Rig) -> None:
    job = rig.make(build_item({"count": 3}, num_frames=9))
    error = MediaRefused("Damaged.", code="video_unreadable")
    engine = SeeingEngine(harm=harm_always("2", error=error))

    rig.run(engine)
    line = read_line(rig, job)

    assert "whole 2" == line["response"]["body"]["choices"][0]["message"]["content"]
    first, second, third = line["parts"]
    assert {"code": "video_unreadable", "message": "Damaged."} == second["error"]
    assert (None, None, 3.0, 6.0) == (
        second["text"],
        second["frame_times_s"],
        second["start_s"],
        second["end_s"],
    )
    assert "error" not in first
    assert "seen from 6 to 8" == third["text"]


@on_sqlite
def test_part_that_never_gets_better_fails_alone_in_the_end(rig: Rig) -> None:
    job = rig.make(build_item({"count": 3}, num_frames=9))
    engine = SeeingEngine(harm=harm_always("2", error=EngineFailure()))

    for _ in range(4):
        rig.run(engine)
        let_backoff_end(rig.stores.database)

    (ended,) = rig.ended(job)
    assert (ItemState.COMPLETED, "whole 2", 3) == (ended.state, ended.text, ended.attempt)
    assert Counter({"1": 1, "2": 3, "3": 1, "s1.0": 1}) == Counter(engine.names)
    assert [None, "engine_failure", None] == [a.error_code for a in read_parts(rig, ended)]


@on_sqlite
def test_item_without_a_part_that_has_a_text_fails_with_the_first_error(rig: Rig) -> None:
    job = rig.make(build_item({"count": 2}, num_frames=9))
    error = MediaRefused("Damaged.", code="video_unreadable")
    engine = SeeingEngine(harm=harm_always("1", "2", error=error))

    rig.run(engine)
    line = read_line(rig, job)

    assert "video_unreadable" == line["response"]["body"]["error"]["code"]
    assert ["video_unreadable"] * 2 == [part["error"]["code"] for part in line["parts"]]
    assert ["1", "2"] == engine.names


@on_sqlite
def test_one_part_alone_is_the_text(rig: Rig) -> None:
    job = rig.make(build_item({"seconds": 60}, num_frames=9))
    engine = SeeingEngine()

    rig.run(engine)

    (ended,) = rig.ended(job)
    assert ("seen from 0 to 8", 7, 3) == (
        ended.text,
        ended.num_prompt_tokens,
        ended.num_completion_tokens,
    )
    assert ["1"] == engine.names
    assert [(0.0, 9.0)] == [(a.start_s, a.end_s) for a in read_parts(rig, ended)]


@on_sqlite
def test_many_texts_become_one_in_several_rounds(rig: Rig) -> None:
    job = rig.make(build_item({"seconds": 10}, max_tokens=8))
    engine = SeeingEngine(max_model_len=220)

    rig.run(engine)

    summaries = [name for name in engine.names if name.startswith("s")]
    assert len(summaries) > 3
    assert summaries[-1].endswith(".0")
    (ended,) = rig.ended(job)
    assert ended.text is not None
    assert ended.text.startswith("whole ")
    assert 7 * len(engine.prompts) == ended.num_prompt_tokens
    last = engine.prompts[-1].messages[-1]["content"]
    assert "[0:00 - " in last
    assert " - 5:00] whole" in last


def test_drain_keeps_what_is_there_and_the_rest_goes_on_elsewhere_uncharged(rig: Rig) -> None:
    job = rig.make(build_item({"seconds": 10}))
    seventh, door = threading.Event(), threading.Event()
    num_asked = 0

    def wait(text: str) -> None:
        nonlocal num_asked
        num_asked += 1
        if num_asked == 7:
            seventh.set()
            assert door.wait(60)

    first = SeeingEngine(on_prompt=wait)
    with rig.runner(first) as runner:
        thread = threading.Thread(target=runner.run_chunk)
        thread.start()
        assert seventh.wait(60)
        runner.drain()
        door.set()
        thread.join()
    assert {ItemState.PENDING: 1} == rig.count(job)
    with rig.stores.database.read() as session:
        assert [0] == list(session.scalars(select(Item.charged)))

    second = SeeingEngine()
    rig.run(second)

    assert [str(n) for n in range(1, 8)] == first.names
    assert [*(str(n) for n in range(8, 31)), "s1.0"] == second.names
    assert ["whole 30"] == [ended.text for ended in rig.ended(job)]


def test_lost_lease_stops_the_parts_and_the_next_one_asks_for_the_missing(rig: Rig) -> None:
    job = rig.make(build_item({"seconds": 10}))
    num_asked = 0

    def lose_leases(_: str) -> None:
        nonlocal num_asked
        num_asked += 1
        if num_asked == 5:
            runner._committer.flush()
            let_leases_end(rig.stores.database)
            runner.beat()

    first = SeeingEngine(on_prompt=lose_leases)
    with rig.runner(first) as runner:
        runner.run_chunk()
    assert ["1", "2", "3", "4", "5"] == first.names
    assert set(first.names) == {name.split(".")[2] for name in first.aborted}
    with rig.stores.database.write() as session:
        items.expire_leases(session)
    let_backoff_end(rig.stores.database)

    second = SeeingEngine()
    rig.run(second)

    assert ["whole 30"] == [ended.text for ended in rig.ended(job)]
    assert [*(str(n) for n in range(5, 31)), "s1.0"] == second.names


@on_sqlite
def test_cancelled_item_keeps_what_it_had(rig: Rig) -> None:
    job = rig.make(build_item({"seconds": 10}))
    num_asked = 0

    def cancel(_: str) -> None:
        nonlocal num_asked
        num_asked += 1
        if num_asked == 5:
            runner._committer.flush()
            with rig.stores.database.write() as session:
                jobs.cancel(session, rig.job(job).tenant_id, job)
                items.end_page(session, job, ItemState.CANCELLED)
            runner.beat()

    with rig.runner(SeeingEngine(on_prompt=cancel)) as runner:
        runner.run_chunk()
    line = read_line(rig, job, JobState.CANCELLED)

    assert "batch_cancelled" == line["error"]["code"]
    assert [1, 2, 3, 4] == [part["number"] for part in line["parts"]]


@on_sqlite
def test_clip_that_is_another_one_by_now_is_looked_at_anew(rig: Rig) -> None:
    job = rig.make(build_item({"seconds": 10}, url="https://example.org/clip.mp4"))
    fetched = [build_clip(), build_clip(shade=1), build_clip(shade=1)]

    def fetch(url: str, limits: ImageLimits | VideoLimits) -> bytes:
        return fetched.pop(0)

    engine = SeeingEngine(harm=harm_always("7", error=EngineFailure()))
    for _ in range(3):
        rig.run(engine, fetch=fetch)
        let_backoff_end(rig.stores.database)

    assert 3 == Counter(engine.names)["7"]
    assert {2} == {count for name, count in Counter(engine.names).items() if name.isdigit()} - {3}
    (ended,) = rig.ended(job)
    assert "whole 29" == ended.text


@pytest.mark.parametrize(("loses_device", "times"), [(False, 5), (True, 3)])
def test_address_that_never_gives_the_same_clip_ends_its_item(
    rig: Rig, loses_device: bool, times: int
) -> None:
    """Else each lease answers some parts, which excuse the crash, and none of them lasts."""
    job = rig.make(build_item({"count": 3}, url="https://example.org/clip.mp4"))
    num_fetched = num_lost = 0

    def fetch(url: str, limits: ImageLimits | VideoLimits) -> bytes:
        nonlocal num_fetched
        num_fetched += 1
        return build_clip(30, shade=num_fetched)

    def lose(text: str) -> None:
        nonlocal num_lost
        if engine.names[-1] != "2":
            return
        num_lost += 1
        runner._committer.flush()
        if loses_device:
            raise DeviceLostError
        let_leases_end(rig.stores.database)
        with rig.stores.database.write() as session:
            items.expire_leases(session)
        runner.beat()

    for _ in range(8):
        engine = SeeingEngine(on_prompt=lose)
        with rig.runner(engine, fetch=fetch) as runner:
            while runner.run_chunk():
                pass
        let_backoff_end(rig.stores.database)

    (ended,) = rig.ended(job)
    assert "media_changed" == ended.error_code
    assert "another clip or picture each time" in str(ended.error_message)
    assert times == num_lost
    assert [1] == [part.number for part in read_parts(rig, ended)]


@on_sqlite
def test_clip_is_fetched_once_a_lease(rig: Rig) -> None:
    job = rig.make(build_item({"seconds": 10}, url="https://example.org/clip.mp4"))
    asked: list[str] = []

    def fetch(url: str, limits: ImageLimits | VideoLimits) -> bytes:
        asked.append(url)
        return build_clip()

    with rig.runner(SeeingEngine(), fetch=fetch) as runner:
        runner.run_chunk()
        assert 0 == runner.num_media_bytes

    assert {ItemState.COMPLETED: 1} == rig.count(job)
    assert ["https://example.org/clip.mp4"] == asked
    (source,) = read_line(rig, job)["media"]
    assert ("video", len(build_clip())) == (source["kind"], source["num_bytes"])


@on_sqlite
@pytest.mark.parametrize(
    ("url", "segments", "code"),
    [
        ("data:video/mp4;base64,AAAA", {"seconds": 10}, "video_format_not_supported"),
        (None, {"seconds": 0.01}, "too_many_segments"),
        (None, {"count": 3, "overlap": 1000}, "bad_segments"),
    ],
)
def test_clip_that_cannot_be_cut_fails_before_anything_is_asked(
    rig: Rig, url: str | None, segments: dict[str, Any], code: str
) -> None:
    job = rig.make(build_item(segments, url=url), build_request("other", "other"))
    engine = SeeingEngine()

    rig.run(engine)

    first, second = rig.ended(job)
    assert code == first.error_code
    assert "whole 0" == second.text
    assert [] == read_parts(rig, first)


@pytest.mark.parametrize("error", [DatabaseBusyError, CommitUnknownError])
def test_parts_whose_commit_fails_are_committed_again(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    job = rig.make(build_item({"count": 5}, num_frames=9))
    keep = parts.keep
    failures = [error()]

    def fail_once(session: Any, new: Any) -> Any:
        written = keep(session, new)
        if failures:
            raise failures.pop()
        return written

    monkeypatch.setattr("tasks.run.COMMIT_RETRY_S", 0.01)
    monkeypatch.setattr(parts, "keep", fail_once)
    rig.run(SeeingEngine())

    (ended,) = rig.ended(job)
    assert ("whole 5", 1) == (ended.text, ended.attempt)
    assert 5 == len(read_parts(rig, ended))


def test_item_whose_lease_is_gone_before_its_parts_begin_asks_nothing(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = rig.make(build_item({"count": 5}, num_frames=9))
    begin = parts.begin

    def lose(session: Any, *args: Any, **words: Any) -> Any:
        session.execute(text("UPDATE items SET lease_until = 1.0 WHERE state = 'leased'"))
        return begin(session, *args, **words)

    engine = SeeingEngine()
    with rig.runner(engine) as runner, monkeypatch.context() as patch:
        patch.setattr(parts, "begin", lose)
        assert 1 == runner.run_chunk()

    assert [] == engine.names
    assert {ItemState.LEASED: 1} == rig.count(job)  # the sweeper sees to it


# Images


def test_more_images_than_the_model_takes_become_parts(rig: Rig) -> None:
    job = rig.make(build_request("a", "What is there?", num_images=5), image_policy="split")
    engine = SeeingEngine()  # takes two

    rig.run(engine)
    line = read_line(rig, job)

    assert ["1", "2", "3", "s1.0"] == engine.names
    assert [2, 2, 1] == [count_images(prompt) for prompt in engine.prompts[:3]]
    assert all("What is there?" in json.dumps(prompt.messages) for prompt in engine.prompts)
    assert ["seen 5x5 5x5", "seen 5x5 5x5", "seen 5x5"] == [p["text"] for p in line["parts"]]
    assert [[0, 1], [2, 3], [4]] == [[i["index"] for i in p["images"]] for p in line["parts"]]
    assert all("start_s" not in part for part in line["parts"])
    assert "whole 3" == line["response"]["body"]["choices"][0]["message"]["content"]
    asked = engine.prompts[-1].messages[-1]["content"]
    assert "[images 1 - 2] seen 5x5 5x5\n" in asked
    assert asked.endswith("[image 5] seen 5x5")


def count_images(prompt: Prompt) -> int:
    return sum(part["type"] == "image_url" for part in prompt.messages[-1]["content"])


@on_sqlite
def test_images_within_the_limit_are_one_prompt(rig: Rig) -> None:
    job = rig.make(build_request("a", num_images=2, image_policy="split"))
    engine = SeeingEngine()

    rig.run(engine)

    (ended,) = rig.ended(job)
    assert "seen 5x5 5x5" == ended.text
    assert [f"{ended.item}.1"] == [prompt.name for prompt in engine.prompts]
    assert [] == read_parts(rig, ended)


@on_sqlite
def test_message_that_has_no_image_left_in_a_part_is_left_out(rig: Rig) -> None:
    dot = {"type": "image_url", "image_url": {"url": RED_DOT}}
    messages = [{"role": "user", "content": [dot, dot]}, {"role": "user", "content": [dot]}]
    rig.make(build_request("a", messages=messages, image_policy="split"))
    engine = SeeingEngine()

    rig.run(engine)

    assert [1, 1] == [len(prompt.messages) for prompt in engine.prompts[:2]]


# Frames of a clip


SIXTEEN = MediaLimits(frames=16)


def build_clip_item(policy: str | None = None, **options: Any) -> dict[str, Any]:
    """A clip of 300 frames, one a second, without segments."""
    request = build_item(None, image_policy=policy)
    request["body"]["messages"][0]["content"][0] |= options
    return request


@on_sqlite
@pytest.mark.parametrize(
    ("request_", "num_frames"),
    [
        (build_clip_item(), 16),  # the default of 32 is nobody's wish
        (build_clip_item(num_frames=9), 9),
        (build_clip_item(fps=0.05), 15),
        (build_clip_item("sample", num_frames=40), 16),
        (build_clip_item("truncate", num_frames=-1), 16),
        (build_clip_item("sample", fps=1, start_s=100), 16),
        (build_clip_item("reject", num_frames=-1, start_s=290), 10),
        (build_clip_item("split", fps=1, start_s=290), 10),
    ],
)
def test_clip_is_looked_at_in_no_more_frames_than_the_limit(
    rig: Rig, request_: dict[str, Any], num_frames: int
) -> None:
    job = rig.make(request_)

    rig.run(SeeingEngine(limits=SIXTEEN))
    line = read_line(rig, job)

    assert "parts" not in line
    assert num_frames == line["images"][0]["num_frames"]


@on_sqlite
@pytest.mark.parametrize(
    ("options", "given"), [({"fps": 1}, 300), ({"num_frames": -1, "end_s": 20}, 21)]
)
def test_clip_that_turns_out_to_have_too_many_frames_is_refused(
    rig: Rig, options: dict[str, Any], given: int
) -> None:
    job = rig.make(build_clip_item(**options))
    engine = SeeingEngine(limits=SIXTEEN)

    rig.run(engine)

    (ended,) = rig.ended(job)
    assert "too_many_frames" == ended.error_code
    assert "At most 16 frame(s) of a clip may be looked at" in str(ended.error_message)
    assert f"asks for {given}." in str(ended.error_message)
    assert [] == engine.prompts


@on_sqlite
def test_each_segment_of_a_slow_clip_sees_what_is_shown(rig: Rig) -> None:
    slides = clips.clip(clips.shades(6), times_ms=[n * 5000 for n in range(6)])
    url = "data:video/mp4;base64," + base64.b64encode(slides).decode()
    job = rig.make(build_item({"seconds": 2}, url=url))

    rig.run(SeeingEngine())
    line = read_line(rig, job)

    assert [(2.0 * n, 2.0 * n + 2) for n in range(15)] == [
        (part["start_s"], part["end_s"]) for part in line["parts"]
    ]
    assert [25.0] * 3 == [part["frame_times_s"][-1] for part in line["parts"][-3:]]
    assert not [part for part in line["parts"] if "error" in part]


@on_sqlite
def test_clip_with_too_many_frames_becomes_parts(rig: Rig) -> None:
    job = rig.make(build_clip_item("split", num_frames=64))

    rig.run(SeeingEngine(limits=SIXTEEN))
    line = read_line(rig, job)

    assert [(0, 75), (75, 150), (150, 225), (225, 300)] == [
        (part["start_s"], part["end_s"]) for part in line["parts"]
    ]
    assert [16] * 4 == [len(part["frame_times_s"]) for part in line["parts"]]
    times = [time_s for part in line["parts"] for time_s in part["frame_times_s"]]
    assert sorted(set(times)) == times
    assert "whole 4" == line["response"]["body"]["choices"][0]["message"]["content"]


def build_timed_item(times_ms: list[int], segments: Any = None, **options: Any) -> dict[str, Any]:
    pictures = [clips.shades(1, 32, 32)[0] + n % 99 for n in range(len(times_ms))]
    encoded = clips.clip(pictures, codec="mpeg4", times_ms=times_ms)
    url = "data:video/mp4;base64," + base64.b64encode(encoded).decode()
    request = build_item(segments, url=url, image_policy="split")
    request["body"]["messages"][0]["content"][0] |= options
    return request


def at_rate(num_frames: int, fps: int) -> list[int]:
    return [round(n * 1000 / fps) for n in range(num_frames)]


RECORDING = [*range(0, 1000, 25), *range(1000, 40_000, 5000)]
"""Of a screen: 40 frames in the first second, and 8 in the 39 after it."""


@on_sqlite
@pytest.mark.parametrize(
    ("times_ms", "limit", "options", "num_frames"),
    [
        (at_rate(300, 30), 8, {"num_frames": -1}, 300),
        (at_rate(250, 25), 4, {"num_frames": -1}, 250),
        (at_rate(240, 24), 8, {"num_frames": -1}, 240),
        (at_rate(61, 30), 1, {"num_frames": 100}, 61),
        (RECORDING, 8, {"num_frames": -1}, 48),
        (RECORDING, 8, {"num_frames": -1, "start_s": 0.5, "end_s": 11}, 23),
        (RECORDING, 8, {"num_frames": 24}, 24),
        (RECORDING, 8, {"num_frames": -1, "fps": 2}, 48),  # of some parts fewer would be left
        (RECORDING, 8, {"num_frames": -1, "fps": 60, "end_s": 0.9}, 37),
        (at_rate(200, 10), 16, {"num_frames": 65}, 65),  # not 5 times 16
    ],
)
def test_frames_that_were_asked_for_are_all_seen_in_parts(
    rig: Rig, times_ms: list[int], limit: int, options: dict[str, Any], num_frames: int
) -> None:
    job = rig.make(build_timed_item(times_ms, **options))

    rig.run(SeeingEngine(limits=MediaLimits(image=2, frames=limit)))
    parts = read_line(rig, job)["parts"]

    assert math.ceil(num_frames / limit) == len(parts)
    assert max(len(part["frame_times_s"]) for part in parts) <= limit
    times = [time_s for part in parts for time_s in part["frame_times_s"]]
    assert num_frames == len(times)
    assert sorted(set(times)) == times
    for part in parts:
        assert part["start_s"] <= part["frame_times_s"][0] + 1e-6
        assert part["frame_times_s"][-1] < part["end_s"] + 1e-6
    assert [part["end_s"] for part in parts[:-1]] == [part["start_s"] for part in parts[1:]]


@on_sqlite
def test_rate_that_takes_several_parts_is_a_rate_in_each_of_them(rig: Rig) -> None:
    job = rig.make(build_timed_item([*range(0, 1000, 25), *range(1000, 40_000, 500)], fps=1))

    rig.run(SeeingEngine(limits=MediaLimits(image=2, frames=8)))
    parts = read_line(rig, job)["parts"]

    assert [7.97] * 5 == [round(part["end_s"] - part["start_s"], 2) for part in parts]
    assert {7, 8} >= {len(part["frame_times_s"]) for part in parts}


@on_sqlite
def test_all_frames_of_a_segment_are_no_more_than_the_limit(rig: Rig) -> None:
    """Of 0.26 s at 30 a second, which is 7.8 of them: some segments have 9, with the one that is shown first."""
    split = build_timed_item(at_rate(60, 30), {"seconds": 0.26}, num_frames=-1)
    refused = build_timed_item(at_rate(60, 30), {"seconds": 0.26}, num_frames=-1)
    refused["body"]["image_policy"] = "reject"
    job, other = rig.make(split), rig.make(refused)

    rig.run(SeeingEngine(limits=MediaLimits(image=2, frames=8)))

    parts = read_line(rig, job)["parts"]
    assert 8 == max(len(part["frame_times_s"]) for part in parts)
    (ended,) = rig.ended(other)
    assert "asks for 9." in str(ended.error_message)


@on_sqlite
def test_segments_are_looked_at_within_the_limit_of_frames(rig: Rig) -> None:
    default, sampled, refused = (build_item({"seconds": 100}, custom_id=name) for name in "abc")
    sampled["body"]["image_policy"] = "sample"
    for request in (sampled, refused):
        request["body"]["messages"][0]["content"][0]["fps"] = 1
    job = rig.make(default, sampled, refused)

    rig.run(SeeingEngine(limits=SIXTEEN))

    first, second, third = rig.ended(job)
    for ended in (first, second):  # what nobody asked for gives way, as what may be sampled does
        assert [16] * 3 == [answer.images[0]["num_frames"] for answer in read_parts(rig, ended)]
    assert "too_many_frames" == third.error_code
    assert "asks for 100." in str(third.error_message)


@on_sqlite
def test_list_of_frames_is_counted_and_sampled(rig: Rig) -> None:
    jpeg = base64.b64encode(encode(picture(), "JPEG")).decode()
    url = "data:video/jpeg;base64," + ",".join([jpeg] * 20)
    jobs_ = [
        rig.make(build_item(None, url=url, image_policy=policy)) for policy in ("sample", "split")
    ]
    request = build_item(None, url=url)
    request["body"]["messages"][0]["content"][0] |= {"num_frames": -1}
    refused = rig.make(request)

    rig.run(SeeingEngine(limits=SIXTEEN))

    assert [["seen 16 frames"]] * 2 == [[e.text for e in rig.ended(job)] for job in jobs_]
    (ended,) = rig.ended(refused)
    assert "asks for 20." in str(ended.error_message)


def test_caps_of_a_tenant_hold_for_what_is_leased_after_they_were_set(rig: Rig) -> None:
    limits = MediaLimits(image=2, frames=16)
    rig.config = rig.config.model_copy(update={"limit_mm_per_prompt": limits})
    one = rig.make(build_request("a", num_images=2), build_clip_item("sample", num_frames=12))
    two = rig.make(build_request("a", num_images=2, image_policy="split"))
    with rig.stores.database.write() as session:
        tenant = tenants.get_or_create(session, "default")
        tenants.set_limits(session, tenant.id, {"max_images": 1, "max_frames": 4})

    rig.run(SeeingEngine(limits=limits))

    first, clip = rig.ended(one)
    assert "too_many_images" == first.error_code
    assert clip.details is not None
    assert 4 == clip.details["images"][0]["num_frames"]
    assert ["whole 2"] == [ended.text for ended in rig.ended(two)]
