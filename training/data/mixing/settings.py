"""Settings of scenes mixed from recordings."""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from training.arguments import build, read_yaml

SETTINGS_SUFFIXES = (".yaml", ".yml")
# Length of the shortest recording that can be an event.
MIN_EVENT_SECONDS = 0.05
MAX_SECONDS = 3600.0


@dataclass(kw_only=True)
class SceneSettings:
    """The recordings and how scenes are mixed from them."""

    sounds: str = field(
        metadata={
            "help": "isolated recordings with one label each: a folder with a folder for each class, a .csv table, or "
            "a prepared data set"
        }
    )
    background: str | None = field(
        default=None, metadata={"help": "recordings for the background; without them it is coloured noise"}
    )
    impulse_responses: str | None = field(
        default=None, metadata={"help": "impulse responses of rooms; each event is convolved with one of them"}
    )
    label_column: str = field(
        default="auto", metadata={"help": "column of the label in a table or data set; auto: the first usual name"}
    )
    group_column: str | None = field(
        default=None,
        metadata={"help": "column of the original recording: clips with the same value stay in one split"},
    )
    group_by: str | None = field(
        default=None,
        metadata={
            "help": "regular expression that finds the original recording in a file's path below the folder, or in a "
            "clip's id; its first group counts, or the whole match. By default each file is an original"
        },
    )
    splits: list[str] = field(
        default_factory=lambda: ["train=0.7", "validation=0.15", "test=0.15"],
        metadata={
            "help": "splits and their shares, or the splits of the recordings that each is made of, such as "
            "train=fold1+fold2+fold3 validation=fold4 test=fold5"
        },
    )
    sounds_split: str = field(
        default="train", metadata={"help": "split of the recordings that is divided if splits gives shares"}
    )
    clips: int = field(default=2000, metadata={"help": "number of scenes in all splits together; streamed: per epoch"})
    seconds: float = field(
        default=10.0, metadata={"help": "length of a scene; streamed scenes are not longer than the model's clips"}
    )
    min_sources: int = field(default=1, metadata={"help": "smallest number of events in a scene"})
    max_sources: int = field(
        default=5, metadata={"help": "largest number of events in a scene; all numbers are equally likely"}
    )
    repeat_labels: bool = field(
        default=False, metadata={"help": "whether a class can occur more than once in a scene"}
    )
    event_seconds: tuple[float, float] = field(
        default=(0.5, 5.0),
        metadata={"help": "range of an event's length; a shorter recording is used whole, a longer one is cropped"},
    )
    snr: tuple[float, float] = field(
        default=(0.0, 20.0),
        metadata={
            "help": "range of an event's level (RMS over the event) above the background's (RMS over the scene)"
        },
    )
    level: tuple[float, float] = field(
        default=(-50.0, -30.0), metadata={"help": "range of the background's RMS level in dB of full scale"}
    )
    pitch: tuple[float, float] = field(
        default=(0.0, 0.0), metadata={"help": "range of pitch shifts of the events in semitones"}
    )
    stretch: tuple[float, float] = field(
        default=(1.0, 1.0), metadata={"help": "range of factors of the events' durations; 2 doubles them"}
    )
    trim: float = field(
        default=40.0,
        metadata={
            "help": "silence before and after an event is cut off: frames of 20 ms whose RMS is more than this many "
            "dB below the loudest one's"
        },
    )
    cache_mib: int = field(
        default=512, metadata={"help": "memory in MiB for decoded recordings in each worker process"}
    )

    def __post_init__(self) -> None:
        if self.clips < 1 or not MIN_EVENT_SECONDS <= self.seconds <= MAX_SECONDS:
            raise ValueError(
                f"clips={self.clips} must be at least 1, and seconds={self.seconds:g} must lie within "
                f"{MIN_EVENT_SECONDS:g} to {MAX_SECONDS:g}."
            )
        if not 1 <= self.min_sources <= self.max_sources:
            raise ValueError(
                f"min_sources={self.min_sources} and max_sources={self.max_sources} must be at least 1, the second "
                "not less than the first."
            )
        lowest = {"event_seconds": MIN_EVENT_SECONDS, "stretch": 0.25, "pitch": -24.0, "snr": -100.0, "level": -100.0}
        highest = {"event_seconds": MAX_SECONDS, "stretch": 4.0, "pitch": 24.0, "snr": 100.0, "level": 0.0}
        for name, least in lowest.items():
            low, high = getattr(self, name)
            if not least <= low <= high <= highest[name]:
                raise ValueError(f"{name}={low:g},{high:g} must be a range within {least:g} to {highest[name]:g}.")
        if not self.trim > 0 or self.cache_mib < 0:
            raise ValueError(f"trim={self.trim:g} must be positive, and cache_mib={self.cache_mib} not negative.")
        if self.group_by is not None:
            if self.group_column is not None:
                raise ValueError("group_by and group_column both name the original recordings; give one of them.")
            try:
                re.compile(self.group_by)
            except re.error as error:
                raise ValueError(f"group_by={self.group_by!r} is no regular expression: {error}.") from error
        self.parts()

    def parts(self) -> dict[str, float | str]:
        """Return the share of each split, or the splits of the recordings that it is made of, joined by `+`.

        Raises:
            ValueError: If the setting `splits` does not say so.
        """
        parts: dict[str, float | str] = {}
        for text in self.splits:
            name, sign, value = text.partition("=")
            if not (sign and value and re.fullmatch(r"\w+", name)) or name in parts:
                raise ValueError(f"splits: {text!r} must be NAME=SHARE or NAME=SPLIT+SPLIT, each name once.")
            try:
                parts[name] = float(value)
            except ValueError:
                parts[name] = value
        shares = [value for value in parts.values() if isinstance(value, float)]
        if len(shares) not in (0, len(parts)) or (shares and not (min(shares) > 0 and abs(sum(shares) - 1) < 1e-6)):
            raise ValueError(
                f"splits={' '.join(self.splits)} must give positive shares that add up to 1, or only names of splits."
            )
        used = [split for value in parts.values() if isinstance(value, str) for split in value.split("+")]
        if doubled := [split for split in used if used.count(split) > 1]:
            raise ValueError(f"splits={' '.join(self.splits)} uses {doubled[0]!r} twice; splits share no recording.")
        return parts


def read_settings(path: Path) -> SceneSettings:
    """Read settings from a YAML file. Paths in it are relative to its folder.

    Raises:
        ValueError: If the file cannot be read, or a setting is missing, unknown or wrong. The message names it.
    """
    try:
        settings = build(SceneSettings, read_yaml(path, SceneSettings))
    except ValueError as error:
        message = str(error)
        raise ValueError(message if str(path) in message else f"{path}: {message}") from error
    folder = path.parent
    return replace(
        settings,
        sounds=_resolve(settings.sounds, folder),
        background=settings.background and _resolve(settings.background, folder),
        impulse_responses=settings.impulse_responses and _resolve(settings.impulse_responses, folder),
    )


def _resolve(source: str, folder: Path) -> str:
    """Return the path of a source relative to a folder; the source itself, such as a Hub id, if there is none."""
    path = folder / Path(source).expanduser()
    return str(path) if path.exists() else source
