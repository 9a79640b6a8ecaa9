#!/bin/sh
# What is in a folder of recordings: the labels of every file as CSV, then how many files each label was found in.
#
#     sh examples/tag_folder.sh outputs/quickstart tests/fixtures/audio tags.csv
#
# A file that cannot be read is reported and left out. THRESHOLD=0.2 in front takes more labels than the 0.3 here.
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
