#!/usr/bin/env bash
# Makes .venv from a lock file and installs vime into it. A second run does nothing.
# The lock is requirements/gpu.txt (CUDA 13) on a machine with an NVIDIA GPU, else requirements/cpu.txt.
#   PYTHON=python3.12 scripts/install.sh     use another interpreter (CPU: 3.11 or 3.12; GPU: 3.12)
#   VENV=/elsewhere/venv scripts/install.sh  install to another place
#   scripts/install.sh --gpu                 install the CUDA stack on any machine (--cpu: the CPU stack)
#   scripts/install.sh --force               install again, even if the stamp says that it is done
#   scripts/install.sh --check               only check that every package of the lock can be downloaded
set -euo pipefail

ROOT="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." &>/dev/null && pwd)"
VENV="${VENV:-${ROOT}/.venv}"
STAMP="${VENV}/.vime-installed"
VARIANT="${VENV}/.vime-variant" # cpu or gpu: a venv never mixes packages of both

say() { printf '[install] %s\n' "$*"; }
die() { printf '[install] error: %s\n' "$1" >&2; shift; printf '          %s\n' "$@" >&2; exit 1; }

hash_of() { cat "$@" | { sha256sum 2>/dev/null || shasum -a 256; } | cut -d' ' -f1; }
has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU '; }
right_python() {
   local first=11
   if [[ "${variant}" == gpu ]]; then first=12; fi
   "$1" -c "import sys; sys.exit(not (3, ${first}) <= sys.version_info[:2] <= (3, 12))" &>/dev/null
}

variant=cpu force="" check=""
if has_gpu; then variant=gpu; fi
for word in "$@"; do
   case "${word}" in
      --gpu | --cpu) variant="${word#--}" ;;
      --force) force=yes ;;
      --check) check=yes ;;
      *) die "${word} is not known. Use --gpu, --cpu, --force or --check." ;;
   esac
done
LOCK="${ROOT}/requirements/${variant}.txt"
if [[ "${variant}" == gpu ]]; then
   pythons="3.12" candidates="python3.12 python3 python" size="10 GB"
else
   pythons="3.11 or 3.12" candidates="python3.11 python3.12 python3 python" size="2.7 GB"
fi
advised="${candidates%% *}"

# The stamp names everything that decides the outcome: the lock, the project's metadata, its folder.
key="$(hash_of "${LOCK}" "${ROOT}/pyproject.toml") ${ROOT}"
if [[ -z "${force}${check}" && -f "${STAMP}" && "$(<"${STAMP}")" == "${key}" ]]; then
   exit 0
fi
started=${SECONDS}

[[ "$(uname -s)-$(uname -m)" == Linux-x86_64 ]] ||
   die "requirements/${variant}.txt is for Linux on x86-64, and this machine is $(uname -s) on $(uname -m)." \
      "Run vime in a Linux x86-64 machine or container."
command -v gcc >/dev/null || command -v cc >/dev/null ||
   die "no C compiler (gcc) was found; PyTorch compiles kernels with it." \
      "On Debian or Ubuntu: apt-get install gcc"

if [[ "${variant}" == gpu ]] && has_gpu; then
   driver="$(nvidia-smi --query-gpu=driver_version --format=csv,noheader | head -n 1)"
   if [[ "${driver%%.*}" =~ ^[0-9]+$ ]] && ((${driver%%.*} < 580)); then
      say "note: CUDA 13 needs an NVIDIA driver of version 580 or later, and this is ${driver}." \
         "Update it, or put NVIDIA's cuda-compat-13-0 into LD_LIBRARY_PATH."
   fi
fi

# --- the virtual environment
had="$(cat "${VARIANT}" 2>/dev/null || echo cpu)"
if ! { [[ -x "${VENV}/bin/python" && "${had}" == "${variant}" ]] && right_python "${VENV}/bin/python"; }; then
   base=""
   seen=""
   for candidate in ${PYTHON:-${candidates}}; do
      command -v "${candidate}" >/dev/null || continue
      seen+=" ${candidate}=$("${candidate}" -V 2>&1 | head -n 1 | cut -d' ' -f2)"
      if right_python "${candidate}" && "${candidate}" -c 'import ensurepip, venv' &>/dev/null; then
         base="${candidate}"
         break
      fi
   done
   [[ -n "${base}" ]] ||
      die "vime needs Python ${pythons} with its venv module; found:${seen:- none}." \
         "On Debian or Ubuntu: apt-get install ${advised} ${advised}-venv" \
         "or name an interpreter: PYTHON=/path/to/${advised} make install"
   say "making ${VENV} with $("${base}" -V)"
   "${base}" -m venv --clear "${VENV}"
   printf '%s' "${variant}" >"${VARIANT}"
fi
py="${VENV}/bin/python"

# --- sources of packages: uv does not read pip's configuration, so pass it on
pip_setting() { # value of a pip option: from the environment or, as in pip, from its files
   local variable="PIP_$(tr 'a-z-' 'A-Z_' <<<"$1")"
   if [[ -n "${!variable:-}" ]]; then
      printf '%s' "${!variable}"
   else
      "${py}" -m pip config get "install.$1" 2>/dev/null || "${py}" -m pip config get "global.$1" 2>/dev/null || true
   fi
}
sources=()
for place in $(pip_setting find-links); do sources+=(--find-links "${place}"); done
for place in $(pip_setting index-url); do sources+=(--default-index "${place}"); done
extra=0
for place in $(pip_setting extra-index-url); do sources+=(--index "${place}"); extra=1; done
# With several indexes, take a fitting version from any of them, as pip does. The lock pins all versions.
if ((extra)); then sources+=(--index-strategy unsafe-best-match); fi
cert="$(pip_setting cert)"
if [[ -n "${cert}" ]]; then export SSL_CERT_FILE="${SSL_CERT_FILE:-${cert}}"; fi

no_network() {
   die "$1" \
      "Check the network connection. Behind a proxy, set HTTPS_PROXY. For a mirror, set PIP_INDEX_URL." \
      "Without a network, set PIP_FIND_LINKS to a folder of wheels. Then run this again."
}

# --- uv, then everything in the lock
uv_pin="$(grep -E '^uv==' "${LOCK}")"
uv=("${VENV}/bin/uv")
if [[ "$("${uv[@]}" --version 2>/dev/null | cut -d' ' -f2)" != "${uv_pin#uv==}" ]]; then
   say "installing ${uv_pin}"
   "${py}" -m pip install --quiet --disable-pip-version-check "${uv_pin}" ||
      no_network "pip could not install ${uv_pin}."
fi
install=("${uv[@]}" pip install --python "${py}" --no-deps)

# A CPU-only PyTorch comes from pip's sources if they have one, else from PyTorch's CPU index. For
# CUDA 13, the default registry's build is the right one.
torch_pin="$(grep -E '^torch==' "${LOCK}")"
if [[ "${variant}" == cpu ]] && ! "${install[@]}" --quiet --dry-run "${sources[@]}" "${torch_pin}" &>/dev/null; then
   sources+=(--torch-backend cpu)
fi
if [[ -n "${check}" ]]; then
   "${install[@]}" --quiet --dry-run --only-binary :all: "${sources[@]}" -r "${LOCK}" ||
      no_network "not every package of requirements/${variant}.txt can be downloaded."
   say "all $(grep -cE '^[a-z0-9]' "${LOCK}") packages of requirements/${variant}.txt can be downloaded"
   exit 0
fi
say "installing $(grep -cE '^[a-z0-9]' "${LOCK}") packages (${size} on disk; this takes minutes on a slow connection)"
"${install[@]}" "${sources[@]}" -r "${LOCK}" || no_network "uv could not install requirements/${variant}.txt."
"${install[@]}" --quiet --no-build-isolation --editable "${ROOT}" ||
   die "vime itself could not be installed; see the lines above."

printf '%s' "${key}" >"${STAMP}"
say "done in $((SECONDS - started)) s"
