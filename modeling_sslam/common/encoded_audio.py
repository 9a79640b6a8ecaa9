"""Audio columns of data sets whose files stay encoded."""

import dataclasses

import datasets

ID_COLUMNS = ("video_id", "id", "__key__")


@dataclasses.dataclass
class EncodedAudio(datasets.Audio):
    """An audio column that stays encoded. For tars and folders, `Audio(decode=False)` asks for torchcodec even so."""

    decode: bool = False

    def encode_example(self, value: str | bytes | dict) -> dict:
        if isinstance(value, dict):
            return {"bytes": value.get("bytes"), "path": value.get("path")}
        return {"bytes": value, "path": None} if isinstance(value, bytes) else {"bytes": None, "path": str(value)}
