"""Small classifiers of what a picture shows, to measure what the demo model draws with `cargo xtask eval`.

    python tools/train_demo/readers.py --scenes DIR --held-out DIR

Trains on drawn scenes (train.py's OUT/scenes and OUT/held_out), prints the accuracy on held-out ones, and writes
xtask/assets/readers.safetensors and xtask/assets/readers_golden.safetensors: the logits of the first held-out scenes, which
the Rust code must reproduce.
"""
import argparse
import json
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from captions import BACKGROUNDS, POSES, SPECIES
from common import learning_rate
from scenes import HELD_OUT_SEED, Scenes

PATTERNS = [None, "spots", "stripes", "patch"]
COLLARS = [None, "red", "blue", "green", "yellow", "pink", "white"]
HEADS = {"species": 4, "pose": 4, "background": 6, "pattern": 4, "collar": 7}
WIDTHS = [3, 16, 32, 64, 96]
GOLDEN = 6


def labels(scene):
    pattern = scene["pattern"] and scene["pattern"][1]
    return [SPECIES.index(scene["species"]), POSES.index(scene["pose"]), BACKGROUNDS.index(scene["background"]), PATTERNS.index(pattern), COLLARS.index(scene["collar"])]


class Readers(nn.Module):
    """One trunk of strided convolutions, 64 × 64 to 4 × 4; one linear layer a question."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(a, b, 3, 2, 1) for a, b in zip(WIDTHS, WIDTHS[1:])])
        self.norms = nn.ModuleList([nn.GroupNorm(8, b) for b in WIDTHS[1:]])
        self.heads = nn.ModuleDict({k: nn.Linear(WIDTHS[-1] * 16, n) for k, n in HEADS.items()})

    def forward(self, x):
        for conv, norm in zip(self.convs, self.norms):
            x = F.silu(norm(conv(x)))
        # Rows, columns, channels: the order that NHWC code flattens in.
        features = x.permute(0, 2, 3, 1).flatten(1)
        return {k: head(features) for k, head in self.heads.items()}


def soften(x):
    """What a decoder does to a picture: a little blur, a little noise, colours a little off; so that drawings and generations
    are read alike."""
    if random.random() < 0.5:
        small = F.interpolate(x, scale_factor=random.uniform(0.5, 0.9), mode="bilinear", antialias=True)
        x = F.interpolate(small, size=x.shape[-2:], mode="bilinear")
    x = x * (1 + 0.1 * torch.randn(len(x), 3, 1, 1, device=x.device)) + 0.05 * torch.randn(len(x), 3, 1, 1, device=x.device)
    return x + 0.05 * random.random() * torch.randn_like(x)


def train(data, samples, batch, device):
    net = Readers().to(device)
    opt = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.02)
    y = torch.tensor([labels(s) for s in data.scenes], device=device)
    for step in range(1, samples // batch + 1):
        opt.param_groups[0]["lr"] = learning_rate(2e-3, step * batch, samples, step, warmup=50, decay=0.6)
        i = np.sort(np.random.randint(0, len(data.scenes), batch))
        out = net(soften(data.pixels(i).to(device)))
        loss = sum(F.cross_entropy(out[k], y[i, j]) for j, k in enumerate(HEADS))
        opt.zero_grad(); loss.backward(); opt.step()
        if step % 500 == 0:
            print(json.dumps({"samples": step * batch, "loss": round(loss.item(), 4)}), flush=True)
    return net.eval()


@torch.no_grad()
def accuracy(net, data, device):
    """The share of scenes read as what they show, for each question."""
    out = net(data.pixels(np.arange(len(data.scenes))).to(device))
    y = torch.tensor([labels(s) for s in data.scenes], device=device)
    return {k: (out[k].argmax(1) == y[:, j]).float().mean().item() for j, k in enumerate(HEADS)}


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--scenes", type=Path, required=True)
    p.add_argument("--held-out", type=Path, required=True)
    p.add_argument("--samples", type=int, default=400_000)
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    torch.manual_seed(0); np.random.seed(0); random.seed(0)
    net = train(Scenes(a.scenes, 24_000, 0), a.samples, a.batch, a.device).half().float()
    held_out = Scenes(a.held_out, 2000, HELD_OUT_SEED)
    print(json.dumps({"held_out": len(held_out.scenes), **accuracy(net, held_out, a.device)}))
    folder = Path(__file__).parents[2] / "xtask" / "assets"
    folder.mkdir(exist_ok=True)
    save_file({k: v.half().contiguous().cpu() for k, v in net.state_dict().items()}, folder / "readers.safetensors")
    with torch.no_grad():
        logits = net(held_out.pixels(np.arange(GOLDEN)).to(a.device))
    save_file({k: v.cpu() for k, v in logits.items()}, folder / "readers_golden.safetensors")


if __name__ == "__main__":
    main()
