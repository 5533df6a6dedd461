#!/usr/bin/env bash
# One training run on several machines under SLURM, one process per GPU:
#
#     sbatch --nodes 8 --gpus-per-node 8 configs/cluster/slurm.sh CONFIG [KEY=VALUE …]
#
# output_dir (and cache.dir) must be on storage that all nodes mount. What follows CONFIG goes to `ldm train`.
# Ten minutes before the time limit, and at a preemption, SLURM sends USR1 to this script. It passes the signal on, the
# run finishes its step, saves and exits with 75, and the job is queued again: it goes on from its newest checkpoint.
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

# In the background, since bash runs a trap only between commands or in `wait`. `exec`: signals reach ldm itself.
# --wait: when one task has ended the others have two minutes to save, or to name the one that was lost.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=0 --wait=120 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID
    exec ldm train --no-check "$@"
' ldm "$@" &
step=$!

preempted=0 signalled=0
pass_on() { # srun passes it on to all tasks
    signalled=1
    kill -s "$1" "$step" 2>/dev/null
}
trap 'preempted=1; pass_on USR1' USR1
trap 'pass_on TERM' TERM # scancel: saved, but not queued again

code=0
while :; do
    signalled=0
    wait "$step"
    last=$?
    [ "$last" -eq 127 ] || code=$last # 127: it had ended before
    [ "$signalled" -eq 1 ] || break # else it was the signal that ended the wait
done

# 75: saved, to be gone on with. Another code: the signal came before the first step, or during the export.
if [ "$preempted" -eq 1 ] && [ "$code" -ne 0 ]; then
    echo "exit code $code after USR1: the job is queued again" >&2
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
