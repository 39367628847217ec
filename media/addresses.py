"""
Which addresses may be reached: an IP address in, the reason to stay away or None out.

Pure functions, no look-ups and no names: whoever connects resolves first and asks here about every
answer. The tables are our own because `ipaddress.is_global` is no guard: it changed between
Python 3.11, 3.12 and 3.13, and it calls multicast, site-local and IPv4-compatible addresses
global. IPv6 is allowed by what is handed out (2000::/3) and not by what is known to be bad.

An IPv4 address inside an IPv6 one (mapped, NAT64, 6to4, Teredo, ISATAP) is judged as well: where
a router translates, that is the host that answers.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network


class Denied(StrEnum):
    """Why an address is out of reach. For logs: a client only learns that it is."""

    UNSPECIFIED = "unspecified"
    LOOPBACK = "loopback"
    PRIVATE = "private"
    CARRIER_NAT = "carrier_nat"
    LINK_LOCAL = "link_local"
    SITE_LOCAL = "site_local"
    METADATA = "metadata"
    SPECIAL = "special"
    BENCHMARK = "benchmark"
    DOCUMENTATION = "documentation"
    TRANSLATION = "translation"
    MULTICAST = "multicast"
    RESERVED = "reserved"
    BROADCAST = "broadcast"
    SCOPED = "scoped"
    CONFIGURED = "configured"


@dataclass(frozen=True, slots=True)
class AddressRules:
    """
    What an operator adds to the tables below.

    Cloud metadata addresses, and IPv6 addresses with a zone, are denied whatever stands here.

    Attributes:
        allowed_networks: reachable although not public. A translated IPv4 address must also be
            allowed as itself: allowing 64:ff9b::/96 opens public IPv4 through NAT64, no more.
        allowed_hosts: names, in lower case, whose answers may be private, carrier NAT or loopback.
        denied_networks: never reached, also where another rule allows it: the cluster's own
            ranges where they are public, or a NAT64 prefix of the operator's own.
    """

    allowed_networks: tuple[Network, ...] = ()
    allowed_hosts: frozenset[str] = frozenset()
    denied_networks: tuple[Network, ...] = ()


PUBLIC_ONLY = AddressRules()

METADATA_ADDRESSES: frozenset[Address] = frozenset(
    ip_address(text)
    for text in (
        "169.254.169.254",  # nearly every cloud
        "169.254.170.2",  # credentials of AWS containers
        "169.254.170.23",  # credentials of AWS pods
        "169.254.0.23",  # Tencent
        "169.254.42.42",  # Scaleway
        "100.100.100.200",  # Alibaba
        "168.63.129.16",  # Azure's wire server, inside public space
        "192.0.0.192",  # Oracle
        "fd00:ec2::254",  # AWS
        "fd00:ec2::23",  # credentials of AWS pods
        "fd20:ce::254",  # Google
        "fd00:42::42",  # Scaleway
    )
)

# Ordered: the first match names the reason.
_IPV4_RANGES: tuple[tuple[IPv4Network, Denied], ...] = tuple(
    (IPv4Network(text), reason)
    for text, reason in (
        ("0.0.0.0/8", Denied.UNSPECIFIED),  # "this network": Linux connects 0.0.0.0 to itself
        ("10.0.0.0/8", Denied.PRIVATE),
        ("100.64.0.0/10", Denied.CARRIER_NAT),
        ("127.0.0.0/8", Denied.LOOPBACK),
        ("169.254.0.0/16", Denied.LINK_LOCAL),
        ("172.16.0.0/12", Denied.PRIVATE),
        ("192.0.0.0/24", Denied.SPECIAL),
        ("192.0.2.0/24", Denied.DOCUMENTATION),
        ("192.88.99.0/24", Denied.TRANSLATION),  # 6to4 relays
        ("192.168.0.0/16", Denied.PRIVATE),
        ("198.18.0.0/15", Denied.BENCHMARK),
        ("198.51.100.0/24", Denied.DOCUMENTATION),
        ("203.0.113.0/24", Denied.DOCUMENTATION),
        ("224.0.0.0/4", Denied.MULTICAST),
        ("255.255.255.255/32", Denied.BROADCAST),
        ("240.0.0.0/4", Denied.RESERVED),
    )
)

_IPV6_RANGES: tuple[tuple[IPv6Network, Denied], ...] = tuple(
    (IPv6Network(text), reason)
    for text, reason in (
        ("::/128", Denied.UNSPECIFIED),
        ("::1/128", Denied.LOOPBACK),
        ("::/96", Denied.TRANSLATION),  # IPv4-compatible
        ("::ffff:0:0/96", Denied.TRANSLATION),  # IPv4-mapped
        ("::ffff:0:0:0/96", Denied.TRANSLATION),  # IPv4-translated (SIIT)
        ("64:ff9b::/96", Denied.TRANSLATION),  # NAT64
        ("64:ff9b:1::/48", Denied.TRANSLATION),  # NAT64, local
        ("2001::/32", Denied.TRANSLATION),  # Teredo
        ("2001:2::/48", Denied.BENCHMARK),
        ("2001::/23", Denied.SPECIAL),
        ("2001:db8::/32", Denied.DOCUMENTATION),
        ("2002::/16", Denied.TRANSLATION),  # 6to4
        ("3fff::/20", Denied.DOCUMENTATION),
        ("fc00::/7", Denied.PRIVATE),
        ("fe80::/10", Denied.LINK_LOCAL),
        ("fec0::/10", Denied.SITE_LOCAL),
        ("ff00::/8", Denied.MULTICAST),
    )
)

_GLOBAL_UNICAST = IPv6Network("2000::/3")

# What an allowed host name may lead to. Not link-local: that is where metadata services live.
_REASONS_A_HOST_MAY_LIFT = frozenset({Denied.PRIVATE, Denied.CARRIER_NAT, Denied.LOOPBACK})


def judge(
    address: Address, rules: AddressRules = PUBLIC_ONLY, host: str | None = None
) -> Denied | None:
    """
    Return why this address must not be reached, or None where it may be.

    Args:
        address: one answer of a resolver, or the peer of a connection.
        rules: the operator's.
        host: the name that led here, in lower case, for `rules.allowed_hosts`.
    """
    if isinstance(address, IPv6Address) and address.scope_id is not None:
        return Denied.SCOPED
    if address in METADATA_ADDRESSES:
        return Denied.METADATA
    if _is_in(address, rules.denied_networks):
        return Denied.CONFIGURED
    for embedded in addresses_inside(address):
        reason = judge(embedded, rules)
        if reason is not None:
            return reason
    if _is_in(address, rules.allowed_networks):
        return None
    reason = _classify(address)
    if reason in _REASONS_A_HOST_MAY_LIFT and host in rules.allowed_hosts:
        return None
    return reason


def addresses_inside(address: Address) -> Iterator[IPv4Address]:
    """Yield every IPv4 address that a router might take this one for; none for most."""
    if isinstance(address, IPv4Address):
        return
    bits = int(address)
    top = bits >> 96
    if bits > 1 and bits >> 32 in _PREFIXES_BEFORE_IPV4:
        yield _low_ipv4(bits)
    if address in _LOCAL_NAT64:  # RFC 6052 splits the address around bits 64 to 71
        yield _low_ipv4((bits >> 64 & 0xFFFF) << 16 | bits >> 40 & 0xFFFF)
        yield _low_ipv4(bits)
    if top >> 16 == 0x2002:  # 6to4
        yield _low_ipv4(bits >> 80)
    if top == 0x2001_0000:  # Teredo: the server, and the client with its bits turned
        yield _low_ipv4(bits >> 64)
        yield _low_ipv4(~bits)
    if bits >> 32 & 0xFDFF_FFFF == 0x0000_5EFE:  # ISATAP, under any prefix
        yield _low_ipv4(bits)


_LOCAL_NAT64 = IPv6Network("64:ff9b:1::/48")
_PREFIXES_BEFORE_IPV4 = frozenset(
    int(IPv6Address(text)) >> 32 for text in ("::", "::ffff:0:0", "::ffff:0:0:0", "64:ff9b::")
)


def _low_ipv4(bits: int) -> IPv4Address:
    return IPv4Address(bits & 0xFFFF_FFFF)


def _classify(address: Address) -> Denied | None:
    if isinstance(address, IPv4Address):
        return next((reason for network, reason in _IPV4_RANGES if address in network), None)
    for network, reason in _IPV6_RANGES:
        if address in network:
            return reason
    return None if address in _GLOBAL_UNICAST else Denied.RESERVED


def _is_in(address: Address, networks: tuple[Network, ...]) -> bool:
    return any(address in network for network in networks)
