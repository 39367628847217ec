"""
Every place that media are fetched from, by scheme: the web and, where an operator opens them, buckets
and a folder.

What comes inside a URL (`media.data_url`) or was uploaded is no fetch, and is read elsewhere.
"""

import asyncio
import ssl
from collections.abc import Mapping
from concurrent.futures import CancelledError
from dataclasses import asdict
from threading import Lock, Thread
from types import TracebackType
from typing import Self

from media.buckets import BucketConfig, BucketFetcher
from media.errors import BucketNotAllowedError, FetchFailedError, FileNotAllowedError
from media.fetch import FetchConfig, Fetcher, Resolve, report_of_refusal
from media.fetched import Fetched
from media.folder import FolderReader, is_file_url
from media.hosts import SharedLimits
from media.limits import ImageLimits, VideoLimits
from media.s3_url import is_s3_url


class Sources:
    """One for each process, used on one event loop."""

    def __init__(
        self,
        config: FetchConfig | None = None,
        resolve: Resolve | None = None,
        tls: ssl.SSLContext | None = None,
        *,
        buckets: BucketConfig | None = None,
        folder: FolderReader | None = None,
        shared: SharedLimits | None = None,
    ) -> None:
        """
        Args:
            config, resolve, tls, shared: as `Fetcher` takes them.
            buckets, folder: None: s3:// and file:// are refused.

        Raises:
            ValueError: `buckets` has a profile or an address that cannot be.
        """
        self._max_at_once = (config or FetchConfig()).limits.max_connections_per_item
        self._web = Fetcher(config, resolve, tls, shared)
        self._buckets = None if buckets is None else BucketFetcher(buckets, config, resolve, tls)
        self._folder = folder

    async def fetch(
        self, url: str, limits: ImageLimits | VideoLimits, tenant: str, *, is_fast: bool = False
    ) -> Fetched:
        """
        Return what stands behind one URL.

        Args:
            tenant: whose request it is, by name.
            is_fast: of the fast lane, for which each fetcher keeps some slots.

        Raises:
            FetchFailedError: as `Fetcher.fetch`, `BucketFetcher.fetch` and `FolderReader.fetch`.
        """
        if is_s3_url(url):
            if self._buckets is None:
                raise _refusal(BucketNotAllowedError())
            return await self._buckets.fetch(url, limits, tenant, is_fast=is_fast)
        if is_file_url(url):
            if self._folder is None:
                raise _refusal(FileNotAllowedError())
            return await self._folder.fetch(url, limits)
        return await self._web.fetch(url, limits, is_fast=is_fast)

    async def fetch_all(
        self, wanted: Mapping[str, ImageLimits | VideoLimits], tenant: str, *, is_fast: bool = False
    ) -> dict[str, Fetched | FetchFailedError]:
        """
        Fetch the media of one item, several at a time, each as `fetch` does.

        Returns:
            How each has ended, by its URL. After a failure the others are given up, for the item
            needs all of them: those are missing.
        """
        places = asyncio.Semaphore(self._max_at_once)
        ended: dict[str, Fetched | FetchFailedError] = {}

        async def fetch(url: str, limits: ImageLimits | VideoLimits) -> None:
            async with places:
                try:
                    ended[url] = await self.fetch(url, limits, tenant, is_fast=is_fast)
                except FetchFailedError as error:
                    ended[url] = error
                    raise

        try:
            async with asyncio.TaskGroup() as group:
                for url, limits in wanted.items():
                    group.create_task(fetch(url, limits))
        except* FetchFailedError:
            pass  # the caller finds it among what has ended
        return ended

    async def aclose(self) -> None:
        """Close the connections that wait for more work."""
        await self._web.aclose()
        if self._buckets is not None:
            await self._buckets.aclose()


def _refusal(error: FetchFailedError) -> FetchFailedError:
    error.facts = asdict(report_of_refusal(error))
    return error


class SourcesThread:
    """`Sources` for callers that are threads themselves: its event loop runs in one of its own."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        self._lock = Lock()
        self._is_closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, name="darkroom-fetch", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def fetch_all(
        self, wanted: Mapping[str, ImageLimits | VideoLimits], tenant: str, *, is_fast: bool = False
    ) -> dict[str, Fetched | FetchFailedError]:
        """
        Wait for what `Sources.fetch_all` returns.

        Raises:
            CancelledError: of `concurrent.futures`: it was closed before or meanwhile.
        """
        with self._lock:  # what is begun after the last look would never end
            if self._is_closed:
                raise CancelledError
            coming = asyncio.run_coroutine_threadsafe(
                self._sources.fetch_all(wanted, tenant, is_fast=is_fast), self._loop
            )
        return coming.result()

    def close(self) -> None:
        """
        Close the connections and end the thread.

        A fetch that is under way is given up; whoever waits for it gets a `CancelledError` of
        `concurrent.futures`, for a thread that waited for ever would never let its process end.
        """
        with self._lock:
            self._is_closed = True
        asyncio.run_coroutine_threadsafe(self._give_up(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _give_up(self) -> None:
        under_way = asyncio.all_tasks() - {asyncio.current_task()}
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)
        await self._sources.aclose()
