#!/bin/sh
# Write the labels of every recording in a folder to a CSV file, and print the number of files that have each label.
#
#     sh examples/tag_folder.sh outputs/quickstart/classifier/model tests/fixtures/audio tags.csv
#
# Files that cannot be read are reported and left out; the exit status is then 1. The variable THRESHOLD sets the
# lowest score of a label (default: 0.3).
set -e
model=${1:?model folder or Hub id} folder=${2:?folder of sound files} tags=${3:?CSV file to write}

unusable=0
sslam tag "$folder" --model "$model" --threshold "${THRESHOLD:-0.3}" --format csv > "$tags" || unusable=$?

python - "$tags" <<'PYTHON'
import sys

import pandas as pd

tags = pd.read_csv(sys.argv[1])
summary = tags.groupby("label").agg(files=("path", "count"), score=("score", "mean"), best=("score", "idxmax"))
summary["best"] = tags["path"][summary["best"]].to_numpy()
print(summary.sort_values("files", ascending=False).head(20).to_string(float_format="%.3f"))
PYTHON
exit $unusable
