"""Times the inner steps of a script, and of an installed peer in turn. Not collected by pytest.

    python tests/bench.py ddpm --peer diffusers --threads 2
    python tests/bench.py ddpm --gpu --compile

A line of JSON for each thing timed: the median of seconds over --repeats, the smallest and the largest,
items per second, peak memory, and with a peer the ratio of the medians (above 1: this project is faster).
The arms take turns, so that what else the machine does meets all alike. Peers are never installed here.
"""

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

# what is timed, how many items a call handles, and the arms: "ours" first, then the peer's
Case = tuple[str, int, dict[str, Callable[[], object]]]


def cases_ddpm(opt: argparse.Namespace) -> Iterator[Case]:
    """The --paper U-Net of 35.7M parameters: a training step with Adam and EMA, and a sampling step.

    Peer diffusers: UNet2DModel as google/ddpm-cifar10-32 configures it, in the same loop.
    """
    import copy

    import ddpm

    batch = opt.batch or (128 if opt.gpu else 16)
    device = torch.device("cuda" if opt.gpu else "cpu")
    s = {name: row.to(device) for name, row in ddpm.make_schedule(1000, "paper").items()}
    nets = {"ours": ddpm.UNet()}
    if opt.peer == "diffusers":
        from diffusers import UNet2DModel

        class Peer(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.net = UNet2DModel(
                    sample_size=32, in_channels=3, out_channels=3, layers_per_block=2,
                    block_out_channels=(128, 256, 256, 256), dropout=0.1,
                    down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
                    up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
                    attention_head_dim=None, downsample_padding=0, flip_sin_to_cos=False,
                    freq_shift=1, norm_eps=1e-6, norm_num_groups=32)

            def forward(self, x, t):
                return self.net(x, t).sample

        nets["diffusers"] = Peer()
    x0, eps = torch.randn(2, batch, 3, 32, 32, device=device)
    t = torch.randint(1, 1001, (batch,), device=device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=opt.gpu and not opt.fp32)

    def trainer(net: torch.nn.Module) -> Callable[[], object]:
        ema = list(copy.deepcopy(net).parameters())
        params = list(net.parameters())
        adam = torch.optim.Adam(params, lr=1e-4, fused=True)
        run = torch.compile(net) if opt.compile else net

        def step() -> None:
            net.train()
            with autocast:
                value = ddpm.loss(run, x0, t, eps, s).mean()
            value.backward()
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            adam.step()
            adam.zero_grad()
            with torch.no_grad():
                torch._foreach_lerp_(ema, params, 1e-4)
        return step

    def sampler(net: torch.nn.Module) -> Callable[[], object]:
        run = torch.compile(net) if opt.compile else net
        row = ddpm.sigmas(s, "beta")

        @torch.no_grad()
        def step() -> None:
            net.eval()
            with autocast:
                ddpm.step_back(x0, t, run(x0, t), row, eps, s)
        return step

    nets = {who: net.to(device) for who, net in nets.items()}
    print(json.dumps({who: sum(p.numel() for p in net.parameters()) for who, net in nets.items()}))
    yield "training step", batch, {who: trainer(net) for who, net in nets.items()}
    yield "sampling step", batch, {who: sampler(net) for who, net in nets.items()}


def measure(opt: argparse.Namespace, what: str, items: int, arms: dict[str, Callable[[], object]]) -> None:
    """Times the arms in turn and prints a line for each."""
    def once(call: Callable[[], object]) -> float:
        if opt.gpu:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        if opt.gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    seconds, peak = {who: [] for who in arms}, {}
    for call in arms.values():  # warm-up: compilation, autotuning, allocation
        once(call)
        once(call)
    for _ in range(opt.repeats):
        for who, call in arms.items():
            if opt.gpu:
                torch.cuda.reset_peak_memory_stats()
            seconds[who].append(once(call))
            peak[who] = torch.cuda.max_memory_allocated() >> 20 if opt.gpu else \
                resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10  # of the whole process
    median = {who: statistics.median(values) for who, values in seconds.items()}
    for who, values in seconds.items():
        line = dict(what=what, who=who, median_s=median[who], min_s=min(values), max_s=max(values),
                    per_second=items / median[who], peak_mib=peak[who])
        if who != "ours":
            line["ours_is_faster_by"] = median[who] / median["ours"]
        print(json.dumps({k: float(f"{v:.4g}") if isinstance(v, float) else v
                          for k, v in line.items()}), flush=True)


def main() -> None:
    cases = {name[6:]: f for name, f in globals().items() if name.startswith("cases_")}
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("script", choices=cases)
    p.add_argument("--peer", metavar="NAME", help="also time this installed package")
    p.add_argument("--gpu", action="store_true", help="on CUDA, in bfloat16 and TF32")
    p.add_argument("--fp32", action="store_true", help="with --gpu: neither bfloat16 nor TF32")
    p.add_argument("--compile", action="store_true", help="torch.compile the network")
    p.add_argument("--batch", type=int, help="items a call (default: the case's own)")
    p.add_argument("--repeats", type=int, default=7)
    p.add_argument("--threads", type=int, help="CPU threads (default: torch's own)")
    opt = p.parse_args()
    if opt.threads:
        torch.set_num_threads(opt.threads)
    if opt.gpu and not opt.fp32:
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    where = torch.cuda.get_device_name() if opt.gpu else f"CPU, {torch.get_num_threads()} threads"
    print(json.dumps(dict(command=" ".join(sys.argv), torch=str(torch.__version__), device=where)))
    for what, items, arms in cases[opt.script](opt):
        measure(opt, what, items, arms)


if __name__ == "__main__":
    main()
