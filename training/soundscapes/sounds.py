"""TODO."""

import math
from collections.abc import Callable

import numpy as np
from numpy.random import Generator

Source = Callable[[Generator, int, int], np.ndarray]


SOURCES: dict[str, Source] = {}


def source(function: Source) -> Source:
    """Registers a class of sounds: (generator, number of samples, sampling rate) to a waveform of any level."""
    SOURCES[function.__name__] = function
    return function


def log_uniform(rng: Generator, low: float, high: float) -> float:
    return float(low * (high / low) ** rng.random())


def seconds(n: int, rate: int) -> np.ndarray:
    return np.arange(n) / rate


def oscillate(frequency: float | np.ndarray, n: int, rate: int, phase: float = 0.0) -> np.ndarray:
    """A sine of fixed frequency or along a curve of frequencies in Hz."""
    if isinstance(frequency, np.ndarray):
        return np.sin(2 * np.pi / rate * np.cumsum(frequency) + phase)
    return np.sin(2 * np.pi * frequency / rate * np.arange(n) + phase)


def harmonics(frequency: float | np.ndarray, amplitudes: np.ndarray, n: int, rate: int) -> np.ndarray:
    """Multiples 1, 2, … of a fundamental, those below Nyquist."""
    highest = float(np.max(frequency))
    fundamental = (
        2 * np.pi / rate * (np.cumsum(frequency) if isinstance(frequency, np.ndarray) else frequency * np.arange(n))
    )
    # sin((k + 1) x) = 2 cos(x) sin(k x) - sin((k - 1) x) costs a fifth of a sine each.
    out, twice_cosine = np.zeros(n), 2 * np.cos(fundamental)
    previous, current = np.zeros(n), np.sin(fundamental)
    for amplitude in amplitudes[: max(1, math.ceil(rate / 2 / highest) - 1)]:
        out += amplitude * current
        previous, current = current, twice_cosine * current - previous
    return out


def noise(rng: Generator, n: int, rate: int, gain: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Gaussian noise with the given amplitude over frequency in Hz."""
    size = 1 << max(4, (n - 1).bit_length())
    spectrum = np.fft.rfft(rng.standard_normal(size))
    return np.fft.irfft(spectrum * gain(np.fft.rfftfreq(size, 1 / rate)), size)[:n]


def band(low: float, high: float, order: int = 4) -> Callable[[np.ndarray], np.ndarray]:
    """A band pass with Butterworth slopes."""

    def gain(f: np.ndarray) -> np.ndarray:
        high_pass = 1 / np.sqrt(1 + (low / np.maximum(f, 1e-3)) ** (2 * order))
        return high_pass / np.sqrt(1 + (f / high) ** (2 * order))

    return gain


def decay(n: int, rate: int, half_life: float) -> np.ndarray:
    return 0.5 ** (seconds(n, rate) / half_life)


def strike(n: int, rate: int, half_life: float, attack: float = 0.002) -> np.ndarray:
    """A quick rise, then a decay."""
    return np.minimum(1.0, seconds(n, rate) / attack) * decay(n, rate, half_life)


def repeat(
    rng: Generator, n: int, rate: int, interval: float, jitter: float, grain: Callable[[], np.ndarray]
) -> np.ndarray:
    """Grains at about equal intervals in seconds, each a little louder or softer than the last."""
    out, time = np.zeros(n), 0.0
    while (start := int(time * rate)) < n:
        sound = grain()[: n - start]
        out[start : start + len(sound)] += rng.uniform(0.7, 1.0) * sound
        time += interval * (1 + jitter * rng.uniform(-1, 1))
    return out


def scatter(rng: Generator, n: int, rate: int, per_second: float, grain: Callable[[], np.ndarray]) -> np.ndarray:
    """Grains at random times."""
    out = np.zeros(n)
    for start in np.sort(rng.integers(0, n, max(1, rng.poisson(per_second * n / rate)))):
        sound = grain()[: n - start]
        out[start : start + len(sound)] += rng.uniform(0.2, 1.0) * sound
    return out


def gate(n: int, rate: int, period: float, duty: float, edge: float = 0.005) -> np.ndarray:
    """1 in the first `duty` of each period, else 0, with soft edges."""
    phase = seconds(n, rate) % period
    return np.clip(np.minimum(phase / edge, (duty * period - phase) / edge), 0.0, 1.0)


def slow_curve(rng: Generator, n: int, rate: int, per_second: float) -> np.ndarray:
    """Random values in [0, 1], linear between `per_second` of them."""
    points = rng.random(int(per_second * n / rate) + 3)
    return np.interp(seconds(n, rate) * per_second, np.arange(len(points)), points)


@source
def sine_tone(rng: Generator, n: int, rate: int) -> np.ndarray:
    tremolo = 1 + rng.uniform(0, 0.3) * oscillate(rng.uniform(2, 8), n, rate)
    return tremolo * oscillate(log_uniform(rng, 200, 4000), n, rate)


@source
def chirp(rng: Generator, n: int, rate: int) -> np.ndarray:
    low, high = log_uniform(rng, 200, 800), log_uniform(rng, 2000, 6000)
    phase = seconds(n, rate) / rng.uniform(0.5, 2.0) % 1.0
    return oscillate(low * (high / low) ** (phase if rng.random() < 0.5 else 1 - phase), n, rate)


@source
def siren(rng: Generator, n: int, rate: int) -> np.ndarray:
    low, ratio = rng.uniform(400, 700), rng.uniform(1.3, 2.2)
    wave = oscillate(1 / rng.uniform(0.8, 3.0), n, rate, rng.uniform(0, 6))
    shape = np.sign(wave) if rng.random() < 0.5 else wave
    return harmonics(low * ratio ** ((shape + 1) / 2), np.array([1, 0.5, 0.4, 0.2, 0.15, 0.1]), n, rate)


@source
def bell(rng: Generator, n: int, rate: int) -> np.ndarray:
    carrier, ratio, index = log_uniform(rng, 300, 1200), rng.choice([1.4, 1.73, 2.76, 3.51]), rng.uniform(2, 6)
    half_life, length = rng.uniform(0.3, 0.8), int(3 * rate)

    def grain() -> np.ndarray:
        envelope = strike(length, rate, half_life)
        modulation = index * envelope * oscillate(carrier * ratio, length, rate)
        return envelope * np.sin(2 * np.pi * carrier / rate * np.arange(length) + modulation)

    return repeat(rng, n, rate, rng.uniform(0.8, 2.0), 0.05, grain)


@source
def plucked_string(rng: Generator, n: int, rate: int) -> np.ndarray:
    """Karplus and Strong's string: a noise burst goes round a delay line, averaged with its neighbour each time."""
    root, scale, damping = log_uniform(rng, 110, 330), np.array([0, 2, 4, 7, 9, 12]), rng.uniform(0.985, 0.998)

    def grain() -> np.ndarray:
        period = int(rate / (root * 2 ** (rng.choice(scale) / 12)))
        rounds = np.empty((int(1.5 * rate / period), period))
        line = rng.uniform(-1, 1, period)
        for i in range(len(rounds)):
            rounds[i] = line
            line = 0.5 * damping * (line + np.concatenate((line[-1:], line[:-1])))
        return rounds.ravel()

    return repeat(rng, n, rate, rng.uniform(0.2, 0.6), 0.02, grain)


@source
def kick_drum(rng: Generator, n: int, rate: int) -> np.ndarray:
    base, top, length = rng.uniform(40, 65), rng.uniform(150, 300), int(0.4 * rate)
    sweep = base + top * decay(length, rate, rng.uniform(0.015, 0.04))
    hit = strike(length, rate, rng.uniform(0.05, 0.12)) * oscillate(sweep, length, rate)
    return repeat(rng, n, rate, 60 / rng.uniform(80, 170), 0.0, lambda: hit)


@source
def snare_drum(rng: Generator, n: int, rate: int) -> np.ndarray:
    tone, half_life, length = rng.uniform(160, 260), rng.uniform(0.03, 0.08), int(0.35 * rate)

    def grain() -> np.ndarray:
        rattle = noise(rng, length, rate, band(1000, 7000, 2)) * strike(length, rate, half_life)
        return rattle + 0.5 * oscillate(tone, length, rate) * strike(length, rate, 0.5 * half_life)

    return repeat(rng, n, rate, 60 / rng.uniform(60, 140), 0.01, grain)


@source
def hi_hat(rng: Generator, n: int, rate: int) -> np.ndarray:
    half_life, low = rng.uniform(0.01, 0.05), rng.uniform(4500, 6000)
    length = int(0.3 * rate)
    hit = noise(rng, length, rate, band(low, 0.49 * rate, 8)) * strike(length, rate, half_life, 0.001)
    return repeat(rng, n, rate, 30 / rng.uniform(70, 150), 0.01, lambda: hit)


@source
def cricket(rng: Generator, n: int, rate: int) -> np.ndarray:
    pulses = gate(n, rate, 1 / rng.uniform(35, 70), 0.5, 0.002)
    trills = gate(n, rate, rng.uniform(0.3, 1.0), rng.uniform(0.3, 0.7), 0.02)
    return pulses * trills * oscillate(rng.uniform(3500, 5500), n, rate)


@source
def bird_whistle(rng: Generator, n: int, rate: int) -> np.ndarray:
    center = log_uniform(rng, 2000, 4500)

    def grain() -> np.ndarray:
        length = int(rng.uniform(0.08, 0.35) * rate)
        t = np.linspace(0, 1, length)
        glide = center * 2 ** (
            rng.uniform(-0.4, 0.4) + rng.uniform(-0.5, 0.5) * t + rng.uniform(-0.3, 0.3) * np.sin(9 * t)
        )
        warble = 1 + rng.uniform(0, 0.06) * oscillate(rng.uniform(15, 35), length, rate)
        return np.sin(np.pi * t) * oscillate(glide * warble, length, rate)

    return repeat(rng, n, rate, rng.uniform(0.25, 0.7), 0.4, grain)


@source
def dog_bark(rng: Generator, n: int, rate: int) -> np.ndarray:
    pitch, formant = rng.uniform(180, 450), rng.uniform(700, 1400)
    k = np.arange(1, 31)

    def grain() -> np.ndarray:
        length = int(rng.uniform(0.12, 0.22) * rate)
        t = np.linspace(0, 1, length)
        amplitudes = 1 / (1 + ((k * pitch - formant) / 400) ** 2) + 0.1 / k
        voice = harmonics(pitch * (1 + 0.5 * np.sin(np.pi * t)), amplitudes, length, rate)
        return np.sin(np.pi * t**0.5) * (voice + 0.4 * noise(rng, length, rate, band(500, 3000, 2)))

    return repeat(rng, n, rate, rng.uniform(0.35, 0.9), 0.4, grain)


@source
def engine(rng: Generator, n: int, rate: int) -> np.ndarray:
    firing = rng.uniform(25, 80) * (1 + rng.uniform(0.05, 0.5) * slow_curve(rng, n, rate, 0.7))
    rumble = harmonics(firing, rng.uniform(0.2, 1.0, 24) / np.arange(1, 25) ** 0.7, n, rate)
    return rumble * (1 + 0.3 * noise(rng, n, rate, band(1, 60, 1))) + 0.3 * noise(rng, n, rate, band(60, 900, 1))


@source
def wind(rng: Generator, n: int, rate: int) -> np.ndarray:
    gusts = 0.1 + slow_curve(rng, n, rate, rng.uniform(0.6, 1.5)) ** 2
    low, high = rng.uniform(150, 300), rng.uniform(500, 1000)
    return gusts * noise(rng, n, rate, band(low, high, 1)) + gusts**2 * noise(rng, n, rate, band(high, 1.4 * high, 6))


@source
def rain(rng: Generator, n: int, rate: int) -> np.ndarray:
    hiss = noise(rng, n, rate, lambda f: band(800, 7500, 1)(f) * (1 + f / 3000))
    length = int(0.01 * rate)
    drop = strike(length, rate, 0.002, 0.0005) * noise(rng, length, rate, band(1500, 6000, 2))
    return rng.uniform(0.02, 0.08) * hiss + scatter(rng, n, rate, rng.uniform(80, 300), lambda: drop)


@source
def footsteps(rng: Generator, n: int, rate: int) -> np.ndarray:
    cutoff, length = rng.uniform(250, 900), int(0.18 * rate)

    def grain() -> np.ndarray:
        heel = strike(length, rate, 0.02) * noise(rng, length, rate, band(60, cutoff, 2))
        scuff = strike(length, rate, 0.03, 0.05) * noise(rng, length, rate, band(1500, 5000, 2))
        return heel + 0.25 * np.roll(scuff, int(0.05 * rate))

    return repeat(rng, n, rate, rng.uniform(0.4, 0.75), 0.06, grain)


@source
def clock_tick(rng: Generator, n: int, rate: int) -> np.ndarray:
    length, pitches = int(0.05 * rate), rng.uniform(1800, 5000, 2)
    ticks = [strike(length, rate, 0.004, 0.0003) * oscillate(pitch, length, rate) for pitch in pitches]
    turn = iter(range(10**9))
    return repeat(rng, n, rate, rng.choice([0.2, 0.25, 0.5]), 0.0, lambda: ticks[next(turn) % 2])


@source
def alarm_beep(rng: Generator, n: int, rate: int) -> np.ndarray:
    beeps = gate(n, rate, rng.uniform(0.12, 0.3), 0.5) * gate(n, rate, rng.uniform(0.8, 1.4), rng.uniform(0.5, 0.8))
    return beeps * harmonics(rng.uniform(1500, 3200), np.array([1, 0, 0.3]), n, rate)


@source
def telephone(rng: Generator, n: int, rate: int) -> np.ndarray:
    """The two tones of a ringing line, or digits dialled on a keypad."""
    if rng.random() < 0.5:
        low, high = rng.uniform(400, 450), rng.uniform(460, 500)
        return gate(n, rate, rng.uniform(2, 3), 0.6, 0.02) * (oscillate(low, n, rate) + oscillate(high, n, rate))
    length = int(rng.uniform(0.1, 0.2) * rate)
    rows, columns = (697, 770, 852, 941), (1209, 1336, 1477)
    return repeat(
        rng,
        n,
        rate,
        1.6 * length / rate,
        0.1,
        lambda: oscillate(float(rng.choice(rows)), length, rate) + oscillate(float(rng.choice(columns)), length, rate),
    )


@source
def vowel(rng: Generator, n: int, rate: int) -> np.ndarray:
    """A voice: a glottal pulse train through three formants that change from syllable to syllable."""
    vowels = np.array([[730, 1090, 2440], [270, 2290, 3010], [300, 870, 2240], [530, 1840, 2480], [570, 840, 2410]])
    pitch, tract = log_uniform(rng, 90, 260), rng.uniform(0.9, 1.2)
    k = np.arange(1, 51)

    def grain() -> np.ndarray:
        length = int(rng.uniform(0.25, 0.6) * rate)
        f = k[:, None] * pitch
        formants = tract * vowels[rng.integers(len(vowels))]
        amplitudes = (np.array([1, 0.6, 0.3]) / (1 + ((f - formants) / (0.06 * formants + 30)) ** 2)).sum(1)
        t = np.linspace(0, 1, length)
        bend = 1 + rng.uniform(-0.15, 0.15) * t + 0.015 * oscillate(5.5, length, rate)
        return np.sin(np.pi * t) ** 0.5 * harmonics(pitch * bend, amplitudes, length, rate)

    return repeat(rng, n, rate, rng.uniform(0.4, 0.8), 0.2, grain)


@source
def laser_zap(rng: Generator, n: int, rate: int) -> np.ndarray:
    top, length = rng.uniform(3500, 7000), int(0.3 * rate)
    sweep = 150 + top * decay(length, rate, rng.uniform(0.02, 0.06))
    zap = strike(length, rate, 0.1, 0.001) * harmonics(sweep, np.array([1, 0, 0.33, 0, 0.2]), length, rate)
    return repeat(rng, n, rate, rng.uniform(0.3, 0.9), 0.4, lambda: zap)


@source
def water_drops(rng: Generator, n: int, rate: int) -> np.ndarray:
    """Bubbles: their pitch rises as they shrink."""
    length = int(0.15 * rate)

    def grain() -> np.ndarray:
        start = log_uniform(rng, 500, 2000)
        rise = start * 2 ** (rng.uniform(2, 8) * seconds(length, rate))
        return strike(length, rate, rng.uniform(0.01, 0.03)) * oscillate(rise, length, rate)

    return scatter(rng, n, rate, rng.uniform(2, 9), grain)


@source
def car_horn(rng: Generator, n: int, rate: int) -> np.ndarray:
    pitch = rng.uniform(300, 460)
    amplitudes = 1 / np.arange(1, 16) ** 0.6
    chord = harmonics(pitch, amplitudes, n, rate) + harmonics(pitch * rng.choice([1.2, 1.25]), amplitudes, n, rate)
    return chord * gate(n, rate, rng.uniform(0.6, 2.0), rng.uniform(0.5, 0.95), 0.02)


@source
def helicopter(rng: Generator, n: int, rate: int) -> np.ndarray:
    blades = (0.5 + 0.5 * oscillate(rng.uniform(9, 18), n, rate)) ** rng.uniform(4, 8)
    whine = 0.08 * oscillate(rng.uniform(1200, 2600), n, rate)
    return (0.1 + blades) * noise(rng, n, rate, band(40, rng.uniform(400, 1200), 1)) + whine * blades.mean()


@source
def organ_chord(rng: Generator, n: int, rate: int) -> np.ndarray:
    root, stops = log_uniform(rng, 130, 260), np.array([1, 0.8, 0.4, 0.6, 0.1, 0.2, 0, 0.4])
    third = rng.choice([3, 4])
    return sum(harmonics(root * 2 ** (step / 12), stops, n, rate) for step in (0, third, 7, 12))


@source
def mosquito(rng: Generator, n: int, rate: int) -> np.ndarray:
    pitch = rng.uniform(450, 750) * 2 ** (0.3 * slow_curve(rng, n, rate, 4))
    near = 0.2 + slow_curve(rng, n, rate, 2) ** 2
    return near * harmonics(pitch, 1 / np.arange(1, 11) ** 0.8, n, rate)


@source
def applause(rng: Generator, n: int, rate: int) -> np.ndarray:
    length = int(0.03 * rate)
    claps = [
        strike(length, rate, rng.uniform(0.004, 0.008), 0.0005) * noise(rng, length, rate, band(c, 2 * c, 2))
        for c in rng.uniform(700, 2200, 12)
    ]
    return scatter(rng, n, rate, rng.uniform(60, 250), lambda: claps[rng.integers(12)])


@source
def sea_waves(rng: Generator, n: int, rate: int) -> np.ndarray:
    swell = (0.5 - 0.5 * np.cos(2 * np.pi * seconds(n, rate) / rng.uniform(1.5, 4.0) + rng.uniform(0, 6))) ** 2
    return (0.05 + swell) * noise(rng, n, rate, lambda f: 1 / np.sqrt(1 + (f / 400) ** 1.6)) * rng.uniform(0.8, 1.2)


@source
def frog(rng: Generator, n: int, rate: int) -> np.ndarray:
    pitch, pulse = rng.uniform(500, 1100), rng.uniform(35, 80)

    def grain() -> np.ndarray:
        length = int(rng.uniform(0.2, 0.4) * rate)
        croak = harmonics(pitch, np.array([1, 0.6, 0.5, 0.1]), length, rate)
        return np.hanning(length) * gate(length, rate, 1 / pulse, 0.6, 0.002) * croak

    return repeat(rng, n, rate, rng.uniform(0.6, 1.2), 0.2, grain)
