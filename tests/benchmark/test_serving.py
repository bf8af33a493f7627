"""`neuroada bench serving`: load on a running server."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from neuroada_serve.benchmark.serving import Sent, figures
from neuroada_serve.errors import EngineError
from tests.support.benchmark import document, run

# --- arithmetic -----------------------------------------------------------------------------------


def test_goodput_counts_requests_within_every_limit():
    def sent(ttft_ms: float, e2el_ms: float, error: str | None = None) -> Sent:
        return Sent(0, "m", ttft_ms=ttft_ms, e2el_ms=e2el_ms, output_tokens=11, error=error)

    requests = [sent(100, 600), sent(100, 601), sent(101, 500), sent(1, 2, "HTTP 500"), Sent(0, "")]
    found = figures(requests[:4], 2.0, {"ttft": 100, "tpot": 50})
    assert found["request_goodput"] == 0.5
    assert found["request_throughput"] == 1.5
    assert found["output_throughput"] == 16.5
    assert found["failed"] == 1
    assert found["ttft_ms_p50"] == 100
    assert figures(requests[:4], 2.0, {})["request_goodput"] == 1.5
    assert not requests[4].keeps({"ttft": 1e9})


def test_no_answer_at_all_is_an_error():
    with pytest.raises(EngineError, match="HTTP 500"):
        figures([Sent(0, "m", error="HTTP 500")], 1.0, {})


# --- whole runs -----------------------------------------------------------------------------------


@pytest.mark.timeout(300)
def test_serving_starts_our_server_and_loads_it(model, tmp_path):
    out = tmp_path / "serving.json"
    result = run(
        *["serving", "--model", model.path, "--num-adapters", 3, "--num-prompts", 6],
        *["--input-len", 5, "--output-len", 4, "--vocab", 250, "--request-rate", 200],
        *["--goodput", "ttft:60000 tpot:60000", "--popularity", "base,distinct", "--out", out],
    )
    assert result.exit_code == 0, result.output
    found = document(result)
    assert found["settings"]["adapters"] == ["bench-0", "bench-1", "bench-2"]
    assert [case["popularity"] for case in found["cases"]] == ["base", "distinct"]
    (one,) = found["cases"][1]["rounds"]
    assert {r["model"] for r in one["requests"]} == {"bench-0", "bench-1", "bench-2"}
    assert [r["output_tokens"] for r in one["requests"]] == [4] * 6
    assert one["completed"] == 6
    assert one["request_goodput"] == one["request_throughput"]
    assert out.with_suffix(".png").is_file()


class FakeServer(BaseHTTPRequestHandler):
    """A base and an adapter; answers two chunks, and refuses every prompt that has an even id
    first."""

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        cards = [{"id": "base"}, {"id": "fr", "parent": "base"}]
        self._answer(200, json.dumps({"data": cards}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert body["stream_options"] == {"include_usage": True}
        if body["prompt"][0] % 2 == 0 and body["max_tokens"] == 8:
            return self._answer(400, "no even ids")
        chunks = [{"choices": [{"text": "a"}]}, {"choices": [{"text": "b"}]}]
        chunks.append({"choices": [], "usage": {"completion_tokens": 8}})
        lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
        return self._answer(200, "".join(lines) + "data: [DONE]\n\n")

    def _answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())


@pytest.fixture
def fake_server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeServer)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.timeout(300)
def test_serving_drives_any_server_and_counts_failures(fake_server, monkeypatch):
    monkeypatch.setattr("neuroada_serve.benchmark.serving._warm_up", no_warm_up)
    flags = ["--num-prompts", 20, "--max-concurrency", 2, "--output-len", 8, "--rounds", 2]
    result = run("serving", "--base-url", f"{fake_server}/v1", *flags, "--popularity", "identical")
    assert result.exit_code == 0, result.output
    (case,) = document(result)["cases"]
    for one in case["rounds"]:
        assert one["completed"] + one["failed"] == 20
        assert one["failed"] > 0
        answered = [r for r in one["requests"] if r["error"] is None]
        assert {(r["model"], r["output_tokens"], len(r["itl_ms"])) for r in answered} == {
            ("fr", 8, 1)
        }


async def no_warm_up(*args: object) -> None:
    pass
