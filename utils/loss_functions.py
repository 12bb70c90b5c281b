"""Loss terms of the evidence lower bound: KL divergences, the Chamfer-KL between two sets of particles, and the two
reconstruction errors (per pixel, and VGG features)."""

import torch
import torch.nn.functional as F
from torch import nn

from utils.legal import check_choice

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_REDUCTIONS = {"sum": torch.sum, "mean": torch.mean, "none": lambda values: values}
_PIXEL_LOSSES = {"mse": F.mse_loss, "l1": F.l1_loss, "bce": F.binary_cross_entropy}
_ACCUMULATE = {  # how an array [B, C, H, W] of squared differences becomes one number per image
    "sum": lambda squares: squares.sum(dim=(1, 2, 3)),
    "mean": lambda squares: squares.mean(dim=(1, 2, 3)),
    "ch_mean": lambda squares: squares.mean(dim=1).sum(dim=(1, 2)),
}


def _choose(table, name, argument):
    """The entry of `table` called `name`; `ValueError` naming the argument and the legal names if there is none."""
    check_choice(argument, name, table)
    return table[name]


def _balance_kl(kl, posterior, prior, balance):
    """KL balancing: (1 - balance) KL(sg(posterior) || prior) + balance KL(posterior || sg(prior)), sg stopping the
    gradient; `balance` 0.5 is the plain KL with its full gradient. `kl` takes the tensors of both, in order."""
    if balance == 0.5:
        return kl(*posterior, *prior)
    stopped_posterior = [tensor.detach() for tensor in posterior]
    stopped_prior = [tensor.detach() for tensor in prior]
    return (1 - balance) * kl(*stopped_posterior, *prior) + balance * kl(*posterior, *stopped_prior)


def _as_tensors(values, like):
    """Numbers become scalar tensors of the dtype and on the device of `like`; tensors stay as they are."""
    return [value if torch.is_tensor(value) else like.new_full((), value) for value in values]


def _gaussian_kl(logvar, mu, mu_o, logvar_o):
    """KL(N(mu, exp(logvar)) || N(mu_o, exp(logvar_o))) of diagonal Gaussians, summed over the last dimension."""
    log_ratio = logvar - logvar_o
    # expm1(r) - r keeps its digits where both variances are nearly equal; exp(r) - 1 - r loses them
    return 0.5 * (torch.expm1(log_ratio) - log_ratio + (mu - mu_o).square() * torch.exp(-logvar_o)).sum(dim=-1)


def calc_kl(logvar, mu, mu_o=0.0, logvar_o=0.0, reduce="sum", balance=0.5):
    """KL(N(mu, exp(logvar)) || N(mu_o, exp(logvar_o))) of diagonal Gaussians, summed over the last dimension.

    logvar, mu: `[..., d]`; mu_o, logvar_o: numbers, or tensors that broadcast against `[..., d]`.
    reduce: "none" returns `[...]`, "sum" its sum, "mean" its mean (both over all that is left, so a scalar).
    balance: 0.5 is the plain KL; otherwise (1 - balance) KL(sg(post) || prior) + balance KL(post || sg(prior)), where
    sg stops the gradient: the value is the same, posterior and prior learn at different rates.
    Raises `UserError` for an unknown `reduce`.
    """
    reduction = _choose(_REDUCTIONS, reduce, "calc_kl: reduce")
    return reduction(_balance_kl(_gaussian_kl, (logvar, mu), _as_tensors((mu_o, logvar_o), mu), balance))


def _beta_kl(alpha, beta, alpha_o, beta_o, eps):
    """KL(Beta(alpha, beta) || Beta(alpha_o, beta_o)), elementwise; see `calc_kl_beta_dist`."""

    def log_beta_function(a, b):
        return torch.lgamma(a + eps) + torch.lgamma(b + eps) - torch.lgamma(a + b + eps)

    def mean_log(a, total):
        return torch.digamma(a + eps) - torch.digamma(total + eps)

    total = alpha + beta
    log_normalisers = log_beta_function(alpha_o, beta_o) - log_beta_function(alpha, beta)
    return log_normalisers + (alpha - alpha_o) * mean_log(alpha, total) + (beta - beta_o) * mean_log(beta, total)


def calc_kl_beta_dist(alpha_post, beta_post, alpha_prior, beta_prior, reduce="none", eps=1e-5, balance=0.5):
    """KL(Beta(alpha_post, beta_post) || Beta(alpha_prior, beta_prior)), elementwise.

    ln B(a0, b0) - ln B(a, b) + (a - a0) (psi(a) - psi(a + b)) + (b - b0) (psi(b) - psi(a + b)), with `eps` added to
    every argument of lgamma and of the digamma function psi. Value and gradient are finite for float32 parameters in
    1e-5..1e6.

    alpha_post, beta_post: positive tensors `[...]`; the prior's: positive tensors that broadcast against them, or
    numbers. reduce: "none" returns `[...]`, "sum" and "mean" a scalar. balance: as in `calc_kl`.
    Raises `UserError` for an unknown `reduce`.
    """
    reduction = _choose(_REDUCTIONS, reduce, "calc_kl_beta_dist: reduce")

    # terms of 1e7 cancel to a KL of 1 where parameters are large: float32 would lose it (MPS has nothing wider)
    dtype = alpha_post.dtype if alpha_post.device.type == "mps" else torch.float64

    def kl(*parameters):
        return _beta_kl(*(parameter.to(dtype) for parameter in parameters), eps).to(alpha_post.dtype)

    prior = _as_tensors((alpha_prior, beta_prior), alpha_post)
    return reduction(_balance_kl(kl, (alpha_post, beta_post), prior, balance))


def calc_reconstruction_loss(x, recon_x, loss_type="mse", reduction="sum"):
    """Error between images and their reconstructions, summed over everything but the batch.

    x, recon_x: `[B, ...]` of equal shape (0..1 for "bce"). loss_type: "mse" (squared error), "l1" (absolute error) or
    "bce" (binary cross-entropy with x as target).
    reduction: "none" returns the sum per image `[B]`, "sum" their sum, "mean" their mean over the batch.
    Raises `ValueError` for an unknown `loss_type` or `reduction`, and where the shapes differ.
    """
    error = _choose(_PIXEL_LOSSES, loss_type, "calc_reconstruction_loss: loss_type")
    reduce = _choose(_REDUCTIONS, reduction, "calc_reconstruction_loss: reduction")
    _check_same_shape("calc_reconstruction_loss", x, recon_x)
    return reduce(error(recon_x, x, reduction="none").flatten(1).sum(dim=1))


def _check_same_shape(caller, first, second):
    """`ValueError` unless both have one shape: broadcasting images against each other is always a mistake."""
    if first.shape != second.shape:
        raise ValueError(f"{caller}: shapes {list(first.shape)} and {list(second.shape)}; legal: equal ones")


class ChamferLossKL(nn.Module):
    """Chamfer distance between two sets of Gaussians, with the KL divergence as the distance of a pair (DDLP, arXiv
    2306.05957, loss of the keypoint positions).

    With P[i, j] = KL(prediction i || target j), or KL(target j || prediction i) with `use_reverse_kl`: the sum over j
    of the smallest P[:, j], plus the sum over i of the smallest P[i, :].
    """

    def __init__(self, use_reverse_kl=False):
        super().__init__()
        self.use_reverse_kl = use_reverse_kl

    def forward(self, mu_preds, logvar_preds, mu_gts, logvar_gts, posterior_mask=None):
        """Return the distance per batch element, `[B]`.

        mu_preds, logvar_preds: `[B, K, d]`; mu_gts, logvar_gts: `[B, M, d]`. posterior_mask: `[B, K]`, 0 where a
        prediction is to be left out: it then matches no target, and adds no term of its own; other values weigh the
        prediction's own term. A batch element without any prediction left has distance 0.
        """
        pairwise = self._pairwise_kl(mu_preds, logvar_preds, mu_gts, logvar_gts)  # [B, K, M]
        per_prediction = pairwise.min(dim=2).values  # [B, K]
        if posterior_mask is None:
            return pairwise.min(dim=1).values.sum(dim=1) + per_prediction.sum(dim=1)
        kept = posterior_mask != 0
        per_target = pairwise.masked_fill(~kept.unsqueeze(2), torch.inf).min(dim=1).values  # [B, M]
        per_target = per_target.masked_fill(~kept.any(dim=1, keepdim=True), 0.0)
        return per_target.sum(dim=1) + (per_prediction * posterior_mask).sum(dim=1)

    def _pairwise_kl(self, mu_preds, logvar_preds, mu_gts, logvar_gts):
        """P[i, j] of the class's docstring, `[B, K, M]`."""
        predictions = logvar_preds.unsqueeze(2), mu_preds.unsqueeze(2)  # [B, K, 1, d]
        targets = logvar_gts.unsqueeze(1), mu_gts.unsqueeze(1)  # [B, 1, M, d]
        (logvar, mu), (logvar_o, mu_o) = (targets, predictions) if self.use_reverse_kl else (predictions, targets)
        return calc_kl(logvar, mu, mu_o, logvar_o, reduce="none")


class VGGDistance(nn.Module):
    """Perceptual distance of images: squared error plus weighted squared differences of VGG-16 features.

    Per image, squared error of the images as they are, plus `vgg_coeff` times the squared differences of the features
    of the ImageNet-normalised images, at every one of `layer_ids`. The network is torchvision's VGG-16, pretrained and
    frozen: gradients reach the images only.

    layer_ids: indices into torchvision's `vgg16().features`, 0..30. A convolution's index means its ReLU's output (the
    ReLU works in place, and overwrites what the convolution computed), so the default is layers 3, 8, 13, 22 and 30;
    a layer named twice counts once.
    accumulate_mode: what becomes of the squared differences of one image or feature map: "sum" adds them up, "mean"
    averages them, "ch_mean" averages over channels and adds up over pixels.
    device: where the network is put. normalize: whether the network sees images normalised by ImageNet's mean and
    standard deviation. use_loss_scale: divide `vgg_coeff` by the number of layers, so that the features' share does not
    grow with it. vgg_coeff: weight of the features against the squared error.

    Raises `UserError` for an illegal argument and for an unreadable weight file, `MissingWeightsError` if the weights
    are neither on disk nor to be downloaded (`utils.pretrained`).
    """

    def __init__(
        self,
        layer_ids=(2, 7, 12, 21, 30),
        accumulate_mode="sum",
        device=torch.device("cpu"),  # noqa: B008 (immutable; the release's signature)
        normalize=True,
        use_loss_scale=False,
        vgg_coeff=0.12151,
    ):
        super().__init__()
        _choose(_ACCUMULATE, accumulate_mode, "VGGDistance: accumulate_mode")
        self.accumulate_mode = accumulate_mode
        from utils.pretrained import load_vgg16_features  # imports torchvision, which takes seconds

        features = load_vgg16_features()
        self.layers = _resolve_layers(layer_ids, features)
        self.features = features[: self.layers[-1] + 1]
        self.coefficient = vgg_coeff / len(self.layers) if use_loss_scale else vgg_coeff
        self.normalize = normalize
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)
        self.to(device)

    def forward(self, I1, I2, reduction="sum", only_image=False):
        """Return the distance of two batches of images `[B, 3, H, W]`, values 0..1.

        reduction: "none" returns the distance per image `[B]`, "sum" their sum, "mean" their mean over the batch.
        only_image: leave the features out. Raises `ValueError` for an unknown `reduction`, where the shapes differ, and
        for images too small for the network's pooling (under 32 pixels with the default layers).
        """
        reduce = _choose(_REDUCTIONS, reduction, "VGGDistance: reduction")
        _check_same_shape("VGGDistance", I1, I2)
        accumulate = _ACCUMULATE[self.accumulate_mode]
        distance = accumulate((I1 - I2).square())
        if not only_image:
            distance = distance + self.coefficient * self._feature_distance(I1, I2)
        return reduce(distance)

    def _feature_distance(self, I1, I2):
        """Accumulated squared feature differences, all layers added up, `[B]`.

        Both batches go through side by side, so that nothing is kept of a layer that is not compared. As the weights
        are frozen, an image that needs no gradient costs no backward pass and no memory for one.
        """
        self._check_size(I1)
        accumulate = _ACCUMULATE[self.accumulate_mode]
        if self.normalize:
            I1, I2 = (I1 - self.mean) / self.std, (I2 - self.mean) / self.std
        distance = 0.0
        for index, layer in enumerate(self.features):
            I1, I2 = layer(I1), layer(I2)
            if index in self.layers:
                difference = I1 - I2  # under autocast in half precision, in which sums would be rough
                distance = distance + accumulate(difference.to(torch.promote_types(I1.dtype, torch.float32)).square())
        return distance

    def _check_size(self, images):
        smallest = 2 ** sum(isinstance(layer, nn.MaxPool2d) for layer in self.features)
        height, width = images.shape[-2:]
        if min(height, width) < smallest:
            raise ValueError(
                f"VGGDistance: images of {height} x {width} pixels for layers {self.layers}; "
                f"legal: at least {smallest} x {smallest}"
            )


def _resolve_layers(layer_ids, features):
    """The indices whose output `layer_ids` mean: a convolution stands for the in-place ReLU that follows it."""
    if not layer_ids or not all(0 <= index < len(features) for index in layer_ids):
        raise ValueError(f"VGGDistance: layer_ids is {layer_ids!r}; legal: one or more of 0 to {len(features) - 1}")
    return sorted({index + 1 if isinstance(features[index], nn.Conv2d) else index for index in layer_ids})
