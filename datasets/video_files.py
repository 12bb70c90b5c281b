"""Videos in the files that people have: MP4 and the like, animated GIFs, folders of PNG or JPEG frames.

Whatever it lies in, a video has a `probe`, which counts its frames by decoding them and refuses what is damaged, and
`frames`, which decodes. Frames come one after another as they are stored: where a video's rate varies, none is doubled
or left out. Nothing is reached by seeking, which is not exact in every file.
"""

import os
import re
import struct
import subprocess
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from imageio_ffmpeg import get_ffmpeg_exe
from PIL import Image, ImageOps

from utils.errors import UserError

VIDEO_ENDINGS = (".mp4", ".avi", ".gif", ".mov", ".mkv", ".webm")
IMAGE_ENDINGS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
# What file managers and people leave beside videos, beside what is hidden by a dot.
_IGNORED_NAMES = ("thumbs.db", "desktop.ini", "__macosx")
_IGNORED_ENDINGS = (".txt", ".md", ".json", ".csv", ".tsv", ".yaml", ".yml", ".xml", ".html", ".pdf")
# All of these have been seen to come out of Pillow for damaged files.
_PILLOW_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    OverflowError,
    zlib.error,
    struct.error,
    Image.DecompressionBombError,
)
_GIF_END = b";"
_UNKNOWN_SIZE = 2**32 - 1  # of an AVI that was written to a pipe


@dataclass(frozen=True)
class Shape:
    """The number of a video's frames, and their width and height in pixels."""

    length: int
    width: int
    height: int


@dataclass(frozen=True)
class VideoFile:
    """A file that ffmpeg decodes. Its first video stream counts; what turns it, as in a phone's video, is obeyed, and
    alpha is dropped."""

    path: Path

    def files(self):
        """The paths of the files that the video is made of."""
        return [self.path]

    def probe(self):
        """The `Shape`, by decoding all frames. Raises UserError unless that can be done to the end without an error."""
        done = subprocess.run(
            [*_ffmpeg(self.path), "-f", "framecrc", "-"], stdin=subprocess.DEVNULL, capture_output=True, check=False
        )
        lines, errors = (text.decode(errors="replace").splitlines() for text in (done.stdout, done.stderr))
        length = sum(not line.startswith("#") for line in lines)
        size = next((line.split()[-1] for line in lines if line.startswith("#dimensions")), None)
        if errors or done.returncode or not length or size is None:
            raise UserError(f"{self.path}: {_fault(errors, length)}; legal: a whole video")
        if _is_cut_avi(self.path):
            raise UserError(f"{self.path}: is cut short after {length} frames; legal: a whole video")
        return Shape(length, *(int(side) for side in size.split("x")))

    def frames(self, start, stop) -> Iterator[np.ndarray]:
        """Yield the frames `start` to `stop` - 1, uint8 [H, W, 3], RGB. Raises UserError where they cannot be had."""
        # As PPM, every frame says its own size.
        output = ["-frames:v", str(stop), "-pix_fmt", "rgb24", "-c:v", "ppm", "-f", "image2pipe", "-"]
        process = subprocess.Popen(
            [*_ffmpeg(self.path), *output],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        try:
            for number in range(stop):
                frame = _read_ppm(process.stdout)
                if frame is None:
                    raise UserError(f"{self.path}: frame {number} cannot be read; has the file changed? start again")
                if number >= start:
                    yield frame
        finally:
            process.stdout.close()
            process.kill()
            process.wait()


def _ffmpeg(path):
    """The beginning of a command that decodes every frame of a file, each once. The file is only ever taken for a file,
    and what it refers to is only sought on this machine."""
    options = ["-v", "error", "-nostdin", "-protocol_whitelist", "file", "-i", f"file:{path}"]
    return [get_ffmpeg_exe(), *options, "-map", "0:v:0", "-fps_mode", "passthrough"]


def _fault(errors, length):
    """What is wrong with a video of which `length` frames could be decoded, out of ffmpeg's `errors`."""
    if any("partial file" in error or "ended prematurely" in error for error in errors):
        return f"is cut short after {length} frames"
    if length and errors:
        return f"is damaged; {length} frames can be decoded, but {_without_place(errors[0])}"
    if any("matches no streams" in error for error in errors):
        return "holds no video"
    if errors:
        return f"cannot be decoded: {_without_place(errors[0])}"
    return "holds no frames"


def _without_place(error):
    """A line of ffmpeg's without the parts in brackets that say where in ffmpeg it comes from."""
    return re.sub(r"^(\[[^\]]*\] )+", "", error).strip().rstrip(".")


def _is_cut_avi(path):
    """Whether a file is an AVI that is shorter than its head says, which ffmpeg does not mind between two frames."""
    with open(path, "rb") as file:
        head = file.read(12)
    if len(head) < 12 or head[:4] != b"RIFF" or head[8:] != b"AVI ":
        return False
    (promised,) = struct.unpack_from("<I", head, 4)
    return promised != _UNKNOWN_SIZE and promised + 8 > os.path.getsize(path)


def _read_ppm(file):
    """The next image, uint8 [H, W, 3]; None where there is none that is whole."""
    magic, size, _ = (file.readline() for _ in range(3))
    if magic != b"P6\n":
        return None
    width, height = map(int, size.split())
    data = file.read(3 * width * height)
    if len(data) < 3 * width * height:
        return None
    return np.frombuffer(data, np.uint8).reshape(height, width, 3)


@dataclass(frozen=True)
class GifFile:
    """An animated GIF, each frame as it is shown, on black where it is transparent."""

    path: Path

    def files(self):
        """See `VideoFile`."""
        return [self.path]

    def probe(self):
        """See `VideoFile`."""
        with _opened(self.path, "an animated GIF", "GIF") as image:
            for frame in range(image.n_frames):
                image.seek(frame)
                image.load()
            # A file that is cut between two frames is to Pillow one that has fewer.
            if not self.path.read_bytes().rstrip(b"\0").endswith(_GIF_END):
                raise UserError(f"{self.path}: is cut short after {image.n_frames} frames; legal: a whole animated GIF")
            return Shape(image.n_frames, *image.size)

    def frames(self, start, stop) -> Iterator[np.ndarray]:
        """See `VideoFile`."""
        with _opened(self.path, "an animated GIF", "GIF") as image:
            for frame in range(start, stop):
                image.seek(frame)
                yield to_rgb(image)


@dataclass(frozen=True)
class FrameFolder:
    """A folder of frames that are files, all PNG or all JPEG, in the natural order of their names: 9 before 10."""

    path: Path
    names: tuple[str, ...]

    def files(self):
        """See `VideoFile`."""
        return [self.path / name for name in self.names]

    def probe(self):
        """The `Shape`, out of the files' heads. Raises UserError unless they are images, all of one size."""
        first = None
        for path in self.files():
            with _opened(path, _LEGAL_IMAGE) as image:
                size = ImageOps.exif_transpose(image).size if _is_turned(image) else image.size
            first = first or size
            if size != first:
                sizes = "is of {} x {} pixels; legal: {} x {}, as".format(*size, *first)
                raise UserError(f"{path}: {sizes} {self.path / self.names[0]}")
        return Shape(len(self.names), *first)

    def frames(self, start, stop) -> Iterator[np.ndarray]:
        """See `VideoFile`."""
        for path in islice(self.files(), start, stop):
            with _opened(path, _LEGAL_IMAGE) as image:
                if image.format == "PNG":
                    with Image.open(path) as copy:
                        copy.verify()  # its checksums, which decoding does not test
                yield to_rgb(ImageOps.exif_transpose(image))


_LEGAL_IMAGE = "a whole PNG or JPEG image"
_ORIENTATION = 0x0112  # the Exif tag


def _is_turned(image):
    return image.getexif().get(_ORIENTATION, 1) != 1


@contextmanager
def _opened(path, legal, *formats):
    """Pillow's image of a file; what goes wrong with it becomes a UserError."""
    try:
        with Image.open(path, formats=formats or tuple(set(IMAGE_ENDINGS.values()))) as image:
            yield image
    except UserError:
        raise
    except _PILLOW_ERRORS as error:
        reason = getattr(error, "strerror", None)
        if (
            reason is None
            and isinstance(error, OSError | Image.DecompressionBombError)
            and "identify" not in str(error)
        ):
            reason = str(error)
        raise UserError(
            f"{path}: cannot be read: {reason or 'it is damaged or something else'}; legal: {legal}"
        ) from error


def to_rgb(image):
    """Pillow's `image` as uint8 [H, W, 3]: grey in three channels, of 16 bits the upper 8, black for transparent."""
    if image.mode.startswith("I"):
        upper = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
        return np.repeat(upper[..., None], 3, axis=-1)
    if image.has_transparency_data:
        opaque = Image.new("RGBA", image.size, (0, 0, 0, 255))
        opaque.alpha_composite(image.convert("RGBA"))
        image = opaque
    return np.array(image.convert("RGB"))


# ---- what lies in a folder


def natural_order(name):
    """The key to sort file names by, so that frame_9.png comes before frame_10.png."""
    parts = re.split(r"([0-9]+)", os.path.splitext(name)[0])
    return [int(part) if part.isdecimal() else part for part in parts], name


def list_entries(folder, legal):
    """The `os.DirEntry`s of a folder in natural order, but for what is hidden and for documents that lie about.

    Raises UserError, which says what is `legal`, where it cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            shown = [entry for entry in entries if not _is_ignored(entry.name)]
    except OSError as error:
        raise UserError(f"{folder}: cannot be read: {error.strerror}; legal: {legal}") from error
    return sorted(shown, key=lambda entry: natural_order(entry.name))


def _is_ignored(name):
    name = name.lower()
    return name.startswith(".") or name in _IGNORED_NAMES or name.endswith(_IGNORED_ENDINGS)


def find_videos(folder, legal):
    """The videos in a folder, a dict from their names to `VideoFile`, `GifFile` or `FrameFolder`, in natural order.

    Raises UserError, which says what is `legal`, for anything that is none.
    """
    return {entry.name: _video(entry, legal) for entry in list_entries(folder, legal)}


def _video(entry, legal):
    ending = os.path.splitext(entry.name)[1].lower()
    if entry.is_dir():
        return _frame_folder(Path(entry.path))
    if ending == ".gif":
        return GifFile(Path(entry.path))
    if ending in VIDEO_ENDINGS:
        return VideoFile(Path(entry.path))
    if ending in IMAGE_ENDINGS:
        raise UserError(f"{entry.path}: is an image, not a video; legal: the frames of each video in its own folder")
    raise UserError(f"{entry.path}: is no video; legal: {legal}; what is to be left alone may lie elsewhere")


def _frame_folder(folder):
    legal = "in the folder of a video: its frames, all PNG or all JPEG"
    kinds = {}
    for entry in list_entries(folder, legal):
        kind = IMAGE_ENDINGS.get(os.path.splitext(entry.name)[1].lower())
        if kind is None or entry.is_dir():
            raise UserError(f"{entry.path}: is no frame; legal {legal}")
        kinds.setdefault(kind, []).append(entry.name)
    if not kinds:
        raise UserError(f"{folder}: holds no frames; legal {legal}")
    if len(kinds) > 1:
        one, other = (names[0] for names in kinds.values())
        raise UserError(f"{folder}: holds {one} and {other}; legal {legal}")
    (names,) = kinds.values()
    return FrameFolder(folder, tuple(names))
