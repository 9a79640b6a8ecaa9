"""Manifests, the format that EAT and SSLAM were trained from: `.tsv`, `.lbl` and label_descriptors.csv.

SOURCE is a folder with these files:

- `SPLIT.tsv` for each split: the root folder in the first line, then lines `relative/path.wav<TAB>number`;
- `SPLIT.lbl`: lines `name<TAB>label,label,...` in any order. The name is that of a sound file without suffix, with or
  without folders;
- `label_descriptors.csv`: lines `index,label,display name`.

If the sounds have moved, `--root` replaces the root folder of the manifests.
"""

import os
from pathlib import Path
from typing import Any

from modeling_sslam.common.labels import LabelFileError, read_label_table
from training.preparation.listing import Clip, Findings, Listing, PreparationError, read_lines, sound_files

DESCRIPTORS = "label_descriptors.csv"
OPTIONS: dict[str, dict[str, Any]] = {
    "root": {
        "type": Path,
        "metavar": "FOLDER",
        "help": "root folder of the sound files, instead of the one in the manifests",
    }
}


def list_clips(source: Path, root: Path | None = None) -> Listing:
    """List the clips of all manifests; the module describes the files."""
    try:
        names, ids = zip(*read_label_table(source / DESCRIPTORS), strict=True)
    except LabelFileError as error:
        raise PreparationError(str(error)) from error
    clips, findings, roots = [], Findings(), set()
    for manifest in sorted(source.glob("*.tsv")):
        first, *lines = read_lines(manifest)
        if not first.strip():
            raise PreparationError(f"{manifest} has an empty first line: it must name the root folder.")
        folder = root or Path(first.strip())
        if not folder.is_dir():
            raise PreparationError(f"{manifest}: the root folder {str(folder)!r} does not exist; name it with --root.")
        roots.add(folder)
        labels = read_labels(manifest.with_suffix(".lbl"), findings)
        for line in filter(None, map(str.strip, lines)):
            name = line.split("\t")[0]
            stem = name.removesuffix(Path(name).suffix)
            key = stem if stem in labels else Path(name).stem
            if key not in labels:
                findings.add("clips_without_annotation", name)
                continue
            clips.append(Clip(stem, manifest.stem, folder / name, labels[key]))
        used = {clip.id for clip in clips} | {Path(clip.id).name for clip in clips}
        findings.add("labels_without_clip", *(key for key in labels if key not in used))
    if not roots:
        raise PreparationError(f"{source} has no .tsv manifests.")
    files = list(dict.fromkeys(path for folder in sorted(roots) for path in sound_files(folder)))
    return Listing(Path(os.path.commonpath(roots)), clips, names, files, ids, findings=findings)


def read_labels(path: Path, findings: Findings) -> dict[str, tuple[str, ...]]:
    """Read the labels of each name in an `.lbl` file.

    Raises:
        PreparationError: If the file cannot be read or a line has no tab.
    """
    labels: dict[str, tuple[str, ...]] = {}
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        name, tab, text = line.partition("\t")
        if not tab:
            raise PreparationError(f"{path}, line {number} is not `name<TAB>label,label,...`: {line!r}.")
        found = tuple(label.strip() for label in text.split(",") if label.strip())
        if labels.setdefault(name, found) != found:
            findings.add("conflicting_rows", f"{path.name}:{number}")
    return labels
