import numpy as np
import pytest
from PIL import Image

from transferjax import _errors
from transferjax.data import CorruptExampleError, image_folder


def test_classes_are_the_sorted_sub_folders(folder):
    source = image_folder(folder)
    assert source.class_names == ("cat", "dog")
    assert len(source) == 12
    for example in source:
        assert example["label"] == int(example["image"][0, 0, 0] >= 200)
        assert example["image"].shape == ((4, 10, 3) if example["label"] else (6, 8, 3))
    assert source.image_shape() is None


def test_ids_follow_the_alphabet_and_the_order_is_mixed(folder):
    source = image_folder(folder)
    assert sorted(source.ids()) == list(range(12))
    assert source.ids().tolist() != list(range(12))
    for example in source:
        assert example["id"] == example["label"] * 6 + example["image"][0, 0, 0] % 10
    assert set(image_folder(folder, "train[:50%]").labels()) == {0, 1}


def test_slices_of_a_flat_folder_part_it(folder):
    first, rest = image_folder(folder, "train[:75%]"), image_folder(folder, "train[75%:]")
    assert sorted([*first.ids(), *rest.ids()]) == list(range(12))


def test_split_folders(split_folder):
    train, test = image_folder(split_folder, "train"), image_folder(split_folder, "test")
    assert train.class_names == test.class_names == ("cat", "dog")
    assert train.labels().tolist().count(1) == 2
    assert test.labels().tolist() == [1]
    assert not set(train.ids()) & set(test.ids())
    assert len(image_folder(split_folder, "all")) == 4


def test_a_class_folder_may_be_deep_and_called_like_a_split(tmp_path, write_image):
    write_image(tmp_path / "test" / "1.png")
    write_image(tmp_path / "left" / "deep" / "2.JPG")
    (tmp_path / "left" / "notes.txt").write_text("no image")
    (tmp_path / ".hidden").mkdir()
    source = image_folder(tmp_path)
    assert source.class_names == ("left", "test")
    assert len(source) == 2


def test_grey_on_request_and_one_size_is_known(tmp_path, write_image):
    write_image(tmp_path / "a" / "1.png")
    write_image(tmp_path / "b" / "2.png", mode="L")
    source = image_folder(tmp_path, channels=1)
    assert source[0]["image"].shape == (6, 8, 1)
    assert source.image_shape() == (6, 8, 1)
    with pytest.raises(_errors.DataError, match=r"channels is 2; expected 3 \(RGB\) or 1 \(grey\)"):
        image_folder(tmp_path, channels=2)


def test_the_fingerprint_follows_content_not_place(folder, tmp_path):
    before = image_folder(folder).fingerprint()
    assert image_folder(folder.rename(tmp_path / "moved")).fingerprint() == before
    Image.new("RGB", (50, 50)).save(tmp_path / "moved" / "cat" / "0.png")
    assert image_folder(tmp_path / "moved").fingerprint() != before


def test_a_corrupt_image_is_named(folder):
    file = folder / "cat" / "3.png"
    file.write_bytes(file.read_bytes()[:40])
    source = image_folder(folder)
    row = source.ids().tolist().index(3)
    with pytest.raises(CorruptExampleError, match=r"cat/3\.png \(id 3\) cannot be decoded \(.*on_error='skip'"):
        source[row]
    (folder / "cat" / "3.png").write_bytes(b"")
    with pytest.raises(CorruptExampleError, match=r"cat/3\.png \(id 3\) cannot be decoded"):
        source[row]
    assert source.image_shape() is None


def test_a_file_that_went_away_is_named(folder):
    source = image_folder(folder)
    (folder / "cat" / "3.png").unlink()
    with pytest.raises(CorruptExampleError, match=r"cat/3\.png \(id 3\) cannot be decoded"):
        list(source)
    assert source.fingerprint()


def test_a_folder_without_readable_headers_has_no_known_shape(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").write_bytes(b"")
    assert image_folder(tmp_path).image_shape() is None


@pytest.mark.parametrize(
    ("files", "split", "message"),
    [
        ((), "train", r"holds no images in class sub-folders \(.bmp, "),
        (("1.png", "2.png"), "train", r"It holds 2 images itself, outside of class folders."),
        (("cat/1.png", "dog/notes"), "train", "no image in the class folders dog. Remove them or fill them."),
        (("cat/1.png",), "tset", r"has no split 'tset'. Its splits: 'train'."),
        (("train/cat/1.png", "val/cat/2.png"), "vall", r"Its splits: 'train', 'val'. Nearest: val."),
    ],
)
def test_a_folder_that_cannot_be_used_says_why(tmp_path, write_image, files, split, message):
    for name in files:
        if name.endswith(".png"):
            write_image(tmp_path / name)
        else:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text("")
    with pytest.raises(_errors.DataError, match=message):
        image_folder(tmp_path, split)


def test_no_such_folder(tmp_path):
    with pytest.raises(_errors.DataError, match=r"there is no folder .*nowhere. Expected a folder with one sub-folder"):
        image_folder(tmp_path / "nowhere")


def test_labels_need_no_decoding(folder):
    source = image_folder(folder)
    for file in folder.rglob("*.png"):
        file.write_bytes(b"")
    assert np.bincount(source.labels()).tolist() == [6, 6]
