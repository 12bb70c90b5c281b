"""What the workers do: decoding, playing, exporting. Nothing of tkinter."""

import torch

from editor.pictures import to_bytes
from utils.animation import save_animation, side_by_side
from utils.plotting import enlarge, save_image, zoom_factor
from what_if import CANVAS, compare, comparison_panels, draw_particles


@torch.no_grad()
def decode(scene, particles):
    """The picture of one frame's `Particles` [1, ...], uint8 [H, W, 3], and the decoded glimpses [K, 4, g, g]."""
    drawn = scene.loaded.model.decode_all(
        particles.z,
        particles.z_features,
        particles.z_bg,
        particles.obj_on,
        particles.z_depth,
        z_scale=particles.z_scale,
    )
    return to_bytes(drawn["rec"][0]), drawn["dec_objects"][0].cpu()


@torch.no_grad()
def decode_line(scene, line):
    """The pictures of `Particles` [n, ...], a list."""
    return [to_bytes(image) for image in scene.loaded.model.render(line.map(lambda x: x[None]))[0]]


def play(scene, edits, report):
    """The `Comparison`, on the CPU, of a scene with its edited self."""
    compared = compare(scene.loaded.model, scene.particles, edits, scene.horizon, report=report)
    compared.video, compared.altered_video = compared.video.cpu(), compared.altered_video.cpu()
    compared.particles = compared.particles.map(torch.Tensor.cpu)
    compared.altered_particles = compared.altered_particles.map(torch.Tensor.cpu)
    return compared


@torch.no_grad()
def export_picture(scene, particles, has_handles, path):
    """Write the picture of `Particles` [1, ...], with numbered particles if wanted. Returns the path."""
    image = scene.loaded.model.render(particles.map(lambda x: x[None]))[0].cpu()
    if has_handles:
        image = draw_particles(image, particles.map(torch.Tensor.cpu))
    else:
        image = enlarge(image, zoom_factor(image, CANVAS))
    save_image(image[0], path)
    return path


def export_animation(scene, compared, path):
    """Write both predictions, and what was recorded, side by side. Returns the path."""
    panels = comparison_panels(compared, scene.frames, scene.num_frames)
    save_animation(side_by_side(panels), path, scene.loaded.config.animation_fps)
    return path
