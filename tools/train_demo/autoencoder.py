"""The AutoencoderKL: 64 × 64 pictures to 16 × 16 latents, each channel of unit variance."""
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image

from common import Every, learning_rate, save
from muon import Muon
from scenes import HELD_OUT_SEED, SIZE, Scenes

RATE = 3e-3
LATENT_CHANNELS = 8


def new():
    return AutoencoderKL(in_channels=3, out_channels=3, latent_channels=LATENT_CHANNELS, sample_size=SIZE, block_out_channels=(24, 48, 96), layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, norm_num_groups=8, mid_block_add_attention=False, scaling_factor=1.0)


def pictures(a, data, batch):
    index = np.sort(np.random.randint(0, len(data.scenes), batch))
    return index, data.pixels(index).to(a.device, memory_format=torch.channels_last)


def train(a, data, log):
    vae, path = new().to(a.device, memory_format=torch.channels_last), a.out / "vae.pt"
    opt = Muon(vae, RATE)
    step, mean, checkpoints = 0, None, Every(120)
    if path.exists():
        state = torch.load(path, map_location=a.device)
        vae.load_state_dict(state["vae"]); opt.load_state_dict(state["opt"])
        step = state["step"]
    keep = lambda: save({"vae": vae.state_dict(), "opt": opt.state_dict(), "step": step}, path)
    while step * a.vae_batch < a.vae_samples:
        step += 1
        opt.lr = learning_rate(RATE, step * a.vae_batch, a.vae_samples, step, warmup=50, decay=0.4)
        _, x = pictures(a, data, a.vae_batch)
        with torch.autocast(a.device, torch.bfloat16, enabled=not a.f32):
            posterior = vae.encode(x).latent_dist
        # A twentieth of the latents' own deviation as noise. The learned variance starts at 1 and would drown them for the
        # first thousands of steps, so it is only led to a small constant.
        z, logvar = posterior.mean.float(), posterior.logvar.float()
        noisy = z + 0.05 * z.std((0, 2, 3), keepdim=True).detach() * torch.randn_like(z)
        with torch.autocast(a.device, torch.bfloat16, enabled=not a.f32):
            y = vae.decode(noisy).sample.float()
        mse = F.mse_loss(y, x)
        loss = mse + 0.02 * F.l1_loss(y, x) + 1e-4 * z.square().mean() + 1e-4 * (logvar + 8).square().mean()
        opt.zero_grad(); loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        opt.step()
        mean = mse.item() if mean is None else 0.98 * mean + 0.02 * mse.item()
        if step % 50 == 0:
            log(stage="vae", samples=step * a.vae_batch, psnr=round(10 * np.log10(4 / mean), 2))
        if checkpoints.due():
            keep()
    keep()
    return equalize(a, vae.eval().requires_grad_(False), data)


@torch.no_grad()
def equalize(a, vae, data):
    """Gives each latent channel mean 0 and deviation 1, by its two 1 × 1 convolutions; what is decoded stays the same."""
    z = torch.cat([vae.encode(data.pixels(np.arange(i, i + 100)).to(a.device)).latent_dist.mean for i in range(0, 1000, 100)])
    mean, deviation, channels = z.mean((0, 2, 3)), z.std((0, 2, 3)), z.shape[1]
    before, after = vae.quant_conv, vae.post_quant_conv
    # The convolution after is padded by nothing, so a constant passes through it as a constant.
    after.bias += after.weight[:, :, 0, 0] @ mean
    after.weight *= deviation.view(1, -1, 1, 1)
    before.weight[:channels] /= deviation.view(-1, 1, 1, 1)
    before.bias[:channels] = (before.bias[:channels] - mean) / deviation
    before.bias[channels:] -= 2 * deviation.log()
    return vae


@torch.no_grad()
def encode_all(a, vae, data):
    """The mean of every scene's latents [N, C, 16, 16], not scaled, once."""
    path = a.out / "latents.pt"
    if not path.exists():
        parts = [vae.encode(data.pixels(np.arange(i, min(i + 100, len(data.scenes)))).to(a.device, memory_format=torch.channels_last)).latent_dist.mean.half().cpu() for i in range(0, len(data.scenes), 100)]
        save(torch.cat(parts), path)
    return torch.load(path)


@torch.no_grad()
def check(a, vae, log):
    """The reconstruction of held-out scenes, as a figure and as a sheet."""
    held_out = Scenes(a.out / "held_out", 200, HELD_OUT_SEED)
    x = held_out.pixels(np.arange(200)).to(a.device)
    y = torch.cat([vae.decode(vae.encode(part).latent_dist.mean).sample for part in x.split(50)]).clamp(-1, 1)
    log(stage="vae", held_out_psnr=round(float(10 * torch.log10(4 / ((y - x) ** 2).mean((1, 2, 3))).mean()), 2))
    sheet = torch.cat([torch.cat(list(x[:10]), 2), torch.cat(list(y[:10]), 2)], 1)
    Image.fromarray(((sheet / 2 + 0.5) * 255).permute(1, 2, 0).byte().cpu().numpy()).save(a.out / "sheet_vae.png")
