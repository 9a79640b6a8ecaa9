"""The sound classes. Each is a synthesiser that is registered in `SOURCES` under its function name.

A synthesiser draws pitch, rhythm and timbre from a random generator, so all clips of a class differ. Its arguments are
the generator, the number of samples `n` and the sampling rate in Hz. It returns float64 of shape `(n,)` at an
arbitrary level; [`training.soundscapes.scene.soundscape`] sets the level.

To add a class, add its synthesiser to this file; no other file changes. Sounds depend on the order of the draws, so
reordering two draws changes every data set.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.random import Generator

from training.data.mixing.noise import noise

Synthesiser = Callable[[Generator, int, int], np.ndarray]

SOURCES: dict[str, Synthesiser] = {}


def register(function: Synthesiser) -> Synthesiser:
    """Add a synthesiser to `SOURCES`."""
    SOURCES[function.__name__] = function
    return function


# ---------------------------------------------------------------------------------------------------- building blocks


def log_uniform(rng: Generator, low: float, high: float) -> float:
    """Draw a number between `low` and `high` whose logarithm is uniformly distributed."""
    return float(low * (high / low) ** rng.random())


def times(n: int, rate: int) -> np.ndarray:
    """Return the time of each sample in seconds."""
    return np.arange(n) / rate


def oscillate(frequency: float | np.ndarray, n: int, rate: int, phase: float = 0.0) -> np.ndarray:
    """Return a sine of a constant frequency or of one frequency per sample, in Hz."""
    if isinstance(frequency, np.ndarray):
        return np.sin(2 * np.pi / rate * np.cumsum(frequency) + phase)
    return np.sin(2 * np.pi * frequency / rate * np.arange(n) + phase)


def harmonics(frequency: float | np.ndarray, amplitudes: np.ndarray, n: int, rate: int) -> np.ndarray:
    """Return a sum of sines at multiples 1, 2, ... of a fundamental. Multiples above Nyquist are left out.

    Args:
        frequency: Fundamental in Hz, constant or one value per sample.
        amplitudes: Amplitude of each multiple.
        n: Number of samples.
        rate: Sampling rate in Hz.
    """
    highest = float(np.max(frequency))
    fundamental = (
        2 * np.pi / rate * (np.cumsum(frequency) if isinstance(frequency, np.ndarray) else frequency * np.arange(n))
    )
    # The recurrence sin((k + 1) x) = 2 cos(x) sin(k x) - sin((k - 1) x) costs a fifth of calling sin.
    out, twice_cosine = np.zeros(n), 2 * np.cos(fundamental)
    previous, current = np.zeros(n), np.sin(fundamental)
    for amplitude in amplitudes[: max(1, math.ceil(rate / 2 / highest) - 1)]:
        out += amplitude * current
        previous, current = current, twice_cosine * current - previous
    return out


def band_pass(low: float, high: float, order: int = 4) -> Callable[[np.ndarray], np.ndarray]:
    """Return the gain of a Butterworth band pass between two frequencies in Hz, for [`noise`]."""

    def gain(f: np.ndarray) -> np.ndarray:
        high_pass = 1 / np.sqrt(1 + (low / np.maximum(f, 1e-3)) ** (2 * order))
        return high_pass / np.sqrt(1 + (f / high) ** (2 * order))

    return gain


def decay(n: int, rate: int, half_life: float) -> np.ndarray:
    """Return an exponential decay from 1 that halves every `half_life` seconds."""
    return 0.5 ** (times(n, rate) / half_life)


def strike(n: int, rate: int, half_life: float, attack: float = 0.002) -> np.ndarray:
    """Return the envelope of a struck object: a linear rise over `attack` seconds, then a decay."""
    return np.minimum(1.0, times(n, rate) / attack) * decay(n, rate, half_life)


def repeat(
    rng: Generator, n: int, rate: int, interval: float, jitter: float, grain: Callable[[], np.ndarray]
) -> np.ndarray:
    """Repeat a grain at nearly regular intervals, each time at a random level between 0.7 and 1.

    Args:
        rng: Random generator.
        n: Number of samples.
        rate: Sampling rate in Hz.
        interval: Mean distance between grains in seconds.
        jitter: Largest deviation of a distance, as a fraction of `interval`.
        grain: Returns the samples of the next grain.
    """
    out, time = np.zeros(n), 0.0
    while (start := int(time * rate)) < n:
        sound = grain()[: n - start]
        out[start : start + len(sound)] += rng.uniform(0.7, 1.0) * sound
        time += interval * (1 + jitter * rng.uniform(-1, 1))
    return out


def scatter(rng: Generator, n: int, rate: int, per_second: float, grain: Callable[[], np.ndarray]) -> np.ndarray:
    """Place grains at random times and at levels between 0.2 and 1. Their number is Poisson, but at least one."""
    out = np.zeros(n)
    for start in np.sort(rng.integers(0, n, max(1, rng.poisson(per_second * n / rate)))):
        sound = grain()[: n - start]
        out[start : start + len(sound)] += rng.uniform(0.2, 1.0) * sound
    return out


def gate(n: int, rate: int, period: float, duty: float, edge: float = 0.005) -> np.ndarray:
    """Return a periodic on/off envelope: 1 in the first `duty` of each period, else 0. Times are in seconds.

    Args:
        n: Number of samples.
        rate: Sampling rate in Hz.
        period: Length of a period.
        duty: Fraction of a period that is on.
        edge: Length of the linear ramps between on and off.
    """
    phase = times(n, rate) % period
    return np.clip(np.minimum(phase / edge, (duty * period - phase) / edge), 0.0, 1.0)


def slow_curve(rng: Generator, n: int, rate: int, per_second: float) -> np.ndarray:
    """Interpolate linearly between random values in [0, 1], of which there are `per_second` in a second."""
    points = rng.random(int(per_second * n / rate) + 3)
    return np.interp(times(n, rate) * per_second, np.arange(len(points)), points)


# ------------------------------------------------------------------------------------------------------ sound classes


@register
def sine_tone(rng: Generator, n: int, rate: int) -> np.ndarray:
    """A sine with a slight tremolo."""
    tremolo = 1 + rng.uniform(0, 0.3) * oscillate(rng.uniform(2, 8), n, rate)
    return tremolo * oscillate(log_uniform(rng, 200, 4000), n, rate)


@register
def chirp(rng: Generator, n: int, rate: int) -> np.ndarray:
    """A sine that sweeps up or down again and again, exponentially in frequency."""
    low, high = log_uniform(rng, 200, 800), log_uniform(rng, 2000, 6000)
    phase = times(n, rate) / rng.uniform(0.5, 2.0) % 1.0
    return oscillate(low * (high / low) ** (phase if rng.random() < 0.5 else 1 - phase), n, rate)


@register
def siren(rng: Generator, n: int, rate: int) -> np.ndarray:
    """A harmonic tone that glides or jumps between two pitches."""
    low, ratio = rng.uniform(400, 700), rng.uniform(1.3, 2.2)
    wave = oscillate(1 / rng.uniform(0.8, 3.0), n, rate, rng.uniform(0, 6))
    shape = np.sign(wave) if rng.random() < 0.5 else wave
    return harmonics(low * ratio ** ((shape + 1) / 2), np.array([1, 0.5, 0.4, 0.2, 0.15, 0.1]), n, rate)


@register
def bell(rng: Generator, n: int, rate: int) -> np.ndarray:
    """Strokes of a bell by frequency modulation with an inharmonic modulator."""
    carrier, ratio, index = log_uniform(rng, 300, 1200), rng.choice([1.4, 1.73, 2.76, 3.51]), rng.uniform(2, 6)
    half_life, length = rng.uniform(0.3, 0.8), int(3 * rate)

    def grain() -> np.ndarray:
        envelope = strike(length, rate, half_life)
        modulation = index * envelope * oscillate(carrier * ratio, length, rate)
        return envelope * np.sin(2 * np.pi * carrier / rate * np.arange(length) + modulation)

    return repeat(rng, n, rate, rng.uniform(0.8, 2.0), 0.05, grain)


@register
def plucked_string(rng: Generator, n: int, rate: int) -> np.ndarray:
    """Notes of a Karplus-Strong string: noise circulates in a delay line that averages neighbouring samples."""
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


@register
def kick_drum(rng: Generator, n: int, rate: int) -> np.ndarray:
    """A drum beat: a sine whose pitch falls fast."""
    base, top, length = rng.uniform(40, 65), rng.uniform(150, 300), int(0.4 * rate)
    sweep = base + top * decay(length, rate, rng.uniform(0.015, 0.04))
    hit = strike(length, rate, rng.uniform(0.05, 0.12)) * oscillate(sweep, length, rate)
    return repeat(rng, n, rate, 60 / rng.uniform(80, 170), 0.0, lambda: hit)


@register
def snare_drum(rng: Generator, n: int, rate: int) -> np.ndarray:
    """A drum beat: filtered noise over a short tone."""
    tone, half_life, length = rng.uniform(160, 260), rng.uniform(0.03, 0.08), int(0.35 * rate)

    def grain() -> np.ndarray:
        rattle = noise(rng, length, rate, band_pass(1000, 7000, 2)) * strike(length, rate, half_life)
        return rattle + 0.5 * oscillate(tone, length, rate) * strike(length, rate, 0.5 * half_life)

    return repeat(rng, n, rate, 60 / rng.uniform(60, 140), 0.01, grain)


@register
def hi_hat(rng: Generator, n: int, rate: int) -> np.ndarray:
    """A cymbal beat: short high-pass noise."""
    half_life, low = rng.uniform(0.01, 0.05), rng.uniform(4500, 6000)
    length = int(0.3 * rate)
    hit = noise(rng, length, rate, band_pass(low, 0.49 * rate, 8)) * strike(length, rate, half_life, 0.001)
    return repeat(rng, n, rate, 30 / rng.uniform(70, 150), 0.01, lambda: hit)


@register
def cricket(rng: Generator, n: int, rate: int) -> np.ndarray:
    """Trills of fast pulses of a high sine."""
    pulses = gate(n, rate, 1 / rng.uniform(35, 70), 0.5, 0.002)
    trills = gate(n, rate, rng.uniform(0.3, 1.0), rng.uniform(0.3, 0.7), 0.02)
    return pulses * trills * oscillate(rng.uniform(3500, 5500), n, rate)


@register
def bird_whistle(rng: Generator, n: int, rate: int) -> np.ndarray:
    """Whistled notes that glide and warble."""
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


@register
def dog_bark(rng: Generator, n: int, rate: int) -> np.ndarray:
    """Short harmonic bursts with one formant and some noise."""
    pitch, formant = rng.uniform(180, 450), rng.uniform(700, 1400)
    k = np.arange(1, 31)

    def grain() -> np.ndarray:
        length = int(rng.uniform(0.12, 0.22) * rate)
        t = np.linspace(0, 1, length)
        amplitudes = 1 / (1 + ((k * pitch - formant) / 400) ** 2) + 0.1 / k
        voice = harmonics(pitch * (1 + 0.5 * np.sin(np.pi * t)), amplitudes, length, rate)
        return np.sin(np.pi * t**0.5) * (voice + 0.4 * noise(rng, length, rate, band_pass(500, 3000, 2)))

    return repeat(rng, n, rate, rng.uniform(0.35, 0.9), 0.4, grain)


@register
def engine(rng: Generator, n: int, rate: int) -> np.ndarray:
    """A piston engine: low harmonics at a drifting firing rate, with noise."""
    firing = rng.uniform(25, 80) * (1 + rng.uniform(0.05, 0.5) * slow_curve(rng, n, rate, 0.7))
    rumble = harmonics(firing, rng.uniform(0.2, 1.0, 24) / np.arange(1, 25) ** 0.7, n, rate)
    return rumble * (1 + 0.3 * noise(rng, n, rate, band_pass(1, 60, 1))) + 0.3 * noise(
        rng, n, rate, band_pass(60, 900, 1)
    )


@register
def wind(rng: Generator, n: int, rate: int) -> np.ndarray:
    """Low noise in gusts; strong gusts add a higher band."""
    gusts = 0.1 + slow_curve(rng, n, rate, rng.uniform(0.6, 1.5)) ** 2
    low, high = rng.uniform(150, 300), rng.uniform(500, 1000)
    return gusts * noise(rng, n, rate, band_pass(low, high, 1)) + gusts**2 * noise(
        rng, n, rate, band_pass(high, 1.4 * high, 6)
    )


@register
def rain(rng: Generator, n: int, rate: int) -> np.ndarray:
    """Steady hiss with scattered drops."""
    hiss = noise(rng, n, rate, lambda f: band_pass(800, 7500, 1)(f) * (1 + f / 3000))
    length = int(0.01 * rate)
    drop = strike(length, rate, 0.002, 0.0005) * noise(rng, length, rate, band_pass(1500, 6000, 2))
    return rng.uniform(0.02, 0.08) * hiss + scatter(rng, n, rate, rng.uniform(80, 300), lambda: drop)


@register
def footsteps(rng: Generator, n: int, rate: int) -> np.ndarray:
    """Steps: a dull heel, then a scuff of the sole."""
    cutoff, length = rng.uniform(250, 900), int(0.18 * rate)

    def grain() -> np.ndarray:
        heel = strike(length, rate, 0.02) * noise(rng, length, rate, band_pass(60, cutoff, 2))
        scuff = strike(length, rate, 0.03, 0.05) * noise(rng, length, rate, band_pass(1500, 5000, 2))
        return heel + 0.25 * np.roll(scuff, int(0.05 * rate))

    return repeat(rng, n, rate, rng.uniform(0.4, 0.75), 0.06, grain)


@register
def clock_tick(rng: Generator, n: int, rate: int) -> np.ndarray:
    """A clock: ticks of two alternating pitches."""
    length, pitches = int(0.05 * rate), rng.uniform(1800, 5000, 2)
    ticks = [strike(length, rate, 0.004, 0.0003) * oscillate(pitch, length, rate) for pitch in pitches]
    turn = iter(range(10**9))
    return repeat(rng, n, rate, rng.choice([0.2, 0.25, 0.5]), 0.0, lambda: ticks[next(turn) % 2])


@register
def alarm_beep(rng: Generator, n: int, rate: int) -> np.ndarray:
    """Groups of electronic beeps."""
    beeps = gate(n, rate, rng.uniform(0.12, 0.3), 0.5) * gate(n, rate, rng.uniform(0.8, 1.4), rng.uniform(0.5, 0.8))
    return beeps * harmonics(rng.uniform(1500, 3200), np.array([1, 0, 0.3]), n, rate)


@register
def telephone(rng: Generator, n: int, rate: int) -> np.ndarray:
    """The two tones of a ringing line, or the tone pairs of digits dialled on a keypad."""
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


@register
def vowel(rng: Generator, n: int, rate: int) -> np.ndarray:
    """A voice: a harmonic source with three formants that change from syllable to syllable."""
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


@register
def laser_zap(rng: Generator, n: int, rate: int) -> np.ndarray:
    """Harmonic tones whose pitch falls exponentially."""
    top, length = rng.uniform(3500, 7000), int(0.3 * rate)
    sweep = 150 + top * decay(length, rate, rng.uniform(0.02, 0.06))
    zap = strike(length, rate, 0.1, 0.001) * harmonics(sweep, np.array([1, 0, 0.33, 0, 0.2]), length, rate)
    return repeat(rng, n, rate, rng.uniform(0.3, 0.9), 0.4, lambda: zap)


@register
def water_drops(rng: Generator, n: int, rate: int) -> np.ndarray:
    """Bubbles whose pitch rises as they shrink."""
    length = int(0.15 * rate)

    def grain() -> np.ndarray:
        start = log_uniform(rng, 500, 2000)
        rise = start * 2 ** (rng.uniform(2, 8) * times(length, rate))
        return strike(length, rate, rng.uniform(0.01, 0.03)) * oscillate(rise, length, rate)

    return scatter(rng, n, rate, rng.uniform(2, 9), grain)


@register
def car_horn(rng: Generator, n: int, rate: int) -> np.ndarray:
    """A chord of two harmonic tones, switched on and off."""
    pitch = rng.uniform(300, 460)
    amplitudes = 1 / np.arange(1, 16) ** 0.6
    chord = harmonics(pitch, amplitudes, n, rate) + harmonics(pitch * rng.choice([1.2, 1.25]), amplitudes, n, rate)
    return chord * gate(n, rate, rng.uniform(0.6, 2.0), rng.uniform(0.5, 0.95), 0.02)


@register
def helicopter(rng: Generator, n: int, rate: int) -> np.ndarray:
    """Noise pulsed by rotor blades, with a turbine's whine."""
    blades = (0.5 + 0.5 * oscillate(rng.uniform(9, 18), n, rate)) ** rng.uniform(4, 8)
    whine = 0.08 * oscillate(rng.uniform(1200, 2600), n, rate)
    return (0.1 + blades) * noise(rng, n, rate, band_pass(40, rng.uniform(400, 1200), 1)) + whine * blades.mean()


@register
def organ_chord(rng: Generator, n: int, rate: int) -> np.ndarray:
    """A sustained major or minor chord of organ pipes."""
    root, stops = log_uniform(rng, 130, 260), np.array([1, 0.8, 0.4, 0.6, 0.1, 0.2, 0, 0.4])
    third = rng.choice([3, 4])
    tones = (harmonics(root * 2 ** (step / 12), stops, n, rate) for step in (0, third, 7, 12))
    return sum(tones, np.zeros(n))


@register
def mosquito(rng: Generator, n: int, rate: int) -> np.ndarray:
    """A harmonic whine that wanders in pitch and distance."""
    pitch = rng.uniform(450, 750) * 2 ** (0.3 * slow_curve(rng, n, rate, 4))
    near = 0.2 + slow_curve(rng, n, rate, 2) ** 2
    return near * harmonics(pitch, 1 / np.arange(1, 11) ** 0.8, n, rate)


@register
def applause(rng: Generator, n: int, rate: int) -> np.ndarray:
    """Many short claps at random times."""
    length = int(0.03 * rate)
    claps = [
        strike(length, rate, rng.uniform(0.004, 0.008), 0.0005) * noise(rng, length, rate, band_pass(c, 2 * c, 2))
        for c in rng.uniform(700, 2200, 12)
    ]
    return scatter(rng, n, rate, rng.uniform(60, 250), lambda: claps[rng.integers(12)])


@register
def sea_waves(rng: Generator, n: int, rate: int) -> np.ndarray:
    """Low noise that swells and ebbs."""
    swell = (0.5 - 0.5 * np.cos(2 * np.pi * times(n, rate) / rng.uniform(1.5, 4.0) + rng.uniform(0, 6))) ** 2
    return (0.05 + swell) * noise(rng, n, rate, lambda f: 1 / np.sqrt(1 + (f / 400) ** 1.6)) * rng.uniform(0.8, 1.2)


@register
def frog(rng: Generator, n: int, rate: int) -> np.ndarray:
    """Croaks: a harmonic tone gated at a slow rate."""
    pitch, pulse = rng.uniform(500, 1100), rng.uniform(35, 80)

    def grain() -> np.ndarray:
        length = int(rng.uniform(0.2, 0.4) * rate)
        croak = harmonics(pitch, np.array([1, 0.6, 0.5, 0.1]), length, rate)
        return np.hanning(length) * gate(length, rate, 1 / pulse, 0.6, 0.002) * croak

    return repeat(rng, n, rate, rng.uniform(0.6, 1.2), 0.2, grain)
