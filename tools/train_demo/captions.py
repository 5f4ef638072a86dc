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


def describe(scene, rng):
    """A caption of random detail, and what it names."""
    v = rng.random()
    if v < 0.20:
        detail = []
    elif v < 0.30:
        detail = ["body"]
    elif v < 0.50:
        detail = ["body"] + [a for a in ("pattern", "eyes", "collar") if rng.random() < 0.6]
    else:
        detail = ATTRIBUTES
    pose, background = rng.random() < 0.95, rng.random() < 0.95
    prefix = rng.choice(["", "", "", "a photo of ", "a picture of "])
    named = {"species", *detail, *(["pose"] if pose else []), *(["background"] if background else [])}
    return compose(scene, detail, pose, background, prefix), named


def pair(scene, rng):
    """What is said of a scene, and what a few tokens after its end may say instead (`text_encoder.mixed`); 10 % are empty, for
    guidance. Half of the time both are one caption of random detail. Else the first names no attribute, and the second names
    them all, of the same animal in another pose on another background: only the caption's own words count for these two."""
    v = rng.random()
    if v < 0.10:
        return "", ""
    if v < 0.55:
        caption, _ = describe(scene, rng)
        return caption, caption
    elsewhere = {**scene, "pose": rng.choice(POSES), "background": rng.choice(BACKGROUNDS)}
    named = lambda: rng.random() < 0.7
    return compose(scene, []), compose(elsewhere, ATTRIBUTES, named(), named())


def full(scene):
    """The caption that names everything."""
    return compose(scene, ATTRIBUTES)


def short(scene):
    """The caption that a user writes: species, pose and background."""
    return compose(scene, [])
