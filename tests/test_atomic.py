"""What is written is there whole or not at all."""

import contextlib
import json
import math
import os
from pathlib import Path

import torch
from safetensors.torch import save_file

from recon.atomic import whole_file, whole_folder, write_json


def test_a_file_is_replaced_when_its_writer_is_done_and_not_before(tmp_path: Path) -> None:
    path = tmp_path / "made" / "video.gif"
    with whole_file(path) as aside:
        aside.write_text("first")
        assert aside.suffix == ".gif"
        assert not path.exists()
    with contextlib.suppress(KeyError), whole_file(path) as aside:
        aside.write_text("half")
        raise KeyError
    assert path.read_text() == "first"
    assert os.listdir(path.parent) == ["video.gif"]


def test_writers_with_names_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with whole_file(path, "1.") as one, whole_file(path, "2.") as two:
        one.write_text("one")
        two.write_text("two")
    assert path.read_text() == "one"
    assert os.listdir(tmp_path) == ["file"]


def test_a_folder_is_replaced_when_its_writer_is_done_and_not_before(tmp_path: Path) -> None:
    path = tmp_path / "made" / "folder"
    left = path.with_name(".partial.folder")
    left.mkdir(parents=True)
    (left / "half").touch()
    with whole_folder(path) as aside:
        (aside / "first").touch()
        assert not path.exists()
    with contextlib.suppress(KeyError), whole_folder(path) as aside:
        (aside / "second").touch()
        raise KeyError
    assert [file.name for file in path.iterdir()] == ["first"]
    with whole_folder(path) as aside:
        (aside / "third").touch()
    assert [file.name for file in path.iterdir()] == ["third"]
    assert os.listdir(path.parent) == ["folder"]


def test_who_may_read_it_is_for_the_umask_to_say(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with whole_file(tmp_path / "file.safetensors") as aside:
            save_file({"a": torch.zeros(1)}, aside)
        with whole_folder(tmp_path / "folder") as aside:
            (aside / "inner").mkdir()
            save_file({"a": torch.zeros(1)}, aside / "inner" / "file.safetensors")
    finally:
        os.umask(before)
    for file in tmp_path.rglob("*.safetensors"):
        assert file.stat().st_mode & 0o777 == 0o640


def test_numbers_that_json_has_not_become_null(tmp_path: Path) -> None:
    content = {"a": math.nan, "b": [math.inf, 1.5, (2, "x")], "c": {"d": -math.inf}, "e": None}
    write_json(tmp_path / "file.json", content)
    read = json.loads((tmp_path / "file.json").read_text())
    assert read == {"a": None, "b": [None, 1.5, [2, "x"]], "c": {"d": None}, "e": None}
