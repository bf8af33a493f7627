"""Looks at the adapter directory again, one at a time, however often it is asked for."""

import asyncio

from neuroada_serve.adapters.directory import Rescan
from neuroada_serve.server.threads import in_daemon_thread
from neuroada_serve.server.worker import Adapters


class Rescans:
    """Whoever asks while one runs gets the next, which sees what has changed by now; all who wait
    get the same. Of the event loop."""

    def __init__(self, adapters: Adapters) -> None:
        self._adapters = adapters
        self._running: asyncio.Task[Rescan] | None = None
        self._next: asyncio.Task[Rescan] | None = None

    @property
    def is_pending(self) -> bool:
        """Whether one will begin, and so see all that is there now."""
        return self._next is not None

    async def join(self) -> Rescan:
        """The result of one that begins from here on.

        Raises:
            UsageError, OSError: as `Adapters.rescan`.
        """
        if self._next is None:
            self._next = asyncio.create_task(self._run(self._running))
        return await asyncio.shield(self._next)

    async def _run(self, before: asyncio.Task[Rescan] | None) -> Rescan:
        if before is not None:
            await asyncio.wait([before])
        self._running, self._next = self._next, None
        return await in_daemon_thread(self._adapters.rescan, "rescan")


def told(found: Rescan) -> str:
    """What came of it, in words."""
    changes = ("added", found.added), ("replaced", found.replaced), ("removed", found.removed)
    said = [f"{what} {', '.join(names)}" for what, names in changes if names]
    said += [f"not served: {error}" for error in found.failed.values()]
    return "; ".join(said) or "nothing has changed"
