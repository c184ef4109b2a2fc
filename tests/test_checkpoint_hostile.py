"""What somebody else hands over as a checkpoint: refused in words, whatever it is, and never executed."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_checkpoint import DENSE_FILE, TABLE_FILE, entry, linear, make, put, read, refused, whole_table, write
from safetensors.torch import load_file, save_file
from torch import nn

from dist_rec.cli import main
from dist_rec.errors import UserError
from dist_rec.training import checkpoint
from dist_rec.training.checkpoint.boxes import Box, fault_of_tiling
from dist_rec.training.checkpoint.export import export_full, inspect
from dist_rec.training.checkpoint.reader import row_state
from dist_rec.training.checkpoint.tensor_file import Entry, write_tensors


@pytest.fixture
def folder(tmp_path) -> Path:
    return make(tmp_path / "checkpoints" / "step-00000007")


def test_the_made_one_is_good(folder, tmp_path):
    saved = checkpoint.read_state(folder)
    model = nn.Linear(3, 2)
    checkpoint.load_dense(saved, model)
    assert torch.equal(model.weight, linear().weight) and torch.equal(model.bias, linear().bias)
    export_full(saved, tmp_path / "all.safetensors", with_optimizer=True)
    found = load_file(tmp_path / "all.safetensors")
    assert torch.equal(found["tables.item"], whole_table())
    assert torch.equal(found["optimizer.tables.item.momentum1"], whole_table()[:, 0])
    assert inspect(saved)["table_parameters"] == 24


def test_row_wise_momenta_of_column_shards_are_weighed_by_width(tmp_path):
    """A shard over 3 + 1 saved columns; one that lies in a saved shard gets its number to the bit."""
    (tmp_path / "tables").mkdir()
    momenta = {0: torch.tensor([0.1, 8.0]), 3: torch.tensor([0.7, 4.0])}
    entries, pieces = [], []
    for column, width in ((0, 3), (3, 1)):
        pieces.append({"file": TABLE_FILE, "offset": [0, column], "size": [2, width]})
        entries += [entry(f"item|weight|0,{column}", torch.zeros(2, width))]
        entries += [entry(f"item|momentum1|0,{column}", momenta[column])]
    written = write_tensors(tmp_path / TABLE_FILE, entries)
    make(tmp_path / "other")
    data = read(tmp_path / "other") | {"dense": {}, "files": {TABLE_FILE: vars(written)}}
    data["tables"]["item"] |= {"shape": [2, 4], "pieces": pieces}
    write(tmp_path, data)
    saved = checkpoint.read_state(tmp_path)
    info = saved.manifest.tables["item"]

    def state(column, columns):
        return row_state(saved, "item", info, "momentum1", Box((0, column), (2, columns)))

    assert state(0, 4).tolist() == pytest.approx([(3 * 0.1 + 0.7) / 4, 7.0])
    assert state(2, 2).tolist() == pytest.approx([0.4, 6.0])
    assert torch.equal(state(1, 2), momenta[0]) and torch.equal(state(3, 1), momenta[3])


def test_a_model_that_is_not_the_checkpoint_s_is_refused_with_every_difference(folder):
    saved = checkpoint.read_state(folder)
    with pytest.raises(UserError) as caught:
        checkpoint.load_dense(saved, nn.Sequential(nn.Linear(3, 2)))
    lines = str(caught.value).splitlines()
    assert "(4 differences)" in lines[0] and "  - 0.weight is not in the checkpoint" in lines
    with pytest.raises(UserError, match=r"weight is \[2, 3\], the model wants \[5, 3\]"):
        checkpoint.load_dense(saved, nn.Linear(3, 5))


def _set(*path):
    """A change of checkpoint.json: the last of `path` is put at the place that the others name."""
    *places, last, value = path

    def change(data):
        place = data
        for key in places:
            place = place[key]
        place[last] = value

    return change


def _rename_file(new):
    def change(data):
        data["files"][new] = data["files"].pop(TABLE_FILE)
        data["tables"]["item"]["pieces"][0]["file"] = new

    return change


PIECES = ("tables", "item", "pieces")
LIES = {
    "path upwards": (_rename_file("../../secret.safetensors"), "should match pattern"),
    "path through a folder": (_rename_file("tables/../../rank-00000.safetensors"), "should match pattern"),
    "absolute path": (_rename_file("/etc/rank-00000.safetensors"), "should match pattern"),
    "newline in a path": (_rename_file("tables/rank-00000.safetensors\n"), "should match pattern"),
    "unlisted file": (_set(*PIECES, 0, "file", "tables/rank-00009.safetensors"), "which is not listed"),
    "dense piece in a table file": (_set("dense", "bias", "pieces", 0, "file", TABLE_FILE), "not listed"),
    "negative step": (_set("step", -1), "step: "),
    "step of another type": (_set("step", {"$": 1}), "step: "),
    "endless step": (_set("step", float("inf")), "step: "),
    "unknown key": (_set("shell", "rm"), "shell: unknown key"),
    "missing section": (lambda data: data.pop("files"), "files: is required"),
    "absurd shape": (_set("tables", "item", "shape", [2**60, 4]), "shape.0"),
    "huge shape": (_set("tables", "item", "shape", [2**47, 2**47]), "pieces cover 24 of"),
    "shape of one dimension": (_set("tables", "item", "shape", [24]), "has shape [24]"),
    "table laid flat": (_set("tables", "item", "flat", True), "flat True"),
    "shape of a string": (_set("tables", "item", "shape", "64"), "shape"),
    "negative offset": (_set(*PIECES, 1, "offset", [-2, 0]), "offset.0"),
    "piece without rows": (_set(*PIECES, 1, "size", [0, 4]), "lies outside"),
    "piece of one dimension": (_set(*PIECES, 1, {"file": TABLE_FILE, "offset": [0], "size": [2]}), "not 2 dimensions"),
    "offset and size differ": (_set(*PIECES, 1, "size", [2]), "dimensions"),
    "overlap": (_set(*PIECES, 1, "offset", [3, 0]), "overlap"),
    "outside": (_set(*PIECES, 1, "offset", [5, 0]), "lies outside 6 x 4"),
    "missing piece": (lambda data: data["tables"]["item"]["pieces"].pop(), "pieces cover 16 of 24"),
    "unknown dtype": (_set("tables", "item", "kinds", "weight", "dtype", "F4096"), "dtype"),
    "no weight": (lambda data: data["tables"]["item"]["kinds"].pop("weight"), "impossible kinds"),
    "dense by rows": (_set("dense", "bias", "kinds", "parameter", "per_row", True), "impossible kinds"),
    "weight by rows": (_set("tables", "item", "kinds", "weight", "per_row", True), "impossible kinds"),
    "another dtype": (_set("tables", "item", "kinds", "weight", "dtype", "F64"), "is F32 [4, 4], not F64"),
    "another kind": (_set("tables", "item", "kinds", "momentum2", {"dtype": "F32"}), "lacks 'item|momentum2|0,0'"),
    "plan of strings": (_set("plan", {"item": "row_wise"}), "plan.item"),
    "length": (_set("files", TABLE_FILE, "bytes", 1), "bytes, not 1"),
    "checksum": (_set("files", TABLE_FILE, "sha256", "0" * 64), f"{TABLE_FILE} does not match its checksum"),
    "checksum of another kind": (_set("files", TABLE_FILE, "sha256", "x"), "should match pattern"),
    "old format": (_set("format", "dist_rec-checkpoint/1"), "is not of format dist_rec-checkpoint/2"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_manifest_that_lies_is_refused(folder, lie):
    change, words = LIES[lie]
    data = read(folder)
    change(data)
    write(folder, data)
    assert words in refused(folder)


@pytest.mark.parametrize(
    "text",
    [b"", b"\xff\xfe", b"[" * 100_000, b"[]", b"1" * 100_000, b'{"format": 1', b"null", b'"x"', b'{"step": 1e999}'],
    ids=["empty", "no text", "deep", "list", "long number", "cut", "null", "string", "endless"],
)
def test_what_is_no_manifest_is_refused(folder, text):
    (folder / checkpoint.STATE_NAME).write_bytes(text)
    assert checkpoint.STATE_NAME in refused(folder)


def test_a_manifest_that_was_changed_is_refused(folder):
    path = folder / checkpoint.STATE_NAME
    path.write_text(path.read_text().replace('"step": 7', '"step": 8'))
    assert "checkpoint.json does not match its own checksum" in refused(folder)


class Canary:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_is_never_executed(folder, tmp_path):
    canary = tmp_path / "canary"
    torch.save({"item|weight|0,0": Canary(str(canary))}, tmp_path / "torch.pt")
    for content in (pickle.dumps(Canary(str(canary))), (tmp_path / "torch.pt").read_bytes()):
        put(folder, TABLE_FILE, content)
        assert f"{TABLE_FILE} is no safetensors file" in refused(folder)
        assert not canary.exists()
    pickle.loads(pickle.dumps(Canary(str(canary))))
    assert canary.exists()  # it would have shown


def tensor_file(header: dict | bytes, data: bytes, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def item(shape, offsets, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HEADERS = {
    "endless header": tensor_file(b"{}", b"", 2**63),
    "header past the end": tensor_file(b"{}", b"", 1 << 40),
    "no header": b"\0" * 4,
    "not JSON": tensor_file(b"{" * 64, b""),
    "past the end": tensor_file({"item|weight|0,0": item([4, 4], [0, 1 << 40])}, b"\0" * 64),
    "backwards": tensor_file({"item|weight|0,0": item([4, 4], [64, 0])}, b"\0" * 64),
    "shape larger than its bytes": tensor_file({"item|weight|0,0": item([1 << 40, 4], [0, 64])}, b"\0" * 64),
    "shape that overflows": tensor_file({"item|weight|0,0": item([1 << 62, 1 << 62], [0, 64])}, b"\0" * 64),
    "unknown dtype": tensor_file({"item|weight|0,0": item([4, 4], [0, 64], "Q9")}, b"\0" * 64),
    "holes": tensor_file({"item|weight|0,0": item([4, 4], [8, 72])}, b"\0" * 72),
    "the same bytes twice": tensor_file(
        {"item|weight|0,0": item([4, 4], [0, 64]), "item|momentum1|0,0": item([4], [0, 16])}, b"\0" * 64
    ),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_lies_is_refused(folder, name):
    put(folder, TABLE_FILE, HEADERS[name])
    assert f"{TABLE_FILE} is no safetensors file" in refused(folder)


@pytest.mark.parametrize("other", ["shape", "dtype", "names"])
def test_a_file_that_is_not_what_the_manifest_says_is_refused(folder, other):
    tensors = load_file(folder / TABLE_FILE)
    key = "item|weight|0,0"
    weight = tensors.pop(key)
    tensors[key if other != "names" else "else"] = weight.half() if other == "dtype" else weight.view(2, 8)
    save_file(tensors, folder / "x")
    put(folder, TABLE_FILE, (folder / "x").read_bytes())
    assert {"shape": "[2, 8], not F32 [4, 4]", "dtype": "F16", "names": "lacks"}[other] in refused(folder)


def test_links_are_not_followed(folder, tmp_path):
    (folder / TABLE_FILE).rename(tmp_path / "elsewhere")
    (folder / TABLE_FILE).symlink_to(tmp_path / "elsewhere")
    assert f"{TABLE_FILE} is missing" in refused(folder)


def test_latest_leads_nowhere_else(tmp_path):
    make(tmp_path / "elsewhere" / "step-00000001")
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    for text in ("../../elsewhere/step-00000001", str(tmp_path / "elsewhere/step-00000001"), "", ".", "\0", "\xff"):
        (folder / "latest").write_bytes(text.encode("latin1"))
        with pytest.raises(UserError, match="no checkpoint at"):
            checkpoint.find(tmp_path / "run")
    assert checkpoint.last_good(folder) is None


def test_every_damage_is_named_and_the_verb_ends_with_2(folder, monkeypatch, capsys):
    flipped = bytearray((folder / DENSE_FILE).read_bytes())
    flipped[-3] ^= 4
    (folder / DENSE_FILE).write_bytes(flipped)
    (folder / TABLE_FILE).write_bytes((folder / TABLE_FILE).read_bytes()[:-5])
    (folder / "tables/rank-00001.safetensors").unlink()
    monkeypatch.setattr("sys.argv", ["dist-rec", "checkpoint", "verify", str(folder)])
    with pytest.raises(SystemExit) as end:
        main()
    said = capsys.readouterr().err
    assert end.value.code == 2 and "is damaged (3 faults):" in said
    for fault in (
        "dense/rank-00000.safetensors does not match",
        "rank-00000.safetensors has",
        "rank-00001.safetensors is missing",
    ):
        assert fault in said


def test_the_newest_that_is_whole_is_taken(tmp_path):
    folder = tmp_path / "checkpoints"
    for step in (1, 2, 3, 4):
        make(folder / f"step-{step:08d}", step)
    (folder / "step-00000004" / DENSE_FILE).write_bytes(b"")
    (folder / "step-00000003" / checkpoint.STATE_NAME).unlink()
    (folder / ".step-00000009.partial-x").mkdir()
    (folder / "step-100000000.old").mkdir()
    saved = checkpoint.last_good(folder)
    assert saved.step == 2 and len(saved.passed_over) == 2
    assert "step-00000004 is damaged: dense/rank-00000.safetensors has 0 bytes" in saved.passed_over[0]
    assert "step-00000003/checkpoint.json cannot be read" in saved.passed_over[1]
    for step in (1, 2):
        shutil.rmtree(folder / f"step-{step:08d}" / "tables")
    with pytest.raises(UserError, match="no checkpoint in .* is whole"):
        checkpoint.last_good(folder)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_damage_goes_unseen(folder, data):
    """Bytes flipped, cut and added anywhere in any file."""
    name = data.draw(st.sampled_from([TABLE_FILE, DENSE_FILE, "tables/rank-00001.safetensors", checkpoint.STATE_NAME]))
    path = folder / name
    before = path.read_bytes()
    damaged = bytearray(before)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        match data.draw(st.sampled_from(["flip", "cut", "add"])):
            case "flip":
                damaged[at] ^= data.draw(st.integers(1, 255))
            case "cut":
                del damaged[at : at + data.draw(st.integers(1, 50))]
            case "add":
                damaged[at:at] = data.draw(st.binary(min_size=1, max_size=20))
        damaged = damaged or bytearray(b"x")
    if name == checkpoint.STATE_NAME and _same_json(before, bytes(damaged)):
        return
    if bytes(damaged) == before:
        return
    try:
        path.write_bytes(damaged)
        refused(folder)
    finally:
        path.write_bytes(before)


def _same_json(one: bytes, other: bytes) -> bool:
    try:
        return json.loads(one) == json.loads(other)
    except (ValueError, RecursionError):
        return False


@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_pieces_tile_or_it_is_said(rows, columns, data):
    """Cut at random, then with one piece moved, lost or twice."""
    boxes = [Box((0, 0), (rows, columns))]
    for _ in range(data.draw(st.integers(0, 6))):
        box = boxes.pop(data.draw(st.integers(0, len(boxes) - 1)))
        axis = data.draw(st.integers(0, 1))
        if box.size[axis] < 2:
            boxes.append(box)
            continue
        cut = data.draw(st.integers(1, box.size[axis] - 1))
        for start, size in ((0, cut), (cut, box.size[axis] - cut)):
            offset, sizes = list(box.offset), list(box.size)
            offset[axis] += start
            sizes[axis] = size
            boxes.append(Box(tuple(offset), tuple(sizes)))
    boxes = data.draw(st.permutations(boxes))
    assert fault_of_tiling((rows, columns), boxes) is None
    assert fault_of_tiling((rows, columns), boxes[1:]) is not None
    assert fault_of_tiling((rows, columns), [*boxes, boxes[0]]) is not None
    first = boxes[0]
    moved = Box((first.offset[0] + 1, first.offset[1]), first.size)
    assert fault_of_tiling((rows, columns), [moved, *boxes[1:]]) is not None


def test_what_is_written_in_blocks_is_a_safetensors_file(tmp_path):
    """Every dtype, empty tensors, strange names, many blocks: as the library reads it."""
    tensors = {
        "a": torch.randn(100, 7),
        'strange "name" | \n é': torch.randn(3).bfloat16(),
        "half": torch.randn(5, 2).half(),
        "long": torch.tensor([-(2**62)]),
        "flags": torch.tensor([True, False]),
        "none": torch.empty(0, 4),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
    }
    entries = [Entry(k, t.dtype, tuple(t.shape), lambda t=t: t.split(3) if t.ndim else [t]) for k, t in tensors.items()]
    info = write_tensors(tmp_path / "x.safetensors", entries, {"step": "3"})
    content = (tmp_path / "x.safetensors").read_bytes()
    assert (info.bytes, info.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[k], t) and found[k].dtype == t.dtype for k, t in tensors.items())
    assert int.from_bytes(content[:8], "little") % 8 == 0
