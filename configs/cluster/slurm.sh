#!/usr/bin/env bash
# GPT-2 1558M on 16 nodes of 8 GPUs: sbatch configs/cluster/slurm.sh
# One task for each GPU. The same script, submitted again, goes on from the newest checkpoint.
#SBATCH --job-name=gpt2-1558m
#SBATCH --nodes=16
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
# ten minutes before the end, to every rank: a last checkpoint is written
#SBATCH --signal=TERM@600

set -euo pipefail
source .venv/bin/activate

# --kill-on-bad-exit: where one rank fails, the others need not wait for their time-out
srun --kill-on-bad-exit=1 fastgpt train configs/gpt2-1558m.yaml "$@"
