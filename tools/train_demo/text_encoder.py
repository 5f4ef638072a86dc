"""The CLIP text encoder, first taught to say what a caption names.

Stable Diffusion's text encoder comes from CLIP, whose embeddings tell what is in a picture before any UNet reads them. Here
linear questions about the scene take the pictures' part: asked of one position after the caption's end, and only about what the
caption names. The UNet then finds the whole caption's meaning at every such position, rather than having to learn reading.
"""
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

import captions
from common import learning_rate
from muon import Muon

WIDTH, BATCH, RATE = 128, 128, 2e-3


def new(tokenizer):
    return CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=77, hidden_act="quick_gelu", bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, projection_dim=WIDTH))


def answers(scene, named):
    """What the caption says about the scene, by question."""
    color, kind = scene["pattern"] or ("no", "markings")
    said = {"species": scene["species"], "pose": scene["pose"], "background": scene["background"], "body": scene["body"], "kind": kind,
        "color": color, "eyes": scene["eyes"], "collar": scene["collar"] or "no"}
    return {question: answer for question, answer in said.items() if {"kind": "pattern", "color": "pattern"}.get(question, question) in named}


def ends(text, ids):
    """Where each caption ends."""
    return ids.eq(text.config.eos_token_id).int().argmax(1)


def mixed(text, ids, most_ids, few_ids):
    """The embeddings [n, 77, D] of captions, but for the positions after the end: a random share of these, usually small, is taken
    from the last captions, and the rest from the ones before. So a few tokens can say what all others leave out."""
    rows, length, device = len(ids), ids.shape[1], ids.device
    # Many say the same: each is read once.
    once, which = torch.cat([ids, most_ids, few_ids]).unique(dim=0, return_inverse=True)
    own, most, few = text(once)[0][which].chunk(3)
    last_end = torch.stack([ends(text, i) for i in (ids, most_ids, few_ids)]).amax(0)
    after = torch.arange(length, device=device) >= last_end[:, None]
    share = torch.rand(rows, 1, device=device) ** 3
    take = torch.rand(rows, length, device=device) < share
    return torch.where(after[:, :, None], torch.where(take[:, :, None], few, most), own)


def train(a, text, encode, data, rng, log):
    """Teaches `text`, in place."""
    everything = [answers(s, {"species", "pose", "background", *captions.ATTRIBUTES}) for s in data.scenes[:5000]]
    choices = {q: sorted({each[q] for each in everything}) for q in everything[0]}
    questions = nn.ModuleDict({q: nn.Linear(WIDTH, len(c)) for q, c in choices.items()}).to(a.device)
    opt, total, correct = Muon(nn.ModuleList([text, questions]), RATE), a.text_samples // BATCH, None
    for step in range(1, total + 1):
        opt.lr = learning_rate(RATE, step, total, step, warmup=20, decay=0.5)
        scenes = [data.scenes[i] for i in np.random.randint(0, len(data.scenes), BATCH)]
        described = [captions.describe(rng) for _ in scenes]
        ids = encode([captions.compose(scene, *said) for scene, said in zip(scenes, described)]).to(a.device)
        end = ends(text, ids)
        where = end + (torch.rand(BATCH, device=a.device) * (ids.shape[1] - end)).long()
        with torch.autocast(a.device, torch.bfloat16, enabled=not a.f32):
            hidden = text(ids)[0].float()[torch.arange(BATCH, device=a.device), where]
        said = [answers(scene, captions.named(*said)) for scene, said in zip(scenes, described)]
        loss, right, asked = 0.0, 0, 0
        for question, choice in choices.items():
            truth = torch.tensor([choice.index(s[question]) if question in s else -1 for s in said], device=a.device)
            logits = questions[question](hidden)
            loss = loss + F.cross_entropy(logits, truth, ignore_index=-1)
            right, asked = right + (logits.argmax(1) == truth).sum().item(), asked + (truth >= 0).sum().item()
        opt.zero_grad(); loss.backward(); opt.step()
        correct = right / asked if correct is None else 0.9 * correct + 0.1 * right / asked
        if step % 20 == 0:
            log(stage="text", samples=step * BATCH, loss=round(loss.item(), 4), correct=round(correct, 4))
