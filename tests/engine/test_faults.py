"""A fault of the device, wherever it shows, ends the engine; so do too many failed steps."""

import time

import pytest
import torch

from neuroada_serve import LLM, SamplingParams
from neuroada_serve.adapters.bank import AdapterBank
from neuroada_serve.config import EngineConfig
from neuroada_serve.engine import runner, step_executor
from neuroada_serve.engine.engine import Engine
from neuroada_serve.engine.faults import (
    MAX_FAILED_STEPS,
    Faults,
    is_device_fault,
    raise_device_fault,
)
from neuroada_serve.engine.output_processor import OutputProcessor
from neuroada_serve.engine.runner import ModelRunner
from neuroada_serve.engine.scheduler import Scheduler
from neuroada_serve.errors import DeviceError, EngineError
from neuroada_serve.model.loader import load_base
from neuroada_serve.model.merge import WeightMerger
from neuroada_serve.request import FinishReason
from tests.support.tiny import random_adapter, save_tiny_model

# What torch adds to the message of every CUDA error.
ADVICE = (
    "\nCUDA kernel errors might be asynchronously reported at some other API call, so the "
    "stacktrace below might be incorrect.\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1"
    "\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.\n"
)
ILLEGAL = f"CUDA error: an illegal memory access was encountered{ADVICE}"
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


def chained(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError(ILLEGAL),
        torch.AcceleratorError("something new"),
        RuntimeError(f"CUDA error: device-side assert triggered{ADVICE}"),
        RuntimeError("CUDA error: uncorrectable ECC error encountered"),
        RuntimeError("CUDA error: operation not supported on global/shared address space"),
        RuntimeError("CUDA error: CUBLAS_STATUS_INTERNAL_ERROR when calling `cublasLtMatmul(...)`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(...)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
        RuntimeError("CUDA driver error: unspecified launch failure"),
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
        RuntimeError("in layer 3:\nCUDA error: misaligned address"),
        chained(ValueError("no cache"), torch.AcceleratorError(ILLEGAL)),
    ],
)
def test_what_says_that_the_device_is_lost(error):
    assert is_device_fault(error)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        torch.AcceleratorError(f"CUDA error: out of memory{ADVICE}"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        torch.AcceleratorError(f"CUDA error: invalid argument{ADVICE}"),
        torch.AcceleratorError(
            f"CUDA error: operation failed due to a previous error during capture{ADVICE}"
        ),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasLtMatmul(...)`"),
        RuntimeError("shapes cannot be multiplied"),
        ValueError("CUDA error: as a client wrote it"),
        MemoryError(),
    ],
)
def test_what_says_nothing_against_the_device(error):
    assert not is_device_fault(error)


@pytest.mark.parametrize("is_lost", [True, False])
def test_gpu_is_asked_where_an_error_does_not_tell(monkeypatch, is_lost):
    def synchronize(device):
        if is_lost:
            raise torch.AcceleratorError(ILLEGAL)

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    error = KeyError("whatever a failing kernel leads to")
    raise_device_fault(error, torch.device("cpu"))
    if is_lost:
        with pytest.raises(DeviceError, match="illegal memory access"):
            raise_device_fault(error, torch.device("cuda"))
    else:
        raise_device_fault(error, torch.device("cuda"))


# --- every place of a step -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    source = save_tiny_model(tmp_path_factory.mktemp("llama"), "llama")
    return source, {name: random_adapter(source, seed, k=2) for seed, name in enumerate("ab")}


def new_engine(tiny, **config) -> Engine:
    """An engine in the middle of a request of the base, with another one that waits; the adapters
    are known, and not on the device."""
    source, adapters = tiny
    engine = Engine(load_base(source), EngineConfig(max_num_seqs=1, **config))
    for name, adapter in adapters.items():
        engine.adapters.add(name, adapter)
    engine.add_request("runs", [5, 6, 7], GREEDY)
    engine.add_request("waits", [5, 6, 7], GREEDY)
    engine.step()
    return engine


def fault(*args, **kwargs):
    raise torch.AcceleratorError(ILLEGAL)


def steps(engine: Engine) -> None:
    """Step for as long as a loader may take."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        engine.step()
        time.sleep(0.001)


PLACES = {
    "run": (ModelRunner, "run"),
    "sample": (step_executor, "sample"),
    "schedule": (Scheduler, "schedule"),
    "process": (OutputProcessor, "process"),
    "release": (ModelRunner, "release"),
}


@pytest.mark.parametrize("place", PLACES)
def test_fault_in_a_step_ends_the_engine(tiny, monkeypatch, place):
    engine = new_engine(tiny)
    monkeypatch.setattr(*PLACES[place], fault)
    with pytest.raises(DeviceError, match="illegal memory access") as raised:
        steps(engine)
    assert isinstance(raised.value.__cause__, torch.AcceleratorError)
    monkeypatch.undo()
    with pytest.raises(DeviceError):  # nothing more is tried on such a device
        engine.step()


@pytest.mark.parametrize(
    "place",
    [(WeightMerger, "_entries"), (AdapterBank, "add_plane"), (AdapterBank, "write")],
    ids=["weights at an index", "index", "upload by a loader"],
)
def test_fault_while_an_adapter_is_brought_up_ends_the_engine(tiny, monkeypatch, place):
    engine = new_engine(tiny)
    monkeypatch.setattr(*place, fault)
    engine.adapters.prefetch("a")
    with pytest.raises(DeviceError, match="illegal memory access"):
        steps(engine)


def test_fault_while_an_adapter_is_merged_ends_the_engine(tiny, monkeypatch):
    engine = new_engine(tiny)
    engine.adapters.bring_in("a")
    monkeypatch.setattr("neuroada_serve.model.merge.merged_weights", fault)
    engine.adapters.merging.set_mode("a")
    with pytest.raises(DeviceError, match="illegal memory access"):
        steps(engine)


def test_llm_raises_the_fault_each_time(tiny, monkeypatch):
    llm = LLM(str(tiny[0].path))
    prompts = [[5, 6, 7], [8, 9]]
    with monkeypatch.context() as broken:
        broken.setattr(ModelRunner, "run", fault)
        with pytest.raises(DeviceError, match="illegal memory access"):
            llm.generate(prompts, GREEDY)
    with pytest.raises(DeviceError, match="illegal memory access"):
        llm.generate(prompts, GREEDY)


# --- failures that repeat ------------------------------------------------------------------------


def test_too_many_failed_steps_in_a_row_end_the_engine(tiny, monkeypatch, caplog):
    engine = new_engine(tiny)
    monkeypatch.setattr(ModelRunner, "run", lambda *args: 1 / 0)
    reasons = []
    for i in range(MAX_FAILED_STEPS - 1):
        engine.add_request(f"r{i}", [5], GREEDY)
        reasons += [output.finish_reason for output in engine.step()]
    assert reasons == [FinishReason.ERROR] * (MAX_FAILED_STEPS - 1)
    with pytest.raises(EngineError, match="8 steps in a row failed.*ZeroDivisionError"):
        engine.step()
    assert caplog.text.count("a step failed; its requests end with an error") == MAX_FAILED_STEPS


def test_good_step_between_failed_ones_keeps_the_engine_alive(tiny, monkeypatch):
    engine = new_engine(tiny)
    for i in range(2 * MAX_FAILED_STEPS):
        with monkeypatch.context() as broken:
            broken.setattr(ModelRunner, "run", lambda *args: 1 / 0)
            engine.add_request(f"r{i}", [5], GREEDY)
            engine.step()
        engine.add_request(f"good{i}", [5], GREEDY)
        engine.step()


def test_want_of_memory_is_no_failed_step(tiny, monkeypatch):
    engine = new_engine(tiny)

    def refuse(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(ModelRunner, "run", refuse)
    for i in range(2 * MAX_FAILED_STEPS):
        engine.add_request(f"r{i}", [5], GREEDY)
        engine.step()


def test_warm_up_that_fails_is_left_to_the_steps_unless_the_device_has_failed(caplog):
    def fail(message):
        def warm_up():
            raise RuntimeError(message)

        return warm_up

    runner._tried(fail("no such kernel"), torch.device("cpu"))
    assert "prompts' kernels are compiled when first needed" in caplog.text
    with pytest.raises(DeviceError):
        runner._tried(fail("CUDA error: an illegal memory access"), torch.device("cpu"))


def test_ended_engine_begins_no_step():
    faults = Faults(torch.device("cpu"))
    with pytest.raises(EngineError, match="over"), faults.watch():
        raise EngineError("over")
    begun = []
    with pytest.raises(EngineError, match="over"), faults.watch():
        begun.append(True)
    assert not begun
