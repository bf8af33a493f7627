"""Hand adapters to a running server.

The server reads them from a folder under its --adapter-dir, so that must be where training writes:
the same machine, or a shared disk.
"""

import json
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote, urlsplit
from urllib.request import Request, urlopen

from neuroada_serve.adapters.format import Adapter, save_adapter
from neuroada_serve.config import ADAPTER_NAME
from neuroada_serve.errors import UsageError

_TIMEOUT_S = 60.0


class Publisher:
    """Writes adapters to a folder and has a server load each as the new version of one name.

    Args:
        url: of the server, such as http://127.0.0.1:8000.
        folder: is written; its name is the adapter's.

    Raises:
        UsageError: the url is none, no server answers there, or it would not load from the folder.
    """

    def __init__(self, url: str, folder: Path) -> None:
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
            raise UsageError(f"--publish takes a server's address, http://HOST:PORT, not {url!r}")
        self._url, self._folder = url.rstrip("/"), folder.absolute()
        self.name = self._folder.name
        if not ADAPTER_NAME.fullmatch(self.name):
            raise UsageError(
                f"--publish serves an adapter under the name of --out's folder, and {self.name!r} "
                "is none: it takes letters, digits and . _ -, at most 63, a letter or digit first"
            )
        models = self._request("/v1/models").get("data", ())
        if any(model["id"] == self.name and model.get("parent") is None for model in models):
            raise UsageError(
                f"--publish: {self.name!r} is the name of the base at {self._url}; give --out "
                "another folder"
            )
        self._check_permission()

    def _check_permission(self) -> None:
        """Ask for a folder that is not there: only a server that may load from beside it answers
        that it is missing."""
        missing = {"lora_name": self.name, "lora_path": str(self._folder / ".not-there")}
        try:
            self._request("/v1/load_lora_adapter", missing)
        except _Refused as refused:
            if refused.param == "lora_path" and refused.status == 404:
                return
            raise UsageError(f"--publish cannot work: {refused}") from refused
        raise UsageError(
            f"--publish: the server at {self._url} loads folders that do not exist; is it "
            "`neuroada serve`?"
        )

    def served_digest(self) -> str | None:
        """Return the digest of the version that is served under the name; None if there is none."""
        try:
            return str(self._request(f"/v1/adapters/{quote(self.name)}")["digest"])
        except _Refused as refused:
            if refused.status == 404:
                return None
            raise

    def __call__(self, adapter: Adapter) -> None:
        """Write an adapter and have the server load it.

        Raises:
            UsageError: the server refuses; says why. The adapter is in its folder all the same.
        """
        save_adapter(adapter, self._folder)
        self._request(
            "/v1/load_lora_adapter",
            {
                "lora_name": self._folder.name,
                "lora_path": str(self._folder),
                "load_inplace": True,
            },
        )

    def _request(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """Send a request and return the JSON object of the answer; {} if it is none."""
        data = None if body is None else json.dumps(body).encode()
        request = Request(self._url + path, data, {"Content-Type": "application/json"})
        try:
            with urlopen(request, timeout=_TIMEOUT_S) as answer:
                text = answer.read()
        except HTTPError as error:
            raise _Refused(self._url, error) from error
        except (OSError, HTTPException) as error:
            raise UsageError(
                f"no `neuroada serve` answers at {self._url}: {error}; start it with neuroada "
                "serve BASE --adapter-dir FOLDER --allow-runtime-adapters"
            ) from error
        try:
            return json.loads(text)
        except ValueError:
            return {}


class Improvements:
    """Publishes an adapter if it scores better than the version served under its name.

    Args:
        served_loss: of the version served now, on the held-out rows; None if there is none.
        notify: called with a sentence for every published adapter, and for failures, after which
            training goes on.
    """

    def __init__(
        self, publisher: Publisher, served_loss: float | None, notify: Callable[[str], None]
    ) -> None:
        self._publisher, self._loss, self._notify = publisher, served_loss, notify

    def publish(self, adapter: Adapter, loss: float, step: int) -> bool:
        """Publish an adapter unless it scores worse; return whether it is what the server serves
        now."""
        if self._loss is not None and loss > self._loss:
            self._notify(
                f"Not published: the held-out loss is {loss:.4f} after step {step}, and "
                f"{self._loss:.4f} with the version that is served."
            )
            return False
        if not publish_or_tell(self._publisher, adapter, step, self._notify):
            return False
        self._loss = loss
        return True


def publish_or_tell(
    publisher: Publisher, adapter: Adapter, step: int, notify: Callable[[str], None]
) -> bool:
    """Publish an adapter and return whether that succeeded; report a server that refuses."""
    try:
        publisher(adapter)
    except UsageError as error:
        notify(f"Not published: {error}.")
        return False
    notify(f"Published {publisher.name}, step {step}.")
    return True


class _Refused(UsageError):
    """The server answered with another status than 200. param: the field it blames, in OpenAI's
    form."""

    def __init__(self, url: str, error: HTTPError) -> None:
        self.status, self.param = error.code, None
        text = error.read().decode(errors="replace")
        try:
            found = json.loads(text)["error"]
            message, self.param = str(found["message"]), found.get("param")
        except (ValueError, KeyError, TypeError, AttributeError):
            message = f"{error.code} {text[:500]}"
        super().__init__(f"the server at {url} says: {message}")
