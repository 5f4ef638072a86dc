"""Captions of mixed detail: what teaches the embedding space to hold what a short caption leaves out."""

SPECIES = ["dog", "cat", "rabbit", "bird"]
POSES = ["standing", "sitting", "jumping", "lying"]
BACKGROUNDS = ["on a plain background", "on the beach", "in the forest", "in the snow", "in the desert", "in the city at night"]

# What a caption may name beside species, pose and background.
ATTRIBUTES = ["body", "pattern", "eyes", "collar"]

# Words that a user may try beyond the training captions; each becomes one token.
OTHER_WORDS = "photo picture drawing my the one with without no and of is at by near under big small happy sleeping running".split()


def article(word):
    return "an" if word[0] in "aeiou" else "a"


def compose(scene, detail, pose=True, background=True, prefix=""):
    """`detail`: the attributes to name, any of "body", "pattern", "eyes", "collar"."""
    body = scene["body"] + " " if "body" in detail else ""
    extras = []
    if "pattern" in detail:
        color, kind = scene["pattern"] or ("no", "markings")
        extras.append(f"{article(color)} {color} patch" if kind == "patch" else f"{color} {kind}")
    if "collar" in detail:
        extras.append(f"a {scene['collar']} collar" if scene["collar"] else "no collar")
    if "eyes" in detail:
        extras.append(f"{scene['eyes']} eyes")
    subject = body + scene["species"]
    words = f"{article(subject)} {subject}"
    if extras:
        words += " with " + (", ".join(extras[:-1]) + " and " if len(extras) > 1 else "") + extras[-1]
    if pose:
        words += " " + scene["pose"]
    if background:
        words += " " + scene["background"]
    return prefix + words


def named(detail, pose, background, prefix):
    """What a caption of these arguments names."""
    return {"species", *detail, *(["pose"] if pose else []), *(["background"] if background else [])}


def describe(rng):
    """What a caption names beside the species, and what stands before it: the arguments of `compose`, at random."""
    v = rng.random()
    if v < 0.20:
        detail = []
    elif v < 0.30:
        detail = ["body"]
    elif v < 0.50:
        detail = ["body"] + [a for a in ("pattern", "eyes", "collar") if rng.random() < 0.6]
    else:
        detail = ATTRIBUTES
    return detail, rng.random() < 0.95, rng.random() < 0.95, rng.choice(["", "", "", "a photo of ", "a picture of "])


def sample(scene, rng):
    """A caption, and what the positions after its end say instead: most of them, and a few (`text_encoder.mixed`). Neither tells
    the scene's own pose and background, so that the caption's words alone count for these two. Half of the time all name the
    same attributes; else the caption names none, and the few name all. 10 % are empty, for guidance."""
    v = rng.random()
    if v < 0.10:
        return "", "", ""
    elsewhere = {**scene, "pose": rng.choice(POSES), "background": rng.choice(BACKGROUNDS)}
    if v < 0.55:
        said = describe(rng)
        return compose(scene, *said), compose(elsewhere, *said), compose(elsewhere, *said)
    return compose(scene, []), compose(elsewhere, []), compose(elsewhere, ATTRIBUTES, rng.random() < 0.7, rng.random() < 0.7)


def full(scene):
    """The caption that names everything."""
    return compose(scene, ATTRIBUTES)


def short(scene):
    """The caption that a user writes: species, pose and background."""
    return compose(scene, [])
