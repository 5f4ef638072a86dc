"""The scenes that `cargo xtask scenes` draws, read back. XTASK names the built program where there is no cargo."""
import json
import os
import shlex
import subprocess

import numpy as np
import torch

SIZE = 64
HELD_OUT_SEED = 1_000_000_000  # evaluation draws from here on; training never does


class Scenes:
    """The pictures as bytes, and what is in them."""

    def __init__(self, folder, count, seed):
        if not (folder / "done").exists():
            command = [*shlex.split(os.environ.get("XTASK", "cargo xtask")), "scenes", "--out", folder, "--count", count, "--size", SIZE, "--seed", seed]
            subprocess.run([str(c) for c in command], check=True)
            (folder / "done").touch()
        self.images = np.memmap(folder / "images.u8", np.uint8, "r").reshape(-1, SIZE, SIZE, 3)
        self.silhouettes = np.memmap(folder / "silhouettes.u8", np.uint8, "r").reshape(-1, SIZE, SIZE)
        self.scenes = [json.loads(line) for line in open(folder / "scenes.jsonl")]

    def pixels(self, indices):
        return torch.from_numpy(self.images[indices]).permute(0, 3, 1, 2).float() / 127.5 - 1
