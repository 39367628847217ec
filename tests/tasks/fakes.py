"""Small classes that fill a room's ports, and submissions to give them."""

from collections.abc import Mapping
from typing import Any

from tasks.app import TaskName
from tasks.config import Config
from tasks.dispatch import Dispatcher

MODEL = "darkroom-tiny"
RED_DOT = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAUAAAAFCAYAAACNbyblAAAAHElEQVQI12P4//8/w38GIAXDIBKE0DHx"
    "gljNBAAO9TXL0Y4OHwAAAABJRU5ErkJggg=="
)


class RecordingDispatcher(Dispatcher):
    """Keeps what would have been sent."""

    def __init__(self, config: Config, broker_url: str) -> None:
        super().__init__(config, broker_url)
        self.sent: list[tuple[TaskName, str, dict[str, Any]]] = []

    def _send(self, name: TaskName, queue: str, arguments: Mapping[str, Any]) -> bool:
        self.sent.append((name, queue, dict(arguments)))
        return True

    def count(self, name: TaskName) -> int:
        return sum(sent == name for sent, _, _ in self.sent)


def build_request(
    custom_id: str, text: str = "What is this?", *, num_images: int = 0, **body: Any
) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"type": "text", "text": text}]
    parts += [{"type": "image_url", "image_url": {"url": RED_DOT}} for _ in range(num_images)]
    content: Any = parts if num_images else text
    return {
        "custom_id": custom_id,
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": MODEL, "messages": [{"role": "user", "content": content}], **body},
    }
