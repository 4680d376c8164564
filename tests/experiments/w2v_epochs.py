"""The post's question with each descent trained until it no longer gains: more epochs while --choose says so.

    python tests/experiments/w2v_epochs.py --data reviews.txt --choose men.txt verb143.txt --report wordsim353.tsv

Each arm (--arms, model or model,loss) is trained anew for 1, 2, 4, ... epochs, its rate falling to zero, until the
mean score on the files of --choose no longer grows by --gain, or --most epochs; the best one's scores on all files are
the arm's. A line for each training, and one for the SVD of PPMI at the same words and numbers.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import w2v_svd as w  # noqa: E402


def scores(flags: list[str], files: list[Path]) -> list[float]:
    """The scores on the files of a run with these flags. Raises SystemExit where it does not run."""
    with tempfile.TemporaryDirectory() as out:
        if w.main([*flags, f"--out={out}/run", "--save-every=1000000"]):
            raise SystemExit("w2v_epochs.py: a run failed, see above")
        words, W = w.read_vectors(Path(out) / "run/vectors.bin")
    found = [w.evaluate(path, words, W) for path in files]
    return [x.get("spearman", x.get("right")) for x in found]


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--data", default="python", help="as in w2v_svd.py")
    p.add_argument("--choose", nargs="+", type=Path, required=True)
    p.add_argument("--report", nargs="+", type=Path, required=True)
    for flag, default in (("--vocabulary", 5000), ("--min-count", 5), ("--dim", 100), ("--seed", 0), ("--steps", 0),
                          ("--sample", 1e-3)):
        p.add_argument(flag, type=type(default), default=default, help="as in w2v_svd.py; --steps: of each training, for tests")
    p.add_argument("--arms", nargs="+", default=["skipgram", "cbow", "autoencoder"])
    p.add_argument("--gain", type=float, default=0.005)
    p.add_argument("--most", type=float, default=32.0, help="epochs")
    opt = p.parse_args(argv)
    flags = [f"--{name.replace('_', '-')}={getattr(opt, name)}" for name in
             ("data", "vocabulary", "min_count", "dim", "seed", "steps", "sample")]
    files, half, rows = opt.choose + opt.report, len(opt.choose), []

    def tell(name: str, values: list[float]) -> float:
        mean = sum(values[:half]) / half
        rows.append(f"{name:32}{mean:.3f}  |  " + "  ".join(f"{x:.3f}" for x in values))
        print(rows[-1], flush=True)  # long runs are stopped
        return mean
    tell("SVD of PPMI", scores([*flags, "--model=ppmi"], files))
    for arm in opt.arms:
        model, _, loss = arm.partition(",")
        epochs, best = 1.0, -2.0
        while epochs <= opt.most:
            mean = tell(f"{arm}, {epochs:g} epochs", scores(
                [*flags, f"--model={model}", f"--loss={loss or 'negative'}", f"--epochs={epochs}"], files))
            if mean < best + opt.gain:
                break
            epochs, best = 2 * epochs, mean
    heads = "  ".join(path.stem for path in files)
    print("\n".join([f"{'arm':32}chosen by  |  {heads}", *rows]), flush=True)


if __name__ == "__main__":
    try:
        main()
    except w.UserError as error:
        sys.exit(f"w2v_epochs.py: {error}")
