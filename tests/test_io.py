"""Files are complete or not there, and tensors come back as they were saved."""

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from daamlib.io import atomic_write, check_file, load_dataclass, load_tensors, save_dataclass, save_tensors

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


@dataclass(frozen=True, eq=False)
class Inner:
    name: str
    grid: tuple[int, int]
    queries: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class Outer:
    weight: torch.Tensor
    inner: tuple[Inner, ...]
    rows: tuple[tuple[int, ...], ...]
    seconds: float
    text: str | None
    one: Inner | None = None
    by_name: Mapping[str, Inner] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)


def an_outer():
    first, second = Inner("a", (1, 2), torch.ones(2, 3)), Inner("b", (3, 4))
    return Outer(torch.arange(4.0), (first, second), ((0, 1), ()), 1, None, second, {"ü.": first}, {"x": [1, None]})


def test_a_dataclass_comes_back(tmp_path):
    path, saved = tmp_path / "a.safetensors", an_outer()
    save_dataclass(path, saved, FORMAT)
    back = load_dataclass(Outer, path, FORMAT)
    assert torch.equal(back.weight, saved.weight) and torch.equal(back.inner[0].queries, torch.ones(2, 3))
    assert torch.equal(back.by_name["ü."].queries, torch.ones(2, 3))
    assert back.inner[1].queries is back.text is back.one.queries is None
    assert (back.rows, back.inner[0].grid, back.seconds, back.info) == (((0, 1), ()), (1, 2), 1, {"x": [1, None]})
    assert load_tensors(path, FORMAT)[0].keys() == {"weight", "inner.0.queries", "by_name.ü..queries"}


WRONG_FIELDS = {
    "a text for a list": ({"rows": "01"}, "rows is '01'"),
    "a text in a list": ({"rows": [["0"]]}, "rows.0.0 is '0'"),
    "a list for a text": ({"text": ["a"]}, "text is"),
    "a number for a name": ({"one": {"name": 1, "grid": [1, 2]}}, "one.name is 1"),
    "too many": ({"one": {"name": "a", "grid": [1, 2, 3]}}, "zip"),
    "a part that is missing": ({"one": {"name": "a"}}, "one.grid is missing"),
    "a part more": ({"two": 1}, "the unexpected two"),
}


@pytest.mark.parametrize(("change", "message"), WRONG_FIELDS.values(), ids=WRONG_FIELDS)
def test_a_dataclass_of_other_fields_is_refused(tmp_path, change, message):
    path = tmp_path / "a.safetensors"
    save_dataclass(path, an_outer(), FORMAT)
    tensors, header = load_tensors(path, FORMAT)
    save_tensors(path, tensors, header | change, FORMAT)
    with pytest.raises(ValueError, match=f"a.safetensors.*{message}"):
        load_dataclass(Outer, path, FORMAT)
    save_tensors(path, {}, header, FORMAT)
    with pytest.raises(ValueError, match="weight is missing"):
        load_dataclass(Outer, path, FORMAT)


def test_fields_that_an_older_file_does_not_have_get_their_default(tmp_path):
    save_tensors(tmp_path / "a.safetensors", {}, {"name": "a", "grid": [1, 2]}, FORMAT)
    assert dataclasses.astuple(load_dataclass(Inner, tmp_path / "a.safetensors", FORMAT)) == ("a", (1, 2), None)


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
