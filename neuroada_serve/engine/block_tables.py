"""Block tables: the blocks of each sequence. Reserves, shares and releases them. Pure Python.

A sequence shares the blocks of others that begin alike, running ones too: while one computes a
common beginning, the others wait for it. Behind the shared blocks, the first tokens of a block are
copied where another block begins with them; so whoever writes to a block is its only user.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from neuroada_serve.engine.block_keys import Announcements, BlockKeys
from neuroada_serve.engine.block_manager import BlockManager
from neuroada_serve.engine.sequence import Sequence


@dataclass
class Changes:
    """Changes of the KV cache that the next step begins with.

    entries: (slot, place in its table, block).
    copies: (block, block): the first to the second.
    """

    entries: list[tuple[int, int, int]] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)


class BlockTables:
    """The blocks of all running sequences.

    Args:
        blocks: they are taken from here.
        root_of: a digest of everything that a sequence's KV depends on except its tokens; None
            where nothing is shared.
        deterministic: only whole blocks of prompts are shared, as an answer is computed in other
            shapes; a sequence that starts gets all the blocks that it may ever need.

    changes: to be made before the next step, see `made`.
    """

    def __init__(
        self,
        blocks: BlockManager,
        root_of: Callable[[Sequence], bytes] | None = None,
        deterministic: bool = False,
    ) -> None:
        self.blocks = blocks
        self.num_queries = 0  # tokens that were looked up
        self.num_hits = 0  # of them, those found
        self.changes = Changes()
        self._size = blocks.block_tokens
        self._keys = BlockKeys(root_of, blocks.block_tokens)
        self._coming = Announcements(blocks, self._keys, deterministic)
        self._shares = root_of is not None
        self._deterministic = deterministic

    # --- room --------------------------------------------------------------------------------

    def has_room_for(
        self, sequence: Sequence, running: Collection[Sequence], freed: Sequence | None = None
    ) -> bool:
        """Return whether a sequence can start: there is room for its prompt, beside what others
        need for theirs and a block for each of them.

        Args:
            running: the others.
            freed: one of them that would give up its blocks.
        """
        others = [other for other in running if other is not freed]
        if not others:
            return True
        promised = sum(max(0, self._num_needed(other) - len(other.blocks)) for other in others)
        free = self.blocks.num_free - promised - len(others)
        if freed is not None:
            free += sum(not self.blocks.is_shared(number) for number in freed.blocks)
        return self._num_needed(sequence) - self._num_known(sequence, freed) <= free

    def room_of(self, sequence: Sequence) -> int:
        """Return how many more tokens a running sequence could compute now."""
        return (len(sequence.blocks) + self.blocks.num_free) * self._size - sequence.num_computed

    def reserve(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give a running sequence the blocks for its next tokens; False: there are not enough, and
        nothing has changed."""
        num = -(-(sequence.num_computed + num_tokens) // self._size) - len(sequence.blocks)
        if num <= 0:
            return True
        new = self.blocks.allocate(num)
        if new is None:
            return False
        for number in new:
            self._append(sequence, number)
        return True

    # --- the way of a sequence ---------------------------------------------------------------

    def start(self, sequence: Sequence) -> int:
        """Give a sequence that has got a slot the blocks that are known already.

        Returns:
            How many of its tokens need no computing.
        """
        assert not sequence.blocks
        sequence.num_computed = 0
        if self._may_reuse(sequence):
            self.num_queries += sequence.num_prefill
            self._coming.open(sequence)
        self.advance(sequence)
        if self._deterministic:
            whole = self.reserve(sequence, self._num_most(sequence) - sequence.num_computed)
            assert whole, "as `has_room_for` has said"
        return sequence.num_computed

    def advance(self, sequence: Sequence) -> int | None:
        """Move a sequence beyond the tokens that have become known, before its last one. Unless
        another is just computing what comes next, it is going to, and others wait for it.

        Returns:
            By how many; None where another sequence is just computing what comes next.
        """
        if not self._may_reuse(sequence):
            return 0
        before, last = sequence.num_computed, sequence.num_prefill - 1
        while sequence.num_computed % self._size == 0:
            at = sequence.num_computed // self._size
            number = None
            if sequence.num_computed + self._size <= last:
                number = self.blocks.find(self._keys.key(sequence, at))
            if number is None:
                break
            self.blocks.share([number])
            self._put(sequence, at, number)
            sequence.num_computed += self._size
            sequence.num_registered = at + 1
        if self._coming.is_coming(sequence):
            self._count_hits(sequence, before)
            return None
        at, within = divmod(sequence.num_computed, self._size)
        if not within:
            if not self._deterministic:
                self._copy_common(sequence, last)
            self._coming.announce(sequence, at)
        self._count_hits(sequence, before)
        return sequence.num_computed - before

    def computed(self, sequence: Sequence) -> None:
        """Make the blocks that a sequence has filled findable, and its prompt's last one once the
        prompt is computed."""
        if not self._shares:
            return
        most = sequence.num_computed
        if self._deterministic:
            most = min(most, len(sequence.prompt_token_ids))
        num_full = most // self._size
        token_ids = sequence.token_ids if num_full > sequence.num_registered else []
        for at in range(sequence.num_registered, num_full):
            ids = token_ids[at * self._size : (at + 1) * self._size]
            self.blocks.register(sequence.blocks[at], self._keys.parent(sequence, at), ids)
        sequence.num_registered = max(sequence.num_registered, num_full)
        if self._coming.is_open(sequence) and sequence.num_computed >= sequence.num_prefill:
            self._register_rest(sequence)
            self._coming.close(sequence)

    def release(self, sequence: Sequence, forget: bool = False) -> None:
        """Take all blocks from a sequence. What is known of them stays findable.

        Args:
            forget: what it has computed may be wrong.
        """
        self._coming.close(sequence)
        self._drop_copy(sequence)
        blocks, sequence.blocks = sequence.blocks, []
        self.changes.entries = [e for e in self.changes.entries if e[0] != sequence.slot]
        if forget:
            self.blocks.forget(blocks)
        elif self._shares and blocks:
            sequence.blocks = blocks
            self.computed(sequence)
            self._register_rest(sequence)
            sequence.blocks = []
        sequence.num_registered = 0
        self.blocks.release(blocks)

    def made(self) -> None:
        """Note that `changes` have been made."""
        changes, self.changes = self.changes, Changes()
        for source, _ in changes.copies:
            self.blocks.release([source])

    # --- parts -------------------------------------------------------------------------------

    def _num_most(self, sequence: Sequence) -> int:
        """Return the most tokens that a sequence may have in the cache."""
        left = sequence.max_tokens - len(sequence.output_token_ids)
        return sequence.num_tokens + max(left, 1) - 1

    def _num_needed(self, sequence: Sequence) -> int:
        """Return the blocks of a sequence's prompt and one token, or of all that it may get."""
        num = self._num_most(sequence) if self._deterministic else sequence.num_prefill + 1
        return -(-num // self._size)

    def _num_known(self, sequence: Sequence, besides: Sequence | None) -> int:
        """Return the blocks at a waiting sequence's beginning that others than `besides` use just
        now."""
        if not self._may_reuse(sequence):
            return 0
        num = 0
        while (num + 1) * self._size < sequence.num_prefill:
            number = self.blocks.find(self._keys.key(sequence, num))
            if number is None or self.blocks.is_idle(number):
                break
            is_leaving = besides is not None and number in besides.blocks
            if is_leaving and not self.blocks.is_shared(number):
                break
            num += 1
        return num

    def _may_reuse(self, sequence: Sequence) -> bool:
        is_scored = sequence.params.prompt_logprobs is not None and not sequence.output_token_ids
        return self._shares and not is_scored

    def _count_hits(self, sequence: Sequence, before: int) -> None:
        num = sequence.num_computed - before
        self.num_hits += num
        if not sequence.num_preempted:  # what it finds then may be its own
            sequence.num_cached += num

    def _copy_common(self, sequence: Sequence, last: int) -> None:
        """Begin a sequence's next block with a copy of one that has tokens in common with it."""
        at, start = sequence.num_computed // self._size, sequence.num_computed
        ids = sequence.token_ids[start : min(start + self._size, last)]
        common = self.blocks.find_common(self._keys.parent(sequence, at), ids) if ids else None
        if common is None:
            return
        source, num = common
        self.blocks.share([source])
        if not self.reserve(sequence, num):
            self.blocks.release([source])
            return
        self.changes.copies.append((source, sequence.blocks[at]))
        sequence.num_computed += num

    def _drop_copy(self, sequence: Sequence) -> None:
        """Drop the copy that is still to be made to a sequence's last block."""
        for copy in [copy for copy in self.changes.copies if copy[1] in sequence.blocks]:
            self.changes.copies.remove(copy)
            self.blocks.release([copy[0]])
            dropped = sequence.num_computed % self._size
            sequence.num_computed -= dropped
            self.num_hits -= dropped
            if not sequence.num_preempted:
                sequence.num_cached -= dropped

    def _register_rest(self, sequence: Sequence) -> None:
        """Make the tokens in a sequence's last, partly filled block findable."""
        at, num = divmod(sequence.num_computed, self._size)
        if num and not self._deterministic:
            ids = sequence.token_ids[at * self._size : sequence.num_computed]
            self.blocks.register(sequence.blocks[at], self._keys.parent(sequence, at), ids)

    def _put(self, sequence: Sequence, at: int, number: int) -> None:
        """Put a block at a place of a sequence's table, behind the others or for one of them."""
        if at == len(sequence.blocks):
            self._append(sequence, number)
            return
        self.blocks.release([sequence.blocks[at]])
        sequence.blocks[at] = number
        self._note(sequence, at)

    def _append(self, sequence: Sequence, number: int) -> None:
        sequence.blocks.append(number)
        self._note(sequence, len(sequence.blocks) - 1)

    def _note(self, sequence: Sequence, at: int) -> None:
        assert sequence.slot is not None
        self.changes.entries.append((sequence.slot, at, sequence.blocks[at]))
