"""The finished folder, in diffusers' layout and f16, and a sheet of what it draws."""
import copy
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
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
    # transformers 5 writes the text encoder's keys without the prefix that Stable Diffusion checkpoints have, and reads both.
    path = folder / "text_encoder" / "model.safetensors"
    weights = {"text_model." + k.removeprefix("text_model."): v for k, v in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
    # transformers 5 also loads at the dtype of the configuration, diffusers in f32 whatever is on disk: let them agree.
    path = folder / "text_encoder" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "dtype": "float32"}, indent=2) + "\n")
    DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps(INDEX, indent=1) + "\n")


class Pipeline:
    """The exported folder, in f32."""

    def __init__(self, folder, device="cpu"):
        load = lambda kind, name: kind.from_pretrained(folder, subfolder=name, torch_dtype=torch.float32).to(device).eval().requires_grad_(False)
        self.device, self.tokenizer = device, CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
        self.text, self.unet, self.vae = load(CLIPTextModel, "text_encoder"), load(UNet2DConditionModel, "unet"), load(AutoencoderKL, "vae")
        self.scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")

    def embed(self, prompts):
        ids = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
        return self.text(ids.to(self.device))[0]

    @torch.no_grad()
    def draw(self, prompts, steps=25, guidance=4.0, seed=0, tails=None):
        """Pictures of `prompts` as a uint8 array [N, H, W, 3], with DDIM; `tails` [N, n, D] replace the last n tokens."""
        positive = self.embed(prompts)
        if tails is not None:
            positive = torch.cat([positive[:, : -tails.shape[1]], tails], 1)
        context = torch.cat([self.embed([""] * len(prompts)), positive])
        side = self.unet.config.sample_size
        x = torch.randn(len(prompts), self.unet.config.in_channels, side, side, generator=torch.Generator().manual_seed(seed)).to(self.device)
        self.scheduler.set_timesteps(steps)
        for t in self.scheduler.timesteps:
            u, c = self.unet(torch.cat([x, x]), t, context).sample.chunk(2)
            x = self.scheduler.step(u + guidance * (c - u), t, x).prev_sample
        y = self.vae.decode(x / self.vae.config.scaling_factor).sample
        return ((y / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def save_sheet(path, folder, prompts, columns=6, device="cpu"):
    """Draws `prompts` and saves them as one picture."""
    pictures = Pipeline(folder, device).draw(prompts)
    rows = [np.concatenate(list(pictures[i : i + columns]), 1) for i in range(0, len(prompts), columns)]
    Image.fromarray(np.concatenate(rows)).save(path)
