"""What /openapi.json promises is asked for by a fuzzer: nothing may crash, or answer otherwise."""

import re
import subprocess
import sys
from pathlib import Path

import httpx2

from tests.api.conftest import Client, Service

FUZZ_S = 8
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


def test_description_is_shown_and_names_every_route(service: Service) -> None:
    described = httpx2.get(f"{service.url}/openapi.json", trust_env=False)
    page = httpx2.get(f"{service.url}/docs", trust_env=False)

    assert 200 == page.status_code
    assert 200 == described.status_code
    assert {
        "/v1/files",
        "/v1/files/{file_id}",
        "/v1/files/{file_id}/content",
        "/v1/batches",
        "/v1/batches/{batch_id}",
        "/v1/batches/{batch_id}/cancel",
        "/v1/batches/{batch_id}/results",
        "/v1/chat/completions",
        "/v1/models",
        "/v1/models/{model_id}",
        "/healthz",
        "/readyz",
        "/metrics",
    } == set(described.json()["paths"])


def test_page_of_the_description_loads_nothing_from_elsewhere(service: Service) -> None:
    page = httpx2.get(f"{service.url}/docs", trust_env=False).text
    places = re.findall(r"""(?:src|href|url)\s*[=:]\s*["']([^"']+)""", page)

    assert 3 <= len(places)
    for place in places:
        assert place.startswith("/"), place
        assert 200 == httpx2.get(service.url + place, trust_env=False).status_code


def test_fuzzer_finds_no_crash_and_no_other_answer(
    service: Service, client: Client, tmp_path: Path
) -> None:
    # Chat is left out: without a worker each of its sound requests waits until its time is over.
    run = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "run", f"{service.url}/openapi.json"),
            *("--header", f"Authorization: Bearer {client.key}", "--checks", CHECKS),
            *("--max-time", str(FUZZ_S), "--seed", "7", "--no-color"),
            *("--exclude-path", "/v1/chat/completions"),
        ],
        cwd=tmp_path,  # it keeps what it found in the current folder
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )

    assert 0 == run.returncode, run.stdout[-6000:]
