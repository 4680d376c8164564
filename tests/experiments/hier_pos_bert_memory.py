"""What length costs: bytes that a step on masked tokens keeps for its gradient, by length, with the post's positions past n = 512.

    python tests/experiments/hier_pos_bert_memory.py [--lengths 512 1024 1536] [--n 512] [--layers 12] [--width 768] [--words 21128]

A BERT base, float32, on the CPU: every tensor that autograd saves is counted once, weights left out. How many texts 24 GB would
hold beside the weights, their gradient and Adam's two moments is computed from that, not tried.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import hier_pos_bert as hier  # noqa: E402


def saved(net: hier.Bert, length: int, words: int) -> int:
    """Bytes kept for the gradient of one text."""
    sizes: dict[int, int] = {}

    def note(x: torch.Tensor) -> torch.Tensor:
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x  # and so no address is used again
    vocab, g = {"words": range(words), "[MASK]": 103, "[CLS]": 101, "[SEP]": 102}, torch.Generator().manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        value = hier.masked_loss(net, torch.arange(2 * length) % words, length, 1, g, vocab, hier.parse_args([]))
    assert value.requires_grad
    for p in net.parameters():
        sizes.pop(p.untyped_storage().data_ptr(), 0)
    return sum(sizes.values())


def main(argv: list[str] | None = None) -> dict[int, int]:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False)
    p.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 1536])
    for name, value in dict(n=512, layers=12, width=768, words=21128).items():
        p.add_argument(f"--{name}", type=int, default=value)
    opt = p.parse_args(argv)
    net = hier.Bert(dict(
        vocab_size=opt.words, hidden_size=opt.width, num_hidden_layers=opt.layers, num_attention_heads=max(1, opt.width // 64),
        intermediate_size=4 * opt.width, max_position_embeddings=opt.n, type_vocab_size=2, layer_norm_eps=1e-12))
    net.bert["embeddings"].alpha = 0.4
    fixed, found = 16 * sum(p.numel() for p in net.parameters()), {}
    print(f"weights, gradient and moments: {fixed / 1e9:.2f} GB\n| tokens | MB kept for a text | texts in 24 GB |\n| --- | --- | --- |")
    for length in opt.lengths:
        found[length] = saved(net, length, opt.words)
        print(f"| {length} | {found[length] / 1e6:.0f} | {(24e9 - fixed) // found[length]:.0f} |", flush=True)
    return found


if __name__ == "__main__":
    main()
