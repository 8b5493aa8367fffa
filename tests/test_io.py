"""Files are complete or not there, and tensors come back as they were saved."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from daamlib.io import atomic_write, check_file, load_tensors, save_tensors

FORMAT = "test-2"


def test_a_file_is_complete_or_not_there(tmp_path):
    path = tmp_path / "a.txt"
    with atomic_write(path) as temporary:
        temporary.write_text("old")
        assert not path.exists()
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_tensors_and_their_header_come_back(tmp_path):
    base = torch.arange(12.0)
    tensors = {"a": base.view(3, 4).T, "b": base[2:5], "half": base.half(), "none": torch.empty(0, 3)}
    header = {"format": "a name like any other", "words": ["Ampel", "rot é"], "nested": {"n": 1, "x": None}}
    save_tensors(tmp_path / "a.safetensors", tensors, header, FORMAT)
    found, again = load_tensors(str(tmp_path / "a.safetensors"), FORMAT)
    assert again == header
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_what_cannot_be_saved_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"a": torch.ones(2)}, {}, FORMAT)
    with pytest.raises(TypeError):
        save_tensors(path, {"a": torch.zeros(2)}, {"a": torch.zeros(2)}, FORMAT)
    assert torch.equal(load_tensors(path, FORMAT)[0]["a"], torch.ones(2))


@pytest.mark.parametrize("umask", [0o022, 0o007])
def test_files_have_the_permissions_of_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        save_tensors(tmp_path / "a.safetensors", {"a": torch.ones(2)}, {}, FORMAT)
        with atomic_write(tmp_path / "a.txt") as temporary:
            temporary.write_text("a")
    finally:
        os.umask(before)
    for name in ("a.safetensors", "a.txt"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"\x89PNG\r\n\x1a\n....", "a PNG picture"),
        (b"PK\x03\x04....", "a zip or PyTorch file"),
        (b'{"prompt": 1}', "JSON"),
        (b"", "it is empty"),
    ],
)
def test_a_file_of_another_kind_is_named(tmp_path, content, what):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    for read in (load_tensors, lambda path, _: check_file(path)):
        with pytest.raises(ValueError, match=f"a.safetensors .*{what}"):
            read(path, FORMAT)


def test_a_token_is_no_record_nor_the_reverse(tmp_path):
    path = tmp_path / "a.safetensors"
    for kind, other, expected in (
        ("daamlib-token-2", "daamlib-record-2", "an optimised token .*OptimizedToken.load"),
        ("daamlib-record-2", "daamlib-token-2", "an attention record .*AttentionRecord.load"),
        ("daamlib-joint-record-1", "daamlib-record-2", "a record of a joint model .*JointRecord.load"),
        ("daamlib-record-2", "daamlib-joint-record-1", "an attention record .*AttentionRecord.load"),
        ("daamlib-token-1", "daamlib-token-2", "make it anew"),
    ):
        save_tensors(path, {"a": torch.ones(2)}, {}, kind)
        check_file(path)
        with pytest.raises(ValueError, match=expected):
            load_tensors(path, other)
    save_file({"lora.down": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="another program.*lora.down"):
        load_tensors(path, FORMAT)


def test_files_that_are_not_of_the_format_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(FileNotFoundError, match="test-2"):
        load_tensors(path, FORMAT)
    save_tensors(path, {"a": torch.ones(100)}, {"n": 1}, "test-1")
    with pytest.raises(ValueError, match="test-1"):
        load_tensors(path, FORMAT)

    save_tensors(path, {"a": torch.ones(100)}, {"n": 1}, FORMAT)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match="a.safetensors"):
        load_tensors(path, FORMAT)
    path.write_text("not tensors")
    with pytest.raises(ValueError, match="a.safetensors"):
        load_tensors(path, FORMAT)


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {"other": "program"},
        {"daamlib": "not JSON"},
        {"daamlib": json.dumps(["no header"])},
        {"daamlib": json.dumps({"format": FORMAT})},
        {"daamlib": json.dumps({"format": FORMAT, "header": 3})},
        {"daamlib": json.dumps({"format": "test-1", "n": 1})},
    ],
)
def test_headers_that_are_none_are_refused(tmp_path, metadata):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(2)}, path, metadata=metadata)
    with pytest.raises(ValueError, match=FORMAT):
        load_tensors(path, FORMAT)
