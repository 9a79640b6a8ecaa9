#!/bin/sh
# Both stages on generated soundscapes with the tiny configuration, and what linear heads make of the frozen encoders.
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

evaluate() { # NAME MODEL [ARGUMENT ...]: every layer and pooling, on features computed once
    name=$1 model=$2
    shift 2
    python -m training.linear_eval --model "$model" --data "$out/data" --output_dir "$out/linear_eval/$name" \
        --cache_dir "$out/features" --layers all --poolings all "$@"
}
evaluate new_weights "$out/stage1/model" --random_weights true
evaluate stage1 "$out/stage1/model"
evaluate stage2 "$out/stage2/model"
