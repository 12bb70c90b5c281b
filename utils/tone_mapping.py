"""High dynamic range, and the wide colours of BT.2020, to sRGB, for videos of phones and cameras.

The transfer functions are those of Rec. ITU-R BT.2100 (PQ, as in HDR10 and Dolby Vision, and HLG), the colours those of
BT.2020. What is brighter than a third of the white of ordinary things (203 cd/m2 by BT.2408) is compressed, up to 1000
cd/m2, by a curve that goes on from a straight line (Moebius), the same for the three channels so that hues stay.
Standard range in BT.2020's colours, and what does not say that it is something else, is what an ordinary display shows
of it (BT.1886, gamma 2.4): nothing is compressed, what BT.709 has no colour for is clipped. HLG is made for
that, too.
"""

import cv2
import numpy as np

PQ, HLG, WIDE = 16, 18, 14  # numbers of transfer characteristics in ITU-T H.273
TRANSFERS = PQ, HLG

_WHITE, _PEAK = 203, 1000  # cd/m2
_KNEE = 0.3  # of white: what is darker is kept
_LUMINANCE = np.float32([0.2627, 0.6780, 0.0593])  # of BT.2020's red, green and blue
_BT2020_TO_BT709 = np.float32([[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]])


def _light_of_pq(signal):
    """cd/m2 of PQ's signal in 0..1 (BT.2100, table 4)."""
    power = signal ** (32 / 2523)
    return 10000 * (np.maximum(power - 107 / 128, 0) / (2413 / 128 - 2392 / 128 * power)) ** (8192 / 1305)


def _scene_of_hlg(signal):
    """The light of the scene, in 0..1, of HLG's signal in 0..1 (BT.2100, table 5)."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)


# The light of the 256 values of a channel, and the 256 values of light in 0..1.
_SIGNAL = np.arange(256) / 255
_LIGHT = {
    PQ: np.float32(_light_of_pq(_SIGNAL)),
    HLG: np.float32(_scene_of_hlg(_SIGNAL)),
    WIDE: np.float32(_WHITE * _SIGNAL**2.4),
}
_LEVELS = np.arange(4096) / 4095
_SRGB = np.where(_LEVELS <= 0.0031308, 12.92 * _LEVELS, 1.055 * _LEVELS ** (1 / 2.4) - 0.055)
_SRGB = (255 * _SRGB).round().astype(np.uint8)


def to_standard_range(frame, transfer):
    """A frame in BT.2020's colours, uint8 [H, W, 3], as sRGB, uint8 [H, W, 3]. transfer: `PQ`, `HLG`, or `WIDE` for
    standard range."""
    light = _LIGHT[transfer][frame]
    if transfer == HLG:  # on a display of 1000 cd/m2
        light *= _PEAK * (light @ _LUMINANCE)[..., None] ** 0.2
    light = np.clip(cv2.transform(light, _BT2020_TO_BT709), 0, _PEAK) / _WHITE
    if transfer == WIDE:
        light = np.minimum(light, 1)
    else:
        brightest = light.max(axis=-1, keepdims=True)
        light *= _compressed(brightest) / np.maximum(brightest, 1e-9)
    return _SRGB[(4095 * light + 0.5).astype(np.int32)]


def _compressed(light):
    """Light of 0.._PEAK, in units of white, compressed to 0..1."""
    peak, knee = _PEAK / _WHITE, _KNEE
    a = -(knee**2) * (peak - 1) / (knee**2 - 2 * knee + peak)
    b = (knee**2 - 2 * knee * peak + peak) / (peak - 1)
    curve = (b**2 + 2 * b * knee + knee**2) / (b - a) * (light + a) / (light + b)
    return np.where(light <= knee, light, curve)
