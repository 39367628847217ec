"""How tests ask servers of this machine: past any proxy, and with patience where it is busy."""

import ssl
from functools import partial
from typing import Final

import httpx2

ANSWER_S: Final = 60.0
TLS: Final = ssl.create_default_context()  # never used, yet each client would read all certificates

get = partial(httpx2.get, timeout=ANSWER_S, verify=TLS, trust_env=False)
post = partial(httpx2.post, timeout=ANSWER_S, verify=TLS, trust_env=False)
