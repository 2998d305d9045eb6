#!/usr/bin/env bash
# Makes .venv from envs/pins.txt, or keeps it when it is current. PYTHON=... chooses the interpreter (3.11 or newer).
set -euo pipefail
cd "$(dirname "$0")/.."
stamp=.venv/.pins
if [ -x .venv/bin/python ] && [ -f "$stamp" ] && cmp -s envs/pins.txt "$stamp"; then exit 0; fi

find_python() {
  for name in "${PYTHON:-}" python3 python3.13 python3.12 python3.11; do
    if [ -n "$name" ] && "$name" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$name"; return
    fi
  done
}
python=$(find_python)
if [ -z "$python" ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq python3 python3-venv >/dev/null
  python=$(find_python)
fi
if [ -z "$python" ]; then
  echo "errata: no Python 3.11 or newer with venv found; install one (Debian: apt-get install python3-venv) or set PYTHON=..." >&2
  exit 1
fi
echo "errata: making .venv with $("$python" --version) (a few minutes)"
rm -rf .venv
"$python" -m venv .venv
.venv/bin/pip install -q --upgrade pip

# Without a GPU the CPU build is a tenth of the size; its index may be out of reach, then the default one serves.
torch=$(grep '^torch==' envs/pins.txt)
cpu_index=https://download.pytorch.org/whl/cpu
if ! command -v nvidia-smi >/dev/null && "$python" - "$cpu_index" <<'P' 2>/dev/null
import sys, urllib.request
urllib.request.urlopen(sys.argv[1] + "/torch/", timeout=5).read(1)
P
then
  .venv/bin/pip install -q "$torch" --extra-index-url "$cpu_index"
else
  .venv/bin/pip install -q "$torch"
fi
.venv/bin/pip install -q -r envs/pins.txt
cp envs/pins.txt "$stamp"
.venv/bin/python -c 'import torch; print("errata: torch", torch.__version__, "GPU" if torch.cuda.is_available() else "CPU only")'
