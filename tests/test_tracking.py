"""Matching particles to objects, and the tracking errors, against enumeration."""

from itertools import permutations

import pytest
import torch

from datasets.balls_ds import to_normalized
from eval.tracking import match, pixel_positions, tracking_quality, wholeness

GENERATOR = torch.Generator().manual_seed(0)


def test_pixels_are_the_inverse_of_the_data_sets_normalisation():
    positions = 64 * torch.rand(5, 3, 2, generator=GENERATOR)
    torch.testing.assert_close(pixel_positions(to_normalized(positions, 64), 64), positions)
    corners = torch.tensor([[-1.0, 1.0]])
    assert pixel_positions(corners, 64).tolist() == [[0.5, 63.5]]


@pytest.mark.parametrize("num_particles", [3, 5])
def test_the_match_has_the_smallest_total_distance(num_particles):
    for _ in range(20):
        points = torch.rand(4, num_particles, 2, generator=GENERATOR)
        truth = torch.rand(4, 3, 2, generator=GENERATOR)
        yes = torch.ones(4, num_particles, dtype=torch.bool)
        chosen = match(points, yes, truth, yes[:, :3]).tolist()

        def total(order, points=points, truth=truth):
            return sum((points[:, k] - truth[:, j]).norm(dim=-1).mean().item() for j, k in enumerate(order))

        best = min(permutations(range(num_particles), 3), key=total)
        assert chosen == list(best)


def test_hidden_particles_and_absent_objects_come_last():
    truth = torch.tensor([[[10.0, 10.0], [30.0, 30.0], [50.0, 50.0]]]).expand(4, -1, -1)
    points = torch.tensor([[[11.0, 10.0], [14.0, 10.0], [30.0, 31.0]]]).expand(4, -1, -1)
    visible = torch.tensor([[False, True, True]]).expand(4, -1)
    present = torch.tensor([[True, True, False]]).expand(4, -1)
    assert match(points, visible, truth, present).tolist() == [1, 2, -1]
    # Where there is no other, an object gets a hidden particle.
    assert match(points[:, :1], visible[:, :1], truth[:, :1], present[:, :1]).tolist() == [0]
    # An object that has left the view is matched by the frames in which it was there.
    leaving = present.clone()
    leaving[2:, 1] = False
    far = points.clone()
    far[2:, 2] = 0.0
    assert match(far, visible, truth, leaving).tolist() == [1, 2, -1]


def test_an_object_keeps_the_particle_of_the_frames_that_were_seen():
    """Particle 0 leaves object 0, particle 1 comes instead: the error is particle 0's."""
    truth = torch.zeros(5, 1, 2)
    points = torch.tensor([[0.0, 9.0], [0.0, 9.0], [1.0, 0.0], [3.0, 0.0], [8.0, 0.0]])  # [F, K] rows
    points = torch.stack([points, torch.zeros_like(points)], -1)
    visible = torch.tensor([[1, 1], [1, 1], [1, 1], [0, 1], [1, 1]]) > 0
    present = torch.tensor([[1], [1], [1], [1], [0]]) > 0
    radii = torch.full((5, 1), 4.0)
    error, tracked = tracking_quality(points, visible, truth, present, radii, cond_steps=2)
    assert error[:2].tolist() == [[1.0], [3.0]] and error[2].isnan()
    assert tracked[:2].tolist() == [[1.0], [0.0]] and tracked[2].isnan()  # not visible in frame 3
    _, near = tracking_quality(points, torch.ones_like(visible), truth, present, radii, cond_steps=2)
    assert near[:2].tolist() == [[1.0], [1.0]]
    _, far = tracking_quality(points, torch.ones_like(visible), truth, present, radii / 2, cond_steps=2)
    assert far[:2].tolist() == [[1.0], [0.0]]


def test_an_object_without_a_particle_is_not_tracked():
    truth = torch.tensor([[[0.0, 0.0], [9.0, 9.0]]]).expand(3, -1, -1)
    yes = torch.ones(3, 2, dtype=torch.bool)
    error, tracked = tracking_quality(truth[:, :1], yes[:, :1], truth, yes, torch.ones(3, 2), cond_steps=1)
    assert error[:, 0].tolist() == [0.0, 0.0] and error[:, 1].isnan().all()
    assert tracked.tolist() == [[1.0, 0.0], [1.0, 0.0]]


def still_particles(**changed):
    """Two objects with two particles each, at rest for five frames of which two are seen: the arguments of `wholeness`,
    its points changed at (frame, particle)."""
    truth = torch.tensor([[[10.0, 10.0], [30.0, 30.0]]]).expand(5, -1, -1)
    points = torch.tensor([[[10.0, 9.0], [10.0, 11.0], [30.0, 29.0], [30.0, 31.0]]]).repeat(5, 1, 1)
    visible = torch.ones(5, 4, dtype=torch.bool)
    for (frame, particle), place in changed.get("moved", {}).items():
        points[frame, particle] = torch.tensor(place)
    for frame, particle in changed.get("hidden", ()):
        visible[frame, particle] = False
    return points, visible, truth, torch.ones(5, 2, dtype=torch.bool), torch.full((5, 2), 4.0)


@pytest.mark.parametrize(
    "changed, first, second",
    [
        ({}, [1, 1, 1], [1, 1, 1]),
        # Its particles come apart, and together again: it was two things for a while.
        ({"moved": {(3, 0): (10.0, 2.0)}}, [1, 0, 0], [1, 1, 1]),
        # Farther apart, but one of them is hidden then: one thing.
        ({"moved": {(3, 0): (10.0, 2.0)}, "hidden": [(3, 1)]}, [1, 1, 1], [1, 1, 1]),
        ({"hidden": [(4, 2), (4, 3)]}, [1, 1, 1], [1, 1, 0]),
        ({"moved": {(2, 2): (30.0, 41.0), (2, 3): (30.0, 41.0)}}, [1, 1, 1], [0, 0, 0]),  # out of 40 pixels
        ({"moved": {(3, 0): (-1.0, 10.0), (3, 1): (-1.0, 10.0)}}, [1, 0, 0], [1, 1, 1]),  # out at the other side
        # The second's particles join the first: as far as they are concerned nothing is wrong.
        ({"moved": {(4, 2): (10.0, 10.0), (4, 3): (10.0, 10.0)}}, [1, 1, 1], [1, 1, 1]),
        ({"moved": {(1, 2): (1.0, 1.0), (1, 3): (1.0, 1.0)}}, [1, 1, 1], [0, 0, 0]),  # not found when seen last
        ({"hidden": [(1, 0)], "moved": {(4, 0): (30.0, 10.0)}}, [1, 1, 1], [1, 1, 1]),  # hidden then: nobody's
    ],
)
def test_an_object_is_whole_until_it_leaves_vanishes_or_splits(changed, first, second):
    whole = wholeness(*still_particles(**changed), cond_steps=2, image_size=40)
    assert whole.T.tolist() == [first, second]


def test_wholeness_of_an_object_out_of_view_is_not_known():
    points, visible, truth, present, radii = still_particles()
    present[3, 1] = False
    whole = wholeness(points, visible, truth, present, radii, cond_steps=2, image_size=40)
    assert whole[:, 0].tolist() == [1, 1, 1] and whole[0, 1] == 1 and whole[1, 1].isnan() and whole[2, 1] == 1
    present[1, 1] = False  # in the last frame that is seen: no particle can be its own
    assert wholeness(points, visible, truth, present, radii, 2, 40)[2].tolist() == [1, 0]
