"""Hand adapters to a running server while they are still being trained.

The server reads them from a folder under its --adapter-dir, so that must be where training writes:
the same machine, or a shared disk.
"""

import json
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from neuroada_serve.adapters.format import Adapter, save_adapter
from neuroada_serve.errors import UsageError

_TIMEOUT_S = 60.0


class Publisher:
    """Writes adapters to a folder and has a server load each as the new version of one name.

    Args:
        url: of the server, such as http://127.0.0.1:8000.
        folder: what is written; its name is the adapter's.

    Raises:
        UsageError: the url is none, or no server answers there.
    """

    def __init__(self, url: str, folder: Path) -> None:
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
            raise UsageError(f"--publish takes a server's address, http://HOST:PORT, not {url!r}")
        self._url, self._folder = url.rstrip("/"), folder.absolute()
        self._request("/v1/models")

    def __call__(self, adapter: Adapter) -> None:
        """
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

    def _request(self, path: str, body: dict[str, Any] | None = None) -> None:
        data = None if body is None else json.dumps(body).encode()
        request = Request(self._url + path, data, {"Content-Type": "application/json"})
        try:
            with urlopen(request, timeout=_TIMEOUT_S) as answer:
                answer.read()
        except HTTPError as error:
            raise UsageError(f"the server at {self._url} says: {_message(error)}") from error
        except (OSError, HTTPException) as error:
            raise UsageError(
                f"no server of ours answers at {self._url}: {error}; start one with neuroada serve "
                "BASE --adapter-dir FOLDER --allow-runtime-adapters"
            ) from error


def _message(error: HTTPError) -> str:
    """What an error response says, in OpenAI's form or any other."""
    text = error.read().decode(errors="replace")
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{error.code} {text[:500]}"
