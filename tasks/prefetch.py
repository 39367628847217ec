"""
Leased items become prompts, their media on the way, ahead of the engine and within bounds.

Data URLs go to the engine as they are and uploaded files as callables: both are read in its media
threads. What lies behind http or in a bucket is fetched here, several at a time, so that a slow host holds up no
neighbour; a prompt is handed on when its last byte is there. At most `MAX_AHEAD` prompts of a chunk
wait or are fetched at a time, whatever its size, no host has more of all that is fetched than
`tasks.places` lets it, and all chunks together hold no more bytes than `tasks.budget` lets them.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Executor, Future, wait
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, Final, Protocol

import structlog

from engine.request import SamplingParams
from media.data_url import (
    FRAMES_MEDIA_TYPE,
    count_listed_frames,
    is_data_url,
    media_type_of,
    num_bytes_of,
)
from media.errors import (
    FetchFailedError,
    FetchTooLargeError,
    ImageTooLargeError,
    MediaError,
    TooManyFramesError,
    VideoTooLargeError,
)
from media.fetched import Fetched
from media.frames import DEFAULT_NUM_FRAMES
from media.limits import IMAGE_LIMITS, VIDEO_LIMITS, ImageLimits, VideoLimits
from media.segments import Cut
from storage import files, jobs, tenants
from storage.errors import BlobMissingError, StorageError
from storage.ids import FileId, JobId, TenantId
from storage.items import Fence, LeasedItem
from storage.tables import File
from storage.tenants import Caps
from tasks.bodies import (
    IMAGE_PARTS,
    PART_OPTIONS,
    Body,
    ImagePolicy,
    build_params,
    check_body,
    choose_images,
    count_asked_of_list,
    find_detail,
    parse_file_id,
    parse_json,
    read_cut,
    read_source,
)
from tasks.budget import LARGE_BYTES, Hold
from tasks.config import MediaLimits
from tasks.engines import Prompt
from tasks.errors import BadLineError, EngineLostError
from tasks.manifest import read_bodies
from tasks.pieces import (
    ClipRule,
    Split,
    limit_frames,
    may_be_more,
    split_clip,
    split_images,
)
from tasks.places import Places, find_host
from tasks.stores import Stores

logger = structlog.get_logger(__name__)

MAX_AHEAD: Final = 64

MAX_ASIDE_BYTES: Final = 1024 * 1024
"""Of the lines that a chunk has put aside, which no budget counts: beyond them it reads no more."""

NUM_PLACES: Final = 128
NUM_FAST_PLACES: Final = 32

EXPECTED_IMAGE_BYTES: Final = 8 * 1024 * 1024
EXPECTED_VIDEO_BYTES: Final = 64 * 1024 * 1024
"""What is taken from the budget for one that has not come. A larger one waits for room for the largest,
and is fetched again: else a few hosts that let us wait would hold all of it."""

TAIL_S: Final = 0.1
"""A chunk to which nothing has come for so long, and which can begin nothing more, only waits."""


class Fetch(Protocol):
    """
    The URLs of one item, with their limits, and the name of who asks in; how each has ended out.

    Those that were given up because another has failed are missing.
    """

    def __call__(
        self,
        wanted: Mapping[str, ImageLimits | VideoLimits],
        tenant: str,
        /,
        *,
        is_fast: bool = False,
    ) -> Mapping[str, Fetched | FetchFailedError]: ...


def refuse_to_fetch(
    wanted: Mapping[str, ImageLimits | VideoLimits], tenant: str, *, is_fast: bool = False
) -> Mapping[str, Fetched | FetchFailedError]:
    """Where fetching is not installed."""
    error = FetchFailedError(
        "Failed to fetch media from URL: fetching is not installed here. Upload the file, or send "
        "a data URL."
    )
    return dict.fromkeys(wanted, error)


class FileGoneError(MediaError):
    """The content of an uploaded file is gone. Upload it again."""

    code = "input_file_missing"


class StoreAwayError(MediaError):
    """An uploaded file could not be read just now."""

    code = "blobs_unavailable"
    retryable = True


@dataclass(frozen=True, slots=True)
class Ready:
    """
    An item that the engine can take, and what was done to its images.

    Args:
        num_images_given: more than were used where the policy left some out.
        media: where the pictures and clips that are used come from, in the prompt's order.
        split: the pieces to ask in the place of the prompt.
    """

    item: LeasedItem
    prompt: Prompt
    image_policy: ImagePolicy
    num_images_given: int
    num_images_used: int
    media: Sequence[Mapping[str, Any]]
    split: Split | None = None

    @property
    def fence(self) -> Fence:
        return self.item.fence

    @property
    def is_fetched(self) -> bool:
        """Whether it holds what came from an address, which may give something else the next time."""
        return any("fetch_ms" in one for one in self.media)


@dataclass(frozen=True, slots=True)
class Refused:
    """
    An item that cannot run: `tasks.retry` says what becomes of it.

    Args:
        media: as in `Ready`, as far as they came.
    """

    item: LeasedItem
    error: Exception
    media: Sequence[Mapping[str, Any]] = ()


_TOO_MANY_BYTES: Final = (
    "Failed to fetch media from URL: the pictures and clips of this item are larger together than one "
    "item may bring. Scale them down, or hand them in as several items."
)

# Lines with too much were refused when the job was expanded, and the engine has the last word.
_COUNTED_BEFORE: Final = MediaLimits(image=10**9, video=10**9)


@dataclass(frozen=True, slots=True)
class Terms:
    """What a job and its tenant say of the media of its items."""

    image_policy: ImagePolicy
    caps: Caps


@dataclass(frozen=True, slots=True)
class Preparer:
    """
    Args:
        model: this worker's, and so the items'.
        limits: the engine's own.
        pool: threads that wait for hosts, for room, and for clips to be measured; one for each place.
            With fewer, all of them may wait for what those have taken that wait for a thread.
        measure: when the frames of an encoded clip are shown.
        names: of the tenants that were met.
        places, fast_places: of bulk work, and of the fast lane.
    """

    stores: Stores
    model: str
    limits: MediaLimits
    defaults: SamplingParams
    fetch: Fetch
    pool: Executor
    measure: Callable[[bytes], tuple[float, ...]]
    names: dict[TenantId, str] = field(default_factory=dict)
    places: Places = field(default_factory=lambda: Places(NUM_PLACES))
    fast_places: Places = field(default_factory=lambda: Places(NUM_FAST_PLACES))

    def prepare(
        self,
        items: Sequence[LeasedItem],
        terms: Mapping[JobId, Terms],
        *,
        take: Callable[[LeasedItem], bool],
        hold: Hold,
        on_wait: Callable[[], bool] = lambda: True,
    ) -> Iterator[Ready | Refused]:
        """
        Yield each item when it is ready, in about the order of the manifest.

        Args:
            terms: of the items' jobs.
            take: asked before an item is begun; one that is not ours any more is left out.
            hold: what the items' bytes are counted with; the caller releases each when it has ended.
            on_wait: called when all that is left waits for its host, each time for `TAIL_S`; False
                where none of them is ours any more, and nobody need wait.

        Raises:
            StorageError: a manifest could not be read; the items not yet yielded are not begun.
        """
        ahead = _Ahead(self, hold, take, on_wait)
        unreadable: StorageError | None = None
        bodies = read_bodies(self.stores.blobs, items)
        while not hold.is_closed:
            try:
                item, content = next(bodies)
            except StopIteration:
                break
            except StorageError as error:  # those that are being fetched come first
                unreadable = error
                break
            if content is None:
                if take(item):
                    yield Refused(item, BlobMissingError())
                continue
            try:
                draft = self._read(item, content, terms[item.job])
            except (BadLineError, MediaError, StorageError) as error:
                if take(item):
                    yield Refused(item, error)
                continue
            if draft.urls or draft.is_split:
                ahead.add(draft)
                yield from ahead.take_done(timeout=0)
                while ahead.is_full:
                    yield from ahead.take_next()
                continue
            # What has come is handed on before we wait: it holds what we are waiting for.
            while not draft.take_bytes(hold, wait=not ahead.fetching):
                if hold.is_closed:
                    ahead.give_up()
                    return
                yield from ahead.take_next()
            if not take(item):  # also where a drain began while it waited
                hold.release(item.fence.item)
                continue
            yield draft.build({}, self.measure)
        while ahead:
            yield from ahead.take_next()
        if unreadable is not None:
            raise unreadable

    def _read(self, item: LeasedItem, content: bytes, terms: Terms) -> "_Draft":
        body = check_body(
            parse_json(content)["body"],
            model=self.model,
            limits=_COUNTED_BEFORE.lowered(terms.caps),
            image_policy=terms.image_policy,
        )
        params = build_params(self.defaults, self._fill_in(body.sampling))
        draft = _Draft(item, body, params, len(content), self.limits.lowered(terms.caps))
        draft.read_messages(self)
        return draft

    def _fill_in(self, sampling: Mapping[str, Any]) -> dict[str, Any]:
        """What a chat completion means by silence: a text may go on to the end of the context."""
        if "max_tokens" in sampling or self.defaults.max_tokens_given:
            return dict(sampling)
        return {"max_tokens": None, **sampling}

    def open_file(self, tenant: TenantId, file_id: FileId) -> tuple[Callable[[], bytes], File]:
        """
        A way to read an uploaded file, and its row.

        Raises:
            NotFoundError: it is not the tenant's.
        """
        with self.stores.database.read() as session:
            file = files.get(session, tenant, file_id)
        key, blobs = file.blob_key, self.stores.blobs

        def read() -> bytes:
            try:
                return blobs.read(key)
            except BlobMissingError as error:
                raise FileGoneError from error
            except StorageError as error:
                raise StoreAwayError from error

        return read, file

    def places_for(self, draft: "_Draft") -> Places:
        return self.fast_places if draft.is_fast else self.places

    def finish(self, draft: "_Draft", hold: Hold) -> Ready | Refused:
        """Fetch what lies behind addresses, and cut what is to be cut; then its places are free."""
        try:
            fetched = self._fetch(draft, hold)
            return draft.build(fetched, self.measure)
        except CancelledError:  # fetching was closed
            raise
        except (MediaError, StorageError, EngineLostError) as error:
            return Refused(draft.item, error, draft.media)
        except Exception as error:
            # The edge of a thread: what goes wrong over one item must not cost its neighbours a try.
            logger.exception("item_not_prepared", item=draft.item.fence.item)
            return Refused(draft.item, error, draft.media)
        finally:
            self.places_for(draft).give_back(draft.places)

    def _fetch(self, draft: "_Draft", hold: Hold) -> dict[str, Fetched]:
        item = draft.item.fence.item
        fetched = self._fetch_expected(draft)
        if isinstance(fetched, FetchTooLargeError):
            # It waits for its turn with nothing in hand, or items would wait for each other.
            hold.release(item)
            most = {"image": IMAGE_LIMITS.max_bytes, "video": VIDEO_LIMITS.max_bytes}
            # Many that are large: together no more than is ever held, but for one file alone.
            together = max(hold.most_bytes, *most.values())
            most_bytes = min(draft.max_bytes, draft.num_bytes + together)
            if not hold.take(item, most_bytes, wait=True, is_fast=draft.is_fast):
                raise fetched
            fetched = self._fetch_within(draft, most, together)
        num_bytes = sum(len(one.content) for one in fetched.values())
        hold.shrink(item, draft.num_bytes + num_bytes)
        return fetched

    def _fetch_expected(self, draft: "_Draft") -> dict[str, Fetched] | FetchTooLargeError:
        expected = {"image": EXPECTED_IMAGE_BYTES, "video": EXPECTED_VIDEO_BYTES}
        try:
            return self._fetch_within(draft, expected, draft.expected_bytes)
        except FetchTooLargeError as error:
            # Its traceback would keep what has come of the others, uncounted, while it waits for room.
            return error.with_traceback(None)

    def _fetch_within(
        self, draft: "_Draft", most: Mapping[str, int], together: int
    ) -> dict[str, Fetched]:
        images, videos = _bound(IMAGE_LIMITS, most["image"]), _bound(VIDEO_LIMITS, most["video"])
        wanted = {url: videos if is_video else images for url, is_video in draft.urls.items()}
        if sum(limits.max_bytes for limits in wanted.values()) <= together:
            return self._fetch_at_once(draft, wanted)
        fetched: dict[str, Fetched] = {}
        left = together
        for url, limits in wanted.items():  # each may have what those before it have left
            try:
                fetched |= self._fetch_at_once(draft, {url: _bound(limits, left)})
            except FetchTooLargeError as error:
                if left < limits.max_bytes:
                    raise FetchTooLargeError(_TOO_MANY_BYTES) from error
                raise
            left -= len(fetched[url].content)
        return fetched

    def _fetch_at_once(
        self, draft: "_Draft", wanted: Mapping[str, ImageLimits | VideoLimits]
    ) -> dict[str, Fetched]:
        """Raises the first failure, and before it one that trying again would not mend."""
        tenant = self._name(draft.item.tenant)
        ended = self.fetch(wanted, tenant, is_fast=draft.is_fast)
        fetched: dict[str, Fetched] = {}
        failures: list[FetchFailedError] = []
        for url in filter(ended.__contains__, wanted):
            one = ended[url]
            if isinstance(one, Fetched):
                fetched[url] = one
                draft.facts[url] = asdict(one.report)
            else:
                failures.append(one)
                draft.facts[url] = one.facts or {}
        if failures:
            raise min(failures, key=lambda error: error.retryable)
        return fetched

    def _name(self, tenant: TenantId) -> str:
        """Names of tenants stay, so each is read once."""
        if tenant not in self.names:
            with self.stores.database.read() as session:
                self.names[tenant] = tenants.get_name(session, tenant)
        return self.names[tenant]


def _bound(limits: ImageLimits | VideoLimits, max_bytes: int) -> ImageLimits | VideoLimits:
    return replace(limits, max_bytes=min(limits.max_bytes, max_bytes))


class _Ahead:
    """
    Of one chunk: the items that are being fetched, and those that are put aside until there are places
    with their hosts, and bytes.
    """

    def __init__(
        self,
        preparer: Preparer,
        hold: Hold,
        take: Callable[[LeasedItem], bool],
        on_wait: Callable[[], bool],
    ) -> None:
        self.fetching: dict[Future[Ready | Refused], _Draft] = {}
        self._aside: list[_Draft] = []
        self._lacks_bytes = False
        self._preparer = preparer
        self._hold = hold
        self._take = take
        self._on_wait = on_wait

    def __len__(self) -> int:
        return len(self.fetching) + len(self._aside)

    @property
    def is_full(self) -> bool:
        """Whether nothing more is to be read for now: what is large is passed by what is behind it."""
        return (
            self._lacks_bytes
            or len(self) >= MAX_AHEAD
            or sum(draft.num_bytes for draft in self._aside) > MAX_ASIDE_BYTES
        )

    def add(self, draft: "_Draft") -> None:
        self._aside.append(draft)
        self._begin()

    def _begin(self, *, waits: bool = False) -> None:
        """
        Begin what has its places and its bytes.

        Args:
            waits: until there are bytes for one; nothing that has come may be in hand meanwhile.
        """
        self._lacks_bytes = False
        # Where one must be waited for, it is the one that has to wait least.
        drafts = sorted(self._aside, key=lambda draft: draft.expected_bytes if waits else 0)
        for draft in drafts:
            item, places = draft.item, self._preparer.places_for(draft)
            if not places.try_take(draft.places):
                continue
            if not draft.take_bytes(self._hold, wait=waits):
                places.give_back(draft.places)
                self._lacks_bytes |= draft.expected_bytes < LARGE_BYTES
                continue
            waits = False
            self._aside.remove(draft)
            if not self._take(item):  # also where a drain began while it waited
                self._hold.release(item.fence.item)
                places.give_back(draft.places)
                continue
            future = self._preparer.pool.submit(self._preparer.finish, draft, self._hold)
            self.fetching[future] = draft

    def take_next(self) -> Iterator[Ready | Refused]:
        """Wait until some have come, for a while."""
        if not self.fetching:
            self._begin(waits=True)
        if self.fetching:
            done, _ = wait(self.fetching, TAIL_S, FIRST_COMPLETED)
            if done:
                yield from self.take_done(timeout=None)
                return
            self._begin()  # other chunks may have left a host
        elif self._aside and not self._hold.is_closed:
            time.sleep(TAIL_S)
        if self._hold.is_closed or not self._on_wait():
            self.give_up()

    def take_done(self, *, timeout: float | None) -> Iterator[Ready | Refused]:
        done, _ = wait(self.fetching, timeout, FIRST_COMPLETED)
        for future in done:
            del self.fetching[future]
            self._begin()  # before the caller does anything that takes long
            yield future.result()

    def give_up(self) -> None:
        """Nobody waits for these any more, and those that have not begun never will."""
        for future, draft in self.fetching.items():
            if future.cancel():
                self._preparer.places_for(draft).give_back(draft.places)
        self.fetching.clear()
        self._aside.clear()
        self._lacks_bytes = False


class _Draft:
    """
    A prompt whose media behind http or s3 have not come yet.

    Args:
        num_bytes: of its line, data URLs included; uploaded files are added as they are met.
        limits: of one prompt.
    """

    def __init__(
        self,
        item: LeasedItem,
        body: Body,
        params: SamplingParams,
        num_bytes: int,
        limits: MediaLimits,
    ) -> None:
        self.item = item
        self.num_bytes = num_bytes
        self.urls: dict[str, bool] = {}  # and whether a video is expected there
        self.facts: dict[str, Mapping[str, Any]] = {}  # of each fetch that has ended
        self._media: list[dict[str, Any]] = []
        self._body = body
        self._params = params
        self._messages: list[dict[str, Any]] = []
        self._images: list[dict[str, Any]] = []  # those of the messages' parts that are images
        self._limits = limits
        self._clips: list[tuple[dict[str, Any], Cut | None]] = []  # parts that are to be measured
        self._images_each = 0  # of one prompt, where there are more
        self._num_given = 0
        self._num_used = 0

    @property
    def media(self) -> list[dict[str, Any]]:
        """
        Where the pictures and clips that are used come from, as far as they came.

        Without their addresses, which may be secret.
        """
        reports = []
        for one in self._media:
            facts = self.facts.get(one["url"], {}) if "url" in one else one
            known = {name: fact for name, fact in facts.items() if fact is not None}
            reports.append({"kind": one["kind"], **known})
        return reports

    @property
    def expected_bytes(self) -> int:
        """With what most that may still come do not exceed."""
        return self.num_bytes + sum(
            min(EXPECTED_VIDEO_BYTES, VIDEO_LIMITS.max_bytes)
            if is_video
            else min(EXPECTED_IMAGE_BYTES, IMAGE_LIMITS.max_bytes)
            for is_video in self.urls.values()
        )

    @property
    def max_bytes(self) -> int:
        """With all that may still come."""
        return self.num_bytes + sum(
            (VIDEO_LIMITS if is_video else IMAGE_LIMITS).max_bytes
            for is_video in self.urls.values()
        )

    @property
    def is_fast(self) -> bool:
        return self.item.priority <= jobs.FAST_LANE

    def take_bytes(self, hold: Hold, *, wait: bool) -> bool:
        item = self.item.fence.item
        return hold.take(item, self.expected_bytes, wait=wait, is_fast=self.is_fast)

    @cached_property
    def places(self) -> Mapping[str, int]:
        """What it fetches from each host, once its messages were read; from none where only a clip is measured."""
        return Counter(map(find_host, self.urls)) or {"": 1}

    @property
    def is_split(self) -> bool:
        """Whether it may have to be asked in parts."""
        return bool(self._clips) or self._images_each > 0

    def read_messages(self, preparer: Preparer) -> None:
        kinds = [
            part["type"]
            for message in self._body.messages
            if isinstance(message["content"], list)
            for part in message["content"]
        ]
        self._num_given = sum(kind in IMAGE_PARTS for kind in kinds)
        # As many as were counted when the line was expanded, or fewer if this engine takes fewer.
        limit = min(self.item.num_images, self._limits.image)
        chosen = choose_images(self._num_given, limit, self._body.image_policy)
        self._num_used = len(chosen)
        if self._body.image_policy is ImagePolicy.SPLIT and self._num_used > self._limits.image:
            self._images_each = self._limits.image
        index = -1
        for message in self._body.messages:
            content = message["content"]
            if isinstance(content, str):
                self._messages.append({"role": _role(message), "content": content})
                continue
            parts = []
            for part in content:
                index += part["type"] in IMAGE_PARTS
                if part["type"] not in IMAGE_PARTS or index in chosen:
                    parts.append(self._read_part(part, preparer))
            self._messages.append({"role": _role(message), "content": parts})

    def _read_part(self, part: Mapping[str, Any], preparer: Preparer) -> dict[str, Any]:
        if part["type"] == "text":
            return {"type": "text", "text": part["text"]}
        read = self._read_media(part, preparer)
        if part["type"] in IMAGE_PARTS:
            self._images.append(read)
        else:
            self._note_clip(read, read_cut(part), count_listed_frames(read_source(part)))
        return read

    def _note_clip(self, clip: dict[str, Any], cut: Cut | None, num_listed: int | None) -> None:
        """Bring the frames that it asks for under the limit, or have it measured."""
        most = self._limits.frames
        if most is None:
            if cut is not None:
                self._clips.append((clip, cut))
            return
        if "num_frames" not in clip and "fps" not in clip:
            clip["num_frames"] = min(DEFAULT_NUM_FRAMES, most)
        may_leave_out = self._body.image_policy in (ImagePolicy.TRUNCATE, ImagePolicy.SAMPLE)
        if num_listed is not None and self._body.image_policy is ImagePolicy.REJECT:
            num_asked = count_asked_of_list(clip, num_listed)
            if num_asked > most:
                raise TooManyFramesError(limit=most, given=num_asked)
        if may_leave_out or num_listed is not None:
            clip.update(limit_frames(clip, most))
        if cut is not None or may_be_more(clip, most):
            self._clips.append((clip, cut))

    def _read_media(self, part: Mapping[str, Any], preparer: Preparer) -> dict[str, Any]:
        options = {key: part[key] for key in PART_OPTIONS if part.get(key) is not None}
        detail = find_detail(part)
        if detail is not None:
            options["detail"] = detail
        is_video = part["type"] == "video_url"
        kind = "video" if is_video else "image"
        source = read_source(part)
        file_id = parse_file_id(source)
        if file_id is not None:
            read, file = preparer.open_file(self.item.tenant, file_id)
            # Before a byte is read: an upload may be far larger than a picture, and be named often.
            if file.num_bytes > (VIDEO_LIMITS if is_video else IMAGE_LIMITS).max_bytes:
                raise VideoTooLargeError if is_video else ImageTooLargeError
            self.num_bytes += file.num_bytes
            self._media.append(
                {
                    "kind": kind,
                    "scheme": "file_id",
                    "num_bytes": file.num_bytes,
                    "sha256": file.sha256.hex(),
                }
            )
            return {"type": kind, kind: read, **options}
        if is_data_url(source):
            self._media.append({"kind": kind, "scheme": "data", **_describe_data_url(source)})
            return {"type": f"{kind}_url", f"{kind}_url": {"url": source}, **options}
        self.urls[source] = is_video or self.urls.get(source, False)  # the same as both: as a clip
        self._media.append({"kind": kind, "url": source})
        return {"type": kind, kind: source, **options}

    def build(
        self, fetched: Mapping[str, Fetched], measure: Callable[[bytes], tuple[float, ...]]
    ) -> Ready:
        """
        The prompt, with bytes in the place of URLs; and its pieces, where it is asked in parts.

        Raises:
            MediaError: what is to be cut cannot be.
        """
        for message in self._messages:
            for part in message["content"] if isinstance(message["content"], list) else ():
                kind = part["type"]
                if kind in ("image", "video") and isinstance(part[kind], str):
                    part[kind] = fetched[part[kind]].content
        return Ready(
            self.item,
            Prompt(self.item.fence.name, self._messages, self._params, self.item.priority),
            self._body.image_policy,
            self._num_given,
            self._num_used,
            self.media,
            self._split(measure),
        )

    def _split(self, measure: Callable[[bytes], tuple[float, ...]]) -> Split | None:
        found: Split | None = None
        for clip, cut in self._clips:
            rule = ClipRule(cut, self._limits.frames, self._body.image_policy, measure)
            if found is None:
                found = split_clip(self._messages, clip, rule)
            elif self._limits.frames is not None:  # one clip of a prompt is cut, all others sampled
                clip.update(limit_frames(clip, self._limits.frames))
        if found is not None:
            return found
        if self._images_each:
            return split_images(self._messages, self._images, self._images_each)
        return None


def _describe_data_url(url: str) -> dict[str, Any]:
    """What can be said of it without decoding it: a client knows what it has sent."""
    try:
        media_type = media_type_of(url)
        if media_type == FRAMES_MEDIA_TYPE:
            return {"media_type": media_type}
        return {"media_type": media_type, "num_bytes": num_bytes_of(url)}
    except MediaError:
        return {}  # the engine says why it is none


def _role(message: Mapping[str, Any]) -> str:
    return "system" if message["role"] == "developer" else str(message["role"])
