"""The shapes that docs/example_usage.py prints, against those that the models' descriptions say."""

import json

from tests.runs import run_script

# The letters are those of models.py, and no two sizes are equal. S: the image's side; T: frames that PINT sees.
B, C, S, N, K, G, D, D_BG, T = 2, 3, 64, 20, 10, 16, 5, 7, 6
F = 2 + 2 + 1 + 1 + D_BG  # a token's width; of appearance and background the wider counts
IMAGE = (C, S, S)

PARTICLES = {"z": (K, 2), "z_scale": (K, 2), "z_depth": (K, 1), "obj_on": (K,), "z_features": (K, D), "z_bg": (D_BG,)}
# Each attribute's distribution and draw.
ENCODED = {
    **dict.fromkeys(("mu", "logvar", "z", "z_base", "mu_offset", "logvar_offset"), (K, 2)),
    **dict.fromkeys(("mu_scale", "logvar_scale", "z_scale"), (K, 2)),
    **dict.fromkeys(("mu_depth", "logvar_depth", "z_depth"), (K, 1)),
    **dict.fromkeys(("obj_on_a", "obj_on_b", "obj_on"), (K,)),
    **dict.fromkeys(("mu_features", "logvar_features", "z_features"), (K, D)),
    **dict.fromkeys(("mu_bg", "logvar_bg", "z_bg"), (D_BG,)),
    "z_kp_bg": (1, 2),
}
FORWARD = {
    **ENCODED,
    "kp_p": (N, 2),
    "cropped_objects_original": (K, C, G, G),
    "dec_objects_original": (K, 1 + C, G, G),
    "alpha_masks": (K, 1, S, S),
    **dict.fromkeys(("rec", "dec_objects", "bg"), IMAGE),
}
ENCODE_ALL = {**ENCODED, "cropped_objects": (K, C, G, G), "z_offset": (K, 2), "bg_mask": (1, S, S)}
DECODE_ALL = {
    **dict.fromkeys(("rec", "bg", "dec_objects_trans"), IMAGE),
    "dec_objects": (K, 1 + C, G, G),
    "alpha_masks": (K, 1, S, S),
}
LOSSES = dict.fromkeys(
    ["loss", "psnr", "loss_rec", "obj_on_l1", "kl"]
    + [f"loss_kl_{name}" for name in ("kp", "feat", "obj_on", "scale", "depth")],
    (),
)
PREDICTED = {
    **{f"{name}_dyn": (K, 2) for name in ("mu", "logvar", "mu_scale", "logvar_scale")},
    **{f"{name}_depth_dyn": (K, 1) for name in ("mu", "logvar")},
    **{f"{name}_features_dyn": (K, D) for name in ("mu", "logvar")},
    **{f"{name}_bg_dyn": (D_BG,) for name in ("mu", "logvar")},
    **{f"obj_on_{name}_dyn": (K,) for name in ("a", "b")},
}
SAMPLED = {
    **{f"z_{name}": (K, 2) for name in ("pos", "scale")},
    **{f"z_{name}": (K,) for name in ("obj_on", "ids")},
    "z_depth": (K, 1),
    "z_features": (K, D),
    "z_bg_features": (D_BG,),
}


def of(leading, shapes):
    """Shapes with leading dimensions before them."""
    return {name: [*leading, *shape] for name, shape in shapes.items()}


EXPECTED = {
    "ObjectDLP": {
        "model(images)": of([B], FORWARD),
        "model.calc_elbo(images, output)": of([], LOSSES),
        "model.encode_all(images, deterministic=True)": of([B], ENCODE_ALL),
        "model.decode_all(z, z_features, z_bg, obj_on, z_depth, z_scale=z_scale)": of([B], DECODE_ALL),
        "model(images, alpha_masks=False), another draw": of([B], {"z": (K, 2), "rec": IMAGE}),
    },
    "ObjectDynamicsDLP": {
        "model(clips)": {**of([B * (T + 1)], FORWARD), **of([B, T], PREDICTED)},
        "model.calc_elbo(clips, output)": of([], {**LOSSES, "kl_dyn": ()}),
        "model.encode_all(clips, deterministic=True, reshape=False)": of([B, T + 1], ENCODE_ALL),
        "model.track(clips)": of([B, T + 1], PARTICLES),
        "model.render(particles)": of([B, T + 1], {"video": IMAGE}),
        "model.sample(video, num_steps=5, cond_steps=4, return_z=True)": of([B, 4 + 5], {"video": IMAGE, **SAMPLED}),
    },
    "DiffuseDDLP": {
        "model.encode(videos)": of([B, 3], {"tokens": (K + 1, F), "mask": (K + 1, F)}),
        "model(tokens)": {"loss": []},
        "model.loss(videos)": {"loss": []},
        "model.particles_of(model.normalization.normalize(tokens))": of([B, 3], PARTICLES),
        "model.ddlp.render(particles)": of([B, 3], {"video": IMAGE}),
        "model.sample(4, horizon=8, steps=5, seed=0)": of([4, 8], {"video": IMAGE}),
        "model.sample_particles(4, horizon=8, steps=5, seed=0)": of([4, 8], PARTICLES),
    },
}


def printed_shapes(text):
    """Model -> call -> output -> shape, by the indentation of the lines."""
    found = {}
    for line in text.splitlines():
        words = line.strip()
        if not line.startswith(" "):
            model = found.setdefault(words, {})
        elif not line.startswith("    "):
            call = model.setdefault(words, {})
        else:
            name, shape = words.split(maxsplit=1)
            call[name] = json.loads(shape)
    return found


def test_the_printed_shapes_are_those_described(monkeypatch, tmp_path, capsys):
    assert run_script(monkeypatch, tmp_path, "docs/example_usage.py") == 0
    found = printed_shapes(capsys.readouterr().out)
    assert found.keys() == EXPECTED.keys()
    for model, calls in EXPECTED.items():
        assert found[model].keys() == calls.keys()
        for call, shapes in calls.items():
            assert found[model][call] == shapes, f"{model}: {call}"
