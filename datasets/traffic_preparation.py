"""Make the .npy file of Traffic out of the numbered frames of its recording.

    python datasets/traffic_preparation.py --frames FOLDER --out data/traffic/img128np.npy

The frames are the .png or .jpg files of one folder, in the order of the last number in their names (`frame_7.png` is
before `frame_12.png`), which must leave none out. Each is cropped to the box (60, 0, 480, 420) (left, upper, right,
lower, in pixels) and resized to 128 x 128 (bicubic). The file holds all of them: uint8 [N, 128, 128, 3], RGB.

The file is made under a temporary name in a folder `.NAME.making` beside it, and moved into place when it is whole.
What is safely on the disk is noted there after every 512 frames; the same command, started again, goes on from that
note if the frames are still the same files.
"""

import argparse
import hashlib
import json
import math
import os
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets.frame_sources import note_file
from datasets.preparation import (
    check_space,
    find_ranges,
    message_on_interrupt,
    name_ranges,
    unwritable_as_user_error,
    working_folder,
)
from datasets.video_files import open_image
from utils.errors import UserError, run_command
from utils.files import atomic_write, available_cores, given_path, is_clutter
from utils.legal import check_at_least_1, illegal
from utils.progress import progress_bar

CROP = (60, 0, 480, 420)  # left, upper, right, lower
IMAGE_SHAPE = (128, 128, 3)

_IMAGE_BYTES = math.prod(IMAGE_SHAPE)
_CHUNK = 512


# ---- the frames


def find_frames(folder, allow_gaps=False):
    """The paths of the numbered .png and .jpg files of `folder`, in the order of their numbers.

    Raises UserError for a folder without them, a frame without a number, two frames of one number and, unless
    `allow_gaps`, numbers that are left out.
    """
    try:
        names = [name for name in os.listdir(folder) if not is_clutter(name)]
        paths = [folder / name for name in names if name.lower().endswith((".png", ".jpg", ".jpeg"))]
    except OSError as error:
        raise UserError(f"--frames: {folder} cannot be read: {error.strerror or error}") from error
    if not paths:
        raise UserError(f"--frames: {folder} holds no .png or .jpg file; legal: the folder of the recording's frames")
    by_number = {}
    for path in sorted(paths):
        number = re.search(r"\d+(?!.*\d)", path.stem)
        if not number:
            raise UserError(f"--frames: {path} has no number in its name; legal: numbered frames only")
        other = by_number.setdefault(int(number[0]), path)
        if other is not path:
            raise UserError(f"--frames: {other} and {path} have the same number; legal: one frame of each number")
    _check_gaps(folder, by_number, allow_gaps)
    return [by_number[number] for number in sorted(by_number)]


def _check_gaps(folder, numbers, allow_gaps):
    gaps = [(before[1] + 1, after[0] - 1) for before, after in pairwise(find_ranges(numbers))]
    if gaps and not allow_gaps:
        raise UserError(
            f"--frames: {folder} has frames {min(numbers)} to {max(numbers)} but lacks {name_ranges(gaps)}; legal: a"
            " recording without gaps, or --allow_gaps to go over them as if there were none"
        )


def read_frame(path):
    """One frame: uint8 [128, 128, 3], RGB. Raises UserError for a file that is not a whole image of a legal kind."""
    with open_image(path, ("PNG", "JPEG"), "a whole image (PNG, JPEG)") as image:
        _check_image(path, image)
        return np.asarray(image.convert("RGB").crop(CROP).resize(IMAGE_SHAPE[:2], Image.Resampling.BICUBIC))


def _check_image(path, image):
    if image.mode not in ("RGB", "RGBA", "L", "P"):
        raise UserError(f"{path}: is an image of the kind {image.mode}; legal: 8 bits per channel, RGB, RGBA or gray")
    if image.width < CROP[2] or image.height < CROP[3]:
        raise UserError(
            f"{path}: has {image.width} x {image.height} pixels; the box {CROP} that is cut out needs at least"
            f" {CROP[2]} x {CROP[3]}"
        )


# ---- the file


def write_frames(working, paths, processes):
    """Write the array of all frames to `working`/frames.npy, or go on with what is there; returns that path.

    `working`: the folder that also holds the note, progress.json: of which files, and how many frames are safe. Raises
    UserError for a frame that cannot be used, and where nothing can be written.
    """
    path, note = working / "frames.npy", working / "progress.json"
    recording = _fingerprint(paths)
    done = _frames_done(path, note, recording)
    with unwritable_as_user_error(path), open(path, "r+b" if done else "w+b") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(paths), *IMAGE_SHAPE)}
        np.lib.format.write_array_header_1_0(file, header)
        file.seek(done * _IMAGE_BYTES, os.SEEK_CUR)
        file.truncate()
        bar = progress_bar(desc="Traffic", total=len(paths), initial=done, unit="frame")
        pool = ThreadPoolExecutor(processes)
        try:
            for first in range(done, len(paths), _CHUNK):
                # Plain writes: a full disk is an error here, but would kill a process that writes to a mapped file.
                for image in pool.map(read_frame, paths[first : first + _CHUNK]):
                    file.write(image.tobytes())
                    bar.update()
                file.flush()
                os.fsync(file.fileno())
                _take_note(note, {"recording": recording, "frames": min(first + _CHUNK, len(paths))})
        finally:
            pool.shutdown(cancel_futures=True)
            bar.close()
    return path


def _fingerprint(paths):
    """A text that changes with the frames: their names, sizes and times."""
    digest = hashlib.sha256()
    for path in paths:
        note_file(digest, path.name, path)
    return digest.hexdigest()


def _frames_done(path, note, recording):
    """How many frames of the file at `path` are safe; 0 where that is not known or they are of another recording."""
    if not (note.exists() and path.exists()):
        return 0
    noted = json.loads(note.read_text(encoding="utf-8"))
    is_same = noted["recording"] == recording and path.stat().st_size > noted["frames"] * _IMAGE_BYTES
    return noted["frames"] if is_same else 0


def _take_note(note, content):
    with atomic_write(note) as part:
        part.write_text(json.dumps(content), encoding="utf-8")


def is_made(path, paths):
    """Whether the file at `path` is there; UserError if it is there but not made of these frames, as far as its shape
    and its first, middle and last frame show."""
    if not path.exists():
        return False
    advice = "legal: another --out, or --force to overwrite it"
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} exists but is not a whole .npy file; {advice}") from error
    if (array.dtype, array.shape) != (np.uint8, (len(paths), *IMAGE_SHAPE)):
        raise UserError(
            f"{path} exists with {array.dtype} {list(array.shape)}, not uint8 {[len(paths), *IMAGE_SHAPE]}; {advice}"
        )
    for frame in (0, len(paths) // 2, len(paths) - 1):
        if not np.array_equal(array[frame], read_frame(paths[frame])):
            raise UserError(f"{path} exists, but its frame {frame} is not that of {paths[frame]}; {advice}")
    return True


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(description="Make the .npy file of Traffic out of its recording's frames.")
    help_ = "the numbered .png or .jpg files of the recording, at least 480 x 420 pixels"
    parser.add_argument("--frames", type=given_path, required=True, metavar="FOLDER", help=help_)
    parser.add_argument("--out", type=given_path, required=True, metavar="FILE", help="the .npy file to make")
    parser.add_argument("--allow_gaps", action="store_true", help="take frames whose numbers leave some out")
    help_ = "frames read at the same time, by as many threads (%(default)s)"
    parser.add_argument("--processes", type=int, default=available_cores(), metavar="N", help=help_)
    parser.add_argument("--force", action="store_true", help="overwrite a file that exists")
    return parser.parse_args(arguments)


def main(arguments=None):
    args = parse_arguments(arguments)
    check_at_least_1("processes", args.processes)
    if args.out.suffix != ".npy":
        raise illegal("--out", str(args.out), "a file named *.npy")
    with message_on_interrupt():
        paths = find_frames(args.frames, args.allow_gaps)
        if args.force or not is_made(args.out, paths):
            make(args.out, paths, args.processes)
    print(f"{args.out}: all {len(paths)} frames are there")


def make(out, paths, processes):
    """Make the file `out` of the frames at `paths`; it is whole or keeps what it held."""
    with working_folder(out.with_name(f".{out.stem}.making")) as working:
        done = working / "frames.npy"
        check_space(out.parent, len(paths) * _IMAGE_BYTES - (done.stat().st_size if done.exists() else 0))
        whole = write_frames(working, paths, processes)
        with unwritable_as_user_error(out):
            whole.replace(out)
        shutil.rmtree(working)


if __name__ == "__main__":
    run_command(main)
