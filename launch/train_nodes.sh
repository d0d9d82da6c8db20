#!/usr/bin/env bash
# The same training on several nodes: launch/train_nodes.sh HOSTFILE RUN.yaml [--set a.b=c ...]
#
# Every node needs this folder at the same path, with its .venv, and the shards at the path that the run file names.
# The first host of HOSTFILE holds rank 0; the launcher reaches the others over ssh with pdsh.
set -euo pipefail
if [ $# -lt 2 ]; then
    sed -n '2,5s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
hostfile=$1 config=$2
shift 2
[ -r "$hostfile" ] || { echo "train_nodes.sh: hostfile $hostfile can't be read; see launch/hostfile.example" >&2; exit 2; }
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"
master=$(grep -v -E '^\s*(#|$)' "$hostfile" | head -n 1 | cut -d ' ' -f 1)
# Only some variables cross to the other nodes by themselves; the rest go through this file of the launcher.
{
    echo "PATH=$root/.venv/bin:$PATH"
    [ -z "${DS_ACCELERATOR:-}" ] || echo "DS_ACCELERATOR=$DS_ACCELERATOR"
    [ -z "${OMP_NUM_THREADS:-}" ] || echo "OMP_NUM_THREADS=$OMP_NUM_THREADS"
} > .deepspeed_env
exec "$root/.venv/bin/deepspeed" --hostfile "$hostfile" --master_addr "${MASTER_ADDR:-$master}" \
    --master_port "${MASTER_PORT:-29500}" --no_local_rank --module dist_train train --config "$config" "$@"
