"""Make the videos of PHYRE: what its simulator shows when a solving action is taken.

    python datasets/phyre_preparation.py --out data/phyre

PHYRE installs on Python 3.6 to 3.9 only. This file therefore runs by itself, in an environment that has nothing but
PHYRE, tqdm and filelock; it may be copied to where that is:

    conda create -n phyre python=3.8 && conda activate phyre && pip install phyre tqdm filelock

The tasks are those of one fold of one of PHYRE's evaluation setups, without some templates; its train, dev and test
tasks become train, valid and test. An episode shows the first action in PHYRE's cache of 100 000 actions that solves
the task; PHYRE downloads that cache when it is first used. Every `stride`-th step of the simulation is a frame, in
PHYRE's colours, resized from 256 x 256 to 128 x 128 (each pixel is the mean of 2 x 2). The episodes of a split are
numbered in the order of its tasks; a task that no action solves has no episode and no number, and in the end it is said
how many these are.

| train/{00000,..}/{00000,..}.png | frames, RGB, as many as the simulation has |
| valid/, test/ | the same |
| preparation.json | the options that the episodes were made with |

An episode is made under a temporary name in `.making` in the folder of --out, and moved into place when it is whole;
the same command, started again, goes on with the episodes that are missing.
"""

import argparse
import json
import os
import shutil
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

SPLITS = ("train", "valid", "test")
IMAGE_SIZE = 128
INSTALL = "conda create -n phyre python=3.8 && conda activate phyre && pip install phyre tqdm filelock"


class UserError(ValueError):
    """What a user can fix; its text is one line that names what is wrong and what is legal."""

    exit_status = 2


class Interrupted(UserError):
    """The user stopped the command (Ctrl-C)."""

    exit_status = 130


# ---- the simulations


def import_packages():
    """The modules filelock, phyre and PIL.Image, and tqdm's bar; UserError that says how to install them."""
    try:
        import filelock
        import phyre
        import PIL.Image
        import tqdm
    except ImportError as error:
        raise UserError(
            f"PHYRE cannot be used in this Python {sys.version_info[0]}.{sys.version_info[1]}: {error}; it installs on"
            f" Python 3.6 to 3.9 only: {INSTALL}; then start the same command again, there"
        ) from error
    return filelock, phyre, PIL.Image, tqdm.tqdm


def choose_tasks(phyre, options, num_tasks=None):
    """The ids of the tasks of each split, a dict of lists, in PHYRE's order; of each the first `num_tasks`.

    Raises UserError for a setup that PHYRE does not have, and where no task is left.
    """
    setups = phyre.list_eval_setups()
    if options["setup"] not in setups:
        raise UserError(f"--setup: {options['setup']!r} is unknown; legal are {', '.join(setups)}")
    tasks = {}
    fold = phyre.get_fold(options["setup"], options["fold"])
    for split, ids in zip(SPLITS, fold):  # noqa: B905, Python 3.6 has no strict=
        kept = [task for task in ids if int(task.split(":")[0]) not in options["skip_templates"]]
        if not kept:
            raise UserError(f"--skip_templates: no task of the split {split} is left; legal: fewer templates")
        tasks[split] = kept[:num_tasks]
    return tasks


def load_cache(phyre, tier):
    """PHYRE's cache of actions, and of which tasks they solve; UserError where it cannot be had."""
    try:
        return phyre.get_default_100k_cache(tier)
    except Exception as error:  # a download and an unpickling: anything
        folder = os.environ.get("PHYRE_CACHE_DIR", "~/.cache/phyre")
        raise UserError(
            f"PHYRE's cache of solving actions ({tier!r}) cannot be had: {type(error).__name__}: {error}; it is"
            f" downloaded into {folder} ($PHYRE_CACHE_DIR): legal are a network, or its file put there; a download that"
            " was cut off must be deleted there first"
        ) from error


def simulate(phyre, cache, tier, tasks, stride):
    """Yield what happens in each task: an array uint8 [frames, 256, 256] of PHYRE's colour codes, or None where none
    of the cache's solving actions solves the task. Raises UserError for a task that is not in the cache."""
    simulator = phyre.initialize_simulator(tasks, tier)
    for index, task in enumerate(tasks):
        try:
            solving = cache.action_array[cache.load_simulation_states(task) > 0]
        except KeyError as error:
            raise UserError(f"PHYRE's cache of solving actions says nothing on the task {task}") from error
        yield _first_solution(simulator, index, solving, stride)


def _first_solution(simulator, index, actions, stride):
    for action in actions:
        simulation = simulator.simulate_action(
            index, action, need_images=True, need_featurized_objects=False, stride=stride
        )
        if simulation.status.is_solved():
            return simulation.images
    return None


# ---- the episodes


def write_episode(working, to_rgb, image, folder, scenes):
    """Write the frames of an episode to `folder`, which is whole or not there.

    `working`: a folder on the same disk for what is not yet whole. `to_rgb` makes an RGB image uint8 [256, 256, 3] of
    one of the `scenes`, which are what `simulate` yields; `image` is the module PIL.Image. Raises UserError where
    nothing can be written.
    """
    part = working / f"{folder.parent.name}-{folder.name}"
    with reporting_unwritable(folder):
        shutil.rmtree(str(part), ignore_errors=True)
        part.mkdir()
        for name, scene in zip(frame_names(len(scenes)), scenes):  # noqa: B905, Python 3.6 has no strict=
            frame = image.fromarray(to_rgb(scene)).resize((IMAGE_SIZE, IMAGE_SIZE), image.BOX)
            frame.save(str(part / name))
        folder.parent.mkdir(exist_ok=True)
        part.rename(folder)


def frame_names(number):
    """The names of the files of an episode of `number` frames."""
    return [f"{frame:05}.png" for frame in range(number)]


@contextmanager
def reporting_unwritable(path):
    """Turn an OSError into a UserError: `path` cannot be written."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error


def make_split(simulations, folder, write, processes, bar):
    """Write the episodes of a split that are not there; returns how many tasks have none.

    `simulations`: what `simulate` yields; `write` is called with the folder of an episode and its scenes, by as many
    threads as `processes` says.
    """
    episodes = unsolved = 0
    pending = deque()
    with ThreadPoolExecutor(processes) as pool:
        for scenes in simulations:
            bar.update()
            if scenes is None:
                unsolved += 1
                continue
            episode = folder / f"{episodes:05}"
            episodes += 1
            if is_made(episode, len(scenes)):
                continue
            # Few ahead: scenes must not pile up where the disk is slow.
            if len(pending) == 2 * processes:
                pending.popleft().result()
            pending.append(pool.submit(write, episode, scenes))
        for future in pending:
            future.result()
    check_episodes(folder, episodes)
    return unsolved


def is_made(folder, number):
    """Whether the episode is there; UserError for a folder that is there but is not an episode of `number` frames."""
    if not folder.exists():
        return False
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()} if folder.is_dir() else {}
    if sizes.keys() != set(frame_names(number)) or not all(sizes.values()):
        raise UserError(
            f"{folder} exists but does not hold just the {number} frames of its episode; legal: another --out, or the"
            " same command after deleting it"
        )
    return True


def check_episodes(folder, number):
    """UserError if the folder of a split holds anything but episodes 0 to `number` - 1."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"--out: {folder} is not a folder; legal: another --out")
    legal = {f"{episode:05}" for episode in range(number)}
    others = sorted(path.name for path in folder.iterdir() if path.name not in legal and path.name[0] != ".")
    if others:
        raise UserError(
            f"--out: {folder} holds {others[0]!r}, which is none of its {number} episodes; legal: a larger --num_tasks,"
            " or another --out"
        )


# ---- the command


def check_options(out, options):
    """UserError if the episodes in the folder `out` were made with other options, or not by this script."""
    path = out / "preparation.json"
    if not path.exists():
        others = [out / split for split in SPLITS if (out / split).exists()]
        if others:
            raise UserError(f"--out: {others[0]} exists but was not made by this script; legal: another --out")
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        differing = [f"{name} {found[name]}, not {options[name]}" for name in options if found[name] != options[name]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {error}; legal: another --out") from error
    if differing:
        raise UserError(f"--out: {out} was made with {'; '.join(differing)}; legal: another --out, or these options")


@contextmanager
def working_folder(filelock, out, options):
    """Make `out` and, while in use, a folder in it for what is not yet whole, which one process at a time has; yields
    the latter. Raises UserError where nothing can be written, or another process is at it."""
    folder = out / ".making"
    with reporting_unwritable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "lock").touch()
    lock = filelock.FileLock(str(folder / "lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise UserError(f"{out}: another process is making this data set; let it end first") from error
    except OSError as error:
        print(f"{out}: no file locks here ({error.strerror}); let no other process make this data set", file=sys.stderr)
    try:
        with reporting_unwritable(out):
            part = folder / "preparation.json"
            part.write_text(json.dumps(options) + "\n", encoding="utf-8")
            part.replace(out / part.name)
        yield folder
    finally:
        lock.release()
        shutil.rmtree(str(folder))


def parse_arguments(arguments):
    description = f"Make the videos of PHYRE, in a Python of 3.6 to 3.9 with PHYRE: {INSTALL}"
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where train, valid and test go")
    parser.add_argument("--setup", default="ball_within_template", help="PHYRE's evaluation setup (%(default)s)")
    parser.add_argument("--fold", type=int, default=0, help="fold of the setup (%(default)s)")
    help_ = "templates to leave out (12 13 16 20 21); none without a number"
    parser.add_argument("--skip_templates", type=int, nargs="*", default=[12, 13, 16, 20, 21], metavar="N", help=help_)
    parser.add_argument("--stride", type=int, default=7, help="simulation steps from frame to frame (%(default)s)")
    parser.add_argument("--num_tasks", type=int, metavar="N", help="only the first N tasks of each split (all)")
    help_ = "episodes written at the same time, by as many threads (%(default)s)"
    parser.add_argument("--processes", type=int, default=_available_cores(), metavar="N", help=help_)
    return parser.parse_args(arguments)


def _available_cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_arguments(args):
    """UserError for a number that is not legal."""
    for name, lowest in (("fold", 0), ("stride", 1), ("num_tasks", 1), ("processes", 1)):
        value = getattr(args, name)
        if value is not None and value < lowest:
            raise UserError(f"{name} is {value}; legal: at least {lowest}")


def prepare(args):
    """Make all episodes that are missing; prints how many tasks have none."""
    check_arguments(args)
    filelock, phyre, image, tqdm = import_packages()
    options = {name: getattr(args, name) for name in ("setup", "fold", "stride")}
    options["skip_templates"] = sorted(set(args.skip_templates))
    tasks = choose_tasks(phyre, options, args.num_tasks)
    check_options(args.out, options)
    for split in SPLITS:
        check_episodes(args.out / split, len(tasks[split]))
    tier = phyre.eval_setup_to_action_tier(args.setup)
    cache = load_cache(phyre, tier)
    total = sum(map(len, tasks.values()))
    with working_folder(filelock, args.out, options) as working, tqdm(desc="PHYRE", total=total, unit="task") as bar:
        write = partial(write_episode, working, phyre.observations_to_uint8_rgb, image)
        unsolved = {}
        for split in SPLITS:
            simulations = simulate(phyre, cache, tier, tasks[split], args.stride)
            unsolved[split] = make_split(simulations, args.out / split, write, args.processes, bar)
    left_out = ", ".join(f"{number} of {split}" for split, number in unsolved.items() if number)
    note = f"; no action of PHYRE's cache solves {left_out}, which have none" if left_out else ""
    print(f"{args.out}: all {total - sum(unsolved.values())} episodes of {total} tasks are there{note}")


def main(arguments=None):
    args = parse_arguments(arguments)
    try:
        prepare(args)
    except KeyboardInterrupt as error:
        raise Interrupted("stopped; the same command goes on with what is missing") from error


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
