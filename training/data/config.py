"""Settings of the data: which source, which columns, which clips, and how they become batches."""

from dataclasses import dataclass, field
from typing import Literal

from training.arguments import changed_default

# Fewer clips are too few to judge the fraction of unusable ones.
MIN_CLIPS_FOR_FRACTION = 100


@dataclass
class DataConfig:
    """The source of sound and how it becomes batches."""

    source: str = field(
        metadata={
            "help": "Hub dataset id, folder of sound files or of a dataset (parquet, arrow, WebDataset tar, "
            "audiofolder, save_to_disk), .tsv manifest, .csv table, .yaml file of scenes to mix, or a builder of "
            "`datasets` such as parquet or webdataset with data_files.",
            "stands_for_section": True,
        }
    )
    config_name: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    split: str = field(
        default="train",
        metadata={
            "help": "Split to read, or several joined by +. A .tsv manifest has a single split, and so has a plain "
            "folder without a subfolder for each split."
        },
    )
    revision: str | None = field(
        default=None,
        metadata={
            "help": "Branch, tag or commit of a Hub dataset. Only a commit is sure to be the same when a run resumes."
        },
    )
    data_files: list[str] | None = field(
        default=None, metadata={"help": "Files, globs or URLs to read instead of the source's own choice."}
    )
    streaming: bool = field(
        default=True,
        metadata={"help": "Whether to stream a dataset, rather than download and cache it first."},
    )
    audio_column: str | None = field(
        default=None, metadata={"help": "Column with the audio. It is found if there is only one."}
    )
    id_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of clip names. By default video_id, id or __key__, else the audio's path, else a digest "
            "of its bytes. Names must be unique: they determine the random crops."
        },
    )
    label_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of labels, or auto for the first of the usual names. For a .tsv manifest any value reads "
            "the .lbl file beside it; for a plain folder, the names of the enclosing folders."
        },
    )
    group_column: str | None = field(
        default=None,
        metadata={"help": "Column by whose values results are reported, or auto for num_sources if it exists."},
    )
    sample_weights: str | None = field(
        default=None,
        metadata={
            "help": "Table id,weight for drawing clips_per_epoch clips per epoch, without replacement; "
            "`python -m training.class_weights` writes it."
        },
    )
    clips_per_epoch: int | None = field(
        default=None, metadata={"help": "Number of clips to draw by sample_weights, fewer than the table has."}
    )
    hold_out: float = field(
        default=0.0,
        metadata={"help": "Share of the split's clips to hold out for validation. Their names determine which."},
    )
    held_out: bool = field(
        default=False, metadata={"help": "Whether to read the clips that are held out, instead of the others."}
    )
    crop: Literal["random", "head"] = field(
        default="random",
        metadata={
            "help": "Part of a file that is longer than max_length frames: a random one, or (as published) its head."
        },
    )
    shuffle_buffer: int = field(
        default=500,
        metadata={
            "help": "Number of clips that are shuffled together; every worker holds as many encoded files in memory. "
            "0 keeps the order of the source in every epoch."
        },
    )
    num_workers: int = field(default=4, metadata={"help": "Worker processes per rank. 0 loads in the main process."})
    front_end: Literal["worker", "device"] = field(
        default="worker",
        metadata={
            "help": "Where the filter bank runs: in the workers, or on the model's device. The numbers are the same."
        },
    )
    max_skipped_fraction: float = field(
        default=0.05,
        metadata={
            "help": f"Stop when a larger share of a rank's clips is unusable, after {MIN_CLIPS_FOR_FRACTION} clips."
        },
    )
    max_retries: int = field(
        default=8,
        metadata={"help": "Number of retries when a source fails, at intervals that grow to a minute."},
    )
    read_timeout: float = field(
        default=60.0, metadata={"help": "Seconds without data after which an http(s) connection counts as lost."}
    )

    def __post_init__(self) -> None:
        for name, allowed in (("crop", ("random", "head")), ("front_end", ("worker", "device"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(allowed)}.")
        for name in ("shuffle_buffer", "num_workers", "max_retries"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative.")
        if (self.sample_weights is None) != (self.clips_per_epoch is None):
            raise ValueError("sample_weights and clips_per_epoch go together: give both, or neither.")
        if not 0 <= self.hold_out < 1 or (self.held_out and not self.hold_out):
            raise ValueError(
                f"hold_out={self.hold_out} must be at least 0, less than 1, and more than 0 for held_out."
            )
        if not 0 <= self.max_skipped_fraction < 1:
            raise ValueError(f"max_skipped_fraction={self.max_skipped_fraction} must be at least 0 and less than 1.")


@dataclass
class LabelledDataConfig(DataConfig):
    """The source of labelled sound and how it becomes batches."""

    label_column: str | None = changed_default(DataConfig, "label_column", "auto")
    group_column: str | None = changed_default(DataConfig, "group_column", "auto")


@dataclass
class EvaluationDataConfig(LabelledDataConfig):
    """A labelled split, read once in the order of the source."""

    split: str = changed_default(DataConfig, "split", "test")
    crop: Literal["random", "head"] = changed_default(DataConfig, "crop", "head")
    shuffle_buffer: int = changed_default(DataConfig, "shuffle_buffer", 0)


class DataError(RuntimeError):
    """The data do not allow a run to continue. The message gives the reason and the remedy."""
