"""A folder of one's own videos: decoding, splits, lengths, bad files, and the way from it to a prediction."""

import json
import os
import re
import shutil
import subprocess
import threading
import warnings
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from imageio_ffmpeg import get_ffmpeg_exe
from PIL import Image

import generate_ddlp_video_prediction
import train_ddlp
from configs import generate_config_file
from configs.schema import Config
from datasets import frame_cache, get_dataset, video_files, video_folder_ds
from datasets.get_dataset import get_image_dataset, get_video_dataset, image_dataset, video_dataset
from datasets.video_files import IMAGES, VIDEO_ENDINGS, FrameFolder, VideoFile, natural_order
from datasets.video_folder_ds import VideoFolderImages, VideoFolderVideos, find_splits, split_by_name
from rundir.run import Run
from tests.balls import SMALL, run_in
from tests.frames import assert_item
from utils.errors import UserError
from utils.tone_mapping import TRANSFERS, WIDE, to_standard_range

PAGE = Path(__file__).resolve().parents[1] / "docs" / "custom_dataset.md"
WIDTH, HEIGHT = 20, 16
LOSSLESS = {
    ".mp4": ["-c:v", "libx264rgb", "-qp", "0"],
    ".mov": ["-c:v", "png"],
    ".avi": ["-c:v", "png"],
    ".mkv": ["-c:v", "ffv1", "-pix_fmt", "bgr0"],
}
LOSSY = ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-g", "8", "-bf", "3"]  # few key frames, frames out of order


def random_frames(number, seed=0, width=WIDTH, height=HEIGHT):
    return np.random.default_rng(seed).integers(0, 256, (number, height, width, 3), np.uint8)


def smooth_frames(number, width=32, height=32):
    """What lossy codecs keep well: a square that moves over grey."""
    frames = np.full((number, height, width, 3), 90, np.uint8)
    for t in range(number):
        frames[t, 8:20, (t % 20) : (t % 20) + 10] = (200, 120, 60 + 5 * (t % 20))
    return frames


def ffmpeg(*arguments, data=None):
    subprocess.run([get_ffmpeg_exe(), "-v", "error", "-y", *map(str, arguments)], input=data, check=True)


def write_file(path, frames, options=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    size = f"{frames.shape[2]}x{frames.shape[1]}"
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", size, "-r", "25", "-i", "-"]
    ffmpeg(*raw, *(options or LOSSLESS[path.suffix.lower()]), path, data=frames.tobytes())
    return path


def write_gif(path, frames):
    """The first channel alone, as grey, which a palette holds without loss."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [Image.fromarray(frame[..., 0]) for frame in frames]
    images[0].save(path, save_all=True, append_images=images[1:], duration=40)


def write_folder(folder, frames, ending=".png"):
    folder.mkdir(parents=True, exist_ok=True)
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"frame_{number}{ending}")


def write_parts(root, lengths=(4, 4, 4), size=8):
    """A video, a folder of frames, in each of train, val and test."""
    for seed, (split, length) in enumerate(zip(("train", "val", "test"), lengths, strict=True)):
        write_folder(root / split / "video", random_frames(length, seed, size, size))
    return root


def expected_video(frames, size):
    """The middle square, resized, in 0..1: [T, 3, size, size]."""
    height, width = frames.shape[1:3]
    side = min(height, width)
    box = ((width - side) // 2, (height - side) // 2, (width + side) // 2, (height + side) // 2)
    shown = [Image.fromarray(frame).crop(box) for frame in frames]
    if side != size:
        shown = [image.resize((size, size), Image.Resampling.BICUBIC) for image in shown]
    return np.stack([np.array(image) for image in shown]).transpose(0, 3, 1, 2) / 255


def names_of(root, mode="train"):
    return list(find_splits(root)[mode])


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(video_folder_ds, "_counted", {})
    return tmp_path / "videos"


# ---- formats


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("size", [HEIGHT, 8, 24])
def test_every_format(root, size, cache):
    frames = {f"v{ending}": random_frames(5, seed) for seed, ending in enumerate((*LOSSLESS, ".gif"))}
    frames["w.MP4"] = random_frames(7, 8, 18, 26)  # upright, and of another length
    frames["x"], frames["y"] = random_frames(6, 9, 31, 8), random_frames(5, 10, 9, 9)
    frames["v.gif"][..., 1:] = frames["v.gif"][..., :1]
    for name, video in frames.items():
        path = root / "val" / name
        if not path.suffix:
            write_folder(path, video, ".png" if name == "x" else ".jpg")
        else:
            (write_gif if path.suffix == ".gif" else write_file)(path, video)
    for number in range(5):
        with Image.open(root / "val" / "y" / f"frame_{number}.jpg") as image:
            frames["y"][number] = np.array(image)
    for split in ("train", "test"):
        write_folder(root / split / "a", random_frames(5))
    dataset = get_video_dataset("video_folder", str(root), 4, "valid", size, cache=cache)
    assert len(dataset) == len(frames)
    for item, name in zip(dataset, sorted(frames, key=natural_order), strict=False):
        assert_item(item, expected_video(frames[name], size))
    images = VideoFolderImages(root, "val", size, 1, cache=cache)
    assert len(images) == sum(map(len, frames.values()))
    assert_item(images[3], expected_video(frames["v.avi"], size)[3])
    assert (root / ".cache").exists() == cache


@pytest.mark.parametrize("options", [LOSSY, [*LOSSY, "-vf", "select='lt(n,9)+gt(n,14)*mod(n,2)',setpts=N*N"]])
def test_windows_of_a_lossy_video_are_those_of_decoding_it_in_order(root, options):
    """Key frames that are rare, frames stored out of order, a rate that varies: as OpenCV has them, one by one."""
    path = write_file(root / "train" / "a.mp4", smooth_frames(30), [*options, "-fps_mode", "passthrough"])
    for split in ("val", "test"):
        write_folder(root / split / "a", random_frames(3))
    capture, frames = cv2.VideoCapture(str(path)), []
    while (read := capture.read())[0]:
        frames.append(read[1][..., ::-1])
    expected = np.stack(frames).transpose(0, 3, 1, 2) / 255
    assert len(frames) == (30 if options is LOSSY else 17)
    for cache in (True, False):
        dataset = VideoFolderVideos(root, "train", 32, 3, cache=cache)
        assert len(dataset) == len(frames) - 2
        for index in (11, 3, 0, len(dataset) - 1):
            error = np.abs(dataset[index][0].numpy() - expected[index : index + 3])
            assert error.max() < 0.04 < np.abs(expected[index] - expected[index + 1]).max()


@pytest.mark.parametrize(
    ("options", "turned"),
    [
        (["-display_rotation", "90"], lambda frames: np.rot90(frames, 1, (1, 2))),
        (["-display_rotation", "270"], lambda frames: np.rot90(frames, 3, (1, 2))),
        (["-display_rotation", "180"], lambda frames: frames[:, ::-1, ::-1]),
        (["-display_hflip"], lambda frames: frames[:, :, ::-1]),
        (["-display_rotation", "90", "-display_vflip"], lambda frames: np.rot90(frames, 1, (1, 2))[:, ::-1]),
    ],
)
def test_a_turned_video_is_turned_upright(root, options, turned):
    frames = random_frames(3)
    write_file(root / "plain.mp4", frames)
    ffmpeg(*options, "-i", root / "plain.mp4", "-c", "copy", root / "turned.mp4")
    shape, shown = read_video(root / "turned.mp4")
    assert (shape.height, shape.width) == turned(frames).shape[1:3]
    np.testing.assert_array_equal(shown, turned(frames))


def read_video(path):
    """The shape and all frames, uint8 [T, H, W, 3]; read in one go."""
    video = VideoFile(path)
    shape = video.probe()
    return shape, np.stack(list(video.frames(0, shape.length)))


@pytest.mark.parametrize(("ratio", "width", "height"), [("2/1", 64, 32), ("1/2", 32, 64), ("16/15", 34, 32)])
def test_pixels_become_square(root, ratio, width, height):
    frames = smooth_frames(3)
    write_file(root / "a.mp4", frames, [*LOSSY, "-vf", f"setsar={ratio}"])
    shape, shown = read_video(root / "a.mp4")
    assert (shape.width, shape.height) == (width, height)
    expected = np.stack([np.asarray(Image.fromarray(frame).resize((width, height))) for frame in frames])
    assert shown.shape == expected.shape and np.abs(shown.astype(float) - expected).mean() < 6


def test_frames_that_decode_are_taken(root):
    """A video that was trimmed without encoding it anew, as ffmpeg's command has its frames."""
    path = Path(__file__).parent / "data" / "trimmed_without_reencoding.mp4"
    with pytest.warns(
        UserWarning, match=r"its 62 frames are taken, though the decoder says: mmco: unref short failure$"
    ):
        shape, shown = read_video(path)
    raw = ["-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    command = [get_ffmpeg_exe(), "-v", "fatal", "-i", str(path), *raw]
    expected = np.frombuffer(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout, np.uint8)
    assert (shape.length, shown.shape) == (62, (62, 64, 64, 3))
    assert np.abs(shown - expected.reshape(shown.shape).astype(float)).mean() < 2
    assert_frames_are_found(path)


def assert_frames_are_found(path, points=1):
    """Every frame is the same whether it is sought or reached by decoding from the beginning."""
    video = VideoFile(path)
    shape = video.probe()
    assert len(shape.seek_points) >= points
    shown = list(video.frames(0, shape.length))
    for start in range(shape.length):
        stop = min(start + 3, shape.length)
        np.testing.assert_array_equal(list(video.frames(start, stop, shape.seek_points)), shown[start:stop])


FORMATS = {
    "h264.mp4": [*LOSSY, "-g", "20"],
    "open_gop.mkv": [*LOSSY, "-x264-params", "keyint=20:open-gop=1:scenecut=0"],
    "intra_refresh.mp4": [*LOSSY, "-x264-params", "keyint=20:intra-refresh=1"],
    "hevc.mp4": ["-c:v", "libx265", "-x265-params", "keyint=20:log-level=none"],
    "vp9.webm": ["-c:v", "libvpx-vp9", "-g", "20", "-deadline", "realtime"],
    "mpeg4.avi": ["-c:v", "mpeg4", "-g", "20", "-bf", "2"],
    "late.mov": [*LOSSY, "-g", "20", "-output_ts_offset", "5"],
    "uneven.mkv": [*LOSSY, "-g", "20", "-vf", "setpts=N*N", "-fps_mode", "passthrough"],
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_frame_is_sought_where_it_is(root, name):
    write_file(root / name, smooth_frames(50), FORMATS[name])
    assert_frames_are_found(root / name, points=0 if name == "intra_refresh.mp4" else 1)


def test_reading_late_frames_does_not_decode_from_the_start(root, monkeypatch):
    write_file(root / "a.mp4", smooth_frames(200), [*LOSSY, "-g", "20"])
    video, numbers = VideoFile(root / "a.mp4"), []
    points = video.probe().seek_points
    decoded = video_files._decoded
    monkeypatch.setattr(
        video_files, "_decoded", lambda *args: (numbers.append(frame.pts) or frame for frame in decoded(*args))
    )
    assert len(list(video.frames(190, 193, points))) == 3
    assert len(numbers) < 20


def test_frames_to_the_end_are_decoded_one_by_one(root):
    write_file(root / "a.mp4", smooth_frames(30))
    whole = list(VideoFile(root / "a.mp4").frames(0))
    np.testing.assert_array_equal(whole, smooth_frames(30))
    np.testing.assert_array_equal(list(VideoFile(root / "a.mp4").frames(27)), whole[27:])
    cut_file = write_file(root / "b.mp4", random_frames(40), [*LOSSLESS[".mp4"], "-movflags", "+faststart"])
    cut(cut_file, 0.6)
    frames = VideoFile(cut_file).frames(0)
    np.testing.assert_array_equal([next(frames) for _ in range(10)], random_frames(40)[:10])
    with pytest.raises(UserError, match=r"b\.mp4: cannot be decoded: frame 2\d is damaged"):
        list(frames)


def test_a_seek_point_that_is_none_is_no_harm(root):
    write_file(root / "a.mp4", smooth_frames(50), [*LOSSY, "-g", "20"])
    video = VideoFile(root / "a.mp4")
    expected = list(video.frames(30, 32))
    for points in (((25, 7),), ((25, 10**9),), ((25, video.probe().seek_points[0][1] + 1),)):
        np.testing.assert_array_equal(list(video.frames(30, 32, points)), expected)


def test_a_recording_that_begins_between_key_frames(root):
    """What comes before the first key frame is left out; as players do."""
    write_file(root / "a.mkv", smooth_frames(60), [*LOSSY, "-g", "20", "-f", "mpegts"])
    data = (root / "a.mkv").read_bytes()
    (root / "b.mkv").write_bytes(data[188 * 9 :])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole, part = read_video(root / "a.mkv")[1], read_video(root / "b.mkv")[1]
    assert len(whole) == 60 and 20 < len(part) <= 52
    np.testing.assert_array_equal(part[-30:], whole[-30:])


def hdr_file(path, transfer, signal):
    """A grey video of one colour in 10 bits of BT.2020, `signal` of 1."""
    frames = np.full((2, 32, 32, 3), round(255 * signal), np.uint8)
    tags = f"setparams=color_primaries=bt2020:color_trc={transfer}:colorspace=bt2020nc:range=limited"
    filters = f"scale=out_color_matrix=bt2020:out_range=limited,format=yuv420p10le,{tags}"
    return write_file(path, frames, ["-vf", filters, "-c:v", "libx265", "-x265-params", "log-level=none"])


@pytest.mark.parametrize(
    ("transfer", "signal", "light"),
    # cd/m2 of the signals: BT.2408's reference white, and the formulas of BT.2100
    [("smpte2084", 0.58, 203), ("smpte2084", 0.3, 9.98), ("arib-std-b67", 0.75, 203), ("arib-std-b67", 0.25, 9.63)],
)
def test_hdr_is_tone_mapped(root, transfer, signal, light):
    shown = read_video(hdr_file(root / "a.mov", transfer, signal))[1]
    assert np.ptp(shown) <= 2
    linear = light / 203  # what is darker than 0.3 of white stays as it is
    expected = 255 * (1.055 * linear ** (1 / 2.4) - 0.055) if linear < 0.3 else 211
    assert abs(shown.mean() - expected) < 4


def test_the_tone_curve_is_continuous_and_rises():
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=-1)
    for transfer in (*TRANSFERS, WIDE):
        mapped = to_standard_range(ramp, transfer)[0].astype(int)
        assert (
            (np.diff(mapped[:, 0]) >= 0).all() and np.diff(mapped[:, 0]).max() < 8 and np.ptp(mapped, axis=1).max() <= 1
        )
        assert (mapped[0, 0], mapped[-1, 0]) == (0, 255)


def as_srgb(light):
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def test_wide_colours_that_do_not_say_their_transfer_are_shown_as_players_do(root):
    hdr_file(root / "a.mov", "unknown", 0.5)
    with pytest.warns(UserWarning, match=r"a\.mov: is in the colours of HDR \(BT\.2020\), but names no transfer curve"):
        shown = read_video(root / "a.mov")[1]
    assert abs(shown.mean() - as_srgb(np.float64(0.5) ** 2.4)) < 3


def test_colours_of_bt2020_become_those_of_bt709():
    """By way of CIE XYZ, from the chromaticities of both."""

    def to_xyz(primaries):
        xyz = np.array([[x / y, 1, (1 - x - y) / y] for x, y in primaries]).T
        white = np.array([0.3127 / 0.3290, 1, (1 - 0.3127 - 0.3290) / 0.3290])
        return xyz * np.linalg.solve(xyz, white)

    wide = to_xyz([(0.708, 0.292), (0.170, 0.797), (0.131, 0.046)])
    narrow = to_xyz([(0.640, 0.330), (0.300, 0.600), (0.150, 0.060)])
    pixel = np.array([150, 120, 90], np.uint8)
    light = np.linalg.solve(narrow, wide @ (pixel / 255) ** 2.4)
    np.testing.assert_allclose(to_standard_range(pixel[None, None], WIDE)[0, 0], as_srgb(light), atol=1)
    assert to_standard_range(np.uint8([[[255, 0, 0]]]), WIDE)[0, 0].tolist() == [255, 0, 0]  # clipped


def test_hdr10_that_does_not_name_its_curve_is_pq(root, monkeypatch):
    """It tells of the display that it was made on."""
    hdr_file(root / "a.mov", "unknown", 0.58)
    monkeypatch.setattr(video_files, "_HDR_SIDE_DATA", ("SEI_UNREGISTERED",))  # which x265 writes
    shown = read_video(root / "a.mov")[1]
    assert abs(shown.mean() - 211) < 4


def test_a_video_with_alpha_is_on_black(root):
    frames = np.concatenate([random_frames(2), np.full((2, HEIGHT, WIDTH, 1), 255, np.uint8)], axis=-1)
    frames[:, :5, :, 3] = 0
    frames[:, 5:9, :, 3] = 128
    raw = ["-f", "rawvideo", "-pix_fmt", "rgba", "-s", f"{WIDTH}x{HEIGHT}", "-i", "-"]
    root.mkdir()
    ffmpeg(*raw, "-c:v", "png", root / "a.mov", data=frames.tobytes())
    expected = np.round(frames[..., :3] * (frames[..., 3:] / 255))
    np.testing.assert_array_equal(read_video(root / "a.mov")[1], expected)


def test_a_cover_picture_is_not_the_video(root):
    write_file(root / "plain.mp4", smooth_frames(7))
    Image.fromarray(random_frames(1)[0]).save(root / "cover.png")
    files = ["-i", root / "cover.png", "-i", root / "plain.mp4", "-map", "0", "-map", "1"]
    ffmpeg(*files, "-c", "copy", "-disposition:v:0", "attached_pic", root / "a.mp4")
    np.testing.assert_array_equal(read_video(root / "a.mp4")[1], smooth_frames(7))


def save_gif(path, frames, durations):
    images = [Image.fromarray(frame[..., 0]) for frame in frames]
    path.parent.mkdir(parents=True, exist_ok=True)
    images[0].save(path, save_all=True, append_images=images[1:], duration=durations)


@pytest.mark.parametrize(
    ("durations", "copies"),
    [
        ([240, 40, 40], [6, 1, 1]),
        ([40, 100, 60], [1, 2, 2]),
        ([30, 30, 40], [1, 1, 1]),  # 30 frames a second in hundredths
        ([10, 100, 50], [2, 2, 1]),  # what is shorter than 0.02 s lasts 0.1 s in browsers
        ([0, 0, 0], [1, 1, 1]),
    ],
)
def test_the_frames_of_a_gif_last_as_long_as_they_say(root, durations, copies):
    frames = random_frames(3)
    save_gif(root / "a.gif", frames, durations)
    shape, shown = read_video(root / "a.gif")
    grey = np.repeat(np.repeat(frames[..., :1], 3, axis=-1), copies, axis=0)
    assert shape.length == sum(copies)
    np.testing.assert_array_equal(shown, grey)
    np.testing.assert_array_equal(list(VideoFile(root / "a.gif").frames(1, 3)), grey[1:3])


def test_a_picture_that_is_left_standing_is_no_endless_video(root):
    save_gif(root / "a.gif", random_frames(3), [40, 40, 600_000])
    with pytest.warns(UserWarning, match=r"a\.gif: frame 2 lasts 15000 times as long .* taken as .* 100 times"):
        shape, shown = read_video(root / "a.gif")
    assert shape.length == len(shown) == 102


@pytest.mark.parametrize(
    "change", [lambda data: data + b"more bytes", lambda data: data[:-1], lambda data: data + b"GIF89a"]
)
def test_a_gif_is_read_as_browsers_do(root, change):
    """Bytes after the end, or no mark of the end."""
    write_gif(root / "a.gif", random_frames(4))
    expected = read_video(root / "a.gif")[1]
    (root / "a.gif").write_bytes(change((root / "a.gif").read_bytes()))
    np.testing.assert_array_equal(read_video(root / "a.gif")[1], expected)


def test_a_gif_is_seen_as_it_is_shown(root):
    """Frames that cover a part, transparent pixels, and frames that are taken away again."""
    layers = []
    for t, colour in enumerate(((255, 0, 0, 255), (0, 255, 0, 255), (0, 0, 255, 255))):
        layer = np.zeros((8, 8, 4), np.uint8)
        layer[2 * t : 2 * t + 2, 1:5] = colour
        layers.append(layer)
    root.mkdir()
    first, *others = (Image.fromarray(layer) for layer in layers)
    for name, disposal in (("kept.gif", 1), ("taken.gif", 2), ("other.gif", 2)):
        first.save(root / name, save_all=True, append_images=others, disposal=disposal, duration=40)
    videos = {name: video for part in find_splits(root).values() for name, video in part.items()}
    black = [layer[..., :3] * (layer[..., 3:] > 0) for layer in layers]
    np.testing.assert_array_equal(list(videos["taken.gif"].frames(0, 3)), black)
    np.testing.assert_array_equal(list(videos["taken.gif"].frames(2, 3)), black[2:])
    np.testing.assert_array_equal(list(videos["kept.gif"].frames(0, 3)), np.cumsum(black, axis=0))


def alpha_of(values, opacity):
    return np.concatenate([values, np.full_like(values[..., :1], opacity)], axis=-1)


COLOURS = random_frames(1, 4, 6, 6)[0]
GREY = np.repeat(COLOURS[..., :1], 3, axis=-1)


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [
        (COLOURS[..., 0], GREY),
        (alpha_of(COLOURS, 255), COLOURS),
        (alpha_of(COLOURS, 0), 0 * COLOURS),
        (np.concatenate([COLOURS[..., :1], 0 * COLOURS[..., :1]], axis=-1), 0 * COLOURS),
        (COLOURS[..., 0].astype(np.uint16) * 256 + 77, GREY),
        (COLOURS[..., 0] > 127, np.where(GREY > 127, 255, 0)),
    ],
    ids=["grey", "opaque", "transparent", "grey and alpha", "16 bits", "1 bit"],
)
def test_kinds_of_png(tmp_path, pixels, expected):
    Image.fromarray(pixels).save(tmp_path / "0.png")
    (frame,) = FrameFolder(tmp_path, ("0.png",)).frames(0, 1)
    np.testing.assert_array_equal(frame, expected)


@pytest.mark.parametrize(
    ("ending", "pixels"),
    [(".bmp", COLOURS), (".tif", COLOURS), (".tiff", COLOURS[..., 0].astype(np.uint16) * 256 + 77), (".webp", COLOURS)],
)
def test_other_kinds_of_image(tmp_path, ending, pixels):
    touch(tmp_path, "train/a.mp4", "val/a.mp4", "test/a.mp4", "train/f/x")
    Image.fromarray(pixels).save(
        tmp_path / "train" / "f" / f"0{ending}", **({"lossless": True} if ending == ".webp" else {})
    )
    (tmp_path / "train" / "f" / "x").unlink()
    (frame,) = find_splits(tmp_path)["train"]["train/f"].frames(0, 1)
    np.testing.assert_array_equal(frame, COLOURS if pixels.ndim == 3 else GREY)


@pytest.mark.parametrize("ending", [".png", ".tiff", ".webp"])
def test_an_animation_is_no_frame(tmp_path, ending):
    first, *others = [Image.fromarray(frame) for frame in random_frames(3)]
    first.save(tmp_path / f"0{ending}", save_all=True, append_images=others)
    with pytest.raises(UserError, match=rf"0\{ending}: holds 3 images; legal: one in each file$"):
        FrameFolder(tmp_path, (f"0{ending}",)).probe()


def test_images_of_a_phone_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    Image.fromarray(smooth_frames(1, 24, 32)[0]).save(tmp_path / "0.jpg", exif=exif, quality=95)
    with Image.open(tmp_path / "0.jpg") as image:
        stored = np.array(image)
    folder = FrameFolder(tmp_path, ("0.jpg",))
    assert (folder.probe().width, folder.probe().height) == (32, 24)
    np.testing.assert_array_equal(next(folder.frames(0, 1)), np.rot90(stored, k=-1))


# ---- how bright it is


def dark_frames(seed):
    """Random values of 12 bits in images of 16 bits."""
    return np.random.default_rng(seed).integers(0, 4096, (6, 32, 32)).astype(np.uint16)


def write_grey(folder, frames):
    folder.mkdir(parents=True)
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"{number}.png")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (dark_frames, "are nearly black: the brightest value is 15 of 255; images of 16 bits that use fewer (12, say)"),
        (lambda seed: np.full((6, 8, 8), 100 + seed, np.uint8), "are each of one value"),
        (lambda seed: np.repeat(np.arange(64, dtype=np.uint8).reshape(1, 8, 8) * 3, 6, axis=0), "are all the same"),
        (lambda seed: dark_frames(seed) * 16, None),
    ],
)
def test_frames_that_show_nothing_are_pointed_out_before_training(root, tmp_path, capsys, make, reason):
    for seed, split in enumerate(("train", "val", "test")):
        write_grey(root / split / "a", make(seed))
    generate("--root", root, "--out", tmp_path / "a.json", "--image_size", 32)
    warning = f"warning: {root}/train/a (and 2 more): frames {reason}" if reason else "warning"
    assert (warning in capsys.readouterr().err) == bool(reason)
    config = Config.load(tmp_path / "a.json")
    for open_training_set in (image_dataset, lambda config, mode: video_dataset(config, mode, 4)):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            open_training_set(config, "train")
        said = [str(warning.message) for warning in said]
        assert [re.sub(r"^\d+ training frames of video_folder ", "", text)[: len(reason or "")] for text in said] == (
            [reason] if reason else []
        )


# ---- what is in the folder


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_natural_order_and_what_is_left_alone(root):
    touch(root, *(f"train/clip{n}.mp4" for n in (10, 9, 1)), "train/clip.mp4", "val/b.AVI", "test/c.webm")
    touch(root, "README.txt", ".DS_Store", "Thumbs.db", "train/.hidden.mp4", "train/notes.json", "val/desktop.ini")
    touch(root, *(f"train/f/frame_{n}.PNG" for n in (10, 9, 100)), "train/f/Thumbs.db", "train/f/._frame_9.png")
    splits = find_splits(root)
    assert list(splits["train"]) == [
        f"train/{name}" for name in ("clip.mp4", "clip1.mp4", "clip9.mp4", "clip10.mp4", "f")
    ]
    assert splits["train"]["train/f"].names == ("frame_9.PNG", "frame_10.PNG", "frame_100.PNG")
    assert (list(splits["val"]), list(splits["test"])) == (["val/b.AVI"], ["test/c.webm"])


@pytest.mark.filterwarnings("error")
def test_what_disks_and_systems_leave_is_passed_over(root):
    touch(root, *(f"{split}/a.mp4" for split in ("train", "val", "test")))
    touch(root, "train/f/0.png", "train/f/1.png")
    names = find_splits(root)
    for folder in (root, root / "train", root / "train" / "f"):
        touch(folder, "@eaDir/a.mp4@SynoEAStream", "@eaDir/SYNOPHOTO_THUMB_M.jpg", "$RECYCLE.BIN/b.mp4", "lost+found/c")
        touch(folder, "System Volume Information/x", "#recycle/0.png", "._a.mp4", "Icon\r", "__MACOSX/._0.png")
    assert find_splits(root) == names


def test_what_is_no_video_is_passed_over_and_said(root):
    write_parts(root)
    before = find_splits(root)
    touch(root, "train/clip.srt", "train/video/frame.npz", "val/a.mp4.part", "test/b.wav")
    os.mkfifo(root / "test" / "pipe.mp4")  # whoever opens it waits for ever
    with pytest.warns(UserWarning) as said:
        assert find_splits(root) == before
    assert {str(warning.message) for warning in said} == {
        f"{root}/{place}: {name} passed over: no video and no frame"
        for place, name in {
            "train": "clip.srt",
            "train/video": "frame.npz",
            "val": "a.mp4.part",
            "test": "b.wav, pipe.mp4",
        }.items()
    }


def test_other_kinds_of_video(root):
    for name, options in {
        "a.wmv": ["-c:v", "wmv2"],
        "b.flv": ["-c:v", "flv"],
        "c.mpg": ["-c:v", "mpeg2video"],
        "d.m2ts": LOSSY,
        "e.3gp": LOSSY,
        "f.ogv": ["-c:v", "libtheora"],
        "g.m4v": LOSSY,
    }.items():
        write_file(root / name, smooth_frames(12, 64, 64), [*options, "-b:v", "2M"])
        shape, shown = read_video(root / name)
        assert (shape.length, shape.width, shape.height) == (12, 64, 64), name
        assert np.abs(shown - smooth_frames(12, 64, 64).astype(float)).mean() < 6, name
    assert sum(len(part) for part in find_splits(root).values()) == 7


@pytest.mark.parametrize("number", [3, 4, 10, 50, 1000])
def test_split_by_name(number):
    names = [f"clip_{n}.mp4" for n in range(number)]
    parts = split_by_name(names)
    assert sorted(name for part in parts.values() for name in part) == sorted(names)
    assert list(parts) == ["train", "val", "test"] and all(
        part == sorted(part, key=names.index) for part in parts.values()
    )
    assert all(1 <= len(parts[split]) <= max(1, number // 5) for split in ("val", "test"))
    assert split_by_name(names[::-1])["val"] == parts["val"][::-1]
    if number == 1000:
        assert all(70 < len(parts[split]) < 130 for split in ("val", "test"))


def test_no_split_but_training_gets_more_than_a_fifth():
    for start in range(0, 300, 8):  # in some of these eights two or more fractions are small
        parts = split_by_name([f"clip_{n}.mp4" for n in range(start, start + 8)])
        assert [len(parts[split]) for split in ("val", "test")] == [1, 1]


def test_videos_stay_in_their_split_when_others_are_added(root):
    names = [f"clip_{n}.mp4" for n in range(400)]
    before, after = split_by_name(names[:200]), split_by_name(names)
    assert all(set(before[split]) <= set(after[split]) for split in before)
    touch(root, *names[:200])
    assert names_of(root, "test") == before["test"]


def test_every_video_is_in_one_split_and_its_items_in_that_only(root):
    frames = {f"{n}.avi": random_frames(3 + n, n) for n in range(6)}
    for name, video in frames.items():
        write_file(root / name, video)
    parts = split_by_name(list(frames))
    for mode, part in parts.items():
        dataset = VideoFolderVideos(root, mode, HEIGHT, 3)
        expected = [expected_video(frames[name], HEIGHT) for name in part]
        if mode == "train":
            expected = [video[first : first + 3] for video in expected for first in range(len(video) - 2)]
        assert len(dataset) == len(expected)
        for item, video in zip((dataset[i] for i in range(len(dataset))), expected, strict=True):
            assert_item(item, video)


# ---- what is not legal

VIDEOS = rf"videos \({', '.join(VIDEO_ENDINGS)}\) and folders of frames \({IMAGES}\)"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], r"root: ROOT does not exist; legal: a folder of VIDEOS"),
        (
            ["a.mp4", "b.mp4"],
            r"ROOT: holds 2 videos; legal: at least 3, as some are for training, some for validation.*",
        ),
        (["a.mp4", "b.heic"], r"ROOT/b.heic: is no video; legal: VIDEOS; what is to be left alone may lie elsewhere"),
        (
            ["a.mp4", "0.png"],
            r"ROOT/0.png: is an image, not a video; legal: the frames of each video in its own folder",
        ),
        (["train/a.mp4", "test/a.mp4"], r"ROOT: holds test, train; legal: all of train, val \(or valid\) and test, .*"),
        (
            ["train/a.mp4", "val/a.mp4", "valid/a.mp4", "test/a.mp4"],
            r"ROOT: holds test, train, val, valid; legal: all of train, .*",
        ),
        (
            ["train/a.mp4", "val/a.mp4", "test/a.mp4", "z.mp4"],
            r"ROOT: holds test, train, val, z.mp4; legal: .* and nothing else.*",
        ),
        (["train/a.mp4", "val/.a", "test/a.mp4"], r"ROOT: holds test, train; legal: all of train, val .*"),
        (["a/notes.txt"], r"ROOT: holds 0 videos; legal: at least 3, .*"),
        (["a/b/0.png"], r"ROOT/a/b: is no frame; legal in the folder of a video: its frames, all of one kind .*"),
        (["a/0.png", "a/1.mp4"], r"ROOT/a/1.mp4: is no frame; legal in the folder of a video: its frames, .*"),
        (["a/0.png", "a/b.png/0.png"], r"ROOT/a/b.png: is no frame; .*"),
        (["a/0.png", "a/1.jpg"], r"ROOT/a: holds 0.png and 1.jpg; legal in the folder of a video: .*"),
    ],
)
def test_what_may_not_lie_in_the_folder(root, names, message):
    touch(root, *names)
    with pytest.raises(UserError) as error:
        VideoFolderVideos(root, "train", 8, 3)
    assert re.fullmatch(message.replace("VIDEOS", VIDEOS).replace("ROOT", re.escape(str(root))), str(error.value))


def cut(path, share):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def bad_files(folder):
    """Files that cannot be used, each with what is said of it."""
    write_file(folder / "cut.mp4", random_frames(40), [*LOSSLESS[".mp4"], "-movflags", "+faststart"])
    write_file(folder / "cut.mkv", random_frames(40))
    write_file(folder / "cut.avi", smooth_frames(20))
    with open(folder / "cut.avi", "rb") as file:
        data = file.read()
    (folder / "cut.avi").write_bytes(data[: data.index(b"00dc", data.index(b"00dc", data.index(b"movi")) + 4)])
    write_file(folder / "headless.mp4", random_frames(40))
    for name in ("cut.mp4", "cut.mkv", "headless.mp4"):
        cut(folder / name, 0.6)
    (folder / "text.avi").write_text("hello")
    (folder / "empty.mp4").touch()
    ffmpeg("-f", "lavfi", "-i", "sine", "-t", "0.2", folder / "sound.mp4")
    write_gif(folder / "cut.gif", random_frames(3))
    cut(folder / "cut.gif", 0.5)
    (folder / "text.gif").write_text("hello")
    broken = write_file(folder / "broken.mp4", smooth_frames(40, 64, 64), LOSSY)
    data = bytearray(broken.read_bytes())
    data[200:900:7] = b"\xff" * len(data[200:900:7])
    broken.write_bytes(data)
    return {
        "cut.mp4": r"is cut short after \d\d frames; legal: a whole video",
        "cut.avi": r"is cut short after 1 frames; legal: a whole video",
        "cut.mkv": r"is cut short after \d\d frames; legal: a whole video",
        "headless.mp4": r"cannot be decoded: .*; legal: a whole video",
        "text.avi": r"cannot be decoded: .*; legal: a whole video",
        "empty.mp4": r"cannot be decoded: it is empty; legal: a whole video",
        "sound.mp4": r"holds no video; legal: a whole video",
        "broken.mp4": r"is damaged; \d+ frames can be decoded, but .*; legal: a whole video",
        "cut.gif": r"is damaged; 1 frames can be decoded, but 1 cannot; legal: a whole video",
        "text.gif": r"cannot be decoded: End of file; legal: a whole video",
    }


def test_damaged_files_are_named(root, tmp_path, capfd):
    for name, message in bad_files(tmp_path / "bad").items():
        shutil.rmtree(root, ignore_errors=True)
        write_parts(root)
        shutil.copy(tmp_path / "bad" / name, root / "train")
        for cache in (True, False):
            with pytest.raises(UserError) as error:
                VideoFolderVideos(root, "train", 8, 3, cache=cache)
            assert re.fullmatch(re.escape(f"{root}/train/{name}: ") + message, str(error.value)), (name, error.value)
        VideoFolderVideos(root, "val", 8, 3)
    assert "moov" not in capfd.readouterr().err


def test_a_video_without_frames_is_named(root, monkeypatch):
    write_file(root / "a.mkv", random_frames(3))
    ffmpeg("-i", root / "a.mkv", "-c", "copy", "-frames:v", "0", root / "b.avi")
    with pytest.raises(UserError, match=r"b\.avi: (holds no frames|cannot be decoded: .*); legal: a whole video$"):
        VideoFile(root / "b.avi").probe()


def damage(path):
    data = bytearray(path.read_bytes())
    data[-20] ^= 255
    path.write_bytes(data)


UNREADABLE_IMAGE = r"cannot be read: it is empty, damaged or something else; legal: a whole image .*"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: cut(path, 0.5), r"cannot be read: .*; legal: a whole image \(PNG, .*\)"),
        (
            lambda path: path.write_text("hello"),
            UNREADABLE_IMAGE,
        ),
        (
            lambda path: path.write_text(""),
            UNREADABLE_IMAGE,
        ),
        (
            lambda path: Image.fromarray(random_frames(1, 0, 9, 8)[0]).save(path),
            r"is of 9 x 8 pixels; legal: 8 x 8, as ROOT/train/video/frame_0.ENDING",
        ),
    ],
)
@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_damaged_frames_are_named(root, ending, spoil, message):
    write_parts(root)
    shutil.rmtree(root / "train" / "video")
    write_folder(root / "train" / "video", random_frames(4, 1, 8, 8), f".{ending}")
    path = root / "train" / "video" / f"frame_2.{ending}"
    spoil(path)
    message = message.replace("ENDING", ending).replace("ROOT", re.escape(str(root)))
    with pytest.raises(UserError) as error:
        VideoFolderVideos(root, "train", 8, 3)
    assert re.fullmatch(re.escape(f"{path}: ") + message, str(error.value))


@pytest.mark.parametrize("values", [np.linspace(0, 1, 64, dtype=np.float32), np.arange(64, dtype=np.int32) << 20])
def test_an_image_of_unknown_range_is_named(root, values):
    root.mkdir(parents=True)
    Image.fromarray(values.reshape(8, 8)).save(root / "a.tif")
    with pytest.raises(UserError, match=r"a\.tif: holds floats or 32 bits; legal: 8 or 16 bits per channel$"):
        list(FrameFolder(root, ("a.tif",)).frames(0))


def test_an_image_of_too_many_pixels_is_named(root):
    root.mkdir(parents=True)
    Image.new("1", (20_000, 20_000)).save(root / "a.png")
    with pytest.raises(UserError, match=r"a\.png: cannot be read: it has too many pixels; legal: a whole image"):
        list(FrameFolder(root, ("a.png",)).frames(0))


def test_a_frame_with_a_wrong_checksum_is_named(root):
    write_parts(root)
    damage(root / "train" / "video" / "frame_3.png")
    with pytest.raises(UserError, match=r"frame_3\.png: cannot be read: .*; legal: a whole image \(PNG, .*\)$"):
        VideoFolderVideos(root, "train", 8, 3)


def test_short_videos_are_named(root):
    write_parts(root, (4, 4, 4))
    write_folder(root / "val" / "other", random_frames(6))
    write_folder(root / "val" / "short", random_frames(2))
    assert len(VideoFolderVideos(root, "val", 8, 2)) == 3
    with pytest.raises(UserError) as error:
        VideoFolderVideos(root, "val", 8, 5)
    assert str(error.value) == (
        f"{root}/val/short: has 2 frames (and 1 more are too short); legal: at least 5 in every video, or a lower"
        " timestep_horizon, animation_horizon or --horizon"
    )
    with pytest.raises(UserError, match=r"train/video: has 4 frames; legal: at least 5 in every video"):
        get_image_dataset("video_folder", str(root), "train", 8, 5)


# ---- counting and keeping


@pytest.fixture
def probes(monkeypatch):
    """The names of the files that are counted."""
    names, probe = [], VideoFile.probe
    monkeypatch.setattr(VideoFile, "probe", lambda video: (names.append(video.path.name), probe(video))[1])
    return names


def forget(monkeypatch):
    monkeypatch.setattr(video_folder_ds, "_counted", {})


def test_frames_are_counted_once(root, probes, monkeypatch):
    for number, split in enumerate(("train", "val", "test")):
        write_file(root / split / f"{split}.avi", random_frames(4 + number, number))
    VideoFolderVideos(root, "train", 8, 3)
    VideoFolderVideos(root, "train", 8, 4)
    assert probes == ["train.avi"]
    forget(monkeypatch)  # as in another process
    VideoFolderVideos(root, "train", 8, 3)
    VideoFolderVideos(root, "val", 8, 3)
    assert probes == ["train.avi", "val.avi"]
    forget(monkeypatch)
    write_file(root / "train" / "train.avi", random_frames(9))
    assert len(VideoFolderVideos(root, "train", 8, 3)) == 7
    assert probes == ["train.avi", "val.avi", "train.avi"]
    index = root / ".cache" / "video_folder.json"
    assert sorted(json.loads(index.read_text()).values()) == [[5, WIDTH, HEIGHT, []], [9, WIDTH, HEIGHT, []]]
    forget(monkeypatch)
    index.write_text("[1, 2")
    assert len(VideoFolderVideos(root, "train", 8, 3)) == 7 and probes[3:] == ["train.avi"]


def test_without_the_cache_nothing_is_written(root, probes, monkeypatch):
    for split in ("train", "val", "test"):
        write_file(root / split / "a.avi", random_frames(4))
    for _ in range(2):
        forget(monkeypatch)
        VideoFolderVideos(root, "train", 8, 3, cache=False)
    assert probes == ["a.avi", "a.avi"]
    assert sorted(os.listdir(root)) == ["test", "train", "val"] and not (root.parent / "home").exists()


def test_what_was_counted_is_kept_though_another_video_is_damaged(root, probes, monkeypatch):
    write_parts(root)
    write_file(root / "train" / "a.avi", random_frames(4))
    (root / "train" / "b.avi").touch()
    monkeypatch.setattr(video_folder_ds, "available_cores", lambda: 1)
    for _ in range(2):
        forget(monkeypatch)
        with pytest.raises(UserError, match=r"b\.avi: "):
            VideoFolderVideos(root, "train", 8, 3)
    assert probes == ["a.avi", "b.avi", "b.avi"]


def test_a_video_is_decoded_once_for_the_cache(root, monkeypatch):
    """Blocks that threads ask for out of turn come from one decoder."""
    write_parts(root)
    video = random_frames(50, 3)
    write_file(root / "train" / "a.mkv", video)
    monkeypatch.setattr(frame_cache, "_BLOCK", 3)
    monkeypatch.setattr(frame_cache, "available_cores", lambda: 8)
    started, frames = [], VideoFile.frames
    monkeypatch.setattr(VideoFile, "frames", lambda self, *span: (started.append(span[:2]), frames(self, *span))[1])
    dataset = VideoFolderVideos(root, "train", HEIGHT, 50 - 46)
    assert started == [(0, 50), (0, 1)]  # and its first frame once more, to check what was written
    shown = expected_video(video, HEIGHT)
    for first in range(47):
        assert_item(dataset[first], shown[first : first + 4])


def test_blocks_in_any_order_of_threads(root):
    blocks = video_folder_ds._InOrder(iter(range(9)), lambda frames, number: [next(frames) for _ in range(number)])
    found = {}
    threads = [
        threading.Thread(target=lambda span=span: found.__setitem__(span, blocks(*span)))
        for span in reversed(list(pairwise((0, 2, 3, 7, 9))))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {(0, 2): [0, 1], (2, 3): [2], (3, 7): [3, 4, 5, 6], (7, 9): [7, 8]}


def test_a_file_that_is_replaced_meanwhile_is_named(root):
    write_parts(root)
    write_file(root / "train" / "a.avi", random_frames(9))
    dataset = VideoFolderVideos(root, "train", 8, 4, cache=False)
    write_file(root / "train" / "a.avi", random_frames(3))
    with pytest.raises(UserError, match=r"a\.avi: cannot be decoded: frame 3 is damaged, or has changed since .*"):
        dataset[0]


# ---- the configuration


def generate(*arguments):
    generate_config_file.main([str(argument) for argument in ("--ds", "video_folder", *arguments)])


def test_the_configuration_says_what_was_found(root, tmp_path, capsys):
    write_parts(root, (30, 25, 40))
    write_folder(root / "train" / "wide", random_frames(26, 5, 300, 200))
    path = tmp_path / "mine.json"
    generate("--root", root, "--out", path)
    out = capsys.readouterr().out.splitlines()
    assert out == [
        f"{root}: 4 videos (2 train, 1 val, 1 test)",
        "frames: 8 x 8 (3), 300 x 200 (1); the middle square is used",
        "lengths: 25 frames (val/video) to 40, 121 in all",
        f"wrote {path}",
        f"train with: python train_dlp.py -d {path} (images) or python train_ddlp.py -d {path} (videos)",
    ]
    config = Config.load(path)
    assert (config.ds, config.root, config.image_size, config.batch_size) == ("video_folder", str(root), 64, 32)
    assert (config.timestep_horizon, config.cond_steps, config.animation_horizon) == (10, 10, 25)


@pytest.mark.parametrize("sides", [(128, 140), (127, 140)])
def test_the_image_size_is_the_videos(root, tmp_path, sides):
    for split, size in zip(("train", "val", "test"), (*sides, 200), strict=True):
        write_folder(root / split / "a", random_frames(12, 0, size, 150))
    generate("--root", root, "--out", tmp_path / "a.json")
    assert Config.load(tmp_path / "a.json").image_size == (128 if min(sides) == 128 else 64)


@pytest.mark.parametrize("shortest", [2, 3, 11, 12, 200])
def test_the_horizons_fit_the_shortest_video(root, tmp_path, shortest):
    for split, length in zip(("train", "val", "test"), (shortest + 1, shortest, shortest + 5), strict=True):
        write_folder(root / split / "a", random_frames(length, 0, 4, 4))
    path = tmp_path / "a.json"
    generate("--root", root, "--out", path, "--image_size", 32)
    config = Config.load(path)
    assert config.timestep_horizon == min(10, shortest - 1) and config.animation_horizon == min(100, shortest)
    assert 1 <= config.cond_steps < config.animation_horizon
    assert config.batch_size == min(32, shortest + 1 - config.timestep_horizon)
    assert len(video_dataset(config, "train", config.timestep_horizon + 1)) >= config.batch_size
    assert len(video_dataset(config, "val", config.animation_horizon)) == 1


def test_the_loss_decides_its_weights(root, tmp_path):
    write_parts(root, (12, 12, 12))
    generate("--root", root, "--out", tmp_path / "a.json", "--recon_loss_type", "vgg", "--beta_dyn", "7")
    config, released = Config.load(tmp_path / "a.json"), Config.load("obj3d")
    assert (config.beta_kl, config.beta_dyn, config.recon_loss_type) == (released.beta_kl, 7, "vgg")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--root is missing; with --ds video_folder it is the folder of the videos"),
        (["--root", "nowhere"], r"root: nowhere does not exist; legal: a folder of videos .*"),
        (
            ["--root", "videos/train/video/frame_0.png"],
            r"root: videos/train/video/frame_0.png is a file; legal: a fold.*",
        ),
        (["--root", "videos", "--timestep_horizon", "4"], r"videos/(train|val)/video: has 4 frames, 5 are needed; .*"),
        (
            ["--root", "videos", "--animation_horizon", "5"],
            "videos/val/video: has 4 frames, 5 are needed; legal: timestep_horizon at most 3 and animation_horizon at"
            " most 4, or no video as short",
        ),
    ],
)
def test_no_configuration_is_written_for_what_cannot_be_trained(root, tmp_path, monkeypatch, arguments, message):
    write_parts(root)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        generate("--out", "a.json", *arguments)
    assert re.fullmatch(message, str(error.value)) and not (tmp_path / "a.json").exists()


def test_a_video_of_one_frame_has_no_configuration(root, tmp_path):
    write_parts(root, (4, 1, 4))
    with pytest.raises(UserError, match=r"val/video: has 1 frame; legal: at least 2, one to see and one to predict$"):
        generate("--root", root, "--out", tmp_path / "a.json")


def test_from_a_folder_to_a_prediction(root, tmp_path):
    """Videos of unequal length and size, without code: configuration, training, prediction."""
    for split, lengths in {"train": (9, 12), "val": (8, 11), "test": (10, 8)}.items():
        for number, length in enumerate(lengths):
            write_file(root / split / f"{number}.mp4", smooth_frames(length, 40 + 8 * number, 36), LOSSY)
    small = (
        "patch_size",
        "n_kp_enc",
        "n_kp_prior",
        "enc_channels",
        "prior_channels",
        "pint_layers",
        "pint_heads",
        "pint_dim",
    )
    options = {name: SMALL[name] for name in (*small, "image_size", "metrics", "num_workers", "learned_feature_dim")}
    options |= {"num_epochs": 2, "batch_size": 3, "timestep_horizon": 3, "device": "cpu"}
    texts = [f"--{name}={json.dumps(value) if isinstance(value, list) else value}" for name, value in options.items()]
    texts = [text.replace('"', "").replace("[", "").replace("]", "").replace(" ", "") for text in texts]
    run_in(tmp_path, generate_config_file.main, "--ds", "video_folder", "--root", root, "--out", "mine.json", *texts)
    run_in(tmp_path, train_ddlp.main, "-d", "mine.json")
    (path,) = tmp_path.glob("*_video_folder_ddlp")
    records = Run.open(path).records()
    assert [record["iteration"] for record in records] == [5, 10]  # (6 + 9) windows in batches of 3
    assert records[1]["psnr"] > 0 and np.isfinite(records[1]["val_loss"])
    run_in(tmp_path, generate_ddlp_video_prediction.main, "-p", path, "-n", 2, "--cpu")
    for number in range(2):
        with Image.open(path / "animations" / f"e0_traj_anim_{number}.gif") as animation:
            assert animation.n_frames == 8
    with pytest.raises(UserError, match=r"test/1\.mp4: has 8 frames; legal: at least 9 in every video, or a lower"):
        run_in(tmp_path, generate_ddlp_video_prediction.main, "-p", path, "--horizon", 9, "--cpu")


# ---- the page


def test_the_class_of_the_page(tmp_path, monkeypatch):
    module, line = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "my_data.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(get_dataset, "_VARIANTS", dict(get_dataset._VARIANTS))
    exec(line, {"register": get_dataset.register})
    videos = {mode: np.stack([random_frames(6, seed, 8, 8) for seed in range(2)]) for mode in ("train", "val", "test")}
    for mode, values in videos.items():
        np.save(tmp_path / f"{mode}.npy", values)
    train = get_video_dataset("mine", str(tmp_path), 4, "train", 8)
    assert len(train) == 2 * 3
    expected = torch.tensor(videos["train"][1, 2:6]).permute(0, 3, 1, 2) / 255
    assert torch.equal(train[5][0], expected) and expected.dtype == torch.float32
    whole = get_video_dataset("mine", str(tmp_path), 4, "valid", 8)
    assert len(whole) == 2 and whole[1][0].shape == (6, 3, 8, 8)


def test_the_commands_of_the_page_have_the_options_that_it_names(capsys):
    """Every script is there, and every key in the page is a key of the configuration."""
    text = PAGE.read_text(encoding="utf-8")
    for script in re.findall(r"python (\S+\.py)", text):
        assert (PAGE.parents[1] / script).is_file()
    keys = re.findall(r"^\| (`.*?`(?:, `.*?`)*) \|", text[text.index("## The keys") :], re.MULTILINE)
    assert len(keys) == 8
    for name in re.findall(r"`(\w+)`", " ".join(keys)):
        assert name in Config(ds="x").to_dict()
