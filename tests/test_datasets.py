"""Shapes against scikit-image itself, its files under damage and rivalry, and the registry of data sets."""

import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from skimage.draw import random_shapes
from torch.utils.data import Dataset

from configs.schema import Config
from datasets import get_dataset, shapes_ds
from datasets.get_dataset import (
    get_image_dataset,
    get_video_dataset,
    image_dataset,
    register,
    shard_loader,
    video_dataset,
)
from datasets.shapes_ds import ShapesDataset, ShapesDrawing, draw_shapes, generate_shape_dataset_torch
from eval import eval_gen_metrics
from eval.eval_gen_metrics import prediction_videos
from utils.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[1]
NUM_IMAGES = 6
STREAMS = {"train": 0, "val": 1, "valid": 1, "test": 2}
# One process stops halfway through the drawing, three more want the same set, the first is killed. Every drawing that
# is begun leaves a line in `begun`.
RIVALS = """
import os, signal, sys, time
from pathlib import Path
from datasets.shapes_ds import ShapesDataset, ShapesDrawing

root, number = Path(sys.argv[1]), int(sys.argv[2])
draw_files, draw_image = ShapesDataset._draw, ShapesDrawing.draw

def counted(self):
    with open(root / "begun", "a") as file:
        print(os.getpid(), file=file)
    draw_files(self)

def stuck(self, index):
    return draw_image(self, index) if index < number // 2 else time.sleep(600)

def start(draw):
    pid = os.fork()
    if pid == 0:
        ShapesDataset._draw, ShapesDrawing.draw = counted, draw
        ShapesDataset(root, num_images=number)
        os._exit(0)
    return pid

first = start(stuck)
while not any(part.stat().st_size for part in root.glob(".*.part.npy")):
    time.sleep(0.005)
others = [start(draw_image) for _ in range(3)]
time.sleep(0.2)
assert (root / "begun").read_text().split() == [str(first)]
os.kill(first, signal.SIGKILL)
os.waitpid(first, 0)
assert [os.waitpid(pid, 0)[1] for pid in others] == [0, 0, 0]
"""


def drawn_by_skimage(mode, index, seed=0, image_size=64):
    """One image, float64 [H, W, 3] in 0..1, and its labels, from the documented seed and settings."""
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(STREAMS[mode], index)))
    image, labels = random_shapes(
        (image_size, image_size), max_shapes=5, min_shapes=2, min_size=11, max_size=13, rng=rng, channel_axis=-1
    )
    for row in range(image_size):
        for column in range(image_size):
            if tuple(image[row, column]) == (255, 255, 255):
                image[row, column] = (0, 255, 255)
    return image / 255, labels


def extents_by_colour(image):
    """The bounding boxes (y1, x1, y2, x2) of the pixels of each colour but the background's; image [3, H, W]."""
    pixels = np.round(255 * image.numpy()).astype(int).transpose(1, 2, 0)
    boxes = set()
    for colour in {tuple(pixel) for pixel in pixels.reshape(-1, 3)} - {(0, 255, 255)}:
        rows, columns = np.nonzero((pixels == colour).all(axis=-1))
        boxes.add((rows.min(), columns.min(), rows.max() + 1, columns.max() + 1))
    return boxes


def images_of(dataset):
    return torch.stack([dataset[index][0] for index in range(len(dataset))])


# ---- what is drawn


@pytest.mark.parametrize(
    ("mode", "seed", "image_size"), [("train", 0, 64), ("val", 0, 64), ("valid", 5, 64), ("test", 0, 90)]
)
def test_images_and_labels_are_skimages(tmp_path, mode, seed, image_size):
    dataset = ShapesDataset(tmp_path, mode, image_size, num_images=3, seed=seed)
    assert len(dataset) == 3
    for index in range(3):
        expected, labels = drawn_by_skimage(mode, index, seed, image_size)
        (image,) = dataset[index]
        assert image.shape == (3, image_size, image_size) and image.dtype == torch.float32
        assert image.is_contiguous()
        np.testing.assert_allclose(image.numpy(), expected.transpose(2, 0, 1), atol=1e-7)
        assert dataset.labels(index) == [kind for kind, _ in labels]
        boxes = dataset.boxes(index)
        assert boxes.dtype == np.int64
        assert boxes.tolist() == [[max(y1, 0), x1, y2, x2] for _, ((y1, y2), (x1, x2)) in labels]


def test_boxes_bound_the_pixels_of_each_shape(tmp_path):
    dataset = ShapesDataset(tmp_path, "val", num_images=60)
    kinds, over_the_top = set(), 0
    for index in range(60):
        boxes = {tuple(box) for box in dataset.boxes(index)}
        assert 2 <= len(boxes) <= 5
        assert extents_by_colour(dataset[index][0]) == boxes
        kinds |= set(dataset.labels(index))
        over_the_top += any(y1 < 0 for _, ((y1, _), _) in drawn_by_skimage("val", index)[1])
    assert kinds == {"rectangle", "circle", "triangle", "ellipse"}
    assert over_the_top > 0


def test_small_images_may_hold_fewer_shapes_without_a_warning(tmp_path, recwarn):
    dataset = ShapesDataset(tmp_path, image_size=14, num_images=12)
    assert min(len(dataset.boxes(index)) for index in range(12)) < 2
    assert not recwarn.list


def test_modes_and_seeds_differ_and_val_is_valid(tmp_path):
    sets = [ShapesDataset(tmp_path, mode, num_images=2) for mode in ("train", "val", "test")]
    sets.append(ShapesDataset(tmp_path, num_images=2, seed=1))
    firsts = [images_of(dataset) for dataset in sets]
    for number, one in enumerate(firsts):
        assert not any(torch.equal(image, other) for later in firsts[number + 1 :] for image in one for other in later)
    files = set(tmp_path.iterdir())
    assert torch.equal(images_of(ShapesDataset(tmp_path, "valid", num_images=2)), firsts[1])
    assert set(tmp_path.iterdir()) == files


def test_a_smaller_set_begins_a_larger_one(tmp_path):
    small, large = (ShapesDataset(tmp_path, num_images=number) for number in (3, 7))
    assert torch.equal(images_of(small), images_of(large)[:3])
    assert all(np.array_equal(small.boxes(index), large.boxes(index)) for index in range(3))


def test_number_of_images(tmp_path, monkeypatch):
    record = ShapesDrawing(0, 0, 13).draw(0)
    monkeypatch.setattr(ShapesDrawing, "draw", lambda self, index: record)
    monkeypatch.setattr(shapes_ds, "available_cores", lambda: 1)
    lengths = {mode: len(ShapesDataset(tmp_path, mode, 13)) for mode in STREAMS}
    assert lengths == {"train": 40_000, "val": 2_000, "valid": 2_000, "test": 2_000}


def test_two_processes_draw_what_one_draws():
    drawing = ShapesDrawing(seed=0, stream=1)
    one, two = ([record.tobytes() for record in draw_shapes(drawing, 7, number)] for number in (1, 2))
    assert len(one) == 7
    assert one == two


def test_a_drawing_process_that_fails_is_reported(monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(RuntimeError, match="exit status 1"):
        list(draw_shapes(ShapesDrawing(seed=0, stream=0), 4, processes=2))


# ---- the files


def test_files_are_drawn_once_and_mapped(tmp_path, monkeypatch):
    first = images_of(ShapesDataset(tmp_path, num_images=NUM_IMAGES))
    monkeypatch.setattr(ShapesDataset, "_draw", None)
    dataset = ShapesDataset(tmp_path, num_images=NUM_IMAGES)
    assert torch.equal(images_of(dataset), first)
    on_disk = np.load(tmp_path / f"train_64x64_{NUM_IMAGES}_seed0.npy", mmap_mode="r")
    assert on_disk.shape == (NUM_IMAGES, 64, 64, 3) and on_disk.dtype == np.uint8
    assert np.array_equal(np.round(first.numpy() * 255), on_disk.transpose(0, 3, 1, 2))
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 5_000
    assert torch.equal(images_of(pickle.loads(pickled)), first)
    with pytest.raises(IndexError):
        dataset[NUM_IMAGES]


def test_an_interrupted_drawing_leaves_nothing(tmp_path, monkeypatch):
    expected = images_of(ShapesDataset(tmp_path / "whole", num_images=NUM_IMAGES))
    draw = ShapesDrawing.draw

    def interrupted(self, index):
        if index == NUM_IMAGES - 1:
            raise KeyboardInterrupt
        return draw(self, index)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ShapesDrawing, "draw", interrupted)
        ShapesDataset(tmp_path / "cut", num_images=NUM_IMAGES)
    assert [path.suffix for path in (tmp_path / "cut").iterdir()] == [".lock"]
    assert torch.equal(images_of(ShapesDataset(tmp_path / "cut", num_images=NUM_IMAGES)), expected)


def test_processes_at_once_draw_one_set_and_outlive_a_killed_one(tmp_path, monkeypatch):
    number = 200
    command = [sys.executable, "-c", RIVALS, str(tmp_path), str(number)]
    subprocess.run(command, cwd=REPOSITORY, check=True, timeout=120)
    assert len((tmp_path / "begun").read_text().split()) == 2
    assert not list(tmp_path.glob(".*.part*"))  # that of the killed one either
    monkeypatch.setattr(ShapesDataset, "_draw", None)
    dataset = ShapesDataset(tmp_path, num_images=number)
    for index in range(0, number, 19):
        np.testing.assert_allclose(
            dataset[index][0].numpy(), drawn_by_skimage("train", index)[0].transpose(2, 0, 1), atol=1e-7
        )


def without_its_end(path):
    array = np.load(path)
    array[-1] = 0
    np.save(path, array)


DAMAGES = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "foreign": lambda path: path.write_text("not an array"),
    "pickled": lambda path: np.save(path, np.array([None] * NUM_IMAGES), allow_pickle=True),
    "other type": lambda path: np.save(path, np.load(path).astype(np.float32)),
    "too short": lambda path: np.save(path, np.load(path)[:-1]),
    "end unwritten": without_its_end,
}


@pytest.mark.parametrize("name", ["", "_boxes"])
@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_file_is_refused(tmp_path, kind, name):
    expected = images_of(ShapesDataset(tmp_path, num_images=NUM_IMAGES))
    stem = tmp_path / f"train_64x64_{NUM_IMAGES}_seed0"
    path = Path(f"{stem}{name}.npy")
    DAMAGES[kind](path)
    with pytest.raises(UserError) as error:
        ShapesDataset(tmp_path, num_images=NUM_IMAGES)
    assert str(error.value).startswith(str(path)) and "delete" not in str(error.value)
    assert f"{stem}.npy and {stem}_boxes.npy are moved away" in str(error.value)
    Path(f"{stem}.npy").rename(tmp_path / "away.npy")
    Path(f"{stem}_boxes.npy").rename(tmp_path / "away_boxes.npy")
    assert torch.equal(images_of(ShapesDataset(tmp_path, num_images=NUM_IMAGES)), expected)


def test_files_of_another_seed_or_without_boxes_are_refused(tmp_path):
    ShapesDataset(tmp_path, num_images=2)
    ShapesDataset(tmp_path, num_images=2, seed=1)
    images = tmp_path / "train_64x64_2_seed0.npy"
    shutil.copy(tmp_path / "train_64x64_2_seed1.npy", images)
    with pytest.raises(UserError, match=r"train_64x64_2_seed0\.npy"):
        ShapesDataset(tmp_path, num_images=2)
    (tmp_path / "train_64x64_2_seed1_boxes.npy").unlink()
    with pytest.raises(UserError, match=r"train_64x64_2_seed1_boxes\.npy is missing"):
        ShapesDataset(tmp_path, num_images=2, seed=1)


def test_an_unwritable_root_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"root: .*file/shapes: Not a directory"):
        ShapesDataset(tmp_path / "file" / "shapes", num_images=1)


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"mode": "training"}, 'mode is "training"'),
        ({"image_size": 12}, "image_size is 12"),
        ({"image_size": 64.0}, "image_size is 64.0"),
        ({"num_images": 0}, "num_images is 0"),
        ({"num_images": -3}, "num_images is -3"),
        ({"num_images": True}, "num_images is true"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_illegal_arguments(tmp_path, arguments, key):
    with pytest.raises(UserError, match=key):
        ShapesDataset(tmp_path, **arguments)
    assert not list(tmp_path.iterdir())


# ---- the call of the published release


def test_generate_shape_dataset_torch():
    torch.manual_seed(0)
    dataset = generate_shape_dataset_torch(
        img_size=40, min_shapes=2, max_shapes=2, min_size=5, max_size=9, num_images=8
    )
    (images,) = dataset.tensors
    assert images.shape == (8, 3, 40, 40) and images.dtype == torch.float32
    assert len(dataset[3]) == 1 and torch.equal(dataset[3][0], images[3])
    background = (images == torch.tensor([0.0, 1.0, 1.0])[None, :, None, None]).all(dim=1)
    assert (background.float().mean(dim=(1, 2)) > 1 - 2 * 12 * 12 / 1600).all()
    assert {len(extents_by_colour(image)) for image in images} == {2}
    again = generate_shape_dataset_torch(40, 2, 2, 5, 9, False, 8).tensors[0]
    assert not torch.equal(again, images)
    torch.manual_seed(0)
    assert torch.equal(generate_shape_dataset_torch(40, 2, 2, 5, 9, False, 8).tensors[0], images)


def test_generate_shape_dataset_torch_by_default():
    (images,) = generate_shape_dataset_torch(num_images=20).tensors
    assert images.shape == (20, 3, 64, 64)
    assert {len(extents_by_colour(image)) for image in images} <= {2, 3, 4, 5}
    assert len({len(extents_by_colour(image)) for image in images}) > 1


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"img_size": 12}, "img_size is 12"),
        ({"min_shapes": 6}, "max_shapes is 5"),
        ({"min_shapes": -1}, "min_shapes is -1"),
        ({"min_size": 1}, "min_size is 1"),
        ({"max_size": 10}, "max_size is 10"),
        ({"num_images": 0}, "num_images is 0"),
    ],
)
def test_generate_shape_dataset_torch_refuses(arguments, key):
    with pytest.raises(UserError, match=key):
        generate_shape_dataset_torch(**{"num_images": 1, **arguments})


# ---- the registry


class Calls(Dataset):
    """A data set of ten items, clips as long as is asked for, whose value is the index in hundredths, and the
    arguments that it was made with."""

    def __init__(self, root, **arguments):
        self.arguments = {"root": root, **arguments}

    def __len__(self):
        return 10

    def __getitem__(self, index):
        shape = self.arguments["sample_length"], 3, *2 * [self.arguments["image_size"]]
        return torch.full(shape, index / 100), self.arguments


class ImageCalls(Calls):
    """The same with images, where clips of one frame are asked for."""

    def __getitem__(self, index):
        x, arguments = super().__getitem__(index)
        return (x[0] if len(x) == 1 else x), arguments


def number_of(item):
    """The index of an item of `Calls`."""
    return round(100 * item[0].mean().item())


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(get_dataset, "_VARIANTS", dict(get_dataset._VARIANTS))


def test_shapes_by_name(tmp_path, monkeypatch):
    dataset = get_image_dataset("shapes", tmp_path, "val", 64, num_items=2)
    assert len(dataset) == 2 and len(dataset.boxes(1)) >= 2
    np.testing.assert_allclose(dataset[1][0].numpy(), drawn_by_skimage("val", 1)[0].transpose(2, 0, 1), atol=1e-7)
    assert np.load(tmp_path / "val_64x64_2_seed0.npy").shape == (2, 64, 64, 3)
    monkeypatch.chdir(tmp_path)
    get_image_dataset("shapes", None, "test", 64, num_items=1)
    assert (tmp_path / "data" / "shapes" / "test_64x64_1_seed0.npy").exists()


def test_ones_own_data_set_in_one_line(registry):
    register("mine", image=ImageCalls, video=Calls)
    image = get_image_dataset("mine", "folder", mode="test", image_size=32, seq_len=3)
    assert number_of(image[4]) == 4
    assert image[4][1] == {"root": "folder", "mode": "test", "image_size": 32, "sample_length": 3}
    video = get_video_dataset("mine", "folder", 7, "val")
    assert number_of(video[9]) == 9
    assert video[9][1] == {"root": "folder", "mode": "val", "image_size": 128, "sample_length": 7}
    assert [len(get_video_dataset("mine", "folder", num_items=number)) for number in (None, 4, 10, 30)] == [
        10,
        4,
        10,
        10,
    ]
    assert [number_of(item) for item in get_video_dataset("mine", "folder", num_items=4)] == [0, 2, 5, 7]


def test_a_configuration_says_which_items_and_how_many(registry, monkeypatch):
    register("mine", image=ImageCalls, video=Calls)
    config = Config(ds="mine", timestep_horizon=4, batch_size=4, train_size=6, val_size=3)
    videos = {mode: video_dataset(config, mode, 7) for mode in ("train", "val", "test")}
    assert {mode: len(videos[mode]) for mode in videos} == {"train": 6, "val": 3, "test": 10}
    assert {videos[mode][0][1]["mode"] for mode in videos} == set(videos)
    assert videos["train"][0][1]["sample_length"] == 7
    assert len(image_dataset(config, "val")) == 3
    lengths = [
        image_dataset(config.replace(use_tracking=tracks), "train")[0][1]["sample_length"] for tracks in (False, True)
    ]
    assert lengths == [1, 5]
    monkeypatch.setattr(eval_gen_metrics, "TRAIN_WINDOWS", 3)
    measured = [number_of(item) for item in prediction_videos(config.replace(train_size=None), "train", 7)]
    assert measured == [0, 3, 6] and len(prediction_videos(config, "test", 7)) == 10


def test_processes_share_out_the_items_and_videos_are_cut():
    videos = [(torch.full((5,), number), torch.arange(5)) for number in range(5)]
    accelerator = SimpleNamespace(num_processes=2, process_index=1)
    batches = list(shard_loader(videos, 1, accelerator=accelerator, num_frames=3))
    assert [[entry.tolist() for entry in batch] for batch in batches] == [[[[n] * 3], [[0, 1, 2]]] for n in (1, 3)]
    assert torch.cat([batch[0] for batch in shard_loader(videos, 2)])[:, 4].tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(UserError, match=r"6 frames .* has 5"):
        list(shard_loader(videos, 2, num_frames=6))


def test_takes_num_items(registry):
    register("mine", image=ImageCalls, takes_num_items=True)
    assert get_image_dataset("mine", "folder")[0][1]["num_items"] is None
    assert get_image_dataset("mine", "folder", num_items=4)[0][1]["num_items"] == 4


def test_a_named_variant_is_imported_when_asked_for(registry, tmp_path, monkeypatch):
    (tmp_path / "my_own_data.py").write_text(
        "import torch\n\n"
        "def videos(root, mode, image_size, sample_length):\n"
        "    return [(torch.zeros(1, 3, 128, 128), root)]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    register("mine", video="my_own_data:videos")
    assert "my_own_data" not in sys.modules
    assert get_video_dataset("mine", "folder")[0][1] == "folder"
    del sys.modules["my_own_data"]


def test_registry_refuses(registry):
    register("mine", video=Calls)
    with pytest.raises(UserError, match=r'ds is "schapes"; legal: balls, clevrer, mine, .*shapes'):
        get_image_dataset("schapes", None)
    with pytest.raises(UserError, match=r'ds is "mine"; legal: .* images: balls, .*shapes'):
        get_image_dataset("mine", None)
    with pytest.raises(UserError, match=r'ds is "shapes"; legal: .* videos: balls, clevrer, mine'):
        get_video_dataset("shapes", None)
    with pytest.raises(UserError, match="num_items is 0; legal"):
        get_video_dataset("mine", None, num_items=0)
    with pytest.raises(UserError, match="'mine' is taken"):
        register("mine", image=Calls)
    with pytest.raises(UserError, match="neither an image nor a video variant"):
        register("yours")
    with pytest.raises(UserError, match=r"'datasets\.mine' of the data set 'yours'"):
        register("yours", image="datasets.mine")
