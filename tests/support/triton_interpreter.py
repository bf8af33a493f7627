"""Imported by the interpreted tests: Triton 3.6 and numpy 2.4 disagree about one conversion."""

from typing import Any

import torch
from triton.runtime import interpreter

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

_patch_lang_tensor = interpreter._patch_lang_tensor


def _patched(tensor: Any, scope: Any) -> None:
    """A scalar is an array of one element there; numpy no longer takes that for an integer."""
    _patch_lang_tensor(tensor, scope)
    tensor.__index__ = lambda self: int(self.handle.data.item())


interpreter._patch_lang_tensor = _patched
