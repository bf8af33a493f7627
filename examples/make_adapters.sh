#!/usr/bin/env bash
# Makes the shipped adapters again: data, then one training run each. CPU, about half an hour in all.
# Usage: examples/make_adapters.sh [OUT]     (default: examples/adapters)
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-$here/adapters}
rows=$(mktemp -d)
trap 'rm -rf "$rows"' EXIT

make() { # name, generator, flags of neuroada train
  local name=$1 data=$2
  shift 2
  python "$here/data/$data.py" --out "$rows"
  neuroada train demo --data "$rows/$data.train.jsonl" --eval-data "$rows/$data.heldout.jsonl" \
    --out "$out/$name" --k 8 "$@"
}

make sql sql --lr 8e-3 --max-steps 200
make json json_record --lr 8e-3 --max-steps 250
make triage triage --lr 5e-3 --max-steps 100
make pirate pirate --lr 5e-3 --max-steps 120
