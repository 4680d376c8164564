"""What makes an NVAE good? The same run with one thing taken away, and a plain VAE of as many parameters.

    python tests/experiments/nvae_arms.py [--arms nvae plain ...] [--seeds 0 1] [--keep DIR] [flags of nvae.py]

nvae: as it is. plain: one flat z of 32 numbers, p(z|x) = N(mu(x), sigma(x)^2), decoder cells after it: the VAE of the
post's (1). absolute: p(z_l|z_<l, x) told by itself, not by its difference from q(z_l|z_<l). one level: as many groups
and latent numbers, all at the finest scale. no penalty: neither spectral norms nor gammas. flow: one in each group, which
the post advises to leave out. Prints for each arm, mean over the seeds, bits or nats by the importance bound, the error
of reconstructions, nvae.py's judge, and CPU seconds of it all.
--keep: where the runs' folders stay, DIR/ARM.SEED; else they are thrown away.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import nvae  # noqa: E402

COLUMNS = ("importance_nats", "importance_bits_per_dim", "kl", "reconstruction_rmse", "frechet", "precision", "recall",
           "sharpness", "parameters", "cpu_seconds")


class Absolute(nvae.Group):
    """p(z_l|z_<l, x) = N(mean, deviation^2) as its head says it; what top_down wants is the difference."""

    def q(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        s, *self.moments = super().q(s)
        return s, *self.moments

    def p(self, s: Tensor, feature: Tensor) -> tuple[Tensor, Tensor]:
        mu, sigma = self.moments
        mean, deviation = super().p(s, feature)
        return mean - mu, (deviation + 0.01) / sigma


class Flat(nn.Module):
    """The only group of a plain VAE: z is (B, 32, 1, 1)."""

    def __init__(self, shape: tuple[int, int, int], latent: int, cells: nn.Module):
        super().__init__()
        numbers, self.shape, self.latent, self.cells = math.prod(shape), shape, latent, cells
        self.see, self.grow, self.flow = nn.Linear(numbers, 2 * latent), nn.Linear(latent, numbers), nn.Sequential()

    def q(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mu = torch.zeros(len(s), self.latent, 1, 1, device=s.device)
        return s, mu, torch.ones_like(mu)

    def p(self, s: Tensor, feature: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_deviation = nvae.soft_clamp(self.see(feature.flatten(1)))[..., None, None].chunk(2, dim=1)
        return mean, log_deviation.exp()

    def take(self, s: Tensor, z: Tensor) -> Tensor:
        return self.cells(self.grow(z.flatten(1)).unflatten(1, self.shape).to(memory_format=torch.channels_last))


class Plain(nvae.NVAE):
    """NVAE's stem, tower and cells, a flat z between; as many cells as its groups had."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        cells = nn.Sequential(*(cell for group in self.groups for cell in group.cells))
        self.groups = nn.ModuleList([Flat(tuple(self.h.shape[1:]), 32, cells)])
        self.shapes = [(32, 1, 1)]
        self.areas = torch.ones(1)
        self.h.requires_grad_(False)  # it has no say


ARMS = {"nvae": {}, "plain": dict(NVAE=Plain), "absolute": dict(Group=Absolute),
        "one level": ["--scales", "1", "--groups", "4", "--latent", "5", "--width", "56"], "no penalty": ["--penalty", "0"],
        "flow": ["--flows", "1"]}


def main(argv: list[str] | None = None) -> dict[str, dict]:
    """Prints the table; returns the means by arm."""
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0], usage=__doc__, allow_abbrev=False)
    p.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    p.add_argument("--seeds", nargs="+", type=int, default=[0])
    p.add_argument("--keep", metavar="DIR")
    opt, rest = p.parse_known_args(argv)
    table, lines = {}, []
    with tempfile.TemporaryDirectory() as folder:
        for arm in opt.arms:
            runs = []
            for seed in opt.seeds:
                out, begin = f"{opt.keep or folder}/{arm.replace(' ', '_')}.{seed}", time.process_time()
                parts = ARMS[arm] if isinstance(ARMS[arm], dict) else {}
                real = {name: getattr(nvae, name) for name in parts}
                try:
                    vars(nvae).update(parts)
                    flags = ARMS[arm] if not isinstance(ARMS[arm], dict) else []
                    if code := nvae.main([*rest, *flags, "--seed", str(seed), "--out", out]):
                        sys.exit(code)
                finally:
                    vars(nvae).update(real)
                state = torch.load(f"{out}/ckpt.pt", weights_only=True)
                known = json.loads(Path(out, "metrics.json").read_text())
                runs.append(known | dict(kl=sum(known["kl_by_group"]), cpu_seconds=time.process_time() - begin,
                                         parameters=sum(m["exp_avg"].numel() for m in state["opt"]["state"].values())))
            known = {name: [run[name] for run in runs if run.get(name) is not None] for name in COLUMNS}
            table[arm] = {name: statistics.mean(values) if values else None for name, values in known.items()}
            numbers = ["-" if n is None else f"{n:.4g}" for n in table[arm].values()]
            lines.append(f"| {arm} | " + " | ".join(numbers) + " |")
    print("| arm | " + " | ".join(COLUMNS) + " |\n| --- " + "| --- " * len(COLUMNS) + "|")
    print("\n".join(lines))
    return table


if __name__ == "__main__":
    main()
