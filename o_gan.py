# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "numpy"]
# ///
"""O-GAN: a small change makes a GAN's discriminator an encoder.

Post    O-GAN：简单修改，让GAN的判别器变成一个编码器！   https://kexue.fm/archives/6409 (read 2026-11)
        Author's code: bojone/o-gan. The GAN beneath is a variant of GAN-QP, post 6163.

Map     6409 (1)   D: E[f(D(x)) + g(D(G(z)))], G: E[h(D(G(z)))], both least       test
        6409 (2)   avg(z), std(z), N(z) = (z - avg(z)) / std(z)            avg, std, normalize
        6409 (3)   D(x) = T(E(x))                                          test
        6409 (4)   (1) with - lambda rho(z, E(G(z))) for both              test
        6409 (5)   rho(z, h) = cos(N(z), N(h)), h = E(G(z))                rho
        6409 (6)   (4) with T = avg: the critic is avg(E(x))               test
        6409 (7)   E: avg(E(x)) - avg(E(G(z))) + lambda_1 R - lambda_2 rho critic_loss
        6409 (7)   G: avg(E(G(z))) - lambda_2 rho                          generator_loss
        6409 (8)   R = (avg(E(x)) - avg(E(G(z))))^2 / || x - G(z) ||^2     R
        6409 (9)   -rho(z, h) ~ || N(z) - N(h) ||^2                        test
        6409 (10)  G(N(E(x))) is x again                                   reconstruct
Symbols E is critic and encoder in one. Its score avg(E(x)) is low for real pictures, high for
        fakes, which G pulls down (in BiGAN-QP, post 6214, real is high); both raise rho. The norm
        in (8) is a sum in the post, the mean over pixels in the author's code and here.
Shapes  B batch, C channels, H height, W width. z ~ N(0, I) and codes h: (B, n_z); x and y = G(z):
        (B, C, H, W), float32 in [-1, 1] here, uint8 in memory and on disk.

Run     python o_gan.py                                  # CPU: small drawn faces
        python o_gan.py --data mnist --n-z 32            # digits, and what a probe reads of E
        python o_gan.py --gpu                            # one GPU: the faces at 64 px
        python o_gan.py --gpu --paper --data FOLDER      # the author's set-up, 128 px
        torchrun --nproc_per_node=8 o_gan.py --gpu       # the same global batch on eight
        python o_gan.py --sample-only 64                 # from ckpt.pt
Needs   torch, numpy (and Pillow for a folder of pictures)
"""

import argparse
import copy
import errno
import functools
import gc
import gzip
import hashlib
import http.client
import io
import itertools
import json
import math
import os
import re
import signal
import struct
import sys
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ---- the post: 6409 ----

def avg(h: Tensor) -> Tensor:
    """6409 (2): the mean over a code's coordinates, (B, n_z) -> (B,). avg(E(x)) is the critic."""
    return h.mean(1)  # 6409 (2)


def std(h: Tensor) -> Tensor:
    """6409 (2), (B,): over n_z, not n_z - 1; from 1e-4 up, so that a constant code does no harm."""
    return h.var(1, correction=0).clamp(min=1e-8).sqrt()  # 6409 (2); departs: a floor


def normalize(h: Tensor) -> Tensor:
    """6409 (2): N(h), (B, n_z), with avg 0 and std 1; [avg, std, N] take h apart orthogonally."""
    return (h - avg(h)[:, None]) / std(h)[:, None]  # 6409 (2)


def rho(z: Tensor, h: Tensor) -> Tensor:
    """6409 (5), (B,): Pearson's correlation over the coordinates of each code, in [-1, 1].

    Neither avg(h) nor std(h) moves it: two degrees of freedom of E are left to the critic.
    """
    return (normalize(z) * normalize(h)).mean(1)  # 6409 (5)


def R(x: Tensor, y: Tensor, hx: Tensor, hy: Tensor) -> Tensor:
    """6409 (8), (B,): holds the critic back: the squared gap of a pair's scores over its distance.

    hx = E(x), hy = E(y). Distances count from 1e-10 up, less than one grey level in one pixel.
    """
    distance = (x - y).square().mean((1, 2, 3))  # departs: mean over pixels, as the author's code
    return (avg(hx) - avg(hy)).square() / distance.clamp(min=1e-10)  # 6409 (8); departs: a floor


def critic_loss(x: Tensor, y: Tensor, z: Tensor, hx: Tensor, hy: Tensor, lambda_1: float,
                lambda_2: float) -> Tensor:
    """6409 (7), E's part, (B,): x real, y = G(z), hx = E(x), hy = E(y). For E's gradient alone."""
    return avg(hx) - avg(hy) + lambda_1 * R(x, y, hx, hy) - lambda_2 * rho(z, hy)  # 6409 (7)


def generator_loss(z: Tensor, hy: Tensor, lambda_2: float) -> Tensor:
    """6409 (7), G's part, (B,): hy = E(G(z)). For G's gradient alone."""
    return avg(hy) - lambda_2 * rho(z, hy)  # 6409 (7)


def reconstruct(E: nn.Module, G: nn.Module, x: Tensor, shrink: float = 1.0) -> Tensor:
    """6409 (10): G(N(E(x))), pictures to pictures (B, C, H, W). The author shrinks by .8 or .9."""
    return G(shrink * normalize(E(x)))  # 6409 (10)


# ---- beyond the post: augmentation, for few pictures (Zhao et al. 2020, DiffAugment) ----

def augment(x: Tensor, u: Tensor) -> Tensor:
    """x brighter or darker, with more or less contrast, and moved by up to an eighth; (B, C, H, W).

    u (B, 4), uniform in [0, 1], says how. E sees nothing else, real or fake, for rho as well: so a
    picture's code does not hang on what was done to it.
    """
    bright, contrast = (u[:, k].view(-1, 1, 1, 1) - 0.5 for k in (0, 1))
    x = x + bright
    mean = x.mean((1, 2, 3), keepdim=True)
    x = mean + (x - mean) * (1 + contrast)
    height, width = x.shape[2:]
    view = x.new_zeros(len(x), 2, 3)  # for grid_sample, to which height and width are 2
    view[:, 0, 0] = view[:, 1, 1] = 1
    view[:, 0, 2] = ((u[:, 2] - 0.5) * width / 4).round() * 2 / width  # whole pixels
    view[:, 1, 2] = ((u[:, 3] - 0.5) * height / 4).round() * 2 / height
    places = F.affine_grid(view, x.shape, align_corners=False)
    return F.grid_sample(x, places, "nearest", align_corners=False)


# ---- model ----

class OGan(nn.Module):
    """The two players, E: (B, C, H, W) -> (B, n_z), and G: (B, n_z) -> (B, C, H, W)."""

    def __init__(self, shape: tuple[int, ...], n_z: int, width: int, kernel: int):
        super().__init__()
        self.E = started(Encoder(shape, width, n_z, kernel), 0.02)
        self.G = started(Generator(n_z, shape, width, kernel), 0.02)


# ---- evaluation ----

def sample(G: nn.Module, count: int, args: argparse.Namespace, device: torch.device
           ) -> tuple[Tensor, Tensor]:
    """z (count, n_z) and G(z), uint8; --samples of them at a time, so any count begins alike."""
    z = torch.cat([torch.randn(min(args.samples, count - first), args.n_z, device=device,
                               generator=generator(device, args.sample_seed, first, 2))
                   for first in range(0, count, args.samples)])
    return z, pictures_of(G, z)


@torch.no_grad()
def report(nets: OGan, fresh: OGan, x: Tensor, x_test: Tensor, y: Tensor | None,
           y_test: Tensor | None, args: argparse.Namespace) -> dict:
    """Writes samples, reconstructions, interpolation, nearest.png; returns the numbers.

    nets is the average, fresh what the training began with, both in eval mode. Held out: x_test.
    """
    E, G, out, shape = nets.E, nets.G, Path(args.out), x.shape[1:]
    z, samples = sample(G, max(args.samples, args.judge), args, x.device)
    write_png(out / "samples.png", grid(samples[:args.samples], math.isqrt(args.samples)))
    metrics = judge(samples[:args.judge], x, x_test, args.seed) if args.judge else {}

    x, x_test, y, y_test = (evenly(part, 10_000) for part in (x, x_test, y, y_test))
    # by (10): a point between two codes goes through N as they do
    draw_figures(lambda z: G(args.shrink * normalize(z)), lambda x: normalize(E(x)), x, x_test, out)
    again = pictures_of(lambda x: reconstruct(E, G, to_float(x), args.shrink), x_test)
    code, code_test = codes_of(E, x), codes_of(E, x_test)
    pca = Pca(x, max(50, args.n_z))
    seen, seen_test, seen_again = (pca.encode(part) for part in (x, x_test, again))
    metrics |= dict(
        rho=by_batches(lambda z: rho(z, E(G(z))), z).mean().item(),
        rho_held_out=rho(code_test, codes_of(E, again)).mean().item(), psnr=psnr(x_test, again),
        psnr_pca=psnr(x_test, pca.decode(seen_test[:, :args.n_z], shape)),
        psnr_mean=psnr(x_test, pca.decode(seen_test[:, :0], shape)))
    if y is not None:
        metrics |= probes(dict(
            E=(code, code_test), start=(codes_of(fresh.E, x), codes_of(fresh.E, x_test)),
            pca=(seen[:, :args.n_z], seen_test[:, :args.n_z])), y, y_test)
        # what a reconstruction keeps: read off it by a map that was fitted on pictures
        metrics |= dict(read_off_pictures=linear_probe(seen, y, seen_test, y_test),
                        read_off_reconstructions=linear_probe(seen, y, seen_again, y_test))
    return metrics


# ---- training ----
# Random streams, none used twice: torch.manual_seed(seed) the first weights; generator's keys are
# (seed, step) z and the augmentation of a step; (sample_seed, first, 2) z of the samples from
# `first` on; and in the plumbing (seed, epoch, 9) the order, (seed, 0, 10) the judge, (0,) faces.

def check_flags(args: argparse.Namespace) -> None:
    """Raises UserError for flags that do not go together, once --resume has had its say."""
    for wrong, why in ((args.ema >= 1, "--ema: below 1"),
                       (args.kernel > 5, "--kernel: 4 or 5")):
        if wrong:
            raise UserError(why)


def load_data(args: argparse.Namespace, device: torch.device, state: dict | None) -> tuple:
    """Pictures to train on, held-out ones, uint8 (N, C, H, W), and the labels of each or None."""
    images = load_images(args, state, device)
    if min(images[0].shape[2:]) < 4:
        raise UserError(f"--data {args.data}: pictures of 4 px at least, the nets halve them")
    return images


def build(args: argparse.Namespace, shape: tuple[int, ...], device: torch.device) -> OGan:
    """The two nets that the flags describe, with their first weights, on the device."""
    torch.manual_seed(args.seed)
    nets = OGan(shape, args.n_z, args.width, args.kernel)
    return nets.to(device, memory_format=torch.channels_last)


def optimizer(nets: OGan, args: argparse.Namespace) -> torch.optim.Optimizer:
    """One for both players, as the author has it: RMSprop as his, or Adam."""
    if args.optimizer == "rmsprop":
        return torch.optim.RMSprop(nets.parameters(), lr=args.lr, alpha=0.99, eps=1e-7)
    return torch.optim.Adam(nets.parameters(), lr=args.lr, betas=(0.5, 0.999), fused=True)


def train(args: argparse.Namespace, device: torch.device, state: dict | None) -> None:
    """The whole run: data, loop, checkpoints, pictures, metrics.json."""
    pool, held_out, labels, held_out_labels = load_data(args, device, state)
    nets = build(args, pool.shape[1:], device)
    fresh, ema = copy.deepcopy(nets).eval(), copy.deepcopy(nets).eval()
    E_params, G_params = list(nets.E.parameters()), list(nets.G.parameters())
    live, averages, opt = floats(nets), floats(ema), optimizer(nets, args)
    parts = dict(model=nets, ema=ema, opt=opt)
    first = restore(state, parts)
    if args.compile:
        for net in (nets.E, nets.G, ema.E, ema.G):
            net.compile()
    make_room(args)
    count = sum(p.numel() for p in nets.parameters())
    progress = Progress(args, first, count, args.batch_size, "img")

    def save(step: int, end: bool) -> None:
        save_checkpoint(args, step, parts, shape=tuple(pool.shape))
        if not end and not RANK:
            with autocast(args):
                _, samples = sample(ema.G, args.samples, args, device)
            write_png(Path(args.out) / f"samples_{step:06}.png",
                      grid(samples, math.isqrt(args.samples)))

    for step in training(args, first, save):
        g = generator(device, args.seed, step)
        z = mine(torch.randn(args.batch_size, args.n_z, generator=g, device=device))
        x = to_float(pool[mine(batch_rows(len(pool), step, args.batch_size, args.seed, device))])
        with autocast(args):
            y = nets.G(z)
            if args.augment:
                u, v = torch.rand(2, args.batch_size, 4, generator=g, device=device)
                x, y = augment(x, mine(u)), augment(y, mine(v))
            hx, hy = nets.E(x), nets.E(y)  # apart, so that BatchNorm does not mix real and fake
        loss_E = critic_loss(x, y, z, hx, hy, args.lambda_1, args.lambda_2).mean()
        loss_G = generator_loss(z, hy, args.lambda_2).mean()
        # both players move at once, from one graph; `inputs` says whose gradient each loss is
        loss_E.backward(inputs=E_params, retain_graph=True)
        loss_G.backward(inputs=G_params)
        average([p.grad for p in E_params + G_params])
        opt.step()
        opt.zero_grad()
        update_ema(averages, live, step, args.ema)
        with torch.no_grad():
            progress.add(step + 1, loss_E=loss_E, gap=(avg(hx) - avg(hy)).mean(),
                         rho=rho(z, hy).mean(), std=std(hx).mean())
    if RANK:
        return
    seconds, images = time.perf_counter() - progress.begin, (args.steps - first) * args.batch_size
    with autocast(args):
        metrics = report(ema, fresh, pool, held_out, labels, held_out_labels, args)
    say(f"rho {metrics['rho']:.3f}; held-out reconstructions {metrics['psnr']:.1f} dB, the mean "
        f"picture {metrics['psnr_mean']:.1f}")
    if (recall := metrics.get("recall")) is not None and recall < 0.1:
        say(f"warning: recall {recall:.2f}, the samples are all alike; fewer numbers (--n-z) help")
    write_metrics(args, metrics | dict(
        step=args.steps, images_seen=args.steps * args.batch_size, seed=args.seed,
        train_seconds=seconds, images_per_second=images / seconds))


def sample_only(args: argparse.Namespace, device: torch.device, state: dict) -> None:
    """Draws --sample-only pictures from the average in ckpt.pt, whatever device made it."""
    nets = build(args, state["shape"][1:], device)
    restore(state, dict(ema=nets.eval()))
    if args.compile:
        nets.G.compile()
    with autocast(args):
        _, samples = sample(nets.G, args.sample_only, args, device)
    path = Path(args.out) / "samples_only.png"
    write_png(path, grid(samples, math.ceil(args.sample_only ** 0.5)))
    say(str(path))


# ---- command line ----

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags, a row each; --paper is the author's o_gan_celeba.py."""
    experiment = dict(
        # flag       CPU        --gpu         --paper     least  meaning
        data=       ("faces",                               None, "faces (drawn), mnist, fashion-"
                     "mnist, cifar10, or a path: a folder of idx files or of pictures, CIFAR-10's "
                     "binary .tar.gz, or an .npy file"),
        size=       (32,        64,           128,          8, "pixels, if the data have any size"),
        steps=      (10_000,    3500,         470_000,      1, "in all, resumed ones included"),
        batch_size= (16,        64,                         1, "global, over all processes"),
        seed=       (0,                                     0, "of weights, noise and order"),
        n_z=        (8,         8,            128,          3, "numbers in a code"),
        lambda_1=   (0.25,                                  0, "of R, with the mean over pixels"),
        lambda_2=   (0.5,                                   0, "of rho; 0 is the GAN alone"),
        width=      (24,        64,                         1, "channels of the first level, twice "
                     "as many at each further one"),
        kernel=     (4,         4,            5,            4, "side of the convolutions: 4 or 5"),
        optimizer=  ("adam",    "adam",       "rmsprop",    ("adam", "rmsprop"), "of both players"),
        lr=         (1e-3,      5e-4,         1e-4,         0, "the optimiser's rate, constant"),
        augment=    (False,                                 None, "E sees pictures moved, brighter "
                     "or darker, real and fake; for few pictures (at 500 faces it harmed)"),
        ema=        (0.999,      0.999,        0.0,         0, "decay of the average that draws"),
    )
    others = dict(
        paper=      (False,                                 None, "the author's sizes and rates"),
        save_every= (2000,      2000,         10_000,       1, "steps between checkpoints"),
        samples=    (64,                                    1, "pictures in a grid"),
        sample_seed=(0,                                     0, "of the pictures drawn"),
        judge=      (1000,                                  0, "samples for Frechet's distance, "
                     "precision, recall and sharpness"),
        shrink=     (1.0,                                   0, "factor on N(E(x)) before G; the "
                     "author's code reconstructs with 0.8 or 0.9"),
        sample_only=(0,                                     0, "only draw as many, from ckpt.pt"),
    )
    return read_flags("o_gan", __doc__.partition("\n")[0], argv, experiment, others)


# ---- plumbing: the same text in every script that needs it ----

# === shared: setup ===
RANK, LOCAL_RANK, RANKS = (int(os.environ.get(name, default)) for name, default in
                           (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))  # by torchrun
STOP: list[BaseException] = []  # why training has to save and end: a signal, a log that is gone


class UserError(Exception):
    """Wrong input, alike on all ranks: one line that says what to do; exit code 2."""


def setup(args: argparse.Namespace) -> torch.device:
    """The device that --gpu asks for, and the process group of torchrun. Raises UserError."""
    if args.batch_size % RANKS:
        raise UserError(f"--batch-size {args.batch_size}: {RANKS} processes cannot share it evenly")
    torch.set_flush_denormal(True)  # numbers below 1e-38 are 0: they slow a CPU down to a third
    if args.gpu:
        wanted, there = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        if there < wanted:
            raise UserError(f"--gpu: {there} of {wanted} CUDA devices found; leave --gpu out to "
                            "run on the CPU")
        torch.cuda.set_device(LOCAL_RANK)
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = not args.fp32
        torch.set_float32_matmul_precision("highest" if args.fp32 else "high")
    if RANKS > 1:
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if args.gpu else "gloo")
    return torch.device(f"cuda:{LOCAL_RANK}" if args.gpu else "cpu")


def autocast(args: argparse.Namespace) -> torch.autocast:
    """Inside, networks on a GPU compute in bfloat16, unless --fp32."""
    return torch.autocast("cuda" if args.gpu else "cpu", torch.bfloat16,
                          enabled=args.gpu and not args.fp32)


def mine(rows: Tensor) -> Tensor:
    """This rank's slice of a tensor for the whole global batch."""
    return rows.chunk(RANKS)[RANK]


def generator(device: torch.device | str, *key: int) -> torch.Generator:
    """Random numbers that depend on `key` alone, say (seed, step), not on what was drawn before."""
    mixed = np.random.SeedSequence((len(key), *key))  # or (0,) and (0, 0) would be one stream
    return torch.Generator(device).manual_seed(int(mixed.generate_state(1, np.uint64)[0]))


def tell(stream: str, text: str, end: str = "\n") -> None:
    """Prints on sys.stdout or sys.stderr; if nobody listens any more, no run is lost for it."""
    try:
        print(text, end=end, file=getattr(sys, stream), flush=True)
    except OSError:
        setattr(sys, stream, open(os.devnull, "w"))


def say(text: str, live: bool = False) -> None:
    """Prints a line, on rank 0; on a terminal the next one takes the place of a `live` one."""
    terminal = sys.stdout.isatty()
    text = re.sub("[\0-\x08\x0b-\x1f\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", text)  # it would obey
    if not RANK:
        tell("stdout", "\r\033[K" * terminal + text, "" if live and terminal else "\n")


@contextmanager
def on_signals(act: Callable) -> Iterator[None]:
    """Inside, SIGINT, SIGTERM and SIGHUP do `act`; one that is ignored, as by nohup, stays so."""
    kinds = [getattr(signal, k) for k in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, k)]
    before = {k: signal.getsignal(k) for k in kinds if signal.getsignal(k) != signal.SIG_IGN}
    try:
        for kind in before:
            signal.signal(kind, act)
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def run(body: Callable, args: argparse.Namespace, check: Callable) -> int:
    """The exit code of body(args, device, state), once `check` has passed the flags: what stops it
    becomes one line, and 2 for wrong input, 1 for a failure, 130 if interrupted."""
    sys.stdout = sys.stdout or open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):
            stream.reconfigure(errors="replace")  # a terminal may not spell every sample
    try:
        with on_signals(signal.default_int_handler):
            device = setup(args)
            state = resume_run(args) if args.resume else None
            check(args)
            body(args, device, state)
        return 0
    except (KeyboardInterrupt, UserError, OSError, FloatingPointError, MemoryError,
            RuntimeError) as error:
        line = str(error).partition("\n")[0] or f"{type(error).__name__}, --data {args.data}"
        lost = RANKS > 1 and re.search("gloo|NCCL|onnection", line)  # its own rank says why
        scarce = re.search("allocate|memory|overflow", line)
        if isinstance(error, RuntimeError) and not (lost or scarce):
            raise
        if isinstance(error, KeyboardInterrupt):
            saved = args.own and (Path(args.out) / "ckpt.pt").exists()
            free = sorted(args.given - {*args.config, "out", "resume"})  # no checkpoint has them
            again = f"; say --{', --'.join(free).replace('_', '-')} again" * bool(free)
            line = "interrupted" + f"; saved, --out {args.out} --resume goes on{again}" * saved
        alike = KeyboardInterrupt, UserError, FloatingPointError  # on all ranks
        if not (RANK and (lost or isinstance(error, alike))):
            tell("stderr", "\n" * sys.stdout.isatty() + f"{args.script}.py: {line}")
        wrong = UserError, PermissionError, NotADirectoryError
        return 130 if isinstance(error, KeyboardInterrupt) else 2 if isinstance(error, wrong) else 1
    finally:
        if torch.distributed.is_initialized():
            gc.collect()  # the cycles of DDP keep the group alive: its threads would abort exit
            torch.distributed.destroy_process_group()
# === end shared ===


# === shared: ranks ===
class Total(torch.autograd.Function):
    """The sum of a tensor over all ranks; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        total = x.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return Total.forward(ctx, grad)


class BatchNorm(nn.BatchNorm2d):
    """nn.BatchNorm2d whose moments are those of the whole global batch, on the CPU too."""

    def forward(self, x: Tensor) -> Tensor:
        if RANKS == 1 or not self.training:
            return super().forward(x)
        h, n = x.to(self.running_mean.dtype), RANKS * x.numel() // x.shape[1]
        mean = Total.apply(h.sum((0, 2, 3))) / n
        h = h - mean[:, None, None]
        var = Total.apply(h.square().sum((0, 2, 3))) / n
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
            self.num_batches_tracked += 1
        h = h * (var + self.eps).rsqrt()[:, None, None]
        if self.affine:
            h = h * self.weight[:, None, None] + self.bias[:, None, None]
        return h.to(x.dtype)


def average(grads: list[Tensor]) -> None:
    """Over all ranks, in one all-reduce: autograd.grad goes past DistributedDataParallel."""
    if RANKS == 1:
        return
    flat = torch.cat([grad.flatten() for grad in grads]) / RANKS
    torch.distributed.all_reduce(flat)
    for grad, part in zip(grads, flat.split([grad.numel() for grad in grads])):
        grad.copy_(part.view(grad.shape))
# === end shared ===


# === shared: ema ===
def floats(net: nn.Module) -> list[Tensor]:
    """The parameters of `net`, and those of its buffers that are no counters."""
    return [*net.parameters(), *(b for b in net.buffers() if b.is_floating_point())]


@torch.no_grad()
def update_ema(ema: list[Tensor], live: list[Tensor], step: int, decay: float) -> None:
    """ema <- d ema + (1 - d) live, d = decay after a warm-up, so early samples are readable."""
    d = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(ema, live, 1 - d)
# === end shared ===


# === shared: order ===
@functools.lru_cache(maxsize=2)
def epoch_order(total: int, seed: int, epoch: int, device: torch.device) -> Tensor:
    """The permutation of (seed, epoch), int64 (total,)."""
    return torch.randperm(total, generator=generator("cpu", seed, epoch, 9)).to(device)


def batch_rows(total: int, step: int, batch: int, seed: int, device: torch.device) -> Tensor:
    """Rows of step `step` = 0, 1, ...: the permutations of (seed, epoch) one after another, cut."""
    epoch, first = divmod(step * batch, total)
    epochs = range(epoch, epoch + (first + batch - 1) // total + 1)
    return torch.cat([epoch_order(total, seed, k, device) for k in epochs])[first:first + batch]
# === end shared ===


# === shared: download ===
def download(name: str, urls: list[str], digest: str, cache: str) -> Path:
    """The file `name` in `cache`, fetched once, by rank 0, from the first of `urls` that answers.

    digest: how its SHA-256 begins. Torch gives the file its name only when that agrees: half a
    download never passes for a whole one. Raises UserError; OSError for a disk full or shut.
    """
    path = Path(cache).expanduser() / name
    if RANK:
        torch.distributed.barrier()
    path.parent.mkdir(parents=True, exist_ok=True)
    for url in urls:
        try:
            if not path.exists():
                torch.hub.download_url_to_file(url, str(path), hash_prefix=digest)
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EACCES, errno.EROFS):
                raise
            print(f"{url}: {error}", file=sys.stderr)
    if RANKS > 1 and not RANK:
        torch.distributed.barrier()
    if not path.exists():
        raise UserError(f"cannot download {name}: put the file from {urls[0]} at {path}")
    if not hashlib.sha256(path.read_bytes()).hexdigest().startswith(digest):
        raise UserError(f"{path}: damaged, its SHA-256 does not begin with {digest}; delete it")
    return path
# === end shared ===


# === shared: flags ===
def whole_numbers(text: str) -> tuple[int, ...]:
    """Reads 1,2,2 as (1, 2, 2)."""
    return tuple(int(part) for part in text.split(",") if part)


def shown(value) -> str:
    """A flag's value as one types it."""
    return ",".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def read_flags(script: str, title: str, argv: list[str] | None, experiment: dict,
               others: dict) -> argparse.Namespace:
    """The flags of two tables, and those that all scripts share; a wrong one ends in a line, 2.

    A row: the defaults on the CPU, with --gpu, with --paper (the last one stands for the rest),
    the least number or the words allowed, the meaning. A flag reads what its default is. --resume
    takes `experiment`, args.config, from the checkpoint; args.given are those given by hand.
    """
    others = others | dict(
        gpu=(False, None, "use CUDA, or stop if there is none; has its own defaults"),
        out=(f"out/{script}", None, "where all is written; if it is taken, OUT.1, OUT.2, ..."),
        resume=(False, None, "go on from ckpt.pt in OUT; without --out in the newest of them"),
        cache=("~/.cache/kexue", None, "where downloads are kept"),
        fp32=(False, None, "with --gpu: neither bfloat16 nor TF32"),
        compile=(False, None, "torch.compile the network"))
    rows = experiment | others
    p = argparse.ArgumentParser(f"{script}.py", "%(prog)s [--flag VALUE ...]", title,
                                allow_abbrev=False)
    kept = p.add_argument_group("the experiment, which --resume takes from the checkpoint")
    free = p.add_argument_group("this run")
    reads = {tuple: (whole_numbers, "N,N"), int: (int, "N"), float: (float, "X")}
    for name, (*defaults, allowed, meaning) in rows.items():
        said = [f"{where}{shown(v)}" for where, v in zip(("", "--gpu ", "--paper "), defaults)]
        kind = type(defaults[0])
        reader, metavar = reads.get(kind, (str, "TEXT"))
        how = dict(action=argparse.BooleanOptionalAction if any(defaults) else "store_true") \
            if kind is bool else dict(choices=allowed) if isinstance(allowed, tuple) else \
            dict(type=reader, metavar=metavar, nargs="+" if kind is list else None)
        (kept if name in experiment else free).add_argument(
            f"--{name.replace('_', '-')}", default=argparse.SUPPRESS,
            help=f"{meaning} (default: {'; '.join(said)})", **how)
    args = p.parse_args(argv)
    args.given, args.config = set(vars(args)), list(experiment)
    args.script, args.own = script, False
    column = 2 if "paper" in args.given else 1 if "gpu" in args.given else 0
    for name, (*defaults, allowed, _) in rows.items():
        value = vars(args).setdefault(name, defaults[min(column, len(defaults) - 1)])
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(allowed, (int, float)) and not allowed <= number < 2**62:
                p.error(f"--{name.replace('_', '-')} {shown(value)}: from {allowed} to 2**62")
    args.resume |= bool(vars(args).get("sample_only"))  # which needs the checkpoint
    return args
# === end shared ===


# === shared: checkpoint ===
def put(path: Path, body: bytes) -> None:
    """Writes a whole file beside `path`, then renames it: an interrupted save harms nothing."""
    part = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)  # somebody may have deleted it
        part.write_bytes(body)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def make_room(args: argparse.Namespace) -> None:
    """A folder of this run's own: OUT, or OUT.1, OUT.2, ... if taken; goes into args.out."""
    out, k = Path(args.out), itertools.count(1)
    if not out.name.strip("."):
        raise UserError(f"--out {args.out}: name a folder of the run's own")
    while not (RANK or args.own):
        try:
            Path(args.out).mkdir(parents=True)
            args.own = True
        except FileExistsError:
            args.out = f"{out}.{next(k)}"


def save_checkpoint(args: argparse.Namespace, step: int, parts: dict, **more) -> None:
    """Writes OUT/ckpt.pt: the flags, the step, the state of each of `parts`, and `more`.

    Raises FloatingPointError if a weight is no longer finite: the older file stays.
    """
    path, nets = Path(args.out) / "ckpt.pt", [v for v in parts.values() if isinstance(v, nn.Module)]
    if not torch.stack([p.isfinite().all() for net in nets for p in net.parameters()]).all():
        raise FloatingPointError(f"a weight is no longer finite; {path}, if there, is from before")
    if not RANK:
        config, buffer = {name: getattr(args, name) for name in args.config}, io.BytesIO()
        states = {name: part.state_dict() for name, part in parts.items()}
        torch.save(dict(script=args.script, step=step, config=config, **more) | states, buffer)
        put(path, buffer.getbuffer())


def newest(args: argparse.Namespace, name: str) -> Path:
    """The file `name` in OUT; without --out, the newest in OUT, OUT.1, ... Raises UserError."""
    out = Path(args.out)
    places = [out] if "out" in args.given else [out, *out.parent.glob(f"{out.name}.[0-9]*")]
    files = [place / name for place in places if (place / name).is_file()]
    if not files:
        raise UserError(f"{out / name}: no such file; --out names a run's folder, no file in it")
    return max(files, key=lambda file: file.stat().st_mtime)


class State(dict):
    """What is in a checkpoint; to ask for what is not raises UserError."""

    def __missing__(self, name: str):
        raise UserError(f"ckpt.pt: has no {name}; it is damaged, or of another version")


def resume_run(args: argparse.Namespace) -> dict:
    """The checkpoint to go on from, on the CPU; its flags go into args, and its folder.

    Raises UserError for any file but a whole one of this script, and if a flag given by hand
    contradicts it; only --steps may be more, and --data or --bert lie elsewhere.
    """
    path = newest(args, "ckpt.pt")
    args.out, args.own = str(path.parent), True
    try:
        file = zipfile.ZipFile(path)  # torch looks neither at checksums nor at attributes, and a
        if file.testzip() or any(item.external_attr for item in file.infolist()):  # "folder" is
            raise ValueError  # memory as it happens to be
        state = torch.load(path, map_location="cpu", weights_only=True)
        config = {name: state["config"][name] for name in args.config}
        kinds = [(state["script"], args.script), (state["step"], args.steps)]
        kinds += [(value, getattr(args, name)) for name, value in config.items()]
        if state["script"] != args.script or any(type(a) is not type(b) for a, b in kinds):
            raise ValueError
    except Exception:  # torch raises a dozen kinds
        raise UserError(f"{path}: not a checkpoint of this {args.script}.py, or damaged") from None
    for name, old in config.items():
        new = vars(args)[name] if name in args.given else old
        if new != old and name not in ("steps", "data", "bert"):
            raise UserError(f"--{name.replace('_', '-')} {shown(new)}: the checkpoint has "
                            f"{shown(old)}; leave the flag out, or begin anew")
        setattr(args, name, new)
    if state["step"] > args.steps:
        raise UserError(f"--steps {args.steps}: the checkpoint has {state['step']} already")
    return State(state)


def restore(state: dict | None, parts: dict) -> int:
    """Puts the checkpoint's state into `parts`, name by name; the step to go on from, or 0."""
    for name, part in parts.items() if state else ():
        try:
            part.load_state_dict(state[name])
            for p, moments in getattr(part, "state", {}).items():  # an optimiser does not look
                if any(m.shape not in ((), p.shape) for m in moments.values()):
                    raise ValueError
        except Exception:  # torch raises half a dozen kinds
            raise UserError(f"ckpt.pt: its {name} is damaged, or does not fit the flags") from None
    return state["step"] if state else 0


def write_metrics(args: argparse.Namespace, metrics: dict) -> None:
    """Writes OUT/metrics.json, where what is not finite is null, and says where all is."""
    finite = json.loads(json.dumps(metrics), parse_constant=lambda _: None)
    put(Path(args.out) / "metrics.json", (json.dumps(finite, indent=1) + "\n").encode())
    say(f"all of it is in {args.out}/")
# === end shared ===


# === shared: progress ===
def training(args: argparse.Namespace, first: int, save: Callable) -> Iterator[int]:
    """The steps first, ..., args.steps - 1. Calls save(step, end) every args.save_every of them and
    at the end. A signal ends them early, on all ranks alike, and is raised once that is saved; a
    second one at once."""
    told = []

    def note(*_) -> None:
        told.append(time.monotonic())
        STOP.append(KeyboardInterrupt())
        if told[-1] > told[0] + 1:  # torchrun hands one Ctrl-C on a second time
            raise KeyboardInterrupt

    STOP.clear()
    with on_signals(note):
        for step in itertools.count(first):
            stop = torch.tensor(float(bool(STOP)))  # a copy: a signal may come at any moment
            if RANKS > 1:
                torch.distributed.all_reduce(stop)
            end = step >= args.steps or bool(stop)
            if end or step > first and step % args.save_every == 0:
                save(step, end)
            if end:
                break
            yield step
    if stop or STOP:
        raise STOP[0] if STOP else KeyboardInterrupt


def watch(items: Iterable, total: int, what: str) -> Iterator:
    """The items, and every few seconds a line on how many of `total` are done."""
    begin = then = time.perf_counter()
    for k, item in enumerate(items):
        now = time.perf_counter()
        if k and now - then > (0.5 if sys.stdout.isatty() else 10):
            eta = timedelta(seconds=int((total - k) * (now - begin) / k))
            say(f"{what} {k}/{total}  eta {eta}", live=True)
            then = now
        yield item


class Progress:
    """A line every few seconds, rewritten in place on a terminal, and a row in OUT/log.csv."""

    def __init__(self, args: argparse.Namespace, step: int, parameters: int, items: int, unit: str):
        """items: of `unit`, seen in a step. Begins with what runs, where and how."""
        self.log, self.steps = Path(args.out) / "log.csv", args.steps
        self.items, self.unit = items, unit
        self.first, self.shown, self.sums = step, step, {}
        self.begin = self.then = time.perf_counter()
        where = torch.cuda.get_device_name() if args.gpu else \
            f"CPU, {torch.get_num_threads()} threads"
        how = "bfloat16 and TF32" if args.gpu and not args.fp32 else "float32"
        say(f"{' '.join(sys.argv)}\n{where} x {RANKS}, torch {torch.__version__}, {how}"
            f"{', compiled' * args.compile}, {parameters:,} parameters, all goes to {args.out}/")
        if not RANK and self.log.exists():  # rows after the checkpoint will be made again
            rows = [row for row in self.log.read_text().splitlines(True) if row[-1] == "\n"]
            rows[1:] = [row for row in rows[1:] if float(row.partition(",")[0]) <= step]
            put(self.log, "".join(rows).encode())

    def add(self, step: int, **values: Tensor | float) -> None:
        """Takes a step's values; shows their means at first, at last, and every few seconds.

        Raises FloatingPointError if one is not finite. A log that cannot be written stops the run.
        """
        for name, value in values.items():  # no item(): that would wait for the GPU
            self.sums[name] = self.sums.get(name, 0) + value
        now, wait = time.perf_counter(), 0.5 if sys.stdout.isatty() else 10
        if RANK or now - self.then < wait and step not in (self.first + 1, self.steps):
            return
        count, elapsed = step - self.shown, now - self.begin
        row = dict(step=step, items=step * self.items, rate=count * self.items / (now - self.then),
                   elapsed=elapsed, **{k: float(v) / count for k, v in self.sums.items()})
        self.shown, self.then, self.sums = step, now, {}
        eta = (self.steps - step) * elapsed / (step - self.first)
        said = "".join(f"{name} {row[name]:.4g}  " for name in values)
        bar = f"[{'#' * (20 * step // self.steps):20}] " * sys.stdout.isatty()
        say(f"{bar}step {step}/{self.steps}  {said}{row['rate']:.0f} {self.unit}/s  elapsed "
            f"{timedelta(seconds=int(elapsed))}  eta {timedelta(seconds=int(eta))}",
            live=step < self.steps)
        if not all(map(math.isfinite, row.values())):
            raise FloatingPointError(f"step {step}: {said} ckpt.pt, if there, is from before")
        try:
            with open(self.log, "a") as file:
                if not file.tell():
                    print(*row, sep=",", file=file)
                print(*row.values(), sep=",", file=file)
        except OSError as error:
            STOP.append(error)  # so that the loop saves first
# === end shared ===


# === shared: pictures ===
def to_uint8(x: Tensor) -> Tensor:
    """[-1, 1] -> 0..255 uint8, the inverse of to_float; what lies outside is clipped."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_float(x: Tensor) -> Tensor:
    """0..255 uint8 -> [-1, 1] float32."""
    return x.float() / 127.5 - 1


def nearest(x: Tensor, train: Tensor) -> Tensor:
    """The item of `train` (N, ...) nearest to each of x, Euclidean distance; say uint8 pictures."""
    exact, flat = "donot_use_mm_for_euclid_dist", x.flatten(1).float()  # TF32 would take others
    rows = max(1, 2**24 // flat[0].numel())  # so that memory stays small
    far = [torch.cdist(flat, piece.flatten(1).float(), compute_mode=exact)
           for piece in train.split(rows)]
    return train[torch.cat(far, 1).argmin(1)]
# === end shared ===


# === shared: png ===
def grid(images: Tensor, columns: int) -> Tensor:
    """uint8 (N, C, H, W) -> (C, H', W'): rows of `columns`, white lines between, small enlarged."""
    scale = max(1, 96 // max(images.shape[2:]))
    sheet = F.pad(images, (0, 1, 0, 1, 0, 0, 0, -len(images) % columns), value=255)
    sheet = sheet.unflatten(0, (-1, columns)).permute(2, 0, 3, 1, 4)  # (C, rows, H, columns, W)
    sheet = sheet.flatten(3).flatten(1, 2)[:, :-1, :-1]
    return sheet.repeat_interleave(scale, 1).repeat_interleave(scale, 2)


def write_png(path: Path, image: Tensor) -> None:
    """Writes uint8 (C, H, W), C = 1 grey or 3 RGB. Raises ValueError for another C."""
    c, h, w = image.shape
    if c not in (1, 3):
        raise ValueError(f"{c} channels: a PNG here has 1 or 3")
    head = struct.pack(">2I5B", w, h, 8, c - 1, 0, 0, 0)  # kind 0 is grey, 2 is RGB
    lines = F.pad(image.cpu().permute(1, 2, 0).reshape(h, c * w), (1, 0))  # each begins: filter 0
    png = b"\x89PNG\r\n\x1a\n"
    for kind, body in ((b"IHDR", head), (b"IDAT", zlib.compress(lines.numpy())), (b"IEND", b"")):
        png += struct.pack(">I", len(body)) + kind + body
        png += struct.pack(">I", zlib.crc32(kind + body))
    path.write_bytes(png)
# === end shared ===


# === shared: images ===
IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte",
       "t10k-labels-idx1-ubyte")
NAMED = {  # where to get it, and how the SHA-256 of its four files begins, as torch.hub has it
    "mnist": (["https://ossci-datasets.s3.amazonaws.com/mnist/",
               "https://storage.googleapis.com/cvdf-datasets/mnist/"],
              "440fcabf 3552534a 8d422c7b f7ae60f9".split()),
    "fashion-mnist": (["http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"],
                      "3aede38d a04f1713 346e55b9 67da17c7".split())}
CIFAR10 = ("cifar-10-binary.tar.gz", ["https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"],
           "c4a38c50")
PICTURES = ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"
Images = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def load_images(args: argparse.Namespace, state: dict | None, device: torch.device) -> Images:
    """Training and held-out pictures, uint8 (N, C, H, W) on the device; the labels of each or None.

    args.data: faces, mnist, fashion-mnist, cifar10, a folder of idx files or pictures, CIFAR-10's
    binary .tar.gz, or an .npy, uint8 (N, H, W) or (N, H, W, C). args.size: of faces, pictures.
    Held out: a data set's own test part, or the last tenth. Raises UserError for anything else, and
    for other pictures than those (N, C, H, W) that the checkpoint `state` was made on.
    """
    data = args.data
    path = download(*CIFAR10, args.cache) if data == "cifar10" else Path(data).expanduser()
    if data in NAMED:
        for name, digest in zip(IDX, NAMED[data][1]):
            urls = [f"{url}{name}.gz" for url in NAMED[data][0]]
            path = download(f"{data}/{name}.gz", urls, digest, args.cache).parent
    if not data or data not in ("faces", *NAMED) and not path.exists():
        raise UserError(f"--data {data}: no such file or folder, nor one of the names faces, "
                        f"cifar10, {', '.join(NAMED)}")
    try:
        idx = {p.name.removesuffix(".gz").replace(".idx", "-idx"): p for p in path.glob("*ubyte*")}
        if data == "faces":
            parts = draw_faces(50_000, args.size)
        elif path.name.lower().endswith((".tar.gz", ".tgz")):
            parts = read_cifar10(path)
        elif IDX[0] in idx:
            parts = [read_idx(idx[name]) if name in idx else None for name in IDX]
        elif path.suffix.lower() == ".npy":
            parts = [np.array(np.lib.format.open_memmap(path, mode="r"))]
        else:
            parts = [read_pictures(path, args.size)]
        x, y, x_test, y_test = *parts, *[None] * (4 - len(parts))
        x, x_test = (v if v is None else as_pictures(v) for v in (x, x_test))
        if x_test is None and len(x) < 2:
            raise ValueError("two pictures at least, the last tenth is held out")
        if x_test is None:
            cut = len(x) - max(1, len(x) // 10)
            x, x_test, y, y_test = x[:cut], x[cut:], *((y, y) if y is None else (y[:cut], y[cut:]))
        y, y_test = (v if v is None else torch.as_tensor(v) for v in (y, y_test))
        labels = [v if v is None else len(v) for v in (y, y_test)]
        if x.shape[1:] != x_test.shape[1:] or labels not in ([None] * 2, [len(x), len(x_test)]):
            raise ValueError("training and held-out pictures differ in size, or labels lack")
    except Exception as error:  # numpy, gzip, tarfile and Pillow raise two dozen kinds
        if isinstance(error, (UserError, MemoryError)) or "allocate" in str(error):
            raise
        raise UserError(f"--data {data}: damaged, or not what it seems to be: "
                        f"{str(error) or type(error).__name__}") from None
    if "size" in args.given and x.shape[-1] != args.size:
        raise UserError(f"--size {args.size}: these pictures have {x.shape[-1]} px, and only faces "
                        "and folders of pictures come in any size")
    if state and state["shape"] != tuple(x.shape):
        raise UserError(f"--data {data}: {tuple(x.shape)}, but the checkpoint was made on pictures "
                        f"{state['shape']}")
    say(f"{data}: {len(x):,} pictures {tuple(x.shape[1:])} to train on, {len(x_test):,} held out")
    x, x_test = x.to(device).contiguous(), x_test.to(device).contiguous()
    return x, x_test, *(y if y is None else y.to(device) for y in (y, y_test))


def as_pictures(a: np.ndarray | Tensor) -> Tensor:
    """uint8 (N, H, W) or (N, H, W, 1 or 3) -> (N, C, H, W). Raises ValueError for anything else."""
    shape = (*a.shape, 1) if a.ndim == 3 else a.shape
    one_picture = a.ndim == 3 and shape[2] in (1, 3)
    if not str(a.dtype).endswith("uint8") or len(shape) != 4 or shape[3] not in (1, 3) \
            or 0 in shape or one_picture:
        raise ValueError(f"{a.dtype} {tuple(a.shape)}; uint8 (N, H, W) or (N, H, W, 1 or 3) goes")
    return torch.as_tensor(a).reshape(shape).permute(0, 3, 1, 2)


def read_idx(path: Path) -> np.ndarray:
    """The bytes of an idx or idx.gz file, in its shape. Raises ValueError, or as gzip does."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        head = file.read(4)
        shape = np.frombuffer(file.read(4 * head[3]), ">u4").tolist()
        body = bytearray(file.read(math.prod(shape)))
        if head[:3] != b"\0\0\x08" or len(body) < math.prod(shape) or file.read(1) \
                or f"idx{len(shape)}" not in path.name:
            raise ValueError(f"{path} is no whole idx file of bytes")
    return np.frombuffer(body, np.uint8).reshape(shape)


def read_cifar10(path: Path) -> list[np.ndarray]:
    """CIFAR-10's binary archive, member by member, nothing extracted: x, y, x_test, y_test."""
    with tarfile.open(path, "r:gz") as tar:
        rows = {Path(m.name).name: np.frombuffer(bytearray(tar.extractfile(m).read()), np.uint8)
                .reshape(-1, 3073) for m in tar if m.isfile() and m.name.endswith(".bin")
                and m.size <= 10_000 * 3073}
    train = np.concatenate([rows[f"data_batch_{k}.bin"] for k in range(1, 6)])
    return [part for a in (train, rows["test_batch.bin"]) for part in
            (a[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), a[:, 0])]


def read_pictures(folder: Path, size: int) -> np.ndarray:
    """The pictures below `folder`, by name, the middle square resized: uint8 (N, H, W) or RGB.

    16 bits become 8, what is transparent white. A run's own folder, with its log.csv, is no data.
    """
    files, total, seen = [], 0, set()
    for here, inner, names in os.walk(folder, followlinks=True):
        if os.path.realpath(here) in seen or "log.csv" in names:
            inner.clear()
            continue
        seen.add(os.path.realpath(here))  # links may lead round in a circle
        total += len(names)
        files += [Path(here, name) for name in names if name.lower().endswith(PICTURES)]
    if not files:
        raise ValueError("neither .npy nor .tar.gz, nor a folder with train-images-idx3-ubyte or "
                         f"{' '.join(PICTURES)}")
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise UserError("a folder of pictures is read by Pillow: pip install pillow") from None

    def read(file: Path) -> np.ndarray | None:
        try:
            picture = ImageOps.exif_transpose(Image.open(file))
            if picture.mode[0] in "IF":  # more than 8 bits a pixel
                grey = np.asarray(picture)
                if grey.dtype.kind not in "iu" or not 0 <= grey.min() <= grey.max() < 2**16:
                    raise ValueError("neither 8 nor 16 bits a pixel")
                picture = Image.fromarray((grey >> 8).astype(np.uint8))
            if picture.mode.endswith(("A", "a")) or "transparency" in picture.info:
                white = Image.new("RGBA", picture.size, "white")
                picture = Image.alpha_composite(white, picture.convert("RGBA"))
            picture = ImageOps.fit(picture.convert("RGB"), (size, size), Image.Resampling.LANCZOS)
            return np.asarray(picture)
        except Exception as error:  # one bad file, whatever Pillow says of it, costs no folder
            say(f"{file}: left out, damaged: {error}")

    with ThreadPoolExecutor() as pool:
        x = [picture for picture in pool.map(read, sorted(files)) if picture is not None]
    if not x:
        raise ValueError("none of its pictures can be read")
    if len(x) < total:
        say(f"{total - len(x)} of {total} files are damaged, or none of {' '.join(PICTURES)}")
    x = np.stack(x)
    return x[..., 0] if (x == x[..., :1]).all() else x


def draw_faces(count: int, size: int) -> tuple[Tensor, Tensor]:
    """Drawn faces, uint8 (count, size, size, 3), and their attributes in [0, 1], (count, 6):
    skin, hair, tilt, gaze, smile, width; uniform, from a seed of their own, on the CPU."""
    attributes = torch.rand(count, 6, generator=generator("cpu", 0))
    pictures = torch.empty(count, 3, size, size, dtype=torch.uint8)
    light, dark, blond, black, sky, shirt, white, iris, red = torch.tensor([
        [.98, .83, .72], [.42, .26, .17], [.93, .80, .45], [.10, .07, .06], [.62, .74, .86],
        [.25, .35, .55], [1., 1., 1.], [.10, .15, .20], [.72, .22, .24]])[..., None, None]
    right = (torch.arange(size) + 0.5) * 2 / size - 1
    for rows, part in zip(pictures.split(256), attributes.split(256)):
        skin, hair, tilt, gaze, smile, width = part.T[..., None, None]  # (n, 1, 1) each
        face = torch.lerp(light, dark, skin[:, None])
        locks = torch.lerp(blond, black, hair[:, None])
        angle, wide = 0.6 * (tilt - 0.5), 0.46 + 0.16 * width
        u = right * angle.cos() + right[:, None] * angle.sin()  # the head's own axes
        v = right[:, None] * angle.cos() - right * angle.sin() - 0.08
        side = u.abs()
        picture = sky.repeat(len(part), 1, size, size)

        def paint(colour: Tensor, x: Tensor, y: Tensor, rx: Tensor | float, ry: float) -> None:
            """Blends in an ellipse about x = y = 0, each pixel by its share that is covered."""
            away = ((x / rx).square() + (y / ry).square()).sqrt_().sub_(1)
            pixels = torch.as_tensor(rx).clamp(max=ry) * size / 2
            picture.lerp_(colour, away.mul_(-pixels).add_(0.5).clamp_(0, 1)[:, None])

        paint(shirt, right.expand_as(u), right[:, None] - 1.15, 0.75, 0.42)
        paint(face * 0.88, u, v - 0.62, 0.20, 0.30)  # neck
        paint(locks, u, v + 0.16, wide + 0.16, 0.80)
        paint(face * 0.95, side - wide, v - 0.06, 0.10, 0.15)  # ears
        paint(face, u, v - 0.06, wide, 0.68)
        paint(locks, u, v + 0.66, wide + 0.05, 0.22)  # fringe
        paint(locks * 0.8, side - 0.24, v + 0.20, 0.15, 0.045)  # brows
        paint(white, side - 0.24, v + 0.03, 0.14, 0.11)
        paint(iris, u - 0.14 * (gaze - 0.5) - 0.24 * u.sign(), v + 0.03, 0.07, 0.09)
        paint(face * 0.78, u, v - 0.17, 0.07, 0.09)  # nose
        paint(red, u, v - 0.40 + (0.8 * smile - 0.3) * (2 * u.square() - 0.06), 0.27, 0.065)
        rows.copy_(picture.mul_(255).round_())
    return pictures.permute(0, 2, 3, 1), attributes
# === end shared ===


# === shared: judge ===
@torch.no_grad()
def judge(samples: Tensor, train: Tensor, held_out: Tensor, seed: int) -> dict[str, float | None]:
    """How near samples are to the data; `..._floor`: as many held-out pictures in their place.

    All uint8 (N, C, H, W). In the first 50 principal components of 10,000 training pictures, pixels
    in [-1, 1]: `frechet`, the distance of the two Gaussians (not FID, which needs a trained
    network); `precision`, samples that lie in a training picture's ball, and `recall`, the reverse
    (Kynkaanniemi et al. 2019: as many of each, balls to the third neighbour). `sharpness`: mean
    gradient over that of the training pictures. None where there are too few to tell.
    """
    g = generator("cpu", seed, 0, 10)
    real, floor = (x[torch.randperm(len(x), generator=g)[:most].to(x.device)]
                   for x, most in ((train, 10_000), (held_out, len(samples))))
    mean = sum(piece.sum(0) for piece in in_pieces(real)) / len(real)
    basis = torch.randn(len(mean), min(100, len(mean)), generator=g, dtype=mean.dtype).to(mean)
    for _ in range(8):  # subspace iteration: what lies beyond the 100th component fades away
        basis = torch.linalg.qr(sum((piece - mean).mT @ ((piece - mean) @ basis)
                                    for piece in in_pieces(real)))[0]

    def project(x: Tensor) -> Tensor:
        return torch.cat([(piece - mean) @ basis for piece in in_pieces(x)])

    var, turn = torch.linalg.eigh(torch.atleast_2d(project(real).mT.cov(correction=0)))
    basis, var = basis @ turn[:, -50:], var[-50:].clamp(min=0)
    near, steep, metrics = project(real[:len(samples)]), gradient(real), {}
    for x, name in ((samples, ""), (floor, "_floor")):
        y, enough = project(x), min(len(x), len(near)) > 3
        metrics |= {f"frechet{name}": frechet(y, var) if len(x) > 1 else None,
                    f"precision{name}": covered(y, near) if enough else None,
                    f"recall{name}": covered(near, y) if enough else None,
                    f"sharpness{name}": gradient(x) / steep if steep else None}
    return metrics


def in_pieces(x: Tensor) -> Iterator[Tensor]:
    """Pixels in [-1, 1], (n, CHW), float64, which TF32 leaves alone; so that memory stays small."""
    return (piece.flatten(1).double() / 127.5 - 1 for piece in x.split(256))


def frechet(y: Tensor, var: Tensor) -> float:
    """|m|^2 + tr(C + V - 2 (V^.5 C V^.5)^.5), from rows y with mean m, covariance C, to N(0, V)."""
    cov, root = torch.atleast_2d(y.mT.cov()), var.sqrt()
    cross = torch.linalg.eigvalsh(root[:, None] * cov * root).clamp(min=0).sqrt().sum()
    return (y.mean(0).square().sum() + cov.trace() + var.sum() - 2 * cross).item()


def covered(y: Tensor, by: Tensor) -> float:
    """The share of rows y in the ball of a row of `by` that reaches to its third neighbour."""
    radius = torch.cat([torch.cdist(piece, by).kthvalue(4).values for piece in by.split(256)])
    hits = [(torch.cdist(piece, by) <= radius).any(1) for piece in y.split(256)]
    return torch.cat(hits).double().mean().item()  # the fourth: each row is nearest to itself


def gradient(x: Tensor) -> float:
    """Mean absolute difference of neighbouring pixels, down and across."""
    sums = [piece.float().diff(dim=d).abs().mean((1, 2, 3)).sum()
            for piece in x.split(256) for d in (2, 3)]
    return torch.stack(sums).sum().item() / len(x)
# === end shared ===


# === shared: codes ===
@torch.no_grad()
def by_batches(f: Callable[..., Tensor], *rows: Tensor) -> Tensor:
    """f(rows), 256 of them at a time."""
    return torch.cat([f(*batch) for batch in zip(*(each.split(256) for each in rows))])


def codes_of(E: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """E of uint8 pictures, (N, n_z)."""
    return by_batches(lambda x: E(to_float(x)), x)


def pictures_of(G: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """G of codes, uint8 (N, C, H, W)."""
    return by_batches(lambda z: to_uint8(G(z)), z)


def evenly(rows: Tensor | None, most: int) -> Tensor | None:
    """At most so many rows, from first to last: what is sorted stays mixed."""
    return None if rows is None else rows[::-(-len(rows) // most)]


def draw_figures(G: Callable[[Tensor], Tensor], E: Callable[[Tensor], Tensor], x: Tensor,
                 x_test: Tensor, out: Path) -> None:
    """Three figures of held-out pictures x_test, uint8 as x, those trained on.

    reconstructions.png: each, and beside it what G makes of its code. interpolation.png: in each
    row from one to another, G on the straight line between their codes. nearest.png: below each the
    three of x whose codes are nearest to its own.
    """
    few = x_test[:32]
    z, known = codes_of(E, few), codes_of(E, x)
    beside = torch.stack([few, pictures_of(G, z)], 1).flatten(0, 1)
    write_png(out / "reconstructions.png", grid(beside, 8))
    share, strip = torch.linspace(0, 1, 8, device=z.device)[:, None], []
    for k in range(0, min(12, len(few) - 1), 2):
        between = pictures_of(G, torch.lerp(z[k], z[k + 1], share))
        strip += [few[k:k + 1], between, few[k + 1:k + 2]]
    write_png(out / "interpolation.png", grid(torch.cat(strip or [few]), 10))
    order = torch.cdist(z[:12], known).argsort(1)[:, :3]
    write_png(out / "nearest.png", grid(torch.cat([few[:12], *x[order.T]]), len(order)))


def probes(codes: dict[str, tuple[Tensor, Tensor]], y: Tensor, y_test: Tensor) -> dict:
    """What is read off codes, each (of training, of held-out pictures), by a map fitted to y.

    probe_...: a linear map; R^2 of each attribute, or [accuracy]. knn_...: five neighbours.
    """
    found = {f"probe_{name}": linear_probe(z, y, z_test, y_test)
             for name, (z, z_test) in codes.items()}
    if not y.is_floating_point():
        found |= {f"knn_{name}": knn_accuracy(z, y, z_test, y_test)
                  for name, (z, z_test) in codes.items()}
    return found


def psnr(x: Tensor, y: Tensor) -> float:
    """Peak signal-to-noise ratio of uint8 pictures in dB, from the mean square over all of them."""
    squares = sum((a.double() - b.double()).square().sum().item()
                  for a, b in zip(x.split(256), y.split(256)))
    return 10 * math.log10(255 ** 2 * x.numel() / squares) if squares else math.inf


class Pca:
    """The first k principal components of uint8 pictures (N, C, H, W), of 10,000 of them if there
    are more; pixels in [-1, 1], float64."""

    def __init__(self, train: Tensor, k: int):
        x = train[::-(-len(train) // 10_000)]
        self.mean = sum(piece.sum(0) for piece in in_pieces(x)) / len(x)
        basis = next(in_pieces(x[:k + 10])).mT - self.mean[:, None]
        for _ in range(8):  # subspace iteration: what lies beyond component k + 10 fades away
            basis = torch.linalg.qr(basis)[0]
            basis = sum((piece - self.mean).mT @ ((piece - self.mean) @ basis)
                        for piece in in_pieces(x))
        self.basis = torch.linalg.svd(basis, full_matrices=False)[0][:, :k]  # (CHW, k)

    def encode(self, x: Tensor) -> Tensor:
        """uint8 (n, C, H, W) -> (n, k)."""
        return torch.cat([(piece - self.mean) @ self.basis for piece in in_pieces(x)])

    def decode(self, code: Tensor, shape: tuple[int, ...]) -> Tensor:
        """(n, k) -> uint8 (n, *shape); of fewer components too: with none, the mean picture."""
        basis = self.basis[:, :code.shape[1]]
        return to_uint8((self.mean + code @ basis.mT).unflatten(1, shape))


def linear_probe(x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor) -> list[float]:
    """How well a linear map tells y from the codes x (N, D), on the test part; float64.

    y real (N, A): least squares, the R^2 of each of the A. y whole numbers (N,): softmax
    regression, [accuracy]. Coordinates are divided by their deviation in x.
    """
    mean, std = x.double().mean(0), x.double().std(0, correction=0)
    x, x_test = (F.pad((v.double() - mean) / std.where(std > 0, 1), (0, 1), value=1)
                 for v in (x, x_test))  # the last column is constant
    if y.is_floating_point():
        weight = torch.linalg.lstsq(x.cpu(), y.double().cpu(), driver="gelsd")[0].to(x)
        error, spread = x_test @ weight - y_test, y_test.double() - y_test.double().mean(0)
        return (1 - error.square().sum(0) / spread.square().sum(0)).tolist()
    y, weight = y.long(), x.new_zeros(x.shape[1], int(y.max()) + 1, requires_grad=True)
    opt = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

    def cost() -> Tensor:
        opt.zero_grad()
        value = F.cross_entropy(x @ weight, y) + 1e-5 * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        opt.step(cost)
    return [((x_test @ weight).argmax(1) == y_test).double().mean().item()]


def knn_accuracy(x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor, k: int = 5) -> float:
    """The share of test codes whose label is the most frequent one among their k nearest of the
    codes x (N, D), Euclidean, float64; the least label in a tie. y whole numbers (N,)."""
    near = torch.cat([torch.cdist(piece, x.double()).topk(min(k, len(x)), largest=False).indices
                      for piece in x_test.double().split(256)])
    return (F.one_hot(y.long()[near]).sum(1).argmax(1) == y_test).double().mean().item()
# === end shared ===


# === shared: dcgan ===
def halvings(shape: tuple[int, ...], kernel: int) -> list[tuple[int, int]]:
    """Height and width at each level of the nets below: halved until one of them is at most 4."""
    sides = [shape[-2:]]
    while len(sides) == 1 or min(sides[-1]) > 4:
        sides.append(tuple((side + kernel % 2) // 2 for side in sides[-1]))
    return sides


class Head(nn.Linear):
    """A linear layer that autocast leaves in float32."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype))


class Encoder(nn.Module):
    """Pictures (B, C, H, W) -> (B, outputs): DCGAN's discriminator (Radford et al. 2015).

    shape is (C, H, W), of 2 px at least. Strided convolutions of width, 2 width, 4 width, ...
    channels, BatchNorm in all but the first, LeakyReLU; then a linear layer. kernel: 4 or 5. A
    bias that BatchNorm would take away is left out: Adam makes it walk, and averages limp behind.
    """

    def __init__(self, shape: tuple[int, ...], width: int, outputs: int, kernel: int = 4):
        super().__init__()
        sides, last, layers = halvings(shape, kernel), shape[0], []
        for level in range(len(sides) - 1):
            c = width * 2 ** level
            layers += [nn.Conv2d(last, c, kernel, 2, (kernel - 1) // 2, bias=not level),
                       BatchNorm(c) if level else nn.Identity(), nn.LeakyReLU(0.2)]
            last = c
        self.body = nn.Sequential(*layers)
        self.head = Head(last * math.prod(sides[-1]), outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).flatten(1))


class Generator(nn.Module):
    """Codes (B, inputs) -> pictures (B, C, H, W) in [-1, 1], float32: the Encoder's way back.

    A linear layer, then transposed convolutions, each after BatchNorm and ReLU; at last tanh.
    """

    def __init__(self, inputs: int, shape: tuple[int, ...], width: int, kernel: int = 4):
        super().__init__()
        sides, pad, layers = halvings(shape, kernel)[::-1], (kernel - 1) // 2, []
        last = width * 2 ** (len(sides) - 2)
        self.first = (last, *sides[0])
        self.head = Head(inputs, math.prod(self.first), bias=False)
        for level, (small, large) in enumerate(zip(sides, sides[1:]), start=2):
            c = last // 2 if level < len(sides) else shape[0]
            extra = [b - 2 * (a - 1) - kernel + 2 * pad for a, b in zip(small, large)]
            layers += [BatchNorm(last), nn.ReLU(),
                       nn.ConvTranspose2d(last, c, kernel, 2, pad, extra,
                                          bias=level == len(sides))]
            last = c
        self.body = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        h = self.head(z).unflatten(1, self.first).contiguous(memory_format=torch.channels_last)
        return self.body(h).to(z.dtype).tanh()


def started(net: nn.Module, std: float) -> nn.Module:
    """The net with normal weights of this deviation, or Glorot's uniform ones if it is 0; biases
    zero; BatchNorm as torch starts it."""
    for layer in net.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            nn.init.normal_(layer.weight, 0, std) if std else nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return net
# === end shared ===


# ---- main ----

def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    args = parse_args(argv)
    return run(sample_only if args.sample_only else train, args, check_flags)


if __name__ == "__main__":
    sys.exit(main())
