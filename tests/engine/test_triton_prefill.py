"""The prefill attention kernel: run in Triton's interpreter, or on a GPU where there is one."""

from tests.support.python import needs_triton, run_interpreted


@needs_triton
def test_prefill_attention_equals_its_reference():
    run_interpreted("prefill")
