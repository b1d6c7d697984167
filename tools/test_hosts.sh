#!/usr/bin/env bash
# Host frameworks exclude each other's versions of transformers, so each adapter is tested in an
# environment of its own: .venv-hosts/<host>, pinned by requirements/hosts/<host>.txt.
# Usage: tools/test_hosts.sh PYTHON TORCH_REQUIREMENT [HOST ...]
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1 torch=$2
shift 2
hosts=("$@")
[ ${#hosts[@]} -gt 0 ] || hosts=($(basename -s .txt requirements/hosts/*.txt))

make wheel
wheel=$(ls dist/*.whl)
for host in "${hosts[@]}"; do
  venv=.venv-hosts/$host
  pins=$(echo "$torch"; cat requirements/hosts/"$host".txt requirements/host-tests.txt)
  echo "== $host: environment $venv"
  [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
  if [ "$pins" != "$(cat "$venv/pins.txt" 2>/dev/null)" ]; then
    "$venv/bin/python" -m pip install "$torch" -r requirements/hosts/"$host".txt \
      -r requirements/host-tests.txt
    echo "$pins" >"$venv/pins.txt"
  fi
  "$venv/bin/python" -m pip install -q --no-deps --force-reinstall "$wheel"
  echo "== $host: tests"
  "$venv/bin/python" -m pytest tests/integrations -m "host_$host"
done
