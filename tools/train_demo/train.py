"""Trains the demo model, a small Stable Diffusion on program-drawn scenes, from nothing to a diffusers folder.

    pip install -r tools/train_demo/requirements.txt
    python tools/train_demo/train.py --out DIR [--device cuda|cpu] [--vae-minutes 10] [--unet-minutes 70] [--decoder-minutes 6]

DIR/model is the finished folder, DIR/log.jsonl the losses, DIR/sheet_*.png what the model drew on the way. Run again with
the same DIR to go on where it stopped. The scenes come from `cargo xtask scenes`.
"""
import argparse
import json
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import captions
import clip_tokenizer
from export import export, save_sheet
from scenes import HELD_OUT_SEED, SIZE, Scenes


def arguments():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--scenes", type=int, default=40_000)
    p.add_argument("--vae-minutes", type=float, default=10)
    p.add_argument("--unet-minutes", type=float, default=70)
    p.add_argument("--decoder-minutes", type=float, default=6)
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--lr", type=float, default=1e-3)
    p.add_argument("--threads", type=int, default=2)
    return p.parse_args()


class Clock:
    """Training time so far, across restarts; the learning rate follows it."""

    def __init__(self, minutes, spent=0.0):
        self.total, self.spent, self.last = minutes * 60, spent, time.time()

    def tick(self):
        now = time.time()
        self.spent, self.last = self.spent + now - self.last, now
        return min(self.spent / self.total, 1.0)


def learning_rate(base, progress, step):
    return float(base * min(1, step / 200) * (0.02 + 0.98 * 0.5 * (1 + np.cos(np.pi * progress))))


def new_vae():
    return AutoencoderKL(in_channels=3, out_channels=3, latent_channels=4, sample_size=SIZE, block_out_channels=(24, 48, 96), layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, norm_num_groups=8, mid_block_add_attention=False, scaling_factor=1.0)


def new_unet():
    return UNet2DConditionModel(sample_size=SIZE // 4, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(64, 128, 160),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=128, attention_head_dim=4, norm_num_groups=32)


def new_text_encoder(tokenizer):
    return CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=77, hidden_act="quick_gelu", bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, projection_dim=128))


def train_vae(a, data, log):
    vae, path = new_vae().to(a.device), a.out / "vae.pt"
    opt = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0.0, betas=(0.9, 0.99))
    step, clock = 0, Clock(a.vae_minutes)
    if path.exists():
        state = torch.load(path, map_location=a.device)
        vae.load_state_dict(state["vae"]); opt.load_state_dict(state["opt"])
        step, clock = state["step"], Clock(a.vae_minutes, state["spent"])
    batch = min(a.batch, 16) if a.device == "cpu" else a.batch
    while (progress := clock.tick()) < 1:
        step += 1
        for group in opt.param_groups:
            group["lr"] = learning_rate(2e-3, progress, step)
        # The network is purely convolutional: it learns from crops, four times as many steps in the same time.
        top, left = np.random.randint(0, SIZE // 2 + 1, 2)
        x = data.pixels(np.random.randint(0, len(data.scenes), batch))[:, :, top : top + SIZE // 2, left : left + SIZE // 2].to(a.device)
        posterior = vae.encode(x).latent_dist
        # A twentieth of the latents' own deviation as noise. The learned variance starts at 1 and would drown them for the
        # first thousands of steps, so it is only led to a small constant.
        z = posterior.mean
        y = vae.decode(z + 0.05 * z.std().detach() * torch.randn_like(z)).sample
        mse = F.mse_loss(y, x)
        loss = mse + 0.05 * F.l1_loss(y, x) + 1e-4 * z.square().mean() + 1e-4 * (posterior.logvar + 8).square().mean()
        opt.zero_grad(); loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        opt.step()
        if step % 50 == 0:
            log(stage="vae", step=step, spent=round(clock.spent), psnr=round(10 * np.log10(4 / mse.item()), 2))
        if step % 500 == 0:
            torch.save({"vae": vae.state_dict(), "opt": opt.state_dict(), "step": step, "spent": clock.spent}, path)
    torch.save({"vae": vae.state_dict(), "opt": opt.state_dict(), "step": step, "spent": clock.spent}, path)
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def encode_all(a, vae, data):
    """Mean and deviation of every scene's latents, once; and the scale that gives them unit variance."""
    path = a.out / "latents.pt"
    if not path.exists():
        moments = []
        for i in range(0, len(data.scenes), 100):
            d = vae.encode(data.pixels(np.arange(i, min(i + 100, len(data.scenes)))).to(a.device)).latent_dist
            moments.append(torch.stack([d.mean, d.std], 1).cpu())
        torch.save(torch.cat(moments), path)
    moments = torch.load(path)
    vae.register_to_config(scaling_factor=round(1 / float(moments[:, 0].std()), 5))
    return moments


def train_unet(a, vae, tokenizer, data, log):
    moments = encode_all(a, vae, data) * vae.config.scaling_factor
    unet, text = new_unet().to(a.device), new_text_encoder(tokenizer).to(a.device)
    nets = torch.nn.ModuleDict({"unet": unet, "text_encoder": text})
    ema = {k: v.clone() for k, v in nets.state_dict().items()}
    opt = torch.optim.AdamW(nets.parameters(), lr=a.lr, weight_decay=0.01, betas=(0.9, 0.99))
    path, step, clock = a.out / "unet.pt", 0, Clock(a.unet_minutes)
    if path.exists():
        state = torch.load(path, map_location=a.device)
        nets.load_state_dict(state["nets"]); opt.load_state_dict(state["opt"])
        ema, step, clock = state["ema"], state["step"], Clock(a.unet_minutes, state["spent"])
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    abar = torch.cumprod(1 - betas, 0).to(a.device)
    weights = (5 / (abar / (1 - abar))).clamp(max=1)  # min-SNR-5 (arXiv 2303.09556) for epsilon prediction
    rng, mean_loss, saved = random.Random(step), None, time.time()

    def save():
        torch.save({"nets": nets.state_dict(), "ema": ema, "opt": opt.state_dict(), "step": step, "spent": clock.spent}, path)

    def preview():
        live = {k: v.clone() for k, v in nets.state_dict().items()}
        nets.load_state_dict(ema)
        export(a.out / "model", vae, unet, text)
        save_sheet(a.out / f"sheet_{step:06}.png", a.out / "model", [captions.full(s) for s in data.scenes[:18]], device=a.device)
        nets.load_state_dict(live)

    while (progress := clock.tick()) < 1:
        step += 1
        for group in opt.param_groups:
            group["lr"] = learning_rate(a.lr, progress, step)
        # Each scene and its caption at two timesteps: half the text encoder's work. Timesteps are stratified over the batch.
        half = a.batch // 2
        index = np.random.randint(0, len(data.scenes), half)
        ids = tokenizer([captions.sample(data.scenes[i], rng) for i in index], padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
        context = text(ids.to(a.device))[0].repeat(2, 1, 1)
        m = moments[index].to(a.device)
        x0 = (m[:, 0] + m[:, 1] * torch.randn_like(m[:, 1])).repeat(2, 1, 1, 1)
        t = ((torch.randperm(a.batch) + torch.rand(a.batch)) * 1000 / a.batch).long().clamp(max=999).to(a.device)
        noise = torch.randn_like(x0)
        s = abar[t].view(-1, 1, 1, 1)
        with torch.autocast(a.device, torch.bfloat16, enabled=a.device != "cpu"):
            y = unet(s.sqrt() * x0 + (1 - s).sqrt() * noise, t, context).sample
        loss = (weights[t] * ((y.float() - noise) ** 2).mean((1, 2, 3))).mean()
        opt.zero_grad(); loss.backward()
        torch.nn.utils.clip_grad_norm_(nets.parameters(), 1.0)
        opt.step()
        decay = min(0.999, step / (step + 20))
        with torch.no_grad():
            for k, v in nets.state_dict().items():
                ema[k].lerp_(v, 1 - decay) if v.is_floating_point() else ema[k].copy_(v)
        mean_loss = loss.item() if mean_loss is None else 0.98 * mean_loss + 0.02 * loss.item()
        if step % 20 == 0:
            log(stage="unet", step=step, samples=step * a.batch, spent=round(clock.spent), loss=round(mean_loss, 4))
        if time.time() - saved > 600 or step == 30:
            save()
            preview()
            saved = time.time()
            clock.last = time.time()
    save()
    nets.load_state_dict(ema)
    log(stage="unet", step=step, samples=step * a.batch, spent=round(clock.spent))
    return unet, text


def train_decoder(a, vae, data, log):
    """Sharpens the decoder alone, on whole pictures: the latents, and with them the UNet, stay what they are."""
    parts, path = torch.nn.ModuleList([vae.post_quant_conv, vae.decoder]), a.out / "decoder.pt"
    vae.requires_grad_(False); parts.requires_grad_(True)
    opt = torch.optim.AdamW(parts.parameters(), lr=5e-4, weight_decay=0.0, betas=(0.9, 0.99))
    step, clock = 0, Clock(a.decoder_minutes)
    if path.exists():
        state = torch.load(path, map_location=a.device)
        parts.load_state_dict(state["parts"]); opt.load_state_dict(state["opt"])
        step, clock = state["step"], Clock(a.decoder_minutes, state["spent"])
    means = torch.load(a.out / "latents.pt", mmap=True)[:, 0]
    deviation = means[:1000].std().to(a.device)
    batch = 8 if a.device == "cpu" else a.batch

    def save():
        torch.save({"parts": parts.state_dict(), "opt": opt.state_dict(), "step": step, "spent": clock.spent}, path)

    while (progress := clock.tick()) < 1:
        step += 1
        for group in opt.param_groups:
            group["lr"] = learning_rate(5e-4, progress, step)
        index = np.random.randint(0, len(data.scenes), batch)
        z, x = means[index].to(a.device), data.pixels(index).to(a.device)
        y = vae.decode(z + 0.03 * deviation * torch.randn_like(z)).sample
        mse = F.mse_loss(y, x)
        opt.zero_grad(); (mse + 0.02 * F.l1_loss(y, x)).backward()
        torch.nn.utils.clip_grad_norm_(parts.parameters(), 1.0)
        opt.step()
        if step % 50 == 0:
            log(stage="decoder", step=step, spent=round(clock.spent), psnr=round(10 * np.log10(4 / mse.item()), 2))
        if step % 500 == 0:
            save()
    save()
    parts.requires_grad_(False)


@torch.no_grad()
def check_vae(a, vae, log, stage):
    """The reconstruction of held-out scenes, as a figure and as a sheet."""
    held_out = Scenes(a.out / "held_out", 200, HELD_OUT_SEED)
    x = held_out.pixels(np.arange(200)).to(a.device)
    y = torch.cat([vae.decode(vae.encode(part).latent_dist.mean).sample for part in x.split(50)]).clamp(-1, 1)
    log(stage=stage, held_out_psnr=round(float(10 * torch.log10(4 / ((y - x) ** 2).mean((1, 2, 3))).mean()), 2))
    sheet = torch.cat([torch.cat(list(x[:10]), 2), torch.cat(list(y[:10]), 2)], 1)
    Image.fromarray(((sheet / 2 + 0.5) * 255).permute(1, 2, 0).byte().cpu().numpy()).save(a.out / f"sheet_{stage}.png")


def main():
    a = arguments()
    torch.set_num_threads(a.threads)
    a.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0); np.random.seed(0)
    log_file = open(a.out / "log.jsonl", "a", buffering=1)

    def log(**fields):
        line = json.dumps(fields)
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
    vae = train_vae(a, data, log)
    check_vae(a, vae, log, "vae")
    unet, text = train_unet(a, vae, tokenizer, data, log)
    train_decoder(a, vae, data, log)
    check_vae(a, vae, log, "decoder")
    export(a.out / "model", vae, unet, text)
    save_sheet(a.out / "sheet_final.png", a.out / "model", [captions.full(s) for s in data.scenes[:18]], device=a.device)


if __name__ == "__main__":
    main()
