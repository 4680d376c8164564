"""Models trained on their own, at equal steps: what the cache, B, and the gradient that the post gives up are worth.

    python tests/experiments/transformer_vq_arms.py                    # the bare run's model, 1,000 steps each
    python tests/experiments/transformer_vq_arms.py --steps 2 --eval-bytes 4096

Flags it does not know go to transformer_vq.py. An arm a line: bits per byte on held-out text within the trained
length, and of the places beyond it. Last the post's 发散思考: the model of exact keys gets codebooks by K-means on the
keys of one batch, before and after --tune steps, beside as many more steps with exact keys.
"""

import argparse
import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import transformer_vq as tvq  # noqa: E402

build = tvq.build


def flat(args: argparse.Namespace, device: torch.device) -> tvq.TransformerVQ:
    """A model without B: its tables are zero and stay so."""
    net = build(args, device)
    for layer in net.layers:
        layer.bias.data.zero_()
        layer.bias.requires_grad_(False)
    return net


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--steps", type=int, default=1000, help="of each arm (default: %(default)s)")
    p.add_argument("--tune", type=int, default=200, help="after K-means (default: %(default)s)")
    opt, rest = p.parse_known_args(argv)
    with tempfile.TemporaryDirectory() as folder:

        def arm(name: str, out: str, *flags: str, made=build) -> dict:
            """Trains one and prints its line; returns metrics.json."""
            tvq.build = made
            with contextlib.redirect_stdout(io.StringIO()) as said:
                code = tvq.main([*rest, *flags, "--out", f"{folder}/{out}", "--recall-steps", "0", "--samples", "1",
                                 "--length", "1", "--save-every", "1000000"])
            tvq.build = build
            if code:
                sys.exit(said.getvalue())
            metrics = json.loads(Path(f"{folder}/{out}/metrics.json").read_text())
            beyond = [k for k, end in enumerate(metrics["edges"][1:]) if end > metrics["trained_length"]]
            for way, bits in metrics["bits_per_byte"].items():
                places = "".join(f"  < {metrics['edges'][k + 1]} {metrics['by_position'][way][k]:.3f}" for k in beyond)
                print(f"{name + ', ' + way:54}{bits:8.4f}{places}", flush=True)
            return metrics

        steps = ["--steps", str(opt.steps)]
        arm("vq", "vq", *steps)
        arm("full straight-through, (2)", "quadratic", *steps, "--attention", "quadratic")
        arm("vq without B", "flat", *steps, made=flat)
        arm("the window alone", "window", *steps, "--attention", "window")
        arm("exact keys", "exact", *steps, "--attention", "exact")
        weights = torch.load(f"{folder}/exact/ckpt.pt", weights_only=True)["model"]

        def converted(args: argparse.Namespace, device: torch.device) -> tvq.TransformerVQ:
            """The exact model's weights; training's first step gives it codes by K-means."""
            net = build(args, device)
            net.load_state_dict(weights, strict=False)
            return net

        tune = ["--steps", str(opt.tune), "--lr", "1e-3", "--warmup", "1"]
        none = ["--steps", "1", "--lr", "0", "--ema", "0.999999"]
        arm("exact, then K-means", "kmeans", *none, made=converted)
        arm(f"exact, then K-means and {opt.tune} steps", "tuned", *tune, made=converted)
        arm(f"exact, then {opt.tune} steps more", "longer", *tune, "--attention", "exact", made=converted)


if __name__ == "__main__":
    main()
