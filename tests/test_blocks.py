"""The shared blocks that draw, judge and read pictures, and those for order and noise; as they stand in ddpm.py."""

import argparse
import gzip
import hashlib
import http.client
import io
import os
import re
import struct
import tarfile
import zlib
from pathlib import Path

import ddpm
import numpy as np
import pytest
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
    x, x_test, *_ = load("p", 16)
    assert x.shape == (11, 1, 16, 16) and x_test.shape == (1, 1, 16, 16)  # grey, since all are
    assert torch.cat([x, x_test])[:, 0, 8, 8].tolist() == [20 * k for k in (*range(0, 12, 2), *range(1, 12, 2))]
    assert "1 of 13" in capfd.readouterr().err


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
    np.save("objects.npy", np.array([{}, {}], object), allow_pickle=True)
    Path("cut.npy").write_bytes(Path("float.npy").read_bytes()[:70])


@pytest.mark.parametrize("data", ["nowhere", "nowhere.npy", "nowhere.tar.gz", "empty", "cut", "foreign", "bad.tar.gz",
                                  "part.tar.gz", "float.npy", "flat.npy", "one.npy", "four.npy", "objects.npy",
                                  "cut.npy", "two.npy", "none.npy", "five.npy", "scalar.npy", "words.npy",
                                  "zip.npy", "untested"])
def test_wrong_data_is_refused(data):
    broken_files()
    with pytest.raises(ddpm.UserError, match=f"--data {re.escape(data)}: "):
        load(data)


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
