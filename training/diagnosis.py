"""A doctor for training: what the numbers of its epochs say is wrong, and what to try; docs/faq.md explains it."""

import torch

from modules.particles import VISIBLE

SCALE_BOUNDS = (0.02, 0.95)  # of a glimpse's side as a fraction of the image's: below or above, it shows nothing
NONE_VISIBLE = 0.25  # particles in an image, on average: fewer are none
ALL_VISIBLE = 0.98  # share of the particles: more are all
DRAWN_BY_BACKGROUND = 0.5  # share of what changes from picture to picture
DRAWN_BY_PARTICLES = 0.3  # share of what the background leaves
AT_BOUNDS = 0.5  # share of the scales
GROWTH = 1.5  # of the error over its lowest
HEALTH = ("visible", "scale", "scale_at_bounds", "bg_share", "fg_share")  # of `training_health`, what is read here
PATIENCE = {"all-particles-are-always-visible": 3, "the-loss-grows": 2}  # epochs in turn before it is said; else 1


def training_health(x, output):
    """What tells a healthy run from a sick one: a dict of scalars.

    x: images [B, 3, H, W] or clips [B, T, 3, H, W]; output: the model's, for these. `visible`: particles visible in an
    image; `beta_a`, `beta_b`: means of the transparencies' Beta parameters; `scale`: mean of the glimpses' sides as
    fractions of the image's; `scale_at_bounds`: share of them outside of `SCALE_BOUNDS`; `bg_share`: the share of what
    changes from frame to frame (of images: from image to image) that the background draws; `fg_share`: the share of
    what the background leaves that the particles draw; both of squared differences.
    """
    with torch.no_grad():
        scale = torch.sigmoid(output["z_scale"].float())
        rec, bg = (output[name].float().reshape(x.shape) for name in ("rec", "bg"))
        return {
            "visible": (output["obj_on"] > VISIBLE).float().sum(-1).mean(),
            "beta_a": output["obj_on_a"].mean(),
            "beta_b": output["obj_on_b"].mean(),
            "scale": scale.mean(),
            "scale_at_bounds": ((scale < SCALE_BOUNDS[0]) | (scale > SCALE_BOUNDS[1])).float().mean(),
            "bg_share": _explained(_changes(x), _changes(bg)),
            "fg_share": _explained(x - bg, rec - bg),
        }


def _changes(x):
    """What changes: in clips of several frames from one to the next, else from the mean of the images."""
    return x.diff(dim=1) if x.dim() == 5 and x.shape[1] > 1 else x - x.mean(dim=0, keepdim=True)


def _explained(target, drawn):
    """The share of a target's squares that what is drawn takes away, at least 0; 0 where there is nothing to draw."""
    whole = target.square().sum()
    left = (target - drawn).square().sum()
    return torch.where(whole > 0, 1 - left / whole, 0.0).clamp(min=0)


def diagnose(records, config):
    """Lines that say what has become sick with the last of a run's records; each is said once, when it begins.

    records: of metrics.jsonl, dicts, the means of an epoch each. Those of warm-up and of the noisy epoch are left out:
    they are not meant to be healthy. config: the run's `Config` or `DiffuseConfig`.
    """
    first = getattr(config, "warmup_epoch", -1) + 1
    records = [record for record in records if record["epoch"] >= first]
    lines = []
    for section, text in symptoms(records, config).items():
        patience = PATIENCE.get(section, 1)
        before = [symptoms(records[: len(records) - i], config) for i in range(1, patience + 1)]
        if all(section in each for each in before[:-1]) and section not in before[-1]:
            lines.append(f"diagnosis: {text}; see docs/faq.md#{section}")
    return lines


def symptoms(records, config):
    """What is wrong with the last record, given those before: section of docs/faq.md to a text."""
    if not records:
        return {}
    # A run that goes on may have records of an older version, which lack some.
    has_health = all(records[-1].get(name) is not None for name in HEALTH)
    found = _symptoms_of_particles(records[-1], config) if has_health else {}
    # Of models of particles, the error of the reconstruction, which means the same within a stage.
    name = "loss_rec" if hasattr(config, "n_kp_enc") else "loss"
    same = [record for record in records if _stage(record["epoch"], config) == _stage(records[-1]["epoch"], config)]
    errors = [record[name] for record in same if record.get(name) is not None]
    if records[-1].get(name) is not None and errors[-1] > GROWTH * min(errors):
        found["the-loss-grows"] = (
            f"{name} grows ({errors[-1]:.4g}, it was {min(errors):.4g}): lower lr ({config.lr:g}), or clip the gradient"
            " (grad_clip)"
        )
    return found


def _stage(epoch, config):
    """The stage of a DDLP, each of which sums other errors: whether the dynamics are trained, and they alone."""
    starts = getattr(config, "start_dyn_epoch", 0), getattr(config, "dyn_only_epoch", None)
    return [start is not None and epoch >= start for start in starts]


def _symptoms_of_particles(now, config):
    found, total = {}, config.n_kp_enc
    if now["visible"] < NONE_VISIBLE:
        found["no-particle-is-visible"] = (
            f"no particle is visible ({now['visible']:.2f} of {total} in an image): lower beta_kl ({config.beta_kl:g}),"
            f" raise warmup_epoch ({config.warmup_epoch}) or obj_on_alpha ({config.obj_on_alpha:g})"
        )
    if now["visible"] > ALL_VISIBLE * total:
        found["all-particles-are-always-visible"] = (
            f"all {total} particles are visible in every image, which is right only where there are as many objects:"
            f" lower n_kp_enc, raise beta_kl ({config.beta_kl:g}) or obj_on_beta ({config.obj_on_beta:g}), or where"
            " several lie on one object, set duplicate_iou 0.3"
        )
    if now["bg_share"] > DRAWN_BY_BACKGROUND and now["fg_share"] < DRAWN_BY_PARTICLES:
        found["the-background-draws-what-moves"] = (
            f"the background draws what moves ({now['bg_share']:.0%} of it, and the particles {now['fg_share']:.0%} of"
            f" what it leaves): lower bg_learned_feature_dim ({config.bg_feature_dim}) or beta_kl ({config.beta_kl:g}),"
            f" or fit anchor_s ({config.anchor_s:g}) to the objects"
        )
    if now["scale_at_bounds"] > AT_BOUNDS:
        found["a-scale-is-at-its-bounds"] = (
            f"{now['scale_at_bounds']:.0%} of the glimpses have shrunk to nothing or grown to the whole image (scale"
            f" {now['scale']:.2f} on average): fit anchor_s ({config.anchor_s:g}) to the objects, or lower scale_std"
            f" ({config.scale_std:g})"
        )
    return found
