"""Run the same work on other engines, PEFT and vLLM, in processes of their own.

A peer is a script (`peer_peft.py`, `peer_vllm.py`) that loads its model once and then answers
commands, one JSON document per line each way:

    in   {"model", "dtype", "device", "loras": [folder, ...], "lora_rank", "max_num_seqs",
          "max_model_len", "threads", "eager"}
    out  {"ready": true, "versions": {...}, "settings": {...}}
    in   {"prompts": [[id, ...], ...], "adapters": [number or null, ...], "merged", "output_len"}
    out  {"token_s": [[seconds, ...], ...], "wall_s"}     or {"error": "..."}

Every peer has two processes, so that LoRA support does not slow down its base: one without LoRA
answers the base cases, one with all LoRA adapters loaded the others. Between commands a peer's
processes are stopped (SIGSTOP), so that idle work takes no time from the engine whose turn it is:
vLLM's worker polls while idle, and OpenMP threads may spin for a while.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from neuroada_serve.benchmark.cases import Case, Work
from neuroada_serve.benchmark.measure import Timeline
from neuroada_serve.benchmark.workload import MERGED
from neuroada_serve.errors import EngineError

_EXIT_TIMEOUT_S = 20.0
_LOG_TAIL_CHARS = 2000


class PeerProcess:
    """The process of a peer's script, stopped except while it works.

    Args:
        command: the interpreter and the script.
        setup: its first line of input.
        environment: its whole environment.

    Raises:
        EngineError: it ended, or answered with an error; contains the end of its log.
    """

    def __init__(
        self, command: Sequence[str], setup: Mapping[str, Any], environment: Mapping[str, str]
    ) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed in `close`)
        # A process group of its own, in our session: signals reach the processes that the peer
        # starts, and should we die the kernel wakes and ends a stopped group.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=dict(environment),
            text=True,
            process_group=0,
        )
        try:
            self.ready = self.ask(setup)
        except BaseException:
            self.close()
            raise

    def ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Send one line and return the answer; the process runs for that time only."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        self._signal(signal.SIGSTOP)
        answer: dict[str, Any] = json.loads(line) if line else {"error": "it ended"}
        if "error" in answer:
            raise EngineError(f"a peer failed: {answer['error']}\n{self._log_tail()}")
        return answer

    def close(self) -> None:
        """Let the process end; kill it after a while."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._signal(signal.SIGCONT)
        with suppress(BrokenPipeError):
            self._process.stdin.close()  # its end of input
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_EXIT_TIMEOUT_S)
        self._signal(signal.SIGKILL)  # and the processes it started
        self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):  # it has ended, with all it started
            os.killpg(self._process.pid, number)

    def _log_tail(self) -> str:
        self._log.seek(0)
        return self._log.read()[-_LOG_TAIL_CHARS:]


class Peer:
    """One peer on one model: one process for the base, and one for work with adapters.

    Args:
        name: peft or vllm.
        command: the interpreter and the script.
        setup: first line of input of both processes, without the adapters.
        loras: folders of the LoRA adapters, by number.
        environment: of both processes.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        setup: Mapping[str, Any],
        loras: Sequence[Path],
        environment: Mapping[str, str],
    ) -> None:
        self.name = name
        self._base = PeerProcess(command, {**setup, "loras": []}, environment)
        try:
            folders = [str(folder) for folder in loras]
            self._adapted = PeerProcess(command, {**setup, "loras": folders}, environment)
        except BaseException:
            self._base.close()
            raise

    @property
    def facts(self) -> dict[str, Any]:
        """Versions and settings reported by the processes."""
        return {"base": self._base.ready, "with_adapters": self._adapted.ready}

    def can(self, case: Case) -> bool:
        """Return whether the peer can run a case: vLLM cannot merge, PEFT only for all requests."""
        return case.popularity not in MERGED or (self.name, case.popularity) == ("peft", "merged")

    def run(self, work: Work) -> Timeline:
        on_base = all(number is None for number in work.adapters)
        answer = (self._base if on_base else self._adapted).ask(
            {
                "prompts": work.prompts,
                "adapters": work.adapters,
                "merged": work.merged,
                "output_len": work.output_len,
            }
        )
        lengths = {len(times) for times in answer["token_s"]}
        if lengths != {work.output_len}:
            raise EngineError(f"{self.name} gave {lengths} tokens, not {work.output_len} each")
        return Timeline(
            token_s=tuple(tuple(times) for times in answer["token_s"]),
            wall_s=answer["wall_s"],
            num_prompt_tokens=sum(map(len, work.prompts)),
        )

    def close(self) -> None:
        self._base.close()
        self._adapted.close()


def peer_command(name: str, python: Path | None) -> list[str]:
    """Return the command of a peer: vLLM runs in `python`, PEFT in this interpreter."""
    script = Path(__file__).with_name(f"peer_{name}.py")
    interpreter = sys.executable if python is None or name == "peft" else str(python)
    return [interpreter, str(script)]


def peer_environment(name: str, threads: int, environ: Mapping[str, str]) -> dict[str, str]:
    """Return a peer's environment: as many threads as ours, and vLLM's fastest settings on a CPU.

    VLLM_CPU_KVCACHE_SPACE and VLLM_CPU_OMP_THREADS_BIND keep their values, if they have any.
    """
    environment = {**environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    environment["TOKENIZERS_PARALLELISM"] = "false"
    if name == "vllm":
        environment.pop("GOMP_SPINCOUNT", None)  # set by our command line for our own threads
        # By default vLLM keeps one core free of its worker's threads.
        cores = sorted(os.sched_getaffinity(0))[:threads]
        environment.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))
        environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        environment.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        environment["VLLM_NO_USAGE_STATS"] = "1"
    return environment
