"""Routes that list and change adapters."""

import asyncio
import json
import logging
import os
import shutil
import signal
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from neuroada_serve.adapters.format import CONFIG_FILE
from neuroada_serve.metrics import KVUsage
from tests.support.fake_engine import BASE, SINCE, FakeEngine, digest_of
from tests.support.serving import (
    ENDLESS,
    Client,
    busy,
    error_of,
    events,
    is_listening,
    serve_while,
    serving,
    until,
    wait_for,
)

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]
CHANGES = [
    ("/v1/load_lora_adapter", {"lora_name": "fr", "lora_path": "new"}),
    ("/v1/unload_lora_adapter", {"lora_name": "sql"}),
    ("/v1/adapters/rescan", {}),
    ("/v1/adapters/merge", {"mode": "sql"}),
    ("/v1/adapters/sql/pin", {}),
    ("/v1/adapters/sql/unpin", {}),
]
FROM_FILES = {"/v1/load_lora_adapter", "/v1/adapters/rescan"}


def write(folder: Path, content: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_text(content)


@asynccontextmanager
async def serving_adapters(
    tmp_path: Path, engine: FakeEngine | None = None
) -> AsyncIterator[Client]:
    """Folders to load from; `slow` is read once `may_read` is set."""
    root = tmp_path / "secret"
    for name in ("slow", "bad", "locked", "crash"):
        write(root / "adapters" / name, name)
    write(root / "adapters" / "new", "good 1")
    write(root / "adapters" / "newer", "good 2")
    write(root / "outside", "good")
    (root / "adapters" / "link").symlink_to(root / "outside")
    adapter_dir = root / "adapters"
    async with serving(engine, adapter_dir=adapter_dir, allow_runtime_adapters=True) as client:
        yield client
        client.engine.adapters.may_read.set()


# --- adapters at run time -------------------------------------------------------------------------


async def test_loaded_adapter_serves_until_unloaded(tmp_path: Path) -> None:
    async with serving_adapters(tmp_path) as client:
        reply = await client.load("fr", "new")
        assert reply.text == "Success: LoRA adapter 'fr' added successfully."
        assert reply.headers["content-type"].startswith("text/plain")
        body = (await client.complete(model="fr")).json()
        assert body["choices"][0]["text"] == "fr"
        assert body["system_fingerprint"] == digest_of("good 1")
        assert "fr" in (await client.get("/v1/models")).text

        gone = await client.unload("fr")
        assert gone.text == "Success: LoRA adapter 'fr' removed successfully."
        error_of(await client.complete(model="fr"), 404)
        assert "fr" not in (await client.get("/v1/models")).text


@pytest.mark.parametrize("what", ["load", "unload", "rescan", "describe"])
async def test_what_takes_long_is_done_off_engine_and_event_loop(tmp_path: Path, what: str) -> None:
    async with serving_adapters(tmp_path) as client:
        adapters = client.engine.adapters
        await client.load("fr", "new")
        await client.unload("fr")
        await client.post("/v1/adapters/rescan", json={})
        await client.get("/v1/models")
        await client.get("/v1/adapters")
        assert adapters.threads_of(what)
        assert not adapters.threads_of(what) & {"engine", threading.current_thread().name}


async def test_name_of_another_file_is_409_without_load_inplace(tmp_path: Path) -> None:
    async with serving_adapters(tmp_path) as client:
        assert (await client.load("fr", "new")).status_code == 200
        error = error_of(await client.load("fr", "newer"), 409)
        assert (error["type"], error["param"]) == ("ConflictError", "lora_name")
        assert "load_inplace" in error["message"]
        assert client.engine.adapters.versions["fr"].digest == digest_of("good 1")
        assert (await client.load("fr", "newer", load_inplace=True)).status_code == 200
        assert client.engine.adapters.versions["fr"].digest == digest_of("good 2")


async def test_same_file_again_is_200(tmp_path: Path) -> None:
    async with serving_adapters(tmp_path) as client:
        for more in ({}, {}, {"load_inplace": True}):
            assert (await client.load("fr", "new", **more)).status_code == 200


async def test_running_stream_keeps_its_version_while_new_requests_get_the_next(
    tmp_path: Path,
) -> None:
    async with serving_adapters(tmp_path) as client:
        await client.load("fr", "new")
        fields = {"model": "fr", "ignore_eos": True, "max_tokens": 300}
        stream = asyncio.create_task(client.complete(**fields, stream=True))
        await until(lambda: client.engine.num_running)
        await client.load("fr", "newer", load_inplace=True)
        body = (await client.complete(model="fr")).json()
        assert not stream.done()
        assert body["system_fingerprint"] == digest_of("good 2")
        chunks = events(await stream)
        assert {chunk["system_fingerprint"] for chunk in chunks} == {digest_of("good 1")}


async def test_adapter_in_use_is_409_with_the_count_and_served_as_before(tmp_path: Path) -> None:
    async with serving_adapters(tmp_path) as client, busy(client, 2, model="sql"):
        error = error_of(await client.unload("sql", timeout_s=0.02), 409)
        assert error["type"] == "ConflictError"
        assert "in use by 2 requests" in error["message"]
        assert (await client.complete(model="sql")).status_code == 200


async def test_unload_waits_for_running_requests_and_lets_no_new_ones_in(tmp_path: Path) -> None:
    async with serving_adapters(tmp_path) as client:
        async with busy(client, model="sql"):
            unload = asyncio.create_task(client.unload("sql"))
            await until(lambda: client.engine.adapters.versions["sql"].state == "draining")
            error_of(await client.complete(model="sql"), 404)
            error_of(await client.complete(model="sql+pirate"), 404)
            assert "sql" not in (await client.get("/v1/models")).text
            _, info = (await client.get("/v1/adapters")).json()["data"]
            assert (info["name"], info["state"], info["num_leases"]) == ("sql", "draining", 1)
            assert not unload.done()
        assert (await unload).status_code == 200
        assert [info["name"] for info in (await client.get("/v1/adapters")).json()["data"]] == [
            "pirate"
        ]


async def test_unload_with_abort_ends_running_requests(tmp_path: Path) -> None:
    async with serving_adapters(tmp_path) as client, busy(client, model="pirate"):
        whole = asyncio.create_task(client.complete(model="sql", **ENDLESS))
        stream = asyncio.create_task(client.complete(model="sql", **ENDLESS, stream=True))
        await until(lambda: client.engine.num_running == 3)
        assert (await client.unload("sql", timeout_s=0, abort=True)).status_code == 200
        assert "its adapter is unloaded" in error_of(await whole, 503)["message"]
        assert events(await stream)[-1]["error"]["code"] == 503
        assert [sequence.adapter for sequence in client.engine.present] == ["pirate"]


@pytest.mark.parametrize(
    "fields", [{"timeout_s": -1}, {"timeout_s": 601}, {"timeout_s": "1"}, {"abort": 1}]
)
async def test_unload_refuses_by_field(tmp_path: Path, fields: dict[str, Any]) -> None:
    async with serving_adapters(tmp_path) as client:
        assert error_of(await client.unload("sql", **fields), 400)["param"] in fields
        assert "sql" in client.engine.adapters.versions


async def test_slow_load_holds_up_nobody(tmp_path: Path) -> None:
    async with serving_adapters(tmp_path) as client:
        slow = asyncio.create_task(client.load("fr", "slow"))
        await until(lambda: client.engine.adapters.threads_of("load"))
        assert (await client.complete(model="sql")).status_code == 200
        assert (await client.load("de", "new")).status_code == 200
        assert (await client.unload("de")).status_code == 200
        assert '"fr"' not in (await client.get("/v1/adapters")).text
        assert not slow.done()
        client.engine.adapters.may_read.set()
        assert (await slow).status_code == 200


async def test_many_waiting_unloads_hold_up_nobody(tmp_path: Path) -> None:
    names = [f"a{i}" for i in range(50)]
    adapters = (engine := FakeEngine(names)).adapters
    async with serving_adapters(tmp_path, engine) as client:
        leases = [adapters.acquire(name) for name in names]
        unloads = [asyncio.create_task(client.unload(name)) for name in names]
        await until(lambda: all(v.state == "draining" for v in adapters.versions.values()))
        assert (await client.load("fr", "new")).status_code == 200
        assert (await client.complete(model="fr")).status_code == 200
        for lease in leases:
            lease.release()
        assert {reply.status_code for reply in await asyncio.gather(*unloads)} == {200}


async def test_adapters_are_described(client: Client) -> None:
    client.engine.adapters.merging.set_mode("pirate")
    client.engine.metrics.kv = KVUsage(32, 40, used=5, shared=2, cached=3)
    client.engine.metrics.num_preemptions = 7
    await until(lambda: client.engine.adapters.merging.merged)
    async with busy(client, 2, model="sql"):
        body = (await client.get("/v1/adapters")).json()
        pirate, sql = body.pop("data")
        assert body == {
            "object": "list",
            "merge_mode": "pirate",
            "merged": "pirate",
            "memory": {"device": {"used": 1, "size": 2, "adapters": 2}},
            "kv_cache": {
                "block_tokens": 32,
                "blocks": 40,
                "used": 5,
                "shared": 2,
                "cached": 3,
                "free": 32,
                "preemptions": 7,
            },
        }
        assert sql == {
            "name": "sql",
            "digest": digest_of("sql"),
            "state": "ready",
            "tier": "disk",
            "k": 1,
            "nnz": 7,
            "size_bytes": 14,
            "num_leases": 2,
            "is_pinned": False,
            "is_merged": False,
            "since": SINCE,
            "labels": [],
        }
        assert pirate["is_merged"]
        assert (await client.get("/v1/adapters/pirate")).json() == pirate


async def test_unknown_adapter_is_404_whatever_is_asked_of_it(tmp_path: Path) -> None:
    async with serving_adapters(tmp_path) as client:
        replies = [
            await client.get("/v1/adapters/nobody"),
            await client.unload("nobody"),
            await client.post("/v1/adapters/nobody/pin", json={}),
            await client.post("/v1/adapters/nobody/unpin", json={}),
            await client.post("/v1/adapters/merge", json={"mode": "nobody"}),
        ]
        for reply in replies:
            assert "nobody" in error_of(reply, 404)["message"]


async def test_pinned_adapter_is_pinned_until_unpinned(tmp_path: Path) -> None:
    async with serving_adapters(tmp_path) as client:
        info = (await client.post("/v1/adapters/sql/pin", json={})).json()
        assert info == (await client.get("/v1/adapters/sql")).json()
        assert (info["is_pinned"], info["tier"]) == (True, "device")
        refused = await client.post("/v1/adapters/pirate/pin", json={})
        assert "no room" in error_of(refused, 400)["message"]
        info = (await client.post("/v1/adapters/sql/unpin", json={})).json()
        assert not info["is_pinned"]


async def test_merge_mode_is_set(tmp_path: Path) -> None:
    async with serving_adapters(tmp_path) as client:
        for mode in ("auto", "sql", "never"):
            reply = await client.post("/v1/adapters/merge", json={"mode": mode})
            assert reply.json()["merge_mode"] == mode
        for body in ({}, {"mode": 1}, {"mode": "never", "name": "sql"}):
            error_of(await client.post("/v1/adapters/merge", json=body), 400)


async def test_rescan_tells_what_has_changed(tmp_path: Path) -> None:
    async with serving_adapters(tmp_path) as client:
        client.engine.adapters.directory = folder = tmp_path / "secret" / "adapters"
        for name in ("slow", "bad", "crash", "link"):
            shutil.rmtree(folder / name) if name != "link" else (folder / name).unlink()
        first = (await client.post("/v1/adapters/rescan", json={})).json()
        assert first["added"] == ["new", "newer"]
        assert first["failed"].keys() == {"locked"}
        assert f"locked/{CONFIG_FILE}" in first["failed"]["locked"]  # and not where that is

        write(folder / "new", "good 3")
        shutil.rmtree(folder / "newer")
        second = (await client.post("/v1/adapters/rescan", json={})).json()
        failed = second.pop("failed")
        assert failed == first["failed"]
        assert second == {"added": [], "replaced": ["new"], "removed": ["newer"], "unchanged": 0}
        assert (await client.complete(model="new")).json()["system_fingerprint"] == digest_of(
            "good 3"
        )
        error_of(await client.complete(model="newer"), 404)


async def test_rescan_of_a_directory_that_has_gone_is_500_without_its_path(tmp_path: Path) -> None:
    async with serving_adapters(tmp_path) as client:
        client.engine.adapters.directory = tmp_path / "secret" / "gone"
        error_of(await client.post("/v1/adapters/rescan", json={}), 500)
        assert (await client.complete(model="sql")).status_code == 200


async def test_absolute_path_under_adapter_dir_loads(tmp_path: Path) -> None:
    async with serving_adapters(tmp_path) as client:
        path = tmp_path / "secret" / "adapters" / "new"
        assert (await client.load("fr", str(path))).status_code == 200


@pytest.mark.parametrize("path", ["../outside", "link", "/etc", "new/../../outside", "\0", "~"])
async def test_paths_out_of_adapter_dir_are_refused(tmp_path: Path, path: str) -> None:
    async with serving_adapters(tmp_path) as client:
        reply = await client.load("fr", path)
        assert error_of(reply, 404 if path == "~" else 400)["param"] == "lora_path"
        assert "fr" not in client.engine.adapters.versions


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        ("bad", 400, "k is 0; values are NaN"),
        ("absent", 404, "No adapter at lora_path 'absent'"),
        ("locked", 400, "cannot be read"),
        ("crash", 500, "the server failed"),
    ],
)
async def test_broken_adapter_is_refused_with_its_faults(
    tmp_path: Path, path: str, status: int, message: str
) -> None:
    async with serving_adapters(tmp_path) as client:
        assert message in error_of(await client.load("fr", path), status)["message"]
        assert "fr" not in client.engine.adapters.versions
        assert (await client.complete()).status_code == 200


@pytest.mark.parametrize("name", ["", "../x", ".x", "a b", "a\n", "a" * 64, "é", BASE])
async def test_adapter_names_are_plain(tmp_path: Path, name: str) -> None:
    async with serving_adapters(tmp_path) as client:
        assert error_of(await client.load(name, "new"), 400)["param"] == "lora_name"


@pytest.mark.parametrize(("route", "body"), CHANGES)
async def test_changes_are_403_unless_allowed(tmp_path: Path, route: str, body: Any) -> None:
    async with serving(adapter_dir=tmp_path) as client:
        error = error_of(await client.post(route, json=body), 403)
        assert error["type"] == "PermissionDeniedError"
        assert "--allow-runtime-adapters" in error["message"]
        assert client.engine.adapters.calls == []
        assert client.engine.adapters.merging.mode == "never"


@pytest.mark.parametrize(("route", "body"), CHANGES)
async def test_files_need_an_adapter_dir_and_nothing_else_does(route: str, body: Any) -> None:
    async with serving(allow_runtime_adapters=True) as client:
        reply = await client.post(route, json=body)
        if route in FROM_FILES:
            assert "--adapter-dir" in error_of(reply, 403)["message"]
        else:
            assert reply.status_code == 200, reply.text


@pytest.mark.parametrize(("route", "body"), CHANGES)
async def test_web_page_of_another_origin_changes_nothing(
    tmp_path: Path, route: str, body: Any
) -> None:
    async with serving_adapters(tmp_path) as client:
        content = json.dumps(body).encode()
        for headers in ({}, {"content-type": "text/plain"}):
            reply = await client.post(route, content=content, headers=headers)
            assert "application/json" in error_of(reply, 400)["message"]
        assert client.engine.adapters.calls == []
        assert client.engine.adapters.merging.mode == "never"


# --- stopping -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("route", "body"), CHANGES)
async def test_draining_server_changes_no_adapters(tmp_path: Path, route: str, body: Any) -> None:
    async with serving_adapters(tmp_path) as client:
        await client.worker.drain(timeout_s=0)
        error_of(await client.post(route, json=body), 503)
        assert client.engine.adapters.calls == []


@pytest.mark.parametrize(("route", "body"), CHANGES)
async def test_server_whose_engine_failed_changes_no_adapters_and_says_so(
    tmp_path: Path, route: str, body: Any
) -> None:
    async with serving_adapters(tmp_path) as client:
        client.engine.dies = True
        error_of(await client.complete(), 500)
        refused = error_of(await client.post(route, json=body), 503)
        assert "its engine failed" in refused["message"]


# --- a real socket --------------------------------------------------------------------------------


def test_sighup_looks_at_the_adapter_directory_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine, said = FakeEngine(), "adapter directory rescanned by SIGHUP: "
    caplog.set_level(logging.INFO, "neuroada_serve")

    def hang_up() -> str:
        num_said = len(caplog.messages)
        os.kill(os.getpid(), signal.SIGHUP)
        wait_for(lambda: len(caplog.messages) > num_said)
        return caplog.messages[-1]

    def visit(url: str) -> None:
        assert hang_up() == (
            "adapter directory not rescanned by SIGHUP: there is no adapter directory; "
            "start with --adapter-dir"
        )
        engine.adapters.directory = tmp_path / "adapters"
        assert hang_up().startswith("adapter directory not rescanned by SIGHUP: [Errno 2] ")
        write(tmp_path / "adapters" / "fr", "good")
        write(tmp_path / "adapters" / "bad", "bad")
        faults = "not served: adapter 'bad': k is 0; values are NaN"
        assert hang_up() == f"{said}added fr; {faults}"
        assert caplog.records[-1].levelno == logging.WARNING  # a signal has no other answer
        assert httpx.get(f"{url}/v1/models/fr", timeout=120).status_code == 200
        shutil.rmtree(tmp_path / "adapters" / "bad")
        assert hang_up() == f"{said}nothing has changed"
        write(tmp_path / "adapters" / "fr", "good again")
        assert hang_up() == f"{said}replaced fr"
        shutil.rmtree(tmp_path / "adapters" / "fr")
        assert hang_up() == f"{said}removed fr"

    assert serve_while(engine, visit) == 0


def test_waiting_unload_does_not_keep_a_dead_server_alive() -> None:
    engine = FakeEngine()
    engine.adapters.acquire("sql")  # and never given back

    def unload(url: str) -> None:
        body = {"lora_name": "sql", "timeout_s": 20}
        with suppress(httpx.HTTPError):  # the server dies
            httpx.post(f"{url}/v1/unload_lora_adapter", json=body, timeout=120)

    def visit(url: str) -> None:
        threading.Thread(target=unload, args=(url,), daemon=True).start()
        wait_for(lambda: engine.adapters.threads_of("unload"))
        engine.dies = True
        assert (
            httpx.post(f"{url}/v1/completions", json={"prompt": "hi"}, timeout=120).status_code
            == 500
        )
        wait_for(lambda: not is_listening(url))

    assert serve_while(engine, visit, allow_runtime_adapters=True) == 70
    lasting = {thread.name for thread in threading.enumerate() if not thread.daemon}
    assert not lasting & engine.adapters.threads_of("unload")
