"""One measurement of a peer, in a process of its own: PyTorch with diffusers, or OpenVINO, on the CPU in f32; or PyTorch with
diffusers on an NVIDIA card, as it is or compiled with CUDA graphs.

    $PEER_PYTHON tools/bench/peers.py PART --model DIR [--size 512] [--steps 3] [--threads 2] [--ir FILE]
    $PEER_PYTHON tools/bench/peers.py PART --model DIR --device cuda --dtype float16 [--block 20] [--compile MODE]

PART: personalize (a HiPer step: draws, forward, backward to the tail, Adam), sample (a guided sampling step, batch 2), edit (a
picture: text, 50 guided sampling steps, decoding), unet (one forward pass), encode, decode (the VAE), openvino-export (writes
--ir), openvino (one forward pass of --ir), gemm (the best rate of a large product), versions. `cargo xtask bench` calls it.
Prints one JSON object a line: {"event": "step", "seconds": s} for each step, or picture; in a block of steps, between whose ends
a card is not waited for, s is their mean.
"""
import argparse
import importlib.metadata
import itertools
import json
import sys
import time

N_HIPER, LEARNING_RATE, GUIDANCE_SCALE, SAMPLING_STEPS, TIMESTEP = 5, 5e-3, 7.5, 50, 500
SOURCE, TARGET = "a dog standing on the grass", "a dog sitting on the beach"

parser = argparse.ArgumentParser()
parser.add_argument("part")
parser.add_argument("--model")
parser.add_argument("--size", type=int, default=512, help="pixels")
parser.add_argument("--steps", type=int, default=3)
parser.add_argument("--block", type=int, default=1, help="steps that are timed together")
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--ir", help="OpenVINO's file of the UNet")
parser.add_argument("--device", default="cpu", help="of personalize, sample and edit")
parser.add_argument("--dtype", default="float32", help="of the networks")
parser.add_argument("--compile", help="a mode of torch.compile: reduce-overhead has CUDA graphs, max-autotune chooses kernels too")
args = parser.parse_args()


def say(event, **fields):
    print(json.dumps({"event": event, **fields}), flush=True)


def measure(step):
    for first in range(0, args.steps, args.block):
        block = min(args.block, args.steps - first)
        start = time.perf_counter()
        for _ in range(block):
            step()
        if args.device != "cpu":
            import torch

            torch.cuda.synchronize()
        seconds = (time.perf_counter() - start) / block
        for _ in range(block):
            say("step", seconds=seconds)


def versions():
    found = {}
    for package in ("torch", "diffusers", "transformers", "openvino"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pass
    say("versions", **found)


def dtype():
    import torch

    return getattr(torch, args.dtype)


def component(cls, folder):
    """A frozen network of the checkpoint, channels last."""
    import torch

    network = cls.from_pretrained(args.model, subfolder=folder, torch_dtype=dtype())
    return network.eval().requires_grad_(False).to(args.device, memory_format=torch.channels_last)


def compiled(function):
    import torch

    return torch.compile(function, mode=args.compile) if args.compile else function


def channels_last(*shape):
    """Normal numbers of the networks' type."""
    import torch

    return torch.randn(shape, device=args.device, dtype=dtype()).contiguous(memory_format=torch.channels_last)


def unet():
    from diffusers import UNet2DConditionModel

    return component(UNet2DConditionModel, "unet")


def vae():
    from diffusers import AutoencoderKL

    return component(AutoencoderKL, "vae")


def text_encoder():
    """Sentences to [len(sentences), 77, D]."""
    import torch
    from transformers import CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(args.model, subfolder="tokenizer")
    encoder = CLIPTextModel.from_pretrained(args.model, subfolder="text_encoder", torch_dtype=dtype()).to(args.device)

    def embed(*sentences):
        ids = tokenizer(list(sentences), padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        with torch.no_grad():
            return encoder(ids.to(args.device))[0]

    return embed


def random_latents():
    """As the model has them of a picture."""
    from diffusers import AutoencoderKL

    config = AutoencoderKL.load_config(args.model, subfolder="vae")
    size = args.size // 2 ** (len(config["block_out_channels"]) - 1)
    return channels_last(1, config["latent_channels"], size, size)


def personalize():
    import torch
    from diffusers import DDPMScheduler

    text, network, autoencoder = text_encoder()(SOURCE), unet(), vae()
    scheduler = DDPMScheduler.from_pretrained(args.model, subfolder="scheduler")
    with torch.no_grad():
        encoded = autoencoder.encode(channels_last(1, 3, args.size, args.size)).latent_dist
        latents = encoded.sample().float() * autoencoder.config.scaling_factor
    predict = compiled(lambda *inputs: network(*inputs, return_dict=False)[0])
    head = text[:, :-N_HIPER]
    tail = text[:, -N_HIPER:].float().clone().requires_grad_(True)
    optimiser = torch.optim.Adam([tail], lr=LEARNING_RATE, fused=args.device != "cpu")
    alphas = scheduler.alphas_cumprod.to(args.device)

    def step():
        noise = torch.randn_like(latents)
        timestep = torch.randint(0, 1000, (1,), device=args.device)
        alpha = alphas[timestep].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        noisy = noisy.to(dtype()).contiguous(memory_format=torch.channels_last)
        prediction = predict(noisy, timestep, torch.cat([head, tail.to(dtype())], dim=1))
        optimiser.zero_grad()
        torch.nn.functional.mse_loss(prediction.float(), noise).backward()
        optimiser.step()

    measure(step)


def guided(predict, scheduler, text):
    """A function that takes the i-th sampling step of latents."""
    import torch

    # The scheduler computes with its own, and a card need not be asked for them.
    timesteps = scheduler.timesteps.to(args.device)

    def step(latents, i):
        both = torch.cat([latents, latents]).contiguous(memory_format=torch.channels_last)
        without, prompted = predict(both, timesteps[i], text).chunk(2)
        noise = without + GUIDANCE_SCALE * (prompted - without)
        return scheduler.step(noise, scheduler.timesteps[i], latents).prev_sample

    return step


def sampler(steps):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler.from_pretrained(args.model, subfolder="scheduler")
    scheduler.set_timesteps(steps)
    return scheduler


def sample():
    import torch

    text, network = text_encoder()("", TARGET), unet()
    latents, steps = random_latents(), itertools.count()
    predict = compiled(lambda *inputs: network(*inputs, return_dict=False)[0])
    take = guided(predict, sampler(max(args.steps, 2)), text)

    def step():
        nonlocal latents
        latents = take(latents, next(steps))

    with torch.inference_mode():
        measure(step)


def edit():
    import torch

    embed, network, autoencoder, scheduler = text_encoder(), unet(), vae(), sampler(SAMPLING_STEPS)
    predict = compiled(lambda *inputs: network(*inputs, return_dict=False)[0])
    decode = compiled(lambda latents: autoencoder.decode(latents, return_dict=False)[0])

    def picture():
        take, latents = guided(predict, scheduler, embed("", TARGET)), random_latents()
        for i in range(SAMPLING_STEPS):
            latents = take(latents, i)
        decode(latents / autoencoder.config.scaling_factor).float().cpu()

    with torch.inference_mode():
        measure(picture)


def unet_inputs(config):
    import torch

    return random_latents(), torch.tensor([TIMESTEP]), torch.randn(1, 77, config.cross_attention_dim)


def unet_forward():
    import torch

    network = unet()
    inputs = unet_inputs(network.config)
    with torch.inference_mode():
        measure(lambda: network(*inputs))


def encode():
    import torch

    autoencoder = vae()
    picture = channels_last(1, 3, args.size, args.size)
    with torch.inference_mode():
        measure(lambda: autoencoder.encode(picture).latent_dist.mean)


def decode():
    import torch

    autoencoder = vae()
    latents = random_latents()
    with torch.inference_mode():
        measure(lambda: autoencoder.decode(latents).sample)


def openvino_export():
    import openvino
    import torch

    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network = unet().to(memory_format=torch.contiguous_format)

        def forward(self, latents, timestep, text):
            return self.network(latents, timestep, text, return_dict=False)[0]

    plain = Plain()
    inputs = tuple(x.contiguous() for x in unet_inputs(plain.network.config))
    with torch.no_grad():
        model = openvino.convert_model(plain, example_input=inputs, input=[list(x.shape) for x in inputs])
    openvino.save_model(model, args.ir, compress_to_fp16=False)


def openvino_forward():
    import numpy
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": args.threads, "PERFORMANCE_HINT": "LATENCY"}
    core = openvino.Core()
    network = core.compile_model(core.read_model(args.ir), "CPU", settings)
    request = network.create_infer_request()
    draw = numpy.random.default_rng(0)
    inputs = []
    for port in network.inputs:
        if port.element_type == openvino.Type.f32:
            inputs.append(draw.standard_normal(list(port.shape), dtype=numpy.float32))
        else:
            inputs.append(numpy.full(list(port.shape), TIMESTEP, dtype=port.element_type.to_dtype()))
    measure(lambda: request.infer(inputs))


def gemm():
    import torch

    size, best = 2048, 0.0
    a, b = torch.randn(size, size), torch.randn(size, size)
    out = torch.empty(size, size)
    for _ in range(10):
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    say("ceiling", what=f"PyTorch's product {size}³", flops_a_second=best)


PARTS = {
    "versions": versions,
    "personalize": personalize,
    "sample": sample,
    "edit": edit,
    "unet": unet_forward,
    "encode": encode,
    "decode": decode,
    "openvino-export": openvino_export,
    "openvino": openvino_forward,
    "gemm": gemm,
}

if args.part not in PARTS:
    parser.error(f"PART is one of {', '.join(PARTS)}")
try:
    if args.part not in ("versions", "openvino"):
        import torch

        torch.set_num_threads(args.threads)
        torch.manual_seed(0)
        # The fastest of cuDNN's convolutions, where there is a card.
        torch.backends.cudnn.benchmark = True
    PARTS[args.part]()
    if args.compile:
        counters = torch._dynamo.utils.counters
        say("compiled", graph_breaks=sum(counters["graph_break"].values()), **counters["inductor"])
except ModuleNotFoundError as error:
    sys.exit(f"{error} ({sys.executable})")
