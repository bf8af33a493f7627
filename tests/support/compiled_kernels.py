"""Compile every kernel for compute capability 9.0, on any machine; run by test_triton_bypass.py.

The types are those of Llama-3-8B in bfloat16. Prints registers' and shared memory's needs.
"""

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from neuroada_serve.engine import triton_attention, triton_prefill
from neuroada_serve.ops import triton_bypass

SHARED_LIMIT = 227 * 1024
POINTERS = {
    **dict.fromkeys(("index", "token_slot", "merged_slot"), "*i32"),
    **dict.fromkeys(("tables", "slots", "positions", "tiles"), "*i32"),
    **dict.fromkeys(("parts", "weights"), "*fp32"),
}
FLOATS = ("scale", "cap")
TENSORS = ["y", "x", "x_t", "bypass", "weight", "saved", "query", "keys", "values", "k", "v", "out"]


def compile_kernel(kernel: Any, num_warps: int = 4, dtype: str = "*bf16", **constants: Any) -> None:
    """Raises where the compiler refuses the kernel, or where no GPU could hold its tile."""
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        scalar = "fp32" if name in FLOATS else "i32"
        signature[name] = POINTERS.get(name, dtype if name in TENSORS else scalar)
        if scalar != "fp32" and name not in ("num_tokens", "num_slots"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": num_warps, "launch_pdl": constants.get("EARLY", False)}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert "cubin" in compiled.asm
    assert compiled.metadata.shared <= SHARED_LIMIT, (kernel, compiled.metadata.shared)
    print(f"{kernel.__name__:20} {constants} shared {compiled.metadata.shared}")


def main() -> None:
    for k in (1, 8, 20):
        for way, d_in, early in (
            ("direct", 4096, False),
            ("staged", 4096, False),
            ("staged", 14336, True),
        ):
            compile_kernel(
                triton_bypass._rows_kernel,
                8,
                K=k,
                BLOCK_K=triton_bypass._block_k(k),
                ROWS=512,
                D_BLOCK=triton_bypass._power_of_two(d_in),
                STAGED=way == "staged",
                EARLY=early,
            )
        compile_kernel(triton_bypass._lanes_kernel, K=k, ROWS=64, LANES=64)
        for save, add in ((True, True), (False, True), (False, False)):
            compile_kernel(triton_bypass._entries_kernel, K=k, BLOCK=1024, SAVE=save, ADD=add)
    compile_kernel(triton_attention._write_kernel, DIM=128, BLOCK_TOKENS=16, BLOCK=1024)
    for dtype, block_n, splits in (("*bf16", 64, 1), ("*bf16", 64, 32), ("*fp32", 32, 4)):
        compile_kernel(
            triton_attention._attention_kernel,
            dtype=dtype,
            HEADS=32,
            GROUP=4,
            DIM=128,
            BLOCK_TOKENS=16,
            BLOCK_G=16,
            BLOCK_D=128,
            BLOCK_N=block_n,
            SPLITS=splits,
            WINDOW=splits == 1,
            SOFTCAP=splits == 1,
        )
    for dtype, dim, rows, block_n in (
        ("*bf16", 128, 128, 64),
        ("*bf16", 256, 64, 32),
        ("*fp32", 128, 64, 32),
    ):
        compile_kernel(
            triton_prefill._prefill_kernel,
            num_warps=triton_prefill.num_warps(rows, 4 if dtype == "*fp32" else 2),
            dtype=dtype,
            HEADS=32,
            GROUP=4,
            DIM=dim,
            BLOCK_TOKENS=16,
            BLOCK_M=rows,
            BLOCK_D=dim,
            BLOCK_N=block_n,
            SPLITS=4 if dim == 256 else 1,
            WINDOW=dim == 256,
            SOFTCAP=dim == 256,
        )
    compile_kernel(triton_attention._combine_kernel, DIM=128, BLOCK_D=128, SPLITS=32)


if __name__ == "__main__":
    main()
