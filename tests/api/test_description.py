"""
What /openapi.json promises is asked for by a fuzzer: nothing may crash, or answer otherwise.

A few requests, always the same; DARKROOM_FUZZ_MINUTES=5 goes on for so long on each database, and
elsewhere each time. With `-s` it tells how many it tried.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import asking
from tests.api.conftest import Client, Service

FUZZ_S = round(60 * float(os.environ.get("DARKROOM_FUZZ_MINUTES", "0")))
FEW = ("--phases", "fuzzing", "--max-examples", "8", "--seed", "7")  # the same on any machine
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


def test_description_is_shown_and_names_every_route(service: Service) -> None:
    described = asking.get(f"{service.url}/openapi.json")
    page = asking.get(f"{service.url}/docs")

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
    page = asking.get(f"{service.url}/docs").text
    places = re.findall(r"""(?:src|href|url)\s*[=:]\s*["']([^"']+)""", page)

    assert 3 <= len(places)
    for place in places:
        assert place.startswith("/"), place
        assert 200 == asking.get(service.url + place).status_code


@pytest.mark.timeout(FUZZ_S + 300)
def test_fuzzer_finds_no_crash_and_no_other_answer(
    service: Service, client: Client, tmp_path: Path
) -> None:
    report = tmp_path / "report.txt"
    with report.open("wb") as output, service.worker.working():  # chats wait for their answers
        run = subprocess.run(
            [
                *(sys.executable, "-m", "schemathesis.cli", "run", f"{service.url}/openapi.json"),
                *("--header", f"Authorization: Bearer {client.key}", "--checks", CHECKS),
                *(("--max-time", str(FUZZ_S)) if FUZZ_S else FEW),
                *("--request-timeout", "90", "--no-color"),  # a poll may wait for a minute
            ],
            cwd=tmp_path,  # it keeps what it found in the current folder
            stdout=output,
            stderr=output,
            check=False,
            timeout=FUZZ_S + 200,
        )

    text = report.read_text()
    print(text[text.rfind("SUMMARY") :])  # noqa: T201 - a long run is started for it
    assert "generated" in text
    assert 0 == run.returncode, text[-6000:]
