"""Display colours for classes without colours: distinguishable for everyone, including people with colour
blindness."""

from __future__ import annotations

Color = tuple[int, int, int]

WHITE, BLACK = (255, 255, 255), (0, 0, 0)
# Sixteen colours per line, six digits each. First come Okabe and Ito's eight, with black first, since class 0 is often
# the background. Each further colour is the one among 12 x 12 x 12 that is farthest in CIELAB from white (for ignored
# pixels) and from all colours before it, in the vision that distinguishes them least: normal, or without red, green or
# blue cones (Machado, Oliveira, Fernandes; IEEE TVCG 2009, severity 1). tests/visualization/test_colors.py reproduces
# them.
_TABLE = bytes.fromhex(
    "000000e69f0056b4e9009e73f0e4420072b2d55e00cc79a78b00ff5d2e0000178b00ff8b5d465de800468b74ff46005d"
    "b9d1b974172e5d46d1a2e8ffa2008bb9a246ff46742e1700d1ffd15d7446a246008bb9d1d117b9002e4674e85dd1d1a2"
    "e8ff00b98bffb917745d00d100d1178b46ff5d2ea28b5d8b8b74d1a2172ea2465da2a25db974b974d1ff46002ee88ba2"
    "4600748bb98b8bd1748bd1d18b8b175d2e745d8b46ffb9460000460000ffb9e8e88b2e46a2748ba246d1d1ff5db92e2e"
    "a2ff745d0046e82eff5d2e46d1e8d18b46a25d0017462e5d1717b97417b9465d74742ee817002e8b2e00e8ffe874d15d"
    "ff74e85da28b8b8bd15d468bff17d1748b5d5d002ea2b9b9172e17a274e87474a274008b8ba2b9a2005dffe8b94600a2"
    "2e0017d1b9a28b1717468b745de88bb98b468be874b95d2e5d2ed1a2b974a2d1e8a25d5d00174600007446b9a2e8742e"
    "e8ffa28b46e88b2eb95d1774d1171774ffff5da2e88b5de85d17a2a2a2d18b5db9b98b8be8d100b9b9e85dd18b465d2e"
    "e88b17e8b9d174005db900a2464617a2e8b9a217748bb9ffd146a22e2e00b9745db9b946ffffb95d00e874ff46b9d146"
    "468be8748bb9d18bb9e8a2b9ffd1b9ff007417005db9e8a2d1178bd146001746ff5d462e2e748b00ffd1ff002ed1e88b"
    "e8748b462e8b001700ffb9e8745d4646175de8b9ff465da246a22e748bff5da246b92e46008b8bd1b95dffe8e8e88b5d"
    "2e74d1a2a2ff8bffe88bffa28b742eb9ff8be8d1741700d1465d8b0000a2742e4600e846d1d1d1a27446461774e8e8ff"
    "008b00e8e82e4674ff7417e8465de87474e800b95db9a274a217d174d1a2a28b74ff005d8b17b9175d17b9742e172ed1"
    "46178b5db9468b2e5d2e002effff74467474742e008bb92e2e7400a2ffb9e8b9745de8e8465dff5de8005d5db9008bd1"
    "7474b900008b2e745d5d0000e85da25dff17e8a28b2e0000d1a2d12e00468b8ba21700175d172e5d2e2eb92e5db9a2a2"
    "742ea274b9e88bff5dd1d15dd1a2ffffe8745d17b9a2a2002e172ea2d12e17468b5d1700d1b9b92e1717741746"
)
_COLORS: tuple[Color, ...] = tuple(zip(_TABLE[::3], _TABLE[1::3], _TABLE[2::3], strict=True))
OKABE_ITO = _COLORS[:8]


def palette(num_labels: int) -> tuple[Color, ...]:
    """`num_labels` display colours, 1 to 255: Okabe and Ito's eight, then each as far as possible from all before it.

    A palette is the beginning of every longer one.

    Raises:
        ValueError: the number is out of range.
    """
    if not 1 <= num_labels <= len(_COLORS):
        raise ValueError(f"`num_labels` must be from 1 to {len(_COLORS)}, got {num_labels}.")
    return _COLORS[:num_labels]


def overlay_name(name: str, color: Color) -> str:
    """The name of a class in an overlay's legend: a class whose colour is black is not tinted in the picture."""
    return f"{name} (not tinted)" if tuple(color) == BLACK else name
