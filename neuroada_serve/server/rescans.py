"""Rescans of the adapter directory, one at a time."""

import asyncio

from neuroada_serve.adapters.directory import Rescan
from neuroada_serve.server.engine_thread import Adapters
from neuroada_serve.server.turns import in_daemon_thread


class Rescans:
    """Run rescans on request, one at a time; use on the event loop only.

    Everyone who asks during a rescan shares the next one, which sees all changes made so far.
    """

    def __init__(self, adapters: Adapters) -> None:
        self._adapters = adapters
        self._running: asyncio.Task[Rescan] | None = None
        self._next: asyncio.Task[Rescan] | None = None

    @property
    def is_pending(self) -> bool:
        """True if a rescan is about to begin, which sees all changes made so far."""
        return self._next is not None

    async def join(self) -> Rescan:
        """Return the result of a rescan that begins after this call.

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


def summary(found: Rescan) -> str:
    """Describe the result of a rescan in one line."""
    changes = ("added", found.added), ("replaced", found.replaced), ("removed", found.removed)
    said = [f"{what} {', '.join(names)}" for what, names in changes if names]
    said += [f"not served: {error}" for error in found.failed.values()]
    return "; ".join(said) or "nothing has changed"
