"""The commands that predict with a trained DDLP: `generate_ddlp_video_prediction.py`, `eval/eval_gen_metrics.py`."""

import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import imageio.v3 as iio
import numpy as np
import piqa
import pytest
import torch
from PIL import Image

import generate_ddlp_video_prediction as generation
from eval import eval_gen_metrics
from eval.eval_gen_metrics import (
    OverTime,
    baseline_predictions,
    eval_ddlp_im_metric,
    measure_predictions,
    prediction_videos,
)
from eval.eval_model import animate_trajectory_ddlp, evaluate_validation_elbo_dyn
from eval.image_metrics import ImageMetrics
from rundir.prediction import data_config
from rundir.run import Run
from tests.balls import COND, HORIZON, NUM_FRAMES, ROOT, predict, run_in, videos
from tests.runs import run_script
from utils.animation import ground_truth_panel, prediction_panel, side_by_side
from utils.errors import UserError

# ------------------------------------------------------------------------------------------------------ generation


def test_the_animations_are_the_test_episodes_beside_their_predictions(run, balls_data, capsys):
    run_in(run.path, generation.main, "-d", "balls", "-p", run.path, "-n", 2, "-c", COND, "--horizon", HORIZON)
    paths = sorted((run.path / "animations").iterdir())
    assert [path.name for path in paths] == ["e0_traj_anim_0.gif", "e0_traj_anim_1.gif"]
    assert capsys.readouterr().out.split() == [str(path) for path in paths]
    x = videos(balls_data)[0]
    prediction = predict(run, x)[0]
    for i, path in enumerate(paths):
        panels = [ground_truth_panel(x[i, :HORIZON]), prediction_panel(prediction[i], COND)]
        expected = side_by_side(panels).astype(float)
        written = iio.imread(path).astype(float)
        assert written.shape == expected.shape
        assert np.abs(written - expected).mean() < 2  # of 255: the palette's error
        with Image.open(path) as gif:
            assert gif.info["duration"] == 60  # milliseconds, from animation_fps 0.06


def test_minus_one_conditions_on_the_models_window(run, balls_data):
    run_in(run.path, generation.main, "-p", run.path, "-n", 1, "-c", -1)  # T is 3, animation_horizon 6
    written = iio.imread(run.path / "animations" / "e0_traj_anim_0.gif").astype(float)
    x = videos(balls_data)[0][:1]
    panels = [ground_truth_panel(x[0, :6]), prediction_panel(predict(run, x, 6, 3)[0][0], 3)]
    assert np.abs(written - side_by_side(panels)).mean() < 2


def test_mp4(run):
    run_in(run.path, generation.main, "-p", run.path, "-n", 1, "-c", COND, "--horizon", HORIZON, "--format", "mp4")
    (path,) = (run.path / "animations").iterdir()
    assert path.name == "e0_traj_anim_0.mp4" and len(iio.imread(path)) == HORIZON
    assert iio.immeta(path, plugin="FFMPEG")["fps"] == pytest.approx(1 / 0.06, abs=0.01)


def test_samples_differ_by_the_seed_alone(run):
    def frames(*arguments):
        run_in(run.path, generation.main, "-p", run.path, "-n", 1, "-c", COND, "--horizon", HORIZON, *arguments)
        return iio.imread(run.path / "animations" / "e0_traj_anim_0.gif")

    means, one, again = frames(), frames("--sample", "--seed", 1), frames("--sample", "--seed", 1)
    assert np.array_equal(one, again) and not np.array_equal(one, means)
    other = frames("--sample", "--seed", 2)
    assert not np.array_equal(one[COND:], other[COND:])
    assert np.abs(one[:COND].astype(float) - other[:COND]).mean() < 2  # what is seen is no sample


def test_use_train_shows_windows_from_all_over_the_training_set(run, balls_data):
    run_in(run.path, generation.main, "-p", run.path, "-n", 4, "-c", COND, "--horizon", HORIZON, "--use_train")
    x = videos(balls_data, "train")[0]
    windows = [(episode, first) for episode in range(3) for first in range(NUM_FRAMES - HORIZON + 1)]
    # The configuration uses 16 of these 18, from all over them; of those every fourth is shown.
    for i, window in enumerate((0, 4, 9, 13)):
        episode, first = windows[window]
        clip = x[episode, first : first + HORIZON]
        written = iio.imread(run.path / "animations" / f"e0_traj_anim_{i}.gif").astype(float)
        left = side_by_side([ground_truth_panel(clip)])
        assert np.abs(written[:, :, : left.shape[2] - 6] - left[:, :, :-6]).mean() < 2


def test_more_videos_than_there_are_are_all(run):
    run_in(run.path, generation.main, "-p", run.path, "-n", 99, "-c", COND, "--horizon", HORIZON)
    assert len(list((run.path / "animations").iterdir())) == 5


def test_the_functions_of_the_release_animate_the_validation_set(run, balls_data, tmp_path):
    model = run.load_model()
    config = run.config.to_dict()
    torch.manual_seed(0)
    paths = animate_trajectory_ddlp(
        model, config, 4, fig_dir=tmp_path, timestep_horizon=7, num_trajetories=1, prefix="x"
    )
    assert paths == [tmp_path / "xe4_traj_anim_0.gif"]
    x = videos(balls_data, "val")[0][:1]
    panels = [ground_truth_panel(x[0, :7]), prediction_panel(predict(run, x, 7, 3)[0][0], 3)]
    assert np.abs(iio.imread(paths[0]).astype(float) - side_by_side(panels)).mean() < 2


# ---------------------------------------------------------------------------------------------------------- the ELBO


def test_validation_elbo_is_the_mean_over_the_episodes_first_frames(run, balls_data, tmp_path):
    model = run.load_model()
    options = {
        "recon_loss_type": "mse",
        "beta_kl": 0.3,
        "beta_rec": 2.0,
        "beta_dyn": 0.5,
        "beta_dyn_rec": 0.7,
        "kl_balance": 0.01,
    }
    value = evaluate_validation_elbo_dyn(
        model, run.config, 2, batch_size=2, save_image=True, fig_dir=tmp_path, timestep_horizon=3, **options
    )
    x = videos(balls_data, "val")[0][:3, :4]  # val_size 3, T + 1 frames
    with torch.no_grad():
        losses = [
            model.calc_elbo(
                clip[None], model(clip[None], deterministic=True, num_static_frames=2), num_static=2, **options
            )["loss"]
            for clip in x
        ]
    # The correlation maps' norm is the whole batch's, so that it matters a little which clips are together.
    assert value == pytest.approx(torch.stack(losses).mean().item(), rel=2e-3)
    assert (tmp_path / "image_valid_2.jpg").stat().st_size > 0


# ------------------------------------------------------------------------------------------------------- the metrics


def plain_metrics(x, prediction):
    """SSIM and PSNR of every predicted frame, [N, frames]."""
    pairs = prediction[:, COND:].flatten(0, 1).clamp(0, 1), x[:, COND:HORIZON].flatten(0, 1)
    psnr = -10 * torch.log10((pairs[0] - pairs[1]).square().mean((1, 2, 3)) + 1e-8)
    ssim = torch.stack(
        [
            piqa.ssim.ssim(a[None], b[None], piqa.SSIM().kernel.to(a), channel_avg=True)[0]
            for a, b in zip(*pairs, strict=True)
        ]
    )
    return psnr.view(len(x), -1), ssim.view(len(x), -1)


def test_metrics_are_means_over_the_predicted_frames_of_the_test_set(run, balls_data, capsys):
    arguments = ("-d", "balls", "-p", run.path, "-c", COND, "--horizon", HORIZON, "-b", 5)
    run_in(run.path, eval_gen_metrics.main, *arguments, "--metrics", "ssim", "psnr", "position")
    x, positions = videos(balls_data)
    prediction, latents = predict(run, x)
    psnr, ssim = plain_metrics(x, prediction)
    written = json.loads((run.path / "eval" / "last_val_image_metrics.json").read_text())
    assert written["psnr"] == pytest.approx(psnr.mean().item(), rel=1e-4)
    assert written["psnr_std"] == pytest.approx(psnr.std(correction=0).item(), rel=1e-3)
    assert written["ssim"] == pytest.approx(ssim.mean().item(), rel=1e-3)
    over_time = json.loads((run.path / "eval" / "metrics_over_time.json").read_text())
    assert over_time["frame"] == list(range(COND, HORIZON))
    assert over_time["psnr"] == pytest.approx(psnr.mean(0).tolist(), rel=1e-4)

    # The particle of each ball: by enumeration, over the frames that are seen.
    points = ((latents["z_pos"] + 1) / 2 * 31 + 0.5).numpy()
    visible = latents["z_obj_on"].numpy() > 0.5
    errors, tracked = plain_tracking(points, visible, positions[:, :HORIZON], radius=4)
    assert over_time["position_error"] == pytest.approx(errors.mean((0, 2)).tolist(), rel=1e-4)
    assert over_time["tracked"] == pytest.approx(tracked.mean((0, 2)).tolist(), abs=1e-6)
    assert written["position_error"] == pytest.approx(errors.mean(), rel=1e-4)
    output = capsys.readouterr().out
    assert f"position error (pixels): {written['position_error']:.4f}" in output
    assert re.search(rf"^ +{COND} +[\d.]+ +{over_time['psnr'][0]:.4f} ", output, re.MULTILINE)
    image = iio.imread(run.path / "eval" / "metrics_over_time.png")
    assert image.shape == (400, 2500, 3)


def test_predictions_are_measured_beside_two_baselines(run, balls_data, capsys):
    arguments = ("-p", run.path, "-c", COND, "--horizon", HORIZON, "-b", 5, "--metrics", "psnr", "ssim", "position")
    run_in(run.path, eval_gen_metrics.main, *arguments)
    x, positions = videos(balls_data)
    _, latents = predict(run, x)
    written = json.loads((run.path / "eval" / "last_val_image_metrics.json").read_text())
    over_time = json.loads((run.path / "eval" / "metrics_over_time.json").read_text())
    still = x[:, COND - 1 : COND].expand(-1, HORIZON, -1, -1, -1)
    psnr, _ = plain_metrics(x, still)
    assert over_time["psnr_still"] == pytest.approx(psnr.mean(0).tolist(), rel=1e-4)
    z = latents["z_pos"].clone()
    for t in range(COND, HORIZON):
        z[:, t] = z[:, COND - 1] + (t - COND + 1) * (z[:, COND - 1] - z[:, COND - 4]) / 3
    for end, places in (("_still", z[:, [*range(COND), *(HORIZON - COND) * [COND - 1]]]), ("_straight", z)):
        visible = latents["z_obj_on"][:, [*range(COND), *(HORIZON - COND) * [COND - 1]]].numpy() > 0.5
        points = ((places + 1) / 2 * 31 + 0.5).numpy()
        errors, tracked = plain_tracking(points, visible, positions[:, :HORIZON], radius=4)
        assert over_time[f"position_error{end}"] == pytest.approx(errors.mean((0, 2)).tolist(), rel=1e-4)
        assert over_time[f"tracked{end}"] == pytest.approx(tracked.mean((0, 2)).tolist(), abs=1e-6)
    last = {name: latents[name][:, COND - 1] for name in latents}
    drawn = run.load_model().decode_all(
        z[:, COND],
        last["z_features"],
        last["z_bg_features"],
        last["z_obj_on"],
        last["z_depth"],
        z_scale=last["z_scale"],
    )["rec"]
    error = (drawn.detach().clamp(0, 1) - x[:, COND]).square().mean((1, 2, 3))
    assert over_time["psnr_straight"][0] == pytest.approx((-10 * torch.log10(error + 1e-8)).mean().item(), rel=1e-3)
    output = capsys.readouterr().out
    for words, value in (("last frame stays", "psnr_still"), ("particles straight on", "psnr_straight")):
        assert f"{words}: {written[value]:.4f}" in output


def plain_tracking(points, visible, truth, radius):
    from itertools import permutations

    errors, tracked = [], []
    for p, v, t in zip(points, visible, truth, strict=True):
        distance = np.linalg.norm(p[:, :, None] - t[:, None], axis=-1)  # [F, K, n]
        cost = distance[:COND].mean(0)
        hidden = v[:COND].mean(0) < 0.5
        cost[hidden] += 2 * cost.max() + 1
        best = min(
            permutations(range(cost.shape[0]), 3), key=lambda order: sum(cost[k, j] for j, k in enumerate(order))
        )
        error = np.stack([distance[COND:, k, j] for j, k in enumerate(best)], -1)
        errors.append(error)
        tracked.append((error < radius) & v[COND:][:, list(best)])
    return np.stack(errors), np.stack(tracked).astype(float)


def test_the_function_of_the_release_returns_and_writes_the_means(run, balls_data, tmp_path, capsys):
    model = run.load_model()
    values = eval_ddlp_im_metric(
        model, torch.device("cpu"), run.config.to_dict(), HORIZON, "val", tmp_path, COND, ("psnr",), 2, verbose=True
    )
    x = videos(balls_data, "val")[0][:3]
    psnr = plain_metrics(x, predict(run, x)[0])[0]
    assert values["psnr"] == pytest.approx(psnr.mean().item(), rel=1e-3)
    assert json.loads((tmp_path / "last_val_image_metrics.json").read_text()) == values
    assert f"psnr {values['psnr']:.4f}" in capsys.readouterr().out


def test_sampled_predictions_are_measured_as_such(run):
    def psnr(*arguments):
        options = ("-p", run.path, "-c", COND, "--horizon", HORIZON, "--metrics", "psnr", *arguments)
        run_in(run.path, eval_gen_metrics.main, *options)
        return json.loads((run.path / "eval" / "last_val_image_metrics.json").read_text())["psnr"]

    one = psnr("--sample", "--seed", 4)
    assert one == psnr("--sample", "--seed", 4) != psnr("--sample", "--seed", 5)
    assert one != psnr()


def test_of_the_training_set_windows_from_all_over_it_are_measured(run, balls_data, monkeypatch):
    monkeypatch.setattr(eval_gen_metrics, "TRAIN_WINDOWS", 4)
    measured = prediction_videos(run.config.replace(train_size=None), "train", HORIZON)
    over_time = measure_predictions(run.load_model(), measured, ImageMetrics(["psnr"]), HORIZON, COND)
    x = videos(balls_data, "train")[0]
    windows = [(episode, first) for episode in range(3) for first in range(NUM_FRAMES - HORIZON + 1)]
    x = torch.stack([x[e, f : f + HORIZON] for e, f in (windows[0], windows[4], windows[9], windows[13])])
    psnr = plain_metrics(x, predict(run, x)[0])[0]
    assert over_time["psnr"].means() == pytest.approx(psnr.mean(0).tolist(), rel=1e-3)


@pytest.mark.parametrize(("rows", "velocity"), [([5.0], 0), ([0.0, 8.0], 8), ([0.0, 8.0, 9.0, 10.0, 12.0, 15.0], 2)])
def test_particles_go_straight_on_as_in_the_last_three_steps_that_are_seen(rows, velocity):
    seen = len(rows)
    values = torch.tensor([*rows, 99.0, 99.0]).view(1, -1, 1, 1).expand(-1, -1, 4, 2)
    names = ("z_pos", "z_scale", "z_depth", "z_obj_on", "z_features", "z_bg_features")
    model = SimpleNamespace(render=lambda particles: particles.z)
    video = torch.zeros(1, seen + 2, 3, 8, 8)
    drawn, straight = baseline_predictions(model, video, dict.fromkeys(names, values), seen)["_straight"]
    assert straight["z_pos"][0, :, 3, 1].tolist() == [*rows, rows[-1] + velocity, rows[-1] + 2 * velocity]
    assert torch.equal(drawn, straight["z_pos"])
    assert straight["z_scale"][0, :, 3, 1].tolist() == [*rows, rows[-1], rows[-1]]


def test_equal_values_do_not_vary():
    for value in torch.linspace(0.01, 99, 200, dtype=torch.float64):
        sums = OverTime.empty(1, "cpu")
        sums.add(value.expand(1, 7))
        assert sums.mean_and_std()[1] == pytest.approx(0, abs=1e-4)


def test_values_that_are_missing_do_not_count():
    sums = OverTime.empty(3, "cpu")
    sums.add(torch.tensor([[1.0, torch.nan], [2.0, 4.0], [torch.nan, torch.nan]]))
    sums.add(torch.tensor([[5.0], [6.0], [torch.nan]]))
    assert sums.means() == [3.0, 4.0, None]
    mean, std = sums.mean_and_std()
    assert mean == pytest.approx(np.mean([1, 2, 4, 5, 6])) and std == pytest.approx(np.std([1, 2, 4, 5, 6]))


def test_lpips_without_its_weights_says_how_to_go_on(run, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    monkeypatch.setattr("urllib.request.urlopen", lambda *args, **kwargs: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(UserError, match="--metrics"):
        run_in(run.path, eval_gen_metrics.main, "-p", run.path, "-c", COND, "--horizon", HORIZON)


def test_the_data_is_looked_for_before_weights_are_downloaded(run, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_: pytest.fail("a download"))
    with pytest.raises(UserError, match="nowhere"):
        run_in(run.path, eval_gen_metrics.main, "-p", run.path, "-c", COND, "--root", tmp_path / "nowhere")


# ---------------------------------------------------------------------------------- runs, data sets and mistakes


def test_a_released_folder_predicts(run, balls_data, tmp_path):
    """hparams.json with the author's paths and without our keys, beside a file of weights without our mark."""
    folder = tmp_path / "checkpoints" / "ddlp-balls"
    folder.mkdir(parents=True)
    hparams = {name: value for name, value in run.config.to_dict().items() if name not in OURS}
    (folder / "hparams.json").write_text(json.dumps({**hparams, "root": "/mnt/data/author/balls"}))
    weights = torch.load(run.weights_path())
    torch.save({k: v for k, v in weights.items() if "depth_logvar" not in k}, folder / "balls_ddlp.pth")
    arguments = ("-p", folder, "-n", 1, "-c", COND, "--horizon", HORIZON, "--root", balls_data, "--cpu")
    run_in(tmp_path, generation.main, "-d", "balls", *arguments)
    assert (folder / "animations" / "e0_traj_anim_0.gif").is_file()
    assert Run.open(folder).load_model().dyn_module.depth_logvar_from_mean


OURS = (
    "depth_logvar_from_mean",
    "discount_iterations",
    "seed",
    "num_workers",
    "metrics",
    "save_every",
    "train_size",
    "val_size",
)


def test_where_the_data_set_is_looked_for(run, balls_data, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert data_config(run).root == balls_data
    assert data_config(run, root="elsewhere").root == "elsewhere"
    gone = Run(run.path, run.config.replace(root="/gone"), "ddlp")
    assert data_config(gone).root == "./data/balls"  # as in configs/balls.json
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**run.config.to_dict(), "root": "mine", "ds": "balls"}))
    assert data_config(run, str(other)).root == balls_data
    assert data_config(gone, str(other)).root == "mine"
    other.write_text(json.dumps({**run.config.to_dict(), "root": "mine", "ds": "others"}))
    assert (data_config(run, str(other)).ds, data_config(run, str(other)).root) == ("others", "mine")
    assert data_config(run, "balls").image_size == 32  # the model's, whatever configs/balls.json says


def test_which_weights_are_taken(run):
    for suffix in ("", "_best_lpips"):
        shutil.copy(run.weights_path(), run.path / "saves" / f"balls_ddlp_other{suffix}.pth")
    run.weights_path().unlink()
    common = ("-p", run.path, "-n", 1, "-c", COND, "--horizon", HORIZON)
    with pytest.raises(UserError, match=r"no weights; looked for .*balls_ddlp_best_lpips\.pth"):
        run_in(run.path, generation.main, *common)
    run_in(run.path, generation.main, *common, "--prefix", "_other")
    (run.path / "saves" / "balls_ddlp_other_best_lpips.pth").write_text("broken")
    with pytest.raises(UserError, match=r"_other_best_lpips.pth: not a readable checkpoint"):
        run_in(run.path, generation.main, *common, "--prefix", "_other")
    run_in(run.path, generation.main, *common, "--prefix", "_other", "--use_last")
    run_in(run.path, generation.main, *common, "--checkpoint", run.path / "saves" / "balls_ddlp_other.pth")


@pytest.mark.parametrize("main", [generation.main, eval_gen_metrics.main])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-c", 0], "-c/--cond_steps is 0; legal: at least 1, or -1"),
        (["-c", 9, "--horizon", 9], "--horizon is 9 .*legal: above .*9"),
        (["--horizon", 15], "15 frames .*14"),
        (["--root", "nowhere"], "python datasets/balls_preparation.py --out nowhere"),
        (["--checkpoint", "nothing.pth"], "nothing.pth: no such"),
        (["-d", "nonsense"], "nonsense.json: not found"),
        (["--seed", -1], "--seed is -1; legal: from 0"),
    ],
)
def test_mistakes_are_named(main, arguments, message, run):
    metrics = ["--metrics", "psnr"] if main is eval_gen_metrics.main else []
    with pytest.raises(UserError, match=message):
        run_in(run.path, main, "-p", run.path, *arguments, *metrics)


def test_a_run_of_dlpv2_predicts_nothing(run):
    Run(run.path, run.config, "dlp").save_config(run.config)
    with pytest.raises(UserError, match=r"is a run of kind dlp; .* kind ddlp"):
        run_in(run.path, generation.main, "-p", run.path)


def test_positions_need_a_data_set_that_knows_them(run):
    unlabelled = [(torch.rand(HORIZON, 3, 32, 32), *4 * [torch.empty(0)])]
    with pytest.raises(UserError, match="this data set does not know where its objects are"):
        measure_predictions(run.load_model(), unlabelled, ImageMetrics([]), HORIZON, COND, position=True)


def test_the_scripts_start_from_any_folder(tmp_path, monkeypatch, capsys):
    error = "error: missing: no such run directory; legal: a run directory, or its hparams.json\n"
    assert run_script(monkeypatch, tmp_path, "generate_ddlp_video_prediction.py", "-p", "missing") == 2
    assert capsys.readouterr().err == error
    # This one lies in a folder, and has to find the others' code.
    command = [sys.executable, str(ROOT / "eval" / "eval_gen_metrics.py"), "-p", "missing"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr == error
