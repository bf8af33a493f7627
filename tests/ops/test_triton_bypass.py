"""The Triton kernels: run in Triton's interpreter (or on a GPU), and compiled for one."""

from tests.support.python import needs_triton, run_interpreted, run_python


@needs_triton
def test_kernels_equal_their_references():
    run_interpreted("bypass", "value_grad")


@needs_triton
def test_kernels_compile_for_a_gpu():
    """Compiling needs no GPU; the interpreter accepts kernels that the compiler refuses."""
    run_python("-m", "tests.support.compiled_kernels", TRITON_INTERPRET="0")


def test_kernels_import_without_triton():
    run_python(
        "-c",
        "import sys; sys.modules['triton'] = None\n"
        "from neuroada_serve.ops.triton_bypass import HAS_TRITON as bypass\n"
        "from neuroada_serve.engine.triton_attention import HAS_TRITON as attention\n"
        "from neuroada_serve.ops.triton_value_grad import HAS_TRITON as value_grad\n"
        "import neuroada_serve.engine.triton_prefill\n"
        "assert not bypass and not attention and not value_grad",
    )
