"""Handing trained adapters to a server; tests/server/test_serving.py has a real one."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from neuroada_serve.adapters.reader import load_adapter
from neuroada_serve.cli.main import app
from neuroada_serve.config import TrainConfig
from neuroada_serve.errors import UsageError
from neuroada_serve.model.loader import load_base
from neuroada_serve.train.publish import Publisher
from neuroada_serve.train.trainer import replace, train_adapter
from tests.support.tiny import adapter_for, save_tiny_model
from tests.support.training import ROWS, make_base, write_rows

MISSING = {"error": {"message": "No adapter at lora_path", "param": "lora_path"}}


class FakeServer:
    """Answers every load with `answer`, (status, body), and keeps what it was sent; of a folder
    that is not there with `answer_of_missing`. Serves what was loaded, `served`: name -> digest."""

    def __init__(self):
        self.answer = (200, "{}")
        self.answer_of_missing = (404, json.dumps(MISSING))
        self.bodies = []
        self.served = {}
        self.models = [{"id": "base", "parent": None}]
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                if self.path == "/v1/models":
                    self._answer(200, json.dumps({"data": fake.models}))
                elif digest := fake.served.get(self.path.removeprefix("/v1/adapters/")):
                    self._answer(200, json.dumps({"digest": digest}))
                else:
                    self._answer(404, "{}")

            def do_POST(self):
                length = int(self.headers["Content-Length"])
                body = json.loads(self.rfile.read(length))
                folder = Path(body["lora_path"])
                if not folder.exists():
                    self._answer(*fake.answer_of_missing)
                    return
                fake.bodies.append((self.path, body))
                if fake.answer[0] == 200:
                    fake.served[body["lora_name"]] = load_adapter(folder).digest
                self._answer(*fake.answer)

            def _answer(self, status, body):
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *args):
                pass

        self._http = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever)
        self._thread.start()

    def stop(self):
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


@pytest.fixture
def server():
    fake = FakeServer()
    yield fake
    fake.stop()


@pytest.fixture
def adapter(tmp_path):
    base = load_base(save_tiny_model(tmp_path / "model"))
    return adapter_for(base.model, base.spec, seed=0)


def test_every_adapter_is_written_and_then_loaded_in_place(server, adapter, tmp_path):
    publish = Publisher(server.url + "/", tmp_path / "served" / "mine")
    publish(adapter)
    publish(adapter)
    expected = {
        "lora_name": "mine",
        "lora_path": str(tmp_path / "served" / "mine"),
        "load_inplace": True,
    }
    assert server.bodies == [("/v1/load_lora_adapter", expected)] * 2
    assert load_adapter(tmp_path / "served" / "mine").digest == adapter.digest


def test_a_refusal_says_what_the_server_says_and_leaves_the_adapter(server, adapter, tmp_path):
    publish = Publisher(server.url, tmp_path / "mine")
    server.answer = (403, json.dumps({"error": {"message": "start me with --allow"}}))
    with pytest.raises(UsageError, match="start me with --allow"):
        publish(adapter)
    assert load_adapter(tmp_path / "mine").digest == adapter.digest
    server.answer = (502, "<html>proxy</html>")
    with pytest.raises(UsageError, match="502 <html>proxy"):
        publish(adapter)


def test_no_server_is_told_before_anything_is_trained(tmp_path):
    gone = FakeServer()
    gone.stop()
    with pytest.raises(UsageError, match="neuroada serve"):
        Publisher(gone.url, tmp_path / "mine")


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "file:///etc/passwd", "http://"])
def test_what_is_no_address_is_refused(url, tmp_path):
    with pytest.raises(UsageError, match="--publish takes a server's address"):
        Publisher(url, tmp_path / "mine")


# --- before training ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (
            (403, json.dumps({"error": {"message": "start me with --allow"}})),
            "start me with --allow",
        ),
        (
            (400, json.dumps({"error": {"message": "under --adapter-dir", "param": "lora_path"}})),
            "dir",
        ),
        ((404, "no such route"), "no such route"),
        ((200, "{}"), "is it `neuroada serve`"),
    ],
)
def test_a_server_that_would_not_load_is_refused_before_training(server, tmp_path, answer, words):
    server.answer_of_missing = answer
    with pytest.raises(UsageError, match="--publish") as refused:
        Publisher(server.url, tmp_path / "mine")
    assert words in str(refused.value)


def test_a_name_that_cannot_be_served_is_refused_before_training(server, tmp_path):
    with pytest.raises(UsageError, match="--publish .* name of --out's folder"):
        Publisher(server.url, tmp_path / "my adapter")
    with pytest.raises(UsageError, match="'base' is the name of the base"):
        Publisher(server.url, tmp_path / "base")


# --- a whole run -------------------------------------------------------------------------------

CONFIG = TrainConfig(k=2, max_steps=9, eval_steps=3, eval_fraction=0.25, lr=0.01, samples=0)


@pytest.fixture
def base(tmp_path):
    return make_base(tmp_path / "tiny", "llama")


@pytest.fixture
def rows(tmp_path):
    return write_rows(tmp_path / "rows.jsonl", ROWS)


def test_only_the_finished_adapter_is_published(server, base, rows, tmp_path):
    report = train_adapter(base, rows, tmp_path / "mine", CONFIG, publish=server.url)
    assert report.published is True
    assert len(server.bodies) == 1
    assert server.served == {"mine": report.adapter.digest}


def test_improvements_are_published_while_training_where_that_is_asked_for(
    server, base, rows, tmp_path
):
    report = train_adapter(
        base, rows, tmp_path / "mine", CONFIG, publish=server.url, publish_improved=True
    )
    assert len(server.bodies) == 3
    assert server.served == {"mine": report.adapter.digest}


def test_nothing_worse_than_what_is_served_is_published(server, base, rows, tmp_path):
    good = train_adapter(base, rows, tmp_path / "mine", CONFIG, publish=server.url)
    told = []
    worse = train_adapter(
        base,
        rows,
        tmp_path / "mine",
        replace(CONFIG, max_steps=1, seed=0, lr=1e-4),
        told.append,
        publish=server.url,
        publish_improved=True,
    )
    assert worse.published is False
    assert server.served == {"mine": good.adapter.digest}
    assert f"served has a held-out loss of {good.after.loss:.4f}." in " ".join(told)
    assert any("Not published: the held-out loss is" in sentence for sentence in told)


def test_a_served_version_without_a_score_is_replaced_by_the_finished_adapter_alone(
    server, base, rows, tmp_path
):
    server.served["mine"] = "another"
    told = []
    train_adapter(
        base,
        rows,
        tmp_path / "mine",
        CONFIG,
        told.append,
        publish=server.url,
        publish_improved=True,
    )
    assert len(server.bodies) == 1
    assert any("cannot be scored on these rows" in sentence for sentence in told)


def test_a_failure_to_publish_is_told_and_the_adapter_kept(server, base, rows, tmp_path):
    server.answer = (403, "no")
    told = []
    report = train_adapter(base, rows, tmp_path / "mine", CONFIG, told.append, publish=server.url)
    assert report.published is False
    assert any("Not published" in message and "403 no" in message for message in told)
    assert load_adapter(tmp_path / "mine").digest == report.adapter.digest


def test_improvements_need_an_address_and_heldout_rows(server, base, rows, tmp_path):
    with pytest.raises(UsageError, match="--publish-improved needs --publish"):
        train_adapter(base, rows, tmp_path / "mine", CONFIG, publish_improved=True)
    config = replace(CONFIG, eval_fraction=0)
    with pytest.raises(UsageError, match="--publish-improved needs held-out rows"):
        train_adapter(
            base, rows, tmp_path / "mine", config, publish=server.url, publish_improved=True
        )


def test_not_published_is_an_exit_code(server, base, rows, tmp_path):
    command = [
        *("train", str(tmp_path / "tiny"), "--data", str(rows), "--out", str(tmp_path / "mine")),
        *("--max-steps", "1", "--publish", server.url),
    ]
    server.answer = (403, "no")
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1, result.output
    assert "does not serve it" in result.output
    assert (tmp_path / "mine").is_dir()
    server.answer_of_missing = (403, "no")
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2, result.output
    assert "--publish cannot work" in result.output
