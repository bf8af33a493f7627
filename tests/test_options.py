"""Settings as text."""

import pytest

from neuroada_serve.errors import UsageError
from neuroada_serve.options import parse_bytes


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("0", 0),
        ("1000000", 10**6),
        ("7B", 7),
        ("512MiB", 512 << 20),
        ("4GB", 4 * 10**9),
        ("4gb", 4 * 10**9),
        ("1.5 KiB", 1536),
        (" 2TiB ", 2 << 40),
        ("3kB", 3000),
        ("0.5B", 0),
        ("123456789012345", 123456789012345),
    ],
)
def test_size_is_read_in_its_unit(text, num_bytes):
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize(
    "text",
    ["", " ", "MiB", "-1", "+1", "1e9", "4XB", "4 G B", "1,5GB", ".5GB", "1.GB", "0x10", "nan"]
    + ["inf", "4GB4", "4\nGB x", "9" * 400],
)
def test_what_is_no_size_is_refused_with_examples(text):
    with pytest.raises(UsageError, match=r"is not a size; give .* 512MiB or 4GB"):
        parse_bytes(text)
