#!/usr/bin/env bash
# Sets up what `make demo`, `make test` and `make bench` run in: .venv with the packages pinned in constraints.txt, and
# Java for Spark. Run again it does nothing, in well under a second, unless the pins changed.
#
#   scripts/setup.sh [extra of pyproject.toml, default dev]
#
# PYTHON=… names the interpreter; TORCH_INDEX=… a package index to take torch from (PyTorch's index of CPU builds, say).
# Both count when .venv is made: `make clean` first where there is one.
set -euo pipefail
cd "$(dirname "$0")/.."
extra=${1:-dev}
venv=.venv
stamp=$venv/.setup-$extra
log=$venv/setup.log
# It was tried to install Java; removed, it is tried once more.
java_tried=$venv/.java-tried

say() { printf 'setup: %s\n' "$*"; }
fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }

# Java 17 or later; prints nothing where there is none.
java_version() {
  local java=java
  [ -n "${JAVA_HOME:-}" ] && java=$JAVA_HOME/bin/java
  "$java" -version 2>&1 | sed -nE 's/.*version "([0-9]+).*/\1/p' | head -n 1 || true
}

# sudo forgets the proxy, and how apt-get is to ask.
as_root() {
  if [ "$(id -u)" = 0 ]; then
    env DEBIAN_FRONTEND=noninteractive "$@"
  else
    sudo -n env DEBIAN_FRONTEND=noninteractive ${http_proxy:+http_proxy="$http_proxy"} ${https_proxy:+https_proxy="$https_proxy"} "$@"
  fi
}

can_apt() { command -v apt-get >/dev/null && { [ "$(id -u)" = 0 ] || sudo -n true 2>/dev/null; }; }

# Installs a Java runtime where none is new enough and apt-get can be used; else says what to install.
install_java() {
  local found package state="is missing"
  found=$(java_version)
  [ "${found:-0}" -ge 17 ] && return
  if [ ! -e "$java_tried" ] && can_apt; then
    touch "$java_tried"
    [ -n "$found" ] && state="$found is too old for Spark"
    say "Java $state; installing a runtime with apt-get (once, about a minute)"
    as_root apt-get update >>"$log" 2>&1 || true
    for package in openjdk-17-jre-headless openjdk-21-jre-headless default-jre-headless; do
      if as_root apt-get install -y --no-install-recommends "$package" >>"$log" 2>&1; then
        break
      fi
    done
    found=$(java_version)
    [ "${found:-0}" -ge 17 ] && return
  fi
  # Not fatal: everything but Spark works without it.
  say "Spark needs Java 17 or later: install it (Debian, Ubuntu: openjdk-17-jre-headless; Fedora: java-17-openjdk-headless; macOS: brew install openjdk@17)"
}

fits() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }

find_python() {
  local candidate
  if [ -n "${PYTHON:-}" ]; then
    if fits "$PYTHON"; then echo "$PYTHON"; fi
    return
  fi
  for candidate in python3.11 python3 python; do
    if fits "$candidate"; then
      echo "$candidate"
      return
    fi
  done
}

# What was installed, from which pins, where: a checkout that moved needs its console scripts written anew.
wanted=$(cat constraints.txt pyproject.toml scripts/setup.sh | sha256sum | cut -d ' ' -f 1)" $PWD"
if [ -x "$venv/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
  install_java
  exit 0
fi

python=$(find_python)
[ -n "$python" ] || [ -z "${PYTHON:-}" ] || fail "PYTHON=$PYTHON is no Python 3.11 to 3.13 that runs"
[ -n "$python" ] || fail "Python 3.11 is needed (3.12 and 3.13 may do) and none was found: install it (Debian, Ubuntu: python3.11 python3.11-venv), or name one with PYTHON=/path/to/python3.11"
started=$SECONDS
# pip does not write the scripts of what is installed already: after a move they would go on naming the old place.
if "$venv/bin/python" -c '' 2>/dev/null && ! compgen -G "$venv/.setup-*" >/dev/null; then
  # Another tool's (uv's has no pip): what is in it stays.
  fits "$venv/bin/python" || fail "$venv is another tool's, with $("$venv/bin/python" --version); Python 3.11 is needed: remove it"
  "$venv/bin/python" -c 'import pip' 2>/dev/null || "$venv/bin/python" -m ensurepip >/dev/null 2>&1 || fail "$venv is another tool's and has no pip: remove it, or install pip into it"
elif ! "$venv/bin/python" -c 'import pip' 2>/dev/null || { [ -s "$stamp" ] && [ "$(cut -d ' ' -f 2- "$stamp")" != "$PWD" ]; }; then
  say "making $venv with $("$python" --version)"
  other=$(cut -d ' ' -f 2- "$stamp" 2>/dev/null || true)
  # A link to another checkout's goes; one to another disk stays, and so does a disk of its own: emptied in place.
  if [ -L "$venv" ] && [ -n "$other" ] && [ "$other" != "$PWD" ] && [ -d "$other" ]; then rm "$venv"; fi
  [ -d "$venv" ] || mkdir -p "$(readlink "$venv" || echo "$venv")"
  find "$venv/" -mindepth 1 -delete
  : >"$venv/.setup-begun"  # It is ours, also where it is cut off here.
  "$python" -m venv "$(cd -P "$venv" && pwd)" || fail "python -m venv failed; on Debian and Ubuntu it needs the package python3.11-venv"
fi
: >"$log"
rm -f "$java_tried"
install_java

# pip's output goes to the log; on a terminal its current step is shown in one line that is written over.
pip_install() {
  local line status
  # In an `if`, or a pip that fails would end the script right here, without a word.
  { if "$venv/bin/python" -m pip install --disable-pip-version-check --no-input "$@" 2>&1; then echo "exit status 0"; else echo "exit status $?"; fi; } |
    while IFS= read -r line; do
      printf '%s\n' "$line" >>"$log"
      case $line in
        Collecting*|*Building*|Installing*) [ -t 1 ] && printf '\r\033[K  %.100s' "${line#"${line%%[![:space:]]*}"}" ;;
      esac
    done
  [ -t 1 ] && printf '\r\033[K'
  status=$(sed -n '$s/exit status //p' "$log")
  [ "$status" = 0 ] || { grep -v '^WARNING' "$log" | tail -n 15 >&2; fail "pip failed; the whole log is $log"; }
}

say "installing $(grep -c '==' constraints.txt) pinned packages into $venv (once, a few minutes; log $log)"
# torch goes first and by its exact pin: left to the others' ranges, pip could choose a build with all of CUDA.
pip_install -c constraints.txt "$(grep '^torch==' constraints.txt)" ${TORCH_INDEX:+--index-url "$TORCH_INDEX"}
pip_install -c constraints.txt -e ".[$extra]"
if [ "$extra" = bench ]; then
  # Without its dependencies: its metadata asks for an older pyarrow, and it works with the one that is here.
  pip_install --no-deps "$(grep '^daft==' constraints.txt)"
fi
printf '%s' "$wanted" >"$stamp"
say "done in $((SECONDS - started)) s"
