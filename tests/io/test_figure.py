"""write_figure: whole, or an error that says what was expected."""

import os

import pytest

from transferjax._errors import CheckpointError
from transferjax.io import write_figure


class Figure:
    def savefig(self, file, format):
        if format == "xyz":
            raise ValueError("Format 'xyz' is not supported (supported formats: pdf, png, svg)")
        file.write(f"a {format}".encode())


def test_the_ending_chooses_the_format(tmp_path):
    assert write_figure(tmp_path / "new/a.svg", Figure()).read_bytes() == b"a svg"
    assert write_figure(tmp_path / "a", Figure()).read_bytes() == b"a png"


@pytest.mark.parametrize(
    ("name", "figure", "message"),
    [
        ("a.png", None, r"write_figure\(\) expects a matplotlib Figure second, got NoneType"),
        ("a.xyz", Figure(), r"the figure cannot be drawn for '.*a\.xyz': Format 'xyz' is not supported"),
    ],
)
def test_what_cannot_be_drawn_leaves_nothing(tmp_path, name, figure, message):
    with pytest.raises(CheckpointError, match=message):
        write_figure(tmp_path / name, figure)
    assert os.listdir(tmp_path) == []


def test_the_arguments_the_wrong_way_round():
    with pytest.raises(CheckpointError, match=r"write_figure\(\) expects the path of a file or directory, got Figure"):
        write_figure(Figure(), "a.png")


def test_a_figure_takes_no_place_of_a_directory(tmp_path):
    (tmp_path / "a.png").mkdir()
    with pytest.raises(CheckpointError, match=r"a\.png' is a directory, and a file does not take its place"):
        write_figure(tmp_path / "a.png", Figure())
    assert (tmp_path / "a.png").is_dir()
