"""The landscape of a built-in example scene: sky, clouds, mountains, grass, water and roads."""

import numpy as np

from .drawing import Canvas, Color, jitter, mix, noise, scaled


# Zenith and horizon colours of the sky, and the tint its light gives to the whole scene.
SKIES: dict[str, tuple[Color, Color, Color]] = {
    "blue": ((0.26, 0.48, 0.80), (0.70, 0.82, 0.92), (1.02, 1.00, 0.96)),
    "pale": ((0.52, 0.68, 0.80), (0.86, 0.89, 0.88), (1.00, 1.00, 0.98)),
    "grey": ((0.50, 0.54, 0.59), (0.74, 0.76, 0.78), (0.93, 0.95, 0.98)),
    "orange": ((0.40, 0.44, 0.62), (0.96, 0.70, 0.44), (1.05, 0.92, 0.78)),
    "pink": ((0.42, 0.44, 0.68), (0.94, 0.70, 0.70), (1.02, 0.90, 0.90)),
    "dusky": ((0.14, 0.18, 0.36), (0.50, 0.44, 0.56), (0.76, 0.76, 0.88)),
}
GRASSES: dict[str, Color] = {
    "green": (0.36, 0.50, 0.20),
    "lush": (0.24, 0.42, 0.19),
    "dry": (0.64, 0.56, 0.30),
    "brown": (0.47, 0.39, 0.25),
}
WATERS: dict[str, Color] = {"blue": (0.22, 0.42, 0.60), "green": (0.22, 0.44, 0.42), "grey": (0.42, 0.48, 0.53)}
ROADS: dict[str, Color] = {"grey": (0.42, 0.42, 0.43), "dark": (0.27, 0.27, 0.29), "dirt": (0.58, 0.47, 0.35)}
STONES: dict[str, Color] = {"rocky": (0.46, 0.42, 0.40), "blue": (0.38, 0.45, 0.56), "green": (0.30, 0.40, 0.27)}


def pick(rng: np.random.Generator, table: dict[str, Color], amount: float = 0.05) -> tuple[str, Color]:
    """A name of the table and a shade of its colour."""
    name = str(rng.choice(list(table)))
    return name, jitter(rng, table[name], amount)


def sky(canvas: Canvas) -> tuple[Color, Color]:
    """A gradient, now and then with the sun; returns the colour at the horizon and the tint of the light."""
    rng = canvas.rng
    name = str(rng.choice(list(SKIES), p=[0.3, 0.2, 0.15, 0.13, 0.12, 0.1]))
    zenith, haze, tint = SKIES[name]
    zenith, haze = jitter(rng, zenith, 0.04), jitter(rng, haze, 0.04)
    canvas.begin("sky", name)
    share = np.clip(canvas.rows / canvas.horizon, 0, 1)[..., None] ** 1.3
    color = (1 - share) * np.asarray(zenith, np.float32) + share * np.asarray(haze, np.float32)
    if name != "grey" and rng.random() < 0.4:
        x = canvas.width * (0.5 + canvas.sun * rng.uniform(0.1, 0.42))
        y, radius = canvas.horizon * rng.uniform(0.2, 0.8), canvas.height * rng.uniform(0.025, 0.045)
        far = np.hypot(canvas.columns - x, canvas.rows - y)[..., None] / radius
        glow = np.clip(0.45 * np.exp(-far / 3.5) + (far < 1), 0, 1)
        color = color + glow * (np.asarray((1.0, 0.96, 0.82), np.float32) - color)
    canvas.paint(np.ones((canvas.height, canvas.width), bool), color)
    return haze, tint


def clouds(canvas: Canvas, haze: Color) -> None:
    """One to four clouds of a common kind, flat below and lit above."""
    rng = canvas.rng
    name, color = [("white", (0.97, 0.97, 0.96)), ("grey", (0.70, 0.71, 0.74)), ("dark", (0.50, 0.51, 0.56))][
        rng.choice(3, p=[0.6, 0.25, 0.15])
    ]
    light: Color = mix(color, haze, 0.15)
    dark = scaled(mix(color, haze, 0.35), 0.8)
    for _ in range(int(rng.integers(1, 5))):
        canvas.begin("cloud", name)
        wide = canvas.width * rng.uniform(0.09, 0.24)
        x, y = rng.uniform(0, canvas.width), canvas.horizon * rng.uniform(0.15, 0.75)
        field = np.full(canvas.rows.shape, -1.0, np.float32)
        for _ in range(int(rng.integers(4, 8))):
            off = rng.uniform(-0.75, 0.75)
            radius = wide * rng.uniform(0.28, 0.42) * (1.1 - abs(off))
            u = (canvas.columns - x - off * wide) / (radius * 1.35)
            field = np.maximum(field, 1 - u * u - ((canvas.rows - y + 0.35 * radius) / radius) ** 2)
        field = np.where(canvas.rows > y + 0.05 * wide, field - (canvas.rows - y - 0.05 * wide) / (0.1 * wide), field)
        mask = (field + 0.4 * canvas.textures["rock"] > 0.2) & (canvas.rows < canvas.horizon)
        share = np.clip((canvas.rows - y) / (0.8 * wide) + 0.75 + 0.25 * canvas.textures["rock"], 0, 1)[..., None]
        canvas.paint(mask, (1 - share) * np.asarray(light, np.float32) + share * np.asarray(dark, np.float32))


def mountains(canvas: Canvas, haze: Color) -> None:
    """One or two ranges above the horizon, the farther one paler; sharp peaks or round hills, some with snow."""
    rng = canvas.rng
    name, stone = pick(rng, STONES)
    snow = name != "green" and rng.random() < 0.5
    x = np.arange(canvas.width) / canvas.height
    for veil in sorted(rng.uniform(0.1, 0.55, int(rng.integers(1, 3))), reverse=True):
        canvas.begin("mountain", "snowy" if snow else name)
        ridge, lit = np.full(canvas.width, -1.0), np.zeros(canvas.width)
        for _ in range(int(rng.integers(2, 5))):
            peak, high, slope = (
                rng.uniform(-0.1, canvas.width / canvas.height + 0.1),
                rng.uniform(0.1, 0.32),
                rng.uniform(0.5, 1.2),
            )
            flank = high - slope * (np.abs(x - peak) if name != "green" else 1.4 * (x - peak) ** 2)
            lit = np.where(flank > ridge, np.sign(x - peak) * canvas.sun, lit)
            ridge = np.maximum(ridge, flank)
        ridge = canvas.height * (ridge + 0.02 * noise(rng, 1, canvas.width, (1, 24), 4)[0])
        above = canvas.horizon - canvas.rows
        mask = (above < ridge) & (above > -2)
        rock = canvas.textures["rock"] + 0.5 * lit
        color = np.asarray(mix(stone, haze, veil), np.float32) * (1 + 0.22 * (1 - veil) * rock[..., None])
        if snow:
            cap = (above > canvas.height * (0.14 + 0.05 * canvas.textures["rock"]))[..., None]
            white = np.asarray(mix((0.95, 0.96, 0.98), haze, veil), np.float32)
            color = np.where(cap, white * (1 + 0.09 * rock[..., None]), color)
        canvas.paint(mask, color)


def grass(canvas: Canvas) -> None:
    """The ground, from the horizon to the bottom, sometimes with flowers."""
    rng = canvas.rng
    name, color = pick(rng, GRASSES, 0.06)
    canvas.begin("grass", name)
    swell = canvas.height * 0.015 * noise(rng, 1, canvas.width, (1, 130), 2)[0]
    texture = 0.16 * canvas.in_perspective("blades") + 0.12 * canvas.in_perspective("rock")
    shade = (1 + texture) * (1.08 - 0.22 * canvas.depth())
    picture = np.asarray(color, np.float32) * shade[..., None]
    if rng.random() < 0.3:
        dots = rng.random(canvas.rows.shape) < 0.004 * canvas.depth()
        dots |= np.roll(dots, 1, 0) | np.roll(dots, 1, 1)
        picture = np.where(dots[..., None], np.asarray(rng.uniform(0.6, 1, 3), np.float32), picture)
    canvas.paint(canvas.rows > canvas.horizon + swell, picture)


def water(canvas: Canvas, haze: Color) -> None:
    """A lake in the grass or the sea along the horizon, mirroring the sky."""
    rng = canvas.rng
    name, color = pick(rng, WATERS)
    canvas.begin("water", name)
    depth, wave = canvas.depth(), canvas.textures["rock"]
    if rng.random() < 0.4:
        mask = depth < rng.uniform(0.2, 0.5) + 0.04 * wave + rng.uniform(-0.2, 0.2) * (
            canvas.columns / canvas.width - 0.5
        )
    else:
        x, y = canvas.width * rng.uniform(0, 1), rng.uniform(0.15, 0.75)
        u = (canvas.columns - x) / (canvas.width * rng.uniform(0.25, 0.55))
        mask = u * u + ((depth - y) / rng.uniform(0.12, 0.28)) ** 2 < 1 + 0.25 * wave
    ripples = canvas.in_perspective("ripples")[..., None]
    share = np.clip(0.65 - depth, 0, 1)[..., None]
    mirror = (1 - share) * np.asarray(color, np.float32) + share * np.asarray(haze, np.float32)
    canvas.paint(mask & (canvas.rows > canvas.horizon), mirror * (1 + 0.16 * ripples) + 0.12 * (ripples > 0.75))


def road(canvas: Canvas) -> bool:
    """A road towards the horizon or across the picture, with or without markings; returns whether it runs across."""
    rng = canvas.rng
    name, color = pick(rng, ROADS)
    canvas.begin("road", name)
    depth = canvas.depth()
    across = bool(rng.random() < 0.45)
    if across:
        middle = rng.uniform(0.4, 0.78) + rng.uniform(-0.12, 0.12) * (canvas.columns / canvas.width - 0.5)
        place = (depth - middle) / rng.uniform(0.12, 0.2)
        along = canvas.columns / (0.16 * canvas.width)
    else:
        start, end, bend = rng.uniform(0.15, 0.85), rng.uniform(0.2, 0.8), rng.uniform(-0.2, 0.2)
        centre = start + (end - start) * depth + bend * np.sin(np.pi * np.sqrt(depth))
        place = (canvas.columns / canvas.width - centre) / (0.012 + rng.uniform(0.24, 0.4) * depth)
        along = 9 * np.log(0.06 + depth)
    mask = (np.abs(place) < 1) & (canvas.rows > canvas.horizon)
    texture = canvas.textures["grain"] + canvas.in_perspective("rock")
    canvas.paint(mask, np.asarray(color, np.float32) * (1 + 0.07 * texture[..., None]))
    if name == "dirt":
        tracks = mask & (np.abs(np.abs(place) - 0.5) < 0.14)
        canvas.rgb[tracks] *= 0.86
        return across
    paint = (0.88, 0.86, 0.80) if rng.random() < 0.7 else (0.86, 0.70, 0.26)
    canvas.paint(mask & (np.abs(place) < 0.045) & (along % 1 < 0.55), paint)
    if rng.random() < 0.5:
        canvas.paint(mask & (np.abs(np.abs(place) - 0.92) < 0.035), (0.84, 0.83, 0.80))
    return across
