"""What each part of the post's loss is worth: O-GAN beside what the post argues against, at equal steps.

    python tests/experiments/o_gan_arms.py [--seeds 0 1] [--arms rho mse ...] [--pictures N] [flags of o_gan.py]

Arms: rho is (7) as it stands, lambda_2 .5; no rho, rho 1: lambda_2 0 and 1; mse: || z - E(G(z)) ||^2 for rho, to the scale
of (9), which the post says fails; hinge: (6) with a hinge GAN; learned T: (4), a small T for avg; autoencoder: the same
nets trained on || x - G(N(E(x))) ||^2 alone; augment: rho with --augment, which is for few pictures, as --pictures leaves.
Prints for each the means over the seeds of the report's numbers.
"""

import argparse
import contextlib
import io
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import o_gan  # noqa: E402

COLUMNS = ("frechet", "precision", "recall", "sharpness", "rho", "rho_held_out", "psnr", "probe_E", "knn_E", "train_seconds")
REAL = {name: getattr(o_gan, name) for name in ("critic_loss", "generator_loss", "build", "load_data")}


def against(z, h):
    return -o_gan.rho(z, h)


def mse(z, h):
    return (z - h).square().mean(1) / 2  # (9): half of it is 1 - rho when avg and std are those of z


def qp(score=o_gan.avg, guide=against) -> dict:
    """The losses (7) with another critic, or another guide than rho."""
    def critic_loss(x, y, z, hx, hy, lambda_1, lambda_2):
        gap, distance = score(hx) - score(hy), (x - y).square().mean((1, 2, 3))
        return gap + lambda_1 * gap.square() / distance + lambda_2 * guide(z, hy)

    def generator_loss(z, hy, lambda_2):
        return score(hy) + lambda_2 * guide(z, hy)
    return dict(critic_loss=critic_loss, generator_loss=generator_loss)


def hinge() -> dict:
    """(6) with f(a) = max(0, 1 + a), g(b) = max(0, 1 - b), h(b) = b: real low, fake high, as in (7)."""
    def critic_loss(x, y, z, hx, hy, lambda_1, lambda_2):
        return (1 + o_gan.avg(hx)).relu() + (1 - o_gan.avg(hy)).relu() - lambda_2 * o_gan.rho(z, hy)
    return dict(critic_loss=critic_loss)


def learned_T() -> dict:
    """(4): T is a net of two layers on the code, which learns with E."""
    T = []

    def build(args, shape, device):
        nets = REAL["build"](args, shape, device)
        nets.E.T = o_gan.started(nn.Sequential(nn.Linear(args.n_z, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1)), 0).to(device)
        T[:] = [nets.E.T]
        return nets
    return dict(qp(lambda h: T[0](h)[:, 0]), build=build)


ARMS = {"rho": ([], {}), "no rho": (["--lambda-2", "0"], {}), "rho 1": (["--lambda-2", "1"], {}),
        "mse": ([], qp(guide=mse)), "hinge": ([], hinge()), "learned T": ([], learned_T()), "augment": (["--augment"], {})}


@contextlib.contextmanager
def replaced(functions: dict):
    """Inside, o_gan has these functions in the place of its own."""
    try:
        for name, function in functions.items():
            setattr(o_gan, name, function)
        yield
    finally:
        for name in functions:
            setattr(o_gan, name, REAL[name])


def autoencoder(argv: list[str]) -> dict:
    """The same nets, rate and batches, each picture back to itself by (10); no game."""
    args, cpu = o_gan.parse_args(argv), torch.device("cpu")
    with contextlib.redirect_stdout(io.StringIO()):
        pool, held_out, *labels = o_gan.load_data(args, cpu, None)
    nets, ema, fresh = (o_gan.build(args, pool.shape[1:], cpu) for _ in range(3))
    opt, begin = o_gan.optimizer(nets, args), time.perf_counter()
    for step in range(args.steps):
        x = o_gan.to_float(pool[o_gan.batch_rows(len(pool), step, args.batch_size, args.seed, cpu)])
        (x - o_gan.reconstruct(nets.E, nets.G, x)).square().mean().backward()
        opt.step()
        opt.zero_grad()
        o_gan.update_ema(o_gan.floats(ema), o_gan.floats(nets), step, args.ema)
    seconds = time.perf_counter() - begin
    Path(args.out).mkdir()
    return o_gan.report(ema.eval(), fresh.eval(), pool, held_out, *labels, args) | dict(train_seconds=seconds)


def train(arm: str, argv: list[str]) -> dict:
    """A whole run of o_gan.py with the arm's functions in the place of its own."""
    flags, patches = ARMS[arm]
    with replaced(patches), contextlib.redirect_stdout(io.StringIO()):
        code = o_gan.main([*argv, *flags])
    if code:
        sys.exit(code)
    return json.loads(Path(o_gan.parse_args(argv).out, "metrics.json").read_text())


def main(argv: list[str] | None = None) -> dict[str, dict]:
    """Prints the table; returns the means by arm."""
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0], usage=__doc__, allow_abbrev=False)
    p.add_argument("--seeds", nargs="+", type=int, default=[0])
    p.add_argument("--arms", nargs="+", choices=[*ARMS, "autoencoder"], default=[*ARMS, "autoencoder"])
    p.add_argument("--steps", type=int, default=3000)
    p.add_argument("--pictures", type=int, help="train on the first N only (default: on all)")
    opt, rest = p.parse_known_args(argv)

    def load_data(args, device, state):
        pool, held_out, labels, held_out_labels = REAL["load_data"](args, device, state)
        return pool[:opt.pictures], held_out, labels if labels is None else labels[:opt.pictures], held_out_labels

    table, lines = {}, []
    for arm in opt.arms:
        runs = []
        for seed in opt.seeds:
            with tempfile.TemporaryDirectory() as folder:
                flags = [*rest, "--steps", str(opt.steps), "--seed", str(seed), "--out", f"{folder}/run"]
                with replaced(dict(load_data=load_data)):
                    runs.append(autoencoder(flags) if arm == "autoencoder" else train(arm, flags))
        for run in runs:  # one number for all attributes
            run |= {name: statistics.mean(run[name]) for name in ("probe_E",) if name in run}
        known = {name: [run[name] for run in runs if run.get(name) is not None] for name in COLUMNS}
        table[arm] = {name: statistics.mean(values) if values else None for name, values in known.items()}
        numbers = ["-" if n is None else f"{n:.3g}" for n in table[arm].values()]
        lines.append(f"| {arm} | " + " | ".join(numbers) + " |")
        print(lines[-1], flush=True)
    print("| arm | " + " | ".join(COLUMNS) + " |\n| --- " + "| --- " * len(COLUMNS) + "|")
    print("\n".join(lines))
    return table


if __name__ == "__main__":
    main()
