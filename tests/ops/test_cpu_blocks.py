"""The kernels' argument blocks: what Python writes in a field, compiled code reads in it."""

import ctypes

import pytest

from neuroada_serve.ops import cpu_blocks

BLOCKS = [
    block
    for block in vars(cpu_blocks).values()
    if isinstance(block, type) and issubclass(block, ctypes.Structure)
]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.__name__)
def test_compiled_code_reads_every_field_as_python_wrote_it(block):
    numba = pytest.importorskip("numba")
    from neuroada_serve.ops.cpu_vectors import block_reader

    names = [name for name, _ in block._fields_]
    namespace = {"block_at": block_reader(block)}
    fields = "".join(f"block.{name}, " for name in names)
    exec(f"def read(address):\n    block = block_at(address)\n    return ({fields})", namespace)
    written = {name: 2**number + 1 for number, name in enumerate(names)}
    filled = block(**written)
    assert numba.njit(namespace["read"])(ctypes.addressof(filled)) == tuple(written.values())


def test_what_kernels_draw_work_from_comes_first():
    for block in BLOCKS:
        if hasattr(block, "counter"):
            assert block.counter.offset == 0
            assert block.counter.size == 8
