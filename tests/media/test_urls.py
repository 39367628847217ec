"""URLs: the ones that are taken, as they are rebuilt, and the many that are not."""

from urllib.parse import urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from media.errors import BadUrlError
from media.urls import MAX_URL_CHARS, WebUrl, join_url, parse_url
from tests.media.files import catch


@pytest.mark.parametrize(
    ("written", "normal"),
    [
        ("https://example.com/a.jpg", "https://example.com/a.jpg"),
        ("HTTPS://Example.COM/A.jpg", "https://example.com/A.jpg"),
        ("https://example.com", "https://example.com/"),
        ("https://example.com?x=1", "https://example.com/?x=1"),
        ("https://example.com./a", "https://example.com/a"),
        ("https://example.com:443/a", "https://example.com/a"),
        ("https://example.com:/a", "https://example.com/a"),
        ("http://example.com:80/a", "http://example.com/a"),
        ("http://example.com:443/a", "http://example.com:443/a"),
        ("https://example.com/a#part", "https://example.com/a"),
        ("http://good.test#@bad.test/", "http://good.test/"),
        ("https://example.com/a?b=http://other/@x", "https://example.com/a?b=http://other/@x"),
        ("https://example.com/a%2Fb%zz?c=%3d+d", "https://example.com/a%2Fb%zz?c=%3d+d"),
        ("https://example.com/../a//b/", "https://example.com/../a//b/"),
        ("https://example.com/é?ü={1}", "https://example.com/%C3%A9?%C3%BC=%7B1%7D"),
        ("https://bücher.example/a", "https://xn--bcher-kva.example/a"),
        ("https://xn--bcher-kva.example/a", "https://xn--bcher-kva.example/a"),
        ("https://my_bucket.s3.test/a", "https://my_bucket.s3.test/a"),
        ("http://8.8.8.8/", "http://8.8.8.8/"),
        ("http://8.8.8.8./", "http://8.8.8.8/"),
        ("http://[2001:DB8:0::1]/", "http://[2001:db8::1]/"),
        ("http://[::ffff:8.8.8.8]:443/", "http://[::ffff:808:808]:443/"),
        ("http://localhost./", "http://localhost/"),
    ],
)
def test_url_is_rebuilt_in_its_normal_form(written: str, normal: str) -> None:
    assert normal == str(parse_url(written))


@pytest.mark.parametrize(
    "url",
    [
        "",
        "example.com/a.jpg",
        "//example.com/a.jpg",
        "/etc/passwd",
        "\\\\server\\share\\a.jpg",
        "file:///etc/passwd",
        "ftp://example.com/a",
        "gopher://example.com/a",
        "javascript:alert(1)",
        "data:image/png;base64,AAAA",
        "s3://bucket/key",
        "ws://example.com/",
        "http:example.com",
        "http:/example.com",
        "http:///example.com",
        "http://",
        "http://:80/",
        "http://?x",
        "http://./",
        "http://../",
        "http://example..com/",
        "http://.example.com/",
        "http://example.com../",
        "http://-example.com/",
        "http://example-.com/",
        "http://exa%6dple.com/",
        "http://exam$ple.com/",
        "http://exam*ple.com/",
        "http://" + "a" * 64 + ".com/",
        "http://" + "a." * 127 + "com/",
    ],
)
def test_other_forms_are_refused(url: str) -> None:
    catch(BadUrlError, parse_url, url)


@pytest.mark.parametrize(
    "host",
    [
        "2852039166",
        "0xA9FEA9FE",
        "0xa9.0xfe.0xa9.0xfe",
        "0251.0376.0251.0376",
        "0251.254.169.254",
        "169.254.43518",
        "169.16689662",
        "127.1",
        "0",
        "0x",
        "00000000127.0.0.1",
        "127.0.0.1.1",
        "256.0.0.1",
        "1.2.3.4.5",
        "1.2.3.0x4",
        "example.1",
        "①②⑦.0.0.1",
        "\uff11\uff12\uff17.0.0.1",
        "127。0。0。1",
        "127\uff0e0\uff0e0\uff0e1",
        "١٢٧.0.0.1",
        "xn--xample-9ua.xn--a",
        "xn--",
        "xn--127-",
        "ⓔxample.com",
        "example\u200b.com",
        "exa\u00admple.com",
        "example\uff0ecom",
        "\N{KELVIN SIGN}example.com",
        "exampleﬁ.com",
        "\uff41.com",
        "-ü.com",
        "ü..com",
        "[::1",
        "::1",
        "[]",
        "[::1]]",
        "[::1]x",
        "[fe80::1%25lo]",
        "[fe80::1%lo]",
        "[v1.fe80]",
        "[127.0.0.1]",
        "[::\uff11]",
        "[1:2:3:4:5:6:7:8:9]",
    ],
)
def test_hosts_that_another_parser_may_read_otherwise_are_refused(host: str) -> None:
    catch(BadUrlError, parse_url, f"http://{host}/")


def test_a_login_is_called_by_its_name() -> None:
    assert "login" in str(catch(BadUrlError, parse_url, "https://good:secret@example.com/"))


@pytest.mark.parametrize(
    "url",
    [
        "http://good@169.254.169.254/",
        "http://good:secret@example.com/",
        "http://@example.com/",
        "http://good.test@bad.test:80/",
        "http://169.254.169.254\\@good.test/",
        "http://good.test\\.bad.test/",
        "http://good.test%5c@bad.test/",
        "http:\\\\good.test/",
    ],
)
def test_logins_and_backslashes_are_refused(url: str) -> None:
    error = catch(BadUrlError, parse_url, url)

    assert not {"good", "bad", "secret", "169"} & set(str(error).replace(".", " ").split())


@pytest.mark.parametrize("odd", [*map(chr, range(0x21)), *"\\\x7f\x80\x85\xa0\u2028\u3000\ud800"])
@pytest.mark.parametrize(
    "url", ["{}http://a.test/", "http://a{}.test/", "http://a.test/{}", "http://a.test/?{}#{}"]
)
def test_control_characters_and_white_space_are_refused_anywhere(url: str, odd: str) -> None:
    catch(BadUrlError, parse_url, url.replace("{}", odd))


@pytest.mark.parametrize(
    "port",
    [
        "22",
        "25",
        "6379",
        "5432",
        "8080",
        "0",
        "65536",
        "99999",
        "080",
        "8 0",
        "-80",
        "\uff18\uff10",
    ],
)
def test_other_ports_are_refused(port: str) -> None:
    catch(BadUrlError, parse_url, f"http://example.com:{port}/")
    catch(BadUrlError, parse_url, f"http://[2001:db8::1]:{port}/")


def test_a_port_that_an_operator_opens_is_taken() -> None:
    url = parse_url("http://minio.test:9000/a", ports={80, 443, 9000})

    assert WebUrl("http", "minio.test", 9000, "/a") == url
    assert "minio.test:9000" == url.host_header


def test_longest_url_is_exact() -> None:
    longest = "https://example.com/".ljust(MAX_URL_CHARS, "a")

    assert longest == str(parse_url(longest))
    catch(BadUrlError, parse_url, longest + "a")


def test_url_that_is_too_long_once_it_is_encoded_is_refused() -> None:
    """One character may become twelve, and what is fetched, or remembered, is the longer one."""
    parse_url("https://example.com/" + "\U0001f408" * 600)

    error = catch(BadUrlError, parse_url, "https://example.com/" + "\U0001f408" * 700)
    assert "more than 8192 characters" in str(error)


@pytest.mark.parametrize(
    ("location", "joined"),
    [
        ("https://other.test/b", "https://other.test/b"),
        ("//other.test/b", "https://other.test/b"),
        ("/b", "https://example.com/b"),
        ("b?y=2#z", "https://example.com/dir/b?y=2"),
        ("../b", "https://example.com/b"),
        ("?y=2", "https://example.com/dir/a.jpg?y=2"),
        ("http://other.test:80", "http://other.test/"),
    ],
)
def test_redirect_is_joined_to_where_it_came_from(location: str, joined: str) -> None:
    base = parse_url("https://example.com/dir/a.jpg?x=1")

    assert joined == str(join_url(base, location))


@pytest.mark.parametrize(
    "location",
    [
        "file:///etc/passwd",
        "gopher://127.0.0.1:6379/_",
        "ftp://example.com/a",
        "data:image/png;base64,AAAA",
        "//good@bad.test/",
        "//[::1/",
        "//127.1/",
        "https://example.com:22/",
        "\\\\bad.test\\a",
        "/\\bad.test/a",
        "ht\ntp://bad.test/",
        "ht\ntps://bad.test/",
        "/a\tb",
        "\thttp://bad.test/",
        "/a b",
        "/" + "a" * MAX_URL_CHARS,
    ],
)
def test_redirect_elsewhere_is_refused(location: str) -> None:
    catch(BadUrlError, join_url, parse_url("https://example.com/a"), location)


hosts = st.from_regex(r"(?:[a-zA-Z0-9_-]{1,8}\.){0,3}[a-zA-Z0-9-]{1,8}\.?", fullmatch=True) | (
    st.ip_addresses(v=4).map(str) | st.ip_addresses(v=6).map("[{}]".format)
)
urls = st.builds(
    "{}://{}{}/{}".format,
    st.sampled_from(["http", "https", "HTTP"]),
    hosts | st.text(min_size=1, max_size=12),
    st.sampled_from(["", ":80", ":443", ":"]),
    st.text(max_size=30),
)


@given(urls | st.text(max_size=60).map("https://{}".format))
def test_normal_form_is_its_own_normal_form(written: str) -> None:
    try:
        url = parse_url(written)
    except BadUrlError:
        return

    assert url == parse_url(str(url))


@given(urls | st.text(max_size=60).map("https://{}".format))
def test_another_parser_reads_the_same_host_in_the_normal_form(written: str) -> None:
    try:
        url = parse_url(written)
    except BadUrlError:
        return
    other = urlsplit(str(url))

    assert (url.scheme, url.host) == (other.scheme, other.hostname)
    assert url.port == (other.port or {"http": 80, "https": 443}[other.scheme])
    assert (None, "") == (other.username, other.fragment)
    assert str(url).isascii()


@given(st.text(alphabet=st.characters(max_codepoint=0x250), max_size=40))
def test_whatever_a_redirect_says_it_ends_in_a_url_or_in_our_error(location: str) -> None:
    base = parse_url("https://example.com/a")
    try:
        url = join_url(base, location)
    except BadUrlError:
        return

    assert url == parse_url(str(url))
