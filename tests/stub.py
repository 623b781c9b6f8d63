"""An OpenAI-compatible server on 127.0.0.1 that misbehaves on demand: `with stub() as url`.

The path of a request says what happens to it: URL/AFTER/MODE/v1/… answers the first AFTER chat requests well
and the others in MODE; URL/AFTER/3-MODE/v1/… only those of the others that are about Question 3. The key is
`secret`, the model `gold`; its label is the length of the prompt mod 10, of two answers the first; to an
instruction of 05_instructions.jsonl it knows the right answer (9, else 0), so that it passes as gold.
"""

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PLAIN = Path(__file__).parents[1] / "05_instructions.jsonl"
KNOWN = {row["instruction"]: row["output"] for row in map(json.loads, PLAIN.read_text().splitlines())}

REFUSES = {
    "max_tokens": "Unsupported parameter: 'max_tokens' is not supported. Use 'max_completion_tokens'.",
    "temperature": "Unsupported value: 'temperature' does not support 0.0. Only 1 is supported.",
    "reasoning_effort": "Extra inputs are not permitted: reasoning_effort",
}
TAKES_NO = {"names": ("max_tokens", "temperature"), "cool": ("temperature",), "plain": tuple(REFUSES)}
PARTS = [
    {"type": "thinking", "thinking": [{"type": "text", "text": "Well"}]},
    {"type": "thinking", "thinking": ", well."},
    {"type": "text", "text": "4"},
    {"type": "text", "text": " "},
]
BODIES = {  # answers of status 200 that are none, and one that is
    "html": "<html>Please log in</html>",
    "half": '{"choices": [{"index": 0, "mess',
    "nothing": "",
    "null": {"choices": None},
    "empty": {"choices": []},
    "no-message": {"choices": [{"index": 0, "finish_reason": "stop"}]},
    "null-message": {"choices": [{"index": 0, "message": None}]},
    "no-choices": {"error": "busy"},
    "list": [1],
    "number": {"choices": [{"index": 0, "message": {"content": 7}}]},
    "parts": {"choices": [{"index": 0, "message": {"content": PARTS}, "finish_reason": "eos_token"}]},
}


ENDS = {"eos": "eos_token", "null-stop": None}  # other words for stop, and none


def chat(content: str, finish: str | None = "stop") -> Any:
    message = {"role": "assistant", "content": content, "reasoning": "Because."}
    choice = {"index": 0, "finish_reason": finish, "message": message}
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "gold", "choices": [choice]}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        _, _, mode, *_ = self.path.removeprefix("http://model.invalid").split("/")
        models = {
            "object": "list",
            "data": [{"id": "gold", "object": "model", "created": 0, "owned_by": "x"}],
        }
        self.reply(*{"down": (500, {}), "no-models": (404, {})}.get(mode, (200, models)))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        _, after, mode, *_ = self.path.removeprefix("http://model.invalid").split("/")  # as a proxy gets it
        text = body["messages"][-1]["content"] if body.get("messages") else ""
        with self.server.lock:
            number = self.server.asked[self.path] = self.server.asked[self.path] + 1
            self.server.bodies.append(body)
        right = [KNOWN[instruction] for instruction in KNOWN if instruction in text]
        label = 9 * (right[0] in text) if right else len(text) % 10
        good = 200, chat("1" if "[answer 1 " in text else str(label))
        if number <= int(after) or (mode.startswith("3-") and "Question 3?" not in text):
            return self.reply(*good)
        mode = mode.removeprefix("3-")
        refused = {"error": {"message": "content filter"}}
        match mode:
            case "minute":
                time.sleep(60)
            case "busy" if number <= int(after) + 3:  # no Retry-After
                return self.reply(429, {"error": {"message": "slow down"}})
            case "poison" if "Question 3?" in text:
                return self.reply(400, refused)
            case "crash" if "Question 3?" in text:
                return self.reply(500, refused)
            case "down" | "refuse" | "gone" | "forbidden":
                codes = {"down": 500, "refuse": 400, "gone": 404, "forbidden": 403}
                return self.reply(codes[mode], refused)
            case "names" | "cool" | "plain" if found := [n for n in TAKES_NO[mode] if n in body]:
                return self.reply(400, {"error": {"message": REFUSES[found[0]]}})
            case "small":  # a limit that is too high is no parameter that is not taken
                says = f"'max_tokens' is too large: {body.get('max_tokens')}. The maximum is 16."
                return self.reply(400, {"error": {"message": says}})
            case "seven":
                return self.reply(200, chat("7"))
            case "random":
                return self.reply(200, chat(str(random.Random(text).randrange(10))))
            case "words" | "cut":
                return self.reply(200, chat("nine", "length" if mode == "cut" else "stop"))
            case "eos" | "null-stop":
                return self.reply(200, chat(good[1]["choices"][0]["message"]["content"], ENDS[mode]))
            case _ if mode in BODIES:
                return self.reply(200, BODIES[mode])
            case "short":  # the connection is cut in the middle of the body
                head = b"HTTP/1.1 200 X\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n"
                self.wfile.write(head + b'{"choices": [')
                self.close_connection = True
                return None
            case "drop":
                self.close_connection = True
                return None
        return self.reply(*good)

    def reply(self, status: int, value: Any) -> None:
        if self.headers["Authorization"] != "Bearer secret":
            status, value = 401, {"error": {"message": "wrong key"}}
        data = value.encode() if isinstance(value, str) else json.dumps(value).encode()
        kind = "text/html" if isinstance(value, str) else "application/json"
        head = f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nContent-Length: {len(data)}\r\n\r\n"
        self.wfile.write(head.encode() + data)  # in one piece: two would wait for each other

    def log_message(self, *_: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256  # with 5, the default, a busy machine loses some of 64 connections at once


@contextmanager
def stub(bodies: list[Any] | None = None) -> Iterator[str]:
    """The base URL of a running stub; `bodies` receives the chat requests."""
    server: Any = Server(("127.0.0.1", 0), Handler)
    server.lock, server.asked = threading.Lock(), Counter()
    server.bodies = [] if bodies is None else bodies
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
