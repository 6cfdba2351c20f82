"""A wire between two TCP ends that can fall silent: nothing goes through, and nobody is told."""

import asyncio
import threading
from typing import Self


class Wire:
    """Forwards what comes in on `port` of the loopback to `target`, until it is held.

    A held wire closes nothing and refuses nothing: both ends see a peer that says no more, as behind a firewall that
    drops packets, and what they send lies until the wire is let go.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self._loop = asyncio.new_event_loop()
        self._open = asyncio.Event()
        self._open.set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="wire", daemon=True)
        self._server: asyncio.Server | None = None
        self.port = 0

    def __enter__(self) -> Self:
        self._thread.start()

        async def listen() -> None:
            self._server = await asyncio.start_server(self._carry, "127.0.0.1", 0)
            self.port = self._server.sockets[0].getsockname()[1]

        asyncio.run_coroutine_threadsafe(listen(), self._loop).result()
        return self

    def __exit__(self, *exc: object) -> None:
        async def end() -> None:
            assert self._server is not None
            self._server.close()
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def hold(self) -> None:
        """From now on nothing goes through."""
        self._loop.call_soon_threadsafe(self._open.clear)

    def let_go(self) -> None:
        """What has been sent meanwhile goes through, and all that follows."""
        self._loop.call_soon_threadsafe(self._open.set)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self._target)
        await asyncio.gather(self._pump(reader, back), self._pump(there, writer))

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(1 << 16):
                await self._open.wait()
                sink.write(data)
                await sink.drain()
            await self._open.wait()  # an end that hangs up is not heard through a silent wire either
        except ConnectionError:
            pass
        finally:
            sink.close()
