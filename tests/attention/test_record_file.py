"""Records on disk."""

import dataclasses
import json
import struct

import pytest
import torch
from helpers import generate
from safetensors import safe_open
from safetensors.torch import save_file

import daamlib
from daamlib import AttentionRecord, io
from daamlib.attention.layers import KeyProjection

PROMPT = "a bicycle, señal"


@pytest.fixture(scope="module")
def record(sd1_pipe):
    with daamlib.trace(sd1_pipe) as trace:
        generate(sd1_pipe, ["a car", PROMPT])
    return trace[1]


@pytest.fixture
def path(record, tmp_path):
    record.save(tmp_path / "image.safetensors")
    return tmp_path / "image.safetensors"


def rewrite(path, change):
    """The record file again, after `change(header, tensors)`, as another program may write it: without a checksum."""
    with safe_open(path, "pt") as file:
        written = json.loads(file.metadata()["daamlib"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    del written["checksum"]
    change(written["header"], tensors)
    save_file(tensors, path, metadata={"daamlib": json.dumps(written)})


@pytest.mark.parametrize("store", ["queries", "linear"])
@pytest.mark.parametrize("branch", ["conditional", "unconditional"])
def test_a_record_comes_back_as_it_was(sd1_pipe, tmp_path, store, branch):
    with daamlib.trace(sd1_pipe, store=store, branch=branch, middle=True) as trace:
        generate(sd1_pipe, PROMPT)
    trace[0].save(tmp_path / "a.safetensors")
    back = AttentionRecord.load(tmp_path / "a.safetensors", pipe=sd1_pipe)
    for field in ("prompt", "timesteps", "branch", "grid", "nbytes", "d_text"):
        assert getattr(back, field) == getattr(trace[0], field)
    assert back.prompt_embeddings.tokens == trace[0].prompt_embeddings.tokens
    assert back.prompt_embeddings.words == trace[0].prompt_embeddings.words
    assert torch.equal(back.prompt_embeddings.values, trace[0].prompt_embeddings.values)
    for one, other in zip(back.layers, trace[0].layers, strict=True):
        for field in dataclasses.fields(one):
            a, b = getattr(one, field.name), getattr(other, field.name)
            if isinstance(a, KeyProjection):
                assert a.equals(b)
            else:
                assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    assert torch.equal(back.ldaam("a tree")["tree"], trace[0].ldaam("a tree")["tree"])
    if store == "queries":
        assert torch.equal(back.daam().values, trace[0].daam().values)


def test_half_precision_and_no_prompt(record, tmp_path):
    layers = [
        dataclasses.replace(layer, queries=layer.queries.bfloat16(), to_k=KeyProjection(layer.key_weight.half()))
        for layer in record.layers
    ]
    other = dataclasses.replace(record, layers=tuple(layers), prompt=None)
    other.save(str(tmp_path / "a.safetensors"))  # a string will do
    back = AttentionRecord.load(str(tmp_path / "a.safetensors"), device=record.device)
    assert back.prompt is None
    assert (back.layers[0].queries.dtype, back.layers[0].key_weight.dtype) == (torch.bfloat16, torch.float16)
    assert torch.equal(back.daam().values, other.daam().values)


def test_selected_parts_can_be_saved(record, sd1_pipe, tmp_path):
    part = record.select(steps=[1], heads=[0, 2], layers=lambda layer: layer.grid == (8, 12))
    part.save(tmp_path / "a.safetensors")
    back = AttentionRecord.load(tmp_path / "a.safetensors", device=record.device)
    assert torch.equal(back.daam().values, part.daam().values)
    layers = record.select(layers=lambda layer: layer.grid == (8, 12))
    layers.save(tmp_path / "b.safetensors")
    back = AttentionRecord.load(tmp_path / "b.safetensors", pipe=sd1_pipe)
    assert torch.equal(back.daam("a tree").values, layers.daam("a tree").values)


def test_a_collapsed_record_comes_back_as_it_was(record, sd1_pipe, tmp_path):
    small, path = record.collapsed(), tmp_path / "a.safetensors"
    small.save(path)
    back = AttentionRecord.load(path, pipe=sd1_pipe)
    assert back.nbytes == small.nbytes
    assert torch.equal(back.ldaam("a tree").values, small.ldaam("a tree").values)
    with pytest.raises(ValueError, match="collapsed"):
        back.daam()
    rewrite(path, lambda header, tensors: tensors.update({"kept_map.weight": tensors["kept_map.weight"][:-1]}))
    with pytest.raises(ValueError, match=r"its map has shape \(15, 24, 24\), expected \(16, 24, 24\)"):
        AttentionRecord.load(path)


def test_records_of_one_trace_share_no_storage_on_disk(record, path):
    assert path.stat().st_size < 1.2 * (record.nbytes + 77 * 24 * 4 + sum(a.key_weight.nbytes for a in record.layers))


def test_a_file_holds_what_the_formats_page_lists_and_needs_no_more(sd1_pipe, tmp_path):
    with daamlib.trace(sd1_pipe, self_attention=True) as trace:
        generate(sd1_pipe, PROMPT)
    trace[0].save(tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        names = {name.split(".", 2)[2] for name in file.keys() if name.startswith("layers.")}
    assert names == {"to_k.weight", "queries"}
    rewrite(tmp_path / "a.safetensors", lambda header, tensors: header["self_attention"].pop("linear"))  # a default
    back = AttentionRecord.load(tmp_path / "a.safetensors", pipe=sd1_pipe)
    assert torch.equal(back.refine(back.ldaam()).values, trace[0].refine(trace[0].ldaam()).values)


@pytest.mark.parametrize("version", [2, 4])
def test_a_file_of_another_version(path, version):
    with safe_open(path, "pt") as file:
        written, tensors = json.loads(file.metadata()["daamlib"]), {name: file.get_tensor(name) for name in file.keys()}
    written["format"] = f"daamlib-record-{version}"
    save_file(tensors, path, metadata={"daamlib": json.dumps(written)})
    with pytest.raises(ValueError, match=f"its format is daamlib-record-{version}: make it anew"):
        AttentionRecord.load(path)


def test_without_a_pipeline_there_are_maps_but_no_texts(record, path):
    assert AttentionRecord.load(path).device.type == "cpu"
    back = AttentionRecord.load(path, device=record.device)
    assert torch.equal(back.daam().values, record.daam().values)
    assert torch.equal(back.ldaam().values, record.ldaam().values)
    embeddings = record.encode("a tree")
    assert torch.equal(back.daam_from(embeddings).values, record.daam_from(embeddings).values)
    for method in (back.encode, back.daam, back.ldaam):
        with pytest.raises(ValueError, match=r"no text encoder: load it with AttentionRecord.load\(path, pipe=pipe\)"):
            method("a tree")


def test_another_models_pipeline(record, path, sd1_pipe, sd2_pipe, sdxl_pipe, tmp_path):
    assert AttentionRecord.load(path, pipe=sd1_pipe).pipe is sd1_pipe
    with pytest.raises(ValueError, match="other key weights"):
        AttentionRecord.load(path, pipe=sd2_pipe)
    with pytest.raises(ValueError, match="other cross-attention layers"):
        AttentionRecord.load(path, pipe=sdxl_pipe)
    with pytest.raises(TypeError, match="expected a diffusers pipeline"):
        AttentionRecord.load(path, pipe="sd1")


def test_a_pipeline_of_another_precision_is_the_same_model(path, fresh):
    pipe = fresh("sd1").to(dtype=torch.bfloat16)
    assert AttentionRecord.load(path, pipe=pipe).daam("a tree")["tree"].shape == (16, 24)


def test_a_failed_save_leaves_the_old_file_and_nothing_else(record, path, monkeypatch):
    before = path.read_bytes()

    def fail(tensors, target, metadata):
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(io, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        record.save(path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_file_is_replaced_and_its_folder_must_exist(record, path, tmp_path):
    record.select(steps=[0]).save(path)
    assert AttentionRecord.load(path).timesteps == record.timesteps[:1]
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(Exception, match="(?i)no such file"):
        record.save(tmp_path / "missing" / "a.safetensors")


def test_a_missing_file(tmp_path):
    for name in ("missing.safetensors", "."):
        with pytest.raises(FileNotFoundError, match="no file at"):
            AttentionRecord.load(tmp_path / name)


@pytest.mark.parametrize("length", [0, 4, 8, 100, 0.5, -1])
def test_a_truncated_file(path, length):
    content = path.read_bytes()
    path.write_bytes(content[: int(length * len(content)) if isinstance(length, float) else length])
    with pytest.raises(ValueError, match="image.safetensors is no readable file"):
        AttentionRecord.load(path)


def test_a_damaged_header(path):
    content = bytearray(path.read_bytes())
    content[8:40] = bytes(32)
    path.write_bytes(content)
    with pytest.raises(ValueError, match="no readable file"):
        AttentionRecord.load(path)
    path.write_bytes(struct.pack("<Q", 2**60) + bytes(100))
    with pytest.raises(ValueError, match="no readable file"):
        AttentionRecord.load(path)


@pytest.mark.parametrize("place", [0.2, 0.5, 0.9])
def test_damaged_values(path, place):
    content = bytearray(path.read_bytes())
    start = 8 + struct.unpack("<Q", content[:8])[0]  # of the tensors
    content[start + int(place * (len(content) - start))] ^= 255
    path.write_bytes(content)
    with pytest.raises(ValueError, match="values are not those that were written"):
        AttentionRecord.load(path)


def test_files_of_other_kinds(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="no readable file"):
        AttentionRecord.load(path)
    save_file({"weight": torch.zeros(2)}, path, metadata={"daamlib": "[]"})
    with pytest.raises(ValueError, match="no readable file"):
        AttentionRecord.load(path)
    path.write_text("a car")
    with pytest.raises(ValueError, match="no readable file"):
        AttentionRecord.load(path)


def test_a_pickle_is_never_read(tmp_path):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    torch.save({"a": Trap()}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="no readable file"):
        AttentionRecord.load(tmp_path / "a.safetensors")


def set_header(**fields):
    return lambda header, tensors: header.update(fields)


def set_layer(**fields):
    return lambda header, tensors: header["layers"][0].update(fields)


def set_prompt(**fields):
    return lambda header, tensors: header["prompt_embeddings"].update(fields)


CHANGES = {
    "no layers": (set_header(layers=[]), "it holds no layers"),
    "no tokens": (lambda header, tensors: header["prompt_embeddings"].pop("tokens"), "tokens is missing"),
    "words of another kind": (set_prompt(words=[[1]]), "prompt_embeddings.words.0"),
    "words without rows": (set_prompt(words=[{"text": "car"}]), "prompt_embeddings.words.0.start is missing"),
    "layers of another kind": (set_header(layers=3), "layers is 3"),
    "endless timesteps": (set_header(timesteps=[float("inf")] * 2), "its timesteps are"),
    "fewer steps": (set_header(timesteps=[1]), r"have shape \(2, 384, 8\), expected \(1, 384, 8\)"),
    "another grid": (set_layer(grid=[16, 16]), r"expected \(2, 256, 8\)"),
    "a grid in words": (set_layer(grid=["a", "b"]), "layers.0.grid.0 is 'a'"),
    "other heads": (set_layer(heads=3), r"keys of down_blocks.0.* have shape \(8, 24\), not 3 heads of width 24"),
    "no heads": (set_layer(heads=0), "not 0 heads"),
    "no grid": (lambda header, tensors: header["layers"][0].pop("grid"), "grid is missing"),
    "a field of no use": (set_header(colour="red"), "unexpected colour"),
    "fewer tokens": (set_prompt(tokens=["a"]), r"it has 1 tokens and embeddings of shape \(77, 24\)"),
    "no embeddings": (lambda header, tensors: tensors.pop("prompt_embeddings.values"), "prompt_embeddings.values"),
    "no queries": (lambda header, tensors: tensors.pop("layers.0.queries"), "have shape None"),
    "no keys": (lambda header, tensors: tensors.pop("layers.1.to_k.weight"), "layers.1.to_k.weight is missing"),
    "flat keys": (lambda header, tensors: tensors.update({"layers.0.to_k.weight": torch.zeros(8)}), r"shape \(8,\)"),
    "other keys": (
        lambda header, tensors: tensors.update({"layers.1.to_k.weight": torch.zeros(16, 5)}),
        r"shape \(16, 5\)",
    ),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_contents_that_do_not_fit(path, change, message):
    rewrite(path, change)
    with pytest.raises(ValueError, match=f"is not a readable attention record, or is damaged: .*{message}"):
        AttentionRecord.load(path)
