"""Reading adapter folders: headers, bases, links."""

import hashlib
import json
import os

import pytest
import safetensors.torch

from neuroada_serve.adapters.format import (
    BaseSpec,
    file_digest,
    save_adapter,
)
from neuroada_serve.adapters.reader import AdapterReader, load_adapter
from neuroada_serve.errors import AdapterFormatError, AdapterNotFoundError
from tests.support.adapter_files import (
    CONFIG,
    FINGERPRINT,
    SHAPES,
    SPEC,
    WEIGHTS,
    assert_equal,
    data_of,
    new_adapter,
)

# --- header ---------------------------------------------------------------------------------------


def test_header_tells_what_an_adapter_is_without_its_values(tmp_path):
    adapter = new_adapter(SHAPES)
    save_adapter(adapter, tmp_path)
    size = len((tmp_path / WEIGHTS).read_bytes()) - len(data_of(tmp_path))
    with open(tmp_path / WEIGHTS, "r+b") as file:
        file.seek(size)
        file.write(b"\0" * len(data_of(tmp_path)))
    header = AdapterReader(SPEC).header(tmp_path)
    assert (header.digest, header.nnz) == (adapter.digest, adapter.nnz)
    assert header.config == adapter.config
    assert header.modules == sorted(SHAPES)
    with pytest.raises(AdapterFormatError, match="repeats a column"):  # of zeros
        AdapterReader(SPEC).adapter(header)


def test_digest_is_the_same_whether_the_header_says_it_or_the_data_is_read(tmp_path):
    save_adapter(new_adapter(SHAPES), tmp_path / "one")
    tensors = safetensors.torch.load_file(tmp_path / "one" / WEIGHTS)
    metadata = {"format": "neuroada", "format_version": "1", "base_fingerprint": FINGERPRINT}
    safetensors.torch.save_file(tensors, tmp_path / "one" / WEIGHTS, metadata)
    header = AdapterReader(SPEC).header(tmp_path / "one")
    whole, data = (tmp_path / "one" / WEIGHTS).read_bytes(), data_of(tmp_path / "one")
    start = whole[: len(whole) - len(data)]
    assert header.digest == file_digest(start, hashlib.sha256(data).hexdigest())
    assert AdapterReader(SPEC).adapter(header).digest == header.digest


def test_every_flipped_byte_is_noticed(tmp_path):
    """T16: in the header it is an error or another adapter, in the data always an error."""
    save_adapter(new_adapter(SHAPES), tmp_path)
    good = AdapterReader(SPEC).adapter(AdapterReader(SPEC).header(tmp_path))
    reader, file = AdapterReader(SPEC), tmp_path / WEIGHTS
    whole = file.read_bytes()
    first_of_data = len(whole) - len(data_of(tmp_path))
    for at in range(len(whole)):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        try:
            adapter = reader.adapter(reader.header(tmp_path))
        except AdapterFormatError:
            continue
        assert at < first_of_data
        assert adapter.digest != good.digest


def test_known_header_does_not_vouch_for_another(tmp_path):
    """A reader that has checked a header once looks no further at equal ones, but at all others."""
    reader = AdapterReader(SPEC)
    for seed in (1, 2):
        save_adapter(new_adapter(SHAPES, seed=seed), tmp_path / "a")
        header = reader.header(tmp_path / "a")
        assert reader.adapter(header).digest == new_adapter(SHAPES, seed=seed).digest
    for kind in ({"k": 3}, {"base_fingerprint": "1" * 64}):
        save_adapter(new_adapter(SHAPES, **kind), tmp_path / "b")
        (tmp_path / "b" / WEIGHTS).write_bytes((tmp_path / "a" / WEIGHTS).read_bytes())
        with pytest.raises(AdapterFormatError):
            reader.header(tmp_path / "b")


def test_file_replaced_after_its_header_was_read_is_not_taken_for_it(tmp_path):
    reader = AdapterReader(SPEC)
    save_adapter(new_adapter(SHAPES, seed=1), tmp_path)
    header = reader.header(tmp_path)
    save_adapter(new_adapter(SHAPES, seed=2), tmp_path)
    with pytest.raises(AdapterFormatError, match="has changed; load it again"):
        reader.adapter(header)


# --- the base -------------------------------------------------------------------------------------


def test_other_base_is_refused_by_name_with_the_fix(tmp_path):
    save_adapter(new_adapter(SHAPES), tmp_path)
    other = BaseSpec("other", "f" * 64, SHAPES)
    with pytest.raises(AdapterFormatError, match=r"\('base', .* one \('other', .*; serve it on"):
        load_adapter(tmp_path, other)


def test_allow_other_base_accepts_the_fingerprint_but_not_the_shapes(tmp_path):
    adapter = new_adapter(SHAPES)
    save_adapter(adapter, tmp_path)
    assert_equal(
        load_adapter(tmp_path, BaseSpec("o", "f" * 64, SHAPES), allow_other_base=True), adapter
    )
    narrower = {name: (d_out, 2) for name, (d_out, _) in SHAPES.items()}
    with pytest.raises(AdapterFormatError, match="the base has d_in=2"):
        load_adapter(tmp_path, BaseSpec("o", "f" * 64, narrower), allow_other_base=True)


def test_targets_match_whole_name_parts(tmp_path):
    """'proj' is no ending of 'q_proj', and 'a' names the module a, not b.a.q_proj."""
    save_adapter(new_adapter({"x.q_proj": (2, 3)}, target_modules=("q_proj",)), tmp_path)
    wide = {"x.q_proj": (2, 3), "x.my_q_proj": (2, 3), "q_proj.x": (2, 3)}
    assert load_adapter(tmp_path, BaseSpec("base", FINGERPRINT, wide)).nnz == 4
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | {"target_modules": ["proj"]}))
    with pytest.raises(AdapterFormatError, match="not among target_modules"):
        load_adapter(tmp_path)


def test_adapter_without_a_base_is_checked_but_for_the_base(tmp_path):
    save_adapter(new_adapter(SHAPES, column_offset=60_000), tmp_path)
    assert load_adapter(tmp_path).nnz == 20
    with pytest.raises(AdapterFormatError, match="column 6000., the base has d_in="):
        load_adapter(tmp_path, SPEC)


# --- folders --------------------------------------------------------------------------------------


def test_links_within_the_root_are_followed(tmp_path):
    save_adapter(new_adapter(SHAPES), tmp_path / "v1")
    (tmp_path / "current").symlink_to("v1")
    assert load_adapter(tmp_path / "current", SPEC, root=tmp_path).nnz == 20


def test_links_are_followed_anywhere_without_a_root(tmp_path):
    save_adapter(new_adapter(SHAPES), tmp_path / "v1")
    (tmp_path / "link").mkdir()
    for file in (CONFIG, WEIGHTS):
        (tmp_path / "link" / file).symlink_to(tmp_path / "v1" / file)
    assert load_adapter(tmp_path / "link", SPEC).nnz == 20
    with pytest.raises(AdapterFormatError, match="link out of the adapter directory"):
        load_adapter(tmp_path / "link", SPEC, root=tmp_path / "link")


def test_missing_folder_says_what_it_must_hold(tmp_path):
    with pytest.raises(AdapterNotFoundError, match=f"must hold {CONFIG} and {WEIGHTS}"):
        load_adapter(tmp_path / "absent")


def test_files_can_be_read_by_others(tmp_path):
    save_adapter(new_adapter(SHAPES), tmp_path / "deep" / "er")
    for file in (tmp_path / "deep" / "er").iterdir():
        assert file.stat().st_mode & 0o444 == 0o444 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
