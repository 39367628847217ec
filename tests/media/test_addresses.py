"""Which addresses are out of reach: every denied range, whole, and everything that hides one."""

from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from media.addresses import METADATA_ADDRESSES, PUBLIC_ONLY, Address, AddressRules, Denied, judge

DENIED_IPV4 = [
    "0.0.0.0/8",
    "10.0.0.0/8",
    "100.64.0.0/10",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "172.16.0.0/12",
    "192.0.0.0/24",
    "192.0.2.0/24",
    "192.88.99.0/24",
    "192.168.0.0/16",
    "198.18.0.0/15",
    "198.51.100.0/24",
    "203.0.113.0/24",
    "224.0.0.0/4",
    "240.0.0.0/4",
    "168.63.129.16/32",
]
DENIED_IPV6 = [
    "::/8",
    "::/96",
    "::ffff:0:0/96",
    "::ffff:0:0:0/96",
    "64:ff9b::/96",
    "64:ff9b:1::/48",
    "100::/64",
    "2001::/23",
    "2001::/32",
    "2001:2::/48",
    "2001:10::/28",
    "2001:20::/28",
    "2001:db8::/32",
    "2002::/16",
    "3fff::/20",
    "4000::/3",
    "5f00::/16",
    "e000::/4",
    "fc00::/7",
    "fe80::/10",
    "fec0::/10",
    "ff00::/8",
]


def addresses_of(networks: list[str]) -> st.SearchStrategy[Address]:
    """Draw from every network, its first and last address among them."""
    return st.sampled_from([ip_network(text) for text in networks]).flatmap(
        lambda network: (
            st.sampled_from([network[0], network[-1]]) | st.ip_addresses(network=network)
        )
    )


denied_ipv4 = addresses_of(DENIED_IPV4)
denied_ipv6 = addresses_of(DENIED_IPV6)


def ipv6(bits: int) -> IPv6Address:
    return IPv6Address(bits % 2**128)


EMBEDDINGS: dict[str, Callable[[int], IPv6Address]] = {
    "compatible": ipv6,
    "mapped": lambda inner: ipv6(0xFFFF << 32 | inner),
    "translated": lambda inner: ipv6(0xFFFF << 48 | inner),
    "NAT64": lambda inner: ipv6(0x64_FF9B << 96 | inner),
    "local NAT64, /96": lambda inner: ipv6(0x64_FF9B_0001 << 80 | inner),
    "local NAT64, /48": lambda inner: ipv6(
        0x64_FF9B_0001 << 80 | inner >> 16 << 64 | (inner & 0xFFFF) << 40
    ),
    "6to4": lambda inner: ipv6(0x2002 << 112 | inner << 80 | 1),
    "Teredo server": lambda inner: ipv6(0x2001_0000 << 96 | inner << 64),
    "Teredo client": lambda inner: ipv6(0x2001_0000 << 96 | inner ^ 0xFFFF_FFFF),
    "ISATAP": lambda inner: ipv6(0x2A00_1450_4001_0801 << 64 | 0x5EFE << 32 | inner),
    "ISATAP, unique": lambda inner: ipv6(0x2A00_1450_4001_0801 << 64 | 0x0200_5EFE << 32 | inner),
}


@given(denied_ipv4)
def test_every_denied_ipv4_address_is_denied(address: Address) -> None:
    assert judge(address) is not None


@given(denied_ipv6)
def test_every_denied_ipv6_address_is_denied(address: Address) -> None:
    assert judge(address) is not None


@pytest.mark.parametrize("embed", EMBEDDINGS.values(), ids=EMBEDDINGS)
@given(inner=denied_ipv4)
def test_every_embedding_of_a_denied_address_is_denied(
    embed: Callable[[int], IPv6Address], inner: Address
) -> None:
    assert judge(embed(int(inner))) is not None


@pytest.mark.parametrize("embed", EMBEDDINGS.values(), ids=EMBEDDINGS)
@given(inner=denied_ipv4)
def test_allowing_all_of_ipv6_still_opens_no_embedded_address(
    embed: Callable[[int], IPv6Address], inner: Address
) -> None:
    rules = AddressRules(allowed_networks=(IPv6Network("::/0"),))
    address = embed(int(inner))
    assume(int(address) > 1)  # :: and ::1 are themselves, not 0.0.0.0 and 0.0.0.1

    assert judge(address, rules) is not None


@given(st.integers(0, 2**128 - 1))
def test_ipv6_outside_global_unicast_is_denied(bits: int) -> None:
    address = IPv6Address(bits)

    assert judge(address) is not None or address in IPv6Network("2000::/3")


@given(st.ip_addresses(v=4))
def test_ipv4_that_python_calls_private_or_multicast_is_denied(address: IPv4Address) -> None:
    if address.is_private or address.is_multicast or address.is_reserved:
        assert judge(address) is not None


@given(st.ip_addresses(v=4))
def test_ipv4_outside_the_ranges_is_reachable(address: IPv4Address) -> None:
    if not any(address in IPv4Network(text) for text in DENIED_IPV4):
        assert judge(address) is None


@given(denied_ipv6, st.sampled_from(["lo", "eth0", "1"]))
def test_an_address_with_a_zone_is_denied_whatever_is_allowed(address: Address, zone: str) -> None:
    rules = AddressRules(allowed_networks=(IPv6Network("::/0"),))

    assert judge(IPv6Address(f"{address}%{zone}"), rules) is Denied.SCOPED


@pytest.mark.parametrize(
    "text",
    [
        "1.1.1.1",
        "8.8.8.8",
        "9.255.255.255",
        "11.0.0.0",
        "100.63.255.255",
        "100.128.0.0",
        "126.255.255.255",
        "128.0.0.0",
        "151.101.1.67",
        "168.63.129.15",
        "168.63.129.17",
        "169.253.255.255",
        "169.255.0.0",
        "172.15.255.255",
        "172.32.0.0",
        "192.0.1.0",
        "192.0.3.0",
        "192.88.98.255",
        "192.167.255.255",
        "192.169.0.0",
        "198.17.255.255",
        "198.20.0.0",
        "203.0.112.255",
        "203.0.114.0",
        "223.255.255.255",
        "2001:200::1",
        "2001:4860:4860::8888",
        "2001:db7:ffff::1",
        "2001:db9::1",
        "2003::1",
        "2400:cb00::1",
        "2606:4700:4700::1111",
        "2620:fe::fe",
        "2a00:1450:4001:801::200e",
        "2a00:1450:4001:801:0:5efe:808:808",
        "3ffe:ffff::1",
    ],
)
def test_public_sample_passes(text: str) -> None:
    assert judge(ip_address(text)) is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("0.0.0.0", Denied.UNSPECIFIED),  # noqa: S104 - nothing is bound
        ("0.1.2.3", Denied.UNSPECIFIED),
        ("10.0.0.1", Denied.PRIVATE),
        ("100.64.0.1", Denied.CARRIER_NAT),
        ("100.100.100.200", Denied.METADATA),
        ("127.0.0.1", Denied.LOOPBACK),
        ("127.255.255.254", Denied.LOOPBACK),
        ("168.63.129.16", Denied.METADATA),
        ("169.254.1.1", Denied.LINK_LOCAL),
        ("169.254.169.254", Denied.METADATA),
        ("172.31.255.255", Denied.PRIVATE),
        ("192.0.0.8", Denied.SPECIAL),
        ("192.0.0.192", Denied.METADATA),
        ("192.0.2.1", Denied.DOCUMENTATION),
        ("192.88.99.1", Denied.TRANSLATION),
        ("192.168.0.1", Denied.PRIVATE),
        ("198.19.255.255", Denied.BENCHMARK),
        ("224.0.0.1", Denied.MULTICAST),
        ("240.0.0.1", Denied.RESERVED),
        ("255.255.255.255", Denied.BROADCAST),
        ("::", Denied.UNSPECIFIED),
        ("::1", Denied.LOOPBACK),
        ("::8.8.8.8", Denied.TRANSLATION),
        ("::127.0.0.1", Denied.LOOPBACK),
        ("::169.254.169.254", Denied.METADATA),
        ("::ffff:8.8.8.8", Denied.TRANSLATION),
        ("::ffff:10.0.0.1", Denied.PRIVATE),
        ("::ffff:169.254.169.254", Denied.METADATA),
        ("::ffff:0:10.0.0.1", Denied.PRIVATE),
        ("64:ff9b::808:808", Denied.TRANSLATION),
        ("64:ff9b::a9fe:a9fe", Denied.METADATA),
        ("64:ff9b:1:a9fe:a9:fe00::", Denied.METADATA),
        ("100::1", Denied.RESERVED),
        ("2001:0:808:808::f7f7:f7f7", Denied.TRANSLATION),
        ("2001:0:808:808::f5ff:fffe", Denied.PRIVATE),
        ("2001:2::1", Denied.BENCHMARK),
        ("2001:20::1", Denied.SPECIAL),
        ("2001:db8::1", Denied.DOCUMENTATION),
        ("2002:808:808::1", Denied.TRANSLATION),
        ("2002:a9fe:a9fe::1", Denied.METADATA),
        ("2a00:1450:4001:801:0:5efe:a9fe:a9fe", Denied.METADATA),
        ("2a00:1450:4001:801:200:5efe:a00:1", Denied.PRIVATE),
        ("3fff::1", Denied.DOCUMENTATION),
        ("5f00::1", Denied.RESERVED),
        ("fc00::1", Denied.PRIVATE),
        ("fd00:ec2::254", Denied.METADATA),
        ("fe80::1", Denied.LINK_LOCAL),
        ("fe80::1%lo", Denied.SCOPED),
        ("fec0::1", Denied.SITE_LOCAL),
        ("ff02::1", Denied.MULTICAST),
    ],
)
def test_reason_is_named(text: str, reason: Denied) -> None:
    assert judge(ip_address(text)) is reason


def test_allowed_network_opens_itself_and_nothing_beside_it() -> None:
    rules = AddressRules(allowed_networks=(ip_network("10.1.0.0/16"),))

    assert judge(ip_address("10.1.2.3"), rules) is None
    assert judge(ip_address("10.2.0.1"), rules) is Denied.PRIVATE
    assert judge(ip_address("::ffff:10.1.2.3"), rules) is Denied.TRANSLATION


def test_allowed_host_may_be_private_under_its_own_name_only() -> None:
    rules = AddressRules(allowed_hosts=frozenset({"minio.test"}))

    assert judge(ip_address("10.1.2.3"), rules, "minio.test") is None
    assert judge(ip_address("10.1.2.3"), rules, "other.test") is Denied.PRIVATE
    assert judge(ip_address("10.1.2.3"), rules) is Denied.PRIVATE
    assert judge(ip_address("169.254.1.1"), rules, "minio.test") is Denied.LINK_LOCAL
    assert judge(ip_address("::ffff:10.1.2.3"), rules, "minio.test") is Denied.PRIVATE


@pytest.mark.parametrize("address", sorted(METADATA_ADDRESSES, key=str))
def test_metadata_stays_denied_whatever_is_allowed(address: Address) -> None:
    everything = (ip_network("0.0.0.0/0"), ip_network("::/0"))
    rules = AddressRules(allowed_networks=everything, allowed_hosts=frozenset({"cloud.test"}))

    assert judge(address, rules, "cloud.test") is Denied.METADATA


def test_what_an_operator_denies_is_denied_even_where_it_is_allowed() -> None:
    network = ip_network("8.8.8.0/24")
    rules = AddressRules(allowed_networks=(network,), denied_networks=(network,))

    assert judge(ip_address("8.8.8.8"), rules) is Denied.CONFIGURED
    assert judge(ip_address("64:ff9b::808:808"), rules) is Denied.CONFIGURED


def test_nat64_can_be_opened_for_public_addresses_alone() -> None:
    rules = AddressRules(allowed_networks=(ip_network("64:ff9b::/96"),))

    assert judge(ip_address("64:ff9b::808:808"), rules) is None
    assert judge(ip_address("64:ff9b::a00:1"), rules) is Denied.PRIVATE


def test_nothing_is_allowed_unless_someone_says_so() -> None:
    assert AddressRules() == PUBLIC_ONLY
    assert judge(ip_address("127.0.0.1"), PUBLIC_ONLY, "localhost") is Denied.LOOPBACK
