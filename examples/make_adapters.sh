#!/usr/bin/env bash
# Makes the shipped adapters again: data, then one training run each. CPU, about half an hour in all.
# Usage: examples/make_adapters.sh [OUT]     (default: examples/adapters)
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-$here/adapters}
rows=$(mktemp -d)
trap 'rm -rf "$rows"' EXIT

make() { # name, generator, training rows, flags of neuroada train
  local name=$1 data=$2 train=$3
  shift 3
  python "$here/data/$data.py" --out "$rows" --train "$train"
  neuroada train demo --data "$rows/$data.train.jsonl" --eval-data "$rows/$data.heldout.jsonl" \
    --out "$out/$name" --k 8 "$@"
}

make sql sql 2400 --lr 8e-3 --max-steps 300
make json json_record 1200 --lr 8e-3 --max-steps 250
make triage triage 1200 --lr 5e-3 --max-steps 100
make pirate pirate 700 --lr 5e-3 --max-steps 120
