"""
A process that fetches, for tests of what several of them share.

    python -m tests.tasks.host_client BROKER_URL PORT NUM MAX_CONNECTIONS MAX_RATE

Fetches so many addresses of one host at once and prints what became of each, as JSON.
"""

import asyncio
import json
import sys
from ipaddress import ip_network

from media.addresses import AddressRules
from media.errors import FetchFailedError
from media.fetch import FetchConfig, Fetcher
from media.limits import IMAGE_LIMITS
from tasks import hosts
from tasks.hosts import RedisLimits

PATIENCE_S = 30.0
"""With a broker that answers: on a busy machine one that takes a moment longer is not away."""


async def main(broker_url: str, port: int, num: int, max_connections: int, max_rate: int) -> None:
    config = FetchConfig(
        rules=AddressRules(allowed_networks=(ip_network("127.0.0.1/32"),)),
        ports=frozenset({port}),
    )
    hosts.TIMEOUT_S = PATIENCE_S  # type: ignore[misc]
    shared = RedisLimits(broker_url, max_connections=max_connections, max_rate=max_rate)

    async def find_here(host: str) -> list[str]:
        return ["127.0.0.1"]

    async def fetch(fetcher: Fetcher, number: int) -> str:
        try:
            await fetcher.fetch(f"http://pictures.test:{port}/{number}", IMAGE_LIMITS)
        except FetchFailedError as error:
            return error.code
        return "fetched"

    async with Fetcher(config, find_here, shared=shared) as fetcher:
        ends = await asyncio.gather(*(fetch(fetcher, number) for number in range(num)))
    print(json.dumps(ends))  # noqa: T201


if __name__ == "__main__":
    url, *numbers = sys.argv[1:]
    asyncio.run(main(url, *map(int, numbers)))
