"""Trains the demo model, a small Stable Diffusion on program-drawn scenes, from nothing to a diffusers folder.

    pip install -r tools/train_demo/requirements.txt
    python tools/train_demo/train.py --out DIR

DIR/model is the finished folder, DIR/log.jsonl the losses (and the minutes so far, of all runs with this DIR), DIR/sheet_*.png what the
model drew on the way. Every schedule counts samples, never time. Run again with the same DIR to go on where it stopped; with more
--unet-samples, to go on beyond: the learning rate is constant up to the last 30 %. The scenes come from `cargo xtask scenes`.
"""
import argparse
import json
import random
import time
from pathlib import Path

import numpy as np
import torch
from transformers import CLIPTokenizer

import autoencoder
import captions
import clip_tokenizer
import denoiser
from common import has_bf16
from export import export, save_sheet
from scenes import SIZE, Scenes

# What a device is given unless told otherwise: minutes on a card, hours on two cores.
SIZES = {
    "cuda": {"scenes": 120_000, "vae_samples": 200_000, "text_samples": 50_000, "unet_samples": 1_000_000, "vae_batch": 128, "batch": 256, "lr": 2e-3},
    "cpu": {"scenes": 30_000, "vae_samples": 16_000, "text_samples": 30_000, "unet_samples": 176_000, "vae_batch": 16, "batch": 64, "lr": 2e-3},
}


def arguments():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--device", choices=SIZES, default="cuda" if torch.cuda.is_available() else "cpu")
    for name in ("scenes", "vae_samples", "text_samples", "unet_samples", "vae_batch", "batch"):
        p.add_argument("--" + name.replace("_", "-"), type=int)
    p.add_argument("--lr", type=float)
    p.add_argument("--f32", action="store_true", help="train in f32 rather than bf16 autocast, as a CPU without bf16 products always does")
    p.add_argument("--threads", type=int, default=2)
    a = p.parse_args()
    for name, value in SIZES[a.device].items():
        if getattr(a, name) is None:
            setattr(a, name, value)
    a.f32 |= not has_bf16(a.device)
    return a


def main():
    a = arguments()
    torch.set_num_threads(a.threads)
    a.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0); np.random.seed(0); random.seed(0)
    log_file = open(a.out / "log.jsonl", "a+", buffering=1)
    log_file.seek(0)
    before = [json.loads(line)["minutes"] for line in log_file]
    started = time.monotonic() - 60 * (before[-1] if before else 0)

    def log(**fields):
        line = json.dumps({**fields, "minutes": round((time.monotonic() - started) / 60, 2)})
        print(line, file=log_file)
        print(line, flush=True)

    data = Scenes(a.out / "scenes", a.scenes, 0)
    words = set(captions.OTHER_WORDS)
    for scene in data.scenes[:5000]:
        words.update(captions.full(scene).replace(",", " ").split())
    folder = a.out / "model" / "tokenizer"
    if not folder.exists():
        clip_tokenizer.write(folder, words | {","})
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    vae = autoencoder.train(a, data, log)
    autoencoder.check(a, vae, log)
    unet, text = denoiser.train(a, vae, tokenizer, data, log)
    export(a.out / "model", vae, unet, text)
    save_sheet(a.out / "sheet_final.png", a.out / "model", [captions.full(s) for s in data.scenes[:18]], device=a.device)
    log(stage="done")


if __name__ == "__main__":
    main()
