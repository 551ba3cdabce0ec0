#!/usr/bin/env bash
# One run of a recipe whose trainings take the hosts of a DeepSpeed hostfile, without a scheduler. On the first host, in a clone
# that all of them have at the same place:   bash deployments/nodes.sh deployments/hostfile seq-monkey-small
# ssh opens the others without a password; they need no SEQMILL_* variable: those of this shell are taken along.
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
settings=$(export -p | grep '^declare -x SEQMILL_')

for node in $(seq 1 $((${#hosts[@]} - 1))); do
  # What its ranks say is told by node 0. Settings go through stdin: no command line, which others may read, holds a token.
  printf '%s\ncd %q && SEQMILL_NUM_RANKS=%q exec .venv/bin/seqmill join\n' "$settings" "$PWD" "${slots[$node]}" |
    ssh "${hosts[$node]}" bash -s &
done

SEQMILL_NUM_RANKS=${slots[0]} .venv/bin/seqmill run "$recipe" || code=$?
wait
exit "${code:-0}"
