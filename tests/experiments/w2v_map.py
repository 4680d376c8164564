"""Words in two directions: eight of a run's words, each with its five nearest in one colour.

    python tests/experiments/w2v_map.py     # after the bare run of w2v_svd.py; writes docs/w2v_svd_pca.png

The directions are the two principal ones of the vectors drawn, as cosines see them.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import ddpm  # noqa: E402
import w2v_svd as w  # noqa: E402

GLYPHS = dict(zip("abcdefghijklmnopqrstuvwxyz", (  # rows of 3 dots, in octal
    "25755 65656 34443 65556 74647 74644 34553 55755 72227 11152 55655 44447 57755 65555 25552 "
    "65644 25573 65655 34216 72222 55557 55552 55775 55255 55222 71247").split()))
COLOURS = torch.tensor([[31, 119, 180], [214, 39, 40], [44, 160, 44], [148, 103, 189],
                        [255, 127, 14], [23, 150, 160], [140, 86, 75], [90, 90, 90]])


def pca_picture(W: Tensor, labels: list[str], group: Tensor, size: int = 900) -> Tensor:
    """The rows of W (N, n), cosines, in their two principal directions: uint8 (3, size, size).

    group (N,) gives the colours. Letters from a to z can be drawn, others become dots.
    """
    W = F.normalize(W.float().cpu(), dim=1)
    xy = w.truncated(W - W.mean(0), 2)[0]
    xy = (xy - xy.amin(0)) / (xy.amax(0) - xy.amin(0)).clamp(min=1e-9)  # each fills its side
    picture, taken = torch.full((size, size, 3), 255, dtype=torch.uint8), []
    for (x, y), label, g in zip((xy * (size - 130) + 20).long().tolist(), labels, group.tolist()):
        while any(abs(y - b) < 14 and x < a + w and a < x + 8 * len(label) for a, b, w in taken):
            y += 2  # below what is there
        taken.append((x, y, 8 * len(label)))
        rows = ["".join(f"{int(GLYPHS.get(c, '00200')[r]):03b}0" for c in label) for r in range(5)]
        dots = torch.tensor([[c == "1" for c in row] for row in rows])
        dots = dots.repeat_interleave(2, 0).repeat_interleave(2, 1)[:max(size - y, 0), :size - x]
        picture[y:y + dots.shape[0], x:x + dots.shape[1]][dots] = COLOURS[g % 8].to(torch.uint8)
    return picture.permute(2, 0, 1)


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--vectors", type=Path, default=Path("out/w2v_svd/vectors.bin"), help="as in w2v_svd.py")
    p.add_argument("--to", type=Path, default=ROOT / "docs/w2v_svd_pca.png", help="the picture to write")
    opt = p.parse_args(argv)
    words, W = w.read_vectors(opt.vectors)
    chosen = w.choose([], words)[:8]
    near = torch.cat([chosen[:, None], w.neighbours(W, chosen, 5)[1]], 1)  # (8, 6)
    ids, group = near.flatten().tolist(), torch.arange(near.numel()) // near.shape[1]
    ddpm.write_png(opt.to, pca_picture(W[ids], [words[k] for k in ids], group))
    print(opt.to)


if __name__ == "__main__":
    try:
        main()
    except w.UserError as error:
        sys.exit(f"w2v_map.py: {error}")
