"""`import neuroada_serve`: its names, and what importing it costs."""

import subprocess
import sys

import pytest

import neuroada_serve


def test_all_is_what_there_is():
    assert set(neuroada_serve.__all__) == {
        "LLM",
        "Adapter",
        "NeuroAdaError",
        "SamplingParams",
        "__version__",
        "load_adapter",
        "save_adapter",
    }
    for name in neuroada_serve.__all__:
        assert getattr(neuroada_serve, name) is not None


def test_dir_shows_all_and_nothing_else():
    shown = [name for name in dir(neuroada_serve) if not name.startswith("__")]
    assert shown == sorted(set(neuroada_serve.__all__) - {"__version__"})


def test_import_and_dir_leave_torch_alone():
    code = "import sys, neuroada_serve; dir(neuroada_serve); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="Nobody"):
        _ = neuroada_serve.Nobody
