"""
URLs of http and https: parsed once, refused in doubt, rebuilt from their parts.

There is one parser, this one, and what it returns is what is connected to and asked for: two
parsers that disagree about a backslash are how allow-lists are passed. A host is a name, four
plain decimal numbers, or IPv6 in brackets. Other ways to write a number as a host (2852039166,
0xA9FEA9FE, 0251.0376.0251.0376, 127.1) are refused, because a resolver takes them for addresses.
Whether a host may be reached is no question of its text: see `media.addresses`.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address, IPv6Address
from typing import Final
from urllib.parse import quote, urljoin

import idna

from media.errors import BadUrlError

DEFAULT_PORTS: Final = {"http": 80, "https": 443}
MAX_URL_CHARS: Final = 8192

# RFC 3986, appendix B, with a scheme and an authority that must be there.
_PARTS = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*):"
    r"//(?P<authority>[^/?#]*)(?P<path>/[^?#]*)?(?P<query>\?[^#]*)?(?:#.*)?"
)
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_HOST_AND_PORT = re.compile(r"(?P<host>\[[^\[\]@]*\]|[^\[\]:@]*)(?::(?P<port>[1-9][0-9]{0,4})?)?")
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_FORBIDDEN = re.compile(r"[\x00-\x20\x7f-\xa0\\\s\ud800-\udfff]")

# What stays as it was written behind the host: all that RFC 3986 lets stand there, and escapes.
# A signed URL is signed over these very characters.
_KEPT = "%/?:@!$&'()*+,;=-._~"
_MAX_NAME_CHARS = 253
_MAX_PORT = 65_535


@dataclass(frozen=True, slots=True)
class WebUrl:
    """
    One URL in its parts; `str()` puts it together again.

    Attributes:
        scheme: http or https.
        host: in lower case and ASCII, without a final dot; IPv6 without brackets.
        port: always set.
        target: path and query, in ASCII; what goes into the request line.
    """

    scheme: str
    host: str
    port: int
    target: str

    @property
    def host_header(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.scheme}://{self.host_header}{self.target}"


def parse_url(text: str, ports: Collection[int] = (80, 443)) -> WebUrl:
    """
    Return the parts of one absolute URL; its fragment is dropped.

    Args:
        text: as a client or a server wrote it. Non-ASCII behind the host is percent-encoded.
        ports: those that may be named.

    Raises:
        BadUrlError: not http or https, an odd character, a login, a bad host, another port. The
            text repeats nothing of the URL but its scheme, if that is a known one.
    """
    _check_length(text)
    if _FORBIDDEN.search(text):
        raise BadUrlError(
            "The URL holds a space, a control character or a backslash. Percent-encode what "
            "belongs to it, and leave out the rest."
        )
    parts = _PARTS.fullmatch(text)
    if parts is None or parts["scheme"].lower() not in DEFAULT_PORTS:
        raise _not_http(text)
    scheme = parts["scheme"].lower()
    host, port = _split_authority(parts["authority"])
    port = port or DEFAULT_PORTS[scheme]
    if port not in ports:
        raise BadUrlError(
            "The URL names a port that is not open here. Use the default of http or https, or ask "
            "the operator to open the port with DARKROOM_MEDIA_PORTS."
        )
    target = quote((parts["path"] or "/") + (parts["query"] or ""), safe=_KEPT)
    _check_length(target)  # of one character up to twelve may have come
    return WebUrl(scheme, host, port, target)


def join_url(base: WebUrl, location: str, ports: Collection[int] = (80, 443)) -> WebUrl:
    """
    Return where a redirect leads, judged as strictly as the first URL was.

    Raises:
        BadUrlError: as `parse_url`, whose word on the joined URL is the last.
    """
    if len(location) > MAX_URL_CHARS or _FORBIDDEN.search(location):  # urljoin drops some unseen
        raise BadUrlError(
            "The server redirects to something that is not a plain URL. Give the final URL."
        )
    try:
        joined = urljoin(str(base), location)
    except ValueError as error:  # brackets that do not match
        raise BadUrlError from error
    return parse_url(joined, ports)


def _check_length(text: str) -> None:
    if len(text) > MAX_URL_CHARS:
        raise BadUrlError(
            f"The URL has more than {MAX_URL_CHARS} characters. Shorten it, or upload the file."
        )


def _not_http(text: str) -> BadUrlError:
    scheme = _SCHEME.match(text)
    if scheme and scheme[1].lower() in DEFAULT_PORTS:
        return BadUrlError(
            "The URL has no host. Its form is https://host/path, with two slashes and no more."
        )
    return BadUrlError("Only http and https URLs are fetched. Start the URL with https, or http.")


def _split_authority(authority: str) -> tuple[str, int | None]:
    if "@" in authority:
        raise BadUrlError("The URL holds a login. Leave out what stands before the @.")
    parts = _HOST_AND_PORT.fullmatch(authority)
    if parts is None or int(parts["port"] or 0) > _MAX_PORT:
        raise _bad_host()
    return _normal_host(parts["host"]), int(parts["port"]) if parts["port"] else None


def _normal_host(written: str) -> str:
    if written.startswith("["):
        return _normal_ipv6(written[1:-1])
    name = _ascii_name(written.removesuffix("."))
    labels = name.split(".")
    if _NUMBER.fullmatch(labels[-1]):  # then a resolver reads all of it as an address
        try:
            return str(IPv4Address(name))
        except AddressValueError as error:
            raise BadUrlError(
                "The host of the URL is an unusual way to write an address. Write a name, or four "
                "decimal numbers."
            ) from error
    if len(name) > _MAX_NAME_CHARS or not all(_LABEL.fullmatch(label) for label in labels):
        raise _bad_host()
    return name


def _normal_ipv6(written: str) -> str:
    if "%" in written:  # a zone: a way to an address on one of our own links
        raise _bad_host()
    try:
        return str(IPv6Address(written))
    except AddressValueError as error:
        raise _bad_host() from error


def _ascii_name(written: str) -> str:
    """Return a host name as DNS has it. IDNA 2008 without any mapping refuses look-alike digits."""
    name = _lower_ascii(written)
    try:
        if not name.isascii():
            return idna.encode(name, strict=True, std3_rules=True).decode("ascii")
        for label in name.split("."):
            if label.startswith("xn--"):
                idna.ulabel(label)
    except UnicodeError as error:  # IDNAError is one
        raise _bad_host() from error
    return name


_TO_LOWER_ASCII = {code: code + 32 for code in range(ord("A"), ord("Z") + 1)}


def _lower_ascii(text: str) -> str:
    """Lower A to Z and nothing else: str.lower() makes an ASCII k of the Kelvin sign."""
    return text.translate(_TO_LOWER_ASCII)


def _bad_host() -> BadUrlError:
    return BadUrlError(
        "The host of the URL is not valid. Write a plain name, such as example.com, or an address."
    )
