"""The model runner: one forward over a schedule, giving the logits of every sequence that gets a
token."""

import logging
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from neuroada_serve.adapters.bank import AdapterBank, ResidentAdapter
from neuroada_serve.adapters.store import AdapterVersion
from neuroada_serve.config import PROMPT_BLOCK
from neuroada_serve.engine.attention import ATTENTION, PackedStep, PrefillSpan
from neuroada_serve.engine.cpu_decoder import cpu_decoder
from neuroada_serve.engine.cuda_graphs import Capture, DecodeGraphs, DecodeRows, cuda_capture
from neuroada_serve.engine.faults import raise_device_fault
from neuroada_serve.engine.fused import Elementwise, compile_elementwise, use_cpu_kernels
from neuroada_serve.engine.kv_cache import KVCache
from neuroada_serve.engine.scheduler import Schedule
from neuroada_serve.engine.sequence import Sequence
from neuroada_serve.engine.triton_attention import HAS_TRITON
from neuroada_serve.errors import ModelError
from neuroada_serve.model.bypass_linear import BypassContext
from neuroada_serve.model.loader import BaseModel
from neuroada_serve.ops.cpu_forward import Tokens
from neuroada_serve.ops.step_plan import StepPlan

logger = logging.getLogger(__name__)

_ALIGNED = 16  # tensors in one memory begin at multiples, as Triton compiles by their alignment
_ATTENTION_LAYERS = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class PromptLogits:
    """Logits of prompt positions first..first + len(logits) - 1 of a sequence."""

    sequence: Sequence
    first: int
    logits: Tensor  # [num_positions, vocab] float32


@dataclass(frozen=True)
class StepLogits:
    """The logits of one forward.

    sequences: those that get a token now: all decodes, and prefills whose prompt is complete.
    """

    sequences: list[Sequence]
    logits: Tensor  # [num_sequences, vocab] float32
    # [num_sequences, hidden_size], what the output head sees; None where no task pools
    hidden: Tensor | None
    prompts: list[PromptLogits]  # of the sequences that ask for prompt logprobs


class ModelRunner:
    """Run schedules on one model, which is supported, with its KV cache.

    Args:
        resident_of: where the bank has a version that is on the device.
        enforce_eager: run transformers' own forward: on CUDA, neither record graphs nor compile
            elementwise parts; on the CPU, no kernel for whole steps.
        deterministic: compute every token in products and attentions whose shapes depend on its
            own sequence alone; `context` has fixed shapes then. On the CPU.
        capture: how decode steps are recorded; default: as CUDA graphs on CUDA, else not at all.
    """

    def __init__(
        self,
        base: BaseModel,
        bank: AdapterBank,
        context: BypassContext,
        cache: KVCache,
        resident_of: Callable[[AdapterVersion], ResidentAdapter],
        *,
        enforce_eager: bool = False,
        deterministic: bool = False,
        capture: Capture | None = None,
    ) -> None:
        self._base = base
        self._bank = bank
        self._context = context
        self._deterministic = deterministic
        if deterministic:
            _refuse_other_products(base)
        self._resident_of = resident_of
        self.cache = cache
        base.model.set_attn_implementation(ATTENTION)
        if base.device.type == "cpu":
            use_cpu_kernels(base.model)
        self._elementwise: Elementwise | None = None
        if base.device.type == "cuda" and HAS_TRITON and not enforce_eager:
            self._elementwise = compile_elementwise(base.model)
            capture = capture or cuda_capture()
        self.graphs = (
            None
            if capture is None
            else DecodeGraphs(self._decode, base.device, cache.max_slots, capture)
        )
        self._cpu_decoder = (
            cpu_decoder(base.model, bank, cache)
            if base.device.type == "cpu" and not enforce_eager and not deterministic
            else None
        )

    @torch.inference_mode()
    def run(self, schedule: Schedule, merged: AdapterVersion | None) -> StepLogits:
        """Compute one step and advance num_computed of its sequences.

        Args:
            merged: what is in the weights. It, and every adapter of the step, is on the device.
        """
        if self.graphs is not None and not schedule.prefills:
            replayed = self._replay(self.graphs, schedule.decodes, merged)
            if replayed is not None:
                return replayed

        # 1. Lay the tokens of all sequences in one row.
        work = [(s, 1) for s in schedule.decodes]
        work += [(chunk.sequence, chunk.num_tokens) for chunk in schedule.prefills]
        ids: list[int] = []
        slots: list[int] = []
        positions: list[int] = []
        residents: list[ResidentAdapter | None] = []
        spans: list[PrefillSpan] = []
        sampled: list[Sequence] = []
        last_tokens: list[int] = []
        scored: list[tuple[Sequence, int, range]] = []
        for i, (sequence, num_tokens) in enumerate(work):
            assert sequence.slot is not None
            start, past = len(ids), sequence.num_computed
            ids += sequence.next_tokens(num_tokens)
            slots += [sequence.slot] * num_tokens
            positions += range(past, past + num_tokens)
            residents += [self._resident(sequence.version)] * num_tokens
            if i >= len(schedule.decodes):
                spans += self._spans(start, num_tokens, sequence.slot, past)
            if past + num_tokens >= sequence.num_prefill:
                sampled.append(sequence)
                last_tokens.append(len(ids) - 1)
            if sequence.params.prompt_logprobs is not None and not sequence.output_token_ids:
                last = len(sequence.prompt_token_ids) - 1  # nothing of the prompt comes after it
                scored.append((sequence, past, range(start, start + min(num_tokens, last - past))))

        num_decodes = len(schedule.decodes)
        last_tokens += [token for _, _, tokens in scored for token in tokens]
        row_ids, row_slots, row_positions, kept = _on_device(
            self._base.device, ids, slots, positions, last_tokens
        )
        step = PackedStep(
            cache=self.cache,
            slots=row_slots,
            positions=row_positions,
            num_decodes=num_decodes,
            decode_lengths=[position + 1 for position in positions[:num_decodes]],
            prefills=spans,
            one_by_one=self._deterministic,
        )
        in_weights = self._resident(merged)

        # 2. One forward; the output head sees only the tokens that are sampled from or scored.
        pools = any(sequence.task.pools for sequence in sampled)
        seen: list[Tensor] = []
        decoder = self._cpu_decoder
        if (
            decoder is not None
            and decoder.takes(len(ids))
            and not _adds_biases(residents, in_weights)
        ):
            inputs = Tokens(row_ids, step.positions, step.slots, max(positions) + 1)
            logits = decoder.run(inputs, kept, residents, in_weights)
            if pools:
                seen.append(decoder.seen_by_head(len(kept))[None])
        else:
            plan = self._bank.plan(residents, in_weights, runs=not self._deterministic)
            with self._context.applying(plan, num_decodes), ExitStack() as stack:
                if pools:
                    head = self._base.model.get_output_embeddings()
                    hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
                    stack.callback(hook.remove)
                output = self._base.model(
                    input_ids=row_ids[None],
                    position_ids=step.positions[None],
                    use_cache=False,
                    logits_to_keep=kept,
                    step=step,
                )
            logits = output.logits[0].float()
        for sequence, num_tokens in work:
            sequence.num_computed += num_tokens
        prompts, row = [], len(sampled)
        for sequence, first, tokens in scored:
            prompts.append(PromptLogits(sequence, first, logits[row : row + len(tokens)]))
            row += len(tokens)
        hidden = seen[0][0, : len(sampled)] if pools else None
        return StepLogits(sampled, logits[: len(sampled)], hidden, prompts)

    @property
    def num_failed_compilations(self) -> int:
        """Times that a decode step could not be captured, or an elementwise part not compiled; both
        are tried again later."""
        captures = 0 if self.graphs is None else self.graphs.num_failed_captures
        parts = 0 if self._elementwise is None else self._elementwise.num_failed_compilations
        return captures + parts

    @torch.inference_mode()
    def warm_up(self, progress: Callable[[int, int], None]) -> None:
        """Compile and capture what steps of the base need, so that no request waits for it.

        Args:
            progress: called with how many graphs are done, and of how many.

        Raises:
            DeviceError: the device has failed. Whatever else fails is done when first needed.
        """
        if self._base.device.type == "cuda":
            _tried(self.warm_up_prompts, self._base.device)
        if self.graphs is not None:
            in_weights = self._resident(None)
            self.graphs.capture_all(
                lambda bucket: self._bank.plan([in_weights] * bucket, in_weights, runs=False),
                progress,
            )

    @torch.inference_mode()
    def warm_up_prompts(self) -> None:
        """Compile what a step needs in which a prompt is prefilled beside decodes. Slots are those
        of padding, so the cache stays as it is."""
        ids, slots, positions = _on_device(self._base.device, [0] * 3, [-1] * 3, [1, 1, 2])
        step = PackedStep(
            cache=self.cache,
            slots=slots,
            positions=positions,
            num_decodes=1,
            decode_lengths=[2],
            prefills=[PrefillSpan(1, 3, 0, 1)],
            warms_up=True,
        )
        with self._context.applying(self._bank.plan([None] * 3, None), 1):
            self._base.model(
                input_ids=ids[None], position_ids=positions[None], use_cache=False, step=step
            )

    def release(self) -> None:
        """Release memory that grows with requests; only while no sequence runs."""
        if self._cpu_decoder is not None:
            self._cpu_decoder.release()

    def _spans(self, start: int, num_tokens: int, slot: int, past: int) -> list[PrefillSpan]:
        """Split a chunk of a prompt for attention: not at all, or into blocks where shapes must not
        depend on how the prompt was cut."""
        if not self._deterministic:
            return [PrefillSpan(start, start + num_tokens, slot, past)]
        assert past % PROMPT_BLOCK == 0
        return [
            PrefillSpan(start + i, start + min(i + PROMPT_BLOCK, num_tokens), slot, past + i)
            for i in range(0, num_tokens, PROMPT_BLOCK)
        ]

    def _replay(
        self, graphs: DecodeGraphs, decodes: Seq[Sequence], merged: AdapterVersion | None
    ) -> StepLogits | None:
        """Replay a step of decodes from a graph; None where it must run without."""
        in_weights = self._resident(merged)
        residents = [self._resident(s.version) for s in decodes]
        # Padding rows are of the merged adapter: nothing to add, whatever is merged.
        residents += [in_weights] * (graphs.bucket(len(decodes)) - len(decodes))
        slots = [s.slot for s in decodes if s.slot is not None]
        rows = DecodeRows(
            ids=[s.output_token_ids[-1] for s in decodes],
            positions=[s.num_computed for s in decodes],
            slots=slots,
        )
        plan = self._bank.plan(residents, in_weights, runs=False)
        logits = graphs.run(rows, plan)
        if logits is None:
            return None
        for sequence in decodes:
            sequence.num_computed += 1
        return StepLogits(list(decodes), logits, None, [])

    def _decode(self, ids: Tensor, positions: Tensor, slots: Tensor, plan: StepPlan) -> Tensor:
        """Compute logits [n, vocab] of n decodes from tensors alone: what a graph records."""
        step = PackedStep(
            cache=self.cache,
            slots=slots,
            positions=positions,
            num_decodes=len(ids),
            decode_lengths=(),
            prefills=(),
            is_static=True,
        )
        with self._context.applying(plan):
            output = self._base.model(
                input_ids=ids[None],
                position_ids=positions[None],
                use_cache=False,
                step=step,
            )
        logits: Tensor = output.logits[0]
        return logits

    def _resident(self, version: AdapterVersion | None) -> ResidentAdapter | None:
        return None if version is None else self._resident_of(version)


def _tried(warm_up: Callable[[], None], device: torch.device) -> None:
    """Do what a step would do later if it fails now.

    Raises:
        DeviceError: the device has failed.
    """
    try:
        warm_up()
    except Exception as error:
        raise_device_fault(error, device)
        logger.warning("prompts' kernels are compiled when first needed", exc_info=True)


def _on_device(device: torch.device, *lists: list[int]) -> list[Tensor]:
    """Bring lists to a device as int64, all in one copy that nobody waits for."""
    values: list[int] = []
    starts = []
    for one in lists:
        starts.append(len(values))
        values += one
        values += [0] * (-len(one) % _ALIGNED)
    host = torch.tensor(values, dtype=torch.int64, pin_memory=device.type == "cuda")
    together = host.to(device, non_blocking=True)
    return [together[i : i + len(one)] for i, one in zip(starts, lists, strict=True)]


def _adds_biases(residents: Seq[ResidentAdapter | None], merged: ResidentAdapter | None) -> bool:
    """Return whether any token of a step has another bias than the one in the weights."""
    return any(
        one is not merged and any(r is not None and r.plane.has_biases for r in (one, merged))
        for one in set(residents)
    )


def _refuse_other_products(base: BaseModel) -> None:
    """Refuse models with products whose shapes are not ours: they depend on the other tokens."""
    others = [name for name, module in base.model.named_modules() if type(module) is nn.Linear]
    others += [name for name, p in base.model.named_parameters() if p.ndim > 2]
    if others:
        raise ModelError(
            f"{type(base.model).__name__} cannot be deterministic: {others[0]} is computed "
            "with all tokens of a step at once"
        )


def refuse_unsupported(base: BaseModel) -> None:
    """Refuse models with a state beside keys and values, which would be silently wrong."""
    model, config = base.model, base.model.config.get_text_config()
    layer_types = set(getattr(config, "layer_types", None) or [])
    attributes: Mapping[str, bool] = {
        "is not built on transformers' attention interface": not getattr(
            model, "_supports_attention_backend", False
        ),
        "keeps a recurrent state": bool(getattr(model, "_is_stateful", False)),
        f"has layers of type {', '.join(sorted(map(str, layer_types - _ATTENTION_LAYERS)))}": bool(
            layer_types - _ATTENTION_LAYERS
        ),
    }
    for reason, applies in attributes.items():
        if applies:
            raise ModelError(
                f"{type(model).__name__} {reason}; supported are decoder models such as Llama, "
                "Qwen, Mistral, Gemma and GPT-2"
            )
