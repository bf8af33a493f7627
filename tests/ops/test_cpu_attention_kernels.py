"""A step's new keys and values, and what its tokens see, through block tables."""

import ctypes
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from neuroada_serve.errors import ShapeError
from neuroada_serve.ops import cpu_blocks, cpu_team
from tests.support.kv_blocks import Blocks, attention_of, new_blocks

pytestmark = pytest.mark.skipif(cpu_team.forward_kernels() is None, reason="needs numba")
BF16 = torch.bfloat16


@dataclass
class Step:
    """Tokens (slot, position) with random queries, keys and values, in one row each."""

    tokens: list[tuple[int, int]]
    heads: int
    kv_heads: int
    dim: int
    qkv: Tensor = field(init=False)

    def __post_init__(self) -> None:
        width = (self.heads + 2 * self.kv_heads) * self.dim
        generator = torch.Generator().manual_seed(width)
        self.qkv = torch.randn(len(self.tokens), width, generator=generator).to(BF16)

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        by_head = self.qkv.view(len(self.tokens), -1, self.dim)
        return by_head.split([self.heads, self.kv_heads, self.kv_heads], 1)

    def run(self, blocks: Blocks, window: int = 0) -> Tensor:
        """[tokens, heads, dim]: what the two operations make of the step, without a rotation."""
        count = len(self.tokens)
        slots, positions = torch.tensor(self.tokens).t().contiguous()
        cos, sin = torch.ones(count, self.dim).to(BF16), torch.zeros(count, self.dim).to(BF16)
        out, qkv = torch.empty(count, self.heads, self.dim, dtype=BF16), self.qkv.clone()
        step = cpu_blocks.StepBlock(count, 0, positions.data_ptr(), slots.data_ptr(), 0)
        step.cos, step.sin = cos.data_ptr(), sin.data_ptr()
        made = [self.block(qkv, out, blocks, window) for _ in range(2)]
        kinds = cpu_blocks.ROTATE, cpu_blocks.ATTEND
        numbers = [n for kind, b in zip(kinds, made, strict=True) for n in (kind, address(b))]
        ops = (ctypes.c_int64 * 4)(*numbers)
        length = int(positions.max()) + 1
        size = cpu_blocks.attention_scratch_bytes(self.heads // self.kv_heads, length)
        threads = torch.get_num_threads()
        scratch = torch.empty(size * threads, dtype=torch.uint8)
        program = cpu_blocks.ProgramBlock(num_ops=2, ops=address(ops), step=address(step))
        program.scratch, program.scratch_bytes = scratch.data_ptr(), size
        cpu_team.run_program(program, threads)
        return out

    def block(self, qkv: Tensor, out: Tensor, blocks: Blocks, window: int):
        block = cpu_blocks.AttentionBlock(query=qkv.data_ptr(), query_stride=qkv.shape[1])
        block.kind, block.head_stride = cpu_blocks.KINDS[BF16], self.dim
        block.out, block.window, block.scale = out.data_ptr(), window, self.dim**-0.5
        block.heads, block.kv_heads, block.head_dim = self.heads, self.kv_heads, self.dim
        cpu_blocks.set_cache(block, blocks.keys, blocks.values, blocks.tables)
        return block


address = ctypes.addressof
DECODES = [(3, 0), (0, 40), (2, 133), (1, 15), (4, 16)]  # the last positions, slots in any order
LENGTHS = [41, 16, 134, 1, 17]
CHUNK = [(1, position) for position in range(21, 60)]  # with these, tokens attend together
LONGER = [41, 60, 134, 1, 17]


@pytest.mark.parametrize("block_tokens", [16, 32, 128])
@pytest.mark.parametrize("window", [0, 1, 7, 16, 37])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 32), (9, 3, 64), (3, 1, 96)])
def test_tokens_see_their_sequence_through_its_blocks(block_tokens, window, heads, kv_heads, dim):
    for tokens, lengths in ((DECODES, LENGTHS), ([*DECODES[:3], *CHUNK], LONGER)):
        blocks = new_blocks(lengths, kv_heads, dim, BF16, block_tokens)
        step = Step(tokens, heads, kv_heads, dim)
        out, query = step.run(blocks, window), step.parts()[0]
        for row, (slot, position) in enumerate(tokens):
            expected = attention_of(query[row], blocks, slot, position, window=window or None)
            torch.testing.assert_close(out[row].float(), expected, rtol=2e-2, atol=1e-2)


def test_new_keys_and_values_are_written_to_their_cells_and_nowhere_else():
    blocks = new_blocks(LENGTHS, 2, 32, BF16)
    before = blocks.keys.clone(), blocks.values.clone()
    step = Step(DECODES, 4, 2, 32)
    step.run(blocks)
    for kept, part in zip(before, step.parts()[1:], strict=True):
        for row, (slot, position) in enumerate(DECODES):
            block, place = blocks.cell(slot, position)
            kept[block, :, place] = part[row]
    for now, kept in zip((blocks.keys, blocks.values), before, strict=True):
        torch.testing.assert_close(now, kept, rtol=0, atol=0, equal_nan=True)


def test_sequences_read_the_blocks_that_they_share():
    blocks = new_blocks([50, 50, 35], 2, 32, BF16, shared=2)
    assert torch.equal(blocks.tables[0, :2], blocks.tables[1, :2])
    step = Step([(0, 49), (1, 49), (2, 34)], 4, 2, 32)
    out, query = step.run(blocks), step.parts()[0]
    for row, (slot, position) in enumerate(step.tokens):
        expected = attention_of(query[row], blocks, slot, position)
        torch.testing.assert_close(out[row].float(), expected, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("window", [0, 21])
def test_a_token_gets_the_same_bits_whatever_else_is_in_the_step(window):
    blocks = new_blocks(LONGER, 2, 32, BF16)
    step = Step([*DECODES[:3], *CHUNK], 4, 2, 32)
    together = step.run(blocks, window)
    for row, token in enumerate(step.tokens):
        alone = Step([token], 4, 2, 32)
        alone.qkv = step.qkv[row : row + 1]
        assert torch.equal(alone.run(blocks, window)[0], together[row])


@pytest.mark.parametrize("first", [16, 20, 31])
def test_cells_before_a_window_are_not_read(first):
    """Not even where they are not numbers: a sum must not meet them, whatever their weight."""
    blocks = new_blocks([40], 2, 32, BF16)
    step = Step([(0, 39)], 4, 2, 32)
    expected = step.run(blocks, window=40 - first)
    for position in range(first):
        block, place = blocks.cell(0, position)
        blocks.keys[block, :, place] = blocks.values[block, :, place] = float("nan")
    assert torch.equal(step.run(blocks, window=40 - first), expected)


def test_blocks_of_another_layout_are_refused():
    keys, tables = torch.zeros(4, 2, 16, 32, dtype=BF16), torch.zeros(1, 4, dtype=torch.int32)
    block = cpu_blocks.AttentionBlock()
    cpu_blocks.set_cache(block, keys, keys, tables)
    for other, numbers in (
        (keys.transpose(1, 2).contiguous().transpose(1, 2), tables),
        (torch.zeros(4, 2, 24, 32), tables),
        (torch.zeros(4, 2, 8, 32), tables),
        (keys, tables.long()),
    ):
        with pytest.raises(ShapeError):
            cpu_blocks.set_cache(block, other, other, numbers)
