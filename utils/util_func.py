"""The release's import path: what its users import from here."""

from modules.particles import reparameterize
from modules.spatial import create_masks_fast, generate_correlation_maps, spatial_transform
from rundir.run import get_config, log_line, prepare_logdir, save_config
from utils.animation import animate_trajectories
from utils.checkpoints import calc_model_size
from utils.plotting import (
    color_map,
    get_bb_from_masks_batch,
    get_bb_from_z_scale,
    plot_bb_on_image_batch_from_masks_nms,
    plot_bb_on_image_batch_from_z_scale_nms,
    plot_bb_on_image_from_masks_nms,
    plot_bb_on_image_from_z_scale_nms,
    plot_glimpse_obj_on,
    plot_keypoints_on_image,
    plot_keypoints_on_image_batch,
)

__all__ = [
    "animate_trajectories",
    "calc_model_size",
    "color_map",
    "create_masks_fast",
    "generate_correlation_maps",
    "get_bb_from_masks_batch",
    "get_bb_from_z_scale",
    "get_config",
    "log_line",
    "plot_bb_on_image_batch_from_masks_nms",
    "plot_bb_on_image_batch_from_z_scale_nms",
    "plot_bb_on_image_from_masks_nms",
    "plot_bb_on_image_from_z_scale_nms",
    "plot_glimpse_obj_on",
    "plot_keypoints_on_image",
    "plot_keypoints_on_image_batch",
    "prepare_logdir",
    "reparameterize",
    "save_config",
    "spatial_transform",
]
