#!/bin/sh
# Both stages on generated soundscapes with the tiny configuration, and what a linear probe makes of the frozen encoders.
# From the root of the repository, on a CPU (10 minutes on two cores) or a GPU:
#     sh examples/pretrain_soundscapes.sh [OUT]
set -e
out=${1:-runs/soundscapes}
config=training/configs/pretrain_tiny.yaml

[ -d "$out/data" ] || python -m training.soundscapes "$out/data" --clips 2000 --seconds 5.2 --max-sources 4 --seed 0

accelerate launch -m training.pretrain --config $config --data.source "$out/data" --output_dir "$out/stage1" --resume auto
# Stage 2 on mixtures: student and teacher of stage 1, a lower learning rate, half the clones of twice the batch.
accelerate launch -m training.pretrain --config $config --data.source "$out/data" --output_dir "$out/stage2" --resume auto \
    --init_from "$out/stage1/model" --model.pretraining_objective sslam --model.num_clones 2 --model.ema_decay 0.999 \
    --max_updates 500 --optimizer.learning_rate 2e-4 --optimizer.warmup_updates 60

python -m examples.linear_probe "$out/stage1/model" "$out/data" --random
python -m examples.linear_probe "$out/stage1/model" "$out/data"
python -m examples.linear_probe "$out/stage2/model" "$out/data"
