"""The finished folder, in diffusers' layout and f16, and a sheet of what it draws."""
import copy
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

INDEX = {
    "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.42.1", "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
    "safety_checker": [None, None], "feature_extractor": [None, None],
}


def export(folder, vae, unet, text):
    """Writes every component in f16; `folder/tokenizer` is there already."""
    folder = Path(folder)
    for name, net in (("vae", vae), ("unet", unet), ("text_encoder", text)):
        copy.deepcopy(net).to("cpu", torch.float16).save_pretrained(folder / name)
    DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps(INDEX, indent=1))


@torch.no_grad()
def draw(folder, prompts, steps=25, guidance=4.0, seed=0, device="cpu"):
    """Pictures of `prompts` as a uint8 array [N, H, W, 3], with DDIM and the exported folder."""
    tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
    text = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder", torch_dtype=torch.float32).to(device)
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=torch.float32).to(device)
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", torch_dtype=torch.float32).to(device)
    scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    embed = lambda p: text(tokenizer(p, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids.to(device))[0]
    context = torch.cat([embed([""] * len(prompts)), embed(prompts)])
    side = unet.config.sample_size
    x = torch.randn(len(prompts), 4, side, side, generator=torch.Generator().manual_seed(seed)).to(device)
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        u, c = unet(torch.cat([x, x]), t, context).sample.chunk(2)
        x = scheduler.step(u + guidance * (c - u), t, x).prev_sample
    y = vae.decode(x / vae.config.scaling_factor).sample
    return ((y / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def save_sheet(path, folder, prompts, columns=6):
    """Draws `prompts` and saves them as one picture."""
    pictures = draw(folder, prompts)
    rows = [np.concatenate(list(pictures[i : i + columns]), 1) for i in range(0, len(prompts), columns)]
    Image.fromarray(np.concatenate(rows)).save(path)
