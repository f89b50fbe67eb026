"""A stand-in for kube-proxy: forwards new connections to agents that are ready, leaves old ones where they are.

DELAY_S HTTP_PORT:ADMIN_PORT...; prints its own port. It asks each agent's /ready, as the kubelet does, and acts on the
answer DELAY_S later, as nodes do that learn of a change through the API server. Ends and resets of either side reach
the other as what they are.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
import struct
import sys

HOST = "127.0.0.1"
POLL_S = 0.1


async def is_ready(port: int) -> bool:
    try:
        reader, writer = await asyncio.open_connection(HOST, port)
        writer.write(f"GET /ready HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n\r\n".encode())
        answer = await reader.read()
        writer.close()
    except OSError:
        return False
    return answer.startswith(b"HTTP/1.1 200")


def reset(writer: asyncio.StreamWriter) -> None:
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One direction of a connection."""
    try:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
        writer.write_eof()
    except OSError:
        reset(writer)


async def main(delay_s: float, agents: list[tuple[int, int]]) -> None:
    loop, turns = asyncio.get_running_loop(), itertools.count()
    endpoints: list[int] = []
    all_ready = asyncio.Event()

    def update(ready: list[int]) -> None:
        endpoints[:] = ready
        if len(ready) == len(agents):
            all_ready.set()

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            chosen = endpoints[next(turns) % len(endpoints)]
            back, there = await asyncio.open_connection(HOST, chosen)
        except (OSError, ZeroDivisionError):
            reset(writer)
            return
        await asyncio.gather(copy(reader, there), copy(back, writer))
        writer.close()
        there.close()

    async def watch() -> None:
        while True:
            ready = [http for http, admin in agents if await is_ready(admin)]
            loop.call_later(delay_s, update, ready)
            await asyncio.sleep(POLL_S)

    server = await asyncio.start_server(forward, HOST, 0)
    watching = asyncio.create_task(watch())
    await all_ready.wait()
    print(server.sockets[0].getsockname()[1], flush=True)
    await watching


if __name__ == "__main__":
    ports = [tuple(map(int, one.split(":"))) for one in sys.argv[2:]]
    asyncio.run(main(float(sys.argv[1]), [(http, admin) for http, admin in ports]))
