"""
A server of pictures on loopback, to fetch from: `python -m bench.loopback FOLDER`.

A process of its own, so that it has a core of its own where there are two. It prints its port, answers
every GET with the file of that name, and ends when its standard input does.
"""

import asyncio
import sys
from collections.abc import Mapping
from pathlib import Path


async def serve(files: Mapping[str, bytes]) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except (asyncio.IncompleteReadError, ConnectionError):
                break
            body = files[head.split(b" ")[1].decode().lstrip("/")]
            about = f"Content-Type: image/jpeg\r\nContent-Length: {len(body)}"
            writer.write(f"HTTP/1.1 200 OK\r\n{about}\r\n\r\n".encode() + body)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(serve({path.name: path.read_bytes() for path in Path(sys.argv[1]).iterdir()}))
