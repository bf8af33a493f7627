"""A progress bar over prompts, drawn as vLLM draws it."""

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from neuroada_serve.request import Output, SamplingParams

UseTqdm = bool | Callable[..., Any]


class Progress:
    """Count answered prompts and tokens, and show them in a tqdm bar.

    Args:
        use_tqdm: True shows a bar where somebody may see it: stderr is a terminal, or this is a
            notebook. Something called like `tqdm` always gives the bar. False shows none.
        prompts: number of tokens of each, by request id.
        params: theirs, in the same order.
    """

    def __init__(
        self, use_tqdm: UseTqdm, prompts: dict[str, int], params: Sequence[SamplingParams]
    ) -> None:
        self._prompt_tokens = prompts
        self._open_choices = {r: p.n for r, p in zip(prompts, params, strict=True)}
        self._num_in = self._num_out = 0
        self._started = time.perf_counter()
        self._bar: Any = None
        if use_tqdm is True and _is_seen():
            from tqdm.auto import tqdm

            use_tqdm = tqdm
        if callable(use_tqdm):
            # miniters=0: the speed is drawn anew while no prompt ends, ten times a second at most.
            self._bar = use_tqdm(
                total=len(prompts), desc="Processed prompts", dynamic_ncols=True, miniters=0
            )

    def see(self, outputs: Sequence[Output]) -> None:
        """Count the outputs of one step."""
        if self._bar is None:
            return
        done = 0
        for output in outputs:
            if output.request_id not in self._open_choices:
                continue
            self._num_out += len(output.token_ids)
            self._open_choices[output.request_id] -= output.finished
            if output.finished and not self._open_choices[output.request_id]:
                self._num_in += self._prompt_tokens[output.request_id]
                done += 1
        elapsed_s = max(time.perf_counter() - self._started, 1e-9)
        self._bar.set_postfix_str(
            f"est. speed input: {self._num_in / elapsed_s:.2f} toks/s, "
            f"output: {self._num_out / elapsed_s:.2f} toks/s",
            refresh=False,
        )
        self._bar.update(done)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _is_seen() -> bool:
    return "ipykernel" in sys.modules or (sys.stderr is not None and sys.stderr.isatty())
