"""A fake OpenAI-compatible server on 127.0.0.1 that misbehaves on demand: python tests/stub.py

Prints its base URL. The path of a request says what happens to it: /AFTER/MODE/v1/… answers the first
AFTER chat requests well and the others in MODE: ok, slow (2 s), minute (60 s), 500, garbage (not JSON), shape (JSON
of no use), words (a label that is none), hang (no answer at all, to anything), drop (closes the
connection), long (refused: over the context). The key is `secret`, the model `gold`; label = length
of the prompt mod 10.
"""

import asyncio
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

asked: Counter[str] = Counter()


def reply(status: str, body: bytes, kind: str = "application/json") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def chat(content: str, finish: str = "stop") -> bytes:
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": content, "reasoning": "Because."}}
    return reply("200 OK", json.dumps({"id": "x", "object": "chat.completion", "created": 0, "model": "gold", "choices": [choice]}).encode())


async def answer(path: str, authorised: bool, body: bytes) -> bytes | None:
    """The reply to one request; None closes the connection."""
    _, after, mode, *rest = path.split("/")
    key = f"{after}/{mode}"
    broken = asked[key] >= int(after)
    if mode == "hang" and broken:
        await asyncio.sleep(3600)
    if not authorised:
        return reply("401 Unauthorized", b'{"error": {"message": "wrong key"}}')
    if rest[-1] == "models":
        return reply("200 OK", b'{"object": "list", "data": [{"id": "gold", "object": "model", "created": 0, "owned_by": "x"}]}')
    asked[key] += 1
    label = str(len(json.loads(body)["messages"][-1]["content"]) % 10)
    if not broken or mode == "ok":
        return chat(label)
    match mode:
        case "slow" | "minute":
            await asyncio.sleep(2 if mode == "slow" else 60)
            return chat(label)
        case "500":
            return reply("500 Internal Server Error", b'{"error": {"message": "engine died"}}')
        case "garbage":
            return reply("200 OK", b"\x00\xff not json {", "text/html")
        case "shape":
            return reply("200 OK", b'{"choices": [{"message": 3}]}')
        case "words":
            return chat("nine")
        case "long":
            return reply("400 Bad Request", b'{"error": {"message": "maximum context length is 10 tokens"}}')
    return None  # drop


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while head := await reader.readuntil(b"\r\n\r\n"):
            lines = head.decode("latin-1").split("\r\n")
            headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in lines[1:] if ": " in line)}
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            text = await answer(lines[0].split()[1], headers.get("authorization") == "Bearer secret", body)
            if text is None:
                break
            writer.write(text)
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    writer.close()


async def main() -> None:
    server = await asyncio.start_server(serve, "127.0.0.1", 0, backlog=1024)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


@contextmanager
def stub() -> Iterator[str]:
    """The base URL of a running stub."""
    process = subprocess.Popen([sys.executable, str(Path(__file__))], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    asyncio.run(main())
