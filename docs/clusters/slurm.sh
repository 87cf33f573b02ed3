#!/bin/bash
# An evaluation, or an attack, as an array job of Slurm, a part of it a task; all write to one shared place.
#
#   sbatch docs/clusters/slurm.sh --detector clip:MODEL                  # prints the job's number
#   sbatch --array=1 --dependency=afterok:NUMBER docs/clusters/slurm.sh merge --detector clip:MODEL
#
# What stands behind the script's name is given to trce. To attack, give both lines the variables
# `COMMAND=attack OUTPUT=attacks.csv`. A task that was killed is run again alone, as task 3 by
# `sbatch --array=3 ...`: it goes on where it was.
#SBATCH --job-name=trce
#SBATCH --array=1-8
#SBATCH --gres=gpu:1
#SBATCH --requeue
#SBATCH --output=%x-%A-%a.log
set -euo pipefail
SHARDS=${SHARDS:-8} # as many as --array above has
OUTPUT=${OUTPUT:-evaluation}

line=(
  trce "${COMMAND:-evaluate}" "${ERASED:-erased}" --against "${ORIGINAL:-./my-sd15}"
  --preset "${PRESET:-weapons}" --output "$OUTPUT"
)
if [ "${1:-}" = merge ]; then
  exec "${line[@]}" "${@:2}" --merge "$OUTPUT"
fi
exec "${line[@]}" "$@" --shard "$SLURM_ARRAY_TASK_ID/$SHARDS"
