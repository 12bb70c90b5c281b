"""One's own Dataset: each item is checked, the first before training, and what is wrong is one line."""

import pickle
import re

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

import train_ddlp
import train_dlp
from datasets import get_dataset
from datasets.item_check import CheckedItems
from tests.balls import SMALL, run_in, write_config
from utils.errors import UserError

SIZE = 32


class Items(Dataset):
    """Any item."""

    def __init__(self, item, length=4):
        self.item, self.length = item, length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return self.item


def frames(*shape, low=0.0, high=1.0, dtype=torch.float32):
    """Values from `low` to `high`, both taken."""
    return torch.linspace(low, high, int(np.prod(shape))).reshape(shape).to(dtype)


IMAGE, CLIP = frames(3, SIZE, SIZE), frames(5, 3, SIZE, SIZE)
WRONG = [
    # num_frames, item, what is said
    (None, IMAGE, "item 0 is a Tensor; legal: a tuple whose first entry is the tensor of frames (return (x,))"),
    (None, {"image": IMAGE}, "item 0 is a dict; legal: a tuple whose first entry is the tensor of frames"),
    (
        None,
        (IMAGE.numpy(),),
        "item 0's first entry is a ndarray; legal: a tensor, as torch.from_numpy makes of an array",
    ),
    (
        None,
        (frames(3, SIZE, SIZE, high=255, dtype=torch.uint8),),
        "frames are uint8; legal: float32 in 0..1 (x.float() / 255)",
    ),
    (None, (IMAGE.double(),), "frames are float64; legal: float32 in 0..1 (x.float())"),
    (None, (frames(3, SIZE, SIZE, high=255),), "frames have values from 0 to 255; legal: 0..1 (x / 255)"),
    (None, (frames(3, SIZE, SIZE, low=-1),), "frames have values from -1 to 1; legal: 0..1 ((x + 1) / 2)"),
    (None, (frames(3, SIZE, SIZE, low=-2, high=3),), "frames have values from -2 to 3; legal: 0..1"),
    (None, (IMAGE * torch.nan,), "frames have values that are not finite; legal: 0..1"),
    (None, (frames(1, SIZE, SIZE),), "of shape [1, 32, 32]; legal: [3, 32, 32] (one channel three times: x.expand)"),
    (
        None,
        (frames(SIZE, SIZE, 3),),
        "of shape [32, 32, 3]; legal: [3, 32, 32] (channels come before height and width: x.movedim(-1, -3))",
    ),
    (None, (frames(3, 48, 64),), "of shape [3, 48, 64]; legal: [3, 32, 32] (image_size says how large)"),
    (None, (CLIP,), "of shape [5, 3, 32, 32]; legal: [3, 32, 32]"),
    (None, (frames(4, SIZE, SIZE),), "of shape [4, 32, 32]; legal: [3, 32, 32]"),
    (4, (IMAGE,), "of shape [3, 32, 32]; legal: [T, 3, 32, 32], T at least 4"),
    (6, (CLIP,), "of shape [5, 3, 32, 32]; legal: [T, 3, 32, 32], T at least 6"),
    (4, (frames(5, SIZE, SIZE, 3),), "(channels come before height and width: x.movedim(-1, -3))"),
]


@pytest.mark.parametrize(("num_frames", "item", "text"), WRONG)
def test_what_is_wrong_with_an_item_is_one_line(num_frames, item, text):
    with pytest.raises(UserError, match=f"^data set mine: .*{re.escape(text)}$") as error:
        CheckedItems(Items(item), "mine", SIZE, num_frames)
    assert str(error.value).isprintable()


def test_items_that_are_legal():
    CheckedItems(Items((IMAGE,)), "mine", SIZE)
    CheckedItems(Items([IMAGE, "label"]), "mine", SIZE)
    CheckedItems(Items((CLIP,)), "mine", SIZE, 4)
    CheckedItems(Items((frames(3, SIZE, SIZE, low=-1e-4, high=1 + 1e-4),)), "mine", SIZE)
    CheckedItems(Items((frames(3, SIZE, SIZE, high=255, dtype=torch.uint8),)), "mine", SIZE, may_be_uint8=True)


def test_data_sets_without_items_or_a_length():
    with pytest.raises(UserError, match="data set mine: is empty"):
        CheckedItems(Items((IMAGE,), 0), "mine", SIZE)
    with pytest.raises(UserError, match="data set mine: has no length"):
        CheckedItems(iter([]), "mine", SIZE)


class OneWrong(Items):
    """Items of which the one at 2 is not legal."""

    def __getitem__(self, index):
        return (self.item[0] * 255,) if index == 2 else self.item

    def describe(self):
        return "mine"

    def __getitems__(self, indices):
        return [self.item for _ in indices]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_every_item_is_checked_wherever_it_is_read(num_workers):
    """Evaluation, prediction and metrics read through `shard_loader`."""
    items = CheckedItems(OneWrong((IMAGE,)), "mine", SIZE)
    assert items.describe() == "mine" and torch.equal(pickle.loads(pickle.dumps(items))[1][0], IMAGE)
    with pytest.raises(UserError, match=r"^data set mine: item 2's frames have values from 0 to 255; legal: 0\.\.1"):
        list(get_dataset.shard_loader(items, 2, num_workers))


def test_training_stops_at_an_item_that_is_not_legal(mine, tmp_path):
    mine((IMAGE,), OneWrong)
    path = write_config(tmp_path, None, ds="mine", batch_size=2, num_workers=1)
    with pytest.raises(UserError, match=r"^data set mine: item 2's frames have values from 0 to 255"):
        run_in(tmp_path, train_dlp.main, "-d", path)


@pytest.fixture
def mine(monkeypatch):
    monkeypatch.setattr(get_dataset, "_VARIANTS", dict(get_dataset._VARIANTS))

    def register(item, kind=Items):
        def make(root, mode, image_size, sample_length):
            return kind(item)

        get_dataset.register("mine", image=make, video=make)

    return register


@pytest.mark.parametrize(
    ("main", "item", "text"),
    [
        (train_dlp.main, (IMAGE * 255,), r"data set mine: .* from 0 to 255; legal: 0\.\.1"),
        (train_ddlp.main, (frames(6, SIZE, SIZE, 3),), "data set mine: .*channels come before"),
        (train_ddlp.main, (CLIP,), r"item 0's frames are of shape \[5, 3, 32, 32\]|6 frames are asked for, but"),
    ],
)
def test_training_does_not_start_on_it(main, item, text, tmp_path, mine):
    mine(item)
    path = write_config(tmp_path, None, ds="mine")
    with pytest.raises(UserError, match=text):
        run_in(tmp_path, main, "-d", path)
    assert SMALL["animation_horizon"] == 6 and not list(tmp_path.glob("*_mine_*"))


def test_a_class_that_cannot_be_imported_is_named(mine, tmp_path, monkeypatch):
    (tmp_path / "with_a_mistake.py").write_text("import not_installed\n")
    monkeypatch.syspath_prepend(tmp_path)
    get_dataset.register("gone", image="gone_data:Images")
    get_dataset.register("other", image="tests.balls:Images")
    get_dataset.register("mistake", image="with_a_mistake:Images")
    with pytest.raises(UserError, match="data set gone: gone_data:Images: no module gone_data in"):
        get_dataset.get_image_dataset("gone", None)
    with pytest.raises(UserError, match=r"data set other: tests.balls:Images: .* has no attribute 'Images'"):
        get_dataset.get_image_dataset("other", None)
    with pytest.raises(ModuleNotFoundError, match="not_installed"):
        get_dataset.get_image_dataset("mistake", None)
