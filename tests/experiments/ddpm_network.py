"""What does each choice of the network bring? The same run with one of them taken away, then with none.

    python tests/experiments/ddpm_network.py [--seeds 0 1] [--without nothing foresight ...] [flags of ddpm.py]

Prints for each arm, mean over the seeds, the held-out loss (15) of the average,
ddpm.py's judge of --judge samples, and the seconds of training. The same number of steps is not the same time: without
patches a step takes about three times as long.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import ddpm  # noqa: E402

ARMS = {"nothing": "", "foresight": "--no-foresight", "scale and shift": "--no-scale-shift", "patches": "--patch 1",
        "all three": "--no-foresight --no-scale-shift --patch 1"}
COLUMNS = "held_out_loss_ema", "frechet", "precision", "recall", "sharpness", "train_seconds"


def main(argv: list[str] | None = None) -> dict[str, dict]:
    """Prints the table; returns the means by arm."""
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0], usage=__doc__, allow_abbrev=False)
    p.add_argument("--seeds", nargs="+", type=int, default=[0])
    p.add_argument("--without", nargs="+", choices=ARMS, default=list(ARMS))
    opt, rest = p.parse_known_args(argv)
    table, lines = {}, []
    for arm in opt.without:
        runs = []
        for seed in opt.seeds:
            with tempfile.TemporaryDirectory() as folder:
                out = f"{folder}/run"
                if code := ddpm.main([*rest, *ARMS[arm].split(), "--seed", str(seed), "--out", out]):
                    sys.exit(code)
                runs.append(json.loads(Path(out, "metrics.json").read_text()))
        known = {name: [run[name] for run in runs if run.get(name) is not None] for name in COLUMNS}
        table[arm] = {name: statistics.mean(values) if values else None for name, values in known.items()}
        numbers = ["-" if n is None else f"{n:.3g}" for n in table[arm].values()]
        lines.append(f"| {arm} | " + " | ".join(numbers) + " |")
    print("| without | held-out loss | Frechet | precision | recall | sharpness | seconds |\n| --- " + "| --- " * 6 + "|")
    print("\n".join(lines))
    return table


if __name__ == "__main__":
    main()
