"""Videos in the files that people have: MP4 and the like, animated GIFs, folders of frames that are images.

Whatever it lies in, a video has a `probe`, which counts its frames by decoding them and refuses what is damaged, and
`frames`, which decodes. Frames come one after another as they are stored: where a video's rate varies, none is doubled
or left out. Only an animated GIF's frames last as long as it says, in units of its shortest, up to 100.
"""

import os
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, dropwhile, islice, pairwise, repeat
from logging import NullHandler, getLogger
from mimetypes import MimeTypes
from pathlib import Path

import av
import numpy as np
from PIL import ExifTags, Image, ImageOps

from utils.errors import UserError
from utils.files import is_clutter, is_special_file
from utils.tone_mapping import PQ, TRANSFERS, WIDE, to_standard_range

VIDEO_ENDINGS = (
    *(".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".gif"),
    *(".wmv", ".flv", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".3gp", ".ogv"),
)
IMAGE_ENDINGS = {
    **{".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".bmp": "BMP"},
    **{".tif": "TIFF", ".tiff": "TIFF", ".webp": "WEBP"},
}
_KINDS = tuple(dict.fromkeys(IMAGE_ENDINGS.values()))
IMAGES = ", ".join(_KINDS)
_DOCUMENT_ENDINGS = (".txt", ".md", ".json", ".csv", ".tsv", ".yaml", ".yml", ".xml", ".html", ".pdf")
_TYPES = MimeTypes()  # the library's own, the same on every machine
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
_UNKNOWN_SIZE = 2**32 - 1  # of an AVI that was written to a pipe
_SEEK_DISTANCE = 16  # frames from one seek point to the next, at least
_GIF_DURATION = 10  # hundredths of a second, in browsers, of what is shorter than 2
_GIF_COPIES = 100  # of a frame at most: a picture that is left standing for minutes would become most of the video
_INTRA = 1  # the type of a picture that is decoded without others
_WIDE_COLOURS = 9, 10  # BT.2020, in which HDR is stored
_UNKNOWN = 2  # colours or transfer
_HDR_SIDE_DATA = "MASTERING_DISPLAY_METADATA", "CONTENT_LIGHT_LEVEL"  # of HDR10, whose transfer is PQ

# What the libraries print is captured where it matters.
av.logging.set_level(av.logging.ERROR)
av.logging.set_skip_repeated(False)  # a message that another video's decoder repeats is counted to the next one
getLogger("libav").addHandler(NullHandler())
getLogger("libav").propagate = False


@dataclass(frozen=True)
class Shape:
    """The number of a video's frames, their width and height in square pixels, and its seek points: frames that can be
    decoded without those before them, each as its number and its time in the file's unit."""

    length: int
    width: int
    height: int
    seek_points: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class VideoFile:
    """A file that libav decodes, an animated GIF among them. Its main video stream counts. What turns or mirrors it, as
    in a phone's video, and pixels that are not square are obeyed; HDR is tone-mapped; what is transparent is black."""

    path: Path

    def files(self):
        """The paths of the files that the video is made of."""
        return [self.path]

    def probe(self):
        """The `Shape`, by decoding all frames. Raises UserError where some are missing or cannot be decoded; what else
        the decoder says is a warning, and so is HDR that is not known as such."""
        size, times, points, lost = None, [], [(0, None)], 0
        with _opened_video(self.path) as (container, stream), av.logging.Capture() as log:
            for frame in _decoded(container, stream):
                if frame is None:
                    lost += 1
                    continue
                if size is None:
                    size, transfer = _to_rgb(frame, stream).shape[1::-1], _transfer(frame, stream.codec_context)
                if frame.key_frame and frame.pict_type == _INTRA and len(times) >= points[-1][0] + _SEEK_DISTANCE:
                    points.append((len(times), frame.pts))
                times.append(frame.pts)
            said = [_one_line(message) for _, _, message in log]
            if not times:
                raise _undecodable(self.path, said[0] if said else "it holds no frames")
            is_cut = any("partial file" in message or "ended prematurely" in message for message in said)
            if is_cut or _is_cut_avi(self.path):
                raise UserError(f"{self.path}: is cut short after {len(times)} frames; legal: a whole video")
            if lost:
                reason = said[0] if said else f"{lost} cannot"
                raise UserError(
                    f"{self.path}: is damaged; {len(times)} frames can be decoded, but {reason}; legal: a whole video"
                )
            if said:
                _warn(self.path, f"its {len(times)} frames are taken, though the decoder says: {said[0]}")
            if transfer == WIDE and stream.codec_context.color_trc == _UNKNOWN:
                _warn(
                    self.path,
                    "is in the colours of HDR (BT.2020), but names no transfer curve; it is taken as of standard range,"
                    " as players do",
                )
            length = sum(islice(_copies(self.path, container, warns=True), len(times)))
        is_ordered = None not in times and all(a < b for a, b in pairwise(times))
        return Shape(length, *size, tuple(points[1:]) if is_ordered else ())

    def frames(self, start, stop=None, seek_points=()) -> Iterator[np.ndarray]:
        """Yield the frames `start` to `stop` - 1 (None: to the end), uint8 [H, W, 3], RGB, decoded from the last of the
        `seek_points` on that is not after them. Raises UserError where they cannot be had."""
        first, time = max((point for point in seek_points if point[0] <= start), default=(0, None))
        number = first
        with _opened_video(self.path) as (container, stream):
            pictures = _decoded(container, stream)
            if time is not None:
                container.seek(time, stream=stream)
                pictures = dropwhile(lambda frame: frame is None or frame.pts is None or frame.pts < time, pictures)
            for frame in chain.from_iterable(map(repeat, pictures, _copies(self.path, container))):
                if frame is None or (number == first and time not in (None, frame.pts)):
                    break  # not every file can be sought in
                if number >= start:
                    yield _to_rgb(frame, stream)
                number += 1
                if number == stop:
                    return
            else:
                if stop is None and number > first:
                    return
        if number == first and time is not None:
            yield from self.frames(start, stop)
        else:
            raise _undecodable(self.path, f"frame {number} is damaged, or has changed since the frames were counted")


@contextmanager
def _opened_video(path):
    """libav's container of a file and its main video stream; what goes wrong with it becomes a UserError."""
    try:
        # A file object, as libav takes no names but in UTF-8; what a file refers to is only sought on this machine.
        with open(path, "rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise _undecodable(path, "it is empty")
            with av.open(file, options={"protocol_whitelist": "file"}) as container:
                stream = container.streams.best("video")
                if stream is None:
                    raise UserError(f"{path}: holds no video; legal: a whole video")
                stream.thread_type = "NONE"  # what other threads print is not captured
                yield container, stream
    except UserError:
        raise
    except (av.error.FFmpegError, OSError) as error:
        said = getattr(error, "log", None)
        raise _undecodable(path, _one_line(said[2]) if said else error.strerror) from error


def _undecodable(path, reason):
    return UserError(f"{path}: cannot be decoded: {reason}; legal: a whole video")


def _decoded(container, stream):
    """Yield a stream's frames in the order in which they are shown, and None for each packet that cannot be decoded.
    Those before the first key frame, in a file that was cut out of another, are left out, as players do."""
    has_begun = False
    for packet in container.demux(stream):
        has_begun = has_begun or packet.is_keyframe
        try:
            yield from packet.decode()
        except av.error.FFmpegError:
            if has_begun:
                yield None


def _copies(path, container, warns=False):
    """How many times each frame is shown: once, but those of a GIF in units of its shortest duration, and no more often
    than `_GIF_COPIES`. warns: whether a warning says so."""
    if container.format.name != "gif":
        return repeat(1)
    with _opened_video(path) as (gif, stream):
        durations = [packet.duration or 0 for packet in gif.demux(stream) if packet.size]
    durations = [_GIF_DURATION if duration < 2 else duration for duration in durations]
    copies = [round(duration / min(durations)) for duration in durations]
    if warns and max(copies) > _GIF_COPIES:
        longest = f"frame {copies.index(max(copies))} lasts {max(copies)} times as long as the shortest"
        _warn(path, f"{longest}; it is taken as one that lasts {_GIF_COPIES} times as long")
    return [min(count, _GIF_COPIES) for count in copies]


def _one_line(message):
    return " ".join(message.split()).rstrip(".")


def _warn(path, text):
    warnings.warn(f"{path}: {text}", UserWarning, stacklevel=2)


def _is_cut_avi(path):
    """Whether a file is an AVI that is shorter than its head says, which libav does not mind between two frames."""
    with open(path, "rb") as file:
        head = file.read(12)
    if len(head) < 12 or head[:4] != b"RIFF" or head[8:] != b"AVI ":
        return False
    (promised,) = struct.unpack_from("<I", head, 4)
    return promised != _UNKNOWN_SIZE and promised + 8 > os.path.getsize(path)


def _transfer(frame, codec):
    """The transfer of a frame in BT.2020's colours, for `to_standard_range`; None for others, left as they are."""
    if codec.color_trc in TRANSFERS:
        return codec.color_trc
    if codec.color_primaries not in (*_WIDE_COLOURS, _UNKNOWN) or codec.colorspace not in _WIDE_COLOURS:
        return None
    is_hdr10 = codec.color_trc == _UNKNOWN and any(frame.side_data.get(name) for name in _HDR_SIDE_DATA)
    return PQ if is_hdr10 else WIDE


def _to_rgb(frame, stream):
    """A decoded frame as it is shown: uint8 [H, W, 3], RGB."""
    ratio = stream.sample_aspect_ratio or 1
    has_alpha = any(component.is_alpha for component in frame.format.components)
    pixels = frame.to_ndarray(
        width=round(frame.width * max(ratio, 1)),
        height=round(frame.height * max(1 / ratio, 1)),
        format="rgba" if has_alpha else "rgb24",
        interpolation="BICUBIC",
    )
    if has_alpha:
        pixels = (pixels[..., :3] * (pixels[..., 3:] / 255)).round().astype(np.uint8)
    transfer = _transfer(frame, stream.codec_context)
    if transfer is not None:
        pixels = to_standard_range(pixels, transfer)
    return _upright(pixels, frame.side_data.get("DISPLAYMATRIX"))


def _upright(pixels, matrix):
    """An image turned and mirrored as a display matrix says: x' = a x + c y and y' = b x + d y."""
    if matrix is None:
        return pixels
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    if abs(b) > abs(a):
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    return np.ascontiguousarray(pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])


@dataclass(frozen=True)
class FrameFolder:
    """A folder of frames that are images of one kind, each a file, in the natural order of their names: 9 before 10."""

    path: Path
    names: tuple[str, ...]

    def files(self):
        """See `VideoFile`."""
        return [self.path / name for name in self.names]

    def probe(self):
        """The `Shape`, out of the files' heads. Raises UserError unless they are images, all of one size."""
        first = None
        for path in self.files():
            with open_image(path) as image:
                is_turned = image.getexif().get(ExifTags.Base.Orientation, 1) > 4
                size = image.size[::-1] if is_turned else image.size
            first = first or size
            if size != first:
                sizes = "is of {} x {} pixels; legal: {} x {}, as".format(*size, *first)
                raise UserError(f"{path}: {sizes} {self.path / self.names[0]}")
        return Shape(len(self.names), *first)

    def frames(self, start, stop=None, seek_points=()) -> Iterator[np.ndarray]:
        """See `VideoFile`."""
        for path in islice(self.files(), start, stop):
            with open_image(path, whole=True) as image:
                yield to_rgb(ImageOps.exif_transpose(image), path)


@contextmanager
def open_image(path, formats=_KINDS, legal=f"a whole image ({IMAGES})", whole=False):
    """Pillow's image of a file of one of its `formats`; what goes wrong with it becomes a UserError that says what is
    `legal`. whole: test a PNG's checksums, which decoding does not."""
    try:
        with Image.open(path, formats=formats) as image:
            # A phone's JPEG may have a second picture, a preview.
            if getattr(image, "n_frames", 1) > 1 and image.format not in ("JPEG", "MPO"):
                raise UserError(f"{path}: holds {image.n_frames} images; legal: one in each file")
            if whole and image.format == "PNG":
                with Image.open(path) as copy:
                    copy.verify()
            yield image
    except UserError:
        raise
    except _PILLOW_ERRORS as error:
        is_bomb = isinstance(error, Image.DecompressionBombError)
        other = "it has too many pixels" if is_bomb else "it is empty, damaged or something else"
        reason = getattr(error, "strerror", None) or other
        raise UserError(f"{path}: cannot be read: {reason}; legal: {legal}") from error


def to_rgb(image, path):
    """Pillow's `image` as uint8 [H, W, 3]: grey in three channels, of 16 bits the upper 8, black for transparent.
    UserError that names the `path` for floats and more bits, whose range nobody knows."""
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() >= 0 and values.max() < 2**16:
            return np.repeat((values >> 8).astype(np.uint8)[..., None], 3, axis=-1)
    if image.mode[0] in "IF":
        raise UserError(f"{path}: holds floats or 32 bits; legal: 8 or 16 bits per channel")
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
    """The `os.DirEntry`s of a folder that are images or videos or hold some, in natural order.

    A warning says which others there are, but for documents and what systems leave. Raises UserError, which says what
    is `legal`, where the folder cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            named = {entry.name: entry for entry in entries}
            media = {name: entry for name, entry in named.items() if _has_media(entry)}
    except OSError as error:
        raise UserError(f"{error.filename or folder}: cannot be read: {error.strerror}; legal: {legal}") from error
    others = sorted((name for name in named.keys() - media.keys() if not _is_ignored(name)), key=natural_order)
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        _warn(folder, f"{', '.join(others[:3])}{more} passed over: no video and no frame")
    return [media[name] for name in sorted(media, key=natural_order)]


def _is_ignored(name):
    return is_clutter(name) or name.lower().endswith(_DOCUMENT_ENDINGS)


def _has_media(entry):
    """Whether an `os.DirEntry` is an image or a video, or a folder that holds one at any depth."""
    if _is_ignored(entry.name) or is_special_file(entry):
        return False
    if entry.is_dir():
        with os.scandir(entry) as entries:
            return any(_has_media(each) for each in entries)
    kind = _TYPES.guess_type(entry.name.lower(), strict=False)[0] or ""
    return kind.startswith(("image/", "video/")) or entry.name.lower().endswith((*VIDEO_ENDINGS, *IMAGE_ENDINGS))


def find_videos(folder, legal):
    """The videos in a folder, a dict from their names to `VideoFile` or `FrameFolder`, in natural order.

    Raises UserError, which says what is `legal`, for images and videos of other kinds.
    """
    return {entry.name: _video(entry, legal) for entry in list_entries(folder, legal)}


def _video(entry, legal):
    ending = os.path.splitext(entry.name)[1].lower()
    if entry.is_dir():
        return _frame_folder(Path(entry.path))
    if ending in VIDEO_ENDINGS:
        return VideoFile(Path(entry.path))
    if ending in IMAGE_ENDINGS:
        raise UserError(f"{entry.path}: is an image, not a video; legal: the frames of each video in its own folder")
    raise UserError(f"{entry.path}: is no video; legal: {legal}; what is to be left alone may lie elsewhere")


def _frame_folder(folder):
    legal = f"in the folder of a video: its frames, all of one kind ({IMAGES})"
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
