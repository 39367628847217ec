"""Addresses that lead inside, lie or never end (U1 to U32)."""

import gzip
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from tests.corpus.cases import (
    OK,
    PLANTED,
    STAR,
    Asked,
    Case,
    Place,
    build_body,
    build_line,
    image_part,
    sample,
    video_part,
)
from tests.media.servers import Answer, answering, endless, make_tls, raw, redirecting

DENIED = "host_not_allowed"
BAD = "bad_url"
FAILED = "image_fetch_failed"
TIMED_OUT = "fetch_timeout"
NO_ADDRESS = "invalid_media_url"
BAD_DATA = "bad_data_url"

HOST = "pictures.test"
LOOPBACK = {"allowed": ["127.0.0.1/32"]}
PATIENT = {"timeout_s": 30.0}
"""Where a server answers at once, but a busy machine does not."""

QUICK: dict[str, Any] = {
    **PATIENT,
    "limits": {"retry_wait_s": 0.01, "max_retry_after_s": 1.0, "max_pause_s": 0.1},
}
SHORT: dict[str, Any] = {"timeout_s": 0.5, "limits": {**QUICK["limits"], "min_rate_window_s": 0.3}}
SCALED = "a try may take 0.5 s in place of 5"


def ask_for(url: str, **network: Any) -> Asked:
    line = build_line(build_body(image_part(url), question="Describe the image."))
    return Asked(line, network, secrets=(HOST, "private", "169.254"))


def url_case(id: str, what: str, url: str, expected: str, **network: Any) -> Case:
    """An address that is never asked for: whatever it leads to, a server of ours hears nothing."""

    def ask(place: Place) -> Asked:
        canary = place.serve(answering(sample("small.png")))
        asked = ask_for(
            url.replace("{port}", str(canary.port)), **{"ports": [canary.port], **network}
        )
        return Asked(asked.line, asked.network, asked.secrets, (canary,))

    return Case(id, what, ask, expected)


def answer_case(
    id: str,
    what: str,
    answer: Answer | Callable[[int], Mapping[str, Answer]],
    expected: str,
    *,
    path: str = f"/private/{PLANTED}.png?signature={PLANTED}",
    network: Mapping[str, Any] = {},
    is_routed: bool = False,
    **words: Any,
) -> Case:
    """
    An address that is asked for, and what its server says.

    Args:
        is_routed: `answer` takes the port of a server that nobody may ask, and gives answers by path.
    """

    def ask(place: Place) -> Asked:
        canary = place.serve(answering(sample("small.png")), "::1")
        routes: Any = answer(canary.port) if is_routed else answer  # type: ignore[arg-type, call-arg]
        server = place.serve(routes)
        asked = ask_for(
            f"http://{HOST}:{server.port}{path}",
            **LOOPBACK,
            ports=[server.port, canary.port],
            **{**PATIENT, **network},
        )
        return Asked(asked.line, asked.network, asked.secrets, (canary,))

    return Case(id, what, ask, expected, **words)


def redirects(location: str) -> Callable[[int], Mapping[str, Answer]]:
    return lambda port: {"/": redirecting(location.replace("{port}", str(port)))}


def hops(num: int) -> Callable[[int], Mapping[str, Answer]]:
    ways = {f"/{n}": redirecting(f"/{n + 1}") for n in range(num)}
    return lambda port: {"/": redirecting("/0"), **ways, f"/{num}": answering(sample("small.png"))}


def ask_of_bucket(url: str, answer: Answer, place: Place) -> Asked:
    server = place.serve(answer)
    opened = ["s3://photographs/{tenant}"]
    buckets = {"open": opened, "endpoint": f"http://127.0.0.1:{server.port}"}
    asked = ask_for(url, buckets=buckets, **QUICK)
    return Asked(asked.line, asked.network, (*asked.secrets, "photographs", "other-1"))


def refusing(code: str) -> Answer:
    text = f"<Error><Code>{code}</Code><Message>{PLANTED}</Message></Error>"
    return answering(text.encode(), "403 Forbidden", [f"x-amz-request-id: {PLANTED}"])


def bucket_case(id: str, what: str, url: str, expected: str, answer: Answer | None = None) -> Case:
    answer = answer or answering(sample("small.png"))
    return Case(id, what, partial(ask_of_bucket, url, answer), expected)


def ask_frames(place: Place) -> Asked:
    url = "data:video/jpeg;base64," + "AAAA," * 1_000_000 + "AAAA"
    return Asked(build_line(build_body(video_part(url), question="Describe the video.")))


def ask_long_data_url(place: Place) -> Asked:
    return Asked(
        build_line(build_body(image_part("DATA"), question="?")).replace(
            b"DATA", b"data:image/png;base64," + b"A" * 100_000_000
        )
    )


def ask_over_tls(certified: str, days_left: int, is_known: bool, place: Place) -> Asked:
    """A server whose certificate is for this name, for so long, and from somebody known or not."""
    server_tls, _ = make_tls(place.folder, certified, days_left)
    server = place.serve(answering(sample("small.png")), tls=server_tls)
    known = {"ca": str(place.folder / f"{certified}.pem")} if is_known else {}
    return ask_for(
        f"https://{HOST}:{server.port}/", **LOOPBACK, **PATIENT, ports=[server.port], **known
    )


DROP = answering(sample("small.png"), headers=[f"X-Inside: {PLANTED}"])
BOMB = gzip.compress(bytes(10_000_000), 9)

ADDRESSES = {
    "U1": ("169.254.169.254", DENIED),
    "U2": ("2852039166", BAD),
    "U3": ("0xA9FEA9FE", BAD),
    "U4": ("0251.0376.0251.0376", BAD),
    "U5": ("169.254.43518", BAD),
    "U6a": ("127.1", BAD),
    "U6b": ("0", BAD),
    "U6c": ("localhost.", DENIED),
    "U6d": ("[::]", DENIED),
    "U6e": ("[::1]", DENIED),
    "U7": ("[::ffff:169.254.169.254]", DENIED),
    "U8": ("[64:ff9b::a9fe:a9fe]", DENIED),
    "U9": ("[2002:a9fe:a9fe::1]", DENIED),
    "U10": ("[::169.254.169.254]", DENIED),
    "U11": ("[fe80::1%25lo]", BAD),
    "U12": ("[fd00:ec2::254]", DENIED),
    "U13a": ("100.64.0.1", DENIED),
    "U13b": ("192.0.0.192", DENIED),
    "U13c": ("168.63.129.16", DENIED),
    "U13d": ("198.18.0.1", DENIED),
    "U13e": ("240.0.0.1", DENIED),
    "U13f": ("255.255.255.255", DENIED),
    "U13g": ("224.0.0.1", DENIED),
    "U14a": ("①②⑦.0.0.1", BAD),
    "U14b": ("127。0。0。1", BAD),
}

CASES: tuple[Case, ...] = (
    *(
        url_case(id, f"the host {host}", f"http://{host}:{{port}}/a.png", expected)
        for id, (host, expected) in ADDRESSES.items()
    ),
    url_case(
        "U15", "a name that leads inside", "http://a.test/", DENIED, names={"a.test": ["10.0.0.7"]}
    ),
    url_case(
        "U16",
        "a name that leads outside and inside",
        "http://a.test/",
        DENIED,
        names={"a.test": ["93.184.215.14", "10.0.0.7"]},
    ),
    answer_case(
        "U17",
        "a name that leads elsewhere the second time",
        DROP,
        OK,
        network={"changing": {HOST: [["127.0.0.1"], ["::1"]]}},
        says=STAR,
    ),
    url_case(
        "U18",
        "an alias of a name inside",
        "http://a.test:{port}/",
        DENIED,
        names={"a.test": ["fd00::7"]},
    ),
    answer_case(
        "U19",
        "a redirect inside",
        redirects("http://[::1]:{port}/"),
        DENIED,
        path="/",
        is_routed=True,
    ),
    *(
        answer_case(
            f"U20{letter}",
            f"a redirect to {scheme}:",
            redirects(f"{scheme}://127.0.0.1/etc/passwd"),
            BAD,
            path="/",
            is_routed=True,
        )
        for letter, scheme in zip("abc", ("file", "gopher", "ftp"), strict=True)
    ),
    answer_case("U21a", "a redirect to itself", redirects("/"), FAILED, path="/", is_routed=True),
    answer_case("U21b", "11 redirects", hops(11), FAILED, path="/", is_routed=True),
    answer_case("U21c", "3 redirects", hops(2), OK, path="/", is_routed=True, says=STAR),
    *(
        url_case(f"U22{letter}", what, url, expected)
        for letter, what, url, expected in (
            ("a", "a login before an address", "http://good@169.254.169.254/", BAD),
            ("b", "a backslash", "http://169.254.169.254\\@good/", BAD),
            # All behind the first # is no part of the host, whatever another parser reads there.
            ("c", "a host behind the fragment", "http://[::1]:{port}#@good/", DENIED),
        )
    ),
    *(
        url_case(f"U23{letter}", f"{what} in the {where}", url, BAD)
        for letter, what, where, url in (
            ("a", "CRLF", "path", "http://a.test:{port}/a\r\nX: y"),
            ("b", "CRLF", "host", "http://a.test\r\n:{port}/"),
            ("c", "NUL", "path", "http://a.test:{port}/a\0"),
            ("d", "NUL", "host", "http://a\0.test:{port}/"),
            ("e", "a tab", "path", "http://a.test:{port}/a\tb"),
            ("f", "a space", "host", "http://a .test:{port}/"),
        )
    ),
    *(
        url_case(f"U24{letter}", f"port {port}", f"http://a.test:{port}/", BAD)
        for letter, port in zip("abcde", (22, 6379, 5432, 0, 65_536), strict=True)
    ),
    url_case("U25a", "file:///", "file:///etc/passwd", NO_ADDRESS),
    url_case("U25b", "a path", "/etc/passwd", NO_ADDRESS),
    url_case("U25c", "a path of Windows", "\\\\private\\share", NO_ADDRESS),
    url_case("U25d", "a data URL of text", "data:text/plain;base64,YWJj", BAD_DATA),
    url_case("U25e", "a data URL with a charset", "data:image/png;charset=x;base64,YWJj", BAD_DATA),
    url_case("U25f", "a data URL in percents", "data:image/svg+xml,%3Csvg%3E", BAD_DATA),
    url_case("U26a", "broken base64", "data:image/png;base64,!!!!", BAD_DATA),
    Case(
        "U26b",
        "a data URL of 100 MB",
        ask_long_data_url,
        "line_too_long",
        note="in place of 200 MB; no line of more than 16 MiB is taken here",
    ),
    Case("U26c", "a data URL of a million frames", ask_frames, "video_too_large"),
    answer_case(
        "U27a",
        "headers that come slowly",
        raw(*[b"HTTP/1.1 200 OK\r\n", *[b"X: y\r\n"] * 100], pause_s=0.1),
        TIMED_OUT,
        network=SHORT,
        note=SCALED,
    ),
    answer_case(
        "U27b",
        "a byte a second",
        endless(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n", b"x", 0.1),
        TIMED_OUT,
        network=SHORT,
        note=SCALED,
    ),
    answer_case(
        "U27c",
        "silence behind the headers",
        raw(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n", ends=False),
        TIMED_OUT,
        network=SHORT,
        note=SCALED,
    ),
    answer_case(
        "U28a",
        "less than its length",
        answering(sample("small.png")[:100], content_length=200),
        FAILED,
        network=QUICK,
    ),
    answer_case(
        "U28b",
        "more than its length",
        answering(sample("small.png"), content_length=100),
        "image_truncated",
    ),
    answer_case(
        "U28c",
        "a length of 100 GB",
        raw(b"HTTP/1.1 200 OK\r\nContent-Length: 100000000000\r\n\r\n", ends=False),
        "fetch_too_large",
    ),
    answer_case(
        "U28d",
        "chunks without end",
        endless(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
            b"100000\r\n" + bytes(0x100000) + b"\r\n",
        ),
        "fetch_too_large",
        max_growth_mb=160,
        note="counted as it comes: the 64 MiB that one image may have, and room to grow into",
    ),
    answer_case(
        "U28e",
        "a body packed 1:1000",
        answering(BOMB, headers=["Content-Encoding: gzip"]),
        FAILED,
    ),
    answer_case(
        "U28f", "a body packed by br", answering(b"x", headers=["Content-Encoding: br"]), FAILED
    ),
    answer_case(
        "U29a",
        "10,000 headers",
        answering(b"", headers=[f"X-{n}: {PLANTED}" for n in range(10_000)]),
        FAILED,
        network=QUICK,
    ),
    answer_case(
        "U29b",
        "a header of 1 MB",
        answering(b"", headers=["X: " + "y" * 2**20]),
        FAILED,
        network=QUICK,
    ),
    answer_case(
        "U29c",
        "1xx without end",
        endless(b"", b"HTTP/1.1 103 Early Hints\r\n\r\n"),
        FAILED,
        network=QUICK,
    ),
    Case("U30a", "TLS that has expired", partial(ask_over_tls, HOST, -1, True), FAILED),
    Case("U30b", "TLS for another name", partial(ask_over_tls, "other.test", 1, True), FAILED),
    Case("U30c", "TLS signed by itself", partial(ask_over_tls, HOST, 1, False), FAILED),
    Case("U30d", "good TLS", partial(ask_over_tls, HOST, 1, True), OK, STAR),
    *(
        answer_case(
            f"U31{letter}",
            f"HTTP {status}",
            answering(b"x", f"{status} {PLANTED}", headers),
            FAILED,
            network=QUICK,
        )
        for letter, status, headers in (
            ("a", 404, ()),
            ("b", 401, (f'WWW-Authenticate: Basic realm="{PLANTED}"',)),
            ("c", 429, ("Retry-After: 1000000000",)),
            ("d", 503, ()),
            ("e", 206, ()),
        )
    ),
    answer_case("U31f", "HTTP 204", raw(b"HTTP/1.1 204 No Content\r\n\r\n"), FAILED, network=QUICK),
    answer_case(
        "U31g", "HTTP 304", raw(b"HTTP/1.1 304 Not Modified\r\n\r\n"), FAILED, network=QUICK
    ),
    bucket_case("U32a", "an object of one's own", "s3://photographs/default/a.png", OK),
    bucket_case("U32b", "another tenant's", "s3://photographs/other-1/a.png", "bucket_not_allowed"),
    bucket_case("U32c", "a way up", "s3://photographs/default/../other-1/a.png", NO_ADDRESS),
    bucket_case("U32d", "an unknown bucket", "s3://secrets/a.png", "bucket_not_allowed"),
    bucket_case(
        "U32e",
        "one whose requester pays",
        "s3://photographs/default/a.png",
        "object_denied",
        refusing("AccessDenied"),
    ),
    bucket_case("U32f", "a version", "s3://photographs/default/a.png?versionId=1", NO_ADDRESS),
    bucket_case(
        "U32g", "a key of 1,025 bytes", "s3://photographs/default/" + "x" * 1017, NO_ADDRESS
    ),
    bucket_case(
        "U32h",
        "an archived one",
        "s3://photographs/default/a.png",
        "object_archived",
        refusing("InvalidObjectState"),
    ),
)
