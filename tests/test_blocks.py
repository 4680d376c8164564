"""The shared blocks as they stand in ddpm.py, in rope.py what is for texts, in o_gan.py nets, ranks and codes; test_habits.py
tests them at work."""

import argparse
import bz2
import codecs
import gzip
import hashlib
import http.client
import io
import itertools
import json
import lzma
import os
import random
import re
import shutil
import struct
import tarfile
import time
import zipfile
import zlib
from pathlib import Path

import ddpm
import numpy as np
import o_gan
import pytest
import rope
import torch
from hypothesis import given
from hypothesis import strategies as st

SEEDS = st.integers(0, 2**31)


# ---- order, noise ----

@given(st.integers(1, 40), st.integers(1, 50), SEEDS)
def test_every_picture_once_an_epoch(count, batch, seed):
    epochs = 3
    total = -(-epochs * count // batch)
    rows = torch.cat([ddpm.batch_rows(count, k, batch, seed, torch.device("cpu")) for k in range(total)])
    for k in range(epochs):
        assert sorted(rows[k * count:(k + 1) * count].tolist()) == list(range(count))


@given(st.integers(0, 2**63), st.integers(0, 2**63))
def test_generators_differ_by_every_part_of_their_key(a, b):
    draw = [torch.rand(4, generator=ddpm.generator("cpu", *key)) for key in ((a, b), (a, b), (a, b + 1), (a + 1, b))]
    assert torch.equal(draw[0], draw[1])
    for p, q in ((0, 2), (0, 3), (2, 3)):
        assert not torch.equal(draw[p], draw[q])


@given(st.lists(st.integers(0, 2**40), max_size=3))
def test_generators_differ_by_the_length_of_their_key(key):
    """numpy's SeedSequence takes (0,) and (0, 0) for one."""
    a, b = (torch.rand(4, generator=ddpm.generator("cpu", *k)) for k in ((*key, 0), (*key, 0, 0)))
    assert not torch.equal(a, b)


# ---- pictures ----

def read_png(path):
    """(C, H, W) uint8 of an 8-bit PNG whose lines have no filter."""
    raw = path.read_bytes()
    assert raw[:8] == b"\x89PNG\r\n\x1a\n"
    at, body = 8, b""
    while at < len(raw):
        size, kind = struct.unpack(">I4s", raw[at:at + 8])
        part = raw[at + 8:at + 8 + size]
        assert struct.unpack(">I", raw[at + 8 + size:at + 12 + size])[0] == zlib.crc32(kind + part)
        if kind == b"IHDR":
            w, h, depth, colour = struct.unpack(">2I2B", part[:10])
        body += part if kind == b"IDAT" else b""
        at += 12 + size
    c = {0: 1, 2: 3}[colour]
    lines = np.frombuffer(zlib.decompress(body), np.uint8).reshape(h, 1 + w * c)
    assert depth == 8 and not lines[:, 0].any()
    return torch.tensor(lines[:, 1:].reshape(h, w, c).transpose(2, 0, 1))


@given(st.integers(1, 20), st.integers(1, 20), st.sampled_from([1, 3]), SEEDS)
def test_png_holds_the_very_pixels(h, w, c, seed):
    image = torch.randint(0, 256, (c, h, w), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    ddpm.write_png(Path("a.png"), image)
    assert torch.equal(read_png(Path("a.png")), image)


def test_png_by_pillow_and_refusal():
    image = torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8)
    ddpm.write_png(Path("a.png"), image)
    Image = pytest.importorskip("PIL.Image")
    assert np.array_equal(np.asarray(Image.open("a.png")), image.permute(1, 2, 0).numpy())
    with pytest.raises(ValueError, match="2 channels"):
        ddpm.write_png(Path("b.png"), image[:2])


def test_grid_puts_pictures_in_rows():
    x = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 1, 60, 60)
    sheet = ddpm.grid(x, 3)
    assert sheet.shape == (1, 121, 182)
    assert [sheet[0, 30, 30], sheet[0, 30, 91], sheet[0, 91, 30]] == [0, 1, 3]
    assert sheet[0, 30, 60] == 255 and sheet[0, 91, 152] == 255  # the line between; an empty place
    assert ddpm.grid(x[:1, :, :8, :8], 1).shape == (1, 96, 96)  # small ones enlarged


def test_faces_are_alike_for_every_seed_and_show_their_attributes():
    x, y, = ddpm.draw_faces(600, 32)
    torch.manual_seed(99)
    again, _ = ddpm.draw_faces(600, 32)
    assert torch.equal(x, again) and x.shape == (600, 32, 32, 3) and x.dtype == torch.uint8
    assert y.shape == (600, 6) and y.min() >= 0 and y.max() <= 1
    cheek = x[:, 19, 16].float().mean(1)  # between nose and mouth: skin goes from light to dark
    assert np.corrcoef(cheek, y[:, 0])[0, 1] < -0.9
    top = x[:, 5, 16].float().mean(1)  # hair
    assert np.corrcoef(top, y[:, 1])[0, 1] < -0.9
    big, _ = ddpm.draw_faces(600, 64)
    small = torch.nn.functional.avg_pool2d(big.permute(0, 3, 1, 2).float(), 2).permute(0, 2, 3, 1)
    assert (small - x.float()).abs().mean() < 6  # the same faces at any size


# ---- loaders, on small files of each real format ----

def write_idx(folder, gz, n=(6, 3)):
    folder.mkdir()
    kept = []
    for part, count in zip(("train", "t10k"), n):
        x = np.random.default_rng(count).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        y = np.arange(count, dtype=np.uint8)
        kept += [x, y]
        for kind, a in (("images-idx3", x), ("labels-idx1", y)):
            raw = struct.pack(f">HBB{a.ndim}I", 0, 8, a.ndim, *a.shape) + a.tobytes()
            name = f"{part}-{kind}-ubyte" + (".gz" if gz else "")
            (folder / name).write_bytes(gzip.compress(raw) if gz else raw)
    return kept


def load(data, size=32, state=None, given=()):
    args = argparse.Namespace(data=str(data), size=size, cache="cache", given=given)
    return ddpm.load_images(args, state, torch.device("cpu"))


@pytest.mark.parametrize("gz", [False, True])
def test_idx_folder(gz):
    x, y, x_test, y_test = write_idx(Path("d"), gz)
    got = load("d")
    for tensor, want in zip(got, (x[:, None], x_test[:, None], y, y_test)):
        assert tensor.dtype == torch.uint8 and np.array_equal(tensor.numpy(), want)


def test_idx_under_other_names_without_tests_or_labels():
    x, *_ = write_idx(Path("d"), True, n=(20, 3))
    for p in Path("d").iterdir():
        if p.name.startswith("train-im"):
            p.rename("d/train-images.idx3-ubyte.gz")
        else:
            p.unlink()
    got = load("d")
    assert np.array_equal(torch.cat(got[:2]).numpy(), x[:, None]) and len(got[1]) == 2 and got[2:] == (None, None)


def write_labels(path, labels):
    Path(path).write_bytes(struct.pack(">HBBI", 0, 8, 1, len(labels)) + bytes(labels))


@pytest.mark.parametrize("change", ["no labels to train", "none held out", "one held out too few", "pictures for labels"])
def test_labels_of_some_pictures_only_are_refused(change):
    """They would be read off the wrong pictures, silently, or end a whole run in a traceback."""
    write_idx(Path("d"), False)
    if change == "no labels to train":
        Path("d/train-labels-idx1-ubyte").unlink()
    if change == "none held out":
        Path("d/t10k-labels-idx1-ubyte").unlink()
    if change == "one held out too few":
        write_labels("d/t10k-labels-idx1-ubyte", [1, 2])
    if change == "pictures for labels":
        shutil.copy("d/train-images-idx3-ubyte", "d/train-labels-idx1-ubyte")
    with pytest.raises(ddpm.UserError, match="or labels lack|no whole idx file"):
        load("d")
    for part, n in (("train", 6), ("t10k", 3)):
        write_labels(f"d/{part}-labels-idx1-ubyte", range(n))
    assert load("d")[2].tolist() == [0, 1, 2, 3, 4, 5]


def write_cifar10(path, n=2):
    rng = np.random.default_rng(0)
    rows = {name: rng.integers(0, 256, (n, 3073), dtype=np.uint8)
            for name in [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]}
    with tarfile.open(path, "w:gz") as tar:
        for name, a in reversed(rows.items()):  # order in the archive must not matter
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}.bin")
            info.size = a.nbytes
            tar.addfile(info, io.BytesIO(a.tobytes()))
    return rows


def test_cifar10_archive():
    rows = write_cifar10("c.tar.gz")
    x, x_test, y, y_test = load("c.tar.gz")
    assert x.shape == (10, 3, 32, 32) and x_test.shape == (2, 3, 32, 32)
    assert y.tolist() == [a[i, 0] for k in range(1, 6) for a in [rows[f"data_batch_{k}"]] for i in range(2)]
    assert x[2, 1, 3, 4] == rows["data_batch_2"][0, 1 + 1024 + 3 * 32 + 4]
    assert np.array_equal(x_test.flatten(1).numpy(), rows["test_batch"][:, 1:])
    assert not Path("cifar-10-batches-bin").exists()


@pytest.mark.parametrize("shape", [(20, 8, 9), (20, 8, 9, 1), (20, 8, 9, 3)])
def test_npy(shape):
    a = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.save("a.npy", a)
    x, x_test, y, y_test = load("a.npy")
    assert y is None and y_test is None and len(x) == 18 and len(x_test) == 2  # the last tenth held out
    want = a[:, None] if a.ndim == 3 else a.transpose(0, 3, 1, 2)
    assert np.array_equal(torch.cat([x, x_test]).numpy(), want)


def test_picture_folder(capfd):
    Image = pytest.importorskip("PIL.Image")
    Path("p/sub").mkdir(parents=True)
    for k in range(12):
        a = np.zeros((20, 30, 3), np.uint8)
        a[:, 5:25] = 20 * k  # the middle square; the rest is cut away
        Image.fromarray(a).save(f"p/{'sub/' if k % 2 else ''}{k:02}.png")
    Path("p/bad.jpg").write_bytes(b"no picture")
    Path("p/out/run").mkdir(parents=True)  # what a run has drawn there is no data
    Path("p/out/run/log.csv").write_text("step\n")
    Image.fromarray(np.full((20, 20), 255, np.uint8)).save("p/out/run/samples.png")
    Path("p/sub/IMG_1.HEIC").write_bytes(b"what a telephone makes")
    x, x_test, *_ = load("p", 16)
    assert x.shape == (11, 1, 16, 16) and x_test.shape == (1, 1, 16, 16)  # grey, since all are
    assert torch.cat([x, x_test])[:, 0, 8, 8].tolist() == [20 * k for k in (*range(0, 12, 2), *range(1, 12, 2))]
    said = capfd.readouterr()
    assert "p/bad.jpg: left out" in said.out and "2 of 14 files" in said.out and ".webp" in said.out and not said.err


def test_picture_folder_through_links_and_in_circles():
    Image = pytest.importorskip("PIL.Image")
    Path("far/deep").mkdir(parents=True)
    Path("p").mkdir()
    for k in range(3):
        Image.new("L", (8, 8), 50 * k).save(f"far/deep/{k}.{('PNG', 'bmp', 'webp')[k]}", lossless=True)
    Path("p/link").symlink_to(Path("far").absolute())
    Path("far/round").symlink_to(Path("far").absolute())
    assert torch.cat(load("p", 8)[:2])[:, 0, 4, 4].tolist() == [0, 50, 100]


def test_picture_folder_with_pictures_of_every_kind(capfd):
    """16 bits to 8, transparent on white, a palette and CMYK to RGB; floats and broken EXIF are left out."""
    Image = pytest.importorskip("PIL.Image")
    Path("p").mkdir()
    deep = np.full((8, 8), 51 * 256 + 200, np.uint16)
    Image.fromarray(deep).save("p/a16.png")
    Image.fromarray(deep.astype(">u2")).save("p/b16.tif")
    Image.new("LA", (8, 8), (0, 0)).save("p/c-grey-hidden.png")  # black, but nothing of it can be seen
    Image.new("RGBA", (8, 8), (255, 0, 0, 51)).save("p/d-red.png")
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([9, 9, 9, 10, 20, 30])
    palette.save("p/e-palette.png")
    palette.save("p/f-hidden.png", transparency=1)
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save("p/g-cmyk.jpg", quality=100)
    Image.new("1", (8, 8), 1).save("p/h-bit.png")
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save("p/i-float.tif")
    exif = b"Exif\0\0II*\0" + struct.pack("<IHHHIII", 8, 1, 0x0112, 2, 6, 26, 0) + b"seven\0"  # an orientation in letters
    Image.new("L", (8, 8), 7).save("p/j-turned.jpg", exif=exif)
    x = torch.cat(load("p", 8)[:2])[:, :, 4, 4].tolist()
    said = capfd.readouterr().out
    assert x[:6] == [[51] * 3, [51] * 3, [255] * 3, [255, 204, 204], [10, 20, 30], [255] * 3]
    assert np.allclose(x[6], [255, 0, 0], atol=3) and x[7] == [255] * 3
    assert "i-float.tif: left out" in said and len(x) == 8 + ("j-turned" not in said)


@pytest.mark.skipif(not os.environ.get("FASHION_MNIST"), reason="FASHION_MNIST names no folder of real idx files")
def test_real_fashion_mnist():
    x, x_test, y, y_test = load(os.environ["FASHION_MNIST"])
    assert x.shape == (60_000, 1, 28, 28) and x_test.shape == (10_000, 1, 28, 28)
    assert torch.bincount(y.long()).tolist() == [6000] * 10
    assert x.float().mean().item() / 255 == pytest.approx(0.2860, abs=1e-4)  # as published


def served(monkeypatch, files):
    """Instead of the network: urls end in a file's name; anything else is offline."""
    asked = []

    class Answer(io.BytesIO):
        def info(self):
            return http.client.HTTPMessage()

    def get(request):
        asked.append(request.full_url)
        body = files.get(request.full_url.rpartition("/")[2])
        if body is None:
            raise OSError("no network")
        return Answer(body)
    monkeypatch.setattr(torch.hub, "urlopen", get)
    return asked


def test_download_once_and_only_whole(monkeypatch):
    body = b"data" * 99
    sha = hashlib.sha256(body).hexdigest()
    asked = served(monkeypatch, {"good.bin": body, "cut.bin": body[:-1]})
    path = ddpm.download("d/x.bin", ["http://a/cut.bin", "http://b/good.bin"], sha[:32], "cache")
    assert path == Path("cache/d/x.bin") and path.read_bytes() == body
    assert asked == ["http://a/cut.bin", "http://b/good.bin"]  # the cut one is not taken
    assert ddpm.download("d/x.bin", ["http://a/cut.bin"], sha, "cache") == path and len(asked) == 2
    assert [p.name for p in Path("cache/d").iterdir()] == ["x.bin"]
    path.write_bytes(b"broken")
    with pytest.raises(ddpm.UserError, match="delete it"):
        ddpm.download("d/x.bin", ["http://b/good.bin"], sha[:32], "cache")
    with pytest.raises(ddpm.UserError, match="put the file from http://a/cut.bin at cache/y.bin"):
        ddpm.download("y.bin", ["http://a/cut.bin"], sha, "cache")
    assert not list(Path("cache").glob("*.*"))


def test_full_disk_during_a_download_is_no_reason_to_ask_another(monkeypatch):
    asked = []

    def full(request):
        asked.append(request)
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch.hub, "urlopen", full)
    with pytest.raises(OSError, match="No space left"):
        load("mnist")
    assert len(asked) == 1 and not [p for p in Path("cache").rglob("*") if p.is_file()]


@pytest.mark.parametrize("shut", ["a file", "no rights"])
def test_a_cache_that_cannot_be_written_is_the_one_thing_said(monkeypatch, shut, capfd):
    """Not that the network failed, nor to put a file where none can be put."""
    asked = []

    def get(request):
        asked.append(request)
        raise PermissionError(13, "Permission denied", "cache/x")
    monkeypatch.setattr(torch.hub, "urlopen", get)
    if shut == "a file":
        Path("cache").write_text("x")
    with pytest.raises(OSError, match="cache"):
        load("mnist")
    assert len(asked) == (shut == "no rights") and not capfd.readouterr().err


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10"])
def test_named_sets_offline_say_which_file_to_put_where(monkeypatch, name):
    asked = served(monkeypatch, {})
    with pytest.raises(ddpm.UserError, match="put the file from http.* at cache/"):
        load(name)
    assert asked and not [p for p in Path("cache").rglob("*") if p.is_file()]


def test_mnist_by_name_from_the_cache(monkeypatch):
    write_idx(Path("d"), True)
    folder = Path("cache/mnist")
    folder.mkdir(parents=True)
    sums = []
    for name in ddpm.IDX:
        raw = Path(f"d/{name}.gz").read_bytes()
        (folder / f"{name}.gz").write_bytes(raw)
        sums.append(hashlib.sha256(raw).hexdigest())
    asked = served(monkeypatch, {})
    monkeypatch.setitem(ddpm.NAMED, "mnist", (ddpm.NAMED["mnist"][0], sums))
    assert load("mnist")[0].shape == (6, 1, 28, 28) and not asked


def broken_files():
    write_idx(Path("ok"), True)
    Path("empty").mkdir()
    write_idx(Path("cut"), True)
    cut = Path("cut/train-images-idx3-ubyte.gz")
    cut.write_bytes(cut.read_bytes()[:-9])
    write_idx(Path("foreign"), False)
    Path("foreign/t10k-images-idx3-ubyte").write_bytes(b"not an idx file at all")
    Path("bad.tar.gz").write_bytes(b"no archive")
    write_cifar10("some.tar.gz")
    with tarfile.open("part.tar.gz", "w:gz") as tar:
        tar.add("ok/train-labels-idx1-ubyte.gz", "cifar-10-batches-bin/data_batch_1.bin")
    with tarfile.open("photos.tar.gz", "w:gz") as tar:
        tar.add("bad.tar.gz", "photos/1.jpg")
    np.save("float.npy", np.zeros((5, 8, 8), np.float32))
    np.save("flat.npy", np.zeros((5, 64), np.uint8))
    np.save("one.npy", np.zeros((1, 8, 8), np.uint8))
    np.save("four.npy", np.zeros((5, 8, 8, 4), np.uint8))
    np.save("two.npy", np.zeros((5, 8, 8, 2), np.uint8))
    np.save("none.npy", np.zeros((0, 8, 8), np.uint8))
    np.save("five.npy", np.zeros((5, 8, 8, 3, 1), np.uint8))
    np.save("scalar.npy", np.uint8(5))
    np.save("words.npy", np.array(["a", "b"]))
    np.savez("zip.npz", a=np.zeros((5, 8, 8), np.uint8))
    Path("zip.npz").rename("zip.npy")
    write_idx(Path("untested"), True, n=(6, 0))
    write_idx(Path("long"), False)
    with open("long/train-images-idx3-ubyte", "ab") as file:
        file.write(b"x")
    write_idx(Path("mislabelled"), False)
    Path("mislabelled/train-labels-idx1-ubyte").write_bytes(b"\0\0\x08\1\0\0\0\2ab")
    np.save("picture.npy", np.zeros((9, 8, 3), np.uint8))  # one picture, not nine
    np.savez("some.npz", a=np.zeros((5, 8, 8), np.uint8))
    Path("pointer.npy").write_text("version https://git-lfs.github.com/spec/v1\n")
    write_idx(Path("huge"), True)  # says that it holds 2^40 bytes
    Path("huge/train-images-idx3-ubyte.gz").write_bytes(gzip.compress(struct.pack(">HBB3I", 0, 8, 3, 2**20, 2**15, 2**15) + bytes(99)))
    np.save("objects.npy", np.array([{}, {}], object), allow_pickle=True)
    Path("cut.npy").write_bytes(Path("float.npy").read_bytes()[:70])


@pytest.mark.parametrize("data", ["nowhere", "nowhere.npy", "nowhere.tar.gz", "empty", "cut", "foreign", "bad.tar.gz",
                                  "part.tar.gz", "float.npy", "flat.npy", "one.npy", "four.npy", "objects.npy",
                                  "cut.npy", "two.npy", "none.npy", "five.npy", "scalar.npy", "words.npy",
                                  "zip.npy", "untested", "long", "mislabelled", "picture.npy", "some.npz", "pointer.npy"])
def test_wrong_data_is_refused(data):
    broken_files()
    with pytest.raises(ddpm.UserError, match=f"--data {re.escape(data)}: ") as refusal:
        load(data)
    assert "pickle" not in str(refusal.value)  # nobody is told to run what is in a file


@pytest.mark.parametrize("data, words", [("flat.npy", r"\(5, 64\)"), ("float.npy", r"float32 \(5, 8, 8\)"), ("picture.npy", r"\(9, 8, 3\)"),
                                         ("photos.tar.gz", "data_batch_1.bin"), ("empty", "train-images-idx3-ubyte or .jpg")])
def test_refusals_say_what_there_is_or_what_is_wanted(data, words):
    """The shape is the file's own, before anything is held out."""
    broken_files()
    with pytest.raises(ddpm.UserError, match=words):
        load(data)


def test_a_fault_without_words_is_not_called_want_of_memory():
    """A RuntimeError that says nothing is the script's own fault: it is raised, not turned into a line."""
    def body(*_):
        raise RuntimeError
    with pytest.raises(RuntimeError):
        ddpm.run(body, ddpm.parse_args([]), lambda _: None)


def test_what_does_not_fit_into_memory_is_not_called_damaged(monkeypatch):
    broken_files()
    with pytest.raises((MemoryError, ddpm.UserError)):
        load("huge")
    with pytest.raises(RuntimeError, match="you tried to allocate"):
        load("faces", size=2**20)

    def full(*_, **__):
        raise MemoryError
    monkeypatch.setattr(np.lib.format, "open_memmap", full)
    monkeypatch.setattr(gzip, "open", full)
    Path("a.gz").write_bytes(gzip.compress(b"text"))
    for read in (lambda: load("float.npy"), lambda: load("ok"), lambda: rope.load_text("a.gz", "cache")):
        with pytest.raises(MemoryError):
            read()


def test_other_sizes_than_the_pictures_have_are_refused():
    np.save("a.npy", np.zeros((9, 8, 8), np.uint8))
    assert load("a.npy", size=8)[0].shape == (8, 1, 8, 8)
    with pytest.raises(ddpm.UserError, match="--size 9: these pictures have 8 px"):
        load("a.npy", size=9, given={"size"})
    with pytest.raises(ddpm.UserError, match=r"\(8, 1, 8, 8\), but the checkpoint was made on .*9, 9"):
        load("a.npy", state={"shape": (8, 1, 9, 9)})


# ---- the judge, beside plain numpy in float64 ----

def plain_judge(samples, train, held_out, seed):
    """All of it by the book: the full covariance, every distance, eigenvalues of a product that is not symmetric."""
    def flat(x):
        return x.flatten(1).numpy().astype(np.float64) / 127.5 - 1

    def distances(p, q):
        return np.sqrt(((p[:, None] - q[None]) ** 2).sum(-1))

    def steepness(x):
        x = x.numpy().astype(np.float64)
        return abs(x[:, :, 1:] - x[:, :, :-1]).mean() + abs(x[..., 1:] - x[..., :-1]).mean()

    g = ddpm.generator("cpu", seed, 0, 10)
    real = train[torch.randperm(len(train), generator=g)[:10_000]]
    floor = held_out[torch.randperm(len(held_out), generator=g)[:len(samples)]]
    mean = flat(real).mean(0)
    axes = np.linalg.eigh(np.cov(flat(real).T, bias=True))[1][:, -50:]
    r, out = (flat(real) - mean) @ axes, {}
    for x, name in ((samples, ""), (floor, "_floor")):
        y, near = (flat(x) - mean) @ axes, r[:len(samples)]
        V, C = np.atleast_2d(np.cov(r.T, bias=True)), np.atleast_2d(np.cov(y.T))
        root = np.sqrt(np.maximum(np.linalg.eigvals(V @ C).real, 0)).sum()
        out["frechet" + name] = ((y.mean(0) - r.mean(0)) ** 2).sum() + np.trace(V + C) - 2 * root
        third_r, third_y = (np.sort(distances(u, u), 1)[:, 3] for u in (near, y))
        d = distances(y, near)
        out["precision" + name] = (d <= third_r).any(1).mean()
        out["recall" + name] = (d.T <= third_y).any(1).mean()
        out["sharpness" + name] = steepness(x) / steepness(real)
    return out


@pytest.mark.parametrize("channels, size, count", [(3, 8, 300), (1, 12, 60), (1, 4, 70)])
def test_judge_by_plain_numpy(channels, size, count):
    """Blurred, shifted, spread samples; 4 x 4 pixels have only 16 components."""
    faces = ddpm.draw_faces(900, size)[0].permute(0, 3, 1, 2)[:, :channels]
    train, held_out = faces[:500], faces[500:]
    noise = torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(1))
    samples = (0.9 * faces[300:300 + count] + 6 * noise + 10).clamp(0, 255).to(torch.uint8)
    got, want = ddpm.judge(samples, train, held_out, 3), plain_judge(samples, train, held_out, 3)
    assert got.keys() == want.keys() and all(type(v) is float for v in got.values())
    for name in want:
        assert got[name] == pytest.approx(want[name], rel=1e-5), name
    assert 0 < got["precision"] < 1 and 0 < got["recall"] < 1 and got["sharpness"] != got["sharpness_floor"]
    assert got != ddpm.judge(samples, train, held_out, 4)  # others held out, others near


def test_judge_in_pieces_is_the_judge_at_once():
    """More pictures than a piece holds, and than it takes of the training set."""
    x = torch.randint(0, 256, (11_000, 1, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    got, want = ddpm.judge(x[:600], x, x[-700:], 0), plain_judge(x[:600], x, x[-700:], 0)
    assert all(got[name] == pytest.approx(want[name], rel=1e-5) for name in want)


@pytest.mark.parametrize("count", range(1, 5))
def test_judge_does_not_know_what_too_few_pictures_tell(count):
    x = torch.randint(0, 256, (40, 1, 3, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    got = ddpm.judge(x[:count], x[10:], x[:count], 0)
    unknown = {name.removesuffix("_floor") for name, value in got.items() if value is None}
    balls = {"precision", "recall"}
    assert unknown == [balls | {"frechet"}, balls, balls, set()][count - 1]
    flat = torch.full_like(x, 7)
    got = ddpm.judge(flat[:9], flat, flat, 0)
    assert got["sharpness"] is None and got["frechet"] == 0 and got["precision"] == 1


def test_judge_on_pictures_of_less_than_50_components():
    """One pixel of 64 differs: all other components are zero but for rounding, of either sign."""
    x = torch.full((300, 1, 8, 8), 100, dtype=torch.uint8)
    x[:, 0, 3, 5] = torch.randint(0, 256, (300,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    got, want = ddpm.judge(x[:50], x, x[100:], 0), plain_judge(x[:50], x, x[100:], 0)
    for name in ("frechet", "frechet_floor", "sharpness"):
        assert got[name] == pytest.approx(want[name], rel=1e-4), name


# ---- flags ----

def flags(argv, experiment=None, others=None):
    experiment = experiment or dict(
        steps=(5, 50, 500, 1, "in all"), seed=(0, 0, "of it"), lr=(0.5, 0.25, 0.0, "rate"), mults=((1, 2), (3,), 1, "widths"),
        kind=("a", "b", ("a", "b"), "which"), flip=(False, False, True, None, "mirror"), decay=(True, None, "fall"))
    others = others or dict(paper=(False, None, "whole"), save_every=(9, 1, "steps"), eval=([], None, "files"),
                            sample_only=(0, 0, "only draw"))
    return ddpm.read_flags("x", "Title 100 %", argv, experiment, others)


def test_flags_take_the_column_that_is_asked_for():
    names = "steps seed lr mults kind flip decay".split()
    for argv, want in (([], [5, 0, 0.5, (1, 2), "a", False, True]), (["--gpu"], [50, 0, 0.25, (3,), "b", False, True]),
                       (["--paper"], [500, 0, 0.25, (3,), "b", True, True]),
                       (["--paper", "--gpu"], [500, 0, 0.25, (3,), "b", True, True])):
        args = flags(argv)
        assert [getattr(args, name) for name in names] == want
        assert args.given == {word[2:] for word in argv} and args.config == names


def test_flags_read_what_their_default_is():
    args = flags("--seed 7 --lr 1e-3 --mults 4,5,6 --kind b --flip --no-decay --eval a.tsv b.tsv --out o".split())
    assert (args.seed, args.lr, args.mults, args.kind, args.flip, args.decay) == (7, 1e-3, (4, 5, 6), "b", True, False)
    assert args.eval == ["a.tsv", "b.tsv"] and args.out == "o" and not args.resume
    assert args.given == {"seed", "lr", "mults", "kind", "flip", "decay", "eval", "out"}
    assert flags(["--no-flip", "--paper"]).flip is False
    assert flags(["--sample-only", "2"]).resume and not flags(["--sample-only", "0"]).resume


@pytest.mark.parametrize("argv", ["--steps 0", "--lr -0.1", "--lr nan", "--lr inf", "--mults 1,0", "--mults 1,x", "--kind c",
                                  f"--seed {2**62}", "--seed x", "--sample-only -1", "--no-gpu", "--eval", "--see 1"])
def test_flags_out_of_bounds_are_refused(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        flags(argv.split())
    assert stop.value.code == 2 and argv.split()[0] in capsys.readouterr().err


# ---- setup ----

def test_ranks_share_the_rows_of_a_batch(monkeypatch):
    rows, parts = torch.arange(12).view(6, 2), []
    monkeypatch.setattr(ddpm, "RANKS", 3)
    for rank in range(3):
        monkeypatch.setattr(ddpm, "RANK", rank)
        parts.append(ddpm.mine(rows))
    assert torch.equal(torch.cat(parts), rows) and [len(part) for part in parts] == [2, 2, 2]


def test_autocast_is_for_the_gpu_only_and_not_with_fp32():
    x = torch.ones(2, 2)
    for gpu, fp32 in ((False, False), (False, True), (True, True)):
        how = ddpm.autocast(argparse.Namespace(gpu=gpu, fp32=fp32))
        with how:
            assert (x @ x).dtype == torch.float32 and not torch.is_autocast_enabled("cuda")
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr(torch, "autocast", lambda *a, **k: (a, k))
        assert ddpm.autocast(argparse.Namespace(gpu=True, fp32=False)) == (("cuda", torch.bfloat16), {"enabled": True})


def test_denormal_numbers_are_zero_on_every_thread(python):
    """They made a long run of nvae three times as slow; the threads that work take that over from the first."""
    Path("d.py").write_text(
        f"import argparse, sys, torch\nsys.path.insert(0, {str(Path(ddpm.__file__).parent)!r})\nimport ddpm\n"
        "if sys.argv[1] == 'set':\n    ddpm.setup(argparse.Namespace(batch_size=1, gpu=False))\n"
        "torch.set_num_threads(2)\nx = torch.full((2**20,), 1e-30, requires_grad=True)\n"
        "y = x * 1e-10\n(y * 1e-30).sum().backward()\nprint(int(y.count_nonzero()), int(x.grad.count_nonzero()))\n")
    assert python("d.py", "set") == (0, "0 0\n", "")
    assert python("d.py", "not") == (0, "1048576 1048576\n", "")


@pytest.mark.parametrize("fp32", [False, True])
def test_fp32_turns_tf32_off(monkeypatch, fp32):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda k: None)
    kept = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    try:
        assert str(ddpm.setup(argparse.Namespace(batch_size=1, gpu=True, fp32=fp32))) == "cuda:0"
        assert torch.get_float32_matmul_precision() == ("highest" if fp32 else "high")
        assert torch.backends.cudnn.allow_tf32 is not fp32
    finally:
        torch.set_float32_matmul_precision(kept[0])
        torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = kept[1:]


# ---- checkpoint ----

def run_args(**more):
    return argparse.Namespace(script="ddpm", steps=10, save_every=4, seed=3, config=["steps", "seed"], given=set(), own=True,
                              out="o", gpu=False, fp32=False, compile=False, **more)


def test_checkpoint_holds_what_it_says_and_comes_back():
    net = torch.nn.Linear(2, 1)
    opt = torch.optim.Adam(net.parameters())
    net(torch.ones(1, 2)).sum().backward()
    opt.step()
    parts, args = dict(model=net, opt=opt), run_args()
    ddpm.save_checkpoint(args, 4, parts, shape=(1, 2))
    state = torch.load("o/ckpt.pt", weights_only=True)
    assert state["config"] == {"steps": 10, "seed": 3} and (state["script"], state["step"], state["shape"]) == ("ddpm", 4, (1, 2))
    assert [p.name for p in Path("o").iterdir()] == ["ckpt.pt"]
    other = torch.nn.Linear(2, 1)
    more = torch.optim.Adam(other.parameters())
    args.steps, args.seed = 12, 9
    args.given.add("steps")
    assert ddpm.restore(ddpm.resume_run(args), dict(model=other, opt=more)) == 4
    assert torch.equal(other.weight, net.weight) and (args.steps, args.seed) == (12, 3)
    assert all(torch.equal(a["exp_avg"], b["exp_avg"]) for a, b in zip(opt.state.values(), more.state.values()))
    assert ddpm.restore(None, parts) == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["model", "ema"])
def test_checkpoint_of_a_weight_that_is_not_finite_is_not_written(part, value):
    parts = dict(model=torch.nn.Linear(2, 1), ema=torch.nn.Linear(2, 1))
    ddpm.save_checkpoint(run_args(), 1, parts)
    good = Path("o/ckpt.pt").read_bytes()
    parts[part].bias.data.fill_(value)
    with pytest.raises(FloatingPointError, match="o/ckpt.pt"):
        ddpm.save_checkpoint(run_args(), 2, parts)
    assert Path("o/ckpt.pt").read_bytes() == good


def test_other_ranks_write_nothing(monkeypatch):
    monkeypatch.setattr(ddpm, "RANK", 1)
    args = run_args()
    args.own = False
    ddpm.make_room(args)
    ddpm.save_checkpoint(args, 1, dict(model=torch.nn.Linear(2, 1)))
    assert not list(Path().iterdir())


def test_metrics_are_json_and_what_is_not_known_is_null(capsys):
    ddpm.write_metrics(run_args(), {"a": float("nan"), "b": [1.5, float("inf")], "c": {"d": -float("inf")}, "e": 0})
    assert json.loads(Path("o/metrics.json").read_text(), parse_constant=lambda word: pytest.fail(word)) == {
        "a": None, "b": [1.5, None], "c": {"d": None}, "e": 0}
    assert capsys.readouterr().out.endswith(" o/\n")


# ---- progress ----

def ticking(monkeypatch, seconds):
    monkeypatch.setattr(time, "perf_counter", itertools.count(0, seconds).__next__)


@pytest.mark.parametrize("first, saves", [(0, [(4, False), (8, False), (10, True)]), (4, [(8, False), (10, True)]),
                                          (9, [(10, True)]), (10, [(10, True)])])
def test_training_saves_in_time_and_once(first, saves):
    seen, steps = [], []
    for step in ddpm.training(run_args(), first, lambda step, end: seen.append((step, end))):
        steps.append(step)
    assert steps == list(range(first, 10)) and seen == saves


def test_progress_shows_means_of_what_came_since_the_last_line(monkeypatch, capsys):
    Path("o").mkdir()
    ticking(monkeypatch, 4.0)
    progress = ddpm.Progress(run_args(), 0, 12_345, 8, "img")
    for step in range(1, 11):
        progress.add(step, loss=torch.tensor(float(step)), lr=0.5)
    head, *rows = [line.split(",") for line in Path("o/log.csv").read_text().splitlines()]
    assert head == ["step", "items", "rate", "elapsed", "loss", "lr"]
    # a line at step 1; then at each third step, when 12 of the 10 seconds have passed; and at the last
    assert [int(row[0]) for row in rows] == [1, 4, 7, 10]
    assert [float(row[4]) for row in rows] == [1, 3, 6, 9] and {row[5] for row in rows} == {"0.5"}
    assert [float(row[2]) for row in rows] == [2, 2, 2, 2] and [int(row[1]) for row in rows] == [8, 32, 56, 80]
    assert [float(row[3]) for row in rows] == [4, 16, 28, 40]
    said = capsys.readouterr().out
    assert "12,345 parameters" in said and "step 4/10  loss 3  lr 0.5  2 img/s  elapsed 0:00:16  eta 0:00:24\n" in said


def test_progress_after_a_resume_counts_from_there(monkeypatch, capsys):
    Path("o").mkdir()
    ticking(monkeypatch, 20.0)
    progress = ddpm.Progress(run_args(), 6, 1, 2, "img")
    progress.add(7, loss=1.0)
    assert "rate" in Path("o/log.csv").read_text() and "7,14,0.1,20.0,1.0" in Path("o/log.csv").read_text()
    assert "elapsed 0:00:20  eta 0:01:00" in capsys.readouterr().out


@pytest.mark.parametrize("at", [1, 2, 3])
def test_progress_stops_where_a_mean_is_not_finite(monkeypatch, at):
    Path("o").mkdir()
    ticking(monkeypatch, 4.0)
    progress = ddpm.Progress(run_args(), 0, 1, 1, "img")
    with pytest.raises(FloatingPointError, match="step [14]: loss nan"):
        for step in range(1, 5):
            progress.add(step, loss=float("nan") if step == at else 1.0)


def test_watch_gives_all_and_says_how_far(monkeypatch, capsys):
    ticking(monkeypatch, 4.0)
    assert list(ddpm.watch("abcdefgh", 8, "drawing")) == list("abcdefgh")
    assert capsys.readouterr().out == "drawing 2/8  eta 0:00:36\ndrawing 5/8  eta 0:00:14\n"
    ticking(monkeypatch, 0.001)
    assert list(ddpm.watch(iter("ab"), 2, "drawing")) == ["a", "b"] and capsys.readouterr().out == ""


# ---- texts ----

def zipped(**members):
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return body.getvalue()


def test_text_from_files_of_each_kind():
    some = "s\u00f6me".encode()
    for name, body in (("a.txt", some), ("a.gz", gzip.compress(some)), ("a.BZ2", bz2.compress(some)), ("a.xz", lzma.compress(some)),
                       ("mark.txt", codecs.BOM_UTF8 + some), ("wide.txt", some.decode().encode("utf-16"))):
        Path(name).write_bytes(body)
        assert rope.load_text(name, "cache") == [some]
    Path("cut.txt").write_bytes(some + b"\xe4\xb8")  # as in enwik8, which ends within a character
    assert rope.load_text("cut.txt", "cache") == [some + b"\xe4\xb8"]
    mac = {"__MACOSX/._a": b"\0\5\x16\7\xff", ".DS_Store": b"\0\0\0\1Bud1", "folder/": "", "./here": "third"}
    Path("a.zip").write_bytes(zipped(b="second", a="first", c="", **mac))
    assert rope.load_text("a.zip", "cache") == [b"third", b"first", b"second"]


def test_text_of_the_standard_library_is_mixed_and_without_its_tests():
    documents = rope.load_text("python", "cache")
    assert documents == rope.load_text("python", "cache") and len(documents) > 400 and all(documents)
    root = Path(json.__file__).parents[1]
    assert (root / "json/decoder.py").read_bytes() in documents
    assert not any(b"import unittest\n" in d and b"class Test" in d and b"test.support" in d for d in documents)
    assert documents != sorted(documents)


@pytest.mark.parametrize("name, body", [
    ("none.txt", None), ("", None), ("empty", b""), ("bad.gz", b"no"), ("bad.bz2", b"no"), ("bad.xz", b"no"), ("bad.zip", b"no"),
    ("cut.gz", gzip.compress(bytes(range(99)))[:-9]), ("cut.xz", lzma.compress(bytes(range(99)))[:-9]),
    ("cut.bz2", bz2.compress(bytes(range(99)))[:-9]), ("cut.zip", zipped(a="first")[:-9]), ("none.zip", zipped(a=""))])
def test_text_that_cannot_be_read_is_refused(name, body):
    if body is not None:
        Path(name).write_bytes(body)
    with pytest.raises(rope.UserError, match="--data"):
        rope.load_text(name, "cache")


CHINESE, FRENCH = "\u8bcd\u5411\u91cf " * 9, "d\u00e9j\u00e0 \u00e9t\u00e9 " * 9


@pytest.mark.parametrize("body, guess", [
    (CHINESE.encode("gbk"), "GB18030, else BIG5"), (f"1 {CHINESE[0]}, ".encode("gbk"), "GB18030"),
    (FRENCH.encode("latin-1"), "CP1252"), ("\u201cquoted\u201d it\u2019s".encode("cp1252"), "CP1252"),
    ("plain".encode("utf-16-le"), "UTF-16"), ("plain".encode("utf-32"), "UTF-32"), (b"a\0b", "NUL bytes"),
    (b"\x89PNG\r\n\x1a\n\0\0", "no text: it has NUL bytes"), (b"PK\3\4\0\0" + bytes(range(256)), "no text: it has NUL bytes"),
    (CHINESE.encode() + b"\xff" + CHINESE.encode(), "UTF-8, but for damage that iconv -c"), (CHINESE.encode()[1:], "UTF-8, but for damage")])
def test_text_in_other_encodings_is_refused_with_a_guess(body, guess):
    """And the command that converts, rightly; in a .zip the member is named."""
    if guess[:2] in ("GB", "CP"):
        assert body.decode(guess.partition(",")[0]) in (CHINESE, f"1 {CHINESE[0]}, ", FRENCH, "\u201cquoted\u201d it\u2019s")
    Path("old.txt").write_bytes(body)
    Path("old.zip").write_bytes(zipped(good="first", bad=body))
    for data, named in (("old.txt", "old.txt"), ("old.zip", "old.zip, bad")):
        with pytest.raises(rope.UserError, match=f"--data {named}: not UTF-8.*{guess}.*iconv -f"):
            rope.load_text(data, "cache")


def damaged(body, g):
    """`body` with a few bytes changed, cut, doubled or blanked, as g, a random.Random, will have it."""
    body = bytearray(body)
    for _ in range(g.randint(1, 4)):
        at = g.randrange(len(body))
        kind = g.randrange(4)
        if kind == 0:
            body[at] ^= 1 << g.randrange(8)
        elif kind == 1 and at > 8:
            del body[at:]
        elif kind == 2:
            body[at:at] = body[max(0, at - 20):at]
        else:
            body[at:at + g.randint(1, 40)] = g.randbytes(g.randint(0, 40))
        if not body:
            break
    return bytes(body)


def small_files():
    """One of each kind that the readers of pictures and of texts take, a few hundred bytes long."""
    np.save("a.npy", np.arange(4 * 5 * 5, dtype=np.uint8).reshape(4, 5, 5))
    write_idx(Path("idx"), True, n=(2, 2))
    write_cifar10("a.tar.gz", 1)
    text = b"some words, and more of them\n" * 5
    for name, body in (("a.txt", text), ("a.gz", gzip.compress(text)), ("a.bz2", bz2.compress(text)), ("a.xz", lzma.compress(text)),
                       ("a.zip", zipped(a=text, b="more"))):
        Path(name).write_bytes(body)


@pytest.mark.parametrize("name", ["a.npy", "idx/train-images-idx3-ubyte.gz", "idx/t10k-labels-idx1-ubyte.gz", "a.tar.gz",
                                  "a.txt", "a.gz", "a.bz2", "a.xz", "a.zip"])
def test_damaged_files_are_read_or_refused(name):
    """Whatever is in a file: tensors of the right kind, or UserError; nothing else reaches `run`."""
    small_files()
    whole, g, refused = Path(name).read_bytes(), random.Random(name), 0
    pictures = name.endswith((".npy", ".tar.gz")) or "idx" in name
    for _ in range(100 if len(whole) < 5000 else 40):
        Path(name).write_bytes(damaged(whole, g))
        try:
            if pictures:
                x, x_test, *_ = load(Path(name).parts[0])
                assert x.dtype == x_test.dtype == torch.uint8 and x.ndim == x_test.ndim == 4
            else:
                assert all(isinstance(part, bytes) for part in rope.load_text(name, "cache"))
        except (ddpm.UserError, rope.UserError):
            refused += 1
    assert refused > 20 or name == "a.txt", refused


@given(st.integers(20, 500))
def test_text_is_split_without_loss(length):
    whole = bytes(k % 256 for k in range(length))
    parts = rope.split_text([whole[:7], whole[8:]], torch.device("cpu"))
    joined = whole[:7] + b"\n" + whole[8:]
    assert bytes(torch.cat(parts).tolist()) == joined and [len(p) for p in parts[1:]] == [length // 20] * 2


@pytest.mark.parametrize("data, words", [("", "no such file"), ("nowhere", "no such file"), ("one.npy", "two pictures")])
def test_no_path_a_wrong_one_and_a_single_picture_are_refused(data, words):
    """An empty name is not the current folder, whose pictures it would train on."""
    np.save("one.npy", np.zeros((1, 8, 8), np.uint8))
    with pytest.raises(ddpm.UserError, match=words):
        load(data)


# ---- nets ----

@pytest.mark.parametrize("kernel", [4, 5])
@given(st.integers(2, 40), st.integers(2, 40), st.sampled_from([1, 3]), st.integers(1, 5), st.integers(1, 6))
def test_dcgan_takes_any_size_and_gives_it_back(kernel, h, w, c, width, n):
    E, G = o_gan.Encoder((c, h, w), width, n, kernel), o_gan.Generator(n, (c, h, w), width, kernel)
    x = G.eval()(torch.randn(2, n))
    assert x.shape == (2, c, h, w) and x.abs().max() <= 1 and E.eval()(x).shape == (2, n)
    sides = o_gan.halvings((c, h, w), kernel)
    assert sides[0] == (h, w) and min(sides[-1]) <= 4 and (len(sides) == 2 or min(sides[-2]) > 4)
    convs = [layer for layer in E.body if isinstance(layer, torch.nn.Conv2d)]
    assert [layer.out_channels for layer in convs] == [width * 2**k for k in range(len(sides) - 1)]


@pytest.mark.parametrize("kernel", [4, 5])
def test_dcgan_by_hand(kernel):
    """The author's nets at 32 px, written out: no BatchNorm in E's first level, one before each of G's convolutions."""
    F, pad = torch.nn.functional, (kernel - 1) // 2
    torch.manual_seed(0)
    E, G = (o_gan.started(net, 0.2).double() for net in (o_gan.Encoder((3, 32, 32), 4, 6, kernel),
                                                         o_gan.Generator(6, (3, 32, 32), 4, kernel)))

    def norm(h):
        return (h - h.mean((0, 2, 3), keepdim=True)) / (h.var((0, 2, 3), keepdim=True, correction=0) + 1e-5).sqrt()
    z = torch.randn(5, 6, dtype=torch.float64)
    with torch.no_grad():
        x = G(z)
        p = dict(G.named_parameters())
        h = (z @ p["head.weight"].T).view(5, 16, 4, 4)
        for k in (2, 5, 8):
            h = F.conv_transpose2d(norm(h).relu(), p[f"body.{k}.weight"], p.get(f"body.{k}.bias"), 2, pad, kernel % 2)
        torch.testing.assert_close(x, h.tanh())
        code = E(x)
        p = dict(E.named_parameters())
        h = F.leaky_relu(F.conv2d(x, p["body.0.weight"], p["body.0.bias"], 2, pad), 0.2)
        for k in (3, 6):
            h = F.leaky_relu(norm(F.conv2d(h, p[f"body.{k}.weight"], None, 2, pad)), 0.2)
        torch.testing.assert_close(code, h.flatten(1) @ p["head.weight"].T + p["head.bias"])


def test_dcgan_has_the_authors_channels():
    """64, ..., 1024 at 128 px and up to 2048 at 256 px."""
    with torch.device("meta"):
        for size, top in ((128, 1024), (256, 2048)):
            E, G = o_gan.Encoder((3, size, size), 64, 128, 5), o_gan.Generator(128, (3, size, size), 64, 5)
            assert E.head.in_features == 16 * top == G.head.out_features and E.body[0].out_channels == 64


def test_started_weights_are_normal_or_glorots():
    net = o_gan.started(o_gan.Encoder((3, 16, 16), 64, 20), 0.02)
    for p in (net.body[0].weight, net.body[3].weight, net.head.weight):
        assert p.std().item() == pytest.approx(0.02, rel=0.05) and abs(p.mean().item()) < 0.002
    o_gan.started(net, 0)
    edge = (6 / (64 * 16 + 128 * 16)) ** 0.5
    assert 0.99 * edge < net.body[3].weight.max() <= edge and net.body[3].weight.std().item() == pytest.approx(edge / 3**0.5, rel=0.02)
    assert not any(layer.bias.any() for layer in (net.body[0], net.head, net.body[4])) and net.body[3].bias is None
    assert (net.body[4].weight == 1).all()


# ---- codes ----

@given(st.integers(0, 2**31), st.integers(1, 600))
def test_psnr_by_plain_numbers(seed, n):
    x, y = (torch.randint(0, 256, (n, 1, 2, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed + k)) for k in (0, 1))
    mse = ((x.numpy().astype(float) - y.numpy()) ** 2).mean()
    assert o_gan.psnr(x, y) == pytest.approx(10 * np.log10(255**2 / mse))
    assert o_gan.psnr(x, x) == float("inf")


@pytest.mark.parametrize("count", [60, 700])
def test_pca_is_the_svds(count):
    """Pictures of ten strong directions and some noise; also fewer pictures than pixels."""
    rng = np.random.default_rng(0)
    flat = rng.normal(size=(count, 10)) * np.linspace(60, 20, 10) @ np.linalg.qr(rng.normal(size=(192, 10)))[0].T
    x = torch.tensor((flat + 128 + rng.normal(size=flat.shape)).round().clip(0, 255), dtype=torch.uint8).view(count, 3, 8, 8)
    p = o_gan.Pca(x, 6)
    rows = x.flatten(1).double().numpy() / 127.5 - 1
    mean = rows.mean(0)
    axes = np.linalg.svd(rows - mean, full_matrices=False)[2][:6]
    np.testing.assert_allclose(p.mean, mean, atol=1e-12)
    np.testing.assert_allclose(abs(axes @ p.basis.numpy()), np.eye(6), atol=1e-6)
    np.testing.assert_allclose(abs(p.encode(x)), abs((rows - mean) @ axes.T), atol=1e-6)
    want = ((rows - mean) @ axes.T @ axes + mean + 1) * 127.5
    got = p.decode(p.encode(x), (3, 8, 8)).flatten(1).numpy()
    assert abs(got - want.clip(0, 255)).max() <= 0.5 + 1e-3
    assert torch.equal(p.encode(x), o_gan.Pca(x, 6).encode(x))
    want = ((rows - mean) @ axes[:2].T @ axes[:2] + mean + 1) * 127.5  # fewer of them
    assert abs(p.decode(p.encode(x)[:, :2], (3, 8, 8)).flatten(1).numpy() - want.clip(0, 255)).max() <= 0.5 + 1e-3


def test_pca_of_many_takes_every_nth_and_of_few_what_there_is():
    x = torch.randint(0, 256, (25_000, 1, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    rows = x[::3].flatten(1).double() / 127.5 - 1
    torch.testing.assert_close(o_gan.Pca(x, 2).mean, rows.mean(0))
    few = o_gan.Pca(x[:3], 9)
    assert torch.equal(few.decode(few.encode(x[:3]), (1, 2, 2)), x[:3])
    same = o_gan.Pca(x[:1].expand(5, -1, -1, -1), 2)  # no direction at all
    assert torch.equal(same.decode(same.encode(x[:1]), (1, 2, 2)), x[:1])


@given(st.integers(0, 2**31))
def test_linear_probe_of_real_numbers_is_least_squares(seed):
    rng = np.random.default_rng(seed)
    x, x_test = rng.normal(size=(50, 3)) * [1, 100, 0.01], rng.normal(size=(40, 3)) * [1, 100, 0.01]
    a = rng.normal(size=(3, 2))
    y, y_test = (v / [1, 100, 0.01] @ a + 5 + rng.normal(size=(len(v), 2)) for v in (x, x_test))
    x, x_test = (np.column_stack([v, np.full(len(v), 7.0), v[:, 0]]) for v in (x, x_test))  # a constant, a twin
    got = o_gan.linear_probe(*(torch.tensor(v) for v in (x, y, x_test, y_test)))
    one, one_test = (np.column_stack([v, np.ones(len(v))]) for v in (x, x_test))
    left = y_test - one_test @ np.linalg.lstsq(one, y, rcond=None)[0]
    want = 1 - (left**2).sum(0) / ((y_test - y_test.mean(0)) ** 2).sum(0)
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_linear_probe_of_labels_is_softmax_regression():
    """Against plain gradient descent to the same optimum; also called where gradients are off."""
    rng = np.random.default_rng(0)
    y, y_test = rng.integers(0, 3, 300), rng.integers(0, 3, 200)
    centres = np.array([[0, 0], [20, 0.2], [0, 0.3]])
    x, x_test = (centres[v] + rng.normal(size=(len(v), 2)) * [10, 0.1] for v in (y, y_test))
    with torch.no_grad():
        got, = o_gan.linear_probe(*(torch.tensor(v) for v in (x, y.astype(np.uint8), x_test, y_test.astype(np.uint8))))
    one, one_test = (np.column_stack([(v - x.mean(0)) / x.std(0), np.ones(len(v))]) for v in (x, x_test))
    w = np.zeros((3, 3))
    for _ in range(3000):
        p = np.exp(one @ w)
        w -= 0.5 * (one.T @ (p / p.sum(1, keepdims=True) - np.eye(3)[y]) / 300 + 2e-5 * w)
    assert got == pytest.approx((np.argmax(one_test @ w, 1) == y_test).mean(), abs=0.006) and 0.7 < got < 0.99


@given(st.integers(0, 2**31), st.integers(1, 6))
def test_knn_by_plain_loops(seed, k):
    rng = np.random.default_rng(seed)
    x, x_test, y, y_test = rng.normal(size=(30, 3)), rng.normal(size=(20, 3)), rng.integers(0, 4, 30), rng.integers(0, 4, 20)
    hits = 0
    for row, label in zip(x_test, y_test):
        near = y[np.argsort(((x - row) ** 2).sum(1))[:k]]
        counts = np.bincount(near, minlength=4)
        hits += int(np.flatnonzero(counts == counts.max())[0] == label)
    got = o_gan.knn_accuracy(*(torch.tensor(v) for v in (x, y.astype(np.uint8), x_test, y_test.astype(np.uint8))), k)
    assert got == pytest.approx(hits / 20)


def test_knn_of_fewer_than_k_takes_them_all():
    x, y = torch.tensor([[0.0], [1.0], [9.0]]), torch.tensor([1, 1, 0], dtype=torch.uint8)
    assert o_gan.knn_accuracy(x, y, x, y, 5) == pytest.approx(2 / 3)
