"""Measures a trained demo model: what it draws from full captions, and what a HiPer tail carries.

    python tools/train_demo/evaluate.py --out DIR [--subjects 8] [--steps 1000]

DIR is train.py's. Prints a line of JSON a figure; DIR/sheet_hiper.png shows, a subject a row: source | true picture, edit
with the tail, same prompt without, for each target.
"""
import argparse
import json
import subprocess
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import captions
import readers
from export import Pipeline
from scenes import HELD_OUT_SEED, SIZE, Scenes

SUBJECT_SEED = HELD_OUT_SEED + 500
TARGETS = [("sitting", "on the beach"), ("jumping", "in the snow"), ("lying", "in the forest"), ("standing", "in the desert"), ("jumping", "in the city at night"), ("sitting", "in the snow")]
SOURCE = ("standing", "on a plain background")


def arguments():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--model", type=Path, help="default: OUT/model")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--reader-minutes", type=float, default=4)
    p.add_argument("--captions", type=int, default=96)
    p.add_argument("--subjects", type=int, default=8)
    p.add_argument("--steps", type=int, default=1000)
    p.add_argument("--lr", type=float, default=5e-3)
    p.add_argument("--n", type=int, default=5)
    p.add_argument("--tail-scale", type=float, default=0.8)
    p.add_argument("--guidance", type=float, default=7.5)
    p.add_argument("--inference-steps", type=int, default=50)
    p.add_argument("--only", choices=["captions", "hiper"])
    return p.parse_args()


def load_readers(a):
    path = a.out / "readers.pt"
    if not path.exists():
        torch.save(readers.train(Scenes(a.out / "scenes", 40_000, 0), a.reader_minutes, a.device).state_dict(), path)
    net = readers.Readers().to(a.device)
    net.load_state_dict(torch.load(path, map_location=a.device))
    return net.eval()


def views(folder, count):
    """Each subject in every pose on every background, with its silhouette."""
    if not (folder / "done").exists():
        command = ["cargo", "xtask", "scenes", "--every-view", "--out", folder, "--count", count, "--size", SIZE, "--seed", SUBJECT_SEED]
        subprocess.run([str(c) for c in command], check=True)
        (folder / "done").touch()
    data = Scenes(folder, count, SUBJECT_SEED)
    data.silhouettes = np.fromfile(folder / "silhouettes.u8", np.uint8).reshape(-1, SIZE, SIZE)
    return data


def index(subject, pose, background):
    return subject * 24 + captions.POSES.index(pose) * 6 + captions.BACKGROUNDS.index(background)


def personalize(a, pipe, pixels, texts):
    """One tail a picture, all in one batch: Adam is elementwise, so each is what it would be alone."""
    with torch.no_grad():
        posterior = pipe.vae.encode(pixels).latent_dist
        x0 = posterior.sample() * pipe.vae.config.scaling_factor
        source = pipe.embed(texts)
    head, tail = source[:, : -a.n], source[:, -a.n :].clone().requires_grad_(True)
    opt = torch.optim.Adam([tail], lr=a.lr)
    abar = pipe.scheduler.alphas_cumprod.to(a.device)
    for _ in range(a.steps):
        t = torch.randint(0, 1000, (len(x0),), device=a.device)
        noise, s = torch.randn_like(x0), abar[t].view(-1, 1, 1, 1)
        y = pipe.unet(s.sqrt() * x0 + (1 - s).sqrt() * noise, t, torch.cat([head, tail], 1)).sample
        loss = (y - noise).square().mean((1, 2, 3)).sum()
        opt.zero_grad(); loss.backward(); opt.step()
    return tail.detach()


def coat_error(pixels, data, i):
    """Distance (0–441) of the mean colour to the true coat's, where the true picture shows bare coat."""
    true = data.images[i].astype(np.float32)
    coat = np.array(data.scenes[i]["body_rgb"], np.float32)
    where = (data.silhouettes[i] > 250) & (np.abs(true - coat).max(-1) < 12)
    return float(np.linalg.norm(pixels[where].astype(np.float32).mean(0) - coat))


def to_pixels(pictures, device):
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float().to(device) / 127.5 - 1


def say(**fields):
    print(json.dumps(fields), flush=True)


def check_captions(a, pipe, net):
    data = Scenes(a.out / "held_out", 200, HELD_OUT_SEED)
    scenes = data.scenes[: a.captions]
    say(what="readers on drawn scenes", **readers.accuracy(net, data.pixels(np.arange(200)).to(a.device), data.scenes))
    pictures = np.concatenate([pipe.draw([captions.full(s) for s in scenes[i : i + 32]], guidance=a.guidance, steps=a.inference_steps, seed=i) for i in range(0, len(scenes), 32)])
    say(what="drawn from full captions", count=len(scenes), guidance=a.guidance, **readers.accuracy(net, to_pixels(pictures, a.device), scenes))


def check_hiper(a, pipe, net):
    data = views(a.out / "views", a.subjects)
    who = range(a.subjects)
    source = [index(k, *SOURCE) for k in who]
    texts = [captions.short(data.scenes[i]) for i in source]
    tails = personalize(a, pipe, data.pixels(source).to(a.device), texts)
    where = [index(k, *target) for target in TARGETS for k in who]
    scenes = [data.scenes[i] for i in where]
    kinds = {"tail": tails * a.tail_scale, "no tail": None, "another's tail": tails.roll(1, 0) * a.tail_scale}
    drawn = {}
    for kind, tail in kinds.items():
        drawn[kind] = np.concatenate([
            pipe.draw([captions.short(data.scenes[index(k, *target)]) for k in who], guidance=a.guidance, steps=a.inference_steps, tails=tail) for target in TARGETS
        ])
        error = np.mean([coat_error(picture, data, i) for picture, i in zip(drawn[kind], where)])
        say(what=kind, subjects=a.subjects, steps=a.steps, lr=a.lr, coat_error=round(float(error), 1), **readers.accuracy(net, to_pixels(drawn[kind], a.device), scenes))
    again = pipe.draw(texts, guidance=2.0, steps=a.inference_steps, tails=tails * a.tail_scale)
    mse = ((again.astype(np.float32) - data.images[source]) ** 2).mean((1, 2, 3))
    say(what="reconstruction", guidance=2.0, psnr=round(float((10 * np.log10(255**2 / mse)).mean()), 2))
    rows = []
    for k in who:
        row = [data.images[source[k]], again[k]]
        for j in range(len(TARGETS)):
            n = j * a.subjects + k
            row += [data.images[where[n]], drawn["tail"][n], drawn["no tail"][n]]
        rows.append(np.concatenate(row, 1))
    Image.fromarray(np.concatenate(rows)).save(a.out / "sheet_hiper.png")


def main():
    a = arguments()
    torch.set_num_threads(a.threads)
    torch.manual_seed(0); np.random.seed(0)
    pipe = Pipeline(a.model or a.out / "model", a.device)
    net = load_readers(a)
    if a.only != "hiper":
        check_captions(a, pipe, net)
    if a.only != "captions":
        check_hiper(a, pipe, net)


if __name__ == "__main__":
    main()
