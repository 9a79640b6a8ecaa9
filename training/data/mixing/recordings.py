"""Recordings from which scenes are mixed: decoded on use, and kept in a cache of limited size."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import datasets
import numpy as np

from modeling_sslam.common.audio import read_waveform
from modeling_sslam.common.errors import ClipError
from training.data.mixing.effects import active_frames

# A recording whose loudest frame has a lower RMS in dB of full scale counts as silent: 16 bits hold nothing of it.
SILENCE_DB = -90.0
# Longer recordings are not decoded whole: each use decodes the part that it needs.
MAX_WHOLE_SECONDS = 60.0


class Sound(NamedTuple):
    """A decoded recording, or a part of a long one.

    Attributes:
        waveform: float32 of shape `(num_samples,)`. It is shared, so it must not be changed.
        active: Indices of its frames that are not silent.
    """

    waveform: np.ndarray
    active: np.ndarray


class SoundCache:
    """Decoded recordings, of which the least recently used are dropped.

    Args:
        max_bytes: Largest size of all waveforms together.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._sounds: OrderedDict[Any, Sound] = OrderedDict()

    def get(self, key: Any) -> Sound | None:
        """Return a recording, if it is still there."""
        if key in self._sounds:
            self._sounds.move_to_end(key)
        return self._sounds.get(key)

    def put(self, key: Any, sound: Sound) -> None:
        """Add a recording that is not there, and drop others to make room. One that is too large is not added."""
        if sound.waveform.nbytes > self.max_bytes:
            return
        self._sounds[key] = sound
        self.num_bytes += sound.waveform.nbytes
        while self.num_bytes > self.max_bytes:
            self.num_bytes -= self._sounds.popitem(last=False)[1].waveform.nbytes


class Recordings:
    """The recordings of one split: their names, labels and groups, and access to their sound.

    Args:
        table: Rows with encoded audio, accessible by index.
        audio: Returns a row's encoded file and its path.
        ids: Names of the recordings.
        labels: Labels of the recordings; empty strings where there are none.
        groups: Groups of the recordings. Those of a group come from the same original.
    """

    def __init__(
        self,
        table: datasets.Dataset,
        audio: Callable[[dict[str, Any]], tuple[bytes | None, str | None]],
        ids: Sequence[str],
        labels: Sequence[str],
        groups: Sequence[str],
    ) -> None:
        self.table = table
        self.audio = audio
        self.ids, self.labels, self.groups = list(ids), list(labels), list(groups)
        self._faults: dict[int, ClipError] = {}
        self._long: set[int] = set()

    def __len__(self) -> int:
        """Return the number of recordings."""
        return len(self.ids)

    def select(self, indices: Sequence[int]) -> "Recordings":
        """Return some of the recordings."""
        columns = ([column[i] for i in indices] for column in (self.ids, self.labels, self.groups))
        return Recordings(self.table.select(indices), self.audio, *columns)

    def read(
        self, index: int, rate: int, num_samples: int, position: float, below_peak: float, cache: SoundCache
    ) -> Sound:
        """Decode a recording whole or, if it is long, a part of it. The result does not depend on the cache.

        Args:
            index: The recording.
            rate: Sampling rate in Hz to return.
            num_samples: Length of the part of a long recording.
            position: Place of that part, in [0, 1).
            below_peak: See [`active_frames`].
            cache: Takes recordings that are decoded whole.

        Raises:
            ClipError: If the recording is unusable, or "silent" if it is below [`SILENCE_DB`].
        """
        if index in self._faults:
            raise self._faults[index]
        key = id(self), index, rate
        sound = cache.get(key)
        if sound is None:
            most = max(num_samples, round(MAX_WHOLE_SECONDS * rate))
            try:
                if index not in self._long:
                    # One sample more tells a recording of this length from a longer one.
                    sound = self._decode(index, rate, most + 1, 0.0, below_peak)
                    if len(sound.waveform) <= most:
                        cache.put(key, sound)
                        return sound
                    self._long.add(index)
                return self._decode(index, rate, num_samples, position, below_peak)
            except ClipError as error:
                # A fault in one part of a long recording does not concern the others.
                if index not in self._long:
                    self._faults[index] = error
                raise
        return sound

    def _decode(self, index: int, rate: int, num_samples: int, position: float, below_peak: float) -> Sound:
        encoded, path = self.audio(self.table[index])
        file = path if encoded is None else encoded
        if file is None:
            raise ClipError("missing", "the row has neither a file nor a path")
        waveform = read_waveform(file, rate, max_samples=num_samples, position=position).numpy()
        active = active_frames(waveform, rate, below_peak, SILENCE_DB)
        if not len(active):
            raise ClipError("silent", f"no 20 ms of it are louder than {SILENCE_DB:g} dB of full scale")
        return Sound(waveform, active)
