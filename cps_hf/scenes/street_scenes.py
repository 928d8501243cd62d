"""Drawn street scenes with the official Cityscapes label ids: sky, ground, street fronts and traffic."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .canvas import SUPERSAMPLING, Canvas, check_scene, jitter, mixed, photograph, scaled
from .street_fronts import building, fence, hedge, wall
from .street_objects import (
    ID,
    Camera,
    Stage,
    clutter,
    foliage,
    person,
    pole,
    traffic_light,
    traffic_sign,
    tree,
    two_wheeler,
)
from .street_vehicles import vehicle

STREET_SIZE = (64, 128)
_STREET_KIND = 1
_FAR = 90.0


def draw_street_scene(
    index: int, *, size: tuple[int, int] = STREET_SIZE, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """One street scene. The same (seed, index, size) always gives the same scene.

    Returns:
        the image, uint8 (H, W, 3), and the official Cityscapes label ids, uint8 (H, W), 0 to 33.

    Raises:
        ValueError: `index` or `seed` is negative, or a side of `size` is below 32.
    """
    check_scene(index, seed)
    if len(size) != 2 or min(size) < 32:
        raise ValueError(f"`size` of a street scene must be (height, width), each at least 32, got {size}.")
    rng = np.random.default_rng(np.random.SeedSequence([seed, _STREET_KIND, index]))
    height, width = size
    camera = Camera(
        center=width * rng.normal(0.5, 0.07),
        horizon=height * rng.uniform(0.36, 0.5),
        focal=max(width / 2, height) * rng.uniform(1.15, 1.5),
        height=rng.uniform(1.3, 2.1),
        bend=rng.normal(0, 0.0012),
    )
    night = rng.random() < 0.05
    light = rng.uniform(0.45, 0.6) if night else rng.uniform(0.88, 1.08)
    stage = Stage(Canvas(size, ID["unlabeled"], rng), camera, rng, light, night)
    sky = _sky(stage)
    street = _Street(rng)
    _ground(stage, street)
    _sides(stage, street)
    _traffic(stage, street)
    _shadows(stage)
    _ego_vehicle(stage)
    picture = _weather(stage.canvas.picture(), stage.canvas.plane("depth"), sky, rng)
    labels = stage.canvas.plane("labels")
    image = photograph(picture, rng, noise=4)
    _out_of_roi(image, labels, rng)
    return image, labels


class _Street:
    """Where the bands of one street lie, in meters to the right of the camera: road, parking, sidewalks, fronts."""

    def __init__(self, rng: np.random.Generator):
        self.road = (-rng.uniform(2.2, 6.5), rng.uniform(2.2, 6.5))
        self.parking = tuple(rng.uniform(2, 2.5) if rng.random() < 0.3 else 0.0 for _ in range(2))
        self.sidewalk = tuple(rng.uniform(1.4, 4.5) for _ in range(2))
        self.verge = tuple(rng.uniform(2, 6) if rng.random() < 0.6 else 0.3 for _ in range(2))
        self.tracks = rng.random() < 0.35

    def edges(self, side: int) -> tuple[float, float, float, float]:
        """On this side (-1 left, 1 right): where road, parking, sidewalk and verge end."""
        i = (side + 1) // 2
        road = self.road[i]
        parking = road + side * self.parking[i]
        sidewalk = parking + side * self.sidewalk[i]
        return road, parking, sidewalk, sidewalk + side * self.verge[i]


def _sky(stage: Stage) -> tuple[int, int, int]:
    """Sky with clouds and a distant skyline. Returns the color at the horizon, which haze uses too."""
    canvas, rng, camera = stage.canvas, stage.rng, stage.camera
    weathers = (
        ((70, 120, 190), (190, 210, 230)),
        ((150, 158, 168), (210, 212, 214)),
        ((225, 228, 232), (238, 238, 238)),
        ((130, 140, 186), (236, 196, 160)),
        ((128, 146, 172), (186, 196, 206)),
        ((140, 180, 220), (232, 224, 206)),
    )
    top, low = weathers[rng.integers(len(weathers))]
    if stage.night:
        top, low = (14, 18, 34), (52, 48, 62)
    top, low = jitter(rng, top, 12), jitter(rng, low, 12)
    canvas.begin(ID["sky"])
    bands = 16
    for i in range(bands):
        y0, y1 = camera.horizon * i / bands, camera.horizon * (i + 1) / bands + 1
        canvas.rectangle((0, y0, canvas.width, y1), mixed(top, low, i / bands))
    for _ in range(rng.integers(0, 6)):
        x, y = rng.uniform(0, canvas.width), rng.uniform(0, camera.horizon)
        w, h = rng.uniform(8, 50), rng.uniform(2, 8)
        canvas.ellipse((x - w, y - h, x + w, y + h), mixed(low, (240, 240, 244), 0.1 if stage.night else 0.6))
    if rng.random() < 0.3:  # overcast
        grey = ("blotch", rng.uniform(2, 12))
        canvas.rectangle((0, 0, canvas.width, camera.horizon), mixed(top, low, 0.7), grain=grey)
    x = -5.0
    while x < canvas.width:  # the skyline: houses, trees, gaps
        w, h = rng.uniform(6, 26), rng.uniform(1, 0.3 * camera.horizon)
        kind = rng.random()
        box = (x, camera.horizon - h, x + w, camera.horizon + 2)
        if kind < 0.45:
            canvas.begin(ID["building"], z=_FAR)
            canvas.rectangle(box, stage.paint("building"), grain=stage.grain())
        elif kind < 0.85:
            canvas.begin(ID["vegetation"], z=_FAR)
            canvas.ellipse((x - 3, box[1], x + w + 3, camera.horizon + h), foliage(stage), grain=("leaves", 16))
        x += w
    return low


def _strip(stage: Stage, label: str | None, left: float, right: float, color, grain=None, zs=(1.2, _FAR)) -> None:
    """A band on the ground between two lateral positions, along the (bending) street."""
    stage.canvas.begin(None if label is None else ID[label], z=None)
    depths = np.geomspace(*zs, 9 if zs[1] > 20 else 3)
    project = stage.camera.project
    points = [project(left, 0, z) for z in depths] + [project(right, 0, z) for z in depths[::-1]]
    stage.canvas.polygon(points, color, grain=grain)


def _ground(stage: Stage, street: _Street) -> None:
    canvas, rng, camera = stage.canvas, stage.rng, stage.camera
    soils = ((112, 152, 66), (138, 150, 76), (150, 130, 88), (96, 136, 60))
    soil = stage.lit(soils[rng.integers(len(soils))], 12)
    open_ground = "terrain" if rng.random() < 0.75 else "ground"
    if open_ground == "ground":
        soil = stage.paint()
    grain = (("grass", "blotch", "leaves")[rng.integers(3)] if open_ground == "terrain" else "plaster",
             rng.uniform(10, 28))  # fmt: skip
    canvas.begin(ID[open_ground])
    canvas.rectangle((0, camera.horizon, canvas.width, canvas.height), soil, grain=grain)
    asphalts = ((92, 92, 96), (122, 120, 118), (68, 68, 74), (104, 98, 96))
    asphalt = stage.lit(asphalts[rng.integers(len(asphalts))], 10)
    pavings = ((150, 146, 140), (176, 168, 156), (168, 140, 132), (186, 180, 166))
    for side in (-1, 1):
        road, parking, sidewalk, _ = street.edges(side)
        if abs(sidewalk - parking) > 0:
            paving = stage.lit(pavings[rng.integers(len(pavings))], 12)
            texture = ("brick", "grain", "plaster")[rng.integers(3)]
            _strip(stage, "sidewalk", parking, sidewalk, paving, (texture, rng.uniform(4, 16)))
            for z in np.geomspace(2, 30, 14) * rng.uniform(0.9, 1.1):  # joints between the slabs
                _strip(stage, None, parking, sidewalk, scaled(paving, 0.85), zs=(z, z * 1.02))
        if parking != road:
            _strip(stage, "parking", road, parking, mixed(asphalt, paving, 0.4), ("grain", rng.uniform(4, 12)))
        curb = stage.lit((178, 176, 170), 18)
        _strip(stage, "sidewalk", parking, parking + side * 0.25, curb)
    _strip(stage, "road", *street.road, asphalt, (("grain", "plaster", "blotch")[rng.integers(3)], rng.uniform(4, 14)))
    _road_paint(stage, street, asphalt)
    canvas.depth.paste(_ground_depth(stage), (0, int(camera.horizon * SUPERSAMPLING)))


def _ground_depth(stage: Stage) -> Image.Image:
    """The depth of the ground below the horizon, in the canvas's encoding."""
    height = stage.canvas.depth.height - int(stage.camera.horizon * SUPERSAMPLING)
    z = stage.camera.focal * stage.camera.height / (np.arange(height) / SUPERSAMPLING + 0.3)
    column = (255 * (1 - np.exp(-z / 60))).astype(np.uint8)
    return Image.fromarray(np.repeat(column[:, None], stage.canvas.depth.width, 1))


def _road_paint(stage: Stage, street: _Street, asphalt) -> None:
    """Lane lines, crossings, patches, puddles and tram tracks. All but the tracks are labeled road."""
    rng, (left, right) = stage.rng, street.road
    white = stage.lit(((226, 226, 222), (214, 186, 90))[int(rng.random() < 0.2)], 10)
    for _ in range(rng.integers(0, 4)):
        x, z = rng.uniform(left, right - 1), rng.uniform(3, 25)
        patch = scaled(asphalt, rng.uniform(0.7, 1.3))
        _strip(stage, None, x, x + rng.uniform(0.3, 2), patch, zs=(z, z + rng.uniform(1, 8)))
    lanes = int(rng.integers(1, 4))
    for lane in range(1, lanes):
        x = left + (right - left) * lane / lanes
        dash, gap = (3.0, rng.uniform(2, 6)) if rng.random() < 0.7 else (80.0, 1.0)
        z = rng.uniform(1.5, 5)
        while z < 60:
            _strip(stage, None, x - 0.08, x + 0.08, white, zs=(z, min(z + dash, _FAR)))
            z += dash + gap
    if rng.random() < 0.5:
        for x in (left + 0.3, right - 0.3):
            _strip(stage, None, x - 0.07, x + 0.07, white)
    if rng.random() < 0.3:  # a crossing
        z = rng.uniform(5, 14)
        for x in np.arange(left + 0.3, right - 0.5, 1.0):
            _strip(stage, None, x, x + 0.5, white, zs=(z, z + 2.5))
    if street.tracks:
        middle = _track_position(street)
        if rng.random() < 0.6:
            bed = stage.lit((128, 116, 100), 16)
            _strip(stage, "rail track", middle - 1.2, middle + 1.2, bed, ("blotch", rng.uniform(8, 22)))
        for x in (middle - 0.72, middle + 0.72):
            _strip(stage, None, x - 0.06, x + 0.06, stage.lit((60, 58, 58), 14))


def _track_position(street: _Street) -> float:
    return street.road[0] + 1.6


def _sides(stage: Stage, street: _Street) -> None:
    """The street fronts on both sides, from far to near: buildings, walls, fences, hedges, gaps."""
    rng = stage.rng
    for side in (-1, 1):
        front = street.edges(side)[3]
        town = rng.random()  # how built-up this side is
        cuts = [rng.uniform(2.5, 4)]
        while cuts[-1] < _FAR:
            cuts.append(cuts[-1] + rng.uniform(5, 20))
        for near, far in reversed(list(zip(cuts, cuts[1:], strict=False))):
            kind = rng.random()
            if kind < 0.15 + 0.4 * town:
                building(stage, side, front, near, far)
            elif kind < 0.9:
                if rng.random() < 0.7:
                    behind = front + side * rng.uniform(3, 8)
                    (building if rng.random() < 0.4 else hedge)(stage, side, behind, near, far)
                (wall, fence, hedge)[rng.choice(3, p=[0.4, 0.4, 0.2])](stage, side, front, near, far)
            elif rng.random() < 0.5:
                for _ in range(rng.integers(1, 4)):
                    tree(stage, front + side * rng.uniform(0.5, 5), rng.uniform(near, far) + 3)


def _traffic(stage: Stage, street: _Street) -> None:
    """All objects and traffic, painted from far to near so that near objects cover far ones."""
    rng = stage.rng
    things: list[tuple[float, object, tuple, dict]] = []

    def add(draw, x: float, z: float, *arguments, **options) -> None:
        things.append((z, draw, (x, z, *arguments), options))

    for side in (-1, 1):
        _beside_the_road(add, rng, street, side)
    _on_the_road(add, rng, street)
    if street.tracks and rng.random() < 0.75:
        z, x = rng.uniform(6, 16), _track_position(street)
        add(_vehicle_of("train"), x, z, across=rng.random() < 0.15)
    for _, draw, arguments, options in sorted(things, key=lambda thing: -thing[0]):
        draw(stage, *arguments, **options)
    if rng.random() < 0.08:  # a bridge over the street
        z, low, high = rng.uniform(14, 30), rng.uniform(4, 5), rng.uniform(6, 7.5)
        stage.canvas.begin(ID["bridge"], z=z)
        stage.canvas.polygon(stage.camera.quad((-40, 40), (low, high), z), stage.paint(), grain=("plaster", 16))


def _vehicle_of(kind: str):
    return lambda stage, x, z, **options: vehicle(stage, kind, x, z, **options)


def _depth(rng: np.random.Generator, near: float = 4.0, far: float = 18.0) -> float:
    """A distance; near ones are more likely than far ones."""
    return near * (far / near) ** float(rng.random() ** 1.3)


def _beside_the_road(add, rng: np.random.Generator, street: _Street, side: int) -> None:
    road, parking, sidewalk, front = street.edges(side)
    for _ in range(rng.poisson(1.4)):
        add(pole, parking + side * rng.uniform(0.2, 0.7), _depth(rng, 4.5, 18))
    for draw, often in ((traffic_light, 0.9), (traffic_sign, 1.1)):
        for _ in range(rng.poisson(often)):
            add(draw, parking + side * rng.uniform(0.2, 0.8), _depth(rng, 4, 12))
    if abs(front - sidewalk) > 0.8:
        for _ in range(rng.poisson(1.0)):
            add(tree, rng.uniform(*sorted((sidewalk, front))), _depth(rng, 4.5, 18))
    for _ in range(rng.poisson(1.6)):
        add(person, rng.uniform(*sorted((parking, sidewalk))), _depth(rng, 4, 12))
    for _ in range(rng.poisson(0.4)):
        add(clutter, rng.uniform(*sorted((parking, sidewalk))), _depth(rng, 4, 25))
    for kind in ("bicycle", "motorcycle"):
        for _ in range(rng.poisson(0.45)):
            add(two_wheeler, parking + side * rng.uniform(0.3, 1.2), _depth(rng, 3.5, 9), kind, ridden=False)
    z = rng.uniform(5, 14)
    while parking != road and z < 40:  # parked, one behind the other
        if rng.random() < 0.7:
            kind = rng.choice(["car", "truck", "caravan", "trailer"], p=[0.85, 0.09, 0.03, 0.03])
            add(_vehicle_of(kind), (road + parking) / 2, z)
        z += rng.uniform(5.5, 9)


def _on_the_road(add, rng: np.random.Generator, street: _Street) -> None:
    left, right = street.road
    for kind, often in (("car", 1.3), ("truck", 0.35), ("bus", 0.4), ("trailer", 0.03)):
        for _ in range(rng.poisson(often)):
            x = rng.uniform(left + 1.2, right - 1.2) if right - left > 5 else right - 1.4
            add(_vehicle_of(kind), x, _depth(rng, 5.5, 22), across=rng.random() < 0.3)
    for kind in ("bicycle", "motorcycle"):
        for _ in range(rng.poisson(0.55)):
            add(two_wheeler, rng.uniform(left + 0.4, right - 0.4), _depth(rng, 4, 10), kind, ridden=True)
    for _ in range(rng.poisson(0.5)):
        add(person, rng.uniform(left, right), _depth(rng, 4, 12))


def _shadows(stage: Stage) -> None:
    """Sunlight between houses: broad dark bands over the street and everything on it."""
    rng, camera = stage.rng, stage.camera
    if stage.night or rng.random() < 0.5:
        return
    strength, slant = rng.uniform(0.15, 0.45), rng.uniform(-3, 3)
    z = rng.uniform(2, 8)
    for _ in range(rng.integers(1, 4)):
        deep = rng.uniform(1, 6)
        a, b = -14, 14
        corners = ((a, z), (b, z + slant), (b, z + slant + deep), (a, z + deep))
        stage.canvas.darken([camera.project(x, 0, max(pz, 1.2)) for x, pz in corners], strength)
        z += deep + rng.uniform(1, 8)


def _ego_vehicle(stage: Stage) -> None:
    """The hood of the car with the camera, in about two images out of three."""
    rng, canvas = stage.rng, stage.canvas
    if rng.random() < 0.35:
        return
    width, height = canvas.width, canvas.height
    top, sag = height * rng.uniform(0.9, 0.97), height * rng.uniform(0.02, 0.08)
    xs = np.linspace(-0.05, 1.05, 12)
    outline = [(x * width, top + sag * (2 * x - 1) ** 2) for x in xs]
    canvas.begin(ID["ego vehicle"], z=1.0)
    canvas.polygon([*outline, (width * 1.1, height * 1.1), (-width * 0.1, height * 1.1)], stage.paint())
    if rng.random() < 0.5:
        glint = [(x * width, top + sag * (2 * x - 1) ** 2 + 1.5) for x in xs[3:9]]
        canvas.line(glint, stage.lit((230, 232, 236)), 0.8)


def _weather(picture: np.ndarray, depth: np.ndarray, sky, rng: np.random.Generator) -> np.ndarray:
    """Haze that grows with distance, and sometimes rain or snow."""
    fog = rng.uniform(0.4, 0.8) if rng.random() < 0.12 else rng.uniform(0.0, 0.25)
    share = (fog * depth.astype(np.float32) / 255)[..., None]
    picture = picture + (np.asarray(sky, np.float32) - picture) * share
    if rng.random() < 0.15:
        height, width = depth.shape
        layer = Image.new("L", (width, height), 0)
        pen, snow = ImageDraw.Draw(layer), rng.random() < 0.4
        slope = rng.normal(0, 0.2)
        for x, y in rng.uniform((0, 0), (width, height), (int(width * height / 90), 2)):
            length = 1 if snow else rng.uniform(2, 7)
            pen.line([(x, y), (x + slope * length, y + length)], fill=int(rng.uniform(60, 170)))
        drops = np.asarray(layer.filter(ImageFilter.GaussianBlur(0.4)), np.float32)[..., None]
        picture = picture + (225 - picture) * drops / 255
    return picture


def _out_of_roi(image: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> None:
    """The blank border that rectification leaves, with its label. In place."""
    if rng.random() < 0.5:
        return
    label = ID["out of roi"] if rng.random() < 0.7 else ID["rectification border"]
    left, right, bottom = rng.integers(0, 4, 3)
    height, width = labels.shape
    rim = np.ones((height, width), bool)
    rim[: height - bottom, left : width - right] = False
    image[rim] = rng.integers(0, 12)
    labels[rim] = label
