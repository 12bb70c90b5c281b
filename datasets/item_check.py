"""What an item of a data set must be like: one's own data set may not know, and trains badly without a word."""

import torch
from torch.utils.data import Dataset

from utils.errors import UserError

TOLERANCE = 1e-3  # beyond 0..1, for what interpolation and rounding leave


class CheckedItems(Dataset):
    """The data set `ds`, each item of which is checked wherever it is read; the first one now.

    num_frames: of a clip, at least; None: an item is an image. may_be_uint8: whether uint8 in 0..255 is legal. Raises
    `UserError`, one line, for an item that is not what `datasets.get_dataset` asks for.
    """

    def __init__(self, dataset, ds, image_size, num_frames=None, may_be_uint8=False):
        self.dataset, self.ds, self.legal = dataset, ds, (image_size, num_frames, may_be_uint8)
        try:
            length = len(dataset)
        except TypeError as error:
            raise UserError(f"data set {ds}: has no length; legal: a Dataset with __len__ and __getitem__") from error
        if length == 0:
            raise UserError(f"data set {ds}: is empty; legal: at least one item")
        self[0]

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        item = self.dataset[index]
        fault = _fault(item, *self.legal)
        if fault is not None:
            raise UserError(f"data set {self.ds}: item {index}{fault}")
        return item

    def __getattr__(self, name):
        if name.startswith("__") or "dataset" not in vars(self):  # nothing but items goes through `__getitems__`
            raise AttributeError(name)
        return getattr(self.dataset, name)


def _fault(item, image_size, num_frames, may_be_uint8):
    """What is wrong with an item and what is legal, in words that follow its number; None if nothing is."""
    if not isinstance(item, (tuple, list)) or len(item) == 0:
        hint = " (return (x,))" if torch.is_tensor(item) else ""
        return f" is a {type(item).__name__}; legal: a tuple whose first entry is the tensor of frames{hint}"
    x = item[0]
    if not torch.is_tensor(x):
        return f"'s first entry is a {type(x).__name__}; legal: a tensor, as torch.from_numpy makes of an array"
    return _fault_of_shape(x, image_size, num_frames) or _fault_of_values(x, may_be_uint8)


def _fault_of_shape(x, image_size, num_frames):
    size, shape = f"{image_size}, {image_size}", list(x.shape)
    legal = f"[3, {size}]" if num_frames is None else f"[T, 3, {size}], T at least {num_frames}"
    dims = 3 if num_frames is None else 4
    if x.dim() != dims:
        hint = ""
    elif shape[-3] == 1:
        hint = " (one channel three times: x.expand)"
    elif shape[-1] in (1, 3) and shape[-3] != 3:
        hint = " (channels come before height and width: x.movedim(-1, -3))"
    elif shape[-3:] != [3, image_size, image_size]:
        hint = " (image_size says how large)" if shape[-3] == 3 else ""
    elif num_frames is not None and shape[0] < num_frames:
        hint = ""
    else:
        return None
    return f"'s frames are of shape {shape}; legal: {legal}{hint}"


def _fault_of_values(x, may_be_uint8):
    if x.dtype == torch.uint8 and may_be_uint8:
        return None
    if x.dtype != torch.float32:
        hint = " (x.float() / 255)" if x.dtype == torch.uint8 else " (x.float())"
        return f"'s frames are {str(x.dtype).removeprefix('torch.')}; legal: float32 in 0..1{hint}"
    low, high = x.min().item(), x.max().item()
    if low >= -TOLERANCE and high <= 1 + TOLERANCE:
        return None
    if low != low or high != high:
        return "'s frames have values that are not finite; legal: 0..1"
    hints = {(True, True): " ((x + 1) / 2)", (False, False): " (x / 255)"}
    hint = hints.get((low < 0, high <= 1 + TOLERANCE), "")
    return f"'s frames have values from {low:.4g} to {high:.4g}; legal: 0..1{hint}"
