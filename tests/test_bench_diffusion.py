"""What benchmarks/bench_diffusion.py measures."""

import pytest
import torch

from benchmarks.bench_diffusion import (
    ATTRIBUTES,
    distances,
    graph,
    main,
    parsed_sampler,
    sharpness,
    table,
    values_of,
    verdict,
)
from modules.particles import Particles
from utils.errors import UserError


@pytest.fixture
def particles():
    """40 clips of 4 frames of 3 particles, the last of which is not visible."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(40, 4, *shape, generator=draw)

    obj_on = torch.tensor([1.0, 0.9, 0.2]).expand(40, 4, 3) + 0.01 * normal(3)
    return Particles(normal(3, 2), normal(3, 2), normal(3, 1), obj_on, normal(3, 5), normal(2))


def test_the_same_particles_are_at_no_distance(particles):
    values = values_of(particles)
    assert distances(values, values) == dict.fromkeys(ATTRIBUTES, 0)


def test_a_shift_is_measured_in_standard_deviations(particles):
    reference = values_of(particles)
    shifted = particles.map(torch.clone)
    shifted.z[..., 0] += 0.5  # of the two coordinates one
    shifted.z_depth += 2
    shifted.z_features[:, :, 2] += 9  # of the one that is not visible
    found = distances(values_of(shifted), reference)
    visible = particles.z[:, :, :2, 0]
    assert found["position"] == pytest.approx(0.5 / visible.std(correction=0).item() / 2, rel=1e-4)
    assert found["depth"] == pytest.approx(2 / particles.z_depth[:, :, :2].std(correction=0).item(), rel=1e-4)
    # A shift of all frames is no motion.
    assert found["motion"] == pytest.approx(0, abs=1e-5) and found["appearance"] == found["scale"] == 0


def test_motion_is_of_particles_that_stay_visible(particles):
    particles.obj_on[:, 2] = 0
    motion = values_of(particles)["motion"][0]
    assert len(motion) == 40 * 1 * 2  # of the three steps only that from frame 0 to 1
    expected = (particles.z[:, 1] - particles.z[:, 0])[:, :2, 0]
    assert sorted(motion) == sorted(expected.flatten().tolist())


def test_nothing_visible_is_infinitely_far(particles):
    reference = values_of(particles)
    particles.obj_on[:] = 0
    assert distances(values_of(particles), reference)["position"] == float("inf")


class Painted:
    """A model whose DDLP draws stripes, of the height of the first particle's depth."""

    @property
    def ddlp(self):
        return self

    def render(self, particles):
        stripes = torch.zeros(*particles.z.shape[:2], 3, 8, 8)
        stripes[..., ::2] = particles.z_depth[:, :, 0, 0][:, :, None, None, None]
        return stripes


def test_sharpness_is_the_mean_gradient(particles):
    expected = particles.z_depth[:, :, 0].abs().mean().item()
    assert sharpness(Painted(), particles) == pytest.approx(expected, rel=1e-5)


def test_the_verdict_names_samplers_within_the_margin():
    rows = {
        name: {"mean": mean, "sharpness": 1.0} for name, mean in (("ddpm", 0.2), ("ddim:9", 0.2101), ("a:5", 0.209))
    }
    assert verdict(rows) == "at most 5% above ddpm's mean distance 0.200: a:5"
    assert verdict({"ddim:9": {"mean": 1}}) == "ddpm was not measured"
    assert table(rows).splitlines()[2].split()[0] == "ddim:9" and "0.210" in table(rows)
    assert len(graph(rows).axes) == 2


def test_arguments():
    assert parsed_sampler("ddim:25") == ("ddim", 25) and parsed_sampler("ddpm") == ("ddpm", None)
    with pytest.raises(UserError, match=r"--samplers is .ddim:x.; legal: NAME or NAME:STEPS"):
        parsed_sampler("ddim:x")
    with pytest.raises(UserError, match="--samples is 1; legal: at least 2"):
        main(["-p", "x", "--samples", "1"])
