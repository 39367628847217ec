"""The benchmark of the queue, in short: its figures are of no interest here, its checks are."""

import pytest

from bench.polls import Poll, summarize
from bench.queue import MAX_RSS_MIB, Client, measure_run, write_lines
from bench.service import Service, open_service

SHORT, LONG, PROMISED = 2_000, 10_000, 100_000


@pytest.mark.services
@pytest.mark.parametrize("database", ["postgresql", "sqlite"])
def test_memory_does_not_grow_with_a_job_beyond_what_is_promised(database: str) -> None:
    """The whole 100,000 lines are `make bench-queue ARGS="--items 100000"`."""
    with open_service(database, max_lines=LONG) as service:
        client = Client(service)
        service.start_worker()
        service.start_worker()
        after_short = run(service, client, SHORT)
        after_long = run(service, client, LONG)

    for kind, peak in after_long.items():
        a_line = (peak - after_short[kind]) / (LONG - SHORT)
        assert peak + a_line * (PROMISED - LONG) < MAX_RSS_MIB, (after_short, after_long)


def run(service: Service, client: Client, num_items: int) -> dict[str, float]:
    """The peaks of all processes but this one, which has loaded whatever other tests need."""
    file = service.folder / f"{num_items}.jsonl"
    write_lines(file, num_items)
    found = measure_run(service, client, client.upload(file), num_items, 2, 50.0)
    assert found["status_while_running"]["num_bad"] == 0
    assert found["messages"] >= num_items / 64
    peaks = service.read_peaks_mib()
    del peaks["client"]
    assert {"api", "cpu", "gpu", "broker"} <= peaks.keys()
    assert all(peak > 1 for peak in peaks.values())
    return peaks


def test_polls_are_summed_up_by_the_latency_that_so_many_do_not_exceed() -> None:
    polls = [Poll(0.0, number / 1000, 200) for number in range(100, 0, -1)]
    polls[7] = Poll(0.0, polls[7].latency_s, 0)

    assert {"num": 100, "num_bad": 1, "p50_ms": 50.0, "p99_ms": 99.0, "max_ms": 100.0} == summarize(
        polls
    )
    assert {"num": 0} == summarize([])
