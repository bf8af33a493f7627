"""Faults that end an engine: of its device, and of step after step.

CUDA reports a kernel's fault at some later call, and from then on at every call of the process
("sticky"): whatever an engine does afterwards fails, so that only a new process helps.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from neuroada_serve.errors import DeviceError, EngineError

logger = logging.getLogger(__name__)

MAX_FAILED_STEPS = 8  # in a row

# How the messages of CUDA, its libraries and Triton begin, perhaps after words of somebody else.
_OF_THE_DEVICE = (
    "CUDA error",
    "CUDA driver error",
    "CUDA Error",
    "Triton Error [CUDA]",
    "cuDNN error",
    "cuDNN Frontend error",
    "CUBLAS_STATUS_",
    "device-side assert triggered",
    "illegal memory access",
)
# Errors that leave the device as it was: of a call, of memory, and of recording a graph.
_PASSING = (
    "out of memory",
    "invalid argument",
    "invalid configuration argument",
    "invalid device function",
    "invalid resource handle",
    "no kernel image",
    "PTX",
    "too many resources requested for launch",
    "too many blocks in cooperative launch",
    "operation not permitted",
    "operation not supported",
    "captur",
    "uncaptured work",
    "ALLOC_FAILED",
    "NOT_INITIALIZED",
    "INVALID_VALUE",
    "BAD_PARAM",
    "ARCH_MISMATCH",
    "NOT_SUPPORTED",
)
# Passing by its text, but not by what it means.
_STICKY = ("operation not supported on global/shared address space",)


def is_device_fault(error: BaseException) -> bool:
    """Return whether an exception, or one that led to it, says that the device works no more for
    this process. Want of memory is none, nor is a graph that cannot be recorded."""
    seen: set[int] = set()
    left: list[BaseException | None] = [error]
    while left:
        found = left.pop()
        if found is None or id(found) in seen:
            continue
        if _is_sticky(found):
            return True
        seen.add(id(found))
        left += [found.__cause__, found.__context__]
    return False


def raise_device_fault(error: BaseException, device: torch.device | None = None) -> None:
    """Raise what ends an engine if its device is at fault; else return.

    Args:
        device: asked, if it is a GPU, whether it still works where the exception does not tell.

    Raises:
        DeviceError: from `error`, or from what the device says.
    """
    fault: BaseException | None = error if is_device_fault(error) else None
    if fault is None and device is not None and device.type == "cuda":
        fault = _ask(device)
    if fault is not None:
        raise DeviceError(
            f"the device failed, and only a new process can use it: {_summary(fault)}"
        ) from fault


class Faults:
    """Judges what is raised in the steps of one engine. Once that has ended the engine, no further
    step begins.

    Args:
        device: of the engine.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._num_failed = 0  # steps in a row
        self._end: EngineError | None = None

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Watch a step: what leaves it because of the device is a DeviceError.

        Raises:
            EngineError: an earlier step, or this one, has ended the engine.
        """
        if self._end is not None:
            raise self._end
        try:
            yield
        except EngineError as error:
            self._end = error
            raise
        except Exception as error:
            try:
                self.judge(error)
            except EngineError as end:
                self._end = end
                raise
            raise

    def judge(self, error: Exception) -> None:
        """Return if the engine can go on after this exception.

        Raises:
            DeviceError: it cannot.
        """
        raise_device_fault(error, self._device)

    def count(self, error: Exception) -> None:
        """Log and count a step that failed for an unknown reason.

        Raises:
            EngineError: it is one too many.
        """
        logger.error("a step failed; its requests end with an error", exc_info=error)
        self._num_failed += 1
        if self._num_failed >= MAX_FAILED_STEPS:
            raise EngineError(
                f"{self._num_failed} steps in a row failed, the last one with {_summary(error)}"
            ) from error

    def forget(self) -> None:
        """Forget failed steps: one has succeeded."""
        self._num_failed = 0


def _is_sticky(error: BaseException) -> bool:
    # Only lines that name an error: torch adds advice on device-side assertions to all of them.
    lines = [s for s in str(error).splitlines() if any(said in s for said in _OF_THE_DEVICE)]
    if isinstance(error, torch.OutOfMemoryError):
        return False
    if isinstance(error, torch.AcceleratorError):
        lines = lines or [_first_line(error)]
    elif not isinstance(error, RuntimeError):
        return False
    return any(any(s in line for s in _STICKY) or not _is_passing(line) for line in lines)


def _is_passing(line: str) -> bool:
    return any(said in line for said in _PASSING)


def _ask(device: torch.device) -> Exception | None:
    """Return the error of a device that works no more."""
    try:
        torch.cuda.synchronize(device)
    except Exception as error:
        return error if is_device_fault(error) else None
    return None


def _summary(error: BaseException) -> str:
    return f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "")
