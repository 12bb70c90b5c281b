"""Make the frames of CLEVRER out of its videos.

    python datasets/clevrer_preparation.py --train video_train --validation video_validation --out data/clevrer

The videos are those of the official download: `video_train.zip` and `video_validation.zip`, or the folders that were
unpacked from them; `video_NUMBER.mp4` may lie at any depth, as in `video_train/video_00000-01000/video_00000.mp4`. A
video has 128 frames of 480 x 320 pixels. Its frames 18 to 117 are resized to 128 x 128 (each pixel is the mean of the
area that it covers) and written as PNG files:

| folder | videos |
|---|---|
| train/{0..4999}/{0..99}.png | video_00000 to video_04999, of --train |
| valid/{0..999}/{0..99}.png | video_10000 to video_10999, of --validation |
| test/{0..999}/{0..99}.png | video_11000 to video_11999, of --validation |

An episode is made under a temporary name in `.making` in the folder of --out, and moved into place when it is whole;
the same command, started again, goes on with the episodes that are missing. A video that cannot be used is named, does
not keep the others from being made, and makes the command fail in the end.
"""

import argparse
import os
import re
import shutil
import sys
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import cv2

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets.preparation import (
    check_episodes,
    find_ranges,
    message_on_interrupt,
    name_ranges,
    unwritable_as_user_error,
    working_folder,
)
from utils.errors import UserError, run_command
from utils.files import available_cores, given_path
from utils.legal import check, check_at_least_1
from utils.progress import progress_bar

VIDEO_FRAMES = 128
VIDEO_SIZE = (480, 320)  # width, height
FIRST_FRAME, NUM_FRAMES, IMAGE_SIZE = 18, 100, 128


@dataclass(frozen=True)
class Split:
    """Which videos become the episodes 0, 1, ... of a split."""

    name: str
    source: str  # the option that names the videos
    first: int  # number of the first video
    size: int  # videos in the paper's split


SPLITS = (
    Split("train", "train", 0, 5000),
    Split("valid", "validation", 10000, 1000),
    Split("test", "validation", 11000, 1000),
)

_FRAME_NAMES = frozenset(f"{frame}.png" for frame in range(NUM_FRAMES))


class BadVideo(UserError):
    """A video that no episode can be made from."""


# ---- one episode


def read_frames(path):
    """The frames of an episode: a list of 100 arrays uint8 [128, 128, 3] in OpenCV's order blue, green, red.

    `path`: the .mp4 file of one video. Raises BadVideo for one that is not readable to its end or not CLEVRER's.
    """
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    if not capture.isOpened():
        raise BadVideo("is not a video that can be read; is its download whole?")
    try:
        size = int(capture.get(cv2.CAP_PROP_FRAME_WIDTH)), int(capture.get(cv2.CAP_PROP_FRAME_HEIGHT))
        if size != VIDEO_SIZE:
            raise BadVideo("has frames of {} x {} pixels; those of CLEVRER have {} x {}".format(*size, *VIDEO_SIZE))
        return _decode(capture)
    finally:
        capture.release()


def _decode(capture):
    frames, count = [], 0
    while count <= VIDEO_FRAMES and capture.grab():
        if FIRST_FRAME <= count < FIRST_FRAME + NUM_FRAMES:
            is_whole, frame = capture.retrieve()
            if not is_whole:
                break
            frames.append(cv2.resize(frame, (IMAGE_SIZE, IMAGE_SIZE), interpolation=cv2.INTER_AREA))
        count += 1
    if count < VIDEO_FRAMES:
        raise BadVideo(f"has {count} frames that can be read; a video of CLEVRER has {VIDEO_FRAMES}: is it whole?")
    if count > VIDEO_FRAMES:
        raise BadVideo(f"has more than {VIDEO_FRAMES} frames; a video of CLEVRER has {VIDEO_FRAMES}")
    return frames


def make_episode(working, video, folder):
    """Make the PNG files of the episode `folder` from a `Video`; the folder is whole or not there.

    `working` is a folder on the same disk for what is not yet whole. Raises BadVideo, and UserError where nothing can
    be written.
    """
    part = working / f"{folder.parent.name}-{folder.name}"
    path = video.file(working)
    try:
        frames = read_frames(path)
    except BadVideo as error:
        raise BadVideo(f"{video} {error}") from error
    with unwritable_as_user_error(folder):
        if video.archive:
            path.unlink()
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        for number, frame in enumerate(frames):
            (part / f"{number}.png").write_bytes(cv2.imencode(".png", frame)[1])
        folder.parent.mkdir(exist_ok=True)
        part.rename(folder)


# ---- the videos


@dataclass(frozen=True)
class Video:
    """A video: a file, or a file in an archive."""

    path: Path
    archive: zipfile.ZipFile | None = None

    def __str__(self):
        return f"{self.archive.filename}: {self.path}" if self.archive else str(self.path)

    def file(self, working):
        """The path of the video's file; one in an archive is first copied into the folder `working`. Raises BadVideo
        where it cannot be read, and UserError where it cannot be written."""
        try:
            with self.archive.open(str(self.path)) if self.archive else open(self.path, "rb") as source:
                return self._copy(source, working) if self.archive else self.path
        except (OSError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
            raise BadVideo(f"{self} cannot be read: {getattr(error, 'strerror', None) or error}") from error

    def _copy(self, source, working):
        path = working / self.path.name
        with unwritable_as_user_error(path), open(path, "wb") as file:
            shutil.copyfileobj(source, file, 2**20)
        return path


def find_videos(option, source):
    """The videos of a folder or .zip file, at any depth: a dict from their number to `Video`.

    `option`: what messages call the source. Raises UserError for a source that is not there, not readable or without
    videos, and for two videos of one number.
    """
    if not source.exists():
        raise UserError(f"{option}: {source} does not exist; legal: a folder of CLEVRER's videos, or their .zip file")
    try:
        videos = _videos_of_folder(source) if source.is_dir() else _videos_of_zip(option, source)
    except OSError as error:
        raise UserError(f"{option}: {error.filename or source} cannot be read: {error.strerror or error}") from error
    by_number = {}
    for video in videos:
        match = re.fullmatch(r"video_(\d+)\.mp4", video.path.name)
        if not match:
            continue
        other = by_number.setdefault(int(match[1]), video)
        if other is not video:
            raise UserError(f"{option}: {other} and {video} have the same number; legal: one video of each number")
    if not by_number:
        raise UserError(f"{option}: {source} holds no video named video_NUMBER.mp4, at any depth")
    return by_number


def _videos_of_folder(source):
    def fail(error):
        raise error

    walk = os.walk(source, onerror=fail, followlinks=True)
    return [Video(Path(folder, name)) for folder, _, names in walk for name in sorted(names)]


def _videos_of_zip(option, source):
    try:
        archive = zipfile.ZipFile(source)
    except zipfile.BadZipFile as error:
        raise UserError(
            f"{option}: {source} is neither a folder nor a whole .zip file; legal: a folder of CLEVRER's videos, or"
            " their .zip file, downloaded to its end"
        ) from error
    return [Video(Path(member), archive) for member in archive.namelist()]


def choose_videos(split, source, videos, number):
    """The first `number` videos of `split`, a list, out of the `videos` (a dict by number) in `source`. Raises
    UserError that names those that are missing."""
    wanted = range(split.first, split.first + number)
    missing = [video for video in wanted if video not in videos]
    if missing:
        raise UserError(
            f"--{split.source}: {source} lacks the {split.name} videos {name_ranges(find_ranges(missing))}; it has"
            f" {name_ranges(find_ranges(videos))}; legal: all from {wanted[0]} to {wanted[-1]}, or a smaller"
            f" --num_{split.name}"
        )
    return [videos[video] for video in wanted]


# ---- the episodes


def is_made(folder):
    """Whether the episode is there; UserError for a folder that is there but is not an episode."""
    if not folder.exists():
        return False
    sizes = {entry.name: entry.stat().st_size for entry in os.scandir(folder)} if folder.is_dir() else {}
    if sizes.keys() != _FRAME_NAMES or not all(sizes.values()):
        raise UserError(
            f"{folder} exists but does not hold just the frames 0.png to {NUM_FRAMES - 1}.png; legal: another --out,"
            " or the same command after deleting it"
        )
    return True


def make_episodes(working, todo, processes, bar):
    """Make the episodes of `todo`, a list of (video, folder); returns how many videos were bad, each of them named."""
    bad = 0
    # Decoding and encoding leave the interpreter to other threads.
    pool = ThreadPoolExecutor(processes)
    try:
        for future in as_completed([pool.submit(make_episode, working, *job) for job in todo]):
            try:
                future.result()
            except BadVideo as error:
                bad += 1
                bar.write(f"warning: {error}", file=sys.stderr)
            bar.update()
    finally:
        pool.shutdown(cancel_futures=True)
    return bad


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(description="Make the frames of CLEVRER out of its videos.")
    for source, content in (("train", "training"), ("validation", "validation")):
        help_ = f"the {content} videos: video_{source}.zip, or a folder that holds them at any depth"
        parser.add_argument(f"--{source}", type=given_path, metavar="PATH", help=help_)
    parser.add_argument(
        "--out", type=given_path, required=True, metavar="FOLDER", help="where train, valid and test go"
    )
    for split in SPLITS:
        help_ = f"{split.name} episodes, from video_{split.first:05} on (%(default)s)"
        parser.add_argument(f"--num_{split.name}", type=int, default=split.size, metavar="N", help=help_)
    help_ = "videos decoded at the same time, by as many threads (%(default)s)"
    parser.add_argument("--processes", type=int, default=available_cores(), metavar="N", help=help_)
    return parser.parse_args(arguments)


def plan(args):
    """The list of (video, folder of its episode) to make; every video has been found, and nothing is written yet."""
    check_at_least_1("processes", args.processes)
    for split in SPLITS:
        number = getattr(args, f"num_{split.name}")
        check(f"num_{split.name}", number, f"from 0 to {split.size}", 0 <= number <= split.size)
    sources = {name: getattr(args, name) for name in ("train", "validation") if getattr(args, name)}
    if not sources:
        raise UserError("--train and --validation: neither is given; legal: the videos of at least one of them")
    videos = {name: find_videos(f"--{name}", source) for name, source in sources.items()}
    jobs = []
    for split in SPLITS:
        if split.source in sources:
            number, folder = getattr(args, f"num_{split.name}"), args.out / split.name
            chosen = choose_videos(split, sources[split.source], videos[split.source], number)
            check_episodes(folder, number, f"--num_{split.name}")
            jobs += [(video, folder / str(episode)) for episode, video in enumerate(chosen)]
    return jobs


def main(arguments=None):
    # Both libraries describe each bad video at length on stderr, where ours is to be the only message.
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    args = parse_arguments(arguments)
    with message_on_interrupt():
        jobs = plan(args)
        todo = [(video, folder) for video, folder in jobs if not is_made(folder)]
        if todo:
            bad = run(args, todo, len(jobs))
            if bad:
                raise UserError(
                    f"{bad} of {len(jobs)} videos cannot be used: they are named above; legal: the same command with"
                    " whole videos of CLEVRER in their place, which makes the episodes that are missing"
                )
    print(f"{args.out}: all {len(jobs)} episodes are there")


def run(args, todo, total):
    """Make the episodes of `todo` out of `total` ones, with a bar; returns how many videos were bad."""
    with working_folder(args.out / ".making") as working:
        try:
            with progress_bar(desc="CLEVRER", total=total, initial=total - len(todo), unit="video") as bar:
                return make_episodes(working, todo, args.processes, bar)
        finally:
            shutil.rmtree(working)


if __name__ == "__main__":
    run_command(main)
