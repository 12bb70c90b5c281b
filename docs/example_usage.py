"""What goes into the three models and what comes out: forward, loss, encode, decode and sample of each, with the shape
of every output: ``python docs/example_usage.py``.

The models are small and have random weights; ``rundir.load_model(PATH)`` gives trained ones, which are used alike.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models import DiffuseDDLP, ObjectDLP, ObjectDynamicsDLP
from utils.errors import run_command

# The keys of a configuration; those that are missing have their defaults.
SMALL = {
    "ds": "shapes",
    "image_size": 64,
    "patch_size": 8,  # 64 patches
    "n_kp": 1,  # proposals per patch
    "n_kp_prior": 20,  # proposals that are kept (N)
    "n_kp_enc": 10,  # particles (K)
    "anchor_s": 0.25,  # glimpses of 16 x 16 pixels (g)
    "learned_feature_dim": 5,  # of a particle's appearance (d)
    "bg_learned_feature_dim": 7,  # of the background (d_bg)
    "enc_channels": [8, 16, 16],
    "prior_channels": [8, 16, 16],
}
DYNAMICS = {**SMALL, "ds": "balls", "timestep_horizon": 6, "pint_layers": 2, "pint_heads": 4, "pint_dim": 32}
DIFFUSION = {"ds": "balls", "ddlp_dir": "RUN_DIR", "diffuse_frames": 3, "diffusion_num_steps": 20}


def show(call, outputs):
    """Print a call, and under it each output's name and shape. outputs: a dict of tensors."""
    print(f"  {call}")
    for name, value in outputs.items():
        print(f"    {name:<26} {list(value.shape)}")


def object_dlp():
    """DLPv2: images."""
    print("ObjectDLP")
    model = ObjectDLP.from_config(SMALL).eval()
    images = torch.rand(2, 3, 64, 64)  # [B, C, H, W], in 0..1

    output = model(images)
    show("model(images)", output)
    show("model.calc_elbo(images, output)", model.calc_elbo(images, output))

    particles = model.encode_all(images, deterministic=True)  # the posteriors' means
    show("model.encode_all(images, deterministic=True)", particles)
    decoded = model.decode_all(
        particles["z"],
        particles["z_features"],
        particles["z_bg"],
        particles["obj_on"],
        particles["z_depth"],
        z_scale=particles["z_scale"],
    )
    show("model.decode_all(z, z_features, z_bg, obj_on, z_depth, z_scale=z_scale)", decoded)

    # DLPv2 has no prior over whole images: what can be sampled is an image's posterior, anew at every call.
    sampled = model(images, alpha_masks=False)
    show("model(images, alpha_masks=False), another draw", {"z": sampled["z"], "rec": sampled["rec"]})


def object_dynamics_dlp():
    """DDLP: videos."""
    print("ObjectDynamicsDLP")
    model = ObjectDynamicsDLP.from_config(DYNAMICS).eval()
    clips = torch.rand(2, 7, 3, 64, 64)  # [B, timestep_horizon + 1, C, H, W]

    output = model(clips)  # of all frames as one batch; the predictions (*_dyn) by clip and frame
    show("model(clips)", output)
    show("model.calc_elbo(clips, output)", model.calc_elbo(clips, output))

    show(
        "model.encode_all(clips, deterministic=True, reshape=False)",
        model.encode_all(clips, deterministic=True, reshape=False),
    )
    particles = model.track(clips)  # the means of z, z_scale, z_depth, obj_on, z_features and z_bg, as one object
    show("model.track(clips)", vars(particles))
    show("model.render(particles)", {"video": model.render(particles)})

    video = torch.rand(2, 8, 3, 64, 64)  # of any length; the first cond_steps frames are seen
    prediction, predicted = model.sample(video, num_steps=5, cond_steps=4, return_z=True)
    show("model.sample(video, num_steps=5, cond_steps=4, return_z=True)", {"video": prediction, **predicted})


def diffuse_ddlp():
    """DiffuseDDLP: videos from nothing."""
    print("DiffuseDDLP")
    model = DiffuseDDLP.from_config(DIFFUSION, DYNAMICS).eval()
    videos = torch.rand(2, 9, 3, 64, 64)  # [B, diffuse_frames or more, C, H, W]

    tokens, mask = model.encode(videos)  # particles and, last, the background, of the first frames
    show("model.encode(videos)", {"tokens": tokens, "mask": mask})
    model.normalization.fit([tokens])  # statistics, which training takes of the whole data set
    show("model(tokens)", {"loss": model(tokens)})
    show("model.loss(videos)", {"loss": model.loss(videos)})

    particles = model.particles_of(model.normalization.normalize(tokens))
    show("model.particles_of(model.normalization.normalize(tokens))", vars(particles))
    show("model.ddlp.render(particles)", {"video": model.ddlp.render(particles)})

    show("model.sample(4, horizon=8, steps=5, seed=0)", {"video": model.sample(4, horizon=8, steps=5, seed=0)})
    generated = model.sample_particles(4, horizon=8, steps=5, seed=0)
    show("model.sample_particles(4, horizon=8, steps=5, seed=0)", vars(generated))


def main():
    torch.manual_seed(0)
    with torch.no_grad():
        object_dlp()
        object_dynamics_dlp()
        diffuse_ddlp()


if __name__ == "__main__":
    run_command(main)
