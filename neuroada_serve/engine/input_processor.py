"""Input processing: checks requests and makes sequences of them."""

from collections.abc import Sequence as Seq

from neuroada_serve.adapters.store import AdapterStore
from neuroada_serve.engine.checks import check_ids, check_prompt, check_task
from neuroada_serve.engine.detokenizer import Detokenizer
from neuroada_serve.engine.sampler import new_draws
from neuroada_serve.engine.sequence import Sequence
from neuroada_serve.model.loader import BaseModel
from neuroada_serve.request import SamplingParams
from neuroada_serve.tasks import GENERATE


class InputProcessor:
    """Make the sequences of one engine.

    Args:
        max_model_len: most tokens of a sequence, its prompt included.
    """

    def __init__(self, base: BaseModel, store: AdapterStore, max_model_len: int) -> None:
        self._base = base
        self._store = store
        self._max_model_len = max_model_len
        self._vocab_size = int(base.model.config.get_text_config().vocab_size)

    def sequences(
        self,
        request_ids: Seq[str],
        prompts: Seq[Seq[int]],
        params: SamplingParams,
        adapter: str | None,
        tenant: str,
        cache_salt: str,
        client: str,
    ) -> list[Sequence]:
        """Make params.n sequences of each prompt, each with a lease on one version of an adapter.

        Raises:
            RequestError, AdapterNotFoundError, AdapterError: as `Engine.add_requests`.
        """
        check_ids(params, self._vocab_size)
        for prompt in prompts:
            check_prompt(prompt, self._max_model_len, self._vocab_size)
        lease = None if adapter is None else self._store.acquire(adapter)
        sequences: list[Sequence] = []
        try:
            task = GENERATE if lease is None else lease.version.task
            check_task(params, adapter, task)
            eos = frozenset() if params.ignore_eos else self._base.eos_token_ids
            end_token_ids = eos.union(params.stop_token_ids)
            for request_id, prompt in zip(request_ids, prompts, strict=True):
                token_ids = list(prompt)  # one for all choices
                room = self._max_model_len - len(token_ids)
                max_tokens = min(params.max_tokens or room, room)
                for index in range(params.n):
                    detokenizer = self._new_detokenizer(token_ids, params)
                    sequences.append(
                        Sequence(
                            request_id,
                            index,
                            token_ids,
                            params,
                            max_tokens,
                            end_token_ids,
                            detokenizer,
                            random=new_draws(params, index),
                            tenant=tenant,
                            client=client,
                            cache_salt=cache_salt,
                            lease=None if lease is None else lease.share(),
                            task=task,
                        )
                    )
            return sequences
        except BaseException:
            for sequence in sequences:
                if sequence.lease is not None:
                    sequence.lease.release()
            raise
        finally:
            if lease is not None:
                lease.release()

    def _new_detokenizer(self, prompt: Seq[int], params: SamplingParams) -> Detokenizer:
        return Detokenizer(
            self._base.tokenizer,
            prompt,
            params.stop_strings,
            params.include_stop_str_in_output,
            params.skip_special_tokens,
        )
