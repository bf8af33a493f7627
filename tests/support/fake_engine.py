"""An engine without a model: every adapter answers with its own name, one byte a step."""

import hashlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from neuroada_serve.adapters.directory import Rescan
from neuroada_serve.adapters.format import CONFIG_FILE, BaseSpec
from neuroada_serve.adapters.store import parse_mix
from neuroada_serve.config import EngineConfig
from neuroada_serve.engine.adapter_manager import AdapterInfo
from neuroada_serve.engine.fairness import FairQueue
from neuroada_serve.errors import (
    AdapterConflictError,
    AdapterError,
    AdapterFormatError,
    AdapterInUseError,
    AdapterNotFoundError,
    NeuroAdaError,
    RequestError,
    UsageError,
)
from neuroada_serve.metrics import EngineMetrics
from neuroada_serve.model.loader import BaseModel
from neuroada_serve.request import FinishReason, Output, SamplingParams, TokenLogprob
from neuroada_serve.wakeup import Wakeup

BASE = "tiny/base"  # served names may hold a slash
SINCE = 1_700_000_000


def digest_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


class ByteTokenizer:
    """A token is a byte of UTF-8."""

    chat_template = "yes"

    def __call__(self, text: str, add_special_tokens: bool = True) -> "ByteTokenizer":
        encoding = ByteTokenizer()
        encoding.input_ids = list(text.encode())
        return encoding

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode()

    def apply_chat_template(self, messages: list[dict[str, str]], **options: bool) -> str:
        return "".join(f"<{m['role']}>{m['content']}" for m in messages)


# --- adapters --------------------------------------------------------------------------------


@dataclass(eq=False)
class FakeVersion:
    name: str
    digest: str
    state: str = "ready"
    num_leases: int = 0
    is_pinned: bool = False


@dataclass(frozen=True)
class FakeLease:
    """One version, or those that a mix has."""

    digest: str
    parts: tuple[FakeVersion, ...]
    changed: threading.Condition

    def release(self) -> None:
        with self.changed:
            for version in self.parts:
                version.num_leases -= 1
            self.changed.notify_all()


class FakeMerging:
    """Takes effect with the next poll."""

    def __init__(self, adapters: "FakeAdapters", wakeup: Wakeup) -> None:
        self.mode = "never"
        self.merged: str | None = None
        self._adapters = adapters
        self._wakeup = wakeup

    def set_mode(self, mode: str) -> None:
        if mode not in ("never", "auto"):
            self._adapters.get(mode)
        self.mode = mode
        self._wakeup.notify()


@dataclass(frozen=True)
class Call:
    """One of the calls that were made, and the thread that made it."""

    what: str
    name: str | None
    thread: str


class FakeAdapters:
    """Names, digests and leases, its own store; in any thread.

    A folder's config is one word for what it is: good, slow (good, once `may_read` is set), bad,
    locked, crash; and any more text, so that digests differ. There is room for one pinned adapter.
    `directory` is looked at by `rescan`; `poll` is what the engine's thread has to do.
    """

    def __init__(self, names: Sequence[str], wakeup: Wakeup) -> None:
        self.versions = {name: FakeVersion(name, digest_of(name)) for name in names}
        self.base_names = {BASE}
        self.directory: Path | None = None
        self.store = self
        self.merging = FakeMerging(self, wakeup)
        self.may_read = threading.Event()
        self.calls: list[Call] = []
        self._changed = threading.Condition()  # guards the versions
        self._scanned: set[str] = set()
        self._to_abort: list[FakeVersion] = []
        self._wakeup = wakeup

    def threads_of(self, what: str) -> set[str]:
        """Names of the threads that made these calls."""
        return {call.thread for call in self.calls if call.what == what}

    # --- any thread ---

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, v in self.versions.items() if v.state == "ready")

    def reserve(self, names: Sequence[str]) -> None:
        if taken := set(names) & self.versions.keys():
            raise AdapterConflictError(f"{taken} is to be the base's name, and is an adapter's")
        self.base_names |= set(names)

    def describe(self) -> list[AdapterInfo]:
        self._record("describe")
        with self._changed:
            return sorted(map(self._info, self.versions.values()), key=lambda info: info.name)

    def describe_one(self, name: str) -> AdapterInfo:
        return self._info(self.get(name))

    def memory(self) -> Mapping[str, Mapping[str, int]]:
        return {"device": {"used": 1, "size": 2, "adapters": len(self.versions)}}

    def prefetch(self, name: str | None) -> None:
        self._record("prefetch", name)
        if name is not None:
            self.acquire(name).release()

    def load(self, name: str, path: Path, root: Path, replace: bool = False) -> None:
        self._record("load", name)
        assert path.is_relative_to(root.resolve())
        digest = self._read(path)
        with self._changed:
            old = self.versions.get(name)
            if old is not None and old.digest == digest:
                return
            if name in self.base_names:
                raise AdapterConflictError(f"{name!r} is the base model's name")
            if old is not None and not replace:
                raise AdapterConflictError(f"an adapter named {name!r} is already loaded")
            self.versions[name] = FakeVersion(name, digest)

    def unload(self, name: str, timeout_s: float = 0.0, abort: bool = False) -> None:
        self._record("unload", name)
        with self._changed:
            version = self.get(name)
            version.state = "draining"
            if not self._wait_unleased(version, timeout_s):
                if abort:
                    self._to_abort.append(version)
                    self._wakeup.notify()
                if not abort or not self._wait_unleased(version, max(timeout_s, 1.0)):
                    version.state = "ready"
                    raise AdapterInUseError(name, version.num_leases)
            del self.versions[name]

    def pin(self, name: str, pinned: bool = True) -> None:
        self._record("pin" if pinned else "unpin", name)
        version = self.get(name)
        if pinned and any(v.is_pinned for v in self.versions.values() if v is not version):
            raise AdapterError(f"pinning {name!r} would leave no room for others")
        version.is_pinned = pinned

    def rescan(self) -> Rescan:
        self._record("rescan")
        if self.directory is None:
            raise UsageError("there is no adapter directory; start with --adapter-dir")
        folders = {path.name: path for path in self.directory.iterdir() if path.is_dir()}
        found: dict[str, FakeVersion] = {}
        failed: dict[str, str] = {}
        for name, folder in sorted(folders.items()):
            try:
                found[name] = FakeVersion(name, self._read(folder))
            except (NeuroAdaError, OSError) as error:
                failed[name] = str(error)
        with self._changed:
            before = self.versions
            added = tuple(name for name in found if name not in before)
            again = [name for name in found if name in before]
            replaced = tuple(n for n in again if found[n].digest != before[n].digest)
            removed = tuple(sorted(self._scanned - folders.keys()))
            for name in removed:
                del self.versions[name]
            self.versions |= {name: found[name] for name in (*added, *replaced)}
        self._scanned = set(found)
        return Rescan(added, replaced, removed, len(again) - len(replaced), failed)

    # --- the engine's thread ---

    def poll(self) -> list[FakeVersion]:
        """Bring the merge about; versions whose requests are to be aborted."""
        mode = self.merging.mode
        self.merging.merged = mode if mode in self.versions else None
        to_abort, self._to_abort = self._to_abort, []
        return to_abort

    def acquire(self, name: str | None) -> FakeLease:
        with self._changed:
            names = [] if name is None else list(parse_mix(name) or (name,))
            parts = tuple(map(self.get, names))
            for version in parts:
                version.num_leases += 1
        digest = parts[0].digest if len(parts) == 1 else digest_of(str(name))
        return FakeLease(digest, parts, self._changed)

    # --- inside ---

    def _record(self, what: str, name: str | None = None) -> None:
        self.calls.append(Call(what, name, threading.current_thread().name))

    def _read(self, folder: Path) -> str:
        file = folder / CONFIG_FILE
        if not file.is_file():
            raise AdapterNotFoundError(f"no adapter directory {str(folder)!r}")
        text = file.read_text()
        kind = text.split()[0]
        if kind == "slow":
            assert self.may_read.wait(120)
        elif kind == "locked":
            raise PermissionError(13, "Permission denied", str(file))
        elif kind == "crash":
            raise RuntimeError("a secret of the server")
        elif kind != "good":
            raise AdapterFormatError(repr(folder.name), ["k is 0", "values are NaN"])
        return digest_of(text)

    def get(self, name: str) -> FakeVersion:
        version = self.versions.get(name)
        if version is None or version.state != "ready":
            raise AdapterNotFoundError(f"no adapter named {name!r}; adapters here: none is loaded")
        return version

    def _info(self, version: FakeVersion) -> AdapterInfo:
        return AdapterInfo(
            name=version.name,
            digest=version.digest,
            state=version.state,
            tier="device" if version.is_pinned else "disk",
            k=1,
            nnz=7,
            size_bytes=14,
            num_leases=version.num_leases,
            is_pinned=version.is_pinned,
            is_merged=version.name == self.merging.merged,
            since=SINCE,
        )

    def _wait_unleased(self, version: FakeVersion, timeout_s: float) -> bool:
        return self._changed.wait_for(lambda: not version.num_leases, timeout_s)


# --- the engine ------------------------------------------------------------------------------


@dataclass(eq=False)
class FakeSequence:
    request_id: str
    index: int
    prompt: bytes
    params: SamplingParams
    adapter: str | None
    answer: bytes
    lease: FakeLease
    tenant: str = ""
    cache_salt: str = ""
    client: str = ""
    num_cached: int = 0
    num_sent: int = 0


class FakeEngine:
    """Answers with the adapter's name, then stops; with ignore_eos it repeats the name until
    max_tokens. Its queue is the real one.

    The prompt "poison" fails its request, "poison later" after two tokens, "absent" for want of an
    adapter. A prompt that its tenant has sent before, with the same adapter and salt, is cached but
    for its last token. `dies` makes its next step raise.
    """

    def __init__(self, adapters: Sequence[str] = ("sql", "pirate"), max_num_seqs: int = 4) -> None:
        self.base = BaseModel(
            model=None,
            tokenizer=ByteTokenizer(),
            spec=BaseSpec(BASE, "0" * 64, {}),
            path=Path("/secret/base"),
            dtype=torch.float32,
            device=torch.device("cpu"),
            eos_token_ids=frozenset({0}),
            max_model_len=1_000_000,
            vocab_size=256,
        )
        self.config = EngineConfig(max_num_seqs=max_num_seqs)
        self.max_model_len = self.base.max_model_len
        self.wakeup = Wakeup()
        self.adapters = FakeAdapters(adapters, self.wakeup)
        self.metrics = EngineMetrics()
        self.dies = False
        self.running: list[FakeSequence] = []
        self.waiting: FairQueue[FakeSequence] = FairQueue()
        self.ended: list[Output] = []
        self.requests: list[FakeSequence] = []
        self.num_polls = 0
        self._seen: set[tuple[str, str, str | None, bytes]] = set()

    @property
    def num_running(self) -> int:
        return len(self.running)

    @property
    def num_waiting(self) -> int:
        return len(self.waiting)

    @property
    def present(self) -> list[FakeSequence]:
        return [*self.running, *self.waiting]

    @property
    def num_leases(self) -> int:
        return sum(version.num_leases for version in self.adapters.versions.values())

    @property
    def has_unfinished(self) -> bool:
        self.num_polls += 1
        return bool(self.running or self.waiting or self.ended)

    def make_place(
        self, tenant: str, adapter: str | None, max_waiting: int, client: str = ""
    ) -> bool:
        self._on_own_thread()
        num_free = self.config.max_num_seqs - self.num_running
        return self.waiting.admits(tenant, adapter, max_waiting + num_free, client)

    def add_requests(
        self,
        request_ids: Sequence[str],
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        adapter: str | None = None,
        tenant: str = "",
        cache_salt: str = "",
        client: str = "",
    ) -> None:
        self._on_own_thread()
        if any(len(prompt) > 100 for prompt in prompts):
            raise RequestError("your prompt contains over 100 tokens", "prompt")
        answer = (adapter or "base").encode()
        if params.ignore_eos:
            answer = answer * 1000
        if params.max_tokens is not None:
            answer = answer[: params.max_tokens]
        for request_id, prompt in zip(request_ids, map(bytes, prompts), strict=True):
            key = (tenant, cache_salt, adapter, prompt)
            num_cached = len(prompt) - 1 if key in self._seen else 0
            self._seen.add(key)
            for index in range(params.n):
                sequence = FakeSequence(
                    request_id,
                    index,
                    prompt,
                    params,
                    adapter,
                    answer,
                    self.adapters.acquire(adapter),
                    tenant,
                    cache_salt,
                    client,
                    num_cached,
                )
                self.waiting.add(sequence)
                self.requests.append(sequence)

    def abort(self, request_id: str) -> None:
        self._on_own_thread()
        self._abort([s for s in self.present if s.request_id == request_id])

    def step(self, early: Callable[[list[Output]], None] | None = None) -> list[Output]:
        self._on_own_thread()
        time.sleep(0.001)
        if self.dies and self.present:
            raise RuntimeError("a secret of the engine")
        for version in self.adapters.poll():
            self._abort([s for s in self.present if version in s.lease.parts])
        while self.waiting and len(self.running) < self.config.max_num_seqs:
            first = self.waiting.heads()[0]
            self.waiting.take(first)
            self.running.append(first)
        outputs, self.ended = self.ended, []
        for sequence in list(self.running):
            output = self._next(sequence)
            if output.finished:
                self._end(sequence)
            outputs.append(output)
        return outputs

    def _abort(self, sequences: Sequence[FakeSequence]) -> None:
        for sequence in sequences:
            self.ended.append(self._output(sequence, "", FinishReason.ABORT))
            self._end(sequence)

    def _end(self, sequence: FakeSequence) -> None:
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.take(sequence)
        self.waiting.leave(sequence)
        sequence.lease.release()

    def _next(self, sequence: FakeSequence) -> Output:
        if sequence.prompt == b"absent":
            error = f"adapter {sequence.adapter!r} cannot be used now"
            return self._output(sequence, "", FinishReason.ERROR, error=error, may_retry=True)
        if sequence.prompt == b"poison" or (
            sequence.prompt == b"poison later" and sequence.num_sent == 2
        ):
            return self._output(sequence, "", FinishReason.ERROR, error="non-finite logits")
        if sequence.num_sent == 0:
            self.metrics.num_prompt_tokens += len(sequence.prompt)
        self.metrics.num_output_tokens += 1
        token = chr(sequence.answer[sequence.num_sent])
        sequence.num_sent += 1
        if token in sequence.params.stop_strings:
            return self._output(sequence, "", FinishReason.STOP, stop_reason=token)
        if sequence.num_sent < len(sequence.answer):
            return self._output(sequence, token)
        limit = sequence.params.max_tokens
        at_limit = limit is not None and sequence.num_sent >= limit
        return self._output(sequence, token, FinishReason.LENGTH if at_limit else FinishReason.STOP)

    def _output(
        self,
        sequence: FakeSequence,
        text: str,
        reason: FinishReason | None = None,
        stop_reason: str | None = None,
        error: str | None = None,
        may_retry: bool = False,
    ) -> Output:
        params = sequence.params

        def score(token: str, num_top: int) -> TokenLogprob:
            top = ((ord(token), token, -0.5), (0, "?", float("-inf")))[:num_top]
            return TokenLogprob(ord(token), token, -0.5, top, max(0, sequence.num_sent - 1))

        logprobs: list[TokenLogprob] = []
        if text and params.logprobs is not None:
            logprobs = [score(text, params.logprobs)]
        prompt_logprobs: list[TokenLogprob] = []
        if sequence.num_sent == 1 and params.prompt_logprobs is not None:
            prompt_logprobs = [score(chr(b), params.prompt_logprobs) for b in sequence.prompt[1:]]
        return Output(
            sequence.request_id,
            sequence.index,
            text,
            tuple(text.encode()),
            tuple(logprobs),
            prompt_logprobs=tuple(prompt_logprobs),
            finish_reason=reason,
            stop_reason=stop_reason,
            error=error,
            may_retry=may_retry,
            adapter=sequence.adapter,
            adapter_digest=None if sequence.adapter is None else sequence.lease.digest,
            num_cached_tokens=sequence.num_cached,
            num_prompt_tokens=len(sequence.prompt),
            num_output_tokens=sequence.num_sent,
        )

    def _on_own_thread(self) -> None:
        assert threading.current_thread().name == "engine"
