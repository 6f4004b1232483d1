"""A folder over http with a delay, for plain requests and as a bucket: `python -m tests.benchmarks.far_server FOLDER`.

A file `NAME/PATH` below the folder lies at `/NAME/PATH`, which is also where an S3 client looks for the object PATH of
the bucket NAME when it is given this server as its endpoint. Every answer waits, and on a new connection twice as long,
as a far server's would; nothing else is slowed down. Keys are not looked at.
"""

from __future__ import annotations

import argparse
import asyncio
import weakref
from pathlib import Path

from aiohttp import web

_MISSING = '<?xml version="1.0" encoding="UTF-8"?><Error><Code>NoSuchKey</Code><Message>no such key</Message></Error>'


def application(folder: Path, delay_seconds: float) -> web.Application:
    """The server."""
    known: weakref.WeakSet[asyncio.BaseTransport] = weakref.WeakSet()

    async def answer(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        await asyncio.sleep(delay_seconds * (1 if request.transport in known else 2))
        known.add(request.transport)
        path = folder / request.match_info["path"]
        if not path.is_file():
            return web.Response(status=404, text=_MISSING, content_type="application/xml")
        return web.FileResponse(path, chunk_size=1 << 20)

    made = web.Application()
    made.router.add_get("/{path:.*}", answer)
    return made


async def serve(folder: Path, delay_seconds: float) -> None:
    """Serve until killed; the first line of the output is the port."""
    runner = web.AppRunner(application(folder, delay_seconds), access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.Event().wait()


def main() -> None:
    """Serve a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--delay-ms", type=float, default=20)
    arguments = parser.parse_args()
    asyncio.run(serve(arguments.folder, arguments.delay_ms / 1000))


if __name__ == "__main__":
    main()
