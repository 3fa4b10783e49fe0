#!/usr/bin/env bash
# A training as a Slurm job on one machine. Preempted, out of time or on a machine that dies, it is queued again and goes on.
#
#   PROJECT=~/llmops BASE_MODEL_PATH=~/models/Qwen1.5-7B-Chat TRAIN_FILE=~/data/train.jsonl OUTPUT_DIR=~/tuned \
#       sbatch docs/jobs/slurm.sh [flags of job/run.sh]
#
#SBATCH --job-name=llmops
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.txt
# ten minutes before the time is over: a checkpoint is saved, and the job is queued again
#SBATCH --signal=B:USR1@600
set -euo pipefail

PROJECT="${PROJECT:-$SLURM_SUBMIT_DIR}"                      # the checkout of this project
export GPUS_PER_NODE="${GPUS_PER_NODE:-$SLURM_GPUS_ON_NODE}" # as many processes as GPUs were given
# NOTIFY_URL, and NOTIFY_TOKEN for it, come from the environment that sbatch is called in.

out_of_time=false
bash "$PROJECT/job/run.sh" "$@" &
job=$!
trap 'out_of_time=true; kill -TERM "$job"' USR1
trap 'kill -TERM "$job"' TERM # scancel, or a preemption, after which Slurm itself queues the job again
status=0
wait "$job" || status=$?
while kill -0 "$job" 2>/dev/null; do # a signal interrupts wait
    status=0
    wait "$job" || status=$?
done

if [ "$out_of_time" = true ] && [ "$status" -eq 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
