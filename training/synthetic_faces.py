"""Synthetic faces, drawn with polygons, for the demo and the tests.

`Traits` define an identity, a `Variation` defines one photo of it. Points are complex numbers x + iy in head
units: the origin is the centre of the head, x points right, y down, the crown is at -1i, the chin at +1i.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.random import Generator
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFilter

Colour = tuple[int, int, int]
Points = NDArray[np.complexfloating[Any, Any]]

OVERSAMPLE = 2
NECK_PIVOT = 0.7  # a head tilts about the top of its neck, not about its centre

# Given names for any gender, so that no name contradicts a beard.
NAMES = (
    "Adi", "Imani", "Sky", "Eden", "Ocean", "Bao", "Kim", "Yael", "Güneş", "Sam", "Deniz", "Nima", "Ánh",
    "Jules", "Vanja", "Finley", "René", "Claude", "Mika", "Alex", "Indigo", "Tal", "Ege", "Özgür",
    "Blair", "Lior", "Yuki", "Haru", "Saša", "Devon", "Noël", "Ariel", "Kai", "Wren", "Gaël", "Robin",
    "Cleo", "Morgan", "Amal", "Jaya", "Tomoé", "Emery", "Parker", "Charlie", "Loïs", "Zephyr", "Hikaru",
    "Shay", "Dominique", "Noor", "Azul", "Kamal", "Xiao", "Günay", "Rowan", "Dana", "Nicky", "Andréa",
    "Joël", "Ümit", "Farah", "Quinn", "Chidi", "Maël",
)  # fmt: skip

SKINS = ((242, 210, 190), (232, 190, 162), (222, 172, 136), (188, 132, 94), (140, 92, 62), (86, 54, 40))
HAIRS = (  # the last three are dyed
    (28, 24, 26), (96, 60, 36), (214, 172, 88), (206, 98, 36), (124, 36, 30), (150, 150, 152),
    (236, 234, 230), (36, 128, 144), (220, 96, 152), (112, 72, 168),
)  # fmt: skip
DYED = 3  # of HAIRS
IRISES = ((72, 44, 26), (112, 72, 36), (92, 116, 58), (62, 112, 164), (110, 130, 142), (46, 92, 88))
FRAMES = ((26, 26, 30), (178, 40, 40), (44, 66, 176), (190, 140, 44), (214, 214, 220), (40, 120, 70))
OCCLUDED = 0.06  # share of the photos in which something hides a part of the face
COVERS_EARS = ("long", "bob")
SHADE: Colour = (66, 26, 30)
WHITE: Colour = (248, 246, 242)
BLACK: Colour = (18, 14, 16)
BLUSH: Colour = (214, 70, 70)
GLASS: Colour = (210, 230, 240)


def within(low: float, high: float) -> Any:
    """A dataclass field with a value that `sample` draws uniformly from [low, high)."""
    return field(metadata={"range": (low, high)})


@dataclass(frozen=True)
class Shape:
    """The geometry of a head, in head units."""

    width: float = within(0.64, 0.86)
    jaw: float = within(1.7, 3.2)  # exponent of the lower superellipse: 1.8 is pointed, 3 is square
    taper: float = within(0.06, 0.32)
    eye_x: float = within(0.27, 0.37)
    eye_y: float = within(-0.04, 0.08)
    eye_width: float = within(0.125, 0.19)
    eye_height: float = within(0.065, 0.13)
    eye_tilt: float = within(-0.18, 0.18)
    brow_gap: float = within(0.15, 0.22)
    brow_thickness: float = within(0.025, 0.1)
    brow_arch: float = within(-0.02, 0.1)
    brow_tilt: float = within(-0.15, 0.2)
    nose_length: float = within(0.27, 0.42)
    nose_width: float = within(0.09, 0.21)
    mouth_gap: float = within(0.17, 0.25)
    mouth_width: float = within(0.2, 0.34)
    lip: float = within(0.03, 0.1)
    ear: float = within(0.13, 0.22)
    part: float = within(-0.5, 0.5)
    lines: float = within(-1.5, 1.0)  # wrinkles, where positive

    @property
    def nose_y(self) -> float:
        return self.eye_y + self.nose_length

    @property
    def mouth_y(self) -> float:
        return self.nose_y + self.mouth_gap


@dataclass(frozen=True)
class Cut:
    """A hair style: the outline of the hair on the skull, and the hair behind the head."""

    line: float  # y of the hairline above the nose
    side: float  # y at which the hair ends beside the face
    volume: float
    ripple: float = 0.0
    ripples: int = 0
    parted: float = 0.0
    power: int = 4  # how long the hairline stays level before it drops to the side
    behind: str = ""


CUTS: dict[str, Cut | None] = {
    "bald": None,
    "buzz": Cut(-0.62, 0.0, 0.03),
    "short": Cut(-0.6, 0.08, 0.12, parted=0.25),
    "receding": Cut(-0.86, 0.1, 0.04, power=2),
    "quiff": Cut(-0.62, -0.05, 0.32, 0.03, 5),
    "spiky": Cut(-0.58, 0.0, 0.16, 0.09, 11),
    "fringe": Cut(-0.3, 0.25, 0.12, power=8, behind="bob"),
    "bob": Cut(-0.64, 0.3, 0.15, parted=0.3, behind="bob"),
    "long": Cut(-0.74, 0.5, 0.14, parted=0.2, behind="long"),
    "long fringe": Cut(-0.32, 0.4, 0.13, power=8, behind="long"),
    "curly": Cut(-0.56, 0.12, 0.26, 0.06, 13, behind="curls"),
    "bun": Cut(-0.68, 0.1, 0.07, behind="bun"),
}


@dataclass(frozen=True)
class Traits:
    """The properties that all photos of an identity share."""

    shape: Shape
    skin: Colour
    hair: Colour
    iris: Colour
    lips: Colour
    cut: Cut | None
    beard: int  # opacity, 0 for none
    moustache: bool
    freckles: Points
    mole: Points
    glasses: float  # exponent of the rims: 2 is round, 5 is square, 0 for none
    frame: Colour


@dataclass(frozen=True)
class Camera:
    """Pose and framing: x, y and scale are fractions of the picture, roll is in radians."""

    yaw: float = within(-0.22, 0.22)
    pitch: float = within(-0.1, 0.1)
    roll: float = within(-0.13, 0.13)
    x: float = within(0.46, 0.54)
    y: float = within(0.46, 0.54)
    scale: float = within(0.31, 0.37)


@dataclass(frozen=True)
class Mood:
    smile: float = within(-0.5, 1.0)
    open: float = within(-1.2, 1.0)  # negative: the mouth is shut
    brows: float = within(-0.03, 0.06)
    lids: float = within(0.4, 1.1)
    gaze: float = within(-0.35, 0.35)


@dataclass(frozen=True)
class Light:
    brightness: float = within(0.84, 1.1)
    side: float = within(-0.25, 0.25)
    top: float = within(-0.15, 0.15)
    warmth: float = within(-0.07, 0.07)
    haze: float = within(-8.0, 12.0)  # levels, added to black
    blur: float = within(0.0, 0.9)  # pixels of a picture 160 wide
    noise: float = within(1.0, 6.0)  # levels


@dataclass(frozen=True)
class Variation:
    """The properties that differ between the photos of an identity."""

    camera: Camera
    mood: Mood
    light: Light
    clothes: Colour
    accent: Colour
    bare_eyed: bool  # glasses taken off
    occlusion: str
    hand: int  # -1 or 1: the side an occlusion comes from


Sampled = TypeVar("Sampled", Shape, Camera, Mood, Light)


def sample(kind: type[Sampled], rng: Generator) -> Sampled:
    return kind(**{f.name: float(rng.uniform(*f.metadata["range"])) for f in fields(kind)})


def mix(a: Colour, b: Colour, share: float) -> Colour:
    red, green, blue = (round(p + (q - p) * share) for p, q in zip(a, b, strict=True))
    return red, green, blue


def pick(palette: tuple[Colour, ...], rng: Generator) -> Colour:
    return palette[int(rng.integers(len(palette)))]


def any_colour(rng: Generator) -> Colour:
    r, g, b = (int(level) for level in rng.integers(30, 240, 3))
    grey = (r + g + b) // 3
    return mix((r, g, b), (grey, grey, grey), float(rng.uniform(0.2, 0.8)))


def deal(cards: int, turn: int, *, deck: int, seed: int) -> int:
    """Returns the card of a turn, from 0 to `cards` - 1: one shuffled deck, dealt over and over.

    Independent draws would give two of a dozen people the same hair more often than not.
    """
    # No other random numbers are seeded with a fourth number.
    order = np.random.default_rng([seed, 0, 0, deck]).permutation(cards)
    return int(order[turn % cards])


def wall(rng: Generator) -> Colour:
    """Returns a colour that is duller than a person's."""
    return mix(any_colour(rng), (128, 128, 128), 0.4)


def draw_traits(seed: int, identity: int) -> Traits:
    """Draws an identity; no two of the first 120 have both the same cut and the same colour of hair."""
    rng = np.random.default_rng([seed, identity])
    shape = sample(Shape, rng)
    tones = len(SKINS) - 1
    tone = deal(tones, identity + identity // tones, deck=1, seed=seed)
    skin = mix(SKINS[tone], SKINS[tone + 1], float(rng.uniform(0.2, 0.8)))
    cut = list(CUTS.values())[deal(len(CUTS), identity, deck=2, seed=seed)]
    pairs = math.lcm(len(CUTS), len(HAIRS))
    colour = deal(len(HAIRS), identity + identity // pairs, deck=3, seed=seed)
    frames = 2 * len(FRAMES)  # every other person wears glasses
    frame = deal(frames, identity + identity // frames, deck=4, seed=seed)
    mole = rng.uniform(0.24, 0.46) * rng.choice([-1, 1]) + 1j * rng.uniform(0.2, 0.75)
    beard_odds = 0.15 if cut and cut.behind else 0.5
    bearded = rng.random() < beard_odds and colour < len(HAIRS) - DYED
    spots = rng.uniform(-0.42, 0.42, 26) + 1j * rng.uniform(0.08, 0.38, 26)
    return Traits(
        shape=shape,
        skin=skin,
        hair=HAIRS[colour],
        iris=pick(IRISES, rng),
        lips=mix(skin, (176, 44, 62), float(rng.uniform(0.2, 0.9))),
        cut=cut,
        beard=int(rng.choice([90, 245])) if bearded else 0,
        moustache=bool(bearded and rng.random() < 0.6),
        freckles=spots if rng.random() < 0.25 else spots[:0],
        mole=np.array([mole] if rng.random() < 0.35 else []),
        glasses=float(rng.choice([2.0, 5.0])) if frame < len(FRAMES) else 0.0,
        frame=FRAMES[frame % len(FRAMES)],
    )


def draw_variation(rng: Generator) -> Variation:
    return Variation(
        camera=sample(Camera, rng),
        mood=sample(Mood, rng),
        light=sample(Light, rng),
        clothes=any_colour(rng),
        accent=any_colour(rng),
        bare_eyed=bool(rng.random() < 0.05),
        occlusion=str(rng.choice(list(OCCLUSIONS))) if rng.random() < OCCLUDED else "",
        hand=int(rng.choice([-1, 1])),
    )


@cache
def unit_oval(power: float) -> Points:
    t = np.linspace(0, 2 * np.pi, 28, endpoint=False)
    c, s, bend = np.cos(t), np.sin(t), 2 / power
    unit: Points = np.sign(c) * np.abs(c) ** bend + 1j * np.sign(s) * np.abs(s) ** bend
    return unit


def oval(middle: complex, rx: float, ry: float, power: float = 2.0) -> Points:
    """Returns a superellipse: power 2 is an ellipse, larger powers approach a rectangle."""
    unit = unit_oval(power)
    return middle + rx * unit.real + 1j * ry * unit.imag


def head(shape: Shape) -> Points:
    """Returns the outline of the face, clockwise from the crown."""
    t = np.linspace(0, 2 * np.pi, 56, endpoint=False)
    bend = np.where(np.cos(t) > 0, 1.0, 2 / shape.jaw)
    x = np.sign(np.sin(t)) * np.abs(np.sin(t)) ** bend
    y = -np.sign(np.cos(t)) * np.abs(np.cos(t)) ** bend
    outline: Points = x * shape.width * (1 - shape.taper * np.maximum(y, 0)) + 1j * y
    return outline


class Pen:
    """Fills shapes that are given in head units, as one camera projects them."""

    def __init__(self, canvas: Image.Image, camera: Camera, width: float) -> None:
        self.draw = ImageDraw.Draw(canvas, "RGBA")
        self.width, self.pixels = width, canvas.width
        self.gaze = complex(camera.yaw, camera.pitch)
        self.turn = camera.scale * canvas.width * np.exp(1j * camera.roll)
        self.pivot = canvas.width * complex(camera.x, camera.y + NECK_PIVOT * camera.scale)

    def fill(self, points: Points, colour: Colour, alpha: int = 255, lift: float = 0.0) -> None:
        """Fills a polygon; `lift` is its distance from the face."""
        # The face is a dome: its centre moves most when the head turns, its outline does not move.
        dome = np.maximum(1 - (points.real / self.width) ** 2 - points.imag**2, 0) + lift
        placed = (points + dome * self.gaze - 1j * NECK_PIVOT) * self.turn + self.pivot
        self.draw.polygon(placed.view(np.float64).tolist(), fill=(*colour, alpha))

    def stroke(
        self, points: Points, width: ArrayLike, colour: Colour, alpha: int = 255, lift: float = 0.0
    ) -> None:
        """Draws a line along the points; `width` is one number, or one per point."""
        along = np.gradient(points)
        half = 0.5j * np.asarray(width) * along / np.maximum(np.abs(along), 1e-9)
        self.fill(np.concatenate([points + half, (points - half)[::-1]]), colour, alpha, lift)


def skull_arc(traits: Traits, cut: Cut, reach: float) -> Points:
    """Returns the outer edge of the hair, from the left side over the crown to the right side."""
    t = np.linspace(-reach, reach, 61)
    # Hair is highest on the side away from the parting.
    lean = cut.volume * (1 - traits.shape.part * np.sin(t)) * np.cos(t / 2) ** (2 if cut.behind else 5)
    r = 1 + lean + cut.ripple * np.abs(np.sin(t * cut.ripples / 2))
    # Below the ears the hair hangs straight down.
    arc: Points = (traits.shape.width + 0.03) * r * np.sin(np.clip(t, -1.5, 1.5)) - 1j * r * np.cos(t)
    return arc


def draw_hair_behind(pen: Pen, traits: Traits, cut: Cut) -> None:
    w, dark = traits.shape.width, mix(traits.hair, BLACK, 0.2)
    if cut.behind == "bun":
        pen.fill(oval(-1.16j, 0.32, 0.28), traits.hair, lift=-0.4)
        pen.stroke(np.linspace(-0.2, 0.2, 9) - 1.2j, 0.03, dark, lift=-0.4)
    elif cut.behind == "curls":
        for t in np.linspace(-2.1, 2.1, 15):
            middle = (w + 0.12) * np.sin(t) - 1j * (0.1 + 0.95 * np.cos(t))
            pen.fill(oval(middle, 0.24, 0.24), dark, lift=-0.2)
    elif cut.behind:
        end, flare = (1.5, 0.2) if cut.behind == "long" else (0.85, 0.14)
        right = np.array([1, 1, 0.9, 0.7, 0.4]) * (w + flare) + 1j * end * np.array([0.5, 0.85, 0.97, 1, 1])
        pen.fill(np.concatenate([skull_arc(traits, cut, 1.6), right, -right[::-1].conj()]), dark, lift=-0.2)


def draw_hair(pen: Pen, traits: Traits, cut: Cut) -> None:
    s = traits.shape
    arc = skull_arc(traits, cut, float(np.arccos(-cut.side)))
    x = np.linspace(-0.9, 0.9, len(arc)) * s.width
    drop = np.abs(x / x[0]) ** cut.power
    y = cut.line + (cut.side - cut.line) * drop + cut.parted * np.abs(x - s.part * 0.6) * (1 - drop)
    hairline = x + 1j * y
    pen.fill(np.concatenate([arc, hairline[::-1]]), traits.hair)
    (draw_curls if cut.behind == "curls" else draw_strands)(pen, traits, arc, hairline)


def draw_curls(pen: Pen, traits: Traits, arc: Points, hairline: Points) -> None:
    for row, share in enumerate((0.05, 0.45, 0.85)):
        for i, middle in enumerate((arc + share * (hairline - arc))[2 + 2 * (row % 2) : -2 : 5]):
            tone = mix(traits.hair, WHITE, 0.04 + 0.07 * ((i * 2 + row) % 3))
            pen.fill(oval(middle, 0.14, 0.14), tone)


def draw_strands(pen: Pen, traits: Traits, arc: Points, hairline: Points) -> None:
    """Draws combed hair: lines that fan out from the parting to the hairline."""
    t = np.linspace(0, 1, 9)
    root = traits.shape.part * 0.5 + 0.95j * arc.imag.min()
    for i, end in enumerate(hairline[2:-2:5]):
        bend = 1.15 * end.real + 1j * ((root.imag + end.imag) / 2 - 0.15)
        strand = (1 - t) ** 2 * root + 2 * t * (1 - t) * bend + t**2 * end
        pen.stroke(strand, 0.035 * np.sin(np.pi * t), mix(traits.hair, WHITE if i % 2 else BLACK, 0.22), 120)


def draw_body(pen: Pen, traits: Traits, variation: Variation) -> None:
    w = traits.shape.width * 0.55
    neck = np.array([0.4j - w, 0.4j + w, 1.5j + w * 1.15, 1.5j - w * 1.15])
    pen.fill(neck, mix(traits.skin, SHADE, 0.28))
    x = np.linspace(-2.2, 2.2, 41)
    dip = np.maximum(0.22 * (1 - (x / w / 1.3) ** 2), 0)
    shoulders = x + 1j * (1.16 + 0.5 * np.abs(x / 2) ** 2.2 + dip)
    pen.fill(np.concatenate([shoulders, [4j + 2.2, 4j - 2.2]]), variation.clothes)
    collar = shoulders[np.abs(x) < w * 1.4]
    pen.stroke(collar, 0.07, mix(variation.clothes, variation.accent, 0.5))


def draw_ears(pen: Pen, traits: Traits) -> None:
    s = traits.shape
    for side in (-1, 1):
        middle = side * (s.width + 0.02) + 1j * (s.eye_y + 0.12)
        pen.fill(oval(middle, s.ear * 0.6, s.ear), mix(traits.skin, SHADE, 0.15), lift=-0.25)
        pen.fill(oval(middle, s.ear * 0.33, s.ear * 0.62), mix(traits.skin, SHADE, 0.3), lift=-0.25)


def draw_skull(pen: Pen, traits: Traits, light: Light) -> None:
    outline = head(traits.shape)
    pen.fill(outline, mix(traits.skin, SHADE, 0.3))
    # Nested outlines, shifted towards the light, shade the cheeks.
    for step in range(1, 7):
        pen.fill(outline * (1 - 0.026 * step) + step * (0.03 * light.side - 0.008j), traits.skin, 70)
    for side in (-1, 1):
        for size in (0.17, 0.12):
            pen.fill(oval(side * 0.42 + 1j * traits.shape.nose_y, size, size * 0.8), BLUSH, 20)


def draw_marks(pen: Pen, traits: Traits) -> None:
    s, ink = traits.shape, mix(traits.skin, SHADE, 0.55)
    for spot in traits.freckles:
        pen.fill(oval(spot, 0.016, 0.016), ink, 150)
    for spot in traits.mole:
        pen.fill(oval(spot, 0.032, 0.03), mix(SHADE, BLACK, 0.4))
    x, t = np.linspace(-0.3, 0.3, 9), np.linspace(0, 1, 9)
    wrinkles = [x - 1j * (y + 0.3 * x**2) for y in (0.42, 0.52)]
    for side in (-1, 1):
        fold = side * (s.nose_width + 0.04 + 0.14 * t) + 1j * (s.nose_y - 0.03 + (s.mouth_gap + 0.02) * t)
        wrinkles.append(fold)
    for wrinkle in wrinkles:
        pen.stroke(wrinkle, 0.025 * np.sin(np.pi * t), ink, round(120 * max(s.lines, 0.0)))


def draw_eye(pen: Pen, traits: Traits, mood: Mood, side: int) -> None:
    s = traits.shape
    across = np.linspace(-1, 1, 15)
    corner = side * (s.eye_x + s.eye_width * across) + 1j * (s.eye_y - s.eye_tilt * s.eye_width * across)
    upper = corner - 1j * s.eye_height * mood.lids * (1 - across**2)
    lower = corner + 0.55j * s.eye_height * (1 - across**2)
    pen.fill(np.concatenate([upper, lower[::-1]]), WHITE)
    middle = side * s.eye_x + mood.gaze * s.eye_width + 1j * (s.eye_y - 0.1 * s.eye_height)
    for radius, colour in ((0.86, traits.iris), (0.43, BLACK)):
        disc = oval(middle, radius * s.eye_height, radius * s.eye_height)
        low, high = (np.interp(disc.real, edge.real[::side], edge.imag[::side]) for edge in (upper, lower))
        pen.fill(disc.real + 1j * np.clip(disc.imag, low, high), colour)
    if mood.lids > 0.6:
        pen.fill(oval(middle + 0.02 - 0.2j * s.eye_height, 0.016, 0.016), WHITE)
    pen.stroke(upper, 0.034 * (1.25 - across**2), mix(traits.hair, BLACK, 0.8))
    pen.stroke(lower, 0.012, SHADE, 120)
    pen.stroke(upper - 0.045j, 0.014 * (1.2 - across**2), SHADE, 110)


def draw_brow(pen: Pen, traits: Traits, mood: Mood, side: int) -> None:
    s = traits.shape
    t = np.linspace(-1, 1, 13)
    y = s.eye_y - s.brow_gap - mood.brows - s.brow_arch * (1 - t**2) - 0.2 * s.brow_tilt * t
    brow = side * (s.eye_x + 0.02 + (s.eye_width + 0.05) * t) + 1j * y
    pen.stroke(brow, s.brow_thickness * (0.85 - 0.3 * t - 0.35 * t**4), mix(traits.hair, BLACK, 0.35), 225)


def draw_nose(pen: Pen, traits: Traits, light: Light) -> None:
    s, shadow = traits.shape, mix(traits.skin, SHADE, 0.42)
    tip, t = 1j * s.nose_y, np.linspace(0, 1, 12)
    bridge = 0.07 + (s.nose_width * 0.75 - 0.07) * t**2
    line = (bridge if light.side < 0 else -bridge) + 1j * (s.eye_y - 0.05 + s.nose_length * t)
    pen.stroke(line, 0.05 * np.sin(np.pi * (0.15 + 0.85 * t)), shadow, 120, lift=0.15)
    pen.fill(oval(tip - 0.02j, s.nose_width, s.nose_width * 0.55), shadow, 70, lift=0.2)
    pen.fill(oval(tip - 0.04j, s.nose_width * 0.75, s.nose_width * 0.5), traits.skin, 200, lift=0.25)
    for side in (-1, 1):
        nostril = oval(side * s.nose_width * 0.5 + tip + 0.015j, s.nose_width * 0.22, 0.022)
        pen.fill(nostril, mix(traits.skin, SHADE, 0.85), 230, lift=0.22)
    pen.fill(oval(tip - 0.08j, 0.03, 0.025), WHITE, 60, lift=0.25)


def draw_mouth(pen: Pen, traits: Traits, mood: Mood) -> None:
    s = traits.shape
    t = np.linspace(-1, 1, 21)
    bulge = 1 - t**2
    seam = (s.mouth_width + 0.05 * mood.smile) * t + 1j * (s.mouth_y - 0.09 * mood.smile * (t**2 - 0.4))
    gap = 0.13j * max(mood.open, 0.0) * bulge
    top = seam - 0.8j * s.lip * (bulge - 0.35 * np.exp(-((t / 0.16) ** 2)))
    bottom = seam + gap + 1.15j * s.lip * bulge
    teeth = seam + 1j * np.minimum(gap.imag, 0.05 * bulge)
    pen.fill(np.concatenate([top, bottom[::-1]]), traits.lips)
    pen.fill(np.concatenate([seam, (seam + gap)[::-1]]), (70, 18, 24))
    pen.fill(np.concatenate([seam, teeth[::-1]]), WHITE)
    pen.stroke(seam, 0.022, mix(traits.lips, SHADE, 0.75))
    pen.stroke((bottom + 0.05j)[5:-5], 0.022 * bulge[5:-5], SHADE, 70)


def draw_beard(pen: Pen, traits: Traits) -> None:
    s = traits.shape
    outline = head(s) * 1.03
    jaw = outline[outline.imag > s.eye_y + 0.22]
    x = np.linspace(jaw[-1].real, jaw[0].real, 31)
    under_lip = s.lip * (np.abs(x) < s.mouth_width) * 0.8
    upper = s.mouth_y + 0.06 - 0.5 * (np.abs(x) / s.width) ** 4 + under_lip
    beard = np.concatenate([jaw, x + 1j * np.minimum(upper, 0.9)])
    pen.fill(beard, mix(traits.hair, BLACK, 0.12), traits.beard)


def draw_moustache(pen: Pen, traits: Traits, mood: Mood) -> None:
    s, t = traits.shape, np.linspace(-1, 1, 17)
    y = s.mouth_y - 0.085 - 0.06 * mood.smile * (t**2 - 0.3) + 0.05 * t**2
    thickness = 0.1 * (1.05 - t**2) * (1 - 0.4 * np.exp(-((t / 0.12) ** 2)))
    hair = mix(traits.hair, BLACK, 0.12)
    pen.stroke((s.mouth_width + 0.06) * t + 1j * y, thickness, hair, max(traits.beard, 200))


def draw_glasses(pen: Pen, traits: Traits, glass: Colour, alpha: int) -> None:
    s, ink = traits.shape, traits.frame
    r = min(s.eye_x - 0.045, 0.26)
    for side in (-1, 1):
        rim = oval(side * (s.eye_x + 0.01) + 1j * (s.eye_y + 0.02), r, r * 0.82, traits.glasses or 2.6)
        pen.fill(rim, glass, alpha, lift=0.15)
        pen.stroke(np.concatenate([rim, rim[:2]]), 0.055, ink, lift=0.15)
        pen.stroke(side * np.linspace(s.eye_x + r, s.width + 0.02, 4) + 1j * s.eye_y, 0.04, ink)
    x = np.linspace(r - s.eye_x, s.eye_x - r, 7)
    pen.stroke(x + 1j * (s.eye_y - 0.02 + 4 * x**2), 0.04, ink, lift=0.15)


def draw_sunglasses(pen: Pen, traits: Traits, variation: Variation) -> None:
    draw_glasses(pen, replace(traits, frame=BLACK), BLACK, 235)


def draw_scarf(pen: Pen, traits: Traits, variation: Variation) -> None:
    w, top = traits.shape.width, traits.shape.nose_y + 0.1
    fold = mix(variation.accent, variation.clothes, 0.6)
    pen.fill(oval(variation.hand * 0.35 + 1.7j, 0.24, 0.7, 5.0), fold)
    for drop, reach, tone in ((0.68, 1.12, fold), (0.42, 1.0, variation.accent)):
        pen.fill(oval(1j * (top + drop), (w + 0.14) * reach, 0.42, 3.2), tone)
    x = np.linspace(-w, w, 17)
    for drop in (0.2, 0.42, 0.62):
        y = top + drop + 0.07 * np.sin(3 * x + 9 * drop)
        pen.stroke(x + 1j * y, 0.04 * np.cos(x / w * 1.5), fold)


def draw_hand(pen: Pen, traits: Traits, variation: Variation) -> None:
    side, t = variation.hand, np.linspace(0, 1, 10)
    pen.stroke(side * (0.75 + 0.4 * t) + 1j * (0.9 + 1.5 * t), 0.5, traits.skin)
    pen.fill(oval(side * 0.68 + 0.78j, 0.36, 0.36), traits.skin)
    for finger in range(4):
        root = side * (0.88 - 0.19 * finger) + 1j * (0.66 - 0.03 * finger)
        tip = root - side * (0.06 + 0.07 * finger) + 1j * (0.07 * abs(finger - 1) - 0.52)
        pen.stroke(root + (tip - root) * t, 0.19, mix(traits.skin, SHADE, 0.4))
        pen.stroke(root + (tip - root) * t, 0.165, traits.skin)
        pen.fill(oval(tip, 0.085, 0.085), traits.skin)


def draw_hat(pen: Pen, traits: Traits, variation: Variation) -> None:
    w = traits.shape.width + 0.14
    t = np.linspace(-np.pi / 2, np.pi / 2, 31)
    pen.fill(w * np.sin(t) - 1j * (0.42 + 0.93 * np.cos(t)), variation.accent)
    band = (w + 0.03) * np.sin(t) - 1j * (0.48 - 0.12 * np.cos(t) ** 2)
    pen.stroke(band, 0.26, mix(variation.accent, variation.clothes, 0.6))
    pen.fill(oval(-1.38j, 0.17, 0.17), mix(variation.accent, WHITE, 0.4))


def draw_lock(pen: Pen, traits: Traits, variation: Variation) -> None:
    if traits.cut is None:
        return
    t = np.linspace(0, 1, 16)
    for offset in (0.0, 0.14, 0.28):
        line = variation.hand * (0.02 + offset + 0.5 * t**1.5) + 1j * (1.3 * t - 0.85)
        pen.stroke(line, 0.2 * (1.02 - t**2), mix(traits.hair, WHITE, offset / 2))


def draw_bar(pen: Pen, traits: Traits, variation: Variation) -> None:
    """Draws an object out of focus at the edge of the frame, such as a door post."""
    n, depth = pen.pixels, pen.pixels * (0.16 + 0.1 * abs(variation.mood.gaze))
    box = (0, 0, depth, n) if variation.hand < 0 else (n - depth, 0, n, n)
    pen.draw.rectangle(box, fill=(*variation.accent, 255))


OCCLUSIONS: dict[str, Callable[[Pen, Traits, Variation], None]] = {
    "sunglasses": draw_sunglasses,
    "scarf": draw_scarf,
    "hand": draw_hand,
    "hat": draw_hat,
    "lock": draw_lock,
    "bar": draw_bar,
}


def draw_background(rng: Generator, pixels: int) -> Image.Image:
    """Draws a wall or a room out of focus: a tiny picture, enlarged, which blurs it at no cost."""
    first, second = np.array(wall(rng)), np.array(wall(rng))
    ramp = np.add.outer(np.linspace(-1, 1, 24) * rng.normal(), np.linspace(-1, 1, 24) * rng.normal())
    share = 1 / (1 + np.exp(-2 * ramp))[..., None]
    tiny = Image.fromarray((first * (1 - share) + second * share).astype(np.uint8))
    pen = ImageDraw.Draw(tiny, "RGBA")
    for _ in range(int(rng.integers(0, 7))):
        x, y, w, h = rng.uniform((-4, -4, 3, 3), (22, 22, 14, 16))
        shape = pen.ellipse if rng.random() < 0.4 else pen.rectangle
        shape((x, y, x + w, y + h), fill=(*wall(rng), 170))
    return tiny.filter(ImageFilter.BoxBlur(1)).resize((pixels, pixels), Image.Resampling.BICUBIC)


def draw_head(pen: Pen, traits: Traits, variation: Variation) -> None:
    mood, light = variation.mood, variation.light
    if not (traits.cut and traits.cut.behind in COVERS_EARS):
        draw_ears(pen, traits)
    draw_skull(pen, traits, light)
    draw_marks(pen, traits)
    if traits.beard:
        draw_beard(pen, traits)
    if traits.moustache:
        draw_moustache(pen, traits, mood)
    draw_mouth(pen, traits, mood)
    draw_nose(pen, traits, light)
    for side in (-1, 1):
        draw_eye(pen, traits, mood, side)
        draw_brow(pen, traits, mood, side)


def draw_person(canvas: Image.Image, traits: Traits, variation: Variation) -> None:
    """Draws from back to front."""
    pen = Pen(canvas, variation.camera, traits.shape.width)
    upright = replace(variation.camera, yaw=0.0, pitch=0.0, roll=0.0)
    if traits.cut:
        draw_hair_behind(pen, traits, traits.cut)
    draw_body(Pen(canvas, upright, traits.shape.width), traits, variation)
    draw_head(pen, traits, variation)
    if traits.cut:
        draw_hair(pen, traits, traits.cut)
    if traits.glasses and not variation.bare_eyed and variation.occlusion != "sunglasses":
        draw_glasses(pen, traits, GLASS, 40)
    if variation.occlusion:
        OCCLUSIONS[variation.occlusion](pen, traits, variation)


def develop(image: Image.Image, light: Light, rng: Generator) -> Image.Image:
    """Applies light, lens and sensor to a clean picture: blur, shading and noise."""
    n = image.width
    image = image.filter(ImageFilter.GaussianBlur(light.blur * n / 160))
    at = np.linspace(-1, 1, n, dtype=np.float32)
    shade = light.brightness * (1 + light.side * at[None, :] + light.top * at[:, None])
    balance = np.array([1 + light.warmth, 1, 1 - light.warmth], np.float32)
    levels = np.asarray(image, np.float32) * (shade[..., None] * balance) + np.float32(light.haze)
    levels += rng.standard_normal(levels.shape, np.float32) * np.float32(light.noise)
    return Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8))


def draw_face(identity: int, photo: int, *, size: int = 160, seed: int = 0) -> Image.Image:
    """Draws one photo of an invented person: RGB, uint8, `size` x `size` pixels.

    A pure function of its arguments: the same arguments give the same pixels, in any order of calls.
    `identity` determines the person; `photo` determines pose, light, mood and everything else.
    """
    traits = draw_traits(seed, identity)
    # numpy pads a seed with zeros, so photo 0 would otherwise repeat the identity's own random numbers.
    rng = np.random.default_rng([seed, identity, photo + 1])
    variation = draw_variation(rng)
    canvas = draw_background(rng, size * OVERSAMPLE)
    draw_person(canvas, traits, variation)
    return develop(canvas.resize((size, size), Image.Resampling.LANCZOS), variation.light, rng)


def name_of(identity: int) -> str:
    lap, index = divmod(identity, len(NAMES))
    return f"{NAMES[index]}_{lap + 1}" if lap else NAMES[index]


def draw_faces(
    folder: Path, *, identities: int = 24, photos: int = 16, size: int = 160, seed: int = 0, first: int = 0
) -> Path:
    """Writes `folder`/<Name>/<Name>_0001.jpg and so on, laid out like LFW, and returns `folder`.

    The people are the `identities` that follow `first`: sets that do not overlap show different people.
    Each JPEG (quality 90) is RGB, `size` x `size`; its number is one more than the `photo` of `draw_face`.
    The same arguments write the same files.
    """
    for identity in range(first, first + identities):
        name = name_of(identity)
        (folder / name).mkdir(parents=True, exist_ok=True)
        for photo in range(photos):
            image = draw_face(identity, photo, size=size, seed=seed)
            image.save(folder / name / f"{name}_{photo + 1:04d}.jpg", quality=90)
    return folder
