"""The scripts that make CLEVRER's, Traffic's and PHYRE's files out of what can be downloaded."""

import ast
import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
import zipfile
from pathlib import Path

import imageio.v2 as imageio
import imageio.v3
import numpy as np
import pytest
from PIL import Image

from datasets import clevrer_preparation, phyre_preparation, traffic_preparation
from utils.errors import UserError
from utils.files import file_lock

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPTS = {
    "clevrer": REPOSITORY / "datasets" / "clevrer_preparation.py",
    "traffic": REPOSITORY / "datasets" / "traffic_preparation.py",
    "phyre": REPOSITORY / "datasets" / "phyre_preparation.py",
}


def refusal(main, *arguments):
    """The text of the UserError that a command ends with; it is one line."""
    with pytest.raises(ValueError) as error:
        main([str(argument) for argument in arguments])
    assert type(error.value).__name__ == "UserError" and error.value.exit_status == 2
    assert "\n" not in str(error.value)
    return str(error.value)


def failing(error):
    """A function that raises `error`."""

    def fail(*arguments):
        raise error

    return fail


def contents(folder):
    """All files below a folder, by their path in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def start(*command, **environment):
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def stop(process, how, once):
    """End a process by a signal as soon as `once()` is true; returns its last line."""
    for _ in range(20000):
        if once() or process.poll() is not None:
            break
        time.sleep(0.001)
    process.send_signal(how)
    _, output = process.communicate(timeout=30)
    assert process.returncode == (130 if how == signal.SIGINT else -how), output
    return output.splitlines()[-1] if output else ""


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_names_every_option(name):
    module = {"clevrer": clevrer_preparation, "traffic": traffic_preparation, "phyre": phyre_preparation}[name]
    done = subprocess.run([sys.executable, SCRIPTS[name], "--help"], capture_output=True, text=True, check=True)
    required = {"clevrer": "--out x", "traffic": "--out x.npy --frames x", "phyre": "--out x"}[name]
    for option in vars(module.parse_arguments(required.split())):
        assert f"--{option} " in done.stdout or f"--{option}\n" in done.stdout


@pytest.mark.parametrize("name", SCRIPTS)
def test_one_process_at_a_time(name, tmp_path, monkeypatch, recording, clevrer):
    main, arguments, working = {
        "clevrer": (clevrer_preparation.main, ["--train", clevrer, "--num_train", 1, "--out", tmp_path], ".making"),
        "traffic": (traffic_preparation.main, ["--frames", recording, "--out", tmp_path / "x.npy"], ".x.making"),
        "phyre": (phyre_preparation.main, ["--out", tmp_path, "--num_tasks", 1], ".making"),
    }[name]
    monkeypatch.setitem(sys.modules, "phyre", stand_in())
    (tmp_path / working).mkdir()
    with file_lock(tmp_path / working / "lock"):
        assert refusal(main, *arguments) == f"{tmp_path}: another process is making this data set; let it end first"
    main([str(argument) for argument in arguments])
    assert not (tmp_path / working).exists()


# ---- CLEVRER


def write_video(path, seed, frames=128, size=(480, 320)):
    """A video of smooth colours, in whose top rows the number of each frame is written in black and white."""
    colors = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (4, 6, 3), np.uint8))
    background = np.array(colors.resize(size, Image.Resampling.BICUBIC))
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"fps": 25, "macro_block_size": 1, "output_params": ["-preset", "ultrafast", "-threads", "1"]}
    with imageio.get_writer(path, codec="libx264", **options) as writer:
        for number in range(frames):
            for bit in range(8):
                background[:40, 60 * bit : 60 * bit + 60] = 255 * (number >> bit & 1)
            writer.append_data(background)
    return path


@pytest.fixture(scope="session")
def clevrer(tmp_path_factory):
    """Three training and 1 + 1 validation videos, as unpacked from the official download."""
    root = tmp_path_factory.mktemp("clevrer")
    for number, folder in {0: "video_train/video_00000-01000", 10000: "video_validation/video_10000-11000"}.items():
        write_video(root / folder / f"video_{number:05}.mp4", seed=number)
    copies = {"video_train/video_00000-01000/video_00002": 0, "video_train/video_01000-02000/video_00001": 10000}
    for name, number in {**copies, "video_validation/video_11000-12000/video_11000": 0}.items():
        (root / name).parent.mkdir(exist_ok=True)
        source = "video_validation/video_10000-11000" if number else "video_train/video_00000-01000"
        os.link(root / source / f"video_{number:05}.mp4", root / f"{name}.mp4")
    return root


CLEVRER_NUMBERS = "--num_train 3 --num_valid 1 --num_test 1"
CLEVRER_SOURCES = {"train/0": 0, "train/1": 10000, "train/2": 0, "valid/0": 10000, "test/0": 0}


def prepare_clevrer(out, train=None, validation=None, numbers=CLEVRER_NUMBERS):
    sources = (("--train", train), ("--validation", validation))
    given = [text for option, source in sources if source for text in (option, str(source))]
    clevrer_preparation.main(["--out", str(out), *given, *numbers.split(), "--processes", "2"])


def resized(image, rows, columns):
    """An image [H, W, 3] whose rows and columns are weighted sums: float [h, w, 3] for weights [h, H] and [w, W]."""
    return np.stack([rows @ channel @ columns.T for channel in np.moveaxis(image.astype(float), -1, 0)], -1)


def area_weights(length, number):
    """[number, length]: how much of each of `length` pixels each of `number` equal parts of them covers, over its
    width."""
    edges = np.linspace(0, length, number + 1)
    pixels = np.arange(length)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return overlap.clip(0) * number / length


@pytest.fixture(scope="session")
def clevrer_frames(clevrer):
    """What the episode of each video holds: by number, float [100, 128, 128, 3]."""
    videos = {
        0: clevrer / "video_train/video_00000-01000/video_00000.mp4",
        10000: clevrer / "video_validation/video_10000-11000/video_10000.mp4",
    }
    rows, columns = area_weights(320, 128), area_weights(480, 128)
    frames = {number: imageio.mimread(path, memtest=False)[18:118] for number, path in videos.items()}
    return {number: np.stack([resized(frame, rows, columns) for frame in video]) for number, video in frames.items()}


def read_episode(folder):
    assert sorted(os.listdir(folder)) == sorted(f"{frame}.png" for frame in range(100))
    return np.stack([imageio.v3.imread(folder / f"{frame}.png") for frame in range(100)])


def test_clevrer_frames(tmp_path, clevrer, clevrer_frames, capsys):
    out = tmp_path / "data" / "clevrer"
    prepare_clevrer(out, clevrer / "video_train", clevrer / "video_validation")
    assert sorted(str(path.relative_to(out)) for path in out.glob("*/*")) == sorted(CLEVRER_SOURCES)
    assert sorted(os.listdir(out)) == ["test", "train", "valid"]
    for name, number in CLEVRER_SOURCES.items():
        episode = read_episode(out / name)
        assert episode.dtype == np.uint8 and episode.shape == (100, 128, 128, 3)
        assert np.abs(episode - clevrer_frames[number]).max() <= 1
    # The numbers that are written in the frames, which are 18 to 117.
    bits = read_episode(out / "train" / "0")[:, 8, 8::16, 0] > 127
    assert (bits @ 2 ** np.arange(8)).tolist() == list(range(18, 118))
    assert capsys.readouterr().out == f"{out}: all 5 episodes are there\n"


def test_clevrer_splits_of_the_paper():
    args = clevrer_preparation.parse_arguments(["--out", "x"])
    assert (args.num_train, args.num_valid, args.num_test) == (5000, 1000, 1000)
    first = {split.name: (split.source, split.first) for split in clevrer_preparation.SPLITS}
    assert first == {"train": ("train", 0), "valid": ("validation", 10000), "test": ("validation", 11000)}


def test_clevrer_from_archives(tmp_path, clevrer):
    few = "--num_train 1 --num_valid 0 --num_test 1"
    prepare_clevrer(tmp_path / "folders", clevrer / "video_train", clevrer / "video_validation", few)
    for name in ("video_train", "video_validation"):
        shutil.make_archive(tmp_path / name, "zip", clevrer, name)
    prepare_clevrer(tmp_path / "zip", tmp_path / "video_train.zip", tmp_path / "video_validation.zip", few)
    assert len(contents(tmp_path / "zip")) == 200
    assert contents(tmp_path / "zip") == contents(tmp_path / "folders")


def test_clevrer_of_a_damaged_archive(tmp_path, clevrer, capsys):
    archive = tmp_path / "video_train.zip"
    video = clevrer / "video_train/video_00000-01000/video_00000.mp4"
    with zipfile.ZipFile(archive, "w") as file:
        for number in range(2):
            file.write(video, f"video_{number:05}.mp4")
    content = bytearray(archive.read_bytes())
    content[2000] ^= 1
    archive.write_bytes(content)
    with pytest.raises(UserError, match=r"^1 of 2 videos cannot be used: they are named above"):
        prepare_clevrer(tmp_path / "out", archive, numbers="--num_train 2")
    lines = capsys.readouterr().err.splitlines()
    warning = f"warning: {archive}: video_00000.mp4 cannot be read: Bad CRC-32 for file 'video_00000.mp4'"
    assert warning in [line.strip() for line in lines]
    assert os.listdir(tmp_path / "out" / "train") == ["1"]
    archive.write_bytes(content[:-100])
    with pytest.raises(UserError, match=re.escape(f"--train: {archive} is neither a folder nor a whole .zip file")):
        prepare_clevrer(tmp_path / "out", archive, numbers="--num_train 2")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_clevrer_goes_on_after_an_interruption(tmp_path, clevrer, how):
    videos, out = tmp_path / "videos", tmp_path / "out"
    videos.mkdir()
    for number in range(4):
        os.link(clevrer / "video_train/video_00000-01000/video_00000.mp4", videos / f"video_{number:05}.mp4")
    numbers = ["--num_train", 4, "--processes", 1]
    process = start(SCRIPTS["clevrer"], "--train", videos, "--out", out, *numbers)
    last = stop(process, how, (out / "train" / "1").exists)
    made = {episode: episode.stat().st_ctime_ns for episode in (out / "train").iterdir()}
    assert 2 <= len(made) < 4
    for episode in made:
        read_episode(episode)
    if how == signal.SIGINT:
        assert last == "error: stopped; the same command goes on with what is missing"
        assert os.listdir(out) == ["train"]
    prepare_clevrer(out, videos, numbers="--num_train 4")
    assert {episode: episode.stat().st_ctime_ns for episode in made} == made
    files = contents(out)
    assert len(files) == 400
    assert all(
        files[f"train/{number}/{frame}.png"] == files[f"train/0/{frame}.png"]
        for number in range(4)
        for frame in range(100)
    )


def test_clevrer_makes_the_rest_where_videos_are_bad(tmp_path, clevrer, capfd):
    videos = tmp_path / "videos"
    whole = clevrer / "video_train/video_00000-01000/video_00000.mp4"
    write_video(videos / "video_00000.mp4", 0, frames=117)
    write_video(videos / "video_00001.mp4", 0, frames=129)
    write_video(videos / "video_00002.mp4", 0, frames=20, size=(320, 240))
    (videos / "video_00003.mp4").write_bytes(whole.read_bytes()[:-5000])
    (videos / "video_00004.mp4").write_bytes(b"")
    (videos / "video_00005.mp4").symlink_to(tmp_path / "nothing")
    os.link(whole, videos / "video_00006.mp4")
    with pytest.raises(UserError, match=r"^6 of 7 videos cannot be used: they are named above"):
        prepare_clevrer(tmp_path / "out", videos, numbers="--num_train 7")
    lines = capfd.readouterr().err.replace("\r", "\n").splitlines()
    messages = {
        "0": "has 117 frames that can be read; a video of CLEVRER has 128: is it whole?",
        "1": "has more than 128 frames; a video of CLEVRER has 128",
        "2": "has frames of 320 x 240 pixels; those of CLEVRER have 480 x 320",
        "3": "is not a video that can be read; is its download whole?",
        "4": "is not a video that can be read; is its download whole?",
        "5": "cannot be read: No such file or directory",
    }
    warnings = sorted(line.strip() for line in lines if "warning: " in line)  # FFmpeg may say things of its own
    assert warnings == [f"warning: {videos}/video_0000{number}.mp4 {text}" for number, text in messages.items()]
    assert os.listdir(tmp_path / "out" / "train") == ["6"]
    for number in range(6):
        (videos / f"video_0000{number}.mp4").unlink()
        os.link(whole, videos / f"video_0000{number}.mp4")
    prepare_clevrer(tmp_path / "out", videos, numbers="--num_train 7")
    assert len(contents(tmp_path / "out")) == 700


def test_clevrer_refusals(tmp_path, clevrer, monkeypatch):
    train, validation, out = clevrer / "video_train", clevrer / "video_validation", tmp_path / "out"
    main, empty, file = clevrer_preparation.main, tmp_path / "empty", tmp_path / "file"
    empty.mkdir()
    file.write_text("text")
    twice = tmp_path / "twice"
    shutil.copytree(train, twice)
    shutil.copy(twice / "video_00000-01000/video_00002.mp4", twice)
    few = ["--num_train", 3, "--num_valid", 1, "--num_test", 1]
    for arguments, message in {
        ("--out", out): "--train and --validation: neither is given",
        ("--train", tmp_path / "no", "--out", out): f"--train: {tmp_path}/no does not exist",
        ("--train", empty, "--out", out): f"--train: {empty} holds no video named video_NUMBER.mp4",
        ("--train", file, "--out", out): f"--train: {file} is neither a folder nor a whole .zip file",
        ("--train", twice, "--out", out): f"--train: {twice}/video_00002.mp4 and {twice}/video_00000-01000/video_00002",
        ("--train", train, "--out", out): f"--train: {train} lacks the train videos 3-4999; it has 0-2; legal: all from"
        " 0 to 4999, or a smaller --num_train",
        ("--train", validation, "--out", out): "lacks the train videos 0-4999; it has 10000, 11000;",
        ("--validation", validation, "--out", out): "lacks the valid videos 10001-10999; it has 10000, 11000;",
        (
            "--train",
            train,
            "--out",
            out,
            "--num_train",
            5001,
        ): "num_train is 5001; legal: from 0 to 5000",
        ("--train", train, "--out", out, "--num_test", -1): "num_test is -1; legal: from 0 to 1000",
        ("--train", train, "--out", out, "--processes", 0): "processes is 0; legal: at least 1",
        ("--train", train, "--out", file, *few): f"{file}/.making: cannot be written: Not a directory",
    }.items():
        assert message in refusal(main, *arguments)
        assert not out.exists()
    monkeypatch.setattr(Path, "rename", failing(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
    message = f"{out}/train/0: cannot be written: {os.strerror(errno.ENOSPC)}"
    assert refusal(main, "--train", train, "--out", out, "--num_train", 1) == message
    assert os.listdir(out) == ["train"] and not os.listdir(out / "train")


def test_clevrer_refuses_what_is_there_but_not_made_here(tmp_path, clevrer):
    train, out = clevrer / "video_train", tmp_path / "out"
    prepare_clevrer(out, train)
    (out / "train" / ".hidden").write_text("")
    prepare_clevrer(out, train)
    with pytest.raises(
        UserError, match=f"--out: {out}/train holds '2', which is none of the 2 episodes of --num_train"
    ):
        prepare_clevrer(out, train, numbers="--num_train 2")
    for damage in (Path.unlink, lambda path: path.write_bytes(b""), lambda path: (path.parent / "100.png").touch()):
        damage(out / "train" / "1" / "50.png")
        with pytest.raises(UserError, match=f"{out}/train/1 exists but does not hold just the frames 0.png to 99.png"):
            prepare_clevrer(out, train)
        (out / "train" / "1" / "50.png").write_bytes(b"kept")
    shutil.rmtree(out / "train" / "1")
    prepare_clevrer(out, train)
    read_episode(out / "train" / "1")


# ---- Traffic


def smooth_image(seed, size=(500, 430)):
    colors = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 11, 3), np.uint8))
    return colors.resize(size, Image.Resampling.BICUBIC)


@pytest.fixture(scope="session")
def recording(tmp_path_factory):
    """Frames 8 to 17."""
    folder = tmp_path_factory.mktemp("recording")
    for number in range(8, 18):
        smooth_image(number).save(folder / f"cam2_frame{number}.png")
    (folder / "readme 3.txt").write_text("text")
    return folder


def bicubic_weights(length, number):
    """[number, length]: Keys' cubic (a = -1/2), stretched over `length / number` pixels, at the centres of `number`
    equal parts."""
    scale = length / number
    distance = np.abs((np.arange(length) + 0.5) - (np.arange(number)[:, None] + 0.5) * scale) / scale
    near = 1.5 * distance**3 - 2.5 * distance**2 + 1
    far = -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
    weights = np.where(distance < 1, near, np.where(distance < 2, far, 0))
    return weights / weights.sum(1, keepdims=True)


def expected_traffic(image):
    """float [128, 128, 3]; the box is 420 x 420, from column 60 and row 0 on."""
    weights = bicubic_weights(420, 128)
    return resized(np.asarray(image)[0:420, 60:480], weights, weights).clip(0, 255)


def prepare_traffic(frames, out, *arguments):
    traffic_preparation.main(["--frames", str(frames), "--out", str(out), "--processes", "2", *arguments])


def test_traffic_frames(tmp_path, recording, capsys):
    out = tmp_path / "data" / "traffic" / "img128np.npy"
    prepare_traffic(recording, out)
    array = np.load(out, mmap_mode="r")
    assert array.dtype == np.uint8 and array.shape == (10, 128, 128, 3)
    for index, frame in enumerate(array):
        assert np.abs(frame - expected_traffic(smooth_image(8 + index))).max() <= 1.5
    assert os.listdir(out.parent) == ["img128np.npy"]
    before = out.stat()
    prepare_traffic(recording, out)
    assert out.stat() == before
    assert capsys.readouterr().out.splitlines()[-1] == f"{out}: all 10 frames are there"


def test_traffic_kinds_of_images(tmp_path):
    folder = tmp_path / "frames"
    folder.mkdir()
    image = smooth_image(0)
    image.save(folder / "1.jpg", quality=95)
    image.convert("RGBA").save(folder / "2.PNG")
    image.convert("L").save(folder / "3.png")
    image.quantize(256).save(folder / "4.png")
    prepare_traffic(folder, tmp_path / "x.npy")
    array = np.load(tmp_path / "x.npy")
    assert np.abs(array[1] - expected_traffic(image)).max() <= 1.5
    assert np.abs(array[0] - expected_traffic(image)).mean() < 2
    gray = np.asarray(image, float) @ [0.299, 0.587, 0.114]
    assert np.abs(array[2] - expected_traffic(gray[..., None].repeat(3, -1))).max() <= 2
    assert np.abs(array[3] - expected_traffic(image)).mean() < 8


@pytest.fixture
def long_recording(tmp_path):
    folder = tmp_path / "frames"
    folder.mkdir()
    for number in range(40):
        path = folder / f"{number}.png"
        if number < 4:
            smooth_image(number, (480, 420)).save(path, compress_level=1)
        else:
            os.link(folder / f"{number % 4}.png", path)
    return folder


def reading_only(monkeypatch, failing=None):
    """Note which frames are read, and fail at one."""
    names, read = [], traffic_preparation.read_frame

    def noting(path):
        names.append(int(path.stem))
        if path.stem == failing:
            raise KeyboardInterrupt
        return read(path)

    monkeypatch.setattr(traffic_preparation, "read_frame", noting)
    return names


def expected_file(folder):
    """The whole file, as numpy writes it."""
    frames = [traffic_preparation.read_frame(folder / f"{number}.png") for number in range(40)]
    np.save(folder.parent / "expected.npy", np.stack(frames))
    return (folder.parent / "expected.npy").read_bytes()


def test_traffic_goes_on_where_it_was(tmp_path, long_recording, monkeypatch):
    out, expected = tmp_path / "traffic" / "x.npy", expected_file(long_recording)
    monkeypatch.setattr(traffic_preparation, "_CHUNK", 8)
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"^stopped; the same command goes on") as error:
        reading_only(patch, failing="29")
        prepare_traffic(long_recording, out)
    assert error.value.exit_status == 130 and not out.exists()
    with monkeypatch.context() as patch:
        names = reading_only(patch)
        prepare_traffic(long_recording, out)
        assert sorted(names) == list(range(24, 40))
    assert out.read_bytes() == expected
    out.unlink()
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"^stopped"):
        reading_only(patch, failing="29")
        prepare_traffic(long_recording, out)
    # Another recording: nothing of the first one is taken over.
    smooth_image(9).save(long_recording / "3.png")
    prepare_traffic(long_recording, out)
    assert out.read_bytes() == expected_file(long_recording) != expected


def test_traffic_goes_on_after_a_kill(tmp_path, long_recording, monkeypatch):
    out, note = tmp_path / "x.npy", tmp_path / ".x.making" / "progress.json"
    script = (
        "import sys; from datasets import traffic_preparation as t; t._CHUNK = 2;"
        f"t.main(['--frames', {str(long_recording)!r}, '--out', {str(out)!r}, '--processes', '1'])"
    )
    stop(start("-c", script), signal.SIGKILL, note.exists)
    assert not out.exists()
    done = json.loads(note.read_text())["frames"]
    assert 2 <= done < 40
    with monkeypatch.context() as patch:
        names = reading_only(patch)
        prepare_traffic(long_recording, out)
        assert sorted(names) == list(range(done, 40))
    assert out.read_bytes() == expected_file(long_recording)


def test_traffic_refusals(tmp_path, recording, monkeypatch):
    frames, empty, out = tmp_path / "frames", tmp_path / "empty", tmp_path / "x.npy"
    empty.mkdir()

    def message(*change, arguments=()):
        """What is said after `change(frames)`."""
        shutil.rmtree(frames, ignore_errors=True)
        shutil.copytree(recording, frames)
        for action in change:
            action(frames / "cam2_frame12.png")
        return refusal(traffic_preparation.main, "--frames", frames, "--out", out, *arguments)

    def save(image, name="cam2_frame12.png"):
        return lambda path: image.save(path.with_name(name))

    def cut(path):
        path.write_bytes(path.read_bytes()[:-2000])

    frame = f"{frames}/cam2_frame12.png"
    assert message(Path.unlink) == (
        f"--frames: {frames} has frames 8 to 17 but lacks 12; legal: a recording without gaps, or --allow_gaps to go"
        " over them as if there were none"
    )
    assert "has frames 8 to 1000000000000 but lacks 18-999999999999;" in message(
        save(smooth_image(0), "1000000000000.png")
    )
    assert f"--frames: {frames}/12.jpg and {frame} have the same number" in message(save(smooth_image(0), "12.jpg"))
    assert f"{frames}/cover.png has no number" in message(save(smooth_image(0), "cover.png"))
    assert f"{frame}: cannot be read: it is empty, damaged or something else" in message(cut)
    assert f"{frame}: cannot be read: it is empty, damaged or something else" in message(
        lambda path: path.write_text("text")
    )
    assert f"{frame}: cannot be read: it is empty, damaged or something else" in message(
        lambda path: path.write_bytes(b"")
    )
    assert f"{frame}: has 479 x 430 pixels; the box (60, 0, 480, 420) that is cut out needs at least 480 x 420" in (
        message(save(smooth_image(0, (479, 430))))
    )
    assert f"{frame}: has 500 x 419 pixels" in message(save(smooth_image(0, (500, 419))))
    deep = Image.fromarray(np.zeros((430, 500), np.uint16))
    assert f"{frame}: is an image of the kind I;16; legal: 8 bits per channel" in message(save(deep))
    assert not out.exists()
    assert message(arguments=["--processes", 0]) == "processes is 0; legal: at least 1"
    usage = shutil._ntuple_diskusage(9e9, 9e9, 4e5)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda folder: usage)
        refused = message(arguments=["--out", tmp_path / "new.npy"])
        assert refused == f"--out: {tmp_path} needs 0.0 GB, but 0.0 GB are free there"
    for source, said in ((empty, "holds no .png or .jpg file"), (tmp_path / "no", "cannot be read: No such file or")):
        assert refusal(traffic_preparation.main, "--frames", source, "--out", out).startswith(
            f"--frames: {source} {said}"
        )
    for path, said in {
        tmp_path / "x.npz": '--out is "{}"; legal: a file named *.npy',
        recording / "readme 3.txt" / "x.npy": "{}: cannot be written: Not a directory",
    }.items():
        refused = refusal(traffic_preparation.main, "--frames", recording, "--out", path)
        assert refused == said.format(path if path.suffix == ".npz" else path.with_name(".x.making"))


def test_traffic_gaps_can_be_allowed(tmp_path, recording):
    frames = tmp_path / "frames"
    shutil.copytree(recording, frames)
    (frames / "cam2_frame12.png").unlink()
    prepare_traffic(frames, tmp_path / "gap.npy", "--allow_gaps")
    prepare_traffic(recording, tmp_path / "whole.npy")
    whole = np.load(tmp_path / "whole.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "gap.npy"), np.delete(whole, 4, axis=0))


def test_traffic_refuses_a_file_of_others(tmp_path, recording):
    out = tmp_path / "x.npy"
    prepare_traffic(recording, out)
    whole = np.load(out)
    other = whole.copy()
    other[-1] = 0
    for array, said in (
        (whole[:9], "with uint8 [9, 128, 128, 3], not uint8 [10, 128, 128, 3]"),
        (whole.astype(np.float32), "with float32 [10, 128, 128, 3], not"),
        (other, f"but its frame 9 is not that of {recording}/cam2_frame17.png"),
    ):
        np.save(out, array)
        refused = refusal(traffic_preparation.main, "--frames", recording, "--out", out)
        assert said in refused and refused.startswith(f"{out} exists") and "--force" in refused
    np.save(out, whole)
    for content in (b"", b"text", out.read_bytes()[:-1]):
        out.write_bytes(content)
        refused = refusal(traffic_preparation.main, "--frames", recording, "--out", out)
        assert refused.startswith(f"{out} exists but is not a whole .npy file; legal: another --out, or --force")
        assert out.read_bytes() == content
    prepare_traffic(recording, out, "--force")
    np.testing.assert_array_equal(np.load(out), whole)


# ---- PHYRE

# What the script uses of PHYRE. Tasks with an even number are of the fold's train split, others of dev and test. The
# scene of a step is a square whose place tells the step and whose color the action.
STAND_IN = """
import enum
import numpy as np

COLORS = np.array([[255, 255, 255], [243, 79, 70], [107, 206, 187], [24, 119, 242], [75, 74, 164]], np.uint8)
STEPS = 40

class Status(enum.IntEnum):
    NOT_SOLVED = -1
    INVALID_INPUT = 0
    SOLVED = 1
    def is_solved(self):
        return self is Status.SOLVED

def list_eval_setups():
    return ("ball_cross_template", "ball_within_template")

def get_fold(setup, fold):
    assert setup in list_eval_setups() and fold in (0, 1)
    tasks = [f"{template:05}:{task:03}" for template in (0, 7, 12, 13, 24) for task in range(20)]
    even = [task for task in tasks if int(task[-1]) % 2 == fold]
    odd = [task for task in tasks if int(task[-1]) % 2 != fold]
    return tuple(even), tuple(odd[::2]), tuple(odd[1::2])

def eval_setup_to_action_tier(setup):
    return "ball"

class Cache:
    action_array = np.arange(4)[:, None] / 4
    def load_simulation_states(self, task):
        states = np.array([-1, 0, 1, 1])
        return np.minimum(states, 0) if task.endswith("3") or task.endswith("4") else states

def get_default_100k_cache(tier):
    assert tier == "ball"
    return Cache()

class Simulation:
    def __init__(self, status, images):
        self.status, self.images = status, images

class Simulator:
    def __init__(self, tasks):
        self.tasks = tasks
    def simulate_action(self, index, action, *, need_images, need_featurized_objects, stride):
        assert need_images is True and need_featurized_objects is False
        number, template = int(self.tasks[index][-3:]), int(self.tasks[index][:5])
        # The cache is wrong on the first solving action of some tasks, and on both of one.
        if action[0] == 0.5 and number % 5 == 0 or number == 10:
            return Simulation(Status.NOT_SOLVED, None)
        images = np.zeros((STEPS + number, 256, 256), np.uint8)
        for step, image in enumerate(images):
            image[10 + step : 40 + step, 5 + 2 * template : 31 + 2 * template] = 4 * action[0]
        return Simulation(Status.SOLVED, images[::stride])

def initialize_simulator(tasks, tier):
    assert tier == "ball"
    return Simulator(list(tasks))

def observations_to_uint8_rgb(scene):
    return COLORS[scene][::-1]
"""


def stand_in(**changes):
    """A module `phyre`, some of whose attributes may be changed."""
    module = types.ModuleType("phyre")
    exec(STAND_IN, module.__dict__)
    vars(module).update(changes)
    return module


@pytest.fixture
def phyre(monkeypatch):
    monkeypatch.setitem(sys.modules, "phyre", stand_in())


def expected_phyre(split, options=None):
    """The episodes of a split, a list of (task, float [frames, 128, 128, 3]), of the stand-in's tasks."""
    stride, skipped = options or (7, (12,))
    colors = np.array([[255, 255, 255], [243, 79, 70], [107, 206, 187], [24, 119, 242]], float)
    episodes = []
    for template in {0, 7, 13, 24, 12} - set(skipped):
        for number in range(20):
            of = {0: "train"}.get(number % 2, "valid" if number % 4 == 1 else "test")
            if of != split or number % 10 in (3, 4) or number == 10:
                continue
            steps = range(0, 40 + number, stride)
            scenes = np.tile(colors[0], (len(steps), 256, 256, 1))
            for step, scene in zip(steps, scenes, strict=True):
                scene[10 + step : 40 + step, 5 + 2 * template : 31 + 2 * template] = colors[3 if number % 5 == 0 else 2]
            upright = scenes[:, ::-1]
            episodes.append(((template, number), upright.reshape(-1, 128, 2, 128, 2, 3).mean((2, 4))))
    return [video for _, video in sorted(episodes, key=lambda entry: entry[0])]


def prepare_phyre(out, *arguments):
    phyre_preparation.main(["--out", str(out), "--processes", "2", *map(str, arguments)])


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ("--skip_templates 12 13 24", (7, (12, 13, 24))),
        ("--stride 20 --skip_templates 0 7 24 13", (20, (0, 7, 13, 24))),
    ],
)
def test_phyre_frames(tmp_path, phyre, capsys, arguments, options):
    out = tmp_path / "data" / "phyre"
    prepare_phyre(out, *arguments.split())
    assert sorted(os.listdir(out)) == ["preparation.json", "test", "train", "valid"]
    number = 0
    for split in ("train", "valid", "test"):
        episodes = expected_phyre(split, options)
        number += len(episodes)
        assert sorted(os.listdir(out / split)) == [f"{episode:05}" for episode in range(len(episodes))]
        for episode, expected in enumerate(episodes):
            folder = out / split / f"{episode:05}"
            names = [f"{frame:05}.png" for frame in range(len(expected))]
            assert sorted(os.listdir(folder)) == names
            frames = np.stack([imageio.v3.imread(folder / name) for name in names])
            assert frames.dtype == np.uint8 and np.abs(frames - expected).max() < 1
    tasks = 20 * (5 - len(options[1]))
    left = {split: tasks * share // 4 - len(expected_phyre(split, options)) for split, share in SHARES.items()}
    said = ", ".join(f"{number} of {split}" for split, number in left.items() if number)
    assert capsys.readouterr().out == (
        f"{out}: all {number} episodes of {tasks} tasks are there; no action of PHYRE's cache solves {said}, which have"
        " none\n"
    )


SHARES = {"train": 2, "valid": 1, "test": 1}


def test_phyre_released_options_by_default():
    args = phyre_preparation.parse_arguments(["--out", "x"])
    assert (args.setup, args.fold, args.stride, args.num_tasks) == ("ball_within_template", 0, 7, None)
    assert args.skip_templates == [12, 13, 16, 20, 21]
    assert phyre_preparation.parse_arguments(["--out", "x", "--skip_templates"]).skip_templates == []


def test_phyre_more_tasks_later(tmp_path, phyre):
    prepare_phyre(tmp_path / "whole", "--num_tasks", 12)
    prepare_phyre(tmp_path / "more", "--num_tasks", 5)
    before = contents(tmp_path / "more")
    prepare_phyre(tmp_path / "more", "--num_tasks", 12)
    after = contents(tmp_path / "more")
    assert before.items() < after.items() and after == contents(tmp_path / "whole")
    message = (
        f"--out: {tmp_path}/more/train holds '00005', which is none of its 5 episodes; legal: a larger --num_tasks"
    )
    assert message in refusal(phyre_preparation.main, "--out", tmp_path / "more", "--num_tasks", 5)


def test_phyre_options_are_kept(tmp_path, phyre):
    prepare_phyre(tmp_path, "--num_tasks", 1)
    noted = {"setup": "ball_within_template", "fold": 0, "stride": 7, "skip_templates": [12, 13, 16, 20, 21]}
    assert json.loads((tmp_path / "preparation.json").read_text()) == noted
    for arguments, message in {
        "--stride 6": "was made with stride 7, not 6; legal: another --out, or these options",
        "--fold 1 --setup ball_cross_template": "setup ball_within_template, not ball_cross_template; fold 0, not 1;",
        "--skip_templates 13 12": "was made with skip_templates [12, 13, 16, 20, 21], not [12, 13];",
    }.items():
        refused = refusal(phyre_preparation.main, "--out", tmp_path, *arguments.split())
        assert refused.startswith(f"--out: {tmp_path} was made with") and message in refused
    prepare_phyre(tmp_path, "--num_tasks", 1, "--skip_templates", 21, 20, 16, 13, 12)
    (tmp_path / "preparation.json").write_text("[]")
    assert "preparation.json cannot be read: " in refusal(phyre_preparation.main, "--out", tmp_path)
    (tmp_path / "preparation.json").unlink()
    message = f"--out: {tmp_path}/train exists but was not made by this script; legal: another --out"
    assert refusal(phyre_preparation.main, "--out", tmp_path) == message


def test_phyre_damaged_episodes(tmp_path, phyre):
    prepare_phyre(tmp_path, "--num_tasks", 2)
    path = tmp_path / "valid" / "00001" / "00003.png"
    for damage in (Path.unlink, lambda path: path.write_bytes(b""), lambda path: path.with_name("00099.png").touch()):
        content = path.read_bytes()
        damage(path)
        refused = refusal(phyre_preparation.main, "--out", tmp_path, "--num_tasks", 2)
        frames = math.ceil((40 + 5) / 7)
        assert refused.startswith(f"{path.parent} exists but does not hold just the {frames} frames of its episode;")
        path.write_bytes(content)
    shutil.rmtree(path.parent)
    prepare_phyre(tmp_path, "--num_tasks", 2)
    assert path.read_bytes() == content


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_phyre_by_itself_and_on_after_an_interruption(tmp_path, phyre, how):
    """The file alone, copied to where there is nothing of ours."""
    script, out = tmp_path / "alone" / "phyre_preparation.py", tmp_path / "out"
    script.parent.mkdir()
    shutil.copy(SCRIPTS["phyre"], script)
    (script.parent / "phyre.py").write_text(STAND_IN)
    options = ["--stride", 5, "--skip_templates", 12, 13, 24]
    process = start(script, "--out", out, "--processes", 1, *options)
    last = stop(process, how, (out / "train" / "00001").exists)
    made = contents(out / "train")
    assert made and not (out / "test").exists()
    if how == signal.SIGINT:
        assert last == "error: stopped; the same command goes on with what is missing"
        assert sorted(os.listdir(out)) in (["preparation.json", "train"], ["preparation.json", "train", "valid"])
    prepare_phyre(out, *options)
    prepare_phyre(tmp_path / "whole", *options)
    assert contents(out) == contents(tmp_path / "whole") and made.items() < contents(out / "train").items()


def test_phyre_not_installed(tmp_path):
    script = tmp_path / "phyre_preparation.py"
    shutil.copy(SCRIPTS["phyre"], script)
    (tmp_path / "phyre.py").write_text("import nothing_of_this_name")
    done = subprocess.run([sys.executable, script, "--out", tmp_path], capture_output=True, text=True, check=False)
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert done.returncode == 2 and done.stderr == (
        f"error: PHYRE cannot be used in this Python {version}: No module named 'nothing_of_this_name'; it installs on"
        " Python 3.6 to 3.9 only: conda create -n phyre python=3.8 && conda activate phyre && pip install phyre tqdm"
        " filelock; then start the same command again, there\n"
    )


def test_phyre_refusals(tmp_path, monkeypatch):
    out, main = tmp_path / "out", phyre_preparation.main
    (tmp_path / "file").write_text("")

    def message(*arguments, **changes):
        monkeypatch.setitem(sys.modules, "phyre", stand_in(**changes))
        refused = refusal(main, "--out", out, *arguments)
        assert not out.exists()
        return refused

    assert message("--fold", -1) == "fold is -1; legal: at least 0"
    assert message("--stride", 0) == "stride is 0; legal: at least 1"
    assert message("--num_tasks", 0) == "num_tasks is 0; legal: at least 1"
    assert message("--processes", 0) == "processes is 0; legal: at least 1"
    assert message("--setup", "x") == "--setup: 'x' is unknown; legal are ball_cross_template, ball_within_template"
    assert message("--skip_templates", 0, 7, 12, 13, 24) == (
        "--skip_templates: no task of the split train is left; legal: fewer templates"
    )
    monkeypatch.setenv("PHYRE_CACHE_DIR", "/my/cache")
    unreachable = failing(OSError(errno.ECONNREFUSED, "Connection refused"))
    assert message(get_default_100k_cache=unreachable) == (
        "PHYRE's cache of solving actions ('ball') cannot be had: ConnectionRefusedError: [Errno 111] Connection"
        " refused; it is downloaded into /my/cache ($PHYRE_CACHE_DIR): legal are a network, or its file put there; a"
        " download that was cut off must be deleted there first"
    )
    lacking = types.SimpleNamespace(action_array=np.zeros((4, 1)), load_simulation_states={}.__getitem__)
    monkeypatch.setitem(sys.modules, "phyre", stand_in(get_default_100k_cache=lambda tier: lacking))
    said = "PHYRE's cache of solving actions says nothing on the task 00000:000"
    assert refusal(main, "--out", out) == said
    monkeypatch.setitem(sys.modules, "phyre", stand_in())
    said = f"{tmp_path}/file/.making: cannot be written: Not a directory"
    assert refusal(main, "--out", tmp_path / "file") == said
    monkeypatch.setattr(Path, "rename", failing(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
    assert refusal(main, "--out", out, "--processes", 1) == (
        f"{out}/train/00000: cannot be written: No space left on device"
    )


def test_phyre_script_is_of_old_python():
    source = SCRIPTS["phyre"].read_text()
    tree = ast.parse(source, feature_version=(3, 6))
    nodes = list(ast.walk(tree))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    packages = {name.partition(".")[0] for name in imported}
    assert packages - {"filelock", "phyre", "PIL", "tqdm"} <= sys.stdlib_module_names - {"__future__", "dataclasses"}
    # Python 3.6 and 3.7 do not know these.
    keywords = {node.arg for node in nodes if isinstance(node, ast.keyword)}
    assert not keywords & {"strict", "missing_ok", "cancel_futures", "capture_output", "dirs_exist_ok"}
