"""`neuroada chat`: a conversation in the terminal with the base or any of its adapters."""

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from neuroada_serve.cli.common import (
    GREEDY,
    Adapters,
    MaxTokens,
    Model,
    Plain,
    Seed,
    Temperature,
    adapters_of,
    command,
    for_good,
    notify,
    print_error,
)
from neuroada_serve.cli.flags import Only
from neuroada_serve.config import EngineConfig, ServerConfig
from neuroada_serve.errors import AdapterNotFoundError, UsageError
from neuroada_serve.request import FinishReason, Output, SamplingParams

if TYPE_CHECKING:
    from neuroada_serve.engine.llm import LLM

BASE = "base"
_HELP = """\
/use NAME       answer with an adapter from now on; a mix: /use sql:0.7+json:0.3; /use base
/adapters       list the adapters
/system [TEXT]  set the system message; without TEXT remove it
/undo           remove the last message and its answer
/clear          begin a new conversation
/help           show this
/quit           leave, as does Ctrl-D
Ctrl-C stops an answer. A line that ends with \\ goes on in the next."""


@command
def chat(
    model: Model,
    *,
    adapter: Adapters = None,
    server: Annotated[ServerConfig, Only("adapter_dir")],
    engine: Annotated[EngineConfig, Only("dtype", "chat_template")],
    system: Annotated[str, typer.Option(help="System message.")] = "",
    max_tokens: MaxTokens = 512,
    temperature: Temperature = GREEDY,
    seed: Seed = None,
    plain: Plain = False,
) -> None:
    """Talk to the base and its adapters in the terminal.

    The first --adapter answers until /use NAME chooses another; /help lists what else there is.
    Without a terminal, every line of stdin is a message.
    """
    params = SamplingParams(temperature=temperature, max_tokens=max_tokens, seed=seed)
    adapters = adapters_of(adapter, reserved=[BASE])
    with for_good():
        from neuroada_serve.engine.llm import LLM

        llm = LLM(
            model,
            adapters,
            adapter_dir=server.adapter_dir,
            notify=notify,
            **vars(replace(engine, max_num_seqs=1)),
        )
    conversation = Conversation(llm, params, system, plain)
    if adapters:
        conversation.use(next(iter(adapters)))
    if conversation.is_plain and not plain:
        notify(f"{llm.engine.base.spec.name} has no chat template: it continues each line as text.")
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if is_terminal:
        names = ", ".join(llm.adapters[:20]) + (", ..." if len(llm.adapters) > 20 else "")
        notify(f"Adapters: {names or 'none'}. /help lists what can be typed.")
        _edit_lines(llm)
    for text in _typed(conversation) if is_terminal else _piped():
        if not conversation.take(text):
            break


class Conversation:
    """A conversation: its messages, the adapter that answers, and the commands with a slash.

    is_plain: without a chat template; every message is continued as text, without the others.
    """

    def __init__(
        self, llm: "LLM", params: SamplingParams, system: str = "", plain: bool = False
    ) -> None:
        self.adapter: str | None = None
        self.messages: list[dict[str, str]] = []
        self.system = system
        self.is_plain = plain or not llm.engine.base.has_chat_template
        self._llm = llm
        self._params = params

    def take(self, text: str) -> bool:
        """Answer a line, or run it as a command; return False if it ends the conversation."""
        text = text.strip()
        name, _, rest = text.partition(" ")
        try:
            if name in ("/quit", "/exit"):
                return False
            elif name == "/use":
                if not rest:
                    raise UsageError("/use takes the name of an adapter, a mix or base")
                self.use(rest.strip())
                notify(f"{self.adapter or BASE} answers from now on.")
            elif name == "/adapters":
                self._list_adapters()
            elif name == "/system":
                self.system = rest.strip()
                notify("System message set." if self.system else "There is no system message.")
            elif name == "/undo":
                self._undo()
            elif name == "/clear":
                self.messages.clear()
                notify("A new conversation.")
            elif name == "/help":
                notify(_HELP)
            elif name.startswith("/"):
                raise UsageError(f"there is no {name}; /help lists what there is")
            elif text:
                self._answer(text)
        except UsageError as error:
            print_error(f"Error: {error}")
        return True

    def use(self, name: str) -> None:
        """Let an adapter, a mix or the base answer from now on.

        Raises:
            UsageError: there is no adapter of this name, or it does not generate text.
        """
        if name == BASE:
            self.adapter = None
            return
        try:
            lease = self._llm.engine.adapters.store.acquire(name)
        except AdapterNotFoundError as error:
            raise UsageError(f"{error}; `/use {BASE}` for the base alone") from error
        task = lease.version.task
        lease.release()
        if task.pools:
            raise UsageError(f"{name} is a {task.noun}; `{task.command}` asks it")
        self.adapter = name

    def _list_adapters(self) -> None:
        for name in (BASE, *self._llm.adapters):
            mark = "*" if name == (self.adapter or BASE) else " "
            notify(f"{mark} {name}")
        if self.adapter is not None and self.adapter not in self._llm.adapters:
            notify(f"* {self.adapter}")

    def _undo(self) -> None:
        if not self.messages:
            notify("There is no message to remove.")
            return
        notify(f"Removed: {self.messages[-2]['content']}")
        del self.messages[-2:]

    def _answer(self, text: str) -> None:
        """Stream an answer; a stopped one is kept in the conversation as far as it came."""
        asked = {"role": "user", "content": text}
        if self.is_plain:
            prompt: Any = text
        else:
            prompt, self.messages = self._prompt([*self.messages, asked])
            self.messages.pop()  # until it is answered
        pieces: list[str] = []
        num_tokens, ending, failed = 0, "", False
        started = time.perf_counter()
        with _interrupts() as is_interrupted:

            def show(output: Output) -> None:
                nonlocal num_tokens, ending, failed
                num_tokens += len(output.token_ids)
                pieces.append(output.text)
                sys.stdout.write(output.text)
                sys.stdout.flush()
                if output.finish_reason is FinishReason.ERROR:
                    ending, failed = f"; it failed: {output.error}", True
                elif output.finish_reason is FinishReason.LENGTH:
                    ending = f"; {self._limit(output)}"
                if is_interrupted() and not output.finished:
                    raise _Stopped

            try:
                self._llm.generate([prompt], self._params, self.adapter, on_output=show)
            except _Stopped:
                ending = "; stopped"
        print(flush=True)
        elapsed_s = time.perf_counter() - started
        speed = num_tokens / elapsed_s
        notify(f"[{num_tokens} tokens in {elapsed_s:.1f} s, {speed:.0f} tokens/s{ending}]")
        if not self.is_plain and not failed:
            self.messages += [asked, {"role": "assistant", "content": "".join(pieces).strip()}]

    def _limit(self, output: Output) -> str:
        most = self._llm.engine.max_model_len
        if output.num_prompt_tokens + output.num_output_tokens >= most:
            return f"the context of {most} tokens is full"
        return f"cut at --max-tokens {self._params.max_tokens}"

    def _prompt(
        self, messages: list[dict[str, str]]
    ) -> tuple[dict[str, list[int]], list[dict[str, str]]]:
        """Return the prompt and the messages in it, without the oldest if they leave no room for an
        answer.

        Raises:
            UsageError: the last message does not fit by itself, or the template refuses them.
        """
        from neuroada_serve.model.prompt import encode_chat

        base, most = self._llm.engine.base, self._llm.engine.max_model_len
        room = min(self._params.max_tokens or most, most // 4)
        system = [{"role": "system", "content": self.system}] if self.system else []
        kept = messages
        ids = encode_chat(base, [*system, *kept])
        while len(ids) > most - room and len(kept) > 1:
            kept = kept[2:]
            ids = encode_chat(base, [*system, *kept])
        if len(ids) >= most:
            raise UsageError(f"this message has {len(ids)} tokens, the model takes {most} at most")
        if left_out := (len(messages) - len(kept)) // 2:
            notify(
                f"The context of {most} tokens is full: the oldest {left_out} of your messages and "
                "their answers are left out from now on."
            )
        return {"prompt_token_ids": ids}, kept


class _Stopped(Exception):
    """Raised when Ctrl-C stops an answer."""


@contextmanager
def _interrupts() -> Iterator[Any]:
    """Yield a function that tells if Ctrl-C was pressed; a second press interrupts at once."""
    pressed: list[int] = []

    def note(number: int, frame: Any) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


def _typed(conversation: Conversation) -> Iterator[str]:
    """Yield the messages that are typed, until Ctrl-D. Ctrl-C empties the line."""
    lines: list[str] = []
    while True:
        try:
            lines.append(input("... " if lines else f"{conversation.adapter or BASE}> "))
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            lines.clear()
            print("\nCtrl-D or /quit leaves.")
            continue
        if not lines[-1].endswith("\\"):
            yield _joined(lines)


def _piped() -> Iterator[str]:
    lines: list[str] = []
    try:
        for line in sys.stdin:
            lines.append(line.rstrip("\n"))
            if not lines[-1].endswith("\\"):
                yield _joined(lines)
    except UnicodeDecodeError:
        raise UsageError("stdin is no UTF-8 text") from None
    if lines:
        yield _joined(lines)


def _joined(lines: list[str]) -> str:
    """Join the lines to one message, and empty the list."""
    text = "\n".join(line.removesuffix("\\") for line in lines)
    lines.clear()
    return text


def _edit_lines(llm: "LLM") -> None:
    """Offer arrow keys, a history, and completion by Tab, if Python has readline."""
    try:
        import readline
    except ImportError:
        return
    words = [line.split()[0] for line in _HELP.splitlines() if line.startswith("/")]

    def complete(start: str, state: int) -> str | None:
        names = (*words, BASE, *llm.adapters)
        return next(iter([n for n in names if n.startswith(start)][state:]), None)

    readline.set_completer_delims(" +")
    readline.set_completer(complete)
    readline.parse_and_bind("tab: complete")
