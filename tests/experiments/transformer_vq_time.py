"""Time and memory against the length n: vq_attention, and torch's causal attention of the same widths.

    python tests/experiments/transformer_vq_time.py                      # one thread, 1k to 32k tokens
    python tests/experiments/transformer_vq_time.py --longest 2048       # a look
    python tests/experiments/transformer_vq_time.py --figure time.svg    # and the page's picture

One head, d_k = 64, d_v = 128, float32, codes given; every arm in turn, the median of --repeats. SDPA has q and k
padded to v's width, which makes it the fused kernel (unpadded it is slower). Slopes are of log time by log n.
Peak is what a process of its own needs above the inputs, forward and backward. Then milliseconds a token of decoding:
vq_step, and softmax over a cache of all keys and values.
"""

import argparse
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))
import transformer_vq as tvq  # noqa: E402

D_K, D_V = 64, 128
SIZES = {"c = M = 512, L = 128": (512, 512, 128), "c = M = L = 128": (128, 128, 128)}


def inputs(n: int, codes: int, window: int) -> dict:
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, n, D_K, generator=g) / D_K**0.25
    codebook = torch.randn(codes, D_K, generator=g) / D_K**0.25
    ids, k_hat = tvq.quantize(k, codebook)
    return dict(q=q, k_hat=k_hat, v=torch.randn(1, n, D_V, generator=g), bias=torch.zeros(window + 1),
                ids=ids, codebook=codebook)


def attend(arm: str, x: dict) -> torch.Tensor:
    """The output of an arm."""
    if arm in SIZES:
        return tvq.vq_attention(x["q"], x["k_hat"], x["ids"], x["v"], x["codebook"], x["bias"], SIZES[arm][2])[0]
    pad = (0, D_V - D_K) if arm == "SDPA" else (0, 0)
    return F.scaled_dot_product_attention(F.pad(x["q"], pad)[None], F.pad(x["k_hat"], pad)[None], x["v"][None],
                                          is_causal=True, scale=1.0)[0]


def once(arm: str, n: int, backward: bool) -> float:
    x = inputs(n, *SIZES.get(arm, (1, 0))[:2])
    leaves = [x[name].requires_grad_(backward) for name in ("q", "k_hat", "v", "bias")]
    begin = time.perf_counter()
    with torch.set_grad_enabled(backward):
        total = attend(arm, x).sum()
    if backward:
        torch.autograd.grad(total, leaves, allow_unused=True)
    return time.perf_counter() - begin


def peak(arm: str, n: int) -> float:
    """MiB that forward and backward need above the inputs, in a process of its own (Linux: VmHWM)."""
    code = (f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
            f"import transformer_vq_time as t; print(t.peak_here({arm!r}, {n}))")
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                                env=os.environ | {"OMP_NUM_THREADS": "1"}).stdout)


def peak_here(arm: str, n: int) -> float:
    def read(what: str) -> float:
        return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith(what))
    once(arm, 256, True)
    x = inputs(n, *SIZES.get(arm, (1, 0))[:2])
    leaves = [x[name].requires_grad_() for name in ("q", "k_hat", "v")]
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = read("VmRSS")
    torch.autograd.grad(attend(arm, x).sum(), leaves)
    return read("VmHWM") - before


def decode(position: int, repeats: int) -> tuple[float, float]:
    """Median ms a token at `position`, of vq_step with c = M = 512, and of a cache of all keys; one after the other, as
    each pushes the other's numbers out of the processor's cache."""
    x = inputs(1024, 512, 512)
    _, state = tvq.vq_attention(x["q"], x["k_hat"], x["ids"], x["v"], x["codebook"], x["bias"], 128)
    state = state._replace(count=state.count * (position / 1024), U=state.U * (position / 1024))
    keys, values = torch.randn(1, position, D_K), torch.randn(1, position, D_V)
    ours, cache = [], []
    for t in range(repeats):
        q, k, ids, v = (x[name][:, t % 1024] for name in ("q", "k_hat", "ids", "v"))
        begin = time.perf_counter()
        _, state = tvq.vq_step(q, k, ids, v, x["codebook"], x["bias"], state)
        ours.append(time.perf_counter() - begin)
    for t in range(repeats):
        q, k, v = (x[name][:, t % 1024] for name in ("q", "k_hat", "v"))
        begin = time.perf_counter()
        keys[:, t % position], values[:, t % position] = k, v
        (q[:, None] @ keys.mT).softmax(-1) @ values
        cache.append(time.perf_counter() - begin)
    return 1e3 * statistics.median(ours), 1e3 * statistics.median(cache)


def slope(n: list[int], y: list[float]) -> float:
    """Of log y by log n, least squares."""
    x, y = [math.log(v) for v in n], [math.log(max(v, 1e-9)) for v in y]
    a, b = sum(x) / len(x), sum(y) / len(y)
    return sum((p - a) * (q - b) for p, q in zip(x, y)) / max(sum((p - a) ** 2 for p in x), 1e-9)


def draw(path: str, lengths: list[int], times: dict[str, list[float]]) -> None:
    tvq.draw_curves(Path(path), "one thread: seconds of forward and backward", "tokens",
                    {arm: (lengths, [t / 1e3 for t in row]) for arm, row in times.items()}, log2=True)


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--longest", type=int, default=32768, help="tokens (default: %(default)s)")
    p.add_argument("--repeats", type=int, default=5, help="(default: %(default)s)")
    p.add_argument("--figure", metavar="SVG", help="draws forward and backward there")
    opt = p.parse_args(argv)
    torch.set_num_threads(1)
    lengths = [n for n in (1024, 2048, 4096, 8192, 16384, 32768) if n <= opt.longest] or [opt.longest]
    arms = ["SDPA", *SIZES]
    print(f"{'ms':34}" + "".join(f"{n:>9}" for n in lengths) + "   slope")
    for backward, what in (False, "forward"), (True, "forward + backward"):
        times = {arm: [] for arm in arms}
        for n in lengths:
            runs = {arm: [] for arm in arms}
            for repeat in range(opt.repeats if n < 16384 else min(3, opt.repeats)):
                for arm in arms:
                    runs[arm].append(1e3 * once(arm, n, backward))
            for arm in arms:
                times[arm].append(statistics.median(runs[arm]))
        for arm in arms:
            said = f"{arm}, {what}"
            print(f"{said:34}" + "".join(f"{t:9.1f}" for t in times[arm]) + f"{slope(lengths, times[arm]):8.2f}")
        for arm in arms[1:]:
            ratios = "".join(f"{a / b:9.2f}" for a, b in zip(times["SDPA"], times[arm]))
            print(f"{'  SDPA takes times as long':34}{ratios}", flush=True)
    if opt.figure:
        draw(opt.figure, lengths, times)
    print(f"unpadded, SDPA takes {1e3 * once('SDPA unpadded', lengths[0], False):.1f} ms at {lengths[0]}")
    for arm in arms:
        sizes = [peak(arm, n) for n in lengths]
        said = "".join(f"{m:9.1f}" for m in sizes)
        print(f"{arm + ', peak MiB':34}{said}{slope(lengths, sizes):8.2f}", flush=True)
    places = [n for n in (1024, 4096, 16384, 65536) if n <= 2 * opt.longest] or [opt.longest]
    rows = [decode(n, 20 * opt.repeats) for n in places]
    print(f"{'ms a token at position':34}" + "".join(f"{n:>9}" for n in places))
    for name, column in ("vq_step, c = M = 512", 0), ("all keys cached", 1):
        print(f"{name:34}" + "".join(f"{row[column]:9.3f}" for row in rows))


if __name__ == "__main__":
    main()
