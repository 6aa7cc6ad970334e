#!/usr/bin/env python3
"""`qwen-nb serve` with many clients for minutes: is anything lost, and does its memory grow?

    python benchmarks/soak.py                          # 200 clients, five minutes
    python benchmarks/soak.py --seconds 60 --clients 50

The server is a process of its own, on a free port of the loopback address. Each client asks again
and again: in one piece or as a stream, with a question whose answer is known, nonsense that must be
refused with 4xx, or a long text from which it hangs up in the middle. Every answer is compared with
what the model says without a server. It ends by itself; status 1 if anything was lost.
"""

import argparse
import asyncio
import json
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter

PLACES = "attic", "garden", "kitchen", "cellar", "hall", "yard"
NONSENSE = b"{", b"[]", b"{}", b'{"messages": "Hi"}', b'{"max_tokens": "x"}', b"\xff"
LONG = json.dumps(dict(prompt="Max", max_tokens=300, temperature=2, stream=True)).encode()
TEXT, CHAT = "/v1/completions", "/v1/chat/completions"


def question(place):
    words = f"Max is in the {place}. Anna is in the street. Where is Max?"
    return [dict(role="user", content=words)]


def known_answers():
    "What the model answers without a server."
    import torch

    from qwen_nb.chat import Chat
    from qwen_nb.model import Qwen
    from qwen_nb.tokenizer import Tokenizer

    model, tokenizer = Qwen.from_pretrained(dtype=torch.float32), Tokenizer.from_pretrained()
    answers = {}
    for place in PLACES:
        chat = Chat(model, tokenizer)
        list(chat.say(question(place)[0]["content"]))
        answers[place] = chat.messages[-1]["content"]
    return answers


def start_server(max_rows):
    "The process, and the port at which it answers."
    code = "from qwen_nb.cli import main; main()"
    options = ["serve", "--port", "0", "--dtype", "float32", "--max-rows", str(max_rows)]
    command = [sys.executable, "-c", code, *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    line = process.stderr.readline()
    found = re.search(r"http://127\.0\.0\.1:(\d+)/", line)
    if not found:
        sys.exit(f"the server does not answer: {line}")
    return process, int(found[1])


def resident(pid):
    "Megabytes of memory that a process holds; 0 where there is no /proc."
    try:
        with open(f"/proc/{pid}/status", encoding="ascii") as f:
            return int(re.search(r"VmRSS:\s+(\d+)", f.read())[1]) / 1024
    except OSError:
        return 0.0


async def send(port, path, body):
    "A connection on which a request was sent: (reader, writer)."
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    await writer.drain()
    return reader, writer


async def ask(port, path, body):
    "(status, body) of an answer, read to its end."
    reader, writer = await send(port, path, body)
    try:
        head, _, rest = (await reader.read()).partition(b"\r\n\r\n")
        return int(head[9:12] or 0), rest
    finally:
        writer.close()


async def hang_up(port):
    "Read the beginning of a long stream, and leave."
    reader, writer = await send(port, TEXT, LONG)
    await reader.read(400)
    writer.close()


def said(data, stream):
    "The answer's text in a body."
    if not stream:
        return json.loads(data)["choices"][0]["message"]["content"]
    if b"data: [DONE]" not in data:
        return "a stream without an end"
    events = re.findall(rb"data: (\{.+\})\n", data)
    deltas = [json.loads(one)["choices"][0]["delta"] for one in events]
    return "".join(delta.get("content") or "" for delta in deltas)


async def client(port, number, end, answers, count):
    "Ask until it is time to stop."
    draw = random.Random(number)
    while time.monotonic() < end:
        kind = draw.choices(("whole", "stream", "nonsense", "hangs up"), (4, 4, 1, 1))[0]
        try:
            if kind == "hangs up":
                await hang_up(port)
            elif kind == "nonsense":
                status, body = await ask(port, CHAT, draw.choice(NONSENSE))
                if not 400 <= status < 500 or not json.loads(body)["error"]["message"]:
                    raise ValueError(f"nonsense was answered {status}: {body[:200]}")
            else:
                place = draw.choice(PLACES)
                asked = dict(messages=question(place), stream=kind == "stream")
                status, body = await ask(port, CHAT, json.dumps(asked).encode())
                text = said(body, kind == "stream") if status == 200 else body[:200]
                if text != answers[place]:
                    raise ValueError(f"{status}: {text!r}, expected {answers[place]!r}")
            count[kind] += 1
        except Exception as e:
            count["LOST"] += 1
            if count["LOST"] <= 5:
                print(f"client {number}, {kind}: {type(e).__name__}: {e}", file=sys.stderr)
                await asyncio.sleep(0.1)


async def health(port):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    found = json.loads((await reader.read()).partition(b"\r\n\r\n")[2])
    writer.close()
    return found


async def watch(port, pid, begun, end, count, memory):
    "A line now and then: what is done, and the memory."
    every = max(1, (end - begun) / 10)
    while time.monotonic() < end:
        await asyncio.sleep(every)
        memory.append(resident(pid))
        done = ", ".join(f"{n:,} {kind}" for kind, n in sorted(count.items()))
        print(f"{time.monotonic() - begun:4.0f} s  {memory[-1]:6.0f} MB  {done}", flush=True)


async def soak(port, pid, args, answers):
    "All clients at once, until the end. (counts, memory over time, the engine's counts at the end)"
    count, memory, begun = Counter(), [], time.monotonic()
    end = begun + args.seconds
    clients = [client(port, n, end, answers, count) for n in range(args.clients)]
    watching = asyncio.create_task(watch(port, pid, begun, end, count, memory))
    await asyncio.wait_for(asyncio.gather(*clients), args.seconds + 120)
    await watching
    for _ in range(100):  # those that hung up last
        left = await health(port)
        if not left["running"] and not left["waiting"]:
            break
        await asyncio.sleep(0.1)
    return count, memory, left


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--max-rows", type=int, default=32)
    args = parser.parse_args()

    answers = known_answers()
    process, port = start_server(args.max_rows)
    try:
        count, memory, left = asyncio.run(soak(port, process.pid, args, answers))
    finally:
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=60)[1]

    growth = memory[-1] - memory[len(memory) // 3]
    print(f"{args.clients} clients, {args.seconds:.0f} s")
    print(f"requests       {sum(count.values()):,}, of these lost: {count['LOST']}")
    print(f"memory         {memory[-1]:.0f} MB, {growth:+.0f} MB in the last two thirds")
    print(f"engine         {left['tokens_written']:,} tokens; at the end {left['running']} run, "
          f"{left['waiting']} wait")
    print(f"the server     ended with status {process.returncode}, saying {rest.strip()!r}")
    fine = not count["LOST"] and not left["running"] and not left["waiting"]
    return 0 if fine and process.returncode == 0 and "Traceback" not in rest else 1


if __name__ == "__main__":
    sys.exit(main())
