"""T20: clients and admins at once, and every answer is one version's, whole.

A real server on a tiny model, with room for a few of the adapters only. 16 names have 4 versions
each; admins load, replace, unload, merge, pin and rescan while clients ask, stream, and leave.
Every 200 must be the reference answer of the version that it names, and that version must have been
ready at some moment between the request and its answer. `pytest -m slow` runs the whole minute.
"""

import contextlib
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import httpx
import pytest

from neuroada_serve import LLM, SamplingParams, save_adapter
from neuroada_serve.model.loader import load_base
from tests.support.tiny import adapter_for, save_tiny_model

NAMES = [f"n{i:02}" for i in range(16)]
VERSIONS = 4
CLIENTS, ADMINS = 8, 4
MAX_TOKENS = 12
MARGIN = 0.005  # between the two likeliest tokens of every reference step, nats
ALLOWED = {200, 404, 409, 429, 503}
TIMEOUT_S = 15.0


@dataclass(frozen=True)
class Op:
    """A change of one name that may have happened between start and end."""

    start: float
    end: float
    digest: str | None  # what was loaded; None: an attempt to unload
    done: bool


@dataclass
class World:
    """State that all threads share."""

    url: str
    digests: dict[str, list[str]]  # name -> digest by version
    answers: dict[tuple[str | None, int], str]  # (digest, prompt) -> text
    prompts: list[list[int]]
    ops: dict[str, list[Op]] = field(default_factory=lambda: {name: [] for name in NAMES})
    faults: list[str] = field(default_factory=list)
    codes: Counter = field(default_factory=Counter)
    stop: threading.Event = field(default_factory=threading.Event)

    def check_version(self, name: str, digest: str, sent: float, received: float) -> None:
        """The version was ready at some moment between."""
        ops = self.ops[name]
        for load in [o for o in ops if o.digest == digest and o.done and o.start <= received]:
            ended = [
                o
                for o in ops
                if o.done and o.digest != digest and o.start >= load.end and o.end <= sent
            ]
            again = [
                o for o in ops if o.done and o.digest == digest and ended and o.end > ended[0].start
            ]
            if not ended or again:
                return
        self.faults.append(f"{name}: {digest[:8]} was not ready in {sent:.3f}..{received:.3f}")

    def check_absence(self, name: str, sent: float, received: float) -> None:
        """A 404 needs an unload, or an attempt, that no load had followed when it was sent."""
        ops = self.ops[name]
        if not any(o.digest and o.done and o.end <= sent for o in ops):
            return  # never loaded so far
        for unload in [o for o in ops if o.digest is None and o.start <= received]:
            if not any(
                o.digest and o.done and o.start >= unload.end and o.end <= sent for o in ops
            ):
                return
        self.faults.append(f"{name}: 404 although it was loaded, {sent:.3f}..{received:.3f}")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("chaos")
    source = save_tiny_model(root / "model")
    base = load_base(source)
    kinds = [{"k": 1}, {"k": 2}, {"k": 5, "targets": ("q_proj", "up_proj")}, {"k": 3}]
    made, digests = {}, {}
    for i, name in enumerate(NAMES):
        digests[name] = []
        for version in range(VERSIONS):
            adapter = adapter_for(base.model, base.spec, seed=10 * i + version, **kinds[version])
            save_adapter(adapter, root / "adapters" / "pool" / f"{name}-{version}")
            made[adapter.digest] = adapter
            digests[name].append(adapter.digest)
    answers, prompts = references(str(source.path), made)
    command = [sys.executable, "-m", "neuroada_serve", "serve", str(source.path), "--port", "0"]
    command += ["--adapter-dir", str(root / "adapters"), "--allow-runtime-adapters"]
    # Room for some ten of the adapters on the device, and as many on the host.
    command += ["--adapter-memory", "24KiB", "--adapter-host-memory", "24KiB"]
    command += ["--prefix-cache-memory", "1MiB", "--max-num-seqs", "6"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        said = []
        for line in process.stderr:
            said.append(line)
            if found := re.search(r"Serving \S+ on (http://\S+)/v1", line):
                break
        else:
            raise AssertionError("the server did not start: " + "".join(said))
        threading.Thread(target=lambda: said.extend(process.stderr), daemon=True).start()
        yield World(found[1], digests, answers, prompts)
        process.terminate()
        assert process.wait(30) == 0, "".join(said)
        assert "Traceback" not in "".join(said), "".join(said)


def references(model: str, made: dict) -> tuple[dict, list[list[int]]]:
    """Return the answers of every version, and of the base, to prompts that leave no doubt."""
    llm = LLM(model, made and {f"v-{d[:40]}": a for d, a in made.items()}, max_num_seqs=16)
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True, logprobs=2)
    draw = random.Random(0)
    prompts = [draw.choices(range(250), k=length) for length in (3, 5, 20, 40, 70, 70)]
    answers: dict[tuple[str | None, int], str | None] = {}
    for number, prompt in enumerate(prompts):
        names = [None, *(f"v-{d[:40]}" for d in made)]
        for digest, answer in zip(
            [None, *made], llm.generate([prompt] * len(names), params, names), strict=True
        ):
            tops = [token.top for token in answer.outputs[0].logprobs]
            is_sure = all(top[0][2] - top[1][2] >= MARGIN for top in tops)
            answers[digest, number] = answer.text if is_sure else None
    unsure = sum(text is None for text in answers.values())
    assert unsure < 0.3 * len(answers), "most answers leave no doubt"
    texts = Counter(text for text in answers.values() if text is not None)
    assert texts.most_common(1)[0][1] <= 3, "answers tell versions apart"
    return answers, prompts


# --- threads ---------------------------------------------------------------------------------


def ask(world: World, seed: int) -> None:
    draw = random.Random(f"client {seed}")
    with httpx.Client(base_url=world.url, timeout=TIMEOUT_S, trust_env=False) as client:
        while not world.stop.is_set():
            name = draw.choice([*NAMES, *NAMES, None])
            number = draw.randrange(len(world.prompts))
            body = {"prompt": world.prompts[number], "temperature": 0, "max_tokens": MAX_TOKENS}
            body |= {"ignore_eos": True} | ({"model": name} if name else {})
            sent = time.monotonic()
            try:
                kind = draw.random()
                if kind < 0.6:
                    check(world, name, number, sent, client.post("/v1/completions", json=body))
                else:
                    leaves = kind > 0.9
                    stream(world, client, name, number, sent, body | {"stream": True}, leaves)
            except httpx.HTTPError as error:
                world.faults.append(
                    f"{name}: {type(error).__name__} after {time.monotonic() - sent:.1f} s"
                )


def check(world: World, name: str | None, number: int, sent: float, reply: httpx.Response) -> None:
    received = time.monotonic()
    world.codes[reply.status_code] += 1
    if reply.status_code == 200:
        body = reply.json()
        check_text(
            world,
            name,
            number,
            sent,
            received,
            body["system_fingerprint"],
            body["choices"][0]["text"],
        )
    elif reply.status_code == 404 and name is not None:
        world.check_absence(name, sent, received)
    elif reply.status_code not in ALLOWED or name is None:
        world.faults.append(f"{name}: {reply.status_code} {reply.text[:200]}")


def check_text(
    world: World, name: str | None, number: int, sent: float, received: float, digest, text
) -> None:
    if name is None:
        assert digest is None
    elif digest not in world.digests[name]:
        world.faults.append(f"{name}: answered by {digest}")
        return
    else:
        world.check_version(name, digest, sent, received)
    expected = world.answers[digest, number]
    if expected is not None and text != expected:
        world.faults.append(f"{name}: {text!r} is not {expected!r} of {str(digest)[:8]}")


def stream(
    world: World,
    client: httpx.Client,
    name: str | None,
    number: int,
    sent: float,
    body: dict,
    leaves: bool,
) -> None:
    with client.stream("POST", "/v1/completions", json=body) as reply:
        if reply.status_code != 200:
            reply.read()
            check(world, name, number, sent, reply)
            return
        text, digest, ended = "", None, False
        for line in reply.iter_lines():
            if leaves and text:
                world.codes["left"] += 1
                return
            if line == "data: [DONE]":
                ended = True
            elif line.startswith("data: "):
                chunk = httpx.Response(200, text=line.removeprefix("data: ")).json()
                if "error" in chunk:  # its adapter was unloaded with abort
                    world.codes["error event"] += 1
                    if chunk["error"]["code"] != 503 or name is None:
                        world.faults.append(f"{name}: event {chunk}")
                    return
                text += chunk["choices"][0]["text"]
                digest = chunk["system_fingerprint"]
    world.codes["streamed"] += 1
    if not ended:
        world.faults.append(f"{name}: a stream without an end")
    check_text(world, name, number, sent, time.monotonic(), digest, text)


def administer(world: World, seed: int) -> None:
    """Changes names of its own, so that their order is known."""
    draw = random.Random(f"admin {seed}")
    own = NAMES[seed::ADMINS]
    with httpx.Client(base_url=world.url, timeout=TIMEOUT_S, trust_env=False) as client:
        while not world.stop.is_set():
            name = draw.choice(own)
            if draw.random() < 0.65:
                version = draw.randrange(VERSIONS)
                body = {"lora_name": name, "lora_path": f"pool/{name}-{version}"}
                body["load_inplace"] = draw.random() < 0.9
                change(world, client, "/v1/load_lora_adapter", body, name, version)
            else:
                body = {"lora_name": name, "timeout_s": draw.choice([0, 0.05, 1.0])}
                body["abort"] = draw.random() < 0.3
                change(world, client, "/v1/unload_lora_adapter", body, name, None)
            time.sleep(draw.uniform(0, 0.02))


def change(
    world: World, client: httpx.Client, path: str, body: dict, name: str, version: int | None
) -> None:
    digest = None if version is None else world.digests[name][version]
    start = time.monotonic()
    # Entered as lasting until it has ended: a client may be answered in between.
    place = len(world.ops[name])
    world.ops[name].append(Op(start, float("inf"), digest, done=True))
    reply = client.post(path, json=body)
    done = reply.status_code == 200
    world.ops[name][place] = Op(start, time.monotonic(), digest, done)
    world.codes[f"admin {reply.status_code}"] += 1
    if reply.status_code not in ALLOWED:
        world.faults.append(f"admin {path} {body}: {reply.status_code} {reply.text[:200]}")


def meddle(world: World) -> None:
    """Merge modes, pins, looks at lists: of any name, at any time."""
    draw = random.Random("meddler")
    with httpx.Client(base_url=world.url, timeout=TIMEOUT_S, trust_env=False) as client:
        while not world.stop.is_set():
            name = draw.choice(NAMES)
            path, body = draw.choice(
                [
                    ("/v1/adapters/merge", {"mode": name}),
                    ("/v1/adapters/merge", {"mode": "auto"}),
                    ("/v1/adapters/merge", {"mode": "never"}),
                    (f"/v1/adapters/{name}/pin", {}),
                    (f"/v1/adapters/{name}/unpin", {}),
                    (f"/v1/adapters/{name}/unpin", {}),
                    ("/v1/adapters/rescan", {}),
                ]
            )
            reply = client.post(path, json=body)
            # A pin that would leave no room for others is refused.
            if reply.status_code not in ALLOWED | {400}:
                world.faults.append(f"meddler {path}: {reply.status_code} {reply.text[:200]}")
            if client.get("/v1/adapters").status_code != 200:
                world.faults.append("no list of adapters")
            time.sleep(draw.uniform(0, 0.05))


def num_answered(world: World) -> int:
    return world.codes[200] + world.codes["streamed"]


def run_for(world: World, seconds: float, fewest: int) -> None:
    """So long, and on a slow machine up to five times, until so many answers have come."""
    with ThreadPoolExecutor(CLIENTS + ADMINS + 1) as pool:
        jobs: list[Callable] = [pool.submit(ask, world, i) for i in range(CLIENTS)]
        jobs += [pool.submit(administer, world, i) for i in range(ADMINS)]
        jobs.append(pool.submit(meddle, world))
        time.sleep(seconds)
        latest = time.monotonic() + 4 * seconds
        while num_answered(world) < fewest and not world.faults and time.monotonic() < latest:
            time.sleep(0.2)
        world.stop.set()
        for job in jobs:
            job.result(TIMEOUT_S + 15)


@pytest.mark.timeout(420)
@pytest.mark.parametrize(
    ("seconds", "fewest"), [(12, 150), pytest.param(60, 2000, marks=pytest.mark.slow)]
)
def test_every_answer_is_of_one_version_that_was_ready(world, seconds, fewest):
    world.stop.clear()
    world.codes.clear()
    run_for(world, seconds, fewest)
    assert world.faults == [], (len(world.faults), world.codes, world.faults[:5])
    assert num_answered(world) >= fewest, world.codes
    assert world.codes["admin 200"] > fewest / 10
    for kind in (404, "left", "admin 404", "admin 409"):
        assert world.codes[kind] > 0, world.codes
    print(dict(world.codes))
    with httpx.Client(base_url=world.url, timeout=TIMEOUT_S, trust_env=False) as client:
        client.post("/v1/adapters/merge", json={"mode": "never"})
        deadline = time.monotonic() + 10
        while any(a["num_leases"] for a in client.get("/v1/adapters").json()["data"]):
            assert time.monotonic() < deadline, "a lease was lost"
            time.sleep(0.05)
        body = {"prompt": world.prompts[0], "temperature": 0, "max_tokens": MAX_TOKENS}
        reply = client.post("/v1/completions", json=body | {"ignore_eos": True})
        assert reply.json()["choices"][0]["text"] == world.answers[None, 0]
        for name in NAMES:  # nothing hangs, nothing stays
            with contextlib.suppress(httpx.HTTPStatusError):
                body = {"lora_name": name, "timeout_s": 1}
                client.post("/v1/unload_lora_adapter", json=body).raise_for_status()
        left = client.get("/v1/adapters").json()
        assert left["data"] == []
        assert left["memory"]["host"]["used"] == left["memory"]["device"]["adapters"] == 0


def test_pool_is_not_mistaken_for_an_adapter(world):
    with httpx.Client(base_url=world.url, trust_env=False) as client:
        assert client.post("/v1/adapters/rescan", json={}).json()["failed"] == {}
