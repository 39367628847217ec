"""Each host has its share of what is fetched at a time, and whoever comes late finds a place."""

from collections import Counter

import pytest

from tasks.places import Places, find_host


def take_all(places: Places, *hosts: str) -> Counter[str]:
    """In turn, until none of them gets any more."""
    taken: Counter[str] = Counter()
    for _ in range(200):
        taken.update(host for host in hosts if places.try_take({host: 1}))
    return taken


@pytest.mark.parametrize(
    "written", ["slow.test/a", "SLOW.test:80/a", "slow.test.?x", "slow.test.:8080#a", "slow.test:"]
)
def test_host_counts_as_one_however_it_is_written(written: str) -> None:
    assert "slow.test" == find_host(f"https://{written}")
    assert "[::1]" == find_host("http://[::1]:80/a")
    assert "" == find_host("data:image/png;base64,AAAA")


def test_lone_host_gets_no_more_than_its_share() -> None:
    assert 20 <= take_all(Places(128), "slow")["slow"] <= 26


def test_many_slow_hosts_leave_places_to_others() -> None:
    places = Places(128)
    slow = take_all(places, *(f"slow-{number}" for number in range(20)))

    assert 20 == len(slow)
    assert slow.total() <= 112
    assert places.try_take({"quick": 1})


def test_host_that_has_none_gets_one_while_there_is_one() -> None:
    places = Places(8)
    hosts = [f"host-{number}" for number in range(9)]

    assert hosts[:8] == [host for host in hosts if places.try_take({host: 1})]
    places.give_back({"host-3": 1})
    assert places.try_take({"host-8": 1})


def test_item_of_several_hosts_gets_all_of_its_places_or_none() -> None:
    places = Places(4)
    assert places.try_take({"a": 1})

    assert not places.try_take({"a": 1, "b": 1})
    places.give_back({"a": 1})
    assert places.try_take({"a": 3, "b": 3})
    assert not places.try_take({"c": 1})
    places.give_back({"a": 3, "b": 3})
    assert places.try_take({"a": 1, "b": 1})


def test_item_of_many_pictures_takes_a_place_for_those_that_are_under_way() -> None:
    places = Places(16, max_each=8)
    many = {"a": 200, "b": 2}

    assert places.try_take(many)
    assert places.try_take({"c": 8})
    assert not places.try_take({"d": 1})
    places.give_back(many)
    assert places.try_take({"a": 1, "b": 1})


def test_host_counts_wherever_it_stands_in_an_item() -> None:
    places = Places(9, max_each=8)

    assert places.try_take({"quick-1": 8, "slow": 1})
    assert not places.try_take({"quick-2": 8, "slow": 1})
    assert places.try_take({"quick-3": 1})
