#!/usr/bin/env bash
# The same training on several nodes: launch/train_nodes.sh HOSTFILE RUN.yaml [--set a.b=c ...]
#
# Every node needs this folder at the same path, with its .venv, and RUN.yaml and its shards at the same paths too.
# The first host of HOSTFILE holds rank 0; the launcher reaches them all, itself too, over ssh with pdsh.
# From the environment:
#   MASTER_ADDR, MASTER_PORT   where the ranks meet (the first host of HOSTFILE, 29500)
#   GLOO_SOCKET_IFNAME         on CPUs, the nodes' network interface, where a node's own name isn't its address there
#   DEEPSPEED_ARGS             more options of `deepspeed`: --ssh_port 2222, --no_ssh_check
#   PDSH_SSH_ARGS_APPEND       more options of ssh, as -F FILE; the launcher's check lacks them: add --no_ssh_check
set -euo pipefail
if [ $# -lt 2 ]; then
    sed -n '2,10s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
[ -r "$1" ] || { echo "train_nodes.sh: hostfile $1 can't be read; see launch/hostfile.example" >&2; exit 2; }
[ -r "$2" ] || { echo "train_nodes.sh: run file $2 can't be read" >&2; exit 2; }
hostfile=$(realpath -s "$1") config=$(realpath -s "$2")
shift 2
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"
master=$(awk '$1 != "" && $1 !~ /^#/ {print $1; exit}' "$hostfile")
read -ra more <<< "${DEEPSPEED_ARGS:-}"
# Only some variables cross to the other nodes by themselves; the rest go through this file of the launcher.
{
    echo "PATH=$root/.venv/bin:$PATH"
    for name in $(compgen -e | grep -E '^(DS_ACCELERATOR$|OMP_|MKL_|GLOO_|NCCL_|TORCH_)'); do
        echo "$name=${!name}"
    done
} > .deepspeed_env
exec "$root/.venv/bin/deepspeed" --hostfile "$hostfile" --master_addr "${MASTER_ADDR:-$master}" \
    --master_port "${MASTER_PORT:-29500}" "${more[@]}" --no_local_rank --module dist_train train --config "$config" "$@"
