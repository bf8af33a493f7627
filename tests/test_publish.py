"""Handing adapters to a server while they are trained; tests/test_serving.py has a real one."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from tiny import adapter_for, save_tiny_model

from neuroada_serve.adapters.reader import load_adapter
from neuroada_serve.errors import UsageError
from neuroada_serve.model.loader import load_base
from neuroada_serve.train.publish import Publisher


class FakeServer:
    """Answers every request with `answer`, (status, body), and keeps what it was sent."""

    def __init__(self):
        self.answer = (200, "{}")
        self.bodies = []
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self._answer(200, "{}")

            def do_POST(self):
                length = int(self.headers["Content-Length"])
                fake.bodies.append((self.path, json.loads(self.rfile.read(length))))
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
