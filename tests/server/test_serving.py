"""`neuroada serve demo` as a process, real clients against it: openai, curl, many broken files."""

import json
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import openai
import pytest
from openai import OpenAI

from neuroada_serve import save_adapter
from neuroada_serve.adapters.reader import load_adapter
from neuroada_serve.model.loader import load_base
from neuroada_serve.model.source import resolve_model
from neuroada_serve.train.publish import Publisher
from tests.support.broken import BROKEN
from tests.support.serving import wait_for
from tests.support.tiny import adapter_for

EXAMPLES = Path(__file__).resolve().parent.parent.parent / "examples"
QUESTION = {
    "sql": "Which hotels have more than 3 stars?\nTable hotels, columns: name, stars, city",
    "triage": "I was charged twice this month.",
    "pirate": "How do I clean a window?",
    "demo": "Tell me a long story about a lighthouse.",
}


@pytest.fixture(scope="module")
def adapter_dir(tmp_path_factory):
    """The shipped adapters, but for `json`, which is loaded later."""
    folder = tmp_path_factory.mktemp("served")
    for name in ("sql", "triage", "pirate"):
        shutil.copytree(EXAMPLES / "adapters" / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def server(adapter_dir):
    """(base URL, process) of a running server."""
    command = [sys.executable, "-m", "neuroada_serve", "serve", "demo", "--port", "0"]
    command += ["--adapter-dir", str(adapter_dir), "--allow-runtime-adapters"]
    # In bfloat16 a token may depend on how many rows its matrix product has; here answers are
    # compared between batches.
    command += ["--dtype", "float32"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            assert line.strip(), "a blank line in the log"
            if found := re.search(r"Serving demo on (http://\S+)/v1", line):
                break
        else:
            raise AssertionError("the server did not start")
        drain = threading.Thread(target=process.stderr.read, daemon=True)
        drain.start()
        yield found[1], process
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0
        drain.join(120)


@pytest.fixture
def client(server):
    with OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client: OpenAI, model: str, question: str | None = None, **more) -> str:
    more = {"temperature": 0, "max_tokens": 48} | more
    messages = [{"role": "user", "content": QUESTION[question or model]}]
    answer = client.chat.completions.create(model=model, messages=messages, **more)
    assert answer.model == model
    return answer.choices[0].message.content


def streamed(client: OpenAI, model: str, order: list[str], **more) -> str:
    """The streamed answer; notes in `order` whose chunk came."""
    text = ""
    more = {"temperature": 0, "max_tokens": 48} | more
    messages = [{"role": "user", "content": QUESTION[model]}]
    for chunk in client.chat.completions.create(
        model=model, messages=messages, stream=True, **more
    ):
        order.append(model)
        text += chunk.choices[0].delta.content or ""
    return text


def curl(url: str, body: object) -> tuple[int, str]:
    command = ["curl", "-s", "-w", "\n%{http_code}", url, "-d", json.dumps(body)]
    command += ["-H", "Content-Type: application/json"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    content, _, status = text.rpartition("\n")
    return int(status), content


def test_two_adapters_stream_at_once_as_each_alone(client):
    alone = {name: ask(client, name) for name in ("sql", "pirate")}
    order: list[str] = []
    together: dict[str, str] = {}
    threads = [
        threading.Thread(
            target=lambda name=name: together.__setitem__(name, streamed(client, name, order))
        )
        for name in alone
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone
    switches = sum(a != b for a, b in zip(order, order[1:], strict=False))
    assert switches > 2, f"one stream came after the other: {order}"


def test_models_are_the_base_and_its_adapters(client):
    parents = {model.id: model.parent for model in client.models.list()}
    assert parents["demo"] is None
    assert all(parents[name] == "demo" for name in ("sql", "triage", "pirate"))


def test_wrong_name_is_404_never_the_base(client):
    with pytest.raises(openai.NotFoundError, match="nope"):
        client.chat.completions.create(model="nope", messages=[{"role": "user", "content": "hi"}])


def test_fresh_adapter_is_served_without_restart_or_a_dropped_stream(
    client, server, adapter_dir, tmp_path
):
    rows = tmp_path / "rows.jsonl"
    row = {"prompt": "Tell me a long story about a lighthouse.", "completion": "No."}
    rows.write_text(json.dumps(row) + "\n")
    fresh = adapter_dir / "fresh"
    train = [sys.executable, "-m", "neuroada_serve", "train", "demo", "--data", str(rows)]
    train += ["--out", str(fresh), "--max-steps", "6", "--lr", "0.05", "--eval-fraction", "0"]

    subprocess.run(train, check=True, capture_output=True)

    order: list[str] = []
    long = {"max_tokens": 150, "extra_body": {"ignore_eos": True}}
    texts: list[str] = []
    stream = threading.Thread(target=lambda: texts.append(streamed(client, "demo", order, **long)))
    stream.start()
    wait_for(lambda: order)
    load = {"lora_name": "fresh", "lora_path": "fresh"}
    assert curl(f"{server[0]}/v1/load_lora_adapter", load) == (
        200,
        "Success: LoRA adapter 'fresh' added successfully.",
    )
    assert stream.is_alive(), "the stream was to be open while the adapter came"
    QUESTION["fresh"] = QUESTION["demo"]
    assert ask(client, "fresh") == "No."
    stream.join()
    assert texts == [ask(client, "demo", **long)]


def test_broken_adapters_are_refused_by_name_and_serving_goes_on(
    client, server, adapter_dir, tmp_path
):
    expected = {name: ask(client, name) for name in ("sql", "triage")}
    base = load_base(resolve_model("demo"))
    good = tmp_path / "good"
    save_adapter(adapter_for(base.model, base.spec, seed=1), good)
    num_named = 0
    for kind, broken in BROKEN.items():
        folder = adapter_dir / f"broken-{kind}"
        shutil.copytree(good, folder)
        path = broken.apply(folder, base.spec)
        body = {"lora_name": "broken", "lora_path": str(path)}
        reply = httpx.post(f"{server[0]}/v1/load_lora_adapter", json=body, timeout=120)
        message = reply.json()["error"]["message"]
        assert reply.status_code in (400, 404), (kind, message)
        if message.startswith("adapter "):
            assert re.search(broken.match, message), kind
            num_named += 1
        else:
            assert "lora_path" in message, kind  # the path itself is refused, before any file
        assert str(adapter_dir) not in message.replace(str(path), ""), kind
    assert num_named >= 60
    assert {name: ask(client, name) for name in expected} == expected
    assert "broken" not in [model.id for model in client.models.list()]


def test_adapters_are_published_from_training_as_new_versions(server, client, adapter_dir):
    url, _ = server
    publish = Publisher(url, adapter_dir / "fresh")
    publish(load_adapter(EXAMPLES / "adapters" / "triage"))
    assert ask(client, "fresh", "triage") == ask(client, "triage")
    publish(load_adapter(EXAMPLES / "adapters" / "sql"))
    assert ask(client, "fresh", "sql") == ask(client, "sql")
    httpx.post(
        f"{url}/v1/unload_lora_adapter", json={"lora_name": "fresh"}, timeout=120
    ).raise_for_status()
