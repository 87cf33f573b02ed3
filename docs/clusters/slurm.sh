#!/bin/bash
# An evaluation as an array job of Slurm, a part of it a task; all write into one shared folder.
#
#   sbatch docs/clusters/slurm.sh --detector clip:MODEL                  # prints the job's number
#   sbatch --array=1 --dependency=afterok:NUMBER docs/clusters/slurm.sh merge --detector clip:MODEL
#
# What stands behind the script's name is given to trce. A task that was killed is run again alone, as task 3 by
# `sbatch --array=3 ...`: it goes on where it was.
#SBATCH --job-name=trce
#SBATCH --array=1-8
#SBATCH --gres=gpu:1
#SBATCH --requeue
#SBATCH --output=%x-%A-%a.log
set -euo pipefail
SHARDS=${SHARDS:-8} # as many as --array above has
OUTPUT=${OUTPUT:-evaluation}

evaluate=(
  trce evaluate "${ERASED:-erased}" --against "${ORIGINAL:-./my-sd15}" --preset "${PRESET:-weapons}"
  --output "$OUTPUT"
)
if [ "${1:-}" = merge ]; then
  exec "${evaluate[@]}" "${@:2}" --merge "$OUTPUT"
fi
exec "${evaluate[@]}" "$@" --shard "$SLURM_ARRAY_TASK_ID/$SHARDS"
