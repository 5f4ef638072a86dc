"""Small classifiers of what a picture shows, trained on drawn scenes, to measure what the demo model draws."""
import random
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from captions import BACKGROUNDS, POSES, SPECIES

PATTERNS = [None, "spots", "stripes", "patch"]
COLLARS = [None, "red", "blue", "green", "yellow", "pink", "white"]
HEADS = {"species": 4, "pose": 4, "background": 6, "pattern": 4, "collar": 7}


def labels(scene):
    pattern = scene["pattern"] and scene["pattern"][1]
    return [SPECIES.index(scene["species"]), POSES.index(scene["pose"]), BACKGROUNDS.index(scene["background"]), PATTERNS.index(pattern), COLLARS.index(scene["collar"])]


class Readers(nn.Module):
    """One trunk, one linear layer a question."""

    def __init__(self):
        super().__init__()
        widths, layers = [3, 24, 48, 96, 128], []
        for a, b in zip(widths, widths[1:]):
            layers += [nn.Conv2d(a, b, 3, 2, 1), nn.GroupNorm(8, b), nn.SiLU()]
        self.trunk = nn.Sequential(*layers, nn.Conv2d(128, 128, 3, 1, 1), nn.GroupNorm(8, 128), nn.SiLU(), nn.Flatten())
        self.heads = nn.ModuleDict({k: nn.Linear(128 * 16, n) for k, n in HEADS.items()})

    def forward(self, x):
        features = self.trunk(x)
        return {k: head(features) for k, head in self.heads.items()}


def soften(x):
    """What a decoder does to a picture: a little blur, a little noise; so that readers read drawings and generations alike."""
    if random.random() < 0.5:
        small = F.interpolate(x, scale_factor=random.uniform(0.45, 0.9), mode="bilinear", antialias=True)
        x = F.interpolate(small, size=x.shape[-2:], mode="bilinear")
    return x + 0.05 * random.random() * torch.randn_like(x)


def train(data, minutes, device="cpu", batch=64):
    net = Readers().to(device)
    opt = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.02)
    y = torch.tensor([labels(s) for s in data.scenes], device=device)
    start, step = time.time(), 0
    while (progress := (time.time() - start) / (60 * minutes)) < 1:
        step += 1
        for group in opt.param_groups:
            group["lr"] = float(2e-3 * min(1, step / 50) * (0.01 + 0.495 * (1 + np.cos(np.pi * progress))))
        i = np.random.randint(0, len(data.scenes), batch)
        out = net(soften(data.pixels(i).to(device)))
        loss = sum(F.cross_entropy(out[k], y[i, j]) for j, k in enumerate(HEADS))
        opt.zero_grad(); loss.backward(); opt.step()
    return net.eval()


@torch.no_grad()
def accuracy(net, pixels, scenes):
    """The share of pictures [N, 3, H, W] read as what `scenes` say they show, for each question."""
    y = torch.tensor([labels(s) for s in scenes], device=pixels.device)
    out = net(pixels)
    return {k: round((out[k].argmax(1) == y[:, j]).float().mean().item(), 3) for j, k in enumerate(HEADS)}
