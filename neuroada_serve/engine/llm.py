"""The offline front door: one model, its adapters, and batches of prompts from Python."""

import os
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import fields
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

from neuroada_serve.adapters.format import Adapter
from neuroada_serve.adapters.preload import preload as preload_all
from neuroada_serve.config import EngineConfig
from neuroada_serve.engine.arguments import (
    AdapterChoice,
    Folder,
    Prompt,
    adapter_list,
    adapter_name,
    adapters_by_name,
    conversation_list,
    params_list,
    prompt_list,
)
from neuroada_serve.engine.engine import Engine
from neuroada_serve.engine.offline import pooled_output, request_output, run_batch
from neuroada_serve.engine.progress import UseTqdm
from neuroada_serve.errors import UsageError
from neuroada_serve.model.loader import BaseModel, find_device, load_base
from neuroada_serve.model.prompt import Message, encode_chat, encode_text
from neuroada_serve.model.source import ModelSource, Notify, resolve_model
from neuroada_serve.ops import cpu_forward
from neuroada_serve.request import (
    CLASSIFY,
    ClassifyOutput,
    Output,
    RequestOutput,
    SamplingParams,
)

OnProgress = Callable[[str, int, int], None]
_MOST_NAMED = 5  # folders that messages name


class LLM:
    """One base model serving many adapters, offline.

        llm = LLM("demo", adapters={"sql": "examples/adapters/sql"})
        outs = llm.generate(prompts, SamplingParams(temperature=0), adapters=["sql", None])

    Args:
        model: a local folder, a `.gguf` file, `demo`, or a hub id.
        adapters: name -> adapter folder, or an Adapter in memory; or a list of folders, each under
            its own name.
        adapter_dir: serve every adapter folder in it under its folder's name. They are known by
            their headers, and read when they are first asked for, or now with `preload`.
        notify: told in a sentence about work that takes a while (a download, a conversion).
        on_progress: told (what, done, total) while adapters are looked at or read.
        config: the fields of EngineConfig: dtype, device, max_num_seqs, max_model_len, merge, ...

    Raises:
        UsageError: its subclasses name what is wrong with the model or an adapter.
        TypeError: EngineConfig has no such field.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        adapters: Mapping[str, Folder | Adapter] | Iterable[Folder] | None = None,
        *,
        adapter_dir: Folder | None = None,
        preload: bool = False,
        notify: Notify = lambda message: None,
        on_progress: OnProgress = lambda what, done, total: None,
        **config: Any,
    ) -> None:
        if unknown := sorted(config.keys() - {field.name for field in fields(EngineConfig)}):
            raise TypeError(f"LLM() got an unexpected keyword argument {unknown[0]!r}")
        if not isinstance(model, str | os.PathLike):
            raise UsageError(f"model must be a name or a path, not {type(model).__name__}")
        engine_config = EngineConfig(**config)
        named = adapters_by_name(adapters)
        base = _load(resolve_model(os.fspath(model), notify), engine_config, notify)
        self.engine = Engine(base, engine_config)
        if self.engine.rotation is not None:
            notify(self.engine.rotation)
        for name, adapter in named.items():
            self.load_adapter(name, adapter)
        if adapter_dir is not None:
            rooms = self.engine.adapters
            look = partial(on_progress, "Looking at adapters")
            failed = dict(rooms.open_directory(Path(adapter_dir), look).failed)
            if preload:
                read = partial(on_progress, "Reading adapters")
                failed |= preload_all(rooms.store, rooms.tiers, read)
            for name in sorted(failed)[:_MOST_NAMED]:
                notify(f"{name} is not served: {failed[name]}")
            if len(failed) > _MOST_NAMED:
                notify(f"{len(failed) - _MOST_NAMED} more folders are not served.")
        if engine_config.merge not in ("never", "auto", *self.adapters):
            raise UsageError(
                f"merge must be never, auto or the name of an adapter, got {engine_config.merge!r}"
            )
        self._num_requests = 0

    # --- adapters ----------------------------------------------------------------------------

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the loaded adapters."""
        return self.engine.adapters.store.names

    @property
    def merged(self) -> str | None:
        """Name of the merged adapter; None if none is."""
        return self.engine.merged

    def load_adapter(self, name: str, adapter: Folder | Adapter, replace: bool = False) -> None:
        """Load an adapter folder under a name.

        Raises:
            AdapterError: its subclasses say what is wrong; nothing has changed then.
            UsageError: these are no name and no folder.
        """
        if not isinstance(name, str):
            raise UsageError(f"an adapter's name must be a text, not {type(name).__name__}")
        if not isinstance(adapter, str | os.PathLike | Adapter):
            raise UsageError(
                f"adapter {name!r} must be a folder or an Adapter, not {type(adapter).__name__}"
            )
        adapters = self.engine.adapters
        if isinstance(adapter, Adapter):
            adapters.check(adapter)
            adapters.add_resident(name, adapter, replace)
        else:
            adapters.load(name, adapter, replace=replace)
            adapters.bring_in(name)

    def unload_adapter(self, name: str) -> None:
        """Unload an adapter; unmerge it first if it is merged."""
        self.engine.adapters.remove(name)

    def merge(self, adapter: str | Mapping[str, float]) -> None:
        """Write an adapter, or a mix, into the weights, swapping out a merged one."""
        self.engine.adapters.merging.merge(adapter_name(adapter))

    def unmerge(self) -> None:
        """Restore the base weights, bit for bit."""
        self.engine.adapters.merging.unmerge()

    def base_digest(self) -> str:
        """Return the sha256 of the weights as they are now: the base's own while nothing is
        merged."""
        return self.engine.base_digest()

    # --- generation --------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Seq[Prompt],
        sampling_params: SamplingParams | Seq[SamplingParams] | None = None,
        adapters: AdapterChoice | Seq[AdapterChoice] = None,
        *,
        use_tqdm: UseTqdm = True,
        on_output: Callable[[Output], None] | None = None,
    ) -> list[RequestOutput]:
        """Answer prompts, all in one continuous batch.

        Args:
            prompts: texts, lists of token ids, {"prompt": text} or {"prompt_token_ids": ids}; a
                single one is a batch of one.
            sampling_params: for all prompts, or one per prompt; default SamplingParams().
            adapters: for all prompts, or one per prompt; None is the base, {"sql": 0.7,
                "json": 0.3} or "sql:0.7+json:0.3" the weighted sum of two.
            use_tqdm: draw a progress bar with the speed, where stderr is a terminal or in a
                notebook, and without on_output; or something to call like `tqdm` for a bar.
            on_output: sees every output as it comes.

        Returns:
            One RequestOutput per prompt, in order.

        Raises:
            UsageError: a prompt, parameter or adapter is wrong; nothing was generated.
        """
        texts, ids = self._encoded(prompts)
        return self._run(ids, texts, sampling_params, adapters, use_tqdm, on_output)

    def chat(
        self,
        messages: Seq[Message] | Seq[Seq[Message]],
        sampling_params: SamplingParams | Seq[SamplingParams] | None = None,
        adapters: AdapterChoice | Seq[AdapterChoice] = None,
        *,
        use_tqdm: UseTqdm = True,
        on_output: Callable[[Output], None] | None = None,
    ) -> list[RequestOutput]:
        """Answer conversations through the base's chat template; otherwise like `generate`.

        Args:
            messages: lists of {"role", "content"}; a single one is a batch of one.
        """
        batch = conversation_list(messages)
        ids = [encode_chat(self.engine.base, conversation) for conversation in batch]
        return self._run(ids, [None] * len(ids), sampling_params, adapters, use_tqdm, on_output)

    def classify(
        self,
        prompts: Prompt | Seq[Prompt],
        adapters: AdapterChoice | Seq[AdapterChoice],
        *,
        use_tqdm: UseTqdm = True,
    ) -> list[ClassifyOutput]:
        """Classify prompts, all in one batch.

        Args:
            prompts: as for `generate`.
            adapters: adapters of task_type SEQ_CLS, for all prompts or one per prompt.
            use_tqdm: as for `generate`.

        Raises:
            UsageError: a prompt is wrong, or an adapter is not a classifier.
            EngineError: a classifier gave no numbers.
        """
        return [
            ClassifyOutput(prompt, str(o.adapter), o.task.labels, o.values, o.adapter_digest)
            for prompt, o in self._pool(prompts, adapters, CLASSIFY, use_tqdm)
        ]

    def _pool(
        self,
        prompts: Prompt | Seq[Prompt],
        adapters: AdapterChoice | Seq[AdapterChoice],
        params: SamplingParams,
        use_tqdm: UseTqdm,
    ) -> list[tuple[tuple[int, ...], Output]]:
        """Return each prompt's token ids with the one output of its adapter's task."""
        _, ids = self._encoded(prompts)
        names = adapter_list(adapters, len(ids))
        collected = self._collect(ids, [params] * len(ids), names, use_tqdm, None)
        return [(tuple(p), pooled_output(o)) for p, o in zip(ids, collected, strict=True)]

    def _encoded(self, prompts: Prompt | Seq[Prompt]) -> tuple[list[str | None], list[list[int]]]:
        """Return the texts, if given, and the token ids of prompts."""
        batch = prompt_list(prompts)
        base = self.engine.base
        ids = [encode_text(base, text or "") if ids is None else ids for text, ids in batch]
        return [text for text, _ in batch], ids

    def _collect(
        self,
        prompts: Seq[Seq[int]],
        params: Seq[SamplingParams],
        adapters: Seq[str | None],
        use_tqdm: UseTqdm,
        on_output: Callable[[Output], None] | None,
    ) -> list[list[Output]]:
        """Return all outputs of each prompt's request."""
        request_ids = [f"llm-{self._num_requests + i}" for i in range(len(prompts))]
        self._num_requests += len(prompts)
        requests = list(zip(request_ids, prompts, params, adapters, strict=True))
        return run_batch(self.engine, requests, use_tqdm, on_output)

    def _run(
        self,
        prompts: Seq[Seq[int]],
        texts: Seq[str | None],
        params: SamplingParams | Seq[SamplingParams] | None,
        adapters: AdapterChoice | Seq[AdapterChoice],
        use_tqdm: UseTqdm,
        on_output: Callable[[Output], None] | None,
    ) -> list[RequestOutput]:
        each_params = params_list(params, len(prompts))
        each_adapter = adapter_list(adapters, len(prompts))
        collected = self._collect(prompts, each_params, each_adapter, use_tqdm, on_output)
        each = zip(collected, texts, prompts, each_params, each_adapter, strict=True)
        return [request_output(*one) for one in each]


def _load(source: ModelSource, config: EngineConfig, notify: Notify) -> BaseModel:
    """Load a base, and compile the CPU's kernels meanwhile."""
    kernels = Thread(target=cpu_forward.prepare, daemon=True)
    if find_device(config.device).type == "cpu":
        kernels.start()
    base = load_base(
        source, config.dtype, config.device, config.max_model_len, config.chat_template
    )
    if base.device.type == "cpu":
        kernels.join(timeout=1)
        if kernels.is_alive():
            notify("Waiting for the CPU kernels; only the first start compiles them.")
        kernels.join()
    return base
