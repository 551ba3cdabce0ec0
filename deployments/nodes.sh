#!/usr/bin/env bash
# One run of a recipe whose trainings take the hosts of a DeepSpeed hostfile, without a scheduler. On the first host, in a clone
# that all of them have at the same place:   bash deployments/nodes.sh deployments/hostfile seq-monkey-small
# ssh opens the others without a password; they need no SEQMILL_* variable: those of this shell are taken along. Ctrl-C, or
# SIGTERM, saves a checkpoint first.
set -euo pipefail

hostfile=$1 recipe=$2
port=29400  # edit: a free port of the first host
store=/data/seqmill  # edit: the folder of the store, which all hosts mount

hosts=() slots=()
while read -r host told _; do
  if [[ $host && $host != \#* ]]; then
    hosts+=("$host")
    slots+=("${told#slots=}")
  fi
done <"$hostfile"

export SEQMILL_STORE="${SEQMILL_STORE:-$store}"
export SEQMILL_NODES="${SEQMILL_NODES:-1:${#hosts[@]}}"
export SEQMILL_RENDEZVOUS="${hosts[0]}:$port"
export SEQMILL_RENDEZVOUS_SECRET="${SEQMILL_RENDEZVOUS_SECRET:-$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')}"
settings=$(export -p | grep '^declare -x SEQMILL_')

joins=()
for node in $(seq 1 $((${#hosts[@]} - 1))); do
  # What its ranks say is told by node 0. Settings go through stdin: no command line, which others may read, holds a token. It
  # stays open as long as this script lives; its end, which ssh passes on, ends the host that joins.
  ssh -o ServerAliveInterval=10 "${hosts[$node]}" bash -s < <(
    printf '%s\ncd %q || exit\n' "$settings" "$PWD"
    # shellcheck disable=SC2016  # the other host's variable
    printf 'exec 3<&0; SEQMILL_NUM_RANKS=%q .venv/bin/seqmill join & join=$!\n' "${slots[$node]}"
    # shellcheck disable=SC2016
    echo '{ cat <&3; kill "$join"; } >/dev/null 2>&1 & wait "$join"; exit'
    exec tail --pid=$$ --follow /dev/null
  ) &
  joins+=($!)
done

SEQMILL_NUM_RANKS=${slots[0]} .venv/bin/seqmill run "$recipe" &
run=$! code=0
trap 'kill -TERM "$run" || true' INT TERM HUP
wait "$run" || code=$?
while kill -0 "$run" 2>/dev/null; do  # a signal ended `wait`
  code=0
  wait "$run" || code=$?
done
[[ $code != 0 ]] || wait ${joins[@]+"${joins[@]}"} || true  # it has let them go; one that was lost is no mistake
exit "$code"
