#!/usr/bin/env bash
# Starts this host's ranks of a job over several hosts. Run the same line on every host:
#
#   bash launchers/torchrun_multinode.sh --nodes 4 --nproc-per-node 8 --rendezvous host0:29400 \
#       -- train configs/foundation.yaml --run.root /shared/runs
#
#   --nodes N | MIN:MAX      hosts; with a range the job starts with MIN and grows to MAX
#   --nproc-per-node N       ranks a host: one per GPU, or per few cores (default 1)
#   --rendezvous HOST:PORT   one of the hosts, as all others reach it; it must outlive the job
#   --id NAME                tells jobs at one rendezvous apart (default dist_rec)
#   --max-restarts N         how often all ranks start again after one is lost (default 10)
#
# What follows `--` goes to dist-rec. The run folder (run.root) must lie on a file system that all hosts share.
# When a host is lost, the others wait for it to come back (start this line there again) or, with a range, go on
# without it; either way from the last good checkpoint. Losing the rendezvous host ends the job: start it again
# on all hosts, and it goes on from there too.

set -euo pipefail
nodes= ranks=1 rendezvous= id=dist_rec restarts=10

die() { printf 'torchrun_multinode.sh: %s\n' "$*" >&2; exit 2; }

while (($#)); do
    case "$1" in
        --) shift; break ;;
        --help|-h) sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; exit 0 ;;
        --nodes|--nproc-per-node|--rendezvous|--id|--max-restarts) (($# > 1)) || die "$1 has no value" ;;&
        --nodes) nodes="$2" ;;
        --nproc-per-node) ranks="$2" ;;
        --rendezvous) rendezvous="$2" ;;
        --id) id="$2" ;;
        --max-restarts) restarts="$2" ;;
        *) die "unknown argument $1: write dist-rec's own arguments after --; see --help" ;;
    esac
    shift 2
done
[[ "$nodes" =~ ^[0-9]+(:[0-9]+)?$ ]] || die "--nodes must be N or MIN:MAX, got '$nodes'; see --help"
[[ "$rendezvous" =~ ^[^:]+:[0-9]+$ ]] || die "--rendezvous must be HOST:PORT, got '$rendezvous'; see --help"
(($#)) || die "nothing to run: write -- train CONFIG; see --help"

source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# The address and the interface by which this host reaches the rendezvous: the ranks must use them too, and neither a
# host's name nor its first interface need be known to the others.
target="$(getent ahostsv4 "${rendezvous%:*}" | awk 'NR == 1 { print $1 }')"
[[ -n "$target" ]] || die "host ${rendezvous%:*} has no address here"
route="$(ip -o -4 route get "$target")" || die "no route to ${rendezvous%:*} ($target)"
address="$(sed -n 's/.* src \([^ ]*\).*/\1/p' <<<"$route")"
is_host=false
if [[ "$route" == local\ * ]]; then
    is_host=true
    interface="$(ip -o -4 addr show to "$target" | awk 'NR == 1 { print $2 }')"
else
    interface="$(sed -n 's/.* dev \([^ ]*\).*/\1/p' <<<"$route")"
fi
export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-$interface}" NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-$interface}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(( $(nproc) / ranks > 0 ? $(nproc) / ranks : 1 ))}"

# With one store for all starts, a host that comes back is told no address (torch 2.13): each start gets its own.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 DIST_REC_RENDEZVOUS="$rendezvous"

exec torchrun --nnodes "$nodes" --nproc-per-node "$ranks" --max-restarts "$restarts" --local-addr "$address" \
    --rdzv-backend c10d --rdzv-endpoint "$rendezvous" --rdzv-id "$id" --rdzv-conf "is_host=$is_host" -m dist_rec "$@"
