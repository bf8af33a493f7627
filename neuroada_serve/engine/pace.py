"""The part of a step that prompts may take, so that streams keep their pace. Pure Python.

A step that computes part of a prompt beside the next tokens of running answers takes longer, and
every stream waits for it. `StepPace` learns what steps take and bounds the prompts' part: without a
target, a step takes about twice as long as it would without prompts; with one, a little less than
the target. `divide` says which prompts get that part.

The unit is the cost of a prompt's first token. A token at position p costs 1 + p / context_scale,
since attention reads all tokens before it.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

LEAST_COST = 16.0  # of prompts beside decodes, however slow the step is
STRETCH = 2.0  # a step with prompts against the same one without, where there is no target
AIM = 0.9  # of the target, since steps vary
FIRST_SHARE = 0.25  # of a step's prompts for the one that was admitted first

_NUM_RECENT = 16  # steps with prompts that tell what these cost
_NUM_ALONE = 5  # decode steps of each number that are remembered
_NUM_SLOPES = 32  # pairs of decode steps that tell what contexts cost
_APART = 0.25  # least part by which the contexts of such a pair differ
_NEAR = 0.25  # a number tells of others that differ by no more than this part
_FRESH_STEPS = 64  # so many steps later a decode step is measured again
_PROBE_STEPS = 4  # least distance of steps that leave prompts out to be measured
_FORGOTTEN_STEPS = 4096


class Prompt(Protocol):
    """A sequence whose prompt is being computed."""

    @property
    def num_prefill(self) -> int: ...
    @property
    def num_computed(self) -> int: ...


P = TypeVar("P", bound=Prompt)


class StepPace:
    """The pace of an engine's steps.

    Args:
        target_itl_s: wanted seconds between two tokens of a stream; None: as STRETCH says;
            math.inf: prompts take all the tokens that they can.
        most_tokens: of a step, decodes included.
        context_scale: position at which a token costs twice as much as the first one.
        multiple: prompts are cut at positions that are multiples of it.
    """

    def __init__(
        self,
        target_itl_s: float | None,
        most_tokens: int,
        context_scale: float,
        multiple: int = 1,
    ) -> None:
        self.target_itl_s = target_itl_s
        self.most_tokens = most_tokens
        self.context_scale = context_scale
        self.multiple = multiple
        self.least_cost = max(LEAST_COST, 2.0 * multiple)
        self._alone = DecodeTimes()
        # Cost of the prompts of recent steps, and the seconds that they added to the decodes.
        self._added: deque[tuple[float, float]] = deque(maxlen=_NUM_RECENT)
        self._since_probe = _PROBE_STEPS

    @contextmanager
    def unbounded(self) -> Iterator[None]:
        """Let prompts take all the tokens that they can until the block ends: for batches, whose
        prompts shall be cut alike in every run."""
        before, self.target_itl_s = self.target_itl_s, math.inf
        try:
            yield
        finally:
            self.target_itl_s = before

    def budget(self, num_decodes: int, context: int = 0) -> float:
        """Return the cost that prompts may have in the next step. To be called once a step that has
        prompts to compute.

        Args:
            context: tokens in the KV cache that the decodes read, of all together.

        Returns:
            At least `least_cost`; infinite where nothing decodes. 0 where this step is to show what
            decodes take by themselves: if nothing is known of so many, else every 64 steps, never
            twice in a row.
        """
        if not num_decodes or self.target_itl_s == math.inf:
            return math.inf
        self._since_probe += 1
        if self._since_probe > _PROBE_STEPS and not self._alone.is_fresh(num_decodes):
            self._since_probe = 0
            return 0.0
        alone = self._alone.seconds(num_decodes, context)
        if alone is None:
            return self.least_cost
        if self.target_itl_s is None:
            added = (STRETCH - 1) * alone
        else:
            added = AIM * self.target_itl_s - alone
        seconds_per_cost = self._seconds_per_cost()
        wanted = added / seconds_per_cost if seconds_per_cost else math.inf
        # At most twice what was tried lately: what more would cost is not known.
        tried = max((cost for cost, _ in self._added), default=self.least_cost / 2)
        return max(self.least_cost, min(wanted, 2 * tried))

    def record(
        self, num_decodes: int, prompt_cost: float, seconds: float, context: int = 0
    ) -> None:
        """Learn what a step took.

        Args:
            prompt_cost: of all its chunks of prompts together, see `cost`.
            context: as in `budget`.
        """
        if not num_decodes:
            return
        self._alone.num_steps += 1
        if not prompt_cost:
            self._alone.record(num_decodes, context, seconds)
        else:
            alone = self._alone.seconds(num_decodes, context) or 0.0
            self._added.append((prompt_cost, max(0.0, seconds - alone)))

    def cost(self, past: int, num_tokens: int) -> float:
        """Return the cost of a prompt's tokens from position `past` on."""
        return cost(past, num_tokens, self.context_scale)

    def tokens_for(self, budget: float, past: int, left: int) -> int:
        """Return how many of a prompt's next tokens, `left` at most, cost no more than `budget`."""
        return tokens_for(budget, past, left, self.context_scale)

    def divide(
        self,
        prompts: Seq[P],
        num_decodes: int,
        context: int = 0,
        rank: Callable[[P], Any] = lambda prompt: 0,
    ) -> list[tuple[P, int]]:
        """Return the prompts that take part in the next step and how many of their tokens do; see
        `budget` and the function `divide`. To be called once a step."""
        if not prompts:
            return []
        budget = self.budget(num_decodes, context)
        most_tokens = self.most_tokens - num_decodes
        return divide(prompts, budget, most_tokens, self.context_scale, rank, self.multiple)

    def _seconds_per_cost(self) -> float:
        """Return what a unit of cost adds to a step of decodes: the median over recent steps, each
        counted by its cost. 0 where no such step is known.

        What a step with prompts takes besides, however short they are, is part of it, so the
        figure holds for costs like those of the recent steps; the next ones come from it, until
        both agree.
        """
        return _weighted_median((seconds / cost, cost) for cost, seconds in self._added)


class DecodeTimes:
    """Seconds of steps of decodes alone: base(their number) + rate * tokens of context.

    Of each number the last few steps are kept, and their median counts, so one step that was held
    up (a compilation, another process) changes nothing.
    """

    def __init__(self) -> None:
        self.num_steps = 0  # of all kinds
        self._sizes: dict[int, _Size] = {}  # by number
        # Seconds by which steps of one number differed for each token of context, and by how many
        # tokens these differed.
        self._slopes: deque[tuple[float, float]] = deque(maxlen=_NUM_SLOPES)

    @property
    def seconds_per_context(self) -> float:
        """Seconds for each token of context; 0 while too little is known."""
        return max(0.0, _weighted_median(self._slopes))

    def record(self, num_decodes: int, context: int, seconds: float) -> None:
        size = self._sizes.setdefault(num_decodes, _Size())
        size.last_step = self.num_steps
        size.recent.append((context, seconds))
        if size.reference is None:
            if len(size.recent) == _NUM_ALONE:
                size.reference = sorted(size.recent, key=lambda step: step[1])[_NUM_ALONE // 2]
        else:
            more = context - size.reference[0]
            if abs(more) > _APART * max(context, size.reference[0]):
                self._slopes.append(((seconds - size.reference[1]) / more, abs(more)))
        if not self.num_steps % _FRESH_STEPS:
            self._forget()

    def is_fresh(self, num_decodes: int) -> bool:
        """Return whether a like number was measured lately."""
        since = self.num_steps - _FRESH_STEPS
        return any(
            abs(number - num_decodes) <= _NEAR * num_decodes and size.last_step > since
            for number, size in self._sizes.items()
        )

    def seconds(self, num_decodes: int, context: int = 0) -> float | None:
        """Return what a step of so many decodes with so many tokens of context takes, interpolated
        between the nearest numbers that are known; None while none is."""
        if not self._sizes:
            return None
        rate = self.seconds_per_context
        below = max((n for n in self._sizes if n <= num_decodes), default=min(self._sizes))
        above = min((n for n in self._sizes if n >= num_decodes), default=max(self._sizes))
        base = self._sizes[below].base(rate)
        if below < num_decodes < above:
            part = (num_decodes - below) / (above - below)
            base += part * (self._sizes[above].base(rate) - base)
        return max(0.0, base + rate * context)

    def _forget(self) -> None:
        """Forget numbers that did not occur for long."""
        since = self.num_steps - _FORGOTTEN_STEPS
        self._sizes = {n: size for n, size in self._sizes.items() if size.last_step > since}


@dataclass
class _Size:
    """Steps of one number of decodes, each with its tokens of context and its seconds.

    reference: one of the first, to compare later ones with.
    """

    recent: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=_NUM_ALONE))
    reference: tuple[int, float] | None = None
    last_step: int = 0

    def base(self, seconds_per_context: float) -> float:
        """Return the seconds of a step without its contexts: the lower median of the last ones."""
        bases = sorted(seconds - seconds_per_context * context for context, seconds in self.recent)
        return bases[(len(bases) - 1) // 2]


def _weighted_median(values: Iterable[tuple[float, float]]) -> float:
    """Return the median of values that come with their weights; 0 if there are none."""
    ordered = sorted(values)
    half = sum(weight for _, weight in ordered) / 2
    for value, weight in ordered:
        half -= weight
        if half <= 0:
            return value
    return 0.0


# --- the part of each prompt -----------------------------------------------------------------


def cost(past: int, num_tokens: int, context_scale: float) -> float:
    """Return the cost of a prompt's tokens at positions past .. past + num_tokens - 1."""
    positions = num_tokens * past + num_tokens * (num_tokens - 1) / 2
    return num_tokens + positions / context_scale


def tokens_for(budget: float, past: int, left: int, context_scale: float) -> int:
    """Return how many of a prompt's next tokens, `left` at most, cost no more than `budget`."""
    if cost(past, left, context_scale) <= budget:
        return left
    # The root of cost(past, num) = budget, or one beside it where it was rounded.
    twice = 2 * context_scale * max(0.0, budget)
    half = context_scale + past - 0.5
    num = int(twice / (half + math.sqrt(half * half + twice)))
    while cost(past, num + 1, context_scale) <= budget:
        num += 1
    while num and cost(past, num, context_scale) > budget:
        num -= 1
    return num


def order(prompts: Seq[P], rank: Callable[[P], Any] = lambda prompt: 0) -> list[P]:
    """Return prompts in the order in which they are given a step: lower ranks first, shorter rests
    first among equals, then as they were admitted.

    Args:
        prompts: in the order of admission.
        rank: of the prompt's party; anything that can be compared.
    """
    return sorted(prompts, key=lambda prompt: (rank(prompt), _left(prompt)))


def divide(
    prompts: Seq[P],
    budget: float,
    most_tokens: int,
    context_scale: float,
    rank: Callable[[P], Any] = lambda prompt: 0,
    multiple: int = 1,
) -> list[tuple[P, int]]:
    """Return the prompts that take part in a step, in their `order`, and how many tokens of each.

    The one that was admitted first gets a quarter of the step whatever its place, so that no flow
    of others can hold it up for ever. The rest is spent in the order, down to what fits no more.
    That one and the first in the order get the least that can be computed, a token or up to the
    next multiple, where the budget is smaller; with a budget of 0 nobody gets anything.

    Args:
        prompts: in the order of admission, with at least one token left each.
        budget: cost of all tokens together.
        most_tokens: bound on their number; nothing exceeds it.
        multiple: chunks that do not end their prompt end at multiples of it.
    """
    if not prompts or budget <= 0:
        return []
    ordered = order(prompts, rank)
    step = _Division(budget, most_tokens, context_scale, multiple)
    step.give(prompts[0], FIRST_SHARE * budget, math.ceil(FIRST_SHARE * most_tokens), least=True)
    step.give(ordered[0], step.budget, step.most_tokens, least=True)
    for prompt in ordered:
        step.give(prompt, step.budget, step.most_tokens)
    return [(prompt, num) for prompt in ordered if (num := step.given.get(id(prompt), 0))]


class _Division:
    """The rest of a step, and the tokens that were given."""

    def __init__(
        self, budget: float, most_tokens: int, context_scale: float, multiple: int
    ) -> None:
        self.budget = budget
        self.most_tokens = most_tokens
        self.given: dict[int, int] = {}  # tokens by the id of their prompt
        self._context_scale = context_scale
        self._multiple = multiple

    def give(self, prompt: Prompt, budget: float, most_tokens: int, least: bool = False) -> None:
        """Give a prompt more tokens within these bounds.

        Args:
            least: give the least that can be computed even if its cost is more.
        """
        given = self.given.get(id(prompt), 0)
        past, left = prompt.num_computed + given, _left(prompt) - given
        num = min(tokens_for(budget, past, left, self._context_scale), most_tokens)
        if num < left:
            num = max(0, num - (past + num) % self._multiple)
        if least and not given and not num:
            num = min(left, self._multiple - past % self._multiple)
            num = num if num <= self.most_tokens else 0
        self.given[id(prompt)] = given + num
        self.budget -= cost(past, num, self._context_scale)
        self.most_tokens -= num


def _left(prompt: Prompt) -> int:
    return prompt.num_prefill - prompt.num_computed
