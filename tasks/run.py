"""
A permit's work: lease the best chunk, feed it into the one engine, and commit what comes back.

Several chunks are in flight at a time, each in a thread of its own, so that one's slow tail never
leaves the engine idle. Results are committed in small groups while their chunk runs, under the fence
of lease and attempt; no session is open while the engine works. A second thread renews the leases
and learns which are lost, a third commits.

Nothing here knows Celery: `tasks.worker` calls `run_permits` for each permit and `drain` at the end.
"""

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from queue import Empty, Full, Queue
from typing import Any, Final

import structlog

from engine.request import CompletionOutput, ImageUsed, Result, SamplingParams
from media.errors import MediaChangedError
from storage import items, jobs, parts, served
from storage.errors import CommitUnknownError, PlanChangedError, StorageError
from storage.ids import ItemId, JobId, LeaseId
from storage.items import Chunk, Completion, Failure, Fence, LeasedItem, Outcome
from storage.parts import NewPart
from storage.served import Served
from tasks.budget import Budget, Hold
from tasks.config import Config
from tasks.dispatch import Dispatcher
from tasks.engines import EnginePort, Prompt
from tasks.errors import DeviceLostError, EngineLostError
from tasks.expand import JobOptions
from tasks.parts import CUT_SHORT, Assembly, Move, Whole
from tasks.prefetch import Preparer, Ready, Refused, Terms
from tasks.retry import INTERNAL_TEXT, Act, Verdict, clean, judge
from tasks.stores import Stores
from tasks.summary import build_stitcher

logger = structlog.get_logger(__name__)

COMMIT_RETRY_S: Final = 0.5
STORE_WAIT_S: Final = 5.0
"""After which items are tried again whose blobs or rows could not be read: a store that is down must
not be asked a hundred times a second, nor each time count as an attempt."""

REGISTER_S: Final = 60.0
"""How long a worker that starts asks a busy database to note it."""

MAX_UNCOMMITTED: Final = 1024
"""Results that wait for the database; beyond them the engine's threads wait too."""

MAX_STAND_INS: Final = 16
"""Chunks that run beside those that only wait for hosts; as many again of the fast lane."""

FLUSH_S: Final = 2.0

GIVE_BACK_S: Final = 10.0
"""How long a worker that ends waits for the database to take its leases back; a supervisor kills it
15 s after the deadline of the drain."""

GIVE_BACK_RETRY_S: Final = 0.2

MAX_LEASES_ANEW: Final = 5
"""Leases under which an item may begin anew, because an address gives another clip than before. One
under which parts were answered counts as no crash, however it ended: they would go on for ever. One that
is run alone is leased twice for it."""

LOOK_S: Final = 0.5
"""How often a source that waits for parts looks whether anybody still wants them."""


@dataclass(frozen=True, slots=True)
class Release:
    """
    An item that goes back uncharged.

    Args:
        wait_s: nobody else may have it before.
    """

    fence: Fence
    wait_s: int


End = Completion | Failure | Release
Entry = End | NewPart


@dataclass(slots=True, eq=False)
class Flight:
    """One chunk on its way. `open` shrinks as items are committed, released or lost."""

    lease: LeaseId
    open: dict[ItemId, Fence]
    terms: Mapping[JobId, Terms]
    handed: set[ItemId] = field(default_factory=set)
    """Given to the engine, or on the way to it."""
    asked: dict[str, Ready | Assembly] = field(default_factory=dict)
    """What the engine has and has not answered, by the names of its prompts."""
    told: set[ItemId] = field(default_factory=set)
    """Of those handed, the ones whose end is known: it is committed, or will be."""
    assemblies: dict[ItemId, Assembly] = field(default_factory=dict)
    """Items that are asked in parts and have not ended."""
    summaries: "Queue[tuple[Assembly, Prompt] | None]" = field(default_factory=Queue)
    """To be asked; None where one of the assemblies has ended."""
    is_closed: bool = False
    """Nothing more is handed to the engine."""
    changed: threading.Condition = field(default_factory=threading.Condition)

    def take(self, item: LeasedItem) -> bool:
        """Whether this item may go to the engine now; it is noted as handed."""
        with self.changed:
            if self.is_closed or item.fence.item not in self.open:
                return False
            self.handed.add(item.fence.item)
            return True

    def has(self, fence: Fence) -> bool:
        return fence.item in self.open

    def list_asked(self) -> set[ItemId]:
        """Items of ours that the engine has at work: not those that wait for a host, or for room."""
        asked = list(self.asked.values())  # other threads add to it and take from it
        return {one.fence.item for one in asked if one.fence.item in self.open}

    def list_names(self, fence: Fence) -> tuple[str, ...]:
        """The prompts of an item that the engine may hold."""
        assembly = self.assemblies.get(fence.item)
        return (fence.name,) if assembly is None else assembly.names

    def lose(self, ours: Container[ItemId], held: Sequence[ItemId]) -> list[Fence]:
        """Let go of those of `held` that are not `ours` any more; returns what was still open."""
        with self.changed:
            lost = [self.open[item] for item in held if item not in ours and item in self.open]
            self.settle_locked(lost)
            return lost

    def settle(self, ids: Iterable[ItemId]) -> None:
        with self.changed:
            for item in ids:
                self.open.pop(item, None)
            self.changed.notify_all()

    def close(self) -> list[Fence]:
        """Hand out no more; returns what the engine never got, no longer open."""
        with self.changed:
            self.is_closed = True
            rest = [fence for item, fence in self.open.items() if item not in self.handed]
            self.settle_locked(rest)
            return rest

    def list_silent(self) -> list[Fence]:
        """What was handed out, and nobody has said a word about it."""
        with self.changed:
            silent = self.handed - self.told
            return [fence for item, fence in self.open.items() if item in silent]

    def take_rest(self) -> list[Fence]:
        """Everything that is still open; it is no longer."""
        with self.changed:
            self.is_closed = True
            rest = list(self.open.values())
            self.settle_locked(rest)
            return rest

    def settle_locked(self, fences: Sequence[Fence]) -> None:
        for fence in fences:
            del self.open[fence.item]
        self.changed.notify_all()

    def wait_until_settled(self, timeout_s: float) -> bool:
        with self.changed:
            return self.changed.wait_for(lambda: not self.open, timeout_s)


class Gate:
    """Many chunks pass together; one that may kill its neighbours passes alone."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._num_inside = 0
        self._num_alone = 0  # that wait or are inside

    @contextmanager
    def pass_through(self, *, alone: bool) -> Iterator[None]:
        with self._changed:
            if alone:
                self._changed.wait_for(lambda: not self._num_alone)
                self._num_alone += 1
                self._changed.wait_for(lambda: not self._num_inside)
            else:
                self._changed.wait_for(lambda: not self._num_alone)
                self._num_inside += 1
        try:
            yield
        finally:
            with self._changed:
                if alone:
                    self._num_alone -= 1
                else:
                    self._num_inside -= 1
                self._changed.notify_all()


class Runner:
    """
    One process's way from permits to results.

    Args:
        worker: this process's name in the rows it leases.
        on_engine_lost: called once the leases are given back; does not return in a real worker.
    """

    def __init__(
        self,
        stores: Stores,
        dispatcher: Dispatcher,
        config: Config,
        engine: EnginePort,
        preparer: Preparer,
        *,
        worker: str,
        on_engine_lost: Callable[[], None] = lambda: None,
    ) -> None:
        self.is_draining = threading.Event()
        self.num_completed = 0
        self.num_failed = 0
        self.num_fenced = 0
        self._stores = stores
        self._dispatcher = dispatcher
        self._config = config
        self._engine = engine
        self._preparer = preparer
        self._model = preparer.model
        self.worker = worker
        self._on_engine_lost = on_engine_lost
        self._engine_lost = threading.Lock()
        self._gate = Gate()
        self._budget = Budget(config.max_media_bytes)
        self._lock = threading.Lock()
        self._flights: dict[LeaseId, Flight] = {}
        self._leases = threading.Condition()
        self._num_stand_ins: Counter[bool] = Counter()  # of bulk work, and of the fast lane
        self._num_leasing = 0  # transactions that may lease, and have not ended
        self._last_beat = self._progress_at = time.monotonic()
        self._progress = 0.0  # the engine's, when we last looked
        self._committer = Committer(self)
        self._is_stopping = threading.Event()
        self._heart = threading.Thread(target=self._beat_for_ever, name="heartbeat", daemon=True)

    def start(self) -> None:
        """
        Begin to commit and to renew.

        Raises:
            ServedOtherwiseError: the model is served with other limits.
        """
        deadline = time.monotonic() + REGISTER_S
        while True:
            try:
                self._register()
                break
            except StorageError as error:  # a database that is busy must not cost a loaded model
                if not error.retryable or time.monotonic() > deadline:
                    raise
                logger.warning("register_failed", error=error.code)
                time.sleep(COMMIT_RETRY_S)
        self._committer.start()
        self._heart.start()

    def _register(self) -> None:
        limits = self._engine.limits
        with self._stores.database.write() as session:
            served.register(
                session,
                Served(self._model, limits.image, limits.video, limits.frames),
                worker=self.worker,
                alive_s=self._config.lease_s,
            )

    def stop(self) -> None:
        """End the threads; what is committed by then is committed."""
        self._is_stopping.set()
        self._committer.stop()
        self._heart.join()
        with suppress(StorageError), self._stores.database.write() as session:
            served.leave(session, self._model, worker=self.worker)

    # --- one permit ----------------------------------------------------------------------------------

    def run_permits(self) -> None:
        """
        Work on one permit, and then go on as long as there is work, with permits or without.

        A permit wakes a thread that has nothing to do. One that has found work takes those that wait,
        so that they wake nobody for nothing, and depends on none: they may be lost, and there are
        fewer of them than a large job has chunks.
        """
        while self.run_chunk():
            self._dispatcher.take_permit(self._model)

    def run_chunk(self, *, is_fast: bool = False) -> int:
        """
        Lease one chunk and see each of its items to its end.

        Args:
            is_fast: of the fast lane only, whatever else waits.

        Returns:
            The number of items that were leased; 0 where there was nothing to do.
        """
        stand_ins: list[threading.Thread] = []
        try:
            return self._run_chunk(is_fast, stand_ins)
        finally:
            for thread in stand_ins:  # whoever waits for this one waits for what it began
                thread.join()

    def _run_chunk(self, is_fast: bool, stand_ins: list[threading.Thread]) -> int:
        with self._gate.pass_through(alone=False):
            chunk = self._lease_if_allowed(is_fast)
            if chunk is None:
                return 0
            if not chunk.is_alone:
                return self._see_to_the_end(chunk, is_fast, stand_ins)
        # Leased again when nobody else is inside: if it were ours while it waits, another one's
        # killing this process would count against it as if it had been alone.
        self.release([item.fence for item in chunk.items], sends_permits=False)
        with self._gate.pass_through(alone=True):
            chunk = self._lease_if_allowed(is_fast)
            return 0 if chunk is None else self._see_to_the_end(chunk, is_fast, stand_ins)

    def _stand_in_for(
        self, flight: Flight, is_fast: bool, stand_ins: list[threading.Thread]
    ) -> bool:
        """
        Let other chunks run beside one that only waits for hosts, until that has ended.

        Or a few hosts that let us wait would hold all chunks, and the engine would have nothing.

        Returns:
            Whether the chunk has items left that are worth waiting for.
        """
        if stand_ins or not flight.open:
            return bool(flight.open)
        with self._lock:
            if self._num_stand_ins[is_fast] >= MAX_STAND_INS:
                return True
            self._num_stand_ins[is_fast] += 1

        def run() -> None:
            try:
                while (
                    flight.open
                    and not self.is_draining.is_set()
                    and self.run_chunk(is_fast=is_fast)
                ):
                    pass
            finally:
                with self._lock:
                    self._num_stand_ins[is_fast] -= 1

        thread = threading.Thread(target=run, name="stand-in", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the system has no more of them: no fault of the items
            logger.warning("stand_in_not_started")
            with self._lock:
                self._num_stand_ins[is_fast] -= 1
            return True
        stand_ins.append(thread)
        return True

    def _lease_if_allowed(self, is_fast: bool) -> Chunk | None:
        with self._leases:  # whoever sees under it that we drain, and nobody leasing, sees the last
            is_draining = self.is_draining.is_set()
            self._num_leasing += not is_draining
        if is_draining:
            # This one was meant for somebody else.
            if is_fast:
                self._dispatcher.send_fast_permit(self._model)
            else:
                self._dispatcher.send_permits(self._model, 1)
            return None
        try:
            return self._lease_or_log(is_fast)
        finally:
            with self._leases:
                self._num_leasing -= 1
                self._leases.notify_all()

    def _lease_or_log(self, is_fast: bool) -> Chunk | None:
        if time.monotonic() - self._last_beat > self._config.lease_s / 2:
            logger.warning("lease_refused", reason="the heartbeat is late")
            return None
        try:
            return self._lease(jobs.FAST_LANE if is_fast else None)
        except StorageError as error:
            logger.warning("lease_failed", error=error.code)
            return None

    def _see_to_the_end(
        self, chunk: Chunk, is_fast: bool, stand_ins: list[threading.Thread]
    ) -> int:
        flight = self._add_flight(chunk)
        try:
            self._run(chunk, flight, lambda: self._stand_in_for(flight, is_fast, stand_ins))
            self._committer.hurry()
            while not flight.wait_until_settled(1.0):
                self._committer.hurry()
        except EngineLostError as error:
            self._give_up_engine(error)
        finally:
            with self._lock:
                del self._flights[chunk.lease]
        return len(chunk.items)

    def _lease(self, max_priority: int | None) -> Chunk | None:
        with self._stores.database.write() as session:
            return items.lease(
                session,
                model=self._model,
                worker=self.worker,
                max_items=self._config.chunk_items,
                lease_s=self._config.lease_s,
                max_priority=max_priority,
            )

    def _add_flight(self, chunk: Chunk) -> Flight:
        terms = {
            job: Terms(JobOptions.read(said).image_policy, chunk.caps[job])
            for job, said in chunk.options.items()
        }
        fences = {item.fence.item: item.fence for item in chunk.items}
        flight = Flight(chunk.lease, fences, terms)
        with self._lock:
            self._flights[chunk.lease] = flight
        if self.is_draining.is_set():  # it began between our look and now
            self.release(flight.close())
        logger.debug("chunk_leased", num_items=len(chunk.items), is_alone=chunk.is_alone)
        return flight

    def _run(self, chunk: Chunk, flight: Flight, on_wait: Callable[[], bool]) -> None:
        started = time.perf_counter()
        fences = dict(flight.open)
        hold = Hold(self._budget)
        wait_s = 0.0
        silence: Verdict | None = None  # the end of what was handed out and never came back
        stream = self._engine.stream(self._feed(chunk, flight, hold, on_wait))
        try:
            for result in stream:
                ready = flight.asked.pop(result.request_id)
                if isinstance(ready, Assembly):
                    self._follow(flight, ready, ready.take(result), hold)
                else:
                    self._take_result(flight, ready, result, hold)
                if not flight.open:  # all lost, released or done: abort what the engine still has
                    break
        except EngineLostError:
            raise
        except StorageError as error:  # the manifest could not be read
            logger.warning("chunk_unreadable", error=error.code)
            wait_s = STORE_WAIT_S
            silence = Verdict(Act.RELEASE, error.code, INTERNAL_TEXT)
        except Exception:
            # The edge of a task: a bug of ours must not end the worker. What the engine had is
            # charged with it, so that it ends; the rest goes back.
            logger.exception("chunk_failed", lease=str(chunk.lease))
            silence = judge(RuntimeError())
        finally:
            hold.close()
            close = getattr(stream, "close", None)
            if close is not None:
                close()
        flight.asked.clear()  # the engine has nothing of it any more
        # Not begun, because the worker drains or the manifest could not be read.
        self.release(flight.close(), wait_s=wait_s)
        if silence is not None:
            for fence in flight.list_silent():
                self._settle(flight, fence, silence)
        logger.info(
            "chunk_ended",
            num_items=len(fences),
            is_alone=chunk.is_alone,
            run_ms=round((time.perf_counter() - started) * 1000),
        )

    def _take_result(self, flight: Flight, ready: Ready, result: Result, hold: Hold) -> None:
        fence = ready.item.fence
        hold.release(fence.item)
        if result.error is not None:
            self._settle(flight, fence, replace(judge(result.error), media=ready.media))
        else:
            self._put(flight, build_completion(ready, result))

    def _feed(
        self,
        chunk: Chunk,
        flight: Flight,
        hold: Hold,
        on_wait: Callable[[], bool],
    ) -> Iterator[Prompt]:
        prepared = self._preparer.prepare(
            chunk.items, flight.terms, take=flight.take, hold=hold, on_wait=on_wait
        )
        for found in prepared:
            if isinstance(found, Refused):
                self._refuse(flight, found, hold)
            elif found.split is None:
                flight.asked[found.prompt.name] = found
                yield found.prompt
            else:
                yield from self._ask_parts(flight, found, hold)
            del found  # its media may be let go before the next one comes
            yield from self._ask_summaries(flight, hold, waits=False)
        yield from self._ask_summaries(flight, hold, waits=True)

    def _refuse(self, flight: Flight, refused: Refused, hold: Hold) -> None:
        fence = refused.item.fence
        hold.release(fence.item)
        verdict = judge(refused.error)
        if verdict.act is Act.EXIT:
            raise refused.error
        self._settle(flight, fence, replace(verdict, media=refused.media))

    # --- items that are asked in parts ---------------------------------------------------------------

    def _ask_parts(self, flight: Flight, ready: Ready, hold: Hold) -> Iterator[Prompt]:
        """The prompts of the parts that no earlier lease has answered."""
        assert ready.split is not None, "the caller looked"
        fence = ready.item.fence
        may_begin_anew = fence.attempt <= MAX_LEASES_ANEW or not ready.is_fetched
        try:
            with self._stores.database.write() as session:
                done = parts.begin(session, fence, ready.split.plan, may_drop=may_begin_anew)
        except PlanChangedError:
            self._refuse(flight, Refused(ready.item, MediaChangedError(), ready.media), hold)
            return
        except StorageError as error:
            self._refuse(flight, Refused(ready.item, error), hold)
            return
        if done is None:  # the lease is lost, and the heart will notice
            hold.release(fence.item)
            flight.settle([fence.item])
            return
        stitcher = build_stitcher(
            ready.split.subject,
            ready.prompt.messages,
            max_model_len=self._engine.max_model_len,
            max_tokens=ready.prompt.params.max_tokens,
            count_tokens=self._engine.count_tokens,
        )
        is_last_try = ready.item.charged + 1 >= self._config.max_attempts
        assembly = Assembly(
            fence,
            ready.prompt,
            ready.split,
            stitcher,
            done,
            media=ready.media,
            is_last_try=is_last_try,
        )
        flight.assemblies[fence.item] = assembly
        del ready  # the clip goes with the last piece that holds it
        while not flight.is_closed and flight.has(fence):
            prompt = assembly.ask()
            if prompt is None:
                self._follow(flight, assembly, assembly.go_on(), hold)
                return
            flight.asked[prompt.name] = assembly
            yield prompt
        self._follow(flight, assembly, assembly.cut_short(), hold)

    def _ask_summaries(self, flight: Flight, hold: Hold, *, waits: bool) -> Iterator[Prompt]:
        """
        Those that can be asked by now.

        Args:
            waits: until there are no more to come.
        """
        while flight.assemblies if waits else not flight.summaries.empty():
            try:
                found = flight.summaries.get(timeout=LOOK_S)
            except Empty:
                if hold.is_closed or not any(
                    flight.has(one.fence) for one in list(flight.assemblies.values())
                ):
                    return
                continue
            if found is not None and flight.has(found[0].fence):
                assembly, prompt = found
                flight.asked[prompt.name] = assembly
                yield prompt

    def _follow(self, flight: Flight, assembly: Assembly, move: Move, hold: Hold) -> None:
        """Do what a step of an assembly leads to. Of an item that was lost nothing counts any more."""
        fence = assembly.fence
        is_ours = flight.has(fence)
        if move.answer is not None and is_ours:
            text = move.answer.text
            answer = replace(move.answer, text=None if text is None else clean(text))
            self._committer.put(flight, NewPart(fence, assembly.plan, answer))
        if move.is_seen:
            hold.release(fence.item)
        for prompt in move.prompts:
            flight.summaries.put((assembly, prompt))
        if move.end is None:
            return
        hold.release(fence.item)
        flight.assemblies.pop(fence.item, None)
        flight.summaries.put(None)
        if isinstance(move.end, Whole):
            if is_ours:
                self._put(flight, build_whole_completion(assembly, move.end))
        elif is_ours:
            wait_s = 0.0 if move.end is CUT_SHORT else STORE_WAIT_S
            self._settle(flight, fence, replace(move.end, media=assembly.media), wait_s=wait_s)

    def _settle(
        self, flight: Flight, fence: Fence, verdict: Verdict, *, wait_s: float = STORE_WAIT_S
    ) -> None:
        if verdict.act is Act.RELEASE:
            # Whole seconds: items of one host are told nearly the same, and go back together.
            self._put(flight, Release(fence, math.ceil(max(wait_s, verdict.retry_after_s))))
        else:
            self._put(flight, verdict.as_failure(fence))

    def _put(self, flight: Flight, end: End) -> None:
        flight.told.add(end.fence.item)
        self._committer.put(flight, end)

    # --- giving back ---------------------------------------------------------------------------------

    def release(
        self, fences: Sequence[Fence], *, wait_s: float = 0.0, sends_permits: bool = True
    ) -> None:
        """
        Give leases back, uncharged, and say that there is work. Raises nothing: leases expire.

        Args:
            wait_s: nobody else may have them before; the sweeper says it then.
            sends_permits: False where the caller leases them itself.
        """
        if not fences:
            return
        try:
            self.commit_releases(fences, wait_s=wait_s, sends_permits=sends_permits)
        except StorageError as error:
            logger.warning("release_failed", num_items=len(fences), error=error.code)

    def drain(self) -> None:
        """Lease no more, and give back at once what the engine has not begun."""
        self.is_draining.set()
        for flight in self._all_flights():
            self.release(flight.close())

    def abandon(self) -> None:
        """Give back everything, begun or not: the deadline has come."""
        self._committer.flush()
        for flight in self._all_flights():
            self.release(flight.take_rest())

    def give_back(self, within_s: float) -> bool:
        """
        Lease no more, and give back all that the database has under this worker's name, uncharged.

        The last act of a worker: what its chunks know is not all. A release may have failed, and a
        lease whose commit was not answered may be ours.

        Returns:
            Whether nothing is left, and nothing can follow; False when the time is over first.
        """
        self.is_draining.set()
        deadline = time.monotonic() + within_s
        with self._leases:
            is_last = self._leases.wait_for(lambda: not self._num_leasing, within_s)
        while True:
            try:
                with self._stores.database.write() as session:
                    outcome = items.release_all(session, worker=self.worker)
            except StorageError as error:
                logger.warning("give_back_failed", error=error.code)
                if time.monotonic() > deadline:
                    return False
                time.sleep(GIVE_BACK_RETRY_S)
                continue
            if outcome.items:
                logger.info("items_released", num_items=len(outcome.items))
                self._dispatcher.send_permits_for(self._model, len(outcome.items))
            return is_last

    @property
    def num_in_flight(self) -> int:
        return sum(len(flight.open) for flight in self._all_flights())

    @property
    def num_media_bytes(self) -> int:
        """What `max_media_bytes` bounds."""
        return self._budget.num_bytes

    def _all_flights(self) -> list[Flight]:
        with self._lock:
            return list(self._flights.values())

    def _give_up_engine(self, error: EngineLostError) -> None:
        """What was in a lost device is suspect, each to be run alone; all else is innocent."""
        if not self._engine_lost.acquire(blocking=False):
            return  # another chunk's thread is at it
        self.is_draining.set()
        self._committer.flush()
        suspects: list[Fence] = []
        innocent: list[Fence] = []
        for flight in self._all_flights():
            inside = flight.list_asked() if isinstance(error, DeviceLostError) else ()
            for fence in flight.take_rest():
                (suspects if fence.item in inside else innocent).append(fence)
        self.release(innocent)
        try:
            with self._stores.database.write() as session:
                items.report_crash(session, sorted(suspects, key=lambda fence: fence.item))
        except StorageError as away:
            logger.warning("crash_not_reported", error=away.code)  # their leases end by themselves
        else:
            self.give_back(GIVE_BACK_S)
        logger.error(error.code, reason=str(error), num_suspects=len(suspects))
        self._on_engine_lost()

    # --- the heart -------------------------------------------------------------------------------------

    def _beat_for_ever(self) -> None:
        while not self._is_stopping.wait(self._config.heartbeat_s):
            try:
                self._watch_engine()
                self.beat()
            except StorageError as error:
                logger.warning("beat_failed", error=error.code)
            except Exception:
                # The edge of a thread that must not end: without it every lease would be lost.
                logger.exception("beat_failed")

    def _watch_engine(self) -> None:
        """
        Take an engine that has prompts and finishes nothing for one whose device is gone.

        What waits for its turn, for room or for a host is none of the engine's prompts yet. A thread that
        hangs inside a driver cannot be ended: the process must, and is started again.
        """
        progress, now = self._engine.read_progress(), time.monotonic()
        is_busy = any(flight.list_asked() for flight in self._all_flights())
        if not is_busy or progress != self._progress:
            self._progress, self._progress_at = progress, now
        elif now - self._progress_at > self._config.stall_s:
            logger.error("engine_stalled", stall_s=self._config.stall_s)
            self._give_up_engine(DeviceLostError())

    def beat(self) -> None:
        """Renew the leases of all chunks in flight, and let go of items that were lost."""
        flights = self._all_flights()
        held = {flight.lease: list(flight.open) for flight in flights}
        if flights:
            with self._stores.database.write() as session:
                ours = items.renew(session, list(held), lease_s=self._config.lease_s)
            lost = [(f, fence) for f in flights for fence in f.lose(ours, held[f.lease])]
            if lost:
                logger.warning("leases_lost", num_items=len(lost))
                self._engine.abort({name for f, fence in lost for name in f.list_names(fence)})
        with self._stores.database.write() as session:
            served.touch(session, self._model, worker=self.worker)
        self._last_beat = time.monotonic()
        self._report_usage()  # last of all: whatever goes wrong with it costs no lease

    def _report_usage(self) -> None:
        """Write down what the engine has done, for metrics."""
        usage = self._engine.read_usage()
        if usage is None:
            return
        with self._stores.database.write() as session:
            number = served.report(
                session,
                self._model,
                worker=self.worker,
                usage=asdict(usage),
                alive_s=self._config.lease_s,
            )
        if number is not None:
            logger.info("worker_numbered", worker=self.worker, number=number)

    # --- commits, called by the committer --------------------------------------------------------------

    def commit_parts(self, new: Sequence[NewPart]) -> None:
        """Raises as `commit_completions` does."""
        with self._stores.database.write() as session:
            held = parts.keep(session, new)
        num_fenced = sum(part.fence.item not in held for part in new)
        if num_fenced:
            logger.warning("parts_fenced", num_parts=num_fenced)

    def commit_completions(self, completions: Sequence[Completion]) -> None:
        """Raises StorageError: commit them again; the fence makes that safe."""
        with self._stores.database.write() as session:
            outcome = items.complete(session, completions)
        self.num_completed += len(outcome.items)
        self._tell_of(outcome, len(completions))

    def commit_failures(self, failures: Sequence[Failure]) -> None:
        """Raises as `commit_completions` does."""
        with self._stores.database.write() as session:
            outcome = items.fail(session, failures, max_attempts=self._config.max_attempts)
        self.num_failed += len(outcome.items)
        self._tell_of(outcome, len(failures))

    def commit_releases(
        self, fences: Sequence[Fence], *, wait_s: float, sends_permits: bool = True
    ) -> None:
        """As `release`, but raises as `commit_completions` does."""
        with self._stores.database.write() as session:
            ordered = sorted(fences, key=lambda fence: fence.item)
            outcome = items.release(session, ordered, wait_s=wait_s)
        logger.info("items_released", num_items=len(outcome.items))
        if sends_permits and not wait_s:
            self._dispatcher.send_permits_for(self._model, len(outcome.items))

    def drop_committed(self, completions: Sequence[Completion]) -> list[Completion]:
        """After a commit whose answer was lost: those that it did not write."""
        with self._stores.database.read() as session:
            written = items.find_committed(session, [one.fence for one in completions])
        return [one for one in completions if one.fence.item not in written]

    def _tell_of(self, outcome: Outcome, num_tried: int) -> None:
        num_fenced = num_tried - len(outcome.items)
        if num_fenced:
            self.num_fenced += num_fenced
            logger.warning("results_fenced", num_items=num_fenced)
        for job in outcome.ended_jobs:
            self._dispatcher.send_finish(job)


class Committer:
    """
    Gathers what has ended and commits it in groups, whichever chunk it belongs to.

    One thread: two writers of one process would only wait for each other's rows.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._queue: Queue[tuple[Flight, Entry] | None] = Queue(MAX_UNCOMMITTED)
        self._is_stopped = threading.Event()
        self._has_ended = threading.Event()
        self._changed = threading.Condition()
        self._num_left = 0  # in the queue, or in the group that is gathered or written
        self._thread = threading.Thread(target=self._run, name="committer", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def put(self, flight: Flight, end: Entry) -> None:
        with self._changed:
            self._num_left += 1
        self._queue.put((flight, end))
        if self._has_ended.is_set():  # or its chunk would wait for ever
            self._give_up_rest()

    def hurry(self) -> None:
        """A chunk has no more to give: commit what is there without waiting for a full group."""
        with suppress(Full):  # then it has enough for a group
            self._queue.put_nowait(None)

    def flush(self) -> None:
        """Have what is there committed now; waits for `FLUSH_S` at most."""
        self.hurry()
        with self._changed:
            if not self._changed.wait_for(lambda: self._num_left == 0, FLUSH_S):
                logger.warning("flush_failed", num_items=self._num_left)

    def stop(self) -> None:
        self._is_stopped.set()
        self.hurry()
        self._thread.join()

    def _run(self) -> None:
        while not (self._is_stopped.is_set() and self._queue.empty()):
            group = self._gather()
            num_items = len(group)
            try:
                self._commit_at_last(group)
            except Exception:
                # The edge of a thread that must not end: nobody else commits.
                logger.exception("commit_failed")
                self._give_up(group)
            self._note_done(num_items)
        self._has_ended.set()
        self._give_up_rest()

    def _give_up_rest(self) -> None:
        """What comes when nobody commits any more."""
        with suppress(Empty):
            while True:
                entry = self._queue.get_nowait()
                if entry is not None:
                    self._give_up([entry])
                    self._note_done(1)

    def _note_done(self, num_items: int) -> None:
        with self._changed:
            self._num_left -= num_items
            self._changed.notify_all()

    def _gather(self) -> list[tuple[Flight, Entry]]:
        config = self._runner._config
        first = self._queue.get()
        if first is None:
            return []
        group = [first]
        deadline = time.monotonic() + config.commit_s
        while len(group) < config.commit_items:
            try:
                entry = self._queue.get(timeout=max(0.0, deadline - time.monotonic()))
            except Empty:
                break
            if entry is None:
                break
            group.append(entry)
        return group

    def _commit_at_last(self, group: list[tuple[Flight, Entry]]) -> None:
        while group:
            try:
                self._commit(group)
            except CommitUnknownError:
                group = self._without_committed(group)
            except StorageError as error:
                logger.warning("commit_failed", num_items=len(group), error=error.code)
                if not error.retryable:
                    self._commit_apart(group)
                    return
                # What lost its lease meanwhile is fenced when the database is back.
                time.sleep(COMMIT_RETRY_S)
                if self._is_stopped.is_set():
                    self._give_up(group)
                    return
            else:
                return

    def _commit_apart(self, group: list[tuple[Flight, Entry]]) -> None:
        """After a refusal, which comes again: the one that is refused must not hold up the others."""
        for flight, end in group:
            if len(group) > 1:
                self._commit_at_last([(flight, end)])
            elif not isinstance(end, Failure | Release):
                failure = judge(RuntimeError()).as_failure(end.fence)
                self._commit_at_last([(flight, failure)])
            else:
                self._give_up(group)

    def _give_up(self, group: list[tuple[Flight, Entry]]) -> None:
        """Their leases end by themselves, with the flight's: the sweeper takes it from there."""
        for flight, end in group:
            flight.settle([end.fence.item])

    def _commit(self, group: list[tuple[Flight, Entry]]) -> None:
        """
        A transaction for each kind; what one has committed leaves the group, whatever the next does.

        Parts come first: a result over them must not stand there without them, and under a lease that
        was given back they would not be written.
        """
        new_parts = [end for _, end in group if isinstance(end, NewPart)]
        if new_parts:
            self._runner.commit_parts(new_parts)
            group[:] = [entry for entry in group if not isinstance(entry[1], NewPart)]
        completions = [end for _, end in group if isinstance(end, Completion)]
        if completions:
            self._runner.commit_completions(completions)
            self._settle(group, Completion)
        failures = [end for _, end in group if isinstance(end, Failure)]
        if failures:
            self._runner.commit_failures(failures)
            self._settle(group, Failure)
        releases = [end for _, end in group if isinstance(end, Release)]
        for wait_s in sorted({end.wait_s for end in releases}):
            fences = [end.fence for end in releases if end.wait_s == wait_s]
            self._runner.commit_releases(fences, wait_s=wait_s)
        self._settle(group, Release)

    def _settle(self, group: list[tuple[Flight, Entry]], kind: type[End]) -> None:
        for flight, end in group:
            if isinstance(end, kind):
                flight.settle([end.fence.item])
        group[:] = [entry for entry in group if not isinstance(entry[1], kind)]

    def _without_committed(self, group: list[tuple[Flight, Entry]]) -> list[tuple[Flight, Entry]]:
        try:
            completions = [end for _, end in group if isinstance(end, Completion)]
            left = {end.fence.item for end in self._runner.drop_committed(completions)}
        except StorageError:
            time.sleep(COMMIT_RETRY_S)
            return group
        kept = []
        for flight, end in group:
            if isinstance(end, Completion) and end.fence.item not in left:
                flight.settle([end.fence.item])
            else:
                kept.append((flight, end))
        return kept


# What is kept of a result


_DEFAULTS: Final = asdict(SamplingParams())


def build_completion(ready: Ready, result: Result) -> Completion:
    outputs = result.outputs
    return Completion(
        ready.item.fence,
        text=clean(outputs[0].text),
        finish_reason=str(outputs[0].finish_reason or "stop"),
        num_prompt_tokens=len(result.prompt_token_ids or ()),
        num_completion_tokens=sum(len(output.token_ids) for output in outputs),
        num_cached_tokens=result.num_cached_tokens or 0,
        details={key: value for key, value in _details(ready, result, outputs) if value},
    )


def build_whole_completion(assembly: Assembly, whole: Whole) -> Completion:
    """Of an item that was asked in parts, whose images stand with them."""
    fence = assembly.fence
    details: dict[str, Any] = {"num_parts": whole.num_parts, "media": list(assembly.media)}
    if whole.result is not None:
        details["flags"] = [str(flag) for flag in whole.result.flags]
        details["timings"] = _timings(whole.result)
        details["stamp"] = _stamp(whole.result, fence)
    return Completion(
        fence,
        text=clean(whole.text),
        finish_reason=whole.finish_reason,
        num_prompt_tokens=whole.num_prompt_tokens,
        num_completion_tokens=whole.num_completion_tokens,
        num_cached_tokens=whole.num_cached_tokens,
        details={key: value for key, value in details.items() if value},
    )


def _details(
    ready: Ready, result: Result, outputs: Sequence[CompletionOutput]
) -> Iterator[tuple[str, Any]]:
    yield "images", [asdict(image) for image in result.images]
    yield "media", _join_sizes(ready.media, result.images)
    yield "flags", [str(flag) for flag in result.flags]
    yield "timings", _timings(result)
    if ready.num_images_given != ready.num_images_used:
        yield (
            "image_policy",
            {
                "policy": str(ready.image_policy),
                "num_given": ready.num_images_given,
                "num_used": ready.num_images_used,
            },
        )
    if len(outputs) > 1:
        yield (
            "outputs",
            [
                {"text": clean(output.text), "finish_reason": str(output.finish_reason or "stop")}
                for output in outputs
            ],
        )
    yield "stamp", _stamp(result, ready.item.fence)


def _stamp(result: Result, fence: Fence) -> dict[str, Any] | None:
    if result.stamp is None:
        return None
    stamp: dict[str, Any] = asdict(result.stamp)
    given: Mapping[str, Any] = result.stamp.sampling
    stamp["sampling"] = {key: value for key, value in given.items() if value != _DEFAULTS.get(key)}
    return {**stamp, "attempt": fence.attempt}


def _join_sizes(
    media: Sequence[Mapping[str, Any]], images: Sequence[ImageUsed]
) -> list[dict[str, Any]]:
    """Where each picture and clip comes from, and how large it was; both in the prompt's order."""
    if len(media) != len(images):  # an engine that reports no sizes
        return [dict(one) for one in media]
    return [
        {**one, "width": image.width, "height": image.height}
        for one, image in zip(media, images, strict=True)
    ]


def _timings(result: Result) -> dict[str, float]:
    metrics = result.metrics
    named = {
        "preprocess_ms": metrics.preprocess_ms,
        "prefill_ms": metrics.prefill_ms,
        "generate_ms": metrics.decode_ms,
    }
    return {name: round(ms, 3) for name, ms in named.items() if ms is not None}
