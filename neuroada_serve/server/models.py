"""Names of the base and the adapters, and the 404 for all others."""

import difflib
import time
from typing import Any

from neuroada_serve.config import ServerConfig
from neuroada_serve.errors import AdapterError, AdapterNotFoundError
from neuroada_serve.server.failure import Failure
from neuroada_serve.server.worker import Worker

_MOST_LISTED = 20
_MOST_COMPARED = 100
_MOST_SUGGESTED = 5


class Models:
    """Resolves the `model` of requests to the base or an adapter, and describes both.

    Raises:
        AdapterConflictError: an adapter has one of the base's names.
    """

    def __init__(self, worker: Worker, config: ServerConfig) -> None:
        self._worker = worker
        self.base_names = config.served_model_name or (worker.base.spec.name,)
        self._started = int(time.time())
        worker.adapters.store.reserve(self.base_names)

    def name_of(self, adapter: str | None) -> str:
        """Return the name that answers show: the adapter's, or the base's first."""
        return self.base_names[0] if adapter is None else adapter

    def is_reserved(self, name: str) -> bool:
        """Return whether this name is the base's, so that no adapter may have it."""
        return name in self.base_names or name == self._worker.base.spec.name

    def base_card(self, name: str) -> dict[str, Any]:
        """Describe the base under one of its names, as /v1/models does."""
        return self._card(name, self._started, parent=None)

    def adapter_card(self, name: str, since: int) -> dict[str, Any]:
        """Describe an adapter that is served since a time in Unix seconds, as /v1/models does."""
        return self._card(name, since, parent=self.base_names[0])

    def _card(self, name: str, created: int, parent: str | None) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "neuroada-serve",
            "root": name,
            "parent": parent,
            "max_model_len": self._worker.max_model_len,
        }

    def adapter_of(self, model: str | None) -> str | None:
        """Return the adapter or mix that `model` names; None for the base, also the default.

        Raises:
            Failure: 404, with all names there are, or the nearest.
        """
        if model is None or model in self.base_names:
            return None
        try:
            self._worker.adapters.store.acquire(model).release()
        except AdapterNotFoundError:
            raise self._unknown(model, "does not exist") from None
        except AdapterError as error:  # it looks like a mix, but is not one
            raise self._unknown(model, f"does not exist: {error}") from None
        return model

    def _unknown(self, model: str, why: str) -> Failure:
        names = [*self.base_names, *sorted(self._worker.adapters.store.names)]
        if len(names) <= _MOST_LISTED:
            known = f"Available: {', '.join(names)}."
        else:
            near = ", ".join(_nearest(model, names))
            known = f"{f'Nearest: {near}. ' if near else ''}/v1/models lists all {len(names)}."
        message = f"The model {model[:256]!r} {why}. {known}"
        return Failure(404, message, "model", code="model_not_found")


def _nearest(model: str, names: list[str]) -> list[str]:
    """Return a few names similar to `model`. Bounded work, as there may be thousands of names."""
    alike = [
        n for n in names if n[:1].lower() == model[:1].lower() and abs(len(n) - len(model)) < 9
    ]
    return difflib.get_close_matches(model, alike[:_MOST_COMPARED], _MOST_SUGGESTED)
