"""Windows, and decoded frames that are kept on disk: made once, shared, made anew, never broken."""

import errno
import fcntl
import os
import pickle
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from configs.schema import Config
from datasets import frame_cache, get_dataset
from datasets.episodes import Windows, scaled
from datasets.particle_cache import cached_tokens
from tests.frames import TextEpisodes, TextVideos, digits_of, write_texts
from utils.errors import UserError
from utils.files import file_lock

REPOSITORY = Path(__file__).resolve().parents[1]
EPISODES = {"train_0": "0123456", "train_1": "789", "train_2": "54321", "val_0": "68"}
# One process stops after two of the three episodes, two more want the same frames, the first is killed. Every writing
# that is begun leaves a line in `begun`.
RIVALS = """
import os, signal, sys, time
from pathlib import Path
from datasets import frame_cache
from tests.frames import TextEpisodes, TextVideos, digits_of

root = Path(sys.argv[1])
write, read = frame_cache._write, TextEpisodes.read

def counted(path, name, source):
    with open(root / "begun", "a") as file:
        print(os.getpid(), file=file)
    write(path, name, source)

def stuck(self, episode, start, stop):
    return read(self, episode, start, stop) if episode < 2 else time.sleep(600)

def start(read_frames):
    pid = os.fork()
    if pid == 0:
        frame_cache._write, TextEpisodes.read = counted, read_frames
        os.dup2(os.open(root / "said", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        os._exit(digits_of(TextVideos(root, "train", 4, 3)[8][0]) != "321")
    return pid

first = start(stuck)
while not list(root.glob(".cache/.*.part.npy")):
    time.sleep(0.005)
others = [start(read) for _ in range(2)]
while (root / "said").read_text().count("waiting for another process that decodes the frames of ") < 2:
    time.sleep(0.005)
assert (root / "begun").read_text().split() == [str(first)]
os.kill(first, signal.SIGKILL)
os.waitpid(first, 0)
assert [os.waitpid(pid, 0)[1] for pid in others] == [0, 0]
"""


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return write_texts(tmp_path / "data", **EPISODES)


def items_of(dataset):
    return [digits_of(dataset[index][0]) for index in range(len(dataset))]


def files_in(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def cache_file(root):
    (path,) = root.glob(".cache/[!.]*.npy")
    return path


# ---- windows


@pytest.mark.parametrize("size", [1, 2, 5])
def test_windows(size):
    lengths = [5, 9, 7]
    expected = [
        (e, first, size) for e, length in enumerate(lengths) for first in range(length) if first + size <= length
    ]
    windows = Windows.sliding(lengths, size, lengths)
    assert [windows[index] for index in range(len(windows))] == expected
    assert windows[-1] == expected[-1] and windows[np.int64(3)] == expected[3]
    for index in (len(windows), -len(windows) - 1):
        with pytest.raises(IndexError):
            windows[index]
    whole = Windows.whole(lengths)
    assert [whole[index] for index in range(len(whole))] == [(0, 0, 5), (1, 0, 9), (2, 0, 7)]


def test_windows_are_moved_back_to_the_end():
    windows = Windows.sliding([6, 6], 3, [4, 2])
    assert [windows[index][:2] for index in range(8)] == [
        (0, 0),
        (0, 1),
        (0, 1),
        (0, 1),
        (1, 0),
        (1, 0),
        (1, 0),
        (1, 0),
    ]
    windows = Windows([3, 2], [25, 10], [10, 10], stride=10)
    assert [windows[index] for index in range(5)] == [(0, 0, 10), (0, 10, 10), (0, 20, 10), (1, 0, 10), (1, 10, 10)]


def test_scaled():
    frames = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3), np.uint8)
    video = scaled(torch.from_numpy(frames[:, :, ::-1].copy()).permute(0, 3, 1, 2))
    assert video.dtype == torch.float32 and video.shape == (3, 3, 4, 5) and video.is_contiguous()
    for t, c, y, x in np.ndindex(*video.shape):
        assert video[t, c, y, x] == np.float32(frames[t, y, 4 - x, c]) / np.float32(255)
    assert scaled(video) is video


@pytest.mark.parametrize("mode", ["train", "val"])
def test_items_as_uint8_are_the_same_when_scaled(root, mode):
    as_bytes, floats = (TextVideos(root, mode, 4, 1, as_uint8=flag) for flag in (True, False))
    assert as_bytes[0][0].dtype == torch.uint8
    assert all(torch.equal(scaled(as_bytes[i][0]), floats[i][0]) for i in range(len(floats)))


def test_what_follows_the_first_frames_is_not_read(root, monkeypatch):
    write_texts(root, val_0="98765", val_1="0123456", val_2="111111")
    read, spans = TextEpisodes.read, []
    monkeypatch.setattr(TextEpisodes, "read", lambda self, *span: (spans.append(span), read(self, *span))[1])
    monkeypatch.setattr(get_dataset, "_VARIANTS", dict(get_dataset._VARIANTS))
    get_dataset.register("texts", video=TextVideos, decodes=True)
    config = Config(ds="texts", root=str(root), image_size=32, cache=False, val_size=2)
    videos = get_dataset.video_dataset(config, "val", 3, as_uint8=True)
    assert [digits_of(scaled(videos[index][0])) for index in range(2)] == ["987", "012"]
    (batch,) = get_dataset.shard_loader(videos, 2, num_frames=2)
    assert batch[0].dtype == torch.uint8 and batch[0].shape == (2, 2, 3, 32, 32)
    assert spans == [(0, 0, 3), (1, 0, 3), (0, 0, 2), (1, 0, 2)]
    assert len(get_dataset.video_dataset(config, "train", 3)[0][0]) == 3
    with pytest.raises(UserError, match="9 frames are asked for, but an episode has"):
        list(get_dataset.shard_loader(videos, 2, num_frames=9))


@pytest.mark.parametrize("cache", [True, False])
def test_items(root, cache, recwarn):
    train = ["012", "123", "234", "345", "456", "789", "543", "432", "321"]
    assert items_of(TextVideos(root, "train", 4, 3, cache=cache)) == train
    for mode in ("val", "valid"):
        assert items_of(TextVideos(root, mode, 4, 2, cache=cache)) == ["68"]
    assert (root / ".cache").exists() == cache
    assert not recwarn.list


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "training"}, 'mode is "training"; legal: "train" or "val" or "valid" or "test"'),
        ({"mode": None}, "mode is null"),
        ({"image_size": 0}, "image_size is 0; legal: a whole number of at least 1"),
        ({"image_size": 4.0}, "image_size is 4.0"),
        ({"sample_length": 0}, "sample_length is 0"),
        ({"sample_length": True}, "sample_length is true"),
        ({"sample_length": 4}, "sample_length: 4 frames are more than the 3 of an episode of {root}/train"),
        (
            {"sample_length": 3, "mode": "val"},
            "sample_length: 3 frames are more than the 2 of an episode of {root}/val",
        ),
    ],
)
def test_illegal_arguments(root, arguments, message):
    with pytest.raises(UserError) as error:
        TextVideos(root, **{"image_size": 4, "sample_length": 3, **arguments})
    assert str(error.value).startswith(message.format(root=root)) and "\n" not in str(error.value)
    assert not (root / ".cache").exists()


# ---- the file of decoded frames


def test_frames_are_decoded_once_and_mapped(root, monkeypatch, capfd):
    monkeypatch.setattr(frame_cache, "_BLOCK", 2)
    first = items_of(TextVideos(root, "train", 4, 3))
    path = cache_file(root)
    assert f"decoding {root}/train once, into {path}" in capfd.readouterr().err
    expected = np.concatenate([TextEpisodes(root, "train", 4).read(e, 0, n) for e, n in enumerate((7, 3, 5))])
    on_disk = np.load(path, mmap_mode="r")
    assert on_disk.dtype == np.uint8 and np.array_equal(on_disk, expected)
    monkeypatch.setattr(frame_cache, "_write", None)
    dataset = TextVideos(root, "train", 4, 3)
    assert items_of(dataset) == first
    read = dataset._frames.read(2, 1, 4)
    assert read.base is not None and not capfd.readouterr().err
    dataset[8][0].zero_()
    read[:] = 0  # to a copy in memory
    assert np.array_equal(np.load(path), expected)
    assert len(items_of(TextVideos(root, "train", 4, 1))) == 15


def test_other_splits_and_sizes_have_other_files(root):
    for mode, size in (("train", 4), ("train", 5), ("val", 4)):
        TextVideos(root, mode, size, 2)
    names = [name.rpartition("_")[0] for name in files_in(root / ".cache")]
    assert names == ["text_train_4", "text_train_5", "text_val_4"]


def changed_content(root):
    time.sleep(0.01)
    write_texts(root, train_1="987")


def changed_size(root):
    path = root / "train_1.txt"
    before = path.stat()
    path.write_text("9876")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


CHANGES = {
    "content": (changed_content, ["0123456", "987", "54321"]),
    "size": (changed_size, ["0123456", "9876", "54321"]),
    "one more": (lambda root: write_texts(root, train_3="11"), ["0123456", "789", "54321", "11"]),
    "one less": (lambda root: (root / "train_0.txt").unlink(), ["789", "54321"]),
    "renamed": (lambda root: (root / "train_0.txt").rename(root / "train_4.txt"), ["789", "54321", "0123456"]),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_what_has_changed_is_decoded_anew_in_place_of_the_old(root, kind):
    TextVideos(root, "train", 4, 1), TextVideos(root, "train", 8, 1), TextVideos(root, "val", 4, 1)
    kept = files_in(root / ".cache")
    old = next(name for name in kept if name.startswith("text_train_4_"))
    change, expected = CHANGES[kind]
    change(root)
    dataset = TextVideos(root, "train", 4, 1)
    assert digits_of(scaled(torch.from_numpy(dataset._frames._frames).permute(0, 3, 1, 2))) == "".join(expected)
    now = files_in(root / ".cache")
    assert len(now) == 3 and old not in now and set(kept) - {old} < set(now)


def test_another_way_to_decode_makes_it_anew(root, monkeypatch):
    TextVideos(root, "train", 4, 1)
    before = cache_file(root)
    monkeypatch.setattr(frame_cache, "_VERSION", frame_cache._VERSION + 1)
    TextVideos(root, "train", 4, 1)
    assert cache_file(root) != before


def with_another_end(path):
    frames = np.load(path)
    frames[-1] = 0
    np.save(path, frames)


def with_several_arrays(path):
    with open(path, "wb") as file:
        np.savez(file, first=1, second=2)


DAMAGES = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "foreign": lambda path: path.write_text("not an array"),
    "many": with_several_arrays,
    "other type": lambda path: np.save(path, np.load(path).astype(np.float32)),
    "too short": lambda path: np.save(path, np.load(path)[:-1]),
    "end unwritten": with_another_end,
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_file_is_made_anew(root, kind):
    expected = items_of(TextVideos(root, "train", 4, 3))
    path = cache_file(root)
    DAMAGES[kind](path)
    assert items_of(TextVideos(root, "train", 4, 3)) == expected
    assert np.load(path).shape == (15, 4, 4, 3)


@pytest.mark.parametrize("error", [KeyboardInterrupt, UserError("frame 3 is broken"), OSError(errno.ENOSPC, "full")])
def test_an_interruption_leaves_nothing(root, monkeypatch, error):
    read = TextEpisodes.read

    def interrupted(self, episode, start, stop):
        if episode == 1:
            raise error
        return read(self, episode, start, stop)

    with monkeypatch.context() as patch, pytest.raises((KeyboardInterrupt, UserError)) as raised:
        patch.setattr(TextEpisodes, "read", interrupted)
        TextVideos(root, "train", 4, 3)
    assert raised.type is KeyboardInterrupt or str(raised.value) in (
        "frame 3 is broken",
        f"{raised.value.args[0].partition(':')[0]}: cannot be written: full",
    )
    assert files_in(root / ".cache") == []
    assert len(items_of(TextVideos(root, "train", 4, 3))) == 9


def test_what_a_killed_process_left_is_removed(root):
    """On another machine an hour later: until then a process there may write to it."""
    (root / ".cache").mkdir()
    left, fresh, other = (
        root / ".cache" / f".text_{name}.part.npy"
        for name in (
            "train_4_0123456789abcdef.0123abcd-1-01234567",
            "train_4_0123456789abcdef.0123abcd-1-89abcdef",
            "val_4_0123456789abcdef.0123abcd-1-01234567",
        )
    )
    for path in (left, fresh, other):
        path.write_text("half")
        if path is not fresh:
            os.utime(path, times=(time.time() - 3700,) * 2)
    TextVideos(root, "train", 4, 3)
    assert not left.exists() and fresh.exists() and other.exists()
    whole = cache_file(root)
    later = whole.with_name(f".{whole.stem}.0123abcd-1-01234567.part.npy")
    later.write_text("half")
    os.utime(later, times=(time.time() - 3700,) * 2)
    TextVideos(root, "train", 4, 3)
    assert not later.exists() and whole.exists()


def test_processes_at_once_decode_once_and_outlive_a_killed_one(root, monkeypatch):
    done = subprocess.run(
        [sys.executable, "-c", RIVALS, str(root)], cwd=REPOSITORY, timeout=120, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len((root / "begun").read_text().split()) == 2
    assert not list(root.glob(".cache/.*.part.npy")) and cache_file(root)  # that of the killed one is gone
    monkeypatch.setattr(frame_cache, "_write", None)
    assert len(items_of(TextVideos(root, "train", 4, 3))) == 9


def test_a_lock_is_waited_for(tmp_path, monkeypatch, capsys):
    with file_lock(tmp_path / "lock", "waiting"):
        assert not capsys.readouterr().err
    script = "import sys; from utils.files import file_lock\nwith file_lock(sys.argv[1]): print(1); sys.stdin.read()"
    command = [sys.executable, "-u", "-c", script, str(tmp_path / "lock")]
    with subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        holder.stdout.read(1)
        # The other process lets go as soon as something is said.
        said = []
        monkeypatch.setattr(
            sys, "stderr", SimpleNamespace(write=lambda text: said.append(text) or holder.stdin.close())
        )
        with file_lock(tmp_path / "lock", "waiting"):
            assert "".join(said) == "waiting\n"


def test_pickled_without_the_frames(root):
    dataset = TextVideos(root, "train", 64, 3)
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 3_000
    assert items_of(pickle.loads(pickled)) == items_of(dataset)
    path = cache_file(root)
    path.unlink()
    with pytest.raises(UserError, match=f"^{path}: has been deleted or replaced in the meantime; start again$"):
        pickle.loads(pickled)


@pytest.mark.parametrize("cache", [True, False])
def test_items_through_workers(root, cache):
    dataset = TextVideos(root, "train", 4, 3, cache=cache)
    batches = list(DataLoader(dataset, batch_size=3, num_workers=2))
    assert [digits_of(video) for batch in batches for video in batch[0]] == items_of(dataset)
    assert [list(entry.shape) for entry in batches[0]] == [[3, 3, 3, 4, 4], [3, 0], [3, 0], [3, 0], [3, 0]]


def test_tokens_of_another_key_have_a_file_of_their_own(tmp_path, capfd):
    made = []

    def encode(which):
        made.append(len(made))
        yield torch.full((2, 3, 4, 5), made[-1])

    keys = [{"encoder": 1}, {"encoder": 2}, {"encoder": 1}]
    found = [cached_tokens(tmp_path, "toy", key, (2, 3, 4, 5), encode, "")[1][0] for key in keys]
    assert made == [0, 1] and [tokens.unique().tolist() for tokens in found] == [[0], [1], [0]]


# ---- where it is kept


def unwritable(folder):
    """A file in the place of the folder: nobody, root included, can make or write anything in it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.write_text("")


def test_a_root_that_cannot_be_written_to(root, tmp_path):
    unwritable(root / ".cache")
    other = write_texts(tmp_path / "other" / "data", **EPISODES)
    unwritable(other / ".cache")
    before = items_of(TextVideos(root, "train", 4, 3))
    TextVideos(other, "train", 4, 3)
    first, second = sorted((tmp_path / "home" / "ddlp").iterdir())
    assert all(folder.name.startswith("data_") and len(files_in(folder)) == 1 for folder in (first, second))
    assert items_of(TextVideos(root, "train", 4, 3)) == before


def test_a_file_in_a_root_that_has_become_read_only_is_used(root, monkeypatch):
    expected = items_of(TextVideos(root, "train", 4, 3))
    monkeypatch.setattr(frame_cache, "_own_folder", None)
    assert items_of(TextVideos(root, "train", 4, 3)) == expected


@pytest.mark.parametrize("home", ["home", "relative", None])
def test_no_place_to_keep_them(root, tmp_path, monkeypatch, home):
    monkeypatch.chdir(tmp_path)
    unwritable(root / ".cache")
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    unwritable(tmp_path / "home" / "ddlp")
    unwritable(tmp_path / "user" / ".cache")
    if home is None:
        monkeypatch.delenv("XDG_CACHE_HOME")
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", home if home == "relative" else str(tmp_path / home))
    with pytest.raises(UserError) as error:
        TextVideos(root, "train", 4, 3)
    second = {"home": f" or {tmp_path}/home/ddlp/data_", "relative": "", None: f" or {tmp_path}/user/.cache/ddlp/data_"}
    text = str(error.value)
    assert text.startswith(f"decoded frames cannot be kept in {root}/.cache (File exists){second[home]}")
    assert text.endswith(
        "; legal: one that can be written to, another $XDG_CACHE_HOME, or cache false (--no_cache), which decodes every"
        " item anew"
    )
    assert "\n" not in text and not (tmp_path / "relative").exists()
    assert len(items_of(TextVideos(root, "train", 4, 3, cache=False))) == 9


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])  # NFS, Lustre, others
def test_where_locks_fail_the_next_folder_is_tried_and_then_none_are_held(root, number, monkeypatch, capsys):
    flock, home, without = fcntl.flock, root.parent / "home" / "ddlp", [root / ".cache"]

    def no_locks(file, operation):
        if any(os.path.samestat(os.fstat(file), lock.stat()) for place in without for lock in place.glob("*.lock")):
            raise OSError(number, os.strerror(number))
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert len(items_of(TextVideos(root, "train", 4, 3))) == 9
    (path,) = home.rglob("*.npy")
    assert files_in(root / ".cache") == [] and "no file locks" not in capsys.readouterr().err
    path.unlink()
    without.append(path.parent)
    assert len(items_of(TextVideos(root, "train", 4, 3))) == 9
    reason = os.strerror(number)
    assert f"no file locks in {root}/.cache ({reason}) or {path.parent} ({reason}): other" in capsys.readouterr().err
    assert len(files_in(root / ".cache")) == 1 and not path.exists()


def test_two_machines_without_locks_work_twice_and_tear_nothing(root, monkeypatch):
    """Two that do not see each other's locks write at the same time; the first to end puts its file in place."""
    monkeypatch.setattr(frame_cache, "file_lock", lambda *arguments: nullcontext())
    read, other, inodes = TextEpisodes.read, [], []

    def read_while_another_machine_decodes(self, episode, start, stop):
        if episode == 2 and not other:
            other.append(None)
            other[0] = items_of(TextVideos(root, "train", 4, 3))
            inodes.append(cache_file(root).stat().st_ino)
        return read(self, episode, start, stop)

    monkeypatch.setattr(TextEpisodes, "read", read_while_another_machine_decodes)
    assert items_of(TextVideos(root, "train", 4, 3)) == other[0] and len(other[0]) == 9
    assert cache_file(root).stat().st_ino == inodes[0]
    assert files_in(root / ".cache") == [cache_file(root).name]


def test_room_on_the_disk_is_checked_first(root, monkeypatch):
    write_texts(root, train_0="0" * 1_000)
    monkeypatch.setattr(frame_cache.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(9e9, 8e9, 4e7))
    with pytest.raises(UserError) as error:
        TextVideos(root, "train", 128, 3)
    assert str(error.value) == (
        f"{root}/.cache: the decoded frames of {root}/train take 0.05 GB, but 0.04 GB are free; legal: room for them,"
        " or cache false (--no_cache), which decodes every item anew"
    )
    assert files_in(root / ".cache") == []
