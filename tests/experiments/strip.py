"""The front page's strip: a square of each script's picture, from what its last run has written.

    python tests/experiments/strip.py    # after the bare runs; writes docs/strip.png

Above, ddpm, nvae: faces drawn. o_gan: held-out faces, each with its reconstruction at its right. bigan_qp: in each row from
one held-out face to another. Below, rope: R_n = exp(nB) with a dense B that the run has learnt, n = 4 and 32; under them the
same in the basis of 9403 (8), blocks of 2 x 2. hier_pos_bert: cosines of the n codes trained, and of 2n codes by the post;
under them of 2n by copies, and by interpolation. transformer_vq: above, cosines of the keys of a text the run wrote, and of the codes
they become; below, which code each key is, and the cosines of the codes. w2v_svd: words with their neighbours.
"""

import argparse
import struct
import sys
import zlib
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/experiments")]
import ddpm  # noqa: E402
import hier_pos_bert  # noqa: E402
import rope  # noqa: E402
import transformer_vq  # noqa: E402
import w2v_map  # noqa: E402
import w2v_svd  # noqa: E402

SIDE = 393  # four faces of 96 pixels with white lines between


def read_png(path: Path) -> Tensor:
    """uint8 (C, H, W) of a PNG as `write_png` writes it."""
    raw = path.read_bytes()
    w, h, _, kind = struct.unpack(">2I2B", raw[16:26])
    body = raw[raw.index(b"IDAT") + 4:raw.index(b"IEND") - 8]
    lines = torch.frombuffer(bytearray(zlib.decompress(body)), dtype=torch.uint8).view(h, -1)
    return lines[:, 1:].reshape(h, w, 3 if kind == 2 else 1).permute(2, 0, 1)


def pairs(out: Path) -> Tensor:
    """The first 4 x 4 pictures of a run's reconstructions: a face, and at its right what became of it."""
    return read_png(out / "reconstructions.png")[:, :SIDE, :SIDE]


def coloured(M: Tensor) -> Tensor:
    """uint8 (3, H, W) of numbers in [-1, 1] (H, W): blue is -1, white 0, red 1."""
    red, blue = torch.tensor([200, 40, 40]), torch.tensor([30, 90, 180])
    end = torch.where(M[..., None] > 0, red, blue)
    return (255 - M.abs().clamp(max=1)[..., None] * (255 - end)).byte().permute(2, 0, 1)


def faces(out: Path) -> Tensor:
    """The first 4 x 4 pictures of a run's samples."""
    return read_png(out / "samples.png")[:, :SIDE, :SIDE]


def between(out: Path) -> Tensor:
    """Of four rows of ten pictures, from one face to another, the 1st, 4th, 7th and 10th."""
    sheet = read_png(out / "interpolation.png")[:, :SIDE]
    rows = F.pad(sheet, (0, -sheet.shape[2] % 10), value=255).unflatten(2, (10, -1))  # each with its white line
    return rows[:, :, [0, 3, 6, 9]].flatten(2)[:, :, :SIDE]


def four(tiles: list[Tensor]) -> Tensor:
    """2 x 2 framed tiles of numbers in [-1, 1] (h, w), a square of nearly SIDE."""
    side = (SIDE - 20) // 2
    tiles = [F.interpolate(coloured(M)[None], (side, side))[0] for M in tiles]
    tiles = [F.pad(F.pad(x, (1, 1, 1, 1), value=200), (3, 3, 3, 3), value=255) for x in tiles]
    return torch.cat([torch.cat(tiles[:2], 2), torch.cat(tiles[2:], 2)], 1)


def trained(script: ModuleType, out: Path) -> torch.nn.Module:
    """The network of a run's ckpt.pt."""
    state, args = torch.load(out / "ckpt.pt", map_location="cpu", weights_only=True), script.parse_args([])
    vars(args).update(state["config"])
    net = script.build(args, torch.device("cpu"))
    net.load_state_dict(state["model"])
    return net


@torch.no_grad()
def blocks(out: Path) -> Tensor:
    """9403 (2) and (9): two dense R_n of the first layer's first head above, their blocks below."""
    B = trained(rope, out).B()[0, 0]
    P, _ = rope.canonical(B)
    dense = rope.exp_rotation(torch.tensor([4.0, 32.0], dtype=torch.float64), B)  # (2, d, d)
    return four([*dense, *(P.mT @ dense @ P)])


def codes(out: Path) -> Tensor:
    """7947: cosines of p with each other, of 2n codes by (1) and (2); of p's copies, of p drawn out."""
    state = torch.load(out / "ckpt.pt", map_location="cpu", weights_only=True)
    p = state["model"]["bert.embeddings.position_embeddings.weight"]
    q = [hier_pos_bert.other_positions(p, way, 2 * len(p), torch.Generator()) for way in ("tile", "interpolate")]
    q = [F.normalize(x - p.mean(0), dim=1) for x in (p, hier_pos_bert.materialize(p, 0.4, 2 * len(p)), *q)]
    return four([x @ x.T for x in q])


@torch.no_grad()
def keys(out: Path) -> Tensor:
    """9844 (2), (4), in the second layer, for 64 bytes: K K^T, K_hat K_hat^T; Delta, C C^T."""
    net = trained(transformer_vq, out)
    text = (out / "samples.txt").read_bytes()[:64]
    k, ids = net(torch.tensor([list(text)]))[3][1]
    C = net.layers[1].book.vectors()
    k, k_hat, C = (F.normalize(x, dim=-1) for x in (k[0], C[ids[0]], C))
    return four([k @ k.T, k_hat @ k_hat.T, F.one_hot(ids[0], len(C)).float(), C @ C.T])


def words(out: Path) -> Tensor:
    """Some words of the run's vectors, each with its two nearest, in two directions."""
    names, W = w2v_svd.read_vectors(out / "vectors.bin")
    shown = [w for w in "file string thread server function month".split() if w in names]
    chosen = torch.tensor([names.index(w) for w in shown or names[:6]])
    near = torch.cat([chosen[:, None], w2v_svd.neighbours(W, chosen, 2)[1]], 1)  # (6, 3)
    group = torch.arange(len(chosen))[:, None].expand(-1, 3).flatten()
    rows, first = near.flatten().tolist(), {}
    for k, row in enumerate(rows):
        first.setdefault(row, k)
    keep = list(first.values())
    return w2v_map.pca_picture(W[[rows[k] for k in keep]], [names[rows[k]] for k in keep], group[keep], SIDE)


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    p.add_argument("--out", type=Path, default=Path("out"), help="where the runs' folders are")
    p.add_argument("--to", type=Path, default=ROOT / "docs/strip.png", help="the picture to write")
    args = p.parse_args(argv)
    squares = [draw(args.out / name) for name, draw in (
        ("ddpm", faces), ("nvae", faces), ("o_gan", pairs), ("bigan_qp", between),
        ("rope", blocks), ("hier_pos_bert", codes), ("transformer_vq", keys), ("w2v_svd", words))]
    squares = [F.pad(s, (0, SIDE + 12 - s.shape[2], 0, SIDE + 12 - s.shape[1]), value=255) for s in squares]
    strip = torch.cat([torch.cat(squares[:4], 2), torch.cat(squares[4:], 2)], 1)
    ddpm.write_png(args.to, strip[:, :-12, :-12])
    print(args.to)
    return 0


if __name__ == "__main__":
    sys.exit(main())
