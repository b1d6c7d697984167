#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Host frameworks exclude each other's versions of transformers, so each adapter is tested in an
# environment of its own: .venv-hosts/<host>, pinned by requirements/hosts/<host>.txt and, for wheels
# whose dependencies would pull in GPU packages, requirements/hosts/no-deps/<host>.txt.
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
  alone=requirements/hosts/no-deps/$host.txt
  pins=$(echo "$torch"; cat requirements/hosts/"$host".txt requirements/host-tests.txt
         [ ! -f "$alone" ] || cat "$alone")
  echo "== $host: environment $venv"
  [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
  if [ "$pins" != "$(cat "$venv/pins.txt" 2>/dev/null)" ]; then
    "$venv/bin/python" -m pip install "$torch" -r requirements/hosts/"$host".txt \
      -r requirements/host-tests.txt
    if [ -f "$alone" ]; then  # built with the torch just installed, DeepSpeed without kernels
      DS_BUILD_OPS=0 "$venv/bin/python" -m pip install --no-deps --no-build-isolation -r "$alone"
    fi
    echo "$pins" >"$venv/pins.txt"
  fi
  "$venv/bin/python" -m pip install -q --no-deps --force-reinstall "$wheel"
  echo "== $host: tests"
  # Only its own files: what others import at their top may be missing here.
  "$venv/bin/python" -m pytest $(grep -lw "host_$host" tests/integrations/test_*.py) -m "host_$host"
done
