"""Lines become items, or errors with their lines; and a submission becomes one job."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import structlog.testing

from storage import items, jobs, served, tenants
from storage.errors import CommitUnknownError, IdempotencyConflictError, NotFoundError
from storage.ids import FileId, JobId, new_uuid
from storage.items import NewItem
from storage.keys import build_file_key
from storage.served import Served
from storage.states import ItemState, JobState
from storage.tables import Job
from tasks import bodies
from tasks import expand as expanding
from tasks import submit as submitting
from tasks.app import TaskName
from tasks.bodies import ImagePolicy, choose_images
from tasks.config import Config, MediaLimits, ModelSettings
from tasks.errors import BadLineError, BadSubmissionError
from tasks.expand import LineChecker, expand
from tasks.manifest import Line
from tasks.stores import Stores
from tasks.submit import parse_submission, submit
from tests.storage.rows import make_file, make_tenant, new_job
from tests.tasks.fakes import MODEL, RecordingDispatcher, build_request

TOO_MANY = "At most 1 image(s) may be provided in one prompt."


def make(stores: Stores, manifest: bytes, **options: Any) -> JobId:
    """A job over exactly these bytes."""
    with stores.database.write() as session:
        tenant = tenants.get_or_create(session, "default").id
    key = build_file_key(tenant, FileId(new_uuid()))
    stores.blobs.put(key, manifest)
    new = replace(new_job(stores.database, tenant, options=options), manifest_key=key)
    with stores.database.write() as session:
        return jobs.create(session, new)[0].id


def encode(*lines: object) -> bytes:
    return b"".join(
        (line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines
    )


def find(stores: Stores, job: JobId) -> Job:
    with stores.database.read() as session:
        found = jobs.find(session, job)
    assert found is not None
    return found


def codes(job: Job) -> list[tuple[int | None, str]]:
    return [(error["line"], error["code"]) for error in job.errors or []]


def test_good_lines_become_items_and_permits(
    stores: Stores, dispatcher: RecordingDispatcher, config: Config
) -> None:
    job = make(stores, encode(*(build_request(f"r-{n}", num_images=n % 2) for n in range(40))))

    expand(stores, dispatcher, config, job)

    found = find(stores, job)
    assert (JobState.IN_PROGRESS, 40) == (found.state, found.num_total)
    assert 3 == dispatcher.count(TaskName.RUN_CHUNK)  # 40 items in chunks of 16
    with stores.database.write() as session:
        chunk = items.lease(session, model=MODEL, worker="w", max_items=40)
    assert chunk is not None
    assert [n % 2 for n in range(40)] == [item.num_images for item in chunk.items]
    assert [f"r-{n}" for n in range(40)] == [item.custom_id for item in chunk.items]


def test_all_line_errors_are_reported_with_their_lines_and_nothing_runs(
    stores: Stores, dispatcher: RecordingDispatcher, config: Config
) -> None:
    good = build_request("good")
    job = make(
        stores,
        encode(
            good,
            b"{not json",
            b"",
            {**good, "custom_id": "x" * 257},
            {**good, "custom_id": ""},
            {key: value for key, value in good.items() if key != "custom_id"},
            {**good, "custom_id": "a", "method": "GET"},
            {**good, "custom_id": "b", "url": "/v1/embeddings"},
            good,
            build_request("c", model="other"),
            build_request("d", num_images=2),
            build_request("e", temperature=9),
            build_request("f", tools=[{"type": "function"}]),
            build_request("g", mystery=1),
            {**good, "custom_id": "h", "body": []},
            build_request("i", messages=[]),
            build_request("j", messages=[{"role": "user", "content": [{"type": "input_image"}]}]),
            b'{"custom_id": "k", "custom_id": "k"}',
            b'{"custom_id": "l", "body": NaN}',
            b"[1]",
            b"\xff\xfe",
            b"[" * 100_000,
            build_request("m", image_policy="crop"),
            build_request("n", messages=show("file:///x")),
            build_request("o", messages=show("s3://photographs/a.jpg")),  # none is opened
            b'{"custom_id": "p", "body": 1e999}',
        ),
    )

    expand(stores, dispatcher, config, job)

    found = find(stores, job)
    assert JobState.FAILED == found.state
    assert [
        (2, "invalid_json_line"),
        (3, "blank_line"),
        (4, "invalid_custom_id"),
        (5, "invalid_custom_id"),
        (6, "invalid_custom_id"),
        (7, "invalid_method"),
        (8, "invalid_url"),
        (9, "duplicate_custom_id"),
        (10, "mismatched_model"),
        (11, "too_many_images"),
        (12, "bad_sampling_params"),
        (13, "unsupported_parameter"),
        (14, "unsupported_parameter"),
        (15, "invalid_body"),
        (16, "invalid_messages"),
        (17, "invalid_messages"),
        (18, "invalid_json_line"),
        (19, "invalid_json_line"),
        (20, "invalid_json_line"),
        (21, "invalid_json_line"),
        (22, "invalid_json_line"),
        (23, "invalid_image_policy"),
        (24, "invalid_media_url"),
        (25, "invalid_media_url"),
        (26, "invalid_json_line"),
    ] == codes(found)
    texts = {error["line"]: error["message"] for error in found.errors or []}
    assert texts[11].startswith(TOO_MANY)
    assert {} == _count(stores, job)
    assert 0 == dispatcher.count(TaskName.RUN_CHUNK)


def show(url: str) -> list[Any]:
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]


def test_references_into_buckets_and_folders_are_taken_where_some_are_opened(
    stores: Stores, dispatcher: RecordingDispatcher, config: Config
) -> None:
    opened = config.model_copy(
        update={"media_s3_buckets": ("s3://photographs",), "media_root": Path("/photographs")}
    )
    good = [
        build_request("d", messages=show("file:///photographs/a.jpg")),
        build_request("a", messages=show("s3://photographs/a.jpg")),
        build_request("b", messages=show("s3://others/a.jpg")),  # whose it is, the worker says
    ]
    bad = [build_request("c", messages=show("s3://photographs/../a.jpg"))]
    jobs_made = [make(stores, encode(*requests)) for requests in (good, bad)]

    for job in jobs_made:
        expand(stores, dispatcher, opened, job)

    assert [[], [(1, "invalid_media_url")]] == [codes(find(stores, job)) for job in jobs_made]


@pytest.mark.parametrize(
    ("kind", "option", "problem"),
    [
        ("video_url", {"num_frames": 0}, "['num_frames'] must be a whole number of 1 or more"),
        ("video_url", {"fps": "2"}, "['fps'] must be a finite number over 0, got '2'"),
        ("video_url", {"start_s": -1}, "['start_s'] must be a finite number of seconds"),
        ("video_url", {"start_s": 9, "end_s": 3}, ": end_s must be a finite number of seconds"),
        ("video_url", {"keyframes": 1}, "['keyframes'] must be true or false, got 1"),
        ("video_url", {"dedupe_frames": 300}, "['dedupe_frames'] must be true, false, or a number"),
        ("video_url", {"frames": 8}, " has the field 'frames', which is not supported"),
        ("image_url", {"max_pixels": 0}, "['max_pixels'] must be a whole number of 1 or more"),
        ("image_url", {"start_s": 1}, " has the field 'start_s', which is not supported"),
    ],
)
def test_option_of_a_part_that_cannot_be_is_refused_with_its_line(
    kind: str, option: dict[str, Any], problem: str
) -> None:
    part = {"type": kind, kind: {"url": "https://example.org/a"}, **option}
    messages = [{"role": "user", "content": [{"type": "text", "text": "?"}, part]}]

    with pytest.raises(BadLineError) as caught:
        bodies.check_body({"model": MODEL, "messages": messages}, model=MODEL, limits=MediaLimits())

    assert "invalid_messages" == caught.value.line_code
    assert f"messages[0].content[1]{problem}" in str(caught.value)


def test_options_of_parts_are_taken() -> None:
    options = {"start_s": 1, "end_s": 2.5, "fps": 2, "keyframes": True, "dedupe_frames": 4}
    part = {"type": "video_url", "video_url": "data:video/mp4;base64,AAAA", "num_frames": -1}
    messages = [{"role": "user", "content": [{**part, **options, "max_pixels": None}]}]

    body = bodies.check_body(
        {"model": MODEL, "messages": messages}, model=MODEL, limits=MediaLimits()
    )

    assert 1 == body.num_videos


ODD_VALUES: list[Any] = [
    *(None, True, -1, 2**63, 1.5, 1e308, "", "a", "\0", "\ud800"),
    *([], {}, [[]], [{}], [None], ["a"], {"a": []}, {"1": "x"}, {"type": []}),
]


def test_line_of_any_shape_is_taken_or_refused() -> None:
    """A line that the check itself stumbles over would keep its job validating for ever."""
    checker = LineChecker(MODEL, "/v1/chat/completions", MediaLimits(), {})
    fields = [*bodies._SAMPLING, *bodies._NEUTRAL, *bodies._OWN, "user", "mystery"]
    lines: list[Any] = list(ODD_VALUES)
    for odd in ODD_VALUES:
        plain = build_request("a")
        lines += [{**plain, name: odd} for name in plain]
        lines += [build_request("a", **{name: odd}) for name in fields]
        message = {"role": "user", "content": "a"}
        messages: list[Any] = [odd, *({**message, name: odd} for name in message)]
        for kind in ("text", "image_url", "video_url", "image_file", odd):
            part = {"type": kind, "text": "a", "image_url": "data:,", "video_url": "data:,"}
            parts = [
                odd,
                *({**part, name: odd} for name in (*part, "image_file", "fps", "end_s", "uuid")),
            ]
            messages += [{**message, "content": [part]} for part in parts]
        lines += [build_request("a", messages=[message]) for message in messages]

    for number, line in enumerate(lines, 1):
        if isinstance(line, dict) and line.get("custom_id") == "a":
            line = {**line, "custom_id": f"r-{number}"}
        content = json.dumps(line).encode()
        checker.check(Line(number, 0, len(content), content))

    assert len(lines) > 1000
    assert 0 < checker.num_refused < len(lines)


def test_field_whose_name_no_jsonb_holds_is_reported_all_the_same(
    stores: Stores, dispatcher: RecordingDispatcher, config: Config
) -> None:
    names: list[dict[str, Any]] = [{"\0x": 1}, {"\ud800": 1}]
    job = make(stores, encode(*(build_request(f"r-{n}", **name) for n, name in enumerate(names))))

    expand(stores, dispatcher, config, job)

    found = find(stores, job)
    assert [(1, "unsupported_parameter"), (2, "unsupported_parameter")] == codes(found)
    assert ["\ufffdx", "?"] == [error["param"] for error in found.errors or []]


def test_skip_runs_the_good_lines_and_fails_the_others(
    stores: Stores, dispatcher: RecordingDispatcher, config: Config
) -> None:
    job = make(
        stores,
        encode(build_request("a"), build_request("a"), build_request("b", num_images=3), b"{"),
        on_invalid="skip",
    )

    expand(stores, dispatcher, config, job)

    found = find(stores, job)
    assert (JobState.IN_PROGRESS, 4, 3) == (found.state, found.num_total, found.num_failed)
    assert [(2, "duplicate_custom_id"), (3, "too_many_images"), (4, "invalid_json_line")] == codes(
        found
    )
    assert {ItemState.PENDING: 1, ItemState.FAILED: 3} == _count(stores, job)


def test_skip_without_a_good_line_goes_straight_to_its_end(
    stores: Stores, dispatcher: RecordingDispatcher, config: Config
) -> None:
    job = make(stores, encode(b"{", b"}"), on_invalid="skip")

    expand(stores, dispatcher, config, job)

    assert [TaskName.FINISH] == [name for name, _, _ in dispatcher.sent]


def test_limits_are_those_of_the_models_workers(
    stores: Stores, dispatcher: RecordingDispatcher, config: Config
) -> None:
    said = config.model_copy(update={"models": {MODEL: ModelSettings(image=1)}})
    with stores.database.write() as session:
        served.register(session, Served(MODEL, 3, 0), worker="w", alive_s=60.0)
    job = make(stores, encode(*(build_request(f"r-{n}", num_images=n) for n in (3, 4))))

    with structlog.testing.capture_logs() as logs:
        expand(stores, dispatcher, said, job)

    assert [(2, "too_many_images")] == codes(find(stores, job))
    assert ["limits_differ"] == [line["event"] for line in logs if line["log_level"] == "error"]


def test_limits_of_a_tenant_lower_those_of_the_model(
    stores: Stores, dispatcher: RecordingDispatcher, config: Config
) -> None:
    with stores.database.write() as session:
        served.register(session, Served(MODEL, 4, 1), worker="w", alive_s=60.0)
        tenant = tenants.get_or_create(session, "default")
        tenants.set_limits(session, tenant.id, {"max_images": 2})
    job = make(stores, encode(*(build_request(f"r-{n}", num_images=n) for n in (2, 3, 4))))

    expand(stores, dispatcher, config, job)

    assert [(2, "too_many_images"), (3, "too_many_images")] == codes(find(stores, job))


@pytest.mark.parametrize("policy", ["truncate", "sample"])
def test_policy_takes_too_many_images(
    policy: str, stores: Stores, dispatcher: RecordingDispatcher, config: Config
) -> None:
    of_job = make(stores, encode(build_request("a", num_images=3)), image_policy=policy)
    of_line = make(stores, encode(build_request("a", num_images=3, image_policy=policy)))

    for job in (of_job, of_line):
        expand(stores, dispatcher, config, job)

        assert JobState.IN_PROGRESS == find(stores, job).state


def test_images_are_chosen_from_the_front_or_evenly() -> None:
    assert {0, 1, 2} == choose_images(9, 3, ImagePolicy.TRUNCATE)
    assert {0, 4, 8} == choose_images(9, 3, ImagePolicy.SAMPLE)
    assert {0} == choose_images(9, 1, ImagePolicy.SAMPLE)
    assert {0, 1} == choose_images(2, 3, ImagePolicy.SAMPLE)


@pytest.mark.parametrize(("manifest", "code"), [(b"", "empty_file"), (b"\n" * 8, "too_many_lines")])
def test_file_that_no_option_saves(
    manifest: bytes,
    code: str,
    stores: Stores,
    dispatcher: RecordingDispatcher,
    config: Config,
) -> None:
    job = make(stores, manifest, on_invalid="skip")

    expand(stores, dispatcher, config.model_copy(update={"max_lines": 7}), job)

    found = find(stores, job)
    assert JobState.FAILED == found.state
    assert code in [error["code"] for error in found.errors or []]


def test_expansion_goes_on_where_it_was_cut_short(
    stores: Stores,
    dispatcher: RecordingDispatcher,
    config: Config,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(expanding, "PAGE", 10)
    job = make(stores, encode(*(build_request(f"r-{n}") for n in range(35))))
    insert_page, calls = items.insert_page, 0

    def fail_at_third(*arguments: Any, **words: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("the process died")
        insert_page(*arguments, **words)

    monkeypatch.setattr(items, "insert_page", fail_at_third)
    with pytest.raises(RuntimeError):
        expand(stores, dispatcher, config, job)
    assert 20 == find(stores, job).num_expanded

    expand(stores, dispatcher, config, job)
    expand(stores, dispatcher, config, job)

    assert (JobState.IN_PROGRESS, 35) == (find(stores, job).state, find(stores, job).num_total)
    assert {ItemState.PENDING: 35} == _count(stores, job)


def test_job_cancelled_while_it_is_expanded_stays_cancelled(
    stores: Stores,
    dispatcher: RecordingDispatcher,
    config: Config,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(expanding, "PAGE", 2)
    job = make(stores, encode(*(build_request(f"r-{n}") for n in range(6))))
    tenant = find(stores, job).tenant_id
    build_item = LineChecker.check

    def cancel_at_fourth(checker: LineChecker, line: Line) -> NewItem:
        if line.number == 4:
            with stores.database.write() as session:
                jobs.cancel(session, tenant, job)
        return build_item(checker, line)

    monkeypatch.setattr(LineChecker, "check", cancel_at_fourth)
    expand(stores, dispatcher, config, job)

    assert (JobState.CANCELLING, 2) == (find(stores, job).state, find(stores, job).num_total)
    assert 0 == dispatcher.count(TaskName.RUN_CHUNK)


# Submissions


def test_submission_is_one_job_however_often_it_comes(
    stores: Stores, dispatcher: RecordingDispatcher
) -> None:
    given = {"requests": [{"custom_id": "a", "body": {"model": MODEL, "messages": []}}]}
    submission = parse_submission(given, default_key="message-1")

    first = submit(stores, dispatcher, submission)
    second = submit(stores, dispatcher, submission)

    assert (True, False) == (first.is_new, second.is_new)
    assert first.job.id == second.job.id
    assert 1 == dispatcher.count(TaskName.EXPAND)
    line = json.loads(stores.blobs.read(first.job.manifest_key))
    assert ("POST", "/v1/chat/completions") == (line["method"], line["url"])
    other = parse_submission({**given, "priority": 1}, default_key="message-1")
    with pytest.raises(IdempotencyConflictError):
        submit(stores, dispatcher, other)


def test_submission_counts_with_all_its_lines_before_one_is_read(
    stores: Stores, dispatcher: RecordingDispatcher
) -> None:
    given = {"requests": [build_request(f"r-{n}") for n in range(3)]}

    job = submit(stores, dispatcher, parse_submission(given)).job

    with stores.database.read() as session:
        assert 3 == jobs.measure_open_work(session, job.tenant_id).num_items


def test_submission_of_a_file_that_is_no_input_is_refused(
    stores: Stores, dispatcher: RecordingDispatcher
) -> None:
    file = make_file(stores.database, make_tenant(stores.database, "default"), purpose="vision")
    given = {"input_file_id": f"file-{file.hex}", "model": MODEL}

    with pytest.raises(BadSubmissionError, match="vision"):
        submit(stores, dispatcher, parse_submission(given))


def test_submission_whose_commit_went_through_unheard_keeps_its_lines(
    stores: Stores, dispatcher: RecordingDispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    submission = parse_submission({"requests": [build_request("a")]}, default_key="message-1")
    create = submitting._create

    def lose_the_answer(*given: Any) -> Any:
        create(*given)
        raise CommitUnknownError

    monkeypatch.setattr(submitting, "_create", lose_the_answer)
    with pytest.raises(CommitUnknownError):
        submit(stores, dispatcher, submission)
    monkeypatch.undo()
    again = submit(stores, dispatcher, submission)

    assert not again.is_new
    assert stores.blobs.count_bytes(again.job.manifest_key) > 0


def test_submission_of_another_tenants_file_finds_nothing(
    stores: Stores, dispatcher: RecordingDispatcher
) -> None:
    mine = submit(stores, dispatcher, parse_submission({"requests": [build_request("a")]}))
    file_id = f"file-{mine.job.input_file_id.hex}"
    again = {"input_file_id": file_id, "model": MODEL}

    same = submit(stores, dispatcher, parse_submission(again))

    assert mine.job.manifest_key == same.job.manifest_key
    with pytest.raises(NotFoundError):
        submit(stores, dispatcher, parse_submission({**again, "tenant": "another"}))


@pytest.mark.parametrize(
    "given",
    [
        None,
        [],
        {},
        {"requests": []},
        {"requests": [{}], "input_file_id": "file-1"},
        {"input_file_id": "file-1"},
        {"requests": [{}], "priority": 11},
        {"requests": [{}], "completion_window": "1s"},
        {"requests": [{}], "endpoint": "/v1/embeddings"},
        {"requests": [{}], "mystery": 1},
        {"requests": [1]},
        {"requests": [build_request("a")], "tenant": "a\0"},
        {"requests": [build_request("a")], "model": "a\0"},
        {"requests": [build_request("a")], "idempotency_key": "a\0"},
        {"requests": [build_request("a")], "metadata": {"a": "\0"}},
        {"requests": [build_request("a")], "metadata": {"a" * 65: "b"}},
        {"requests": [build_request("a")], "metadata": {"a": "b" * 513}},
    ],
)
def test_submission_that_makes_no_sense_is_refused(given: object) -> None:
    with pytest.raises(BadSubmissionError):
        parse_submission(given)


def _count(stores: Stores, job: JobId) -> dict[ItemState, int]:
    with stores.database.read() as session:
        return jobs.count_items(session, job)
