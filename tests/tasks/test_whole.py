"""The bundled model through real workers says what it says by itself."""

import base64
import io
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from engine.request import SamplingParams
from storage import items
from tasks.config import Config
from tasks.dispatch import Dispatcher
from tasks.engines import EngineOptions, Prompt, load_engine
from tasks.stores import Stores
from tasks.submit import parse_submission, submit
from tests.tasks.fakes import MODEL, build_request
from tests.tasks.processes import open_fleet, wait_until
from tests.tasks.test_worker import is_over, settings_of, stop

PROMPT = "Describe this image."


def build_url(number: int) -> str:
    image = Image.new("RGB", (64 + 8 * (number % 5), 64), "white")
    colour = ("red", "blue", "green")[number % 3]
    ImageDraw.Draw(image).ellipse((10, 10, 50, 50), fill=colour)
    encoded = io.BytesIO()
    image.save(encoded, "PNG")
    return f"data:image/png;base64,{base64.b64encode(encoded.getvalue()).decode()}"


@pytest.mark.services
def test_bundled_model_gives_the_same_texts_through_the_service_as_by_itself(
    tmp_path: Path, stores: Stores, config: Config, broker: str
) -> None:
    conversations = [
        [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": build_url(number)}},
                    {"type": "text", "text": PROMPT},
                ],
            }
        ]
        for number in range(24)
    ]
    engine = load_engine(EngineOptions(MODEL, device="cpu"))
    params = SamplingParams(temperature=0.0, max_tokens=24)
    prompts = [Prompt(str(n), one, params) for n, one in enumerate(conversations)]
    alone = {int(result.request_id): result.outputs[0].text for result in engine.stream(prompts)}
    engine.close()

    with open_fleet(tmp_path, **settings_of(config, broker)) as fleet:
        fleet.start("worker", "--cpu", module="tests.tasks.command")
        fleet.start("worker", "--model", MODEL, "--device", "cpu", module="tests.tasks.command")
        requests = [
            build_request(f"r-{n}", messages=one, temperature=0, max_tokens=24)
            for n, one in enumerate(conversations)
        ]
        dispatcher = Dispatcher(config, broker)
        job = submit(stores, dispatcher, parse_submission({"requests": requests})).job.id
        dispatcher.close()
        wait_until(lambda: is_over(stores, job), fleet, timeout_s=120)
        codes = stop(fleet)

    with stores.database.read() as session:
        ended = items.list_by_line(session, job)
    assert [0, 0] == codes
    assert [alone[number] for number in range(24)] == [one.text for one in ended]
    details = ended[0].details or {}
    assert "darkroom-tiny" in details["stamp"]["model"]
    assert (1, 64, 64) == (
        len(details["images"]),
        details["images"][0]["width"],
        details["images"][0]["height"],
    )


def test_worker_without_a_model_says_what_to_give() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "tests.tasks.command", "worker"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )

    assert 2 == run.returncode
    assert "--cpu" in run.stderr
