"""
Requests in, results out, each the moment it is ready: the loop that owns the device.

Media threads prepare requests ahead, bounded in number; a step admits what is ready, runs one batch
and takes its tokens. Whatever goes wrong with one request becomes its own result: every request
ends in exactly one, and none of them as an exception through the loop.
"""

import itertools
import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from importlib import metadata

import torch
from torch import Tensor, nn

from engine.checkpoint import Checkpoint
from engine.config import EngineConfig
from engine.errors import BadConfig, DecodersAway, EngineClosed, EngineError, EngineFailure
from engine.floors import Asked, find_floors
from engine.inputs import Request, may_fetch, text_of
from engine.kernels.greedy import NO_TOKEN
from engine.meter import Usage, Work
from engine.processor import Prepared, Processor
from engine.request import FinishReason, Flag, Metrics, Result, SamplingParams, Stamp, find_flags
from engine.runner import Runner, num_kv_rows
from engine.sampler import (
    Sampled,
    Sampler,
    TokenLogprobs,
    mix_seed,
)
from engine.scheduler import Scheduler
from engine.sequence import Sequence
from engine.slabs import NUM_SCRATCH_ROWS, SlabAllocator, round_rows
from engine.text import Detokenizer, decode_token
from engine.uploads import Download
from engine.usage import EngineUsage
from media.decoder import Decoder, Threads
from media.errors import DecodersAwayError
from media.limits import STILL_FORMATS, ImageLimits

logger = logging.getLogger(__name__)

NUM_PREPARED_AHEAD = 32  # requests of a stream in media threads or waiting, beside those that run
MAX_PREPARED_BYTES = 1 << 30  # pixels that wait for the encoder; over it only so many are ahead
# Requests whose pixels nobody knows yet. Small ones that came before say nothing about them: where
# pictures of 12 megapixels follow on short texts, a thousand at once would be 38 GB.
MAX_UNPREPARED = 128
# Prefills of prompts that wait for a GPU, beside those of NUM_PREPARED_AHEAD. Enough to fill the next
# one at any moment; more would only be prepared all at once, while Python has kernels to launch.
NUM_PREFILLS_AHEAD = 3
GPU_NUM_SEQS, CPU_NUM_SEQS = 512, 256  # that decode together: weights are read once for all of them
# Of one call. A GPU's are as many as fill an H100's 132 multiprocessors to the last with tiles of 128 rows,
# however many columns a product has.
GPU_PREFILL_TOKENS, CPU_PREFILL_TOKENS = 132 * 128, 8192
MAX_MEDIA_THREADS = 8  # by default beside a GPU, for the same reason
NUM_MEDIA_THREADS_BESIDE = 2  # more than there are processes that decode
GPU_FLIGHTS = 2  # batches that a GPU may have before the tokens of the first are read
# What a GPU that has nothing to do waits for more prompts: the first calls of a stream would be of
# one or two pictures each, and take nearly as long as full ones.
GATHER_S = 0.03
USAGE_EVERY_S = 10.0  # how often a working engine says in the log what its device does
GPU_PATIENCE = 16  # decode steps for which a prefill may wait to be a full one


@dataclass(slots=True, eq=False)
class _Ticket:
    """One request on its way, and where its result goes."""

    number: int
    request: Request
    sink: deque[Result]
    arrival_time: float
    arrived: float  # perf_counter
    prepared: Prepared | None = None
    sequences: list[Sequence] = field(default_factory=list)
    feed: "_Feed | None" = None
    num_bytes: int = 0  # of pixels that wait for the encoder
    is_counted: bool = False  # as one that waits, in its feed
    seed: int | None = None
    wait_ms: float = 0.0  # how long the device had nothing to do but wait for it
    queued_ts: float | None = None
    scheduled_ts: float | None = None
    first_token_ts: float | None = None
    prefill_ms: float = 0.0
    decode_ms: float = 0.0

    @property
    def prompt(self) -> str | None:
        """Its text: as it was read or, before that and for token ids, as it was given."""
        read = self.prepared.prompt if self.prepared else None
        return text_of(self.request.prompt) if read is None else read

    @property
    def is_finished(self) -> bool:
        # The last is usually the last to finish: of thousands, most questions look at one.
        return all(sequence.is_finished for sequence in reversed(self.sequences))


@dataclass(slots=True, eq=False)
class _Feed:
    """One stream: where its requests come from, and where its results go."""

    source: Iterator[Request]
    sink: deque[Result] = field(default_factory=deque)
    open: set[int] = field(default_factory=set)  # tickets without a result
    num_waiting: int = 0  # of these, those that the device has not seen yet
    is_exhausted: bool = False  # by its source, which may have raised
    is_closed: bool = False  # by its reader
    error: BaseException | None = None


@dataclass(frozen=True, slots=True)
class _Half:
    """
    What of a batch ran in one call: all of it, unless that failed.

    Attributes:
        chosen_for: those of its sequences for which a token was chosen; of a prompt that is read in
            pieces, only the last brings one.
    """

    sequences: list[Sequence]
    chosen_for: list[Sequence]
    download: Download
    sampled: Sampled


@dataclass(frozen=True, slots=True)
class _Flight:
    """
    A batch that was launched and whose tokens have not been read.

    Attributes:
        launched: perf_counter.
    """

    halves: list[_Half]
    is_prefill: bool
    launched: float


class Engine:
    """
    Args:
        config: as the caller gave it.
        checkpoint: read, not loaded.
        model: its weights, prepared for our attention.
    """

    def __init__(self, config: EngineConfig, checkpoint: Checkpoint, model: nn.Module) -> None:
        self.checkpoint = checkpoint
        rows = plan_rows(config, checkpoint)
        self.max_num_seqs = _max_num_seqs(config, checkpoint)
        self._config = config
        num_threads = _num_media_threads(config, checkpoint)
        self._decoder = _open_decoder(config)
        weakref.finalize(self, self._decoder.close)  # who forgets to close leaves no processes
        self._processor = Processor(config, checkpoint, self._decoder, num_threads)
        is_cuda = checkpoint.device.type == "cuda"
        max_prefill_tokens = config.max_num_batched_tokens or (
            GPU_PREFILL_TOKENS if is_cuda else CPU_PREFILL_TOKENS
        )
        self._scheduler = Scheduler(
            SlabAllocator(rows),
            self.max_num_seqs,
            max_prefill_tokens,
            GPU_PATIENCE if is_cuda else 0,
            prefills_alone=config.deterministic,
        )
        checkpoint.family.uses_keys = config.encoder_cache_bytes > 0 or config.enable_prefix_caching
        self._runner = Runner(
            checkpoint,
            rows,
            max_num_seqs=self.max_num_seqs,
            max_prefill_tokens=max_prefill_tokens,
            cache_bytes=config.encoder_cache_bytes,
            uses_graphs=config.uses_graphs,
            is_deterministic=config.deterministic,
        )
        # Batches in the air, the oldest first. On a CPU nothing flies: a call is its own result.
        self._flights: deque[_Flight] = deque()
        self._max_flights = GPU_FLIGHTS if is_cuda else 0
        self._last_landed = self._last_collected = 0.0  # perf_counter
        self._num_ahead = 2 * self.max_num_seqs if is_cuda else NUM_PREPARED_AHEAD
        self._max_tokens_ahead = NUM_PREFILLS_AHEAD * max_prefill_tokens
        self._prepared_bytes = 0
        self._usual_tokens = 0.0  # of a prompt, lately
        self.meter = self._runner.meter
        self._floors = find_floors(
            checkpoint.config,
            torch.cuda.get_device_name(checkpoint.device) if is_cuda else checkpoint.device.type,
            self.max_num_seqs,
            checkpoint.dtype.itemsize,
        )
        vocab_size = checkpoint.family.text_config.vocab_size
        self._sampler = Sampler(vocab_size, checkpoint.device)
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="media")
        # Callables may wait for a network: they have threads of their own, more than there are cores,
        # so that no text waits behind them. Decoding takes turns on the cores, whoever does it.
        self._fetching_pool = ThreadPoolExecutor(
            NUM_PREPARED_AHEAD, thread_name_prefix="media-fetch"
        )
        self._preparing: dict[Future[Prepared], _Ticket] = {}
        self._prepared: deque[Future[Prepared]] = deque()  # those of them that are done
        self._tickets: dict[int, _Ticket] = {}
        self._numbers = itertools.count()
        self._has_told_cut_off = False
        self._pieces: dict[int, str] = {}  # texts of single tokens
        # One thread at a time steps; a result goes to the stream that asked, whoever stepped.
        self._lock = threading.Lock()  # held for one step, never while anybody waits
        self._door = threading.Lock()  # held only by the thread that has the next turn
        # Guards what comes and what goes, and tells of it. Taken inside `_lock`, never around it.
        self._news = threading.Condition()
        self._is_closed = False
        self._aborted: deque[int] = deque()  # tickets to drop once the engine is free
        self._idle_since = self._ready_since = self._told_at = time.perf_counter()
        self._waited_for_media_s = 0.0  # with nothing else to do
        self._num_cached_tokens = 0  # of prompts: not read, but copied
        self._floor_s = 0.0  # of the requests that have finished
        self._told = self.read_usage()
        row_bytes = checkpoint.kv_shape.row_bytes
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        logger.info(
            "engine_ready model=%s device=%s dtype=%s max_model_len=%d weights_mib=%d kv_rows=%d "
            "kv_mib=%d num_seqs_of_max_len=%d max_num_seqs=%d encoder_cache_mib=%d",
            config.model,
            checkpoint.device,
            checkpoint.dtype,
            checkpoint.max_model_len,
            weights >> 20,
            rows,
            rows * row_bytes >> 20,
            (rows - NUM_SCRATCH_ROWS) // checkpoint.max_model_len,
            self.max_num_seqs,
            config.encoder_cache_bytes >> 20,
        )
        if is_cuda and self._floors is None:
            logger.info("floor_unknown: of this family or this device nobody has worked one out")

    # --- the stream ----------------------------------------------------------------------------------

    def stream(self, requests: Iterable[Request]) -> Iterator[Result]:
        """
        Run requests as they come; yield results as they finish, in no order.

        A thread of the stream's own pulls the requests, so a source may block for as long as it likes,
        also until it has seen an earlier result. It pulls a little ahead of the work and no further,
        so the source may be endless. Closing the iterator aborts what it has in flight.

        Raises:
            EngineClosed: the engine was closed and the source had more.
        """
        feed = _Feed(iter(requests))
        # A daemon: a source that blocks for ever must not keep the process alive.
        threading.Thread(target=self._pull, args=(feed,), name="feed", daemon=True).start()
        try:
            while True:
                with self._turn():
                    if not feed.sink:
                        self._step()
                while feed.sink:
                    yield feed.sink.popleft()
                    self._tell()  # there is room for one more
                with self._news:
                    feed.open &= self._tickets.keys()
                    if feed.is_exhausted and not feed.open and not feed.sink:
                        break
                    # NOTE: nobody waits with the engine held: others must get in meanwhile.
                    self._news.wait_for(partial(self._has_news, feed))
        finally:
            with self._news:
                feed.is_closed = True
                self._news.notify_all()
            self.abort(feed.open)
        if feed.error is not None:
            raise feed.error

    def _pull(self, feed: _Feed) -> None:
        """Take requests from a stream's source while there is room, until either of them ends."""
        try:
            while True:
                with self._news:
                    self._news.wait_for(partial(self._can_pull, feed))
                    if feed.is_closed:
                        return
                request = next(feed.source, None)
                with self._news:
                    if request is None or feed.is_closed:
                        return
                    feed.open.add(self.add(request, feed.sink, feed))
                    del request  # its pictures may be let go before the next one comes
        except BaseException as error:  # noqa: BLE001 - raised again, in the thread that reads results
            feed.error = error
        finally:
            with self._news:
                feed.is_exhausted = True
                self._news.notify_all()

    def _can_pull(self, feed: _Feed) -> bool:
        """Results that nobody takes count too: a reader that pauses stops its source."""
        if feed.is_closed or self._is_closed:  # then the source is asked whether that was all
            return True
        num_ahead = feed.num_waiting + len(feed.sink)
        if num_ahead < NUM_PREPARED_AHEAD:
            return True
        tokens_ahead = (
            self._scheduler.num_waiting_tokens + len(self._preparing) * self._usual_tokens
        )
        return (
            self._usual_tokens > 0
            and tokens_ahead < self._max_tokens_ahead
            and num_ahead < self._num_ahead
            and self._prepared_bytes < MAX_PREPARED_BYTES
            and len(self._preparing) - len(self._prepared) < MAX_UNPREPARED
        )

    def _has_news(self, feed: _Feed) -> bool:
        """Whether the thread of a stream has anything to do."""
        return bool(
            feed.sink
            or self._scheduler.has_work
            or self._flights
            or self._prepared
            or (feed.is_exhausted and not (feed.open & self._tickets.keys()))
        )

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Hold the engine. Who waits for it goes before who has just had it."""
        with self._door:
            self._lock.acquire()
        try:
            yield
        finally:
            self._lock.release()
            self._sweep()

    def add(self, request: Request, sink: deque[Result], feed: _Feed | None = None) -> int:
        """
        Take one request; its result will be appended to `sink`. Returns its ticket.

        Raises:
            EngineClosed: after `close`.
        """
        with self._news:
            if self._is_closed:
                raise EngineClosed
            number = next(self._numbers)
            if not request.request_id:
                request = replace(request, request_id=str(number))
            ticket = _Ticket(number, request, sink, time.time(), time.perf_counter())
            pool = self._fetching_pool if may_fetch(request) else self._pool
            future = pool.submit(self._processor.prepare, request)
            self._tickets[number] = ticket
            self._preparing[future] = ticket
            if feed is not None:
                ticket.feed, ticket.is_counted = feed, True
                feed.num_waiting += 1
        future.add_done_callback(self._note_prepared)
        return number

    def _note_prepared(self, future: Future[Prepared]) -> None:
        with self._news:
            if future in self._preparing:  # nobody else wants to know, or would ever let it go
                self._prepared.append(future)
                self._news.notify_all()

    def _tell(self, _: object = None) -> None:
        """Wake whoever waits for something to do, or for room."""
        with self._news:
            self._news.notify_all()

    def abort(self, numbers: Iterable[int]) -> None:
        """
        Drop requests, wherever they are, without a result. Unknown tickets are finished ones.

        Never waits: it may run wherever Python closes a forgotten stream, in the middle of a step
        too. Whoever holds the engine then drops them when the step is over.
        """
        self._aborted.extend(numbers)
        self._sweep()

    def abort_named(self, request_ids: Collection[str]) -> None:
        """As `abort`, for requests that go by these ids; for threads that hold no stream."""
        tickets = list(self._tickets.values())
        self.abort(t.number for t in tickets if t.request.request_id in request_ids)

    @property
    def progress_at_s(self) -> float:
        """When a batch last came back from the device or a request from the media threads, by `perf_counter`."""
        return max(self._last_landed, self._last_collected)

    def _sweep(self) -> None:
        """Drop what was aborted and, after `close`, all the rest; nothing where another holds the engine."""
        while (self._aborted or (self._is_closed and self._tickets)) and self._lock.acquire(
            blocking=False
        ):
            try:
                while self._aborted:
                    self._drop(self._aborted.popleft())
                if self._is_closed:
                    self._end_all()
                if not self._tickets:  # nobody waits for what is in the air, and it holds pictures
                    self._flights.clear()
            finally:
                self._lock.release()
        self._tell()

    def _drop(self, number: int) -> None:
        with self._news:
            ticket = self._tickets.pop(number, None)
            if ticket is None:
                return
            for future in [f for f, t in self._preparing.items() if t is ticket]:
                del self._preparing[future]
                if not future.cancel() and future in self._prepared:
                    self._prepared.remove(future)
        for sequence in ticket.sequences:  # what flies with them is not for anybody
            sequence.finish_reason = sequence.finish_reason or FinishReason.ABORT
        self._scheduler.finish(ticket.sequences)
        self._uncount(ticket)

    def _end_all(self) -> None:
        with self._news:
            self._preparing.clear()
            self._prepared.clear()
            for ticket in list(self._tickets.values()):
                self._fail(ticket, EngineClosed())

    # --- one step ------------------------------------------------------------------------------------

    def _step(self) -> None:
        """Admit what is ready, launch one batch, and hand out what the ones before it have finished."""
        self._collect()
        was_launched = self._launch()
        while self._flights and (not was_launched or len(self._flights) > self._max_flights):
            self._land(self._flights.popleft())
            was_launched = True  # one at a time where there is nothing else to do
        now = time.perf_counter()
        if not self._scheduler.has_work:
            self._idle_since = now
            self.meter.read()  # or what ran last would count only once something runs again
        if now - self._told_at >= USAGE_EVERY_S:
            self._tell_usage(now)

    def _tell_usage(self, now: float) -> None:
        """Say in the log what the device did since the last time, as shares of that time."""
        took_s, usage = now - self._told_at, self._sum_up(self.meter.read())
        used = usage.since(self._told)
        of_floor = "" if used.floor_s is None else f" of_floor={used.floor_s / took_s:.3f}"
        logger.info(
            "engine_usage busy=%.3f encode=%.3f prefill=%.3f decode=%.3f waited_for_media=%.3f "
            "patches_s=%d prompt_tokens_s=%d tokens_s=%d cached_tokens_s=%d running=%d waiting=%d "
            "preparing=%d%s",
            used.busy_s / took_s,
            used.encode_s / took_s,
            used.prefill_s / took_s,
            used.decode_s / took_s,
            used.waited_for_media_s / took_s,
            used.num_patches / took_s,
            used.num_prompt_tokens / took_s,
            used.num_tokens / took_s,
            used.num_cached_tokens / took_s,
            used.num_running,
            used.num_waiting,
            used.num_preparing,
            of_floor,
        )
        self._told_at, self._told = now, usage

    def read_usage(self) -> EngineUsage:
        """
        What the engine has done since it was made, and what it holds now. For any thread.

        Never waits and never asks the device, so it may lag by the calls that run.
        """
        return self._sum_up(self.meter.peek())

    def _sum_up(self, done: Usage) -> EngineUsage:
        return EngineUsage(
            encode_s=done.ms[Work.ENCODE] / 1000,
            prefill_s=done.ms[Work.PREFILL] / 1000,
            decode_s=done.ms[Work.DECODE] / 1000,
            num_patches=done.units[Work.ENCODE],
            num_prompt_tokens=done.units[Work.PREFILL],
            num_tokens=done.units[Work.DECODE],
            num_cached_tokens=self._num_cached_tokens,
            waited_for_media_s=self._waited_for_media_s,
            floor_s=None if self._floors is None else self._floor_s,
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
            num_preparing=len(self._preparing),
        )

    def _collect(self) -> None:
        """Queue what the media threads have prepared."""
        ready = []
        with self._news:
            # In the order in which they came: for this one the device has waited longest.
            oldest = next(iter(self._preparing.values()), None)
            while self._prepared:
                future = self._prepared.popleft()
                ticket = self._preparing.pop(future, None)
                if ticket is not None:
                    ready.append((ticket, future))
        was_idle = not self._scheduler.has_work
        now = time.perf_counter()
        if ready:
            self._last_collected = now
        if oldest is not None and ready and was_idle:
            self._ready_since = now
            self._waited_for_media_s += now - max(self._idle_since, oldest.arrived)
        for ticket, future in ready:
            if was_idle:
                waited_s = now - max(self._idle_since, ticket.arrived)
                ticket.wait_ms = waited_s * 1000
            error = _error_of(future)
            if error is None:
                with self._contained(ticket):
                    self._queue(ticket, future.result())
            else:
                # Not raised again: its trace would lead here, to the future that holds it, and what
                # the request brought would lie in that circle until some garbage collection.
                self._contain(ticket, error)

    def _queue(self, ticket: _Ticket, prepared: Prepared) -> None:
        ticket.prepared = prepared
        # Pictures as they came may be a hundred times their patches: they go now, not with the result.
        ticket.request = replace(
            ticket.request, prompt=ticket.prompt, messages=None, multi_modal_data=None
        )
        ticket.queued_ts = time.perf_counter()
        ticket.num_bytes = prepared.num_pixel_bytes
        self._prepared_bytes += ticket.num_bytes
        self._usual_tokens += (len(prepared.token_ids) - self._usual_tokens) / (
            NUM_PREPARED_AHEAD if self._usual_tokens else 1
        )
        params = prepared.params
        if not params.greedy:
            ticket.seed = params.seed
            if ticket.seed is None:  # another draw for each request, the same for the same order
                ticket.seed = mix_seed(self._config.seed, ticket.number)
        features: dict[int, Tensor] = {}
        encoded: set[int] = set()
        for index in range(params.n):
            sequence = Sequence(
                ticket.number,
                prepared,
                index,
                ticket.seed or 0,
                self.checkpoint.eos_token_ids,
                Detokenizer(
                    self.checkpoint.tokenizer, params, streaming=False, pieces=self._pieces
                ),
                ticket.request.priority,
                features,
                encoded,
            )
            ticket.sequences.append(sequence)
            self._scheduler.add(sequence)

    def _launch(self) -> bool:
        """Launch the next batch, if there is one."""
        if not self._scheduler.has_work or self._gathers():
            return False
        batch = self._scheduler.schedule(may_come=bool(self._preparing))
        sequences = batch.sequences
        if not batch.is_prefill:
            sequences = [sequence for sequence in sequences if sequence.wants_token]
        if not sequences:
            return False
        if not batch.is_prefill and any(s.reads_history for s in sequences):
            while self._flights:  # their tokens decide what is chosen next
                self._land(self._flights.popleft())
            sequences = [sequence for sequence in sequences if sequence.wants_token]
        started = time.perf_counter()
        if batch.is_prefill:
            for sequence in sequences:
                self._note_scheduled(sequence, started)
            self._copy_prefixes([s for s in sequences if s.copied_from is not None])
        run = self._prefill if batch.is_prefill else self._decode
        flight = _Flight(self._guarded(run, sequences), batch.is_prefill, started)
        if batch.is_prefill:
            for half in flight.halves:
                self._scheduler.keep_prefixes(half.chosen_for)
        if flight.halves:
            self._flights.append(flight)
        # Whose last token was launched needs its rows no more: what is launched into them later runs
        # later. Those behind need not wait until that token has been read.
        spent = [s for s in sequences if s.start is not None and not s.wants_token]
        if spent:
            self._scheduler.finish(spent)
        return True

    def _gathers(self) -> bool:
        """Whether to wait a moment for more, where nothing runs and a prefill would be a small one."""
        if self._max_flights == 0 or self._flights or not self._preparing:
            return False
        if self._scheduler.num_running:
            return False
        is_full = self._scheduler.num_waiting_tokens >= self._max_tokens_ahead / NUM_PREFILLS_AHEAD
        if is_full or time.perf_counter() - self._ready_since > GATHER_S:
            return False
        time.sleep(0.001)
        return True

    def _note_scheduled(self, sequence: Sequence, now: float) -> None:
        ticket = self._tickets.get(sequence.ticket)
        if ticket is not None and ticket.scheduled_ts is None:
            ticket.scheduled_ts = now
            self._uncount(ticket)

    def _uncount(self, ticket: _Ticket) -> None:
        """It waits no more: there is room for another."""
        with self._news:
            self._prepared_bytes -= ticket.num_bytes
            ticket.num_bytes = 0
            if ticket.is_counted and ticket.feed is not None:
                ticket.is_counted = False
                ticket.feed.num_waiting -= 1
                self._news.notify_all()

    def _copy_prefixes(self, sequences: list[Sequence]) -> None:
        """Give these the rows that they begin with; where that fails, they read all of their prompts."""
        if not sequences:
            return
        try:
            self._runner.copy_prefixes(sequences)
        except Exception:
            # The edge of the device, as in `_guarded`.
            logger.warning("prefixes_not_copied num=%d", len(sequences), exc_info=True)
            for sequence in sequences:
                sequence.num_scheduled = sequence.num_read
                sequence.num_computed = sequence.num_cached = 0
        for sequence in sequences:
            sequence.copied_from = None
            self._num_cached_tokens += sequence.num_cached

    def _prefill(self, sequences: list[Sequence]) -> tuple[list[Sequence], Sampled]:
        logits = self._runner.prefill(sequences)
        read = [sequence for sequence in sequences if sequence.is_read]
        if not read:
            return read, Sampled(logits.new_empty(0, dtype=torch.int64))
        return read, self._choose(read, logits, Work.PREFILL)

    def _decode(self, sequences: list[Sequence]) -> tuple[list[Sequence], Sampled]:
        return sequences, self._choose_next(sequences)

    def _choose_next(self, sequences: list[Sequence]) -> Sampled:
        draws = keeps_logits = False
        if not all(sequence.is_plain for sequence in sequences):
            # Where all are greedy, one that has its min_tokens now is as plain as the others.
            are_greedy = all(sequence.prepared.params.greedy for sequence in sequences)
            are_simple = all(sequence.is_simple for sequence in sequences)
            draws = are_simple and not are_greedy and self._runner.draws
            keeps_logits = not (draws or (are_simple and are_greedy))
        replayed = self._runner.replay(sequences, keeps_logits=keeps_logits, draws=draws)
        if replayed is None:
            return self._choose(sequences, self._runner.decode(sequences), Work.DECODE)
        if replayed.logits is None:  # chosen and kept inside the graph
            return Sampled(replayed.token_ids)
        return self._choose(sequences, replayed.logits, Work.DECODE)

    def _choose(self, sequences: list[Sequence], logits: Tensor, work: Work) -> Sampled:
        with self.meter.span(work, 0):
            sampled = self._sampler.sample(logits, [s.sampling_row() for s in sequences])
            self._runner.keep(sequences, sampled.token_ids)
        return sampled

    def _guarded(
        self,
        run: Callable[[list[Sequence]], tuple[list[Sequence], Sampled]],
        sequences: list[Sequence],
        *,
        is_again: bool = False,
    ) -> list[_Half]:
        """
        Launch a batch; where that fails, its halves, down to the one that cannot.

        Every call may be repeated: it begins with the same tokens, writes the same rows with the
        same values, and no sequence counts its token before. That of a piece reads the rows of the
        pieces before it, which it does not write.
        """
        sequences = [s for s in sequences if not s.is_finished]  # one may end with its request
        if not sequences:
            return []
        try:
            if is_again:
                self._rewind(sequences)
            chosen_for, sampled = run(sequences)
            download = Download(sampled.token_ids)
        except Exception:
            # The edge of the device: out of memory, or a request that breaks a kernel. Torch and
            # drivers raise too many types to name; the log has the trace.
            if len(sequences) == 1:
                logger.exception("sequence_failed ticket=%d", sequences[0].ticket)
                ticket = self._tickets.get(sequences[0].ticket)
                if ticket is not None:
                    self._fail(ticket, EngineFailure())
                return []
            logger.warning("batch_halved num_sequences=%d", len(sequences), exc_info=True)
        else:
            for sequence in chosen_for:
                sequence.num_launched += 1
            return [_Half(sequences, chosen_for, download, sampled)]
        while self._flights:  # what they chose is what a step begins with
            self._land(self._flights.popleft())
        if self.checkpoint.device.type == "cuda":
            # NOTE: not above, where the error still holds what its call had allocated.
            torch.cuda.empty_cache()
        middle = len(sequences) // 2
        return [
            *self._guarded(run, sequences[:middle], is_again=True),
            *self._guarded(run, sequences[middle:], is_again=True),
        ]

    def _rewind(self, sequences: list[Sequence]) -> None:
        """Put back the newest tokens, where a step that failed late had kept those that it chose."""
        begun = [sequence for sequence in sequences if sequence.output_ids]
        if begun:
            newest = [sequence.output_ids[-1] for sequence in begun]
            self._runner.keep(begun, torch.tensor(newest, device=self.checkpoint.device))

    def _land(self, flight: _Flight) -> None:
        """Read the tokens of a batch, and hand out what they finish."""
        landed: list[Sequence] = []
        chosen_for: list[Sequence] = []
        for half in flight.halves:
            try:
                token_ids = half.download.wait().tolist()
                logprobs = half.sampled.logprobs()
            except Exception:
                # The edge of the device again: what went wrong in a queue is told when it is read.
                logger.exception("flight_failed num_sequences=%d", len(half.sequences))
                self._scheduler.forget_prefixes()  # nobody knows what their rows hold
                for sequence in half.sequences:
                    ticket = self._tickets.get(sequence.ticket)
                    if ticket is not None:
                        self._fail(ticket, EngineFailure())
                continue
            for sequence, token_id, of_token in zip(
                half.chosen_for, token_ids, logprobs, strict=True
            ):
                ticket = self._tickets.get(sequence.ticket)
                if ticket is None or sequence.is_finished:
                    continue  # it ended while this was in the air
                try:
                    self._take(sequence, token_id, of_token)
                except Exception as error:  # noqa: BLE001 - the edge of one request
                    self._contain(ticket, error)
            landed += half.sequences
            chosen_for += half.chosen_for
        now = time.perf_counter()
        took_ms = (now - max(flight.launched, self._last_landed)) * 1000 / max(1, len(landed))
        self._last_landed = now
        for sequence in landed:
            ticket = self._tickets.get(sequence.ticket)
            if ticket is None:
                continue
            if flight.is_prefill:
                ticket.prefill_ms += took_ms
                _let_pixels_go(ticket)
            else:
                ticket.decode_ms += took_ms
        self._hand_out(chosen_for, now)

    @contextmanager
    def _contained(self, ticket: _Ticket) -> Iterator[None]:
        """What goes wrong with one request ends that request, and none of the others."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - the edge of one request
            self._contain(ticket, error)

    def _contain(self, ticket: _Ticket, error: Exception) -> None:
        if isinstance(error, EngineError):
            self._fail(ticket, error)
            return
        # A fault of ours, of a library or of a callable. The log has the trace, the client gets
        # no part of it.
        logger.error("request_failed request=%s", ticket.request.request_id, exc_info=error)
        self._fail(ticket, EngineFailure())

    def _take(self, sequence: Sequence, token_id: int, logprobs: TokenLogprobs | None) -> None:
        if token_id == NO_TOKEN:
            self._scheduler.forget_prefixes()  # its rows may hold no numbers
            raise EngineFailure
        if logprobs is not None:
            sequence.logprobs.append(logprobs.by_id(token_id, self._decode_token))
            sequence.cumulative_logprob += logprobs.logprob
        sequence.push(token_id)

    def _decode_token(self, token_id: int) -> str:
        return decode_token(self.checkpoint.tokenizer, token_id)

    # --- results ---------------------------------------------------------------------------------------

    def _hand_out(self, sequences: list[Sequence], now: float) -> None:
        self._scheduler.finish([s for s in sequences if s.is_finished and s.start is not None])
        for sequence in sequences:
            ticket = self._tickets.get(sequence.ticket)
            if ticket is None:
                continue  # its request ended with another of its outputs
            ticket.first_token_ts = ticket.first_token_ts or now
            if sequence.is_finished and ticket.is_finished:
                with self._contained(ticket):
                    self._finish(ticket)

    def _finish(self, ticket: _Ticket) -> None:
        prepared = ticket.prepared
        assert prepared is not None
        outputs = tuple(sequence.output() for sequence in ticket.sequences)
        flags = find_flags(prepared.params, outputs)
        if Flag.CUT_OFF in flags and not self._has_told_cut_off:
            self._has_told_cut_off = True
            logger.warning(
                "text_cut_off max_tokens=%d: it was not given, and the text went on; give max_tokens",
                prepared.params.max_tokens,
            )
        result = Result(
            request_id=ticket.request.request_id,
            prompt=ticket.prompt,
            prompt_token_ids=list(prepared.token_ids),
            outputs=outputs,
            metrics=self._metrics(ticket, sum(len(o.token_ids) for o in outputs)),
            images=prepared.images,
            stamp=self._stamp(prepared.params, ticket.seed),
            flags=flags,
            num_cached_tokens=ticket.sequences[0].num_cached,
        )
        self._count_floor(ticket.sequences, prepared)
        self._hand_back(ticket, result)

    def _count_floor(self, outputs: list[Sequence], prepared: Prepared) -> None:
        """Add what a request takes at least: its prompt and its pictures once, however many outputs."""
        if self._floors is None:
            return
        first, num_prompt_tokens = outputs[0], len(prepared.token_ids)
        patches = [
            num
            for index in first.encoded
            for num in self._floors.count_patches(prepared.images[index])
        ]
        asked = Asked(patches, num_prompt_tokens, len(first.output_ids), first.num_cached)
        least_ms = self._floors.of(asked).total + sum(
            self._floors.decode_ms(num_prompt_tokens, len(other.output_ids))
            for other in outputs[1:]
        )
        self._floor_s += least_ms / 1000

    def _fail(self, ticket: _Ticket, error: EngineError) -> None:
        """End a request with an error, and take its other outputs out of the work."""
        for sequence in ticket.sequences:
            sequence.finish_reason = sequence.finish_reason or FinishReason.ABORT
        self._scheduler.finish(ticket.sequences)
        prepared = ticket.prepared
        result = Result.failed(
            ticket.request.request_id,
            error,
            prompt=ticket.prompt,
            prompt_token_ids=list(prepared.token_ids) if prepared else None,
            metrics=self._metrics(ticket, 0),
            images=prepared.images if prepared else (),
            stamp=self._stamp(prepared.params, ticket.seed) if prepared else None,
        )
        self._hand_back(ticket, result)

    def _hand_back(self, ticket: _Ticket, result: Result) -> None:
        # In this order: a stream whose tickets are gone and that has no results left is over.
        ticket.sink.append(result)
        del self._tickets[ticket.number]
        self._uncount(ticket)

    def _metrics(self, ticket: _Ticket, num_tokens: int) -> Metrics:
        first = ticket.first_token_ts
        return Metrics(
            arrival_time=ticket.arrival_time,
            queued_ts=ticket.queued_ts,
            scheduled_ts=ticket.scheduled_ts,
            first_token_ts=first,
            last_token_ts=time.perf_counter() if first else None,
            first_token_latency=first - ticket.arrived if first else None,
            num_generation_tokens=num_tokens,
            preprocess_ms=ticket.prepared.preprocess_ms if ticket.prepared else None,
            preprocess_wait_ms=ticket.wait_ms if ticket.prepared else None,
            prefill_ms=ticket.prefill_ms if first else None,
            decode_ms=ticket.decode_ms if first else None,
        )

    def _stamp(self, params: SamplingParams, seed: int | None) -> Stamp:
        return Stamp(
            model=self._config.model,
            revision=self.checkpoint.revision,
            dtype=str(self.checkpoint.dtype).removeprefix("torch."),
            device=self.checkpoint.device.type,
            engine_version=_version(),
            sampling=asdict(params),
            seed=seed,
            trust_remote_code=self._config.trust_remote_code,
            quantization=self._config.quantization,
            kv_cache_dtype=str(self.checkpoint.kv_dtype).removeprefix("torch."),
        )

    def measure_clip(self, encoded: bytes) -> tuple[float, ...]:
        """
        When the frames of an encoded clip are shown, in seconds from the first one. For any thread.

        Raises:
            MediaError: it is none.
        """
        return self._decoder.measure_clip(encoded)

    def count_tokens(self, text: str) -> int:
        """See `Processor.count_tokens`. For any thread."""
        return self._processor.count_tokens(text)

    def reset_cache(self) -> None:
        """Forget the encoded pictures that were kept."""
        with self._turn():
            self._runner.cache.clear()

    def reset_prefixes(self) -> None:
        """Forget the KV rows that were kept."""
        with self._turn():
            self._scheduler.forget_prefixes()

    def close(self) -> None:
        """
        Take no more requests; those in flight end in a result with the code `engine_closed`.

        Never waits: a step or a callable that is under way ends by itself.
        """
        with self._news:
            self._is_closed = True
        self._sweep()
        for pool in (self._pool, self._fetching_pool):
            pool.shutdown(wait=False, cancel_futures=True)
        self._decoder.close()


def _let_pixels_go(ticket: _Ticket) -> None:
    """Once all outputs have read their prompt: a long answer need not hold its pictures in memory."""
    prepared = ticket.prepared
    if prepared is None or not prepared.media or not all(s.num_launched for s in ticket.sequences):
        return
    ticket.prepared = replace(prepared, media=())
    for sequence in ticket.sequences:
        sequence.prepared = ticket.prepared


def _error_of(future: Future[Prepared]) -> Exception | None:
    """What ends a request that a media thread has worked on; None where it is prepared."""
    if future.cancelled():
        return EngineClosed()
    error = future.exception()
    if error is None or isinstance(error, Exception):
        return error
    failure = RuntimeError("a callable wanted to end the process")
    failure.__cause__ = error
    return failure


def plan_rows(config: EngineConfig, checkpoint: Checkpoint) -> int:
    """
    KV rows to allocate. On a GPU without a budget the weights must be loaded: they take their share.

    Raises:
        BadConfig: not even one sequence of the greatest length fits.
    """
    longest = round_rows(checkpoint.max_model_len)
    rows = num_kv_rows(
        checkpoint,
        least=longest + NUM_SCRATCH_ROWS,
        most=longest * _max_num_seqs(config, checkpoint) + NUM_SCRATCH_ROWS,
        kv_bytes=config.kv_cache_memory_bytes,
        utilization=config.gpu_memory_utilization,
    )
    if rows < longest + NUM_SCRATCH_ROWS:
        budget = (
            "gpu_memory_utilization"
            if config.kv_cache_memory_bytes is None
            else f"kv_cache_memory_bytes={config.kv_cache_memory_bytes}"
        )
        raise BadConfig(
            f"The memory for KV rows holds {max(0, rows - NUM_SCRATCH_ROWS)} tokens, but one "
            f"sequence may have max_model_len={checkpoint.max_model_len}. Lower max_model_len, or "
            f"raise {budget}."
        )
    return rows


def _max_num_seqs(config: EngineConfig, checkpoint: Checkpoint) -> int:
    is_cuda = checkpoint.device.type == "cuda"
    return config.max_num_seqs or (GPU_NUM_SEQS if is_cuda else CPU_NUM_SEQS)


def knows_budget(config: EngineConfig, checkpoint: Checkpoint) -> bool:
    """Whether `plan_rows` can be asked before the weights are loaded."""
    return config.kv_cache_memory_bytes is not None or checkpoint.device.type == "cpu"


def _num_media_threads(config: EngineConfig, checkpoint: Checkpoint) -> int:
    if config.num_media_threads is not None:
        return config.num_media_threads
    # The threads wait for the processes, and a few have the next file in hand.
    if config.num_media_processes:
        return config.num_media_processes + NUM_MEDIA_THREADS_BESIDE
    num_cores = _num_cores()
    return min(num_cores, MAX_MEDIA_THREADS) if checkpoint.device.type == "cuda" else num_cores


def _open_decoder(config: EngineConfig) -> Decoder:
    limits = ImageLimits(
        max_pixels=config.max_image_pixels, formats=(*STILL_FORMATS, *config.image_formats)
    )
    if not config.num_media_processes:
        return Threads(limits)
    from media.pool import DecoderPool

    try:
        return DecoderPool(config.num_media_processes, image_limits=limits)
    except DecodersAwayError as error:
        raise DecodersAway(f"num_media_processes={config.num_media_processes}: {error}") from error


def _num_cores() -> int:
    """Cores that this process may run on, 16 at most. A container's quota of time is not seen here."""
    return max(1, min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4))


@cache
def _version() -> str:
    try:
        return metadata.version("darkroom")
    except metadata.PackageNotFoundError:
        return "0"
