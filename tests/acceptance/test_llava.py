"""The server example for LLaVA: a chat template from a file, a question about a picture, an answer."""

from pathlib import Path

import pytest

from engine import LLM, SamplingParams
from tests.acceptance.service import Service
from tests.engine.pictures import data_url, draw
from tests.engine.tiny_llava import write_tiny_llava

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ message['role'] | upper + ': ' + message['content'] + '\n' }}{% endfor %}ASSISTANT:"
)

pytestmark = pytest.mark.services


def test_server_answers_as_the_library_with_a_template_from_a_file(tmp_path: Path) -> None:
    folder = write_tiny_llava(tmp_path / "llava-tiny", seed=4)
    template = tmp_path / "template_llava.jinja"
    template.write_text(TEMPLATE)
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "What is the content of this image?"},
                {"type": "image_url", "image_url": {"url": data_url(draw(3))}},
            ],
        }
    ]
    with LLM(str(folder), chat_template=template) as llm:
        params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
        (expected,) = llm.chat(messages, params, use_tqdm=False)
        without = llm.chat(messages, params, use_tqdm=False, chat_template="{{ bos_token }}x")
    words = ("--served-model-name", "llava", "--chat-template", str(template))
    service = Service(tmp_path, "serve", str(folder), *words)
    try:
        service.wait_for_workers(2)
        answer = service.client.chat.completions.create(
            model="llava",
            messages=messages,  # type: ignore[arg-type]
            temperature=0,
            max_tokens=12,
            extra_body={"ignore_eos": True},
        )
    finally:
        service.end()

    assert expected.error is None
    assert expected.outputs[0].text == answer.choices[0].message.content
    assert without[0].error is not None  # no place for the picture
    assert answer.usage is not None
    assert len(expected.prompt_token_ids or ()) == answer.usage.prompt_tokens
