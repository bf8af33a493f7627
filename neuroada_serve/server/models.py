"""Names that requests may give as `model`, and what one is told whose name is none of them."""

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
    """The base under its names, and the adapters.

    Raises:
        AdapterConflictError: an adapter has one of the base's names.
    """

    def __init__(self, worker: Worker, config: ServerConfig) -> None:
        self._worker = worker
        self.base_names = config.served_model_name or (worker.base.spec.name,)
        self._started = int(time.time())
        worker.adapters.reserve(self.base_names)

    def shown(self, adapter: str | None) -> str:
        """The model's name in an answer."""
        return self.base_names[0] if adapter is None else adapter

    def is_reserved(self, name: str) -> bool:
        """Whether no adapter may have this name."""
        return name in self.base_names or name == self._worker.base.spec.name

    def base_card(self, name: str) -> dict[str, Any]:
        """The base under one of its names, as /v1/models describes it."""
        return self._card(name, self._started, parent=None)

    def adapter_card(self, name: str, since: int) -> dict[str, Any]:
        """An adapter that is served since then, in Unix seconds, as /v1/models describes it."""
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
        """The adapter, or mix, that `model` names; None, and only None or a name of the base, is
        the base.

        Raises:
            Failure: 404; it lists the names that there are, or those nearest.
        """
        if model is None or model in self.base_names:
            return None
        try:
            self._worker.adapters.check_model(model)
        except AdapterNotFoundError:
            raise self._unknown(model, "does not exist") from None
        except AdapterError as error:  # it looks like a mix, and is none
            raise self._unknown(model, f"does not exist: {error}") from None
        return model

    def _unknown(self, model: str, why: str) -> Failure:
        names = [*self.base_names, *sorted(self._worker.adapters.names)]
        if len(names) <= _MOST_LISTED:
            known = f"Available: {', '.join(names)}."
        else:
            near = ", ".join(_nearest(model, names))
            known = f"{f'Nearest: {near}. ' if near else ''}/v1/models lists all {len(names)}."
        message = f"The model {model[:256]!r} {why}. {known}"
        return Failure(404, message, "model", code="model_not_found")


def _nearest(model: str, names: list[str]) -> list[str]:
    """A few names that may have been meant. Bounded work: there may be thousands."""
    alike = [
        n for n in names if n[:1].lower() == model[:1].lower() and abs(len(n) - len(model)) < 9
    ]
    return difflib.get_close_matches(model, alike[:_MOST_COMPARED], _MOST_SUGGESTED)
