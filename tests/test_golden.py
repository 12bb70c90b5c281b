"""The models against the published release's numbers, in float64 (the formula) and in float32 (its stability)."""

import pytest
import torch

from models import ObjectDLP, ObjectDynamicsDLP
from tests import golden
from tests.golden import DTYPES, assert_close
from utils import checkpoints

CASES = ["dlp", "dlp_tracking", "dlp_mixer", "dlp_resblock_attention", "dlp_distance_zeros", "dlp_64"]
VIDEO_CASES = ["ddlp", "ddlp_no_correlation", "ddlp_attention", "ddlp_64"]
STAGES = {"": {}, "_warmup": {"warmup": True, "noisy": True}, "_noisy": {"noisy": True}}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# What the release's random filtering drew in the tracking case's two training stages; in which order it ranked the
# proposals is all that it drew.
RANDOM_CHOICES = {
    "_warmup": [4, 9, 6, 12, 3, 7, 8, 15, 0, 1, 2, 5, 10, 11, 13, 14],
    "_noisy": [6, 7, 9, 1, 5, 11, 12, 14, 0, 2, 3, 4, 8, 10, 13, 15],
}


def load_model(name, dtype):
    case = golden.case(name)
    if case["model"] == "ObjectDynamicsDLP":  # the published depth logvar is its mean
        model = ObjectDynamicsDLP(**case["arguments"], depth_logvar_from_mean=True)
    else:
        model = ObjectDLP(**case["arguments"])
    model.load_state_dict(golden.weights(name), strict=True)
    return model.to(DEVICE, dtype).eval()


def assert_dict_close(outputs, arrays, prefix, dtype):
    keys = [key for key in arrays if key.startswith(f"{prefix}/")]
    assert keys
    for key in keys:
        assert_close(outputs[key.split("/")[1]], arrays[key], dtype, key)


def assert_gradients_close(model, name, expected, dtype):
    """float64: each within 1e-5 of the largest norm and 1e-3 of itself (or of rounding: some are zero by symmetry);
    float32: as for the other arrays."""
    parameters = dict(model.named_parameters())
    entries = [entry["name"] for entry in golden.manifest(name)["parameters"] if entry.get("gradient", True)]
    gradients = [parameters[entry].grad for entry in entries]
    norms = torch.stack(
        [torch.zeros((), dtype=dtype, device=DEVICE) if grad is None else grad.norm() for grad in gradients]
    )
    if dtype is torch.float32:
        assert_close(norms, expected, dtype, "gradient norms")
        return
    assert len(entries) == len(expected)
    for entry, actual, norm in zip(entries, norms.tolist(), expected, strict=True):
        allowed = max(min(1e-5 * expected.max(), 1e-3 * norm), 1e-14 * expected.max())
        assert abs(actual - norm) <= allowed, f"{entry}: {actual} instead of {norm}"


@pytest.fixture
def no_normal_noise(monkeypatch):
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", [*CASES, *VIDEO_CASES])
def test_forward_loss_and_gradients(name, stage, dtype, no_normal_noise, monkeypatch):
    dtype = DTYPES[dtype]
    model, case, arrays = load_model(name, dtype), golden.case(name), golden.arrays(name)
    if name == "dlp_tracking" and stage:
        monkeypatch.setattr(torch, "randperm", lambda n, device: torch.tensor(RANDOM_CHOICES[stage], device=device))
    x = torch.from_numpy(arrays["x"]).to(DEVICE, dtype)
    output = model(x, deterministic=True, **case["forward_arguments"], **STAGES[stage])
    assert_dict_close(output, arrays, f"forward{stage}", dtype)
    loss = model.calc_elbo(x, output, **case["loss_arguments"], **STAGES[stage])
    assert_dict_close(loss, arrays, f"loss{stage}", dtype)
    loss["loss"].backward()
    assert_gradients_close(model, name, arrays[f"grad_norm{stage}"], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", VIDEO_CASES)
def test_discounted_and_balanced_loss(name, dtype):
    dtype = DTYPES[dtype]
    model, case, arrays = load_model(name, dtype), golden.case(name), golden.arrays(name)
    x = torch.from_numpy(arrays["x"]).to(DEVICE, dtype)
    loss = model.calc_elbo(
        x,
        model(x, deterministic=True),
        **case["loss_arguments"],
        dynamic_discount=torch.linspace(0.2, 1, model.timestep_horizon, dtype=dtype, device=DEVICE),
        beta_dyn_rec=0.5,
        num_static=2,
        balance=0.8,
    )
    assert_dict_close(loss, arrays, "loss_discount", dtype)
    loss["loss"].backward()
    assert_gradients_close(model, name, arrays["grad_norm_discount"], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", VIDEO_CASES)
def test_without_the_dynamics(name, dtype):
    dtype = DTYPES[dtype]
    model, case, arrays = load_model(name, dtype), golden.case(name), golden.arrays(name)
    x = torch.from_numpy(arrays["x"]).to(DEVICE, dtype)
    output = model(x, deterministic=True, forward_dyn=False)
    assert_dict_close(output, arrays, "forward_static", dtype)
    assert not [name for name in output if name.endswith("_dyn")]
    loss = model.calc_elbo_static(x, output, **case["loss_arguments"])
    assert_dict_close(loss, arrays, "loss_static", dtype)
    loss["loss"].backward()
    assert_gradients_close(model, name, arrays["grad_norm_static"], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", VIDEO_CASES)
def test_prediction_past_the_window(name, dtype):
    dtype = DTYPES[dtype]
    model, arrays = load_model(name, dtype), golden.arrays(name)
    x = torch.from_numpy(arrays["x"]).to(DEVICE, dtype)
    rec, particles = model.sample(x, num_steps=x.shape[1] + 2, cond_steps=4, return_z=True)
    assert_dict_close({"rec": rec, **particles}, arrays, "sample", dtype)
    assert {f"sample/{key}" for key in ("rec", *particles)} == {key for key in arrays if key.startswith("sample/")}
    # What users' what-if code does: the module's own roll-out, from the conditioning frames' particles.
    seen = [particles[key][:, :4] for key in ("z_pos", "z_scale", "z_obj_on", "z_depth", "z_features", "z_bg_features")]
    with torch.no_grad():
        unrolled = model.dyn_module.sample(*seen, steps=x.shape[1] + 2, deterministic=True)
    assert_close(unrolled[0], arrays["sample/z_pos"], dtype, "z_pos")
    assert_close(unrolled[5], arrays["sample/z_bg_features"], dtype, "z_bg_features")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["dlp", "dlp_mixer", "dlp_resblock_attention", "dlp_distance_zeros"])
def test_encode_all_and_decode_all(name, dtype):
    dtype = DTYPES[dtype]
    model, arrays = load_model(name, dtype), golden.arrays(name)
    encoded = model.encode_all(torch.from_numpy(arrays["x"]).to(DEVICE, dtype), deterministic=True)
    assert_dict_close(encoded, arrays, "encode_all", dtype)
    assert {f"encode_all/{key}" for key in encoded} == {key for key in arrays if key.startswith("encode_all/")}
    z, z_features, z_bg, obj_on = (encoded[key] for key in ("z", "z_features", "z_bg", "obj_on"))
    decoded = model.decode_all(z, z_features, z_bg, obj_on, encoded["z_depth"], z_scale=encoded["z_scale"])
    assert_dict_close(decoded, arrays, "decode_all", dtype)


def test_forward_gives_all_published_outputs_and_no_more():
    arrays = golden.arrays("dlp")
    output = load_model("dlp", torch.float64)(torch.from_numpy(arrays["x"]).to(DEVICE, torch.float64))
    assert {f"forward/{key}" for key in output} == {key for key in arrays if key.startswith("forward/")}


PUBLISHED = sorted(path.stem for path in golden.PUBLISHED.glob("*dlp-*.json"))


def published_model(released):
    return {"ObjectDLP": ObjectDLP, "ObjectDynamicsDLP": ObjectDynamicsDLP}[released["model"]].from_config(
        released["config"]
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_checkpoints_load_strictly_and_are_written_back(name):
    released = golden.published(name)
    weights = {key: torch.randn(shape) for key, shape in released["state_dict"].items()}
    aliases = {"object_dec.decode": "object_dec.main", "mixer.0.fn": "conv", "mixer.1.fn": "dense"}
    for key in weights:  # some weights are listed under two names
        for alias, first in aliases.items():
            weights[key] = weights[key.replace(alias, first)]
    model = published_model(released)
    model.load_state_dict(weights, strict=True)
    exported = model.state_dict()
    assert {key: list(value.shape) for key, value in exported.items()} == released["state_dict"]
    assert all(torch.equal(exported[key], weights[key]) for key in weights)


def test_weights_say_what_the_depth_logvar_means(tmp_path):
    """Published weights mean the release's depth logvar, ours a logvar of its own, whatever the model was built for."""
    released = golden.published("ddlp-balls")
    ours, theirs = published_model(released), published_model(released)
    assert not ours.dyn_module.depth_logvar_from_mean  # what a new model is
    checkpoints.save(ours.state_dict(), tmp_path / "ours.pth")
    weights = {name: value for name, value in theirs.state_dict().items() if name in released["state_dict"]}
    checkpoints.save(weights, tmp_path / "released.pth")
    checkpoints.load_weights(ours, tmp_path / "released.pth")
    assert ours.dyn_module.depth_logvar_from_mean and ours.state_dict().keys() == released["state_dict"].keys()
    checkpoints.load_weights(ours, tmp_path / "ours.pth")
    assert not ours.dyn_module.depth_logvar_from_mean
