"""The throughput log, one line per minute."""

import asyncio
import logging
import time
from collections.abc import Callable

from neuroada_serve.server.engine_thread import Engine

logger = logging.getLogger(__name__)


class ThroughputLog:
    """Write what the engine has done since the last line; nothing while it is idle.

    Args:
        clock: returns seconds.
    """

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine = engine
        self._clock = clock
        self._since = clock()
        self._seen = self._totals()
        self._was_busy = False

    async def run(self, period_s: float = 60.0) -> None:
        """Log until cancelled."""
        while True:
            await asyncio.sleep(period_s)
            if (line := self.line()) is not None:
                logger.info(line)

    def line(self) -> str | None:
        """Return the next line; None if the engine was idle and the last line has said so."""
        now, totals = self._clock(), self._totals()
        prompt, cached, generated = (new - old for new, old in zip(totals, self._seen, strict=True))
        elapsed_s = max(now - self._since, 1e-9)
        self._since, self._seen = now, totals
        running, waiting = self._engine.num_running, self._engine.num_waiting
        is_busy = bool(prompt or cached or generated or running or waiting)
        says = is_busy or self._was_busy
        self._was_busy = is_busy
        if not says:
            return None
        adapters = self._engine.adapters.memory()["device"]["adapters"]
        found = cached / (prompt + cached) if prompt + cached else 0.0
        kv = self._engine.metrics.kv
        return (
            f"Prompt throughput: {(prompt + cached) / elapsed_s:.1f} tokens/s, generation "
            f"throughput: {generated / elapsed_s:.1f} tokens/s, running: {running}, waiting: "
            f"{waiting}, prompt tokens from the cache: {found:.1%}, KV cache in use: "
            f"{kv.used / max(kv.blocks, 1):.1%}, adapters on the device: {adapters}"
        )

    def _totals(self) -> tuple[int, int, int]:
        metrics = self._engine.metrics  # another thread counts; a step more or less is no matter
        return metrics.num_prompt_tokens, metrics.num_cached_tokens, metrics.num_output_tokens
