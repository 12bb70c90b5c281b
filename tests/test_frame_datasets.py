"""OBJ3D, CLEVRER, PHYRE and Traffic in their real formats against Pillow and numpy, and their files under damage."""

import argparse
import gc
import json
import pickle
import re
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from configs.schema import Config, overrides_from
from datasets import get_dataset
from datasets.clevrer_ds import ClevrerVideos
from datasets.frame_sources import read_png, resized
from datasets.get_dataset import get_image_dataset, get_video_dataset, image_dataset, video_dataset
from datasets.obj3d_ds import Obj3dImages, Obj3dVideos
from datasets.phyre_ds import PhyreImages, PhyreVideos
from datasets.traffic_ds import TrafficImages, TrafficVideos
from rundir import prediction
from tests.balls import make_run
from tests.frames import assert_item, frame_of, write_episodes, write_png
from training.command import parse_arguments
from utils.errors import UserError, run_command

REPOSITORY = Path(__file__).resolve().parents[1]
SPLIT_FOLDERS = {"obj3d": ("train", "val", "test"), "clevrer": ("train", "valid", "test")}
PREFIX = {"obj3d": "test_", "clevrer": ""}


def expected(folder, prefix, frames, size=8, **options):
    return [frame_of(folder / f"{prefix}{frame}.png", size, **options) for frame in frames]


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    """Every data set of episodes of 100 frames, small; names in an order that is not that of their numbers."""
    root = tmp_path_factory.mktemp("data")
    for ds, (train, val, test) in SPLIT_FOLDERS.items():
        options = {"prefix": PREFIX[ds], "mode": "RGBA" if ds == "obj3d" else "RGB"}
        write_episodes(root / ds / train, {"10": 100, "2": 100, "0": 100}, **options)
        write_episodes(root / ds / val, {"0": 100}, **options)
        write_episodes(root / ds / test, {"1": 100, "3": 100}, **options)
    return root


# ---- OBJ3D and CLEVRER


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("ds", SPLIT_FOLDERS)
def test_train_items_are_all_windows(trees, ds, cache):
    folders = [trees / ds / "train" / name for name in ("0", "2", "10")]
    for length in (1, 11, 100):
        windows = 101 - length
        videos = get_video_dataset(ds, trees / ds, length, "train", 8, cache=cache)
        images = get_image_dataset(ds, trees / ds, "train", 8, length, cache=cache)
        assert len(videos) == len(images) == 3 * windows
        for index in {0, windows - 1, windows, 2 * windows - 1, 2 * windows, 3 * windows - 1}:
            episode, first = divmod(index, windows)
            frames = expected(folders[episode], PREFIX[ds], range(first, first + length))
            assert_item(videos[index], frames)
            assert_item(images[index], frames[0] if length == 1 else frames)


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("mode", ["val", "valid", "test"])
@pytest.mark.parametrize("ds", SPLIT_FOLDERS)
def test_items_of_the_other_modes(trees, ds, mode, cache):
    names = ("1", "3") if mode == "test" else ("0",)
    folders = [trees / ds / SPLIT_FOLDERS[ds][2 if mode == "test" else 1] / name for name in names]
    videos = get_video_dataset(ds, trees / ds, 11, mode, 8, cache=cache)
    assert len(videos) == len(names)
    for video, folder in zip((videos[index] for index in range(len(videos))), folders, strict=True):
        assert_item(video, expected(folder, PREFIX[ds], range(100)))
    images = get_image_dataset(ds, trees / ds, mode, 8, 4, cache=cache)
    assert len(images) == 97 * len(names)
    assert_item(images[len(images) - 2], expected(folders[-1], PREFIX[ds], range(95, 99)))


@pytest.mark.parametrize("cache", [True, False])
def test_both_resolutions_of_obj3d(tmp_path, cache):
    folder = write_episodes(tmp_path / "train", {"0": 100}, "test_", 16, "RGBA") / "0"
    for ds, size in (("obj3d", 8), ("obj3d128", 16)):
        for index in (0, 89):
            frames = expected(folder, "test_", range(index, index + 11), size)
            assert_item(get_video_dataset(ds, tmp_path, 11, "train", size, cache=cache)[index], frames)
    assert len(list(tmp_path.glob(".cache/*.npy"))) == 2 * cache


def test_real_sizes(tmp_path):
    """A frame of the download's 128 x 128 pixels, as it is and at 64 x 64, of the right brightness everywhere."""
    slope = np.broadcast_to(np.linspace(0, 255, 128).round().astype(np.uint8)[:, None, None], (128, 128, 4))
    Image.fromarray(np.ascontiguousarray(slope)).save(tmp_path / "0.png")
    frame = read_png(tmp_path / "0.png")
    assert np.array_equal(frame, slope[..., :3]) and resized(frame, 128) is frame
    small = resized(frame, 64).astype(float)
    assert small.shape == (64, 64, 3) and abs(small - slope[::2, ::2, :3] - 1).max() <= 1


def test_padded_numbers_and_files_that_are_left_alone(tmp_path):
    folder = write_episodes(tmp_path / "train", {"00007": 100}, digits=5)
    for path in ("notes.txt", ".hidden/x", "00007/list.json", "00007/.0.png"):
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text("")
    frames = [frame_of(folder / "00007" / f"{frame:05d}.png", 8) for frame in range(98, 100)]
    assert_item(ClevrerVideos(tmp_path, "train", 8, 2)[98], frames)


def test_what_network_drives_leave_is_no_episode_and_no_frame(tmp_path):
    write_episodes(tmp_path / "train", {str(number): 100 for number in range(2)}, "test_", mode="RGBA")
    lengths = Obj3dVideos(tmp_path, "train", 8, 3, cache=False)._source.lengths
    for folder in (tmp_path / "train", tmp_path / "train" / "0"):
        for name in ("@eaDir", "#recycle", "lost+found"):
            (folder / name).mkdir()
            write_png(folder / name / "1.png")
    assert Obj3dVideos(tmp_path, "train", 8, 3, cache=False)._source.lengths == lengths == [100, 100]


@pytest.mark.parametrize("kind", ["RGB", "RGBA", "16 bits", "interlaced", "transparent"])
def test_read_png(tmp_path, kind):
    """All ways to store the same colours; the interlaced file is made by hand."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, 2, 4), np.uint8)
    path = tmp_path / "0.png"
    if kind == "RGBA":
        Image.fromarray(pixels).save(path)
    elif kind == "transparent":
        Image.fromarray(np.ascontiguousarray(pixels[..., :3])).save(
            path, transparency=tuple(map(int, pixels[0, 0, :3]))
        )
    elif kind == "16 bits":
        lines = b"".join(b"\0" + line[:, :3].astype(">u2").tobytes() for line in pixels.astype(int) * 256 + 255)
        path.write_bytes(png_of(2, 2, 16, 2, lines))
    else:
        passes = [pixels[:1, :1], pixels[:1, 1:], pixels[1:]] if kind == "interlaced" else pixels[:, None]
        lines = b"".join(b"\0" + part[..., :3].tobytes() for part in passes)
        path.write_bytes(png_of(2, 2, 8, 2, lines, interlaced=kind == "interlaced"))
    assert np.array_equal(read_png(path), pixels[..., :3])


# ---- PHYRE


PHYRE = {"00000": 130, "00001": 45, "00002": 31, "00010": 143}  # 100, 15, 1 and 100 frames are used


@pytest.fixture(scope="module")
def phyre(tmp_path_factory):
    root = tmp_path_factory.mktemp("phyre")
    write_episodes(root / "train", PHYRE, digits=5)
    write_episodes(root / "valid", {"00001": 45}, digits=5)
    write_episodes(root / "test", {"00000": 134}, digits=5)
    return root


def phyre_frames(root, episode, frames):
    last = min(PHYRE.get(episode, 134) - 30, 100) - 1
    return [frame_of(root / episode / f"{min(frame, last):05d}.png", 8, inverted=True) for frame in frames]


@pytest.mark.parametrize("cache", [True, False])
def test_phyre_windows(phyre, cache):
    episodes = list(PHYRE)
    for length in (1, 4, 15, 20):
        videos, images = (kind(phyre, "train", 8, length, cache=cache) for kind in (PhyreVideos, PhyreImages))
        windows = 101 - length
        assert len(videos) == len(images) == 4 * windows
        for episode, name in enumerate(episodes):
            used = min(PHYRE[name] - 30, 100)
            for offset in {0, max(used - length - 1, 0), max(used - length, 0), min(used, windows - 1), windows - 1}:
                first = min(offset, max(used - length, 0))
                frames = phyre_frames(phyre / "train", name, range(first, first + length))
                assert_item(videos[episode * windows + offset], frames)
                assert_item(images[episode * windows + offset], frames[0] if length == 1 else frames)


@pytest.mark.parametrize("cache", [True, False])
def test_phyre_episodes_are_filled_up(phyre, cache):
    for mode, folder, episode in (("val", "valid", "00001"), ("valid", "valid", "00001"), ("test", "test", "00000")):
        videos = PhyreVideos(phyre, mode, 8, 16, cache=cache)
        assert len(videos) == 1
        assert_item(videos[0], phyre_frames(phyre / folder, episode, range(100)))
    assert len(PhyreImages(phyre, "test", 8, 16, cache=cache)) == 85
    (batch, *_) = next(iter(DataLoader(PhyreVideos(phyre, "train", 8, 20, cache=cache), batch_size=81, shuffle=True)))
    assert batch.shape == (81, 20, 3, 8, 8)


# ---- Traffic


def recording(path, number=1_007, size=8):
    frames = np.random.default_rng(0).integers(0, 256, (number, size, size, 3), np.uint8)
    np.save(path, frames)
    return frames.transpose(0, 3, 1, 2) / 255


@pytest.fixture
def traffic(tmp_path):
    return tmp_path / "img128np.npy"


def test_traffic_windows_begin_at_every_frame(traffic):
    frames = recording(traffic)
    parts = {"train": frames[:805], "val": frames[805:905], "valid": frames[805:905], "test": frames[905:]}
    for mode, part in parts.items():
        for length in (1, 11):
            images = TrafficImages(traffic, mode, 8, length)
            assert len(images) == len(part)
            for index in (0, 1, len(part) - length, len(part) - 1):
                first = min(index, len(part) - length)
                assert_item(images[index], part[first] if length == 1 else part[first : first + length])
    videos = TrafficVideos(traffic, "train", 8, 11)
    assert len(videos) == 805
    for index in (0, 793, 794, 795, 804):
        assert_item(videos[index], frames[min(index, 794) :][:11])
    assert not (traffic.parent / ".cache").exists()


def test_traffic_episodes(traffic):
    frames = recording(traffic, 1_010)
    parts = {"val": frames[808:909], "test": frames[909:]}
    for mode, part in parts.items():
        with pytest.warns(UserWarning) as caught:
            videos = TrafficVideos(traffic, mode, 8, 50)
        assert [str(warning.message) for warning in caught] == [
            f"the last 1 of 101 frames of the {mode} part of {traffic} make no whole episode of 50 and are not used"
        ]
        assert len(videos) == 2
        assert_item(videos[0], part[:50])
        assert_item(videos[1], part[50:100])
    with pytest.warns(UserWarning, match=r"the last 1 of 101 .* episode of 100"):
        longer = TrafficVideos(traffic, "val", 8, 100)
    assert len(longer) == 1
    assert_item(longer[0], parts["val"][:100])


@pytest.mark.parametrize("cache", [True, False])
def test_traffic_is_resized(traffic, cache, recwarn):
    recording(traffic, 1_000, 12)
    frames = [
        np.array(Image.fromarray(frame).resize((8, 8), Image.Resampling.BICUBIC)).transpose(2, 0, 1) / 255
        for frame in np.load(traffic)
    ]
    assert_item(get_video_dataset("traffic", traffic, 11, "train", 8, cache=cache)[799], frames[789:800])
    assert_item(get_video_dataset("traffic", traffic, 11, "val", 8, cache=cache)[1], frames[850:900])
    assert_item(get_image_dataset("traffic", traffic, "test", 8, cache=cache)[99], frames[999])
    names = (
        [path.name.rpartition("_")[0] for path in sorted((traffic.parent / ".cache").glob("*.npy"))] if cache else []
    )
    assert names == ["img128np_test_8", "img128np_train_8", "img128np_val_8"] * cache
    assert not recwarn.list


def test_the_cache_of_a_recording_of_any_name_is_replaced(tmp_path):
    path = tmp_path / "img[1]*.npy"
    for number in (100, 101):
        recording(path, number, 12)
        TrafficImages(path, "test", 8, 1)
    assert len(list(tmp_path.glob(".cache/*.npy"))) == 1


@pytest.mark.parametrize("size", [8, 12])
def test_traffic_is_pickled_without_its_frames(traffic, size):
    frames = recording(traffic, 100)
    dataset = TrafficVideos(traffic, "train", size, 5, cache=False)
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 3_000
    assert np.array_equal(pickle.loads(pickled)[7][0], dataset[7][0])
    if size == 8:
        assert_item(pickle.loads(pickled)[7], frames[7:12])


# ---- the configurations and the commands


@pytest.mark.parametrize(
    ("name", "root"),
    [
        ("obj3d", "./data/obj3d"),
        ("obj3d128", "./data/obj3d"),
        ("traffic", "./data/traffic/img128np.npy"),
        ("phyre", "./data/phyre"),
        ("clevrer", "./data/clevrer"),
        ("balls", "./data/balls"),
    ],
)
def test_configuration_is_the_published_one(name, root):
    published = json.loads((REPOSITORY / "tests" / "published" / f"ddlp-{name}.json").read_text())["config"]
    ours = json.loads((REPOSITORY / "configs" / f"{name}.json").read_text())
    added = {key: value for key, value in Config(ds="any").to_dict().items() if key not in published}
    assert Config.load(name).to_dict() == {**published, "root": root, "run_prefix": "", **added}
    assert list(ours) == [key for key in Config.keys() if key in ours]  # noqa: SIM118 (a method of ours)


def test_every_configuration_names_a_data_set_of_its_kind():
    paths = list((REPOSITORY / "configs").glob("*.json"))
    assert len(paths) >= 11
    for path in paths:
        values = json.loads(path.read_text())
        kind = "image" if values["ds"] == "shapes" or path.stem.endswith("_img") else "video"
        assert callable(get_dataset._variant(kind, values["ds"]))


@pytest.mark.parametrize("cache", [True, False])
def test_the_configuration_says_whether_there_is_a_cache(trees, tmp_path, cache):
    shutil.copytree(trees / "clevrer", tmp_path / "data", ignore=shutil.ignore_patterns(".cache"))
    config = Config(ds="clevrer", root=str(tmp_path / "data"), image_size=32, cache=cache)
    assert video_dataset(config, "val", 5)[0][0].shape == (5, 3, 32, 32)
    assert image_dataset(config, "test")[0][0].shape == (3, 32, 32)
    names = sorted(path.name.rpartition("_")[0] for path in tmp_path.glob("data/.cache/*.npy"))
    assert names == ["clevrer_test_32", "clevrer_val_32"] * cache


def test_no_cache_is_an_option_of_the_training_commands():
    arguments = {
        "": {},
        "--no_cache": {"cache": False},
        "--cache false": {"cache": False},
        "--cache true": {"cache": True},
    }
    for text, overrides in arguments.items():
        args = parse_arguments("training", Config, ("-d",), ["-d", "balls", *text.split()])
        assert overrides_from(args) == overrides


def test_no_cache_is_an_option_of_the_predicting_commands(tmp_path):
    run = make_run(tmp_path, str(tmp_path))
    parser = argparse.ArgumentParser()
    prediction.add_prediction_arguments(parser, "")
    for option in ((), ("--no_cache",)):
        args = parser.parse_args(["-p", str(run.path), "--cpu", *option])
        assert prediction.open_prediction(args).config.cache == (not option)


def test_a_broken_frame_in_a_loading_process_is_one_line(trees, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)  # torch waits for the process to end
    shutil.copytree(trees / "clevrer" / "train", tmp_path / "train", ignore=shutil.ignore_patterns(".cache"))
    broken = tmp_path / "train" / "2" / "50.png"
    broken.write_bytes(broken.read_bytes()[:-20])
    dataset = ClevrerVideos(tmp_path, "train", 8, 100, cache=False)
    try:
        run_command(lambda: list(DataLoader(dataset, num_workers=1)))
    except SystemExit as error:
        status = error.code
    gc.collect()  # ends the process
    assert status == 2
    assert capsys.readouterr().err == (f"error: {broken}: {UNREADABLE}\n")


# ---- what is wrong


PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_of(width, height, bits, colours, lines, interlaced=False):
    """A PNG file from its header's values and its lines, each with its filter's byte."""
    header = struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, interlaced)
    return PNG_SIGNATURE + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def flipped(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(bytes(content))


LEGAL_PNG = "; legal: a whole square PNG, RGB or RGBA"
UNREADABLE = "cannot be read: it is empty, damaged or something else" + LEGAL_PNG
BROKEN_FRAMES = {
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-13]), UNREADABLE),
    "cut in its pixels": (lambda path: path.write_bytes(path.read_bytes()[:90]), UNREADABLE),
    "cut in its header": (lambda path: path.write_bytes(path.read_bytes()[:20]), UNREADABLE),
    "empty": (lambda path: path.write_bytes(b""), UNREADABLE),
    "pixels": (lambda path: flipped(path, 80), UNREADABLE),
    "header": (lambda path: flipped(path, 19), UNREADABLE),
    "foreign": (lambda path: path.write_text("text"), UNREADABLE),
    "no header": (lambda path: path.write_bytes(PNG_SIGNATURE + chunk(b"IEND", b"")), UNREADABLE),
    "enormous": (
        lambda path: path.write_bytes(png_of(10**6, 10**6, 8, 2, b"")),
        "cannot be read: it has too many pixels" + LEGAL_PNG,
    ),
    "jpeg": (lambda path: Image.new("RGB", (8, 8)).save(path, "jpeg"), UNREADABLE),
    "no pixels": (lambda path: path.write_bytes(png_of(8, 8, 8, 2, b"")), UNREADABLE),
    "grey": (lambda path: write_png(path, mode="L"), "is of Pillow's mode L" + LEGAL_PNG),
    "palette": (lambda path: Image.new("P", (8, 8)).save(path), "is of Pillow's mode P" + LEGAL_PNG),
    "grey of 16 bits": (
        lambda path: path.write_bytes(png_of(8, 8, 16, 0, bytes(136))),
        "is of Pillow's mode I;16" + LEGAL_PNG,
    ),
    "oblong": (lambda path: Image.new("RGB", (8, 6)).save(path), "is of 8 x 6 pixels" + LEGAL_PNG),
    "larger": (lambda path: write_png(path, 9), "is of 9 x 9 pixels; legal: 8 x 8, as {root}/train/0/test_0.png"),
    "folder": (lambda path: (path.unlink(), path.mkdir()), "cannot be read: Is a directory" + LEGAL_PNG),
    "dangling": (lambda path: (path.unlink(), path.symlink_to("nowhere")), "cannot be read: No such file or directory"),
}


@pytest.mark.parametrize("kind", BROKEN_FRAMES)
def test_a_broken_frame_is_named(trees, tmp_path, kind):
    """Before training starts; without a cache when it is read."""
    root = tmp_path / "data"
    shutil.copytree(trees / "obj3d" / "train" / "0", root / "train" / "0")
    path = root / "train" / "0" / "test_7.png"
    damage, message = BROKEN_FRAMES[kind]
    damage(path)
    message = f"{path}: {message.format(root=root)}"
    with pytest.raises(UserError) as error:
        Obj3dVideos(root, "train", 8, 11)
    check_line(error, message)
    assert not list(root.glob(".cache/*.npy"))
    with pytest.raises(UserError) as error:
        Obj3dVideos(root, "train", 8, 11, cache=False)[5]
    check_line(error, message)


def check_line(error, message):
    assert str(error.value).startswith(message) and "\n" not in str(error.value), str(error.value)


LEGAL = "; legal: folders 0, 1, ... of frames test_0.png, test_1.png, ..."
UNPACK = LEGAL + " (unpack OBJ3D's download there, or try datasets/obj3d_like_preparation.py)"
BROKEN_TREES = {
    "no part": (
        lambda root: shutil.rmtree(root / "train"),
        "train: cannot be read: No such file or directory" + UNPACK,
    ),
    "empty part": (lambda root: shutil.rmtree(root / "train" / "0"), "train: holds no episodes" + UNPACK),
    "a file": (
        lambda root: (shutil.rmtree(root / "train"), (root / "train").write_text("")),
        "train: cannot be read: Not a directory" + UNPACK,
    ),
    "gap": (
        lambda root: (root / "train/0/test_7.png").unlink(),
        "train/0/test_7.png: is missing, but later frames are there" + LEGAL,
    ),
    "no beginning": (
        lambda root: (root / "train/0/test_0.png").unlink(),
        "train/0/test_0.png: is missing, but later frames are there" + LEGAL,
    ),
    "short": (lambda root: (root / "train/0/test_99.png").unlink(), "train/0: is an episode of 99 frames; legal: 100"),
    "long": (lambda root: write_png(root / "train/0/test_100.png"), "train/0: is an episode of 101 frames; legal: 100"),
    "no frames": (lambda root: (root / "train/1").mkdir(), "train/1: is an episode of 0 frames; legal: 100"),
    "other name": (lambda root: write_png(root / "train/0/100.png"), "train/0/100.png: is not a frame's name" + LEGAL),
    "no number": (lambda root: write_png(root / "train/0/test_x.png"), "train/0/test_x.png: is not a frame's name"),
    "two numbers": (lambda root: write_png(root / "train/0/test_07.png"), "train/0/test_"),
    "padded otherwise": (
        lambda root: (root / "train/0/test_7.png").rename(root / "train/0/test_07.png"),
        "train/0/test_7.png: is missing, but later frames are there",
    ),
    "other folder": (lambda root: (root / "train/more").mkdir(), "train/more: is not an episode" + LEGAL),
    "numbered file": (lambda root: (root / "train/1").write_text(""), "train/1: is not an episode" + LEGAL),
    "same number": (lambda root: (root / "train/00").mkdir(), "train/0"),
}


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("kind", BROKEN_TREES)
def test_a_broken_tree_is_refused_at_once(trees, tmp_path, kind, cache):
    shutil.copytree(trees / "obj3d" / "train" / "0", tmp_path / "train" / "0")
    damage, message = BROKEN_TREES[kind]
    damage(tmp_path)
    with pytest.raises(UserError) as error:
        Obj3dImages(tmp_path, "train", 8, 1, cache=cache)
    check_line(error, f"{tmp_path}/{message}")
    assert "number" not in kind or re.search("the number of|is not a frame|is not an episode", str(error.value))
    assert not (tmp_path / ".cache").exists()


@pytest.mark.parametrize(
    ("ds", "part", "hint"),
    [
        ("obj3d", "train", "(unpack OBJ3D's download there, or try datasets/obj3d_like_preparation.py)"),
        ("clevrer", "train", "; make them with: python datasets/clevrer_preparation.py (--help)"),
        ("phyre", "train", "; make them with: python datasets/phyre_preparation.py (--help)"),
        ("traffic/img128np.npy", "", "; make it with: python datasets/traffic_preparation.py (--help)"),
    ],
)
def test_what_is_missing_says_how_to_get_it(tmp_path, monkeypatch, ds, part, hint):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        get_video_dataset(ds.partition("/")[0], None)
    check_line(error, f"{Path('data', ds, part)}: cannot be read: No such file or directory; legal: ")
    assert str(error.value).endswith(hint)
    assert (REPOSITORY / re.search(r"datasets/\w+\.py", hint)[0]).is_file()


def test_an_episode_of_phyre_without_frames_to_use(tmp_path):
    write_episodes(tmp_path / "train", {"00000": 30}, digits=5)
    with pytest.raises(UserError) as error:
        PhyreVideos(tmp_path, "train", 8, 1)
    assert str(error.value) == (
        f"{tmp_path}/train/00000: is an episode of 30 frames; legal: at least 31, as the last 30 are cut"
    )


@pytest.mark.parametrize(("videos", "images"), [(Obj3dVideos, Obj3dImages), (PhyreVideos, PhyreImages)])
def test_too_long_windows(trees, phyre, videos, images):
    root = phyre if videos is PhyreVideos else trees / "obj3d"
    for kind, mode in ((videos, "train"), (videos, "test"), (images, "test")):
        with pytest.raises(UserError) as error:
            kind(root, mode, 8, 101)
        text = f"sample_length: 101 frames are more than the 100 of an episode of {root}/{mode}; legal: at most so many"
        assert str(error.value).startswith(text)


FRAMES = np.zeros((100, 8, 8, 3), np.uint8)
LEGAL_ARRAY = "uint8 [frames, height, width, 3] with height = width"
NOT_WHOLE = f"cannot be read: it is not a whole .npy file; legal: a .npy, {LEGAL_ARRAY}"
BROKEN_RECORDINGS = {
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-1]), NOT_WHOLE),
    "cut in its header": (lambda path: path.write_bytes(path.read_bytes()[:50]), NOT_WHOLE),
    "empty": (lambda path: path.write_bytes(b""), NOT_WHOLE),
    "foreign": (lambda path: path.write_text("text"), NOT_WHOLE),
    "many": (lambda path: np.savez(path.open("wb"), a=1, b=2), NOT_WHOLE),
    "objects": (lambda path: np.save(path, np.array([None] * 100), allow_pickle=True), NOT_WHOLE),
    "folder": (lambda path: (path.unlink(), path.mkdir()), "cannot be read: Is a directory; legal: a .npy, "),
    "floats": (lambda path: np.save(path, FRAMES / 255), f"holds float64 [100, 8, 8, 3]; legal: {LEGAL_ARRAY}"),
    "grey": (lambda path: np.save(path, FRAMES[..., 0]), f"holds uint8 [100, 8, 8]; legal: {LEGAL_ARRAY}"),
    "alpha": (lambda path: np.save(path, FRAMES[..., [0, 1, 2, 0]]), "holds uint8 [100, 8, 8, 4]; legal: "),
    "oblong": (lambda path: np.save(path, FRAMES[:, :6]), "holds uint8 [100, 6, 8, 3]; legal: "),
    "none": (lambda path: np.save(path, FRAMES[:0]), "holds uint8 [0, 8, 8, 3]; legal: "),
}


@pytest.mark.parametrize("kind", BROKEN_RECORDINGS)
def test_a_broken_recording_is_refused(traffic, kind):
    np.save(traffic, FRAMES)
    damage, message = BROKEN_RECORDINGS[kind]
    damage(traffic)
    with pytest.raises(UserError) as error:
        TrafficVideos(traffic, "train", 8, 11)
    check_line(error, f"{traffic}: {message}")


def test_a_short_recording_is_refused(traffic):
    np.save(traffic, FRAMES)
    most = "; legal: at most so many (timestep_horizon + 1, animation_horizon, --horizon or diffuse_frames)"
    for arguments, message in (
        (("val", 8, 11), f"the val part of {traffic} has 10 frames; legal: at least 50, one episode"),
        (("test", 8, 60), f"the test part of {traffic} has 10 frames; legal: at least 60, one episode"),
        (
            ("train", 8, 81),
            f"sample_length: 81 frames are more than the 80 of the train part of {traffic}{most}",
        ),
    ):
        with pytest.raises(UserError) as error:
            TrafficVideos(traffic, *arguments)
        assert str(error.value) == message
    with pytest.raises(UserError, match="sample_length: 11 frames are more than the 10 of the test part of "):
        TrafficImages(traffic, "test", 8, 11)
