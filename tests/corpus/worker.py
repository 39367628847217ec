"""
A worker without a broker, for the corpus: the ids of jobs in, a word when each has ended.

It is made of a worker's own parts, from the expansion of lines to the commit of results, in one
process that lives as long as all cases. Only the addresses that it may fetch from are told anew for
each job.

    python -m tests.corpus.worker      (settings come from DARKROOM_*)
"""

import json
import ssl
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from ipaddress import ip_network
from typing import Any
from uuid import UUID

from cli.garbage import settle
from media.addresses import AddressRules
from media.buckets import BucketConfig
from media.errors import FetchFailedError
from media.fetch import FetchConfig
from media.fetched import Fetched
from media.limits import FETCH_LIMITS, ImageLimits, VideoLimits
from media.s3_url import parse_open_prefix
from media.sources import Sources, SourcesThread
from storage import jobs
from storage.ids import JobId
from storage.states import ItemState
from tasks.config import load_config
from tasks.engines import EngineOptions, load_engine
from tasks.expand import expand
from tasks.logs import configure_logging
from tasks.prefetch import Preparer
from tasks.run import Runner
from tasks.stores import Stores, open_stores
from tasks.worker import FETCH_THREADS
from tests.media.servers import Names
from tests.storage.rows import let_backoff_end
from tests.tasks.fakes import MODEL, RecordingDispatcher

UNFINISHED = (ItemState.PENDING, ItemState.LEASED)


class SwappedFetch:
    """What the worker fetches with: other sources for each job."""

    sources: SourcesThread

    def __call__(
        self,
        wanted: Mapping[str, ImageLimits | VideoLimits],
        tenant: str,
        /,
        *,
        is_fast: bool = False,
    ) -> Mapping[str, Fetched | FetchFailedError]:
        return self.sources.fetch_all(wanted, tenant, is_fast=is_fast)


@contextmanager
def open_sources(network: dict[str, Any]) -> Iterator[SourcesThread]:
    """The sources as `tasks.worker` opens them, but for what `network` says."""
    config = FetchConfig(
        rules=AddressRules(allowed_networks=tuple(map(ip_network, network.get("allowed", ())))),
        ports=frozenset({80, 443, *network.get("ports", ())}),
        limits=replace(FETCH_LIMITS, **network.get("limits", {})),
    )
    if "timeout_s" in network:
        config = replace(config, image_fetch_timeout_s=network["timeout_s"])
    names = Names(network.get("names"))
    for name, answers in network.get("changing", {}).items():
        names.change(name, *answers)
    tls = ssl.create_default_context(cafile=network["ca"]) if "ca" in network else None
    buckets = network.get("buckets")
    if buckets is not None:
        prefixes = tuple(map(parse_open_prefix, buckets["open"]))
        buckets = BucketConfig(prefixes, None, buckets["endpoint"], "us-east-1")
    with SourcesThread(Sources(config, names, tls, buckets=buckets)) as sources:
        yield sources


def has_unfinished(stores: Stores, job: JobId) -> bool:
    with stores.database.read() as session:
        counts = jobs.count_items(session, job)
    return any(counts.get(state) for state in UNFINISHED)


def main() -> None:
    configure_logging()
    config = load_config()
    stores = open_stores(config)
    dispatcher = RecordingDispatcher(config, "redis://127.0.0.1:1/0")
    options = EngineOptions(
        MODEL,
        limits=config.limits_of(MODEL),
        device="cpu",
        num_media_processes=config.media_processes,
        max_image_pixels=config.max_image_pixels,
    )
    engine = load_engine(options)
    fetch = SwappedFetch()
    with ThreadPoolExecutor(FETCH_THREADS) as pool:
        preparer = Preparer(
            stores, MODEL, engine.limits, engine.defaults, fetch, pool, engine.measure_clip
        )
        runner = Runner(stores, dispatcher, config, engine, preparer, worker="corpus")
        runner.start()
        settle()
        for line in sys.stdin:
            order = json.loads(line)
            job = JobId(UUID(order["job"]))
            with open_sources(order["network"]) as fetch.sources:
                expand(stores, dispatcher, config, job)
                while has_unfinished(stores, job):
                    runner.run_chunk()
                    let_backoff_end(stores.database)  # what may pass is tried again at once
            print("ended", flush=True)  # noqa: T201 - the word that the other side waits for
        runner.stop()
    engine.close()
    dispatcher.close()
    stores.close()


if __name__ == "__main__":
    main()
