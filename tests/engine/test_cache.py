"""What is kept stays within bytes, and what is asked for often stays longest."""

from engine.cache import Cache


def test_what_was_not_asked_for_longest_goes_first() -> None:
    cache: Cache[str, int] = Cache(30)
    for number, name in enumerate("abc"):
        cache.put(name, number, 10)
    cache.find("a")
    cache.put("d", 3, 15)

    assert [0, None, None, 3] == [cache.find(name) for name in "abcd"]
    assert (2, 25) == (len(cache), cache.num_bytes)


def test_what_is_too_large_pushes_nothing_out() -> None:
    cache: Cache[str, int] = Cache(30)
    cache.put("a", 1, 30)
    cache.put("b", 2, 31)

    assert not cache.takes("b", 31)
    assert (1, None, 30) == (cache.find("a"), cache.find("b"), cache.num_bytes)


def test_what_is_there_is_left_as_it_is() -> None:
    cache: Cache[str, int] = Cache(30)
    cache.put("a", 1, 10)
    cache.put("a", 2, 20)

    assert (1, 10) == (cache.find("a"), cache.num_bytes)


def test_cache_without_bytes_keeps_nothing() -> None:
    cache: Cache[str, int] = Cache(0)
    cache.put("a", 1, 10)

    assert cache.find("a") is None
    cache.clear()
    assert 0 == cache.num_bytes
