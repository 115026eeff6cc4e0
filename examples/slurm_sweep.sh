#!/usr/bin/env bash
# A sweep on as many machines as SLURM gives: every task of the array runs the same command on the same folder, and
# takes what no other task is at. A task that was killed or preempted is started again and goes on where the store is.
#
#   sbatch --array=0-7 examples/slurm_sweep.sh --model meta-llama/Llama-3.1-8B --task antonym,synonym --seeds 5
#
# The flags are those of `laai sweep`. $LAAI_STORE is a folder that all machines see, on a file system with locks
# (flock): NFS 4, GPFS, Lustre mounted with flock. Fetch model and data sets beforehand.
#SBATCH --job-name=laai-sweep
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --output=laai-sweep-%A-%a.log
set -euo pipefail

export HF_HUB_OFFLINE=1
exec laai sweep "$@" --output "${LAAI_STORE:-runs/sweep}"
