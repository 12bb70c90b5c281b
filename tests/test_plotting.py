"""Pictures: the box rule, suppression, where and in which colour things are drawn, the figure grid, the curves."""

from pathlib import Path

import cv2
import imageio.v3 as iio
import numpy as np
import pytest
import torch

from tests.boxes import plain_selection
from utils import plotting, util_func
from utils.errors import UserError

GOLDEN = Path(__file__).parent / "golden"


def random(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain_boxes(z, fraction, side):
    """The box rule, one number at a time; int() truncates towards zero."""
    boxes = torch.zeros(*z.shape[:2], 4, dtype=torch.int64)
    for b in range(z.shape[0]):
        for k in range(z.shape[1]):
            for axis, slot in ((1, 0), (0, 1)):
                center = (z[b, k, axis].item() + 1) / 2 * side
                half = fraction[b, k, axis].item() * side / 2
                boxes[b, k, slot] = int(center - half)
                boxes[b, k, slot + 2] = int(center + half)
    return boxes


def outline(box, color, image):
    """A copy of the image [3, H, W] with a one pixel wide rectangle."""
    x1, y1, x2, y2 = box
    image = image.clone()
    for y in range(y1, y2 + 1):
        for x in range(x1, x2 + 1):
            if x in (x1, x2) or y in (y1, y2):
                image[:, y, x] = color
    return image


def enlarge(images, zoom):
    return torch.nn.functional.interpolate(images.float(), scale_factor=zoom, mode="nearest")


def model_output(n=3, k=4, proposals=6, side=32):
    """A forward output with particles inside the image whose boxes overlap partly."""
    masks = (random(n, k, 1, side, side, seed=10) > 0.99).double()
    masks[:, : k // 2, ..., side // 2 :] = 0  # the first particles at the left, the others at the right
    masks[:, k // 2 :, ..., : side // 2] = 0
    return {
        "z_base": random(n, k, 2, seed=1) - 0.5,
        "mu_offset": 0.2 * random(n, k, 2, seed=2) - 0.1,
        "logvar_offset": -6 * random(n, k, 2, seed=3),
        "obj_on": random(n, k, seed=4),
        "z_scale": random(n, k, 2, seed=5) - 1.5,
        "kp_p": 1.8 * random(n, proposals, 2, seed=6) - 0.9,
        "rec": random(n, 3, side, side, seed=7),
        "dec_objects": random(n, 3, side, side, seed=8),
        "bg": random(n, 3, side, side, seed=9),
        "alpha_masks": masks,
    }


# Colours and confidence


def test_colors_are_distinct_and_do_not_depend_on_their_number():
    colors = plotting.particle_colors(64)
    assert colors.shape == (64, 3) and colors.min() >= 0 and colors.max() <= 1
    distance = torch.cdist(colors, colors) + torch.eye(64)
    assert distance.min() > 0.1
    assert (torch.cdist(colors[:12], colors[:12]) + torch.eye(12)).min() > 0.3
    assert torch.equal(plotting.particle_colors(5), colors[:5])
    assert len(plotting.particle_colors(1000).unique(dim=0)) == 1000


def test_colors_are_not_shared_state():
    plotting.particle_colors(3).zero_()
    assert plotting.particle_colors(3).sum() > 0


def test_the_color_map_holds_the_colors_that_are_drawn():
    colors = util_func.color_map(2)
    assert colors.dtype == np.uint8 and colors.shape == (22, 3) and len(util_func.color_map()) == 1100
    for k in (0, 21):
        points = torch.full((22, 2), -9.0)
        points[k] = 0.5
        picture = util_func.plot_keypoints_on_image(points, torch.zeros(3, 9, 9), plot_numbers=False)
        assert np.array_equal(picture[4, 4], colors[k])


def test_confidence_is_minus_the_weighted_logvar_sum():
    logvar = torch.tensor([[[-1.0, -2.0], [3.0, 0.5]]])
    obj_on = torch.tensor([[0.5, 1.0]])
    assert torch.allclose(plotting.confidence(logvar, obj_on), torch.tensor([[1.5, -3.5]]))


# Boxes


def test_boxes_equal_the_golden_ones():
    parts = np.load(GOLDEN / "parts.npz")
    position, scale = torch.from_numpy(parts["box/position"]), torch.from_numpy(parts["box/scale_logit"])
    expected = torch.from_numpy(parts["box/xyxy_of_32"]).long()
    assert torch.equal(plotting.boxes_from_particles(position, scale, 32), expected)
    fraction = torch.sigmoid(scale)
    assert torch.equal(plotting.boxes_from_particles(position, fraction, 32, scale_normalized=True), expected)


def test_boxes_equal_the_rule_beyond_the_border_too():
    z, z_scale = 3 * random(4, 9, 2) - 1.5, 4 * random(4, 9, 2, seed=1) - 3
    boxes = plotting.boxes_from_particles(z, z_scale, 50)
    assert boxes.dtype == torch.int64
    assert torch.equal(boxes, plain_boxes(z, torch.sigmoid(z_scale), 50))
    assert boxes.min() < 0 and boxes.max() > 50


def test_mask_boxes_enclose_the_pixels_above_the_threshold():
    masks = torch.zeros(2, 3, 1, 20, 24)
    masks[0, 0, 0, 3:8, 5:12] = 0.06
    masks[0, 1, 0, 4, 20] = 1.0
    masks[0, 1, 0, 15, 2] = 0.3
    masks[1, 2] = 0.05
    boxes, present = plotting.boxes_from_masks(masks)
    assert boxes[0, 0].tolist() == [5, 3, 11, 7]
    assert boxes[0, 1].tolist() == [2, 4, 20, 15]
    assert present.tolist() == [[True, True, False], [False, False, False]]


@pytest.mark.parametrize("hard_thresh", [None, 0.4])
@pytest.mark.parametrize("iou_thresh", [0.1, 0.2, 0.5])
def test_selection_equals_slow_suppression(iou_thresh, hard_thresh):
    corner = (60 * random(5, 30, 2)).long()
    boxes = torch.cat([corner, corner + 5 + (30 * random(5, 30, 2, seed=1)).long()], dim=-1)
    scores = random(5, 30, seed=2)
    keep = plotting.select_boxes(boxes, scores, iou_thresh, hard_thresh)
    assert 5 < keep.sum() < 150
    for b in range(5):
        expected = plain_selection(boxes[b].tolist(), scores[b].tolist(), iou_thresh, hard_thresh)
        assert set(keep[b].nonzero()[:, 0].tolist()) == expected


def test_absent_boxes_neither_stay_nor_suppress():
    boxes = torch.tensor([[[0, 0, 10, 10], [0, 0, 10, 10]]])
    present = torch.tensor([[False, True]])
    keep = plotting.select_boxes(boxes, torch.tensor([[2.0, 1.0]]), 0.5, present=present)
    assert keep.tolist() == [[False, True]]


def test_scale_boxes_are_drawn_in_the_particles_colors():
    images = random(2, 3, 40, 40).float()
    z = torch.tensor([[[-0.5, -0.5], [-0.45, -0.5], [0.5, 0.4]]] * 2)
    fraction = torch.tensor([[[0.31, 0.22], [0.31, 0.22], [0.22, 0.31]]] * 2)
    scores = torch.tensor([[1.0, 2.0, 3.0], [5.0, 4.0, 0.5]])
    pictures, kept = plotting.plot_bb_on_image_batch_from_z_scale_nms(
        z, torch.logit(fraction), images, scores, iou_thresh=0.5, hard_thresh=0.7
    )
    assert [indices.tolist() for indices in kept] == [[2, 1], [0]]
    boxes, colors = plain_boxes(z, fraction, 40), plotting.particle_colors(3)
    expected = outline(boxes[0, 2].tolist(), colors[2], outline(boxes[0, 1].tolist(), colors[1], images[0]))
    assert torch.equal(pictures[0], expected)
    assert torch.equal(pictures[1], outline(boxes[1, 0].tolist(), colors[0], images[1]))
    again, kept = plotting.plot_bb_on_image_batch_from_z_scale_nms(
        z, fraction, images, scores, hard_thresh=0.7, max_imgs=1, scale_normalized=True
    )
    assert torch.equal(again, pictures[:1]) and len(kept) == 1


def test_box_sides_beyond_the_image_are_drawn_on_its_border():
    images = torch.zeros(1, 3, 20, 20)
    z = torch.tensor([[[-1.0, 0.0], [3.0, 3.0]]])
    fraction = torch.full((1, 2, 2), 0.5)
    picture, kept = plotting.plot_bb_on_image_batch_from_z_scale_nms(
        z, fraction, images, torch.ones(1, 2), scale_normalized=True
    )
    assert kept[0].tolist() == [0, 1]
    assert torch.equal(picture[0], outline([5, 0, 15, 5], plotting.particle_colors(1)[0], images[0]))


def test_mask_boxes_are_drawn_once_per_object():
    images = random(1, 3, 20, 20).float()
    masks = torch.zeros(1, 4, 1, 20, 20)
    masks[0, 0, 0, 2:9, 3:11] = 0.9
    masks[0, 1, 0, 2:10, 3:11] = 0.8
    masks[0, 3, 0, 12:18, 13:19] = 0.7
    scores = torch.tensor([[1.0, 3.0, 9.0, 2.0]])
    picture, kept = plotting.plot_bb_on_image_batch_from_masks_nms(masks, images, scores)
    assert [indices.tolist() for indices in kept] == [[1, 3]]  # 0 is suppressed, 2 has no mask
    colors = plotting.particle_colors(4)
    expected = outline([13, 12, 18, 17], colors[3], outline([3, 2, 10, 9], colors[1], images[0]))
    assert torch.equal(picture[0], expected)
    dropped, kept = plotting.plot_bb_on_image_batch_from_masks_nms(masks, images, scores, hard_thresh=4.0)
    assert torch.equal(dropped, images) and len(kept[0]) == 0


def test_boxes_in_images_that_are_not_square():
    z, z_scale = 2 * random(7, 2) - 1, 4 * random(7, 2, seed=1) - 3
    boxes = util_func.get_bb_from_z_scale(z, z_scale, 50, 30)
    across, down = (plain_boxes(z[None], torch.sigmoid(z_scale)[None], side)[0] for side in (50, 30))
    assert torch.equal(boxes, torch.stack([across[:, 0], down[:, 1], across[:, 2], down[:, 3]], dim=-1))
    assert torch.equal(util_func.get_bb_from_z_scale(z, torch.sigmoid(z_scale), 50, 30, scale_normalized=True), boxes)


def test_mask_boxes_in_an_image_of_another_size():
    masks = (random(2, 3, 1, 8, 10) > 0.95).double()
    masks[1, 2] = 0
    boxes = util_func.get_bb_from_masks_batch(masks, 30, 12)
    for b in range(2):
        for k in range(3):
            ys, xs = np.nonzero(masks[b, k, 0].numpy())
            corners = (xs.min() * 3, ys.min() * 1.5, xs.max() * 3, ys.max() * 1.5) if len(ys) else (0, 0, 0, 0)
            assert boxes[b, k].tolist() == [int(corner) for corner in corners]


def test_boxes_and_dots_of_one_image_are_those_of_a_batch():
    images, output = random(2, 3, 32, 32), model_output(n=2)
    z, z_scale, masks, scores = output["z_base"], output["z_scale"], output["alpha_masks"], random(2, 4)
    singles = [
        util_func.plot_bb_on_image_from_z_scale_nms(z[1], z_scale[1], images[1], scores[1], hard_thresh=0.2),
        util_func.plot_bb_on_image_from_masks_nms(masks[1], images[1], scores[1], hard_thresh=0.2),
        (util_func.plot_keypoints_on_image(z[1], images[1], radius=2, kp_range=(-1, 1)), torch.arange(4)),
    ]
    batches = [
        util_func.plot_bb_on_image_batch_from_z_scale_nms(z, z_scale, images, scores, hard_thresh=0.2),
        util_func.plot_bb_on_image_batch_from_masks_nms(masks, images, scores, hard_thresh=0.2),
        (
            util_func.plot_keypoints_on_image_batch(z, images, radius=2, kp_range=(-1, 1), plot_numbers=True),
            [None, torch.arange(4)],
        ),
    ]
    for (picture, kept), (pictures, kept_in_batch) in zip(singles, batches, strict=True):
        assert picture.dtype == np.uint8 and picture.shape == (32, 32, 3) and picture.flags.c_contiguous
        assert np.array_equal(picture, np.rint(pictures[1].permute(1, 2, 0).numpy() * 255))
        assert len(kept) > 0 and torch.equal(kept, kept_in_batch[1])


# Keypoints


@pytest.mark.parametrize("kp_range", [(0, 1), (-1, 1)])
def test_dots_are_at_the_corners_and_the_centre(kp_range):
    low, high = kp_range
    places = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.5, 0.5]])
    images = torch.full((1, 3, 21, 31), 0.5)
    picture = plotting.plot_keypoints_on_image_batch(low + places[None] * (high - low), images, kp_range=kp_range)[0]
    colors = plotting.particle_colors(4)
    for k, (y, x) in enumerate([(0, 0), (0, 30), (20, 0), (10, 15)]):
        assert torch.equal(picture[:, y, x], colors[k])
    # A dot of radius 1 is a plus sign: 3 pixels in a corner, 5 in the middle.
    assert (picture != 0.5).any(0).sum() == 3 + 3 + 3 + 5


def test_particles_off_the_image_are_not_drawn():
    images = random(1, 3, 16, 16).float()
    points = torch.tensor([[[-0.5, 0.5], [0.5, 1.7], [float("nan"), 0.5], [1e30, 0.0]]])
    assert torch.equal(plotting.plot_keypoints_on_image_batch(points, images, radius=2), images)


def test_large_dots_have_a_black_rim():
    picture = plotting.plot_keypoints_on_image_batch(torch.full((1, 1, 2), 0.5), torch.ones(1, 3, 41, 41), radius=4)[0]
    assert torch.equal(picture[:, 20, 24], plotting.particle_colors(1)[0])
    assert torch.equal(picture[:, 20, 25], torch.zeros(3))
    assert torch.equal(picture[:, 20, 26], torch.ones(3))


def test_at_most_max_imgs_are_drawn():
    images = random(10, 3, 8, 8)
    assert len(plotting.plot_keypoints_on_image_batch(torch.zeros(10, 1, 2), images)) == 8
    assert len(plotting.plot_keypoints_on_image_batch(torch.zeros(10, 1, 2), images, max_imgs=3)) == 3


def test_numbers_are_written_beside_the_dots():
    points = torch.tensor([[[0.5, 0.5], [0.0, 1.0]]])
    images = torch.full((1, 3, 128, 128), 0.5)
    plain, numbered = (
        plotting.plot_keypoints_on_image_batch(points, images, plot_numbers=flag) for flag in (False, True)
    )
    changed = (plain != numbered)[0].any(0).nonzero()
    near_centre = ((changed - 64).abs() < 20).all(-1)
    near_corner = (changed[:, 0] < 20) & (changed[:, 1] > 128 - 20)
    assert near_centre.sum() > 20 and near_corner.sum() > 20
    assert (near_centre | near_corner).all()


def test_numbers_of_particles_at_one_place_stand_beside_each_other():
    assert plotting.at_one_place([(0, 0), (9, 9), (3, -3), (4, 0), (5, 9)], 4) == [[0, 2], [1], [3], [4]]

    def written(points):
        """The columns in which something is written."""
        images = torch.zeros(1, 3, 128, 128)
        plain, numbered = (
            plotting.plot_keypoints_on_image_batch(points, images, radius=3, plot_numbers=flag)
            for flag in (False, True)
        )
        return (plain != numbered)[0].any(0).any(0).nonzero()[:, 0]

    one, three = written(torch.tensor([[[0.5, 0.4]]])), written(torch.tensor([[[0.5, 0.4], [0.51, 0.41], [0.5, 0.4]]]))
    assert len(three) > 2.5 * len(one) and three.min() == one.min()


# Glimpses and masks


def test_glimpses_are_stacked_in_pairs():
    cropped, decoded = random(3, 3, 64, 64), random(3, 3, 64, 64, seed=1)
    picture = plotting.plot_glimpses(cropped, decoded, columns=2)
    # Tiles of 64 x 129 (two glimpses and a line), 4 pixels apart.
    assert picture.shape == (3, 4 + 2 * (129 + 4), 4 + 2 * (64 + 4))
    assert torch.equal(picture[:, 4:68, 72:136], cropped[1].float())
    assert torch.equal(picture[:, 69:133, 72:136], decoded[1].float())
    assert torch.equal(picture[:, 137:201, 4:68], cropped[2].float())
    assert (picture[:, :, 68:72] == 1).all() and (picture[:, 137:, 72:] == 1).all()


def test_small_glimpses_are_enlarged():
    cropped, decoded = random(2, 3, 8, 8), random(2, 3, 8, 8, seed=1)
    picture = plotting.plot_glimpses(cropped, decoded)
    assert torch.equal(picture[:, 69:133, 72:136], enlarge(decoded[1:], 8)[0])


@pytest.mark.parametrize("name", ["folder", "folder/picture.png"])
def test_glimpses_are_shown_with_their_transparency(name, tmp_path):
    glimpses = random(10, 4, 64, 64)
    (tmp_path / "folder").mkdir()
    util_func.plot_glimpse_obj_on(glimpses, torch.linspace(0, 1, 10)[:, None], str(tmp_path / name))
    (path,) = (tmp_path / "folder").iterdir()
    picture = iio.imread(path)
    assert picture.shape == (4 + 2 * (64 + 22 + 4), 4 + 8 * (64 + 4), 3)  # rows of eight, text below each
    for k, (row, column) in {1: (0, 1), 9: (1, 1)}.items():
        y, x = 4 + row * 90, 4 + column * 68
        colours = np.rint(glimpses[k, 1:].permute(1, 2, 0).numpy() * 255)
        assert np.abs(picture[y : y + 64, x : x + 64] - colours).max() <= 1
        assert (picture[y + 64 : y + 86, x : x + 64] < 100).any()
    # 0.00 and 1.00 are written in different pixels.
    assert not np.array_equal(picture[68:90, 4:68], picture[158:180, 72:136])


def test_segmentation_has_each_particles_color_over_grey():
    masks = torch.zeros(1, 2, 1, 10, 10)
    masks[0, 0, 0, :4] = 1.0
    masks[0, 1, 0, 6:] = 0.5
    colors = plotting.particle_colors(2)
    black = plotting.plot_segmentation(masks)[0]
    assert torch.allclose(black[:, 2, 2], colors[0])
    assert torch.allclose(black[:, 8, 2], 0.5 * colors[1])
    assert (black[:, 4:6] == 0).all()
    image = torch.tensor([0.2, 0.4, 0.8])[None, :, None, None].expand(1, 3, 10, 10)
    grey = 0.5 * (0.299 * 0.2 + 0.587 * 0.4 + 0.114 * 0.8)
    picture = plotting.plot_segmentation(masks, image)[0]
    assert torch.allclose(picture[:, 2, 2], colors[0])
    assert torch.allclose(picture[:, 5, 2], torch.full((3,), grey))
    assert torch.allclose(picture[:, 8, 2], 0.5 * colors[1] + 0.5 * grey)


def test_segmentation_shares_pixels_of_overlapping_masks():
    picture = plotting.plot_segmentation(torch.ones(1, 2, 1, 4, 4), torch.ones(1, 3, 4, 4))
    expected = plotting.particle_colors(2).mean(0)[None, :, None, None].expand(1, 3, 4, 4)
    assert torch.allclose(picture, expected)


# The figure grid


def grid_tiles(picture, rows, columns, side):
    """The tiles [row][column] of a grid with separators of 2 pixels and a margin at the left."""
    left = picture.shape[-1] - columns * (side + 2)
    step = side + 2
    return [
        [
            picture[:, 2 + r * step : 2 + r * step + side, left + c * step : left + c * step + side]
            for c in range(columns)
        ]
        for r in range(rows)
    ]


def test_grid_shows_the_nine_rows_in_order():
    images, output = random(3, 3, 32, 32), model_output()
    picture = plotting.figure_grid(images, output, topk=2, iou_thresh=0.2, columns=2)
    assert picture.shape[1] == 2 + 9 * 130
    tiles = grid_tiles(picture, 9, 2, 128)
    for row, expected in ((0, images), (2, output["rec"]), (5, output["dec_objects"]), (8, output["bg"])):
        assert torch.equal(torch.stack(tiles[row]), enlarge(expected[:2], 4))
    z = output["z_base"] + output["mu_offset"]
    for row, points in ((1, z), (3, output["kp_p"])):
        drawn = plotting.plot_keypoints_on_image_batch(points, enlarge(images, 4), radius=2, kp_range=(-1, 1))
        assert torch.equal(torch.stack(tiles[row]), drawn[:2])
    left = picture.shape[-1] - 2 * 130
    assert (picture[:, :, left - 2 : left] == 1).all() and (picture[:, 130:132] == 1).all()
    margin = picture[:, :, : left - 2]
    for row in range(9):
        assert margin[:, 2 + row * 130 : 130 + row * 130].min() < 0.2


def test_rows_of_images_get_names_and_titles():
    colors, greys = random(2, 3, 64, 64), random(2, 1, 64, 64)
    bare = plotting.labelled_grid({"colors": colors, "greys": greys})
    assert bare.shape[1] == 2 + 2 * 130
    tiles = grid_tiles(bare, 2, 2, 128)
    for row, images in enumerate((colors, greys.expand(-1, 3, -1, -1))):
        assert torch.equal(torch.stack(tiles[row]), enlarge(images, 2))
    titled = plotting.labelled_grid({"colors": colors, "greys": greys}, ["t = 0", "t = 1"])
    heading = titled.shape[1] - bare.shape[1]
    assert torch.equal(titled[:, heading:], bare)
    strip, left = titled[:, :heading], bare.shape[-1] - 2 * 130
    assert (strip[:, :, :left] == 1).all()
    for column in range(2):  # one text per column, within it
        assert strip[:, :, left + column * 130 :][:, :, :128].min() < 0.2
    alone = plotting.labelled_grid({"greys": greys[:1]}, ["t = 0"])
    assert torch.equal(alone[:, -130:-2, -130:-2], enlarge(greys[:1], 2)[0].expand(3, -1, -1))
    with pytest.raises(ValueError, match="1 titles for 2 columns"):
        plotting.labelled_grid({"colors": colors}, ["t = 0"])


def test_top_row_keeps_the_surest_particles_in_their_colors():
    images, output = torch.full((1, 3, 32, 32), 0.5), model_output(n=1, k=4)
    output["z_base"] = torch.tensor([[[-0.6, -0.6], [-0.6, 0.6], [0.6, -0.6], [0.6, 0.6]]])
    output["mu_offset"] = torch.zeros(1, 4, 2)
    output["logvar_offset"] = torch.tensor([[[-1.0, -1.0], [-9.0, -9.0], [-3.0, -2.0], [-5.0, -5.0]]])
    output["obj_on"] = torch.tensor([[1.0, 0.1, 1.0, 1.0]])
    rows = plotting.figure_rows(images, output, topk=2, iou_thresh=0.2)
    picture, colors = rows["top 2"][0], plotting.particle_colors(4)
    pixels = [round((p + 1) / 2 * 127) for p in (-0.6, 0.6)]
    assert torch.equal(picture[:, pixels[1], pixels[1]], colors[3])
    assert torch.equal(picture[:, pixels[1], pixels[0]], colors[2])
    assert (picture[:, :64] == 0.5).all()
    everything = plotting.figure_rows(images, output, topk=99, iou_thresh=0.2)
    assert torch.equal(everything["top 4"], everything["posterior"])


def test_box_rows_follow_the_rule_in_the_models_pixels():
    images, output = random(3, 3, 32, 32), model_output()
    scores = plotting.confidence(output["logvar_offset"], output["obj_on"])
    output["alpha_masks"][0, scores[0].argmax()] = 0  # the surest particle of the first image paints nothing
    rows = plotting.figure_rows(images, output, topk=2, iou_thresh=0.05)
    z = output["z_base"] + output["mu_offset"]
    scale_boxes = plain_boxes(z, torch.sigmoid(output["z_scale"]), 32)
    mask_boxes, present = plotting.boxes_from_masks(output["alpha_masks"])
    drawn = 0
    for name, boxes, possible in (
        ("boxes (scale)", scale_boxes, torch.ones_like(present)),
        ("boxes (masks)", mask_boxes, present),
    ):
        for b in range(3):
            expected = enlarge(images[b : b + 1], 4)[0]
            candidates = possible[b].nonzero()[:, 0].tolist()
            chosen = plain_selection(boxes[b, candidates].tolist(), scores[b, candidates].tolist(), 0.05, 2.0)
            for k in sorted(candidates[i] for i in chosen):
                x1, y1, x2, y2 = boxes[b, k].tolist()
                corners = [4 * x1, 4 * y1, 4 * x2 + 3, 4 * y2 + 3]
                expected = outline(corners, plotting.particle_colors(4)[k], expected)
                drawn += 1
            assert torch.equal(rows[name][b], expected)
    assert 6 <= drawn < 24


def test_grid_places_positions_of_any_range_alike():
    images, output = random(2, 3, 64, 64), model_output(n=2, side=64)
    unit = {key: value.clone() for key, value in output.items()}
    unit["z_base"] = (output["z_base"] + 1) / 2
    unit["mu_offset"] = output["mu_offset"] / 2
    unit["kp_p"] = (output["kp_p"] + 1) / 2
    expected = plotting.figure_grid(images, output, 3, 0.2)
    assert torch.equal(plotting.figure_grid(images, unit, 3, 0.2, kp_range=(0, 1)), expected)


@pytest.mark.parametrize(("side", "shown"), [(32, 128), (64, 128), (100, 200), (128, 128)])
def test_small_images_are_enlarged_by_a_whole_factor(side, shown):
    rows = plotting.figure_rows(random(1, 3, side, side), model_output(n=1, side=side), 2, 0.2)
    assert {tuple(row.shape) for row in rows.values()} == {(1, 3, shown, shown)}


def test_inputs_keep_their_values_and_may_carry_gradients():
    images = random(3, 3, 32, 32).float().requires_grad_()
    output = {key: value.float().requires_grad_() for key, value in model_output().items()}
    before = [tensor.detach().clone() for tensor in (images, *output.values())]
    picture = plotting.figure_grid(images, output, topk=3, iou_thresh=0.2)
    z, masks = output["z_base"], output["alpha_masks"]
    drawn = [
        picture,
        plotting.plot_keypoints_on_image_batch(z, images, kp_range=(-1, 1)),
        plotting.plot_bb_on_image_batch_from_z_scale_nms(z, output["z_scale"], images, output["obj_on"])[0],
        plotting.plot_bb_on_image_batch_from_masks_nms(masks, images, output["obj_on"])[0],
        plotting.plot_segmentation(masks, images),
        plotting.plot_glimpses(images, output["rec"]),
    ]
    for tensor in drawn:
        assert tensor.dtype == torch.float32 and not tensor.requires_grad
        tensor.zero_()
    for tensor, value in zip((images, *output.values()), before, strict=True):
        assert torch.equal(tensor, value)


def test_images_with_channels_last_are_not_drawn_on():
    images = random(2, 3, 32, 32).float().contiguous(memory_format=torch.channels_last)
    before = images.clone()
    picture = plotting.plot_keypoints_on_image_batch(torch.full((2, 1, 2), 0.5), images, radius=3)
    assert torch.equal(images, before) and not torch.equal(picture, before)


# Models


def test_a_models_size():
    model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.BatchNorm1d(5).double())
    model[0].bias.requires_grad_(False)
    expected = {"n_params": 35 + 10, "size_mb": ((35 + 5) * 4 + (10 + 10 + 1) * 8) / 1024**2}
    assert util_func.calc_model_size(model) == pytest.approx(expected)
    model.append(model[0])
    assert util_func.calc_model_size(model) == pytest.approx(expected)


# Files


def test_png_keeps_pixels_and_jpeg_is_close(tmp_path):
    image = torch.nn.functional.interpolate(random(1, 3, 6, 8), scale_factor=8, mode="bilinear")[0]
    plotting.save_image(image, tmp_path / "a.png")
    expected = (image * 255).round().permute(1, 2, 0).numpy()
    assert np.array_equal(iio.imread(tmp_path / "a.png"), expected)
    plotting.save_image(image * 3 - 1, tmp_path / "clamped.png")
    assert np.array_equal(
        iio.imread(tmp_path / "clamped.png"), ((image * 3 - 1).clamp(0, 1) * 255).round().permute(1, 2, 0)
    )
    plotting.save_image(image, str(tmp_path / "a.jpg"))
    assert np.abs(iio.imread(tmp_path / "a.jpg").astype(float) - expected).mean() < 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jpg", "a.png", "clamped.png"]


def test_thin_colored_lines_survive_jpeg(tmp_path):
    image = torch.zeros(3, 32, 32)
    image[0, 15] = 1.0
    plotting.save_image(image, tmp_path / "line.jpg")
    line = iio.imread(tmp_path / "line.jpg")[15].mean(0)
    assert line[0] > 240 and line[1:].max() < 15


def test_other_endings_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"figure\.gif.*\.jpg, \.jpeg, \.png"):
        plotting.save_image(torch.zeros(3, 4, 4), tmp_path / "figure.gif")


def test_an_interrupted_write_leaves_the_old_image(tmp_path, monkeypatch):
    plotting.save_image(torch.ones(3, 8, 8), tmp_path / "figure.png")
    before = (tmp_path / "figure.png").read_bytes()

    def half_a_file(path, *_args, **_options):
        Path(path).write_bytes(before[:20])
        raise OSError("disk full")

    monkeypatch.setattr(plotting.iio, "imwrite", half_a_file)
    with pytest.raises(UserError, match=r"figure.png: cannot be written: disk full"):
        plotting.save_image(torch.zeros(3, 8, 8), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes() == before


def test_loss_graph_is_written_with_values_missing(tmp_path):
    records = [{"epoch": epoch, "loss": 1000 * 0.8**epoch, "loss_rec": 2.0 + epoch} for epoch in range(20)]
    records[3]["loss"] = float("nan")
    records[4]["loss"] = None
    records[5].update(val_loss=3.0, kl=1.0, kl_dyn=float("inf"))
    records.append({"loss": 1.0})
    plotting.save_image(plotting.loss_graph(records), tmp_path / "run_graph.jpg")
    written = iio.imread(tmp_path / "run_graph.jpg")
    assert written.shape == (800, 1200, 3)
    expected = plotting.loss_graph(records).permute(1, 2, 0).numpy() * 255
    assert np.abs(written - expected).mean() < 2
    assert plotting.loss_graph([]).shape == (3, 800, 1200)


def test_an_odd_number_of_panels_leaves_the_last_place_empty():
    picture = plotting.loss_graph([{"epoch": 0, "loss": 1.0}, {"epoch": 1, "loss": 0.5}], {"loss": ("loss",)})
    assert picture.shape == (3, 400, 1200)
    left, right = picture[:, :, :560], picture[:, :, 640:]
    assert left.min() < 0.5 and (right == 1).all()


def test_a_loss_graph_shows_only_what_is_there():
    base = [{"epoch": epoch, "loss": 1.0 + epoch} for epoch in range(5)]
    with_gap = [*base[:2], {"epoch": 2, "loss": float("nan"), "kl": None}, *base[3:]]
    assert torch.equal(plotting.loss_graph(with_gap), plotting.loss_graph([*base[:2], *base[3:]]))
    graph = plotting.loss_graph([*base[:4], {**base[4], "val_loss": 2.0}])
    line_color = torch.tensor([31, 119, 180])[:, None, None]  # the first of matplotlib's colour cycle
    line = ((graph * 255).round() == line_color).all(0)
    assert line[:400, :600].sum() > 200 and line[400:, 600:].sum() > 5
    assert not line[:400, 600:].any() and not line[400:, :600].any()


@pytest.mark.parametrize(("last", "scale"), [(15.0, "linear"), (1000.0, "log"), (-1000.0, "linear")])
def test_wide_ranges_get_a_logarithmic_axis(last, scale):
    axes = plotting.Figure().subplots()
    plotting._draw_curves(axes, "loss", {"loss": [(0, 1.0), (1, last)]})
    assert axes.get_yscale() == scale and axes.get_xlabel() == "epoch" and axes.get_ylabel() == "loss"
    assert axes.lines[0].get_xydata().tolist() == [[0, 1], [1, last]]


def test_segmentation_grid_has_images_over_segmentations():
    images, masks = torch.rand(2, 3, 64, 64), torch.rand(2, 3, 1, 64, 64)
    grid = plotting.segmentation_grid(images, masks)
    assert grid.shape == (3, 2 * 128 + 12, 2 * 128 + 12)
    top = grid[:, 4:132, 136:264]
    bottom = grid[:, 136:264, 136:264]
    assert torch.equal(top[:, ::2, 1::2], images[1])
    assert torch.equal(bottom[:, 1::2, ::2], plotting.plot_segmentation(masks, images)[1])
    assert (grid[:, :4] == 1).all() and (grid[:, :, 132:136] == 1).all()


@pytest.mark.parametrize("origin", [(30, 40), (-8, 10), (110, 3), (300, 300)])
def test_text_is_blended_where_it_is(origin):
    canvas = random(60, 120, 3).float().numpy()
    before, color = canvas.copy(), np.array([0.2, 0.5, 0.9], np.float32)
    plotting.draw_text(canvas, "Wg,12", origin, 0.7, color, thickness=3)
    stencil = np.zeros((60, 120), np.uint8)
    cv2.putText(stencil, "Wg,12", origin, cv2.FONT_HERSHEY_SIMPLEX, 0.7, 255, 3, cv2.LINE_AA)
    weight = stencil[..., None].astype(np.float32) / 255
    np.testing.assert_array_equal(canvas, before * (1 - weight) + color * weight)
