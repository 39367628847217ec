"""
Objects of buckets that an operator has opened: `s3://bucket/key` in, bytes and a report out.

boto3 signs and nothing more: it makes the address of one object, good for a few minutes, and
`media.fetch` asks for it with all its limits. Only buckets and prefixes on the operator's list are
ever asked for, or the keys of the service would read for everybody whatever they open. The keys are
those of a profile of AWS's files that the operator names, and never those that this process has for
its own blobs; without a profile requests are not signed, and read what is public.
"""

import asyncio
import re
import ssl
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from ipaddress import ip_network
from threading import Lock
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

import httpcore2

from media.addresses import AddressRules
from media.errors import (
    BucketNotAllowedError,
    FetchFailedError,
    ObjectArchivedError,
    ObjectDeniedError,
    ObjectNotFoundError,
)
from media.fetch import Errand, FetchConfig, Fetcher, Resolve, failed_with, report_of_refusal
from media.fetched import Fetched
from media.limits import ImageLimits, VideoLimits
from media.s3_url import OpenPrefix, S3Url, is_open, parse_s3_url
from media.urls import WebUrl, parse_url

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

SIGNED_S: Final = 300
MAX_CONNECTIONS_PER_BUCKET: Final = 32
_MAX_ERROR_BYTES: Final = 16 * 1024

# The address is the operator's and boto's, never a client's: it may be inside.
_INSIDE: Final = AddressRules(
    allowed_networks=tuple(
        ip_network(text)
        for text in (
            "10.0.0.0/8",
            "100.64.0.0/10",
            "127.0.0.0/8",
            "172.16.0.0/12",
            "192.168.0.0/16",
            "::1/128",
            "fc00::/7",
        )
    )
)
_OWN_ROLES: Final = frozenset({"env", "container-role", "iam-role"})


@dataclass(frozen=True, slots=True)
class BucketConfig:
    """
    What an operator decides about buckets.

    Attributes:
        prefixes: what may be read; without any, nothing.
        profile: of AWS's shared files, for the keys; None: requests are not signed.
        endpoint_url: of a service that is not AWS; None: AWS.
        region: of the buckets; where it is another one, their service says so and is believed.
    """

    prefixes: tuple[OpenPrefix, ...] = ()
    profile: str | None = None
    endpoint_url: str | None = None
    region: str | None = None


class BadProfileError(ValueError):
    """The profile is in none of AWS's shared files, or leads to the keys of the host itself."""


class BadRegionError(ValueError):
    """It is no name of a region, such as eu-central-1."""


class BucketFetcher:
    """Fetches objects; one for each process, used on one event loop."""

    def __init__(
        self,
        config: BucketConfig,
        fetching: FetchConfig | None = None,
        resolve: Resolve | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """
        Args:
            fetching: timeouts and limits; its addresses and ports are those of the open web, and
                do not count here.

        Raises:
            BadProfileError, BadRegionError: as they say.
            ValueError: `endpoint_url` is no address.
        """
        self._prefixes = config.prefixes
        self._signer = _Signer(config)
        fetching = fetching or FetchConfig()
        limits = replace(
            fetching.limits, max_redirects=0, max_connections_per_host=MAX_CONNECTIONS_PER_BUCKET
        )
        fetching = replace(fetching, rules=_INSIDE, ports=self._signer.ports, limits=limits)
        self._fetcher = _ObjectFetcher(self._signer, fetching, resolve, tls)

    async def aclose(self) -> None:
        await self._fetcher.aclose()

    async def fetch(
        self, url: str, limits: ImageLimits | VideoLimits, tenant: str, *, is_fast: bool = False
    ) -> Fetched:
        """
        Return one object, after up to `max_tries` tries.

        Args:
            tenant: whose request it is, for prefixes that hold `{tenant}`.
            is_fast: as `Fetcher.fetch` takes it.

        Raises:
            BadUrlError: no reference to one object.
            BucketNotAllowedError: this tenant may not read it; whether it is there is not said.
            ObjectNotFoundError, ObjectDeniedError, ObjectArchivedError: what the bucket says.
            FetchFailedError: as `Fetcher.fetch`.
        """
        try:
            place = parse_s3_url(url)
            if not is_open(place, tenant, self._prefixes):
                raise BucketNotAllowedError
        except FetchFailedError as error:
            error.facts = asdict(report_of_refusal(error))
            raise
        errand = Errand("s3", place.bucket, str(place), lambda: self._signer.sign(place), is_fast)
        return await self._fetcher.run(errand, limits)


class _Signer:
    """Makes the address of an object. Knows of buckets in other regions what it was told."""

    def __init__(self, config: BucketConfig) -> None:
        # Imported here: boto takes a third of a second, and most workers read no bucket.
        import boto3
        from botocore.exceptions import InvalidRegionError, ProfileNotFound

        try:
            # Of all that lies in the environment, a session with a profile takes no keys.
            self._session = boto3.Session(profile_name=config.profile)
            keys = self._session.get_credentials() if config.profile else None
        except ProfileNotFound as error:
            raise BadProfileError("there is no such profile") from error
        if config.profile and (keys is None or keys.method in _OWN_ROLES):
            raise BadProfileError("this profile has no keys of its own")
        self._config = config
        self._regions: dict[str, str] = {}
        self._clients: dict[str | None, S3Client] = {}
        self._lock = Lock()  # two clients of one session must not be made at once
        try:
            self._client_for(config.region)
        except InvalidRegionError as error:
            raise BadRegionError("give a name such as eu-central-1") from error
        port = urlsplit(config.endpoint_url or "").port
        self.ports = frozenset({80, 443} | ({port} if port else set()))

    async def sign(self, place: S3Url) -> WebUrl:
        region = self._regions.get(place.bucket, self._config.region)
        # In a thread: keys that have ended are made anew, over the network.
        address = await asyncio.to_thread(self._sign, place, region)
        return parse_url(address, self.ports)

    def learn_region(self, bucket: str, region: str) -> bool:
        """Note where a bucket is; False where that is nothing new."""
        if region == self._regions.get(bucket, self._config.region):
            return False
        self._regions[bucket] = region
        return True

    def _sign(self, place: S3Url, region: str | None) -> str:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            return self._client_for(region).generate_presigned_url(
                "get_object",
                Params={"Bucket": place.bucket, "Key": place.key},
                ExpiresIn=SIGNED_S,
            )
        except (BotoCoreError, ClientError) as error:
            raise FetchFailedError(
                "Failed to fetch media from a bucket: this service's keys for it cannot be had "
                "just now. Send the item again later.",
                retryable=True,
            ) from error

    def _client_for(self, region: str | None) -> "S3Client":
        with self._lock:
            if region not in self._clients:
                self._clients[region] = self._build_client(region)
            return self._clients[region]

    def _build_client(self, region: str | None) -> "S3Client":
        from botocore import UNSIGNED
        from botocore.config import Config

        client: S3Client = self._session.client(
            "s3",
            endpoint_url=self._config.endpoint_url,
            region_name=region or self._session.region_name or "us-east-1",
            config=Config(
                signature_version="s3v4" if self._config.profile else UNSIGNED,
                # AWS answers under a bucket's own name and its region's; other services may not.
                s3={"addressing_style": "path" if self._config.endpoint_url else "virtual"},
                # AWS_ENDPOINT_URL is for the blobs. The stubs do not know this one.
                ignore_configured_endpoint_urls=True,  # type: ignore[call-arg]
            ),
        )
        return client


class _ObjectFetcher(Fetcher):
    """Reads what S3 says about an object that it does not give."""

    def __init__(
        self,
        signer: _Signer,
        config: FetchConfig,
        resolve: Resolve | None,
        tls: ssl.SSLContext | None,
    ) -> None:
        super().__init__(config, resolve, tls)
        self._signer = signer

    async def _failed_with(
        self, errand: Errand, response: httpcore2.Response, headers: Mapping[bytes, bytes]
    ) -> FetchFailedError:
        said = bytearray()
        async for chunk in response.aiter_stream():
            said += chunk
            if len(said) > _MAX_ERROR_BYTES:
                break
        code = _find(b"Code", said)
        region = headers.get(b"x-amz-bucket-region", b"").decode("latin-1") or _find(
            b"Region", said
        )
        if code in _OTHER_REGION and re.fullmatch(r"[a-z0-9-]{1,32}", region):
            is_new = self._signer.learn_region(errand.host, region)
            return ObjectDeniedError(_OTHER_REGION_TEXT, retryable=is_new)
        if code in _FAILURES:
            return _FAILURES[code]()
        match response.status:
            case 404:
                return ObjectNotFoundError()
            case 301 | 400 | 401 | 403:
                return ObjectDeniedError()
        return failed_with(response.status, headers)


_OTHER_REGION: Final = frozenset(
    {
        "PermanentRedirect",
        "AuthorizationHeaderMalformed",
        "AuthorizationQueryParametersError",
        "IllegalLocationConstraintException",
    }
)
_OTHER_REGION_TEXT: Final = (
    "Failed to fetch media from a bucket: it is in another region than this service asks. Tell the "
    "operator."
)
_FAILURES: Final[Mapping[str, type[FetchFailedError]]] = {
    "NoSuchKey": ObjectNotFoundError,
    "NoSuchBucket": ObjectNotFoundError,
    "InvalidObjectState": ObjectArchivedError,
}


def _find(tag: bytes, said: bytearray) -> str:
    """The first text between these tags; empty where there is none. Not parsed: it is only compared."""
    found = re.search(rb"<%b>([\x20-\x3b\x3d-\x7e]{1,200})</%b>" % (tag, tag), said)
    return found[1].decode("ascii") if found else ""
