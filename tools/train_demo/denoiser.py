"""The UNet and the text encoder, trained together on the latents."""
import random

import numpy as np
import torch
from diffusers import UNet2DConditionModel

import autoencoder
import captions
import clip_tokenizer
import text_encoder
from common import Every, learning_rate, save
from export import export, save_sheet
from muon import Muon
from scenes import SIZE

# How much a latent wholly on the subject, or on its collar, counts where one beside it counts 1: patterns are small, collars
# smaller, and what the background's details will be cannot be learnt.
SUBJECT_WEIGHT, COLLAR_WEIGHT = 3.0, 12.0


def new_unet():
    return UNet2DConditionModel(sample_size=SIZE // 4, in_channels=autoencoder.LATENT_CHANNELS, out_channels=autoencoder.LATENT_CHANNELS, layers_per_block=1, block_out_channels=(64, 128, 160),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=128, attention_head_dim=4, norm_num_groups=32)


class Attention:
    """Attention written out: on a CPU its gradient is faster in bf16 than the fused operator's."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **_):
        keys = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        split = lambda x: x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        q, k, v = split(attn.to_q(hidden_states)), split(attn.to_k(keys)), split(attn.to_v(keys))
        weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1, dtype=torch.float32).to(v.dtype)
        return attn.to_out[0]((weights @ v).transpose(1, 2).flatten(2))


def weight_maps(data, side):
    """The weight of each latent [N, 1, side, side], of mean 1 over the set."""
    factor, parts = SIZE // side, []
    for i in range(0, len(data.scenes), 1000):
        subject = data.silhouettes[i : i + 1000] / np.float32(255)
        # Whatever of the subject has the collar's colour.
        colors = np.array([scene["collar_rgb"] or [1000] * 3 for scene in data.scenes[i : i + 1000]])
        collar = subject * (np.abs(data.images[i : i + 1000] - colors[:, None, None]).max(3) < 40)
        weight = 1 + (SUBJECT_WEIGHT - 1) * subject + (COLLAR_WEIGHT - SUBJECT_WEIGHT) * collar
        parts.append(weight.reshape(-1, side, factor, side, factor).mean((2, 4)))
    weight = torch.from_numpy(np.concatenate(parts)).float()
    return (weight / weight.mean()).half().unsqueeze(1)


def train(a, vae, tokenizer, data, log):
    latents = autoencoder.encode_all(a, vae, data) * vae.config.scaling_factor
    weight_map = weight_maps(data, latents.shape[-1])
    if a.device == "cuda":
        latents, weight_map = latents.cuda(), weight_map.cuda()
    unet, text = new_unet().to(a.device, memory_format=torch.channels_last), text_encoder.new(tokenizer).to(a.device)
    if a.device == "cpu":
        unet.set_attn_processor(Attention())
    predict = torch.compile(unet) if a.device == "cpu" else unet
    nets = torch.nn.ModuleDict({"unet": unet, "text_encoder": text})
    path, step, samples = a.out / "unet.pt", 0, 0
    rng = random.Random(0)
    encode = clip_tokenizer.encoder(tokenizer, [caption for scene in data.scenes[:500] for caption in captions.sample(scene, rng)])
    opt = Muon(nets, a.lr, weight_decay=0.01)
    if path.exists():
        state = torch.load(path, map_location=a.device)
        nets.load_state_dict(state["nets"]); opt.load_state_dict(state["opt"])
        step, samples = state["step"], state["samples"]
    else:
        text_encoder.train(a, text, encode, data, rng, log)
    live = [v for v in nets.state_dict().values() if v.is_floating_point()]
    names = [k for k, v in nets.state_dict().items() if v.is_floating_point()]
    ema = [v.clone() for v in live]
    if path.exists():
        torch._foreach_copy_(ema, [state["ema"][k] for k in names])
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    abar = torch.cumprod(1 - betas, 0).to(a.device)
    # Timesteps are drawn in proportion to min-SNR-5's weights for epsilon prediction (arXiv 2303.09556), rather than the losses
    # weighted: no sample is spent on what counts little.
    chance = (5 * (1 - abar) / abar).clamp(max=1).cumsum(0)
    chance = chance / chance[-1]
    rng, mean_loss = random.Random(step), None
    checkpoints, previews = Every(120), Every(1200)
    torch.manual_seed(step); np.random.seed(step)

    def keep():
        save({"nets": nets.state_dict(), "ema": dict(zip(names, ema)), "opt": opt.state_dict(), "step": step, "samples": samples}, path)

    def averaged(do):
        """Runs `do` with the averaged weights in place."""
        kept = [v.clone() for v in live]
        torch._foreach_copy_(live, ema)
        do()
        torch._foreach_copy_(live, kept)

    def preview():
        export(a.out / "model", vae, unet, text)
        save_sheet(a.out / f"sheet_{samples:07}.png", a.out / "model", [captions.full(s) for s in data.scenes[:12]], device=a.device)

    while samples < a.unet_samples:
        step, samples = step + 1, samples + a.batch
        opt.lr = learning_rate(a.lr, samples, a.unet_samples, step, warmup=100, decay=0.3)
        # Each scene and its caption at two timesteps: half the text encoder's work. Timesteps are stratified over the batch.
        index = np.random.randint(0, len(data.scenes), a.batch // 2)
        ids = [encode(texts).to(a.device) for texts in zip(*(captions.sample(data.scenes[i], rng) for i in index))]
        where = torch.from_numpy(index).to(latents.device)
        x0 = latents[where].float().to(a.device).repeat(2, 1, 1, 1)
        t = torch.searchsorted(chance, (torch.randperm(a.batch) + torch.rand(a.batch)).to(a.device) / a.batch).clamp(max=999)
        noise = torch.randn_like(x0)
        s = abar[t].view(-1, 1, 1, 1)
        noisy = (s.sqrt() * x0 + (1 - s).sqrt() * noise).to(memory_format=torch.channels_last)
        with torch.autocast(a.device, torch.bfloat16, enabled=not a.f32):
            y = predict(noisy, t, text_encoder.mixed(text, *ids).repeat(2, 1, 1)).sample
        error = (y.float() - noise).square() * weight_map[where].float().to(a.device).repeat(2, 1, 1, 1)
        loss = error.mean()
        opt.zero_grad(); loss.backward()
        torch.nn.utils.clip_grad_norm_(nets.parameters(), 1.0)
        opt.step()
        torch._foreach_lerp_(ema, live, 1 - min(0.999, step / (step + 20)))
        if step % 20 == 0:
            mean_loss = loss.item() if mean_loss is None else 0.8 * mean_loss + 0.2 * loss.item()
            log(stage="unet", samples=samples, loss=round(mean_loss, 4))
        if checkpoints.due():
            keep()
        if previews.due():
            averaged(preview)
    keep()
    torch._foreach_copy_(live, ema)
    return unet, text
