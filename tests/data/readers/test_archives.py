"""Links, names and sizes in folders and tars: links inside are read, what is not is said once."""

import bz2
import gzip
import io
import lzma
import os
import tarfile
import time
import unicodedata
import warnings
import zipfile

import pytest

from elle_fast.data import load
from tests.data.readers.test_image_folder import (
    assert_same,
    content,
    load_images,
    pixels,
    png,
    write_folder,
    write_tar,
)

EVIL = png(pixels("evil"))


def link(name, target, kind=tarfile.SYMTYPE):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def linked_tar(path, files, links, kind=tarfile.SYMTYPE, top=""):
    members = {name: link(top + name, target, kind) for name, target in links.items()}
    return write_tar(path, {top + name: data for name, data in files.items()} | members)


def linked_folder(root, files, links):
    write_folder(root, files)
    for name, target in links.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).symlink_to(target)
    return root


# Links


@pytest.mark.parametrize("top", ["", "top/"])
def test_hard_links_are_read(top, tmp_path):
    files = content()
    links = {"train/cat/99.png": f"{top}train/ant/00.png", "test/ant/98.png": f"{top}train/bee/01.png"}
    tar = linked_tar(tmp_path / "data.tar", files, links, tarfile.LNKTYPE, top)
    copies = {name: files[target.removeprefix(top)] for name, target in links.items()}
    assert_same(load_images(tar), load_images(write_folder(tmp_path / "folder", files | copies)))


def test_a_hard_link_is_to_the_member_before_it(tmp_path):
    files = content()
    changed = {"train/ant/00.png": EVIL}
    name = "train/cat/99.png"
    with tarfile.open(tmp_path / "data.tar", "w") as tar:
        for part in (files, {name: link(name, "train/ant/00.png", tarfile.LNKTYPE)}, changed):
            for place, data in part.items():
                member = data if isinstance(data, tarfile.TarInfo) else tarfile.TarInfo(place)
                member.size = 0 if member is data else len(data)
                tar.addfile(member, None if member is data else io.BytesIO(data))
    expected = files | changed | {name: files["train/ant/00.png"]}
    assert_same(load_images(tmp_path / "data.tar"), load_images(write_folder(tmp_path / "folder", expected)))


# To files, to a class folder with a link in it, over another link, and to a file of no class.
LINKS = {
    "train/cat/99.png": "00.png",
    "train/cat/98.png": "../ant/../bee/01.png",
    "train/cat/97.png": "99.png",
    "train/dog": "cat",
    "test/dog": "../train/dog",
    "train/ant/50.png": "../../store/1.png",
}
FOLLOWED = {"99": "train/cat/00", "98": "train/bee/01", "97": "train/cat/00"}


def test_links_inside_are_followed(tmp_path):
    files = content() | {"store/1.png": EVIL}
    copies = {f"train/cat/{name}.png": files[f"{target}.png"] for name, target in FOLLOWED.items()}
    cats = {name: data for name, data in (files | copies).items() if name.startswith("train/cat/")}
    copies |= {
        name.replace("train/cat", folder): data for name, data in cats.items() for folder in ("train/dog", "test/dog")
    }
    expected = load_images(write_folder(tmp_path / "plain", content() | copies | {"train/ant/50.png": EVIL}))
    assert expected.classes == ("ant", "bee", "cat", "dog")
    with pytest.warns(UserWarning, match=r"1 .*\(store/1\.png\)"):  # it is an image outside the classes too
        assert_same(load_images(linked_folder(tmp_path / "folder", files, LINKS)), expected)
    with pytest.warns(UserWarning, match=r"1 .*\(store/1\.png\)"):
        assert_same(load_images(linked_tar(tmp_path / "data.tar", files, LINKS)), expected)


def test_train_may_be_a_link(tmp_path):
    files = content()
    hidden = {name.replace("train/", ".v1/"): data for name, data in files.items()}
    expected = load_images(write_folder(tmp_path / "plain", files))
    assert_same(load_images(linked_folder(tmp_path / "folder", hidden, {"train": ".v1"})), expected)
    assert_same(load_images(linked_tar(tmp_path / "data.tar", hidden, {"train": ".v1"})), expected)


OUT = {
    "train/cat/99.png": "../../../evil.png",
    "train/cat/98.png": "nothing.png",
    "train/cat/97.png": "97.png",
    "train/cat/loop": "../cat",
    "train/cat/up": "../..",
    "train/dog": "../../evil",
    "train/cat/dev.png": "/dev/zero",
}


def test_links_that_lead_out_nowhere_or_round_are_named(tmp_path):
    files = content()
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil.png").write_bytes(EVIL)
    (tmp_path / "evil" / "0.png").write_bytes(EVIL)
    expected = load_images(write_folder(tmp_path / "plain", files))
    for root in (
        linked_folder(tmp_path / "folder", files, OUT),
        linked_tar(tmp_path / "data.tar", files, OUT),
    ):
        with pytest.warns(UserWarning, match=r"7 links .*train/cat/97\.png") as said:
            assert_same(load_images(root), expected)
        assert len(said) == 1


def test_a_data_set_of_links_to_elsewhere_says_so(tmp_path):
    elsewhere = write_folder(tmp_path / "elsewhere", content())
    (tmp_path / "data").mkdir()
    for part in ("train", "test"):
        (tmp_path / "data" / part).symlink_to(elsewhere / part)
    with pytest.raises(ValueError, match=r"expected one train/ folder.* got none.*2 links .*\(test, \.\.\.\)"):
        load_images(tmp_path / "data")
    # The root itself may be one.
    (tmp_path / "root").symlink_to(elsewhere)
    assert_same(load_images(tmp_path / "root"), load_images(elsewhere))


def test_links_to_the_files_of_cifar(tmp_path):
    (tmp_path / "test_batch.bin").write_bytes(bytes(3073))
    (tmp_path / "data").mkdir()
    for name in [*(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin"]:
        (tmp_path / "data" / name).symlink_to(tmp_path / "test_batch.bin")
    with pytest.raises(FileNotFoundError, match=r"got no such file \(6 links leading out of it.*data_batch_1\.bin"):
        load("cifar10", tmp_path / "data")


# What is skipped


EXTRA = {
    "train/cat/deeper/0.png": 1,
    "train/stray.png": 1,
    "val/ant/0.png": 1,
    "other/0.JPG": 1,
    "train/cat/0.heic": 1,
    "train/cat/.hidden.png": 1,
    # None of these is taken for an image.
    "README.txt": 0,
    "train/README.txt": 0,
    "train/cat/.DS_Store": 0,
    "train/.cache/thumbs.db": 0,
    "other/notes.txt": 0,
}


@pytest.mark.parametrize("extra", EXTRA)
@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_images_that_are_not_read_are_named_once(extra, kind, tmp_path):
    files = content()
    expected = load_images(write_folder(tmp_path / "plain", files))
    write = write_folder if kind == "folder" else write_tar
    root = write(tmp_path / "data", {extra: EVIL} | files)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert_same(load_images(root), expected)
    assert len(said) == EXTRA[extra]
    for warning in said:
        assert f"{root}: not read: 1 " in str(warning.message)
        assert extra.rpartition("/")[0] in str(warning.message)
        assert warning.filename == __file__.replace("test_archives", "test_image_folder")  # who called load


@pytest.mark.parametrize("top", ["", "top/"])
def test_deeper_levels_are_named(top, tmp_path):
    files = {top + name: data for name, data in content().items()}
    deeper = {f"{top}train/cat/deeper/{k}.png": EVIL for k in range(3)}
    for root in (write_folder(tmp_path / "folder", files | deeper), write_tar(tmp_path / "data.tar", files | deeper)):
        with pytest.warns(UserWarning, match=rf"not read: \d .*\({top}train/cat/deeper"):
            assert_same(load_images(root), load_images(write_folder(tmp_path / "plain", files)))


def test_what_is_skipped_is_counted_by_kind_in_one_warning(tmp_path):
    extra = {f"val/ant/{k}.png": EVIL for k in range(30)} | {f"train/cat/{k}.heic": b"x" for k in range(20)}
    root = write_folder(tmp_path, content() | extra)
    with pytest.warns(UserWarning, match="not read: ") as said:
        load_images(root, limit=3)
    (warning,) = said
    assert "30 images not directly in train/<class>/ or test/<class>/ (val/ant/0.png, ...)" in str(warning.message)
    assert "20 files without an image's extension (train/cat/0.heic, ...)" in str(warning.message)


def test_a_fifo_is_not_waited_for(tmp_path):
    root = write_folder(tmp_path, content())
    os.mkfifo(root / "train" / "cat" / "99.png")
    with pytest.warns(UserWarning, match=r"1 .*\(train/cat/99\.png\)"):
        assert len(load_images(root).train) == 12


@pytest.mark.parametrize("name", ["cifar10", "mnist", "image-folder"])
@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_a_root_that_is_neither_file_nor_folder(name, kind, tmp_path):
    root = tmp_path / "fifo.npz" if kind == "fifo" else "/dev/zero"
    if kind == "fifo":
        os.mkfifo(root)
    with pytest.raises(ValueError, match=r"(fifo\.npz|zero): expected .*, got neither a file nor a folder"):
        load(name, root)


@pytest.mark.parametrize("name,files", [("mnist", "train-images-idx3-ubyte"), ("svhn", "train_32x32.mat")])
def test_a_file_that_is_a_fifo(name, files, tmp_path):
    os.mkfifo(tmp_path / files)
    with pytest.raises(ValueError, match=f"{files}: expected .*, got neither a file nor a folder"):
        load(name, tmp_path)


# Names


def test_class_names_that_are_not_utf8(tmp_path):
    files = content()
    raw = os.fsdecode(b"caf\xe9")
    named = {name.replace("/ant/", f"/{raw}/"): data for name, data in files.items()}
    folder = load_images(write_folder(tmp_path / "folder", named))
    assert folder.classes == ("bee", raw, "cat") or folder.classes == ("bee", "cat", raw)
    tar = load_images(write_tar(tmp_path / "data.tar", named))
    assert tar.digest() == folder.digest() != load_images(write_folder(tmp_path / "plain", files)).digest()


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC"), ("NFD", "NFD")])
def test_composed_and_decomposed_names_are_one_class(forms, tmp_path):
    names = [unicodedata.normalize(form, "caf\u00e9") for form in forms]
    files = content(train=(("ant", 2), (names[0], 3)), test=(("ant", 1), (names[1], 2)))
    dataset = load_images(write_folder(tmp_path, files))
    assert dataset.classes == ("ant", "caf\u00e9")
    assert dataset.test.labels.tolist() == [0, 1, 1]
    # The order of files does not depend on the form either: e < o < \u00e9, but a decomposed \u00e9 begins with e.
    orders = []
    for form in ("NFC", "NFD"):
        files = {
            f"{part}/a/{unicodedata.normalize(form, n)}.png": png(pixels(n))
            for part in ("train", "test")
            for n in "eo\u00e9"
        }
        orders.append(load_images(write_folder(tmp_path / form, files)).digest())
    assert orders[0] == orders[1]


def test_both_forms_of_a_class_name_in_one_folder(tmp_path):
    names = [unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD")]
    files = content(train=tuple((name, 1) for name in names), test=((names[0], 1),))
    with pytest.raises(ValueError, match=r"expected different class names in train/, got 'caf\u00e9' in two spellings"):
        load_images(write_folder(tmp_path, files))


def test_a_zip_is_named_in_one_line(tmp_path):
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as file:
        for name, data in content().items():
            file.writestr(name, data)
    for name in ("image-folder", "cifar10"):
        with pytest.raises(ValueError, match=r"data\.zip: expected .*tar.*, got a zip archive; unpack it") as error:
            load(name, tmp_path / "data.zip")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "data",
    [b"", b"no tar", bytes(100), b"Rar!\x1a\x07\x00" + bytes(999), gzip.compress(b"x" * 9999, mtime=0)],
    ids=["empty", "text", "zeros", "rar", "gzip"],
)
def test_any_other_file_is_named_in_one_line(data, tmp_path):
    (tmp_path / "data.tar").write_bytes(data)
    with pytest.raises(ValueError, match=r"data\.tar: ") as error:
        load_images(tmp_path / "data.tar")
    assert "\n" not in str(error.value)


# Sizes


def header(name, size, kind=tarfile.REGTYPE, pax=None):
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    if pax is not None:
        member.pax_headers = pax
        return member.tobuf(tarfile.PAX_FORMAT)
    return member.tobuf(tarfile.GNU_FORMAT)


def test_a_sparse_member_of_200_gigabytes(tmp_path):
    # GNU's format 1.0: a map of no data, and the size it stands for.
    pax = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "train/cat/99.png"}
    member = header("GNUSparseFile.0/99.png", 512, pax=pax | {"GNU.sparse.realsize": str(200 << 30)})
    whole = write_tar(tmp_path / "data.tar", content()).read_bytes()
    (tmp_path / "data.tar").write_bytes(member + b"0\n".ljust(512, b"\0") + whole)
    with pytest.raises(ValueError, match=r"train/cat/99\.png: expected a file of at most 1 GiB, got 200 GiB"):
        load_images(tmp_path / "data.tar")


def test_a_sparse_file_of_200_gigabytes(tmp_path):
    root = write_folder(tmp_path, content())
    with (root / "train" / "cat" / "99.png").open("wb") as file:
        file.truncate(200 << 30)
    with pytest.raises(ValueError, match=r"train/cat/99\.png: expected a file of at most 1 GiB, got 200 GiB"):
        load_images(root)


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_name_of_200_gigabytes(kind, pack, tmp_path):
    whole = write_tar(tmp_path / "data.tar", content()).read_bytes()
    (tmp_path / "data.tar").write_bytes(pack(header("x", 200 << 30, kind) + whole))
    with pytest.raises(
        ValueError, match=r"data\.tar: .*expected at most 1 GiB in one piece, got a header that claims 200 GiB"
    ):
        load_images(tmp_path / "data.tar")


@pytest.mark.parametrize("module", [gzip, bz2, lzma])
@pytest.mark.parametrize("place", ["member", "end"])
def test_an_archive_that_unpacks_to_terabytes(module, place, tmp_path, monkeypatch):
    from elle_fast.data.readers import limits

    # Scaled down, so that the test unpacks 8 MB and not gigabytes.
    monkeypatch.setattr(limits, "_UNPACKED", 1 << 18)
    monkeypatch.setattr(limits, "RATIO", 1)
    whole = write_tar(tmp_path / "data.tar", content()).read_bytes()
    zeros = bytes(8 << 20)
    bomb = header("train/cat/99.png", len(zeros)) + zeros + whole if place == "member" else whole + zeros
    (tmp_path / "data.tar").write_bytes(module.compress(bomb))
    unpacked = time.process_time()
    with pytest.raises(ValueError, match=r"data\.tar: .*expected to unpack to at most 0\.000\d+ GiB, .*got more"):
        load_images(tmp_path / "data.tar")
    assert time.process_time() - unpacked < 0.5


def test_more_members_than_memory(tmp_path, monkeypatch):
    from elle_fast.data.readers import archives

    monkeypatch.setattr(archives, "_MOST_FILES", 40)
    files = content() | {f"train/cat/{k}.txt": b"" for k in range(40)}
    for root in (write_folder(tmp_path / "folder", files), write_tar(tmp_path / "data.tar", files)):
        with pytest.raises(ValueError, match="expected at most 40 files"):
            load_images(root)
    links = {f"train/l{k}": "cat" for k in range(20)}
    with pytest.raises(ValueError, match="expected at most 40 files"):
        load_images(linked_tar(tmp_path / "linked.tar", content(), links))
