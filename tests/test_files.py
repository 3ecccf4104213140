"""Outputs are complete or absent."""

import json

import pytest

from lymph_hf.files import write_json, write_text, writing_file, writing_folder


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "sub" / "a.txt"
    write_text(path, "first")

    def fail():
        with writing_file(path) as beside:
            beside.write_text("half")
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        fail()
    assert path.read_text() == "first"
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


def test_a_folder_appears_whole_and_replaces_the_older_one(tmp_path):
    place = tmp_path / "model"
    for text in ("one", "two"):
        with writing_folder(place) as beside:
            (beside / text).write_text(text)
            assert not (place / text).exists()
    assert [p.name for p in place.iterdir()] == ["two"]

    def fail():
        with writing_folder(place) as beside:
            (beside / "half").write_text("half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert [p.name for p in place.iterdir()] == ["two"]
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_json_has_no_nan(tmp_path):
    write_json(tmp_path / "a.json", {"a": [float("nan"), 1.5], "b": float("inf"), "c": "é"})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [None, 1.5], "b": None, "c": "é"}
