"""Memory of an update and of the report, by shapes alone: torch's fake tensors, counted while alive.

    python tests/experiments/transformer_vq_memory.py                          # what --gpu would take
    python tests/experiments/transformer_vq_memory.py --prefix cumsum          # with other flags
    python tests/experiments/transformer_vq_memory.py --paper --batch-size 16  # one of eight cards

GiB at the peak, weights included, Adam's two moments not. What a kernel takes inside is not seen, nor gaps
between tensors. An H100 had 10.1 (--prefix loop) and 19.3 (cumsum) while training.
"""

import sys
import weakref
from pathlib import Path
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parents[2]))
import transformer_vq as tvq  # noqa: E402


class Alive(TorchDispatchMode):
    """Bytes of all tensors that operations made and nobody has let go, now and at the peak."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self.known:
                storage = x.untyped_storage()
                self.known[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.gone, storage._cdata)
        return out

    def gone(self, key: int) -> None:
        self.now -= self.known.pop(key)


def main(argv: list[str]) -> dict[str, float]:
    """GiB at the peak: of an update that follows others, and of each way to read in the report."""
    args, found, states = tvq.parse_args(["--gpu", *argv]), {}, None
    cast = torch.autocast("cpu", torch.bfloat16, enabled=not args.fp32)
    with FakeTensorMode(), Alive() as alive:
        with mock.patch.object(torch.nn.Module, "to", lambda net, device: net):  # fake ones cannot move
            net = tvq.build(args, torch.device("cpu"))
        tokens = torch.zeros(args.batch_size, args.update_len + 1, dtype=torch.long)
        for _ in range(3):
            with cast:
                logits, states, commits, _ = net(tokens[:, :-1], states)
                value = tvq.loss(logits, tokens[:, 1:]).mean() + commits.sum()
            states = [[x.detach() for x in layer] for layer in states]
            value.backward()
            net.zero_grad()
        found["an update"] = alive.peak / 2**30
        del tokens, logits, states, commits, value
        net.eval()
        length = 4 * args.update_len * args.segments
        for name, way in net.ways().items():
            alive.peak = alive.now
            with cast:
                tvq.read_along(net, torch.zeros(length + 1, dtype=torch.uint8), length, way, args)
            found[f"the report, {name}"] = alive.peak / 2**30
    print("GiB: " + ", ".join(f"{what} {size:.2f}" for what, size in found.items()))
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
