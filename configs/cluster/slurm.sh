#!/usr/bin/env bash
# One training run on several machines under SLURM, one process per GPU:
#
#     sbatch --nodes 8 --gpus-per-node 8 configs/cluster/slurm.sh CONFIG [KEY=VALUE …]
#
# output_dir (and cache.dir) must be on storage that all nodes mount. What follows CONFIG goes to `ldm train`.
# Preemption and the time limit: 10 minutes before the end SLURM sends USR1 to this script. It passes the signal on, the
# run finishes its step, saves and exits with 75, and the job is queued again; it goes on from its newest checkpoint.
# When a node fails SLURM itself queues the job again (--requeue).
#SBATCH --job-name=ldm
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
set -uo pipefail

if [ $# -eq 0 ]; then
    echo "usage: sbatch configs/cluster/slurm.sh CONFIG [KEY=VALUE …]" >&2
    exit 2
fi

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
WORLD_SIZE=$SLURM_NTASKS
OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
export MASTER_ADDR MASTER_PORT WORLD_SIZE OMP_NUM_THREADS

# In the background: bash runs a trap only between commands, or in `wait`. `exec`: the signal reaches the process itself.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=${SLURM_NTASKS_PER_NODE:-1}
    exec ldm train --no-check "$@"
' ldm "$@" &
step=$!

asked=0
stop() {
    asked=1
    kill -USR1 "$step" 2>/dev/null # srun passes it on to all tasks
}
trap stop USR1 TERM

wait "$step"
code=$?
while [ "$code" -gt 128 ] && kill -0 "$step" 2>/dev/null; do # it was the signal that ended the wait
    wait "$step"
    code=$?
done

# 75: saved, to be gone on with. Another code after a signal: it came before the first step, or during the export.
if [ "$code" -eq 75 ] || { [ "$asked" -eq 1 ] && [ "$code" -ne 0 ]; }; then
    echo "exit code $code: the job is queued again" >&2
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$code"
