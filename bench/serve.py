"""The model server under load, and `transformers serve` on the same model beside it.

Many clients ask questions at once, each the next one as soon as it has its answer, greedily, for some seconds. Before,
every question was asked alone: an answer that differs from that one is counted, and so is every request that failed.
Prints one JSON object per run: tokens/s of answers, p50 and p95 of the seconds that a request took, memory at the
beginning and at the end. Clients and server share the machine.
"""

import argparse
import http.client
import itertools
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from llmops.console import UserError, log, run_main

TOKEN = "token-of-the-benchmark"
TOPICS = ("the sea", "bread", "a bicycle", "winter", "chess", "a library", "rain", "the moon", "trains", "glass",
          "salt", "a garden", "maps", "clocks", "paper", "coffee")  # fmt: skip
FORMS = ("Tell me something about {}.", "Write two sentences about {}.", "What is {} good for?",
         "Explain {} to a child, please, in simple words.")  # fmt: skip
QUESTIONS = [form.format(topic) for form in FORMS for topic in TOPICS]


@contextmanager
def server(command: Sequence[str], port: int, path: str) -> Iterator[psutil.Process]:
    """A server that answers at `path`, until the block ends."""
    environment = os.environ | {"LLMOPS_TOKEN": TOKEN, "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    said: list[str] = []
    threading.Thread(target=said.extend, args=(process.stderr,), daemon=True).start()
    try:
        for _ in range(600):
            if process.poll() is not None:
                raise SystemExit("".join(said))
            try:
                if ask(port, "GET", path)[0] == 200:
                    break
            except OSError:
                pass
            time.sleep(0.2)
        yield psutil.Process(process.pid)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


KEPT = threading.local()  # each client's connection


def ask(port: int, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    """(status, JSON body) of a request on this client's connection."""
    kept: dict[int, http.client.HTTPConnection] = KEPT.__dict__.setdefault("ports", {})
    connection = kept.setdefault(port, http.client.HTTPConnection("127.0.0.1", port, timeout=600))
    headers = {"authorization": f"Bearer {TOKEN}", "content-type": "application/json"}
    for attempt in (1, 2):  # a server may close a connection that was idle
        try:
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        except OSError as error:
            connection.close()
            if attempt == 2 or isinstance(error, ConnectionRefusedError):
                raise
    raise AssertionError


def chat(port: int, model: str, question: str, tokens: int) -> tuple[int, str, int]:
    """(status, answer, its tokens)."""
    asked = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": tokens,
    }
    status, found = ask(port, "POST", "/v1/chat/completions", asked)
    if status != 200:
        return status, json.dumps(found), 0
    return status, found["choices"][0]["message"]["content"], found["usage"]["completion_tokens"]


def load(clients: int, seconds: float, work: Any) -> dict[str, Any]:
    """Many clients for some seconds; `work(number)` does one request and gives (good, right, units)."""
    numbers, lock = itertools.count(), threading.Lock()
    times: list[float] = []
    sums = [0, 0, 0]  # failed, different, units
    began = time.monotonic()

    def client() -> None:
        while time.monotonic() - began < seconds:
            started = time.monotonic()
            good, right, units = work(next(numbers))
            with lock:
                times.append(time.monotonic() - started)
                sums[0] += not good
                sums[1] += good and not right
                sums[2] += units

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    passed = time.monotonic() - began
    times.sort()
    return {
        "clients": clients, "seconds": round(passed, 1), "requests": len(times), "failed": sums[0],
        "different": sums[1], "per_second": round(sums[2] / passed, 1), "p50": round(times[len(times) // 2], 3),
        "p95": round(times[len(times) * 95 // 100], 3),
    }  # fmt: skip


def chat_load(
    port: int, model: str, clients: int, options: argparse.Namespace, alone: dict[str, str]
) -> dict[str, Any]:
    """Chats under load; `alone` gets the answers to single questions, where they are not known yet."""
    for question in QUESTIONS[: options.questions]:
        if question not in alone:
            alone[question] = chat(port, model, question, options.tokens)[1]

    def work(number: int) -> tuple[bool, bool, int]:
        question = QUESTIONS[number % options.questions]
        status, text, tokens = chat(port, model, question, options.tokens)
        return status == 200, text == alone[question], tokens

    return load(clients, options.seconds, work)


def ours(options: argparse.Namespace) -> None:
    """Our server: many clients, and as many as the other gets."""
    port = free_port()
    command = [sys.executable, str(HERE.parent / "serve" / "serve.py"), "--port", str(port), "--model_name_or_path",
               options.model, "--mount_path", str(options.work)]  # fmt: skip
    with server(command, port, "/health") as process:
        model = ask(port, "GET", "/v1/models")[1]["data"][0]
        alone: dict[str, str] = {}
        counts = [1, options.peer_clients, options.clients] if options.what in ("all", "chats") else []
        for clients in dict.fromkeys(counts):
            before = process.memory_info().rss
            found = chat_load(port, model["id"], clients, options, alone)
            memory = {"memory_before_mb": before >> 20, "memory_mb": process.memory_info().rss >> 20}
            print(json.dumps({"server": "ours", "unit": "tokens/s"} | found | memory), flush=True)
        if "intents" in model and options.what in ("all", "intents"):
            intents(port, options)
        elif options.what == "intents":
            raise UserError(f"{options.model} has no intents.json: take a model of the FAQ scenario")


def intents(port: int, options: argparse.Namespace) -> None:
    """Questions for intents, one a request: one client, then 32."""
    alone: dict[str, Any] = {}

    def work(number: int) -> tuple[bool, bool, int]:
        question = QUESTIONS[number % options.questions]
        status, found = ask(port, "POST", "/v1/intents", {"questions": [question]})
        intent = found["data"][0]["intent"] if status == 200 else ""
        return status == 200, alone.setdefault(question, intent) == intent, 1

    for clients in (1, 32):
        found = load(clients, options.seconds, work)
        print(json.dumps({"server": "ours", "unit": "intent questions/s"} | found), flush=True)


def peer(options: argparse.Namespace) -> None:
    """`transformers serve`: one request at a time, or with its continuous batching."""
    program = str(Path(options.peer_python).with_name("transformers"))
    ways = {"single": "--no-continuous-batching", "continuous": "--continuous-batching"}
    for batching in (ways[name] for name in options.peer_batching):
        port = free_port()
        command = [
            program,
            "serve",
            options.model,
            "--port",
            str(port),
            "--dtype",
            "float32",
            "--device",
            "cpu",
            batching,
        ]
        with server(command, port, "/health"):
            try:
                found = chat_load(port, options.model, options.peer_clients, options, {})
            except (OSError, http.client.HTTPException) as error:
                found = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps({"server": f"transformers serve {batching}", "unit": "tokens/s"} | found), flush=True)


def free_port() -> int:
    """A port on which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def main() -> int:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of a chat model")
    parser.add_argument("--work", type=Path, default=HERE / ".work" / "serve")
    parser.add_argument("--what", choices=["all", "chats", "intents", "peer"], default="all")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--peer_clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--questions", type=int, default=64, help="how many different ones")
    parser.add_argument("--peer_batching", nargs="+", choices=["single", "continuous"], default=["single"])
    parser.add_argument("--peer_python", default="", help="a Python with transformers[serving]; empty: without it")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    load_now = os.getloadavg()[0]
    log(f"load of the machine before: {load_now:.1f}, {os.cpu_count()} cores")
    if options.what != "peer":
        ours(options)
    if options.peer_python and options.what in ("all", "peer"):
        peer(options)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
