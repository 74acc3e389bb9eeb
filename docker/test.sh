#!/usr/bin/env bash
# Builds the CPU image without a registry or a Docker engine, and runs it: as root, on a Debian with mmdebstrap, buildah and
# bubblewrap. `KEEP=folder` keeps the work there and builds nothing that it already holds.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

work=${KEEP:-$(mktemp -d)}
mkdir -p "$work"
buildah() { command buildah --root "$work/storage" --runroot "$work/run" --storage-driver vfs "$@"; }
clean() {
    buildah umount --all >/dev/null 2>&1 || true
    [ -n "${KEEP:-}" ] || { buildah rm --all >/dev/null 2>&1 || true; rm -rf "$work"; }
}
trap clean EXIT
say() { printf '== %s\n' "$*"; }
fail() { echo "FAILED: $*" >&2; exit 1; }

# ---------------------------------------------------------------------------------------------- build
# What pip is told here, the build is told too: as its configuration, with the certificate and the folders that it names.
declare -A shown=()
echo "[global]" >"$work/pip.conf"
while IFS='=' read -r key value; do
    key=${key##*.} value=${value//\'/}
    case "$key $value" in
        cert\ /*) shown[$value]=/etc/pip.certificate value=/etc/pip.certificate ;;
        *\ /*) shown[$value]=$value ;;
    esac
    grep -q "^$key =" "$work/pip.conf" || echo "$key = $value" >>"$work/pip.conf"
done < <(python3 -m pip config list)
pip_flags=(--secret "id=pip,src=$work/pip.conf")
for path in "${!shown[@]}"; do pip_flags+=(--volume "$path:${shown[$path]}:ro"); done

build() { # tag, further arguments -> the output of the build
    local tag=$1
    shift
    buildah bud --isolation chroot --format docker --file docker/Dockerfile --tag "$tag" "${pip_flags[@]}" "$@" .
}

if ! buildah inspect --type image localhost/debian >/dev/null 2>&1; then
    say "a base: Debian of the same release as here"
    # shellcheck source=/dev/null
    mmdebstrap --quiet --variant=minbase "$(. /etc/os-release && echo "$VERSION_CODENAME")" "$work/base.tar"
    base=$(buildah from scratch)
    buildah add --quiet "$base" "$work/base.tar" / >/dev/null
    buildah commit --quiet "$base" localhost/debian >/dev/null
    buildah rm "$base" >/dev/null
fi
if ! buildah inspect --type image localhost/epmoe >/dev/null 2>&1; then
    say "the image"
    build localhost/epmoe --build-arg BASE=localhost/debian >"$work/log" 2>&1 || { tail -n 40 "$work/log"; fail "the build"; }
fi
container=$(buildah from localhost/epmoe)
root=$(buildah mount "$container")
touch "$root"/etc/hosts "$root"/etc/resolv.conf
site=$(echo "$root"/opt/epmoe/lib/python3*/site-packages)

# ---------------------------------------------------------------------------------------------- run
mkdir -p "$work/shm"
out=$work/out cache=$work/cache
fresh() { rm -rf "$out" "$cache" && mkdir "$out" "$cache" && chown 10001:10001 "$out" "$cache"; }

# As a container runtime would: the image's environment and entry point, a read-only root, a process tree of its own.
run() { # [uid=N] [shm=BYTES] [name=value ...] -- arguments
    local uid=10001 size=$((1 << 30)) variables=()
    while [ "$1" != -- ]; do
        case "$1" in
            uid=*) uid=${1#uid=} ;;
            shm=*) size=${1#shm=} ;;
            *) variables+=(--setenv "${1%%=*}" "${1#*=}") ;;
        esac
        shift
    done
    shift
    bwrap --unshare-pid --unshare-ipc --unshare-uts --die-with-parent --as-pid-1 --clearenv --ro-bind "$root" / \
        --proc /proc --dev /dev --size "$size" --perms 1777 --tmpfs /dev/shm --perms 1777 --tmpfs /tmp \
        --ro-bind /etc/hosts /etc/hosts --ro-bind /etc/resolv.conf /etc/resolv.conf --bind "$out" /out --bind "$cache" /cache \
        --chdir /out "${environment[@]}" "${variables[@]}" --setenv OMP_NUM_THREADS 1 \
        setpriv --reuid="$uid" --regid="$uid" --clear-groups --no-new-privs -- "${entry[@]}" "$@"
}
environment=() entry=()
while IFS= read -r line; do environment+=(--setenv "${line%%=*}" "${line#*=}"); done < <(
    buildah inspect --format '{{range .Docker.Config.Env}}{{println .}}{{end}}' "$container" | grep '=')
while IFS= read -r word; do entry+=("$word"); done < <(
    buildah inspect --format '{{range .Docker.Config.Entrypoint}}{{println .}}{{end}}' "$container" | grep .)
say "entry point ${entry[*]}, user $(buildah inspect --format '{{.Docker.Config.User}}' "$container")"
buildah inspect --format '{{.Docker.Config.Healthcheck}}' "$container" | grep -q health.sh || fail "no health check"

train=(train /configs/quickstart.yaml out=/out/run data.cache=/cache/data train.eval_every=0 train.eval_samples=8
    data.seq_len=64 train.global_batch_size=4 model.num_layers=2)
ends() { # expected code, words, arguments of run
    local expected=$1 words=$2 code=0
    shift 2
    run "$@" >"$work/log" 2>&1 || code=$?
    [ "$code" = "$expected" ] || { cat "$work/log"; fail "code $code instead of $expected: $*"; }
    grep -q -- "$words" "$work/log" || { cat "$work/log"; fail "no word of '$words': $*"; }
    say "$code: $(grep -m1 -- "$words" "$work/log" | cut -c1-200)"
}

fresh
say "doctor, ten steps on two ranks, a stop, and on with one rank"
ends 0 "training can work here" -- doctor
start=$(date +%s%N)
run RANKS=2 -- "${train[@]}" train.steps=10000 train.log_every=1 checkpoint.every=0 >"$work/train.log" 2>&1 &
job=$!
until [ -s "$out/run/metrics.jsonl" ]; do
    sleep 0.05
    kill -0 $job || { cat "$work/train.log"; fail "it ended before a step"; }
done
say "first step after $((($(date +%s%N) - start) / 1000000)) ms, the text prepared included"
until [ "$(wc -l <"$out/run/metrics.jsonl")" -ge 10 ]; do sleep 0.05; done
inside=$(pgrep --parent "$(pgrep --parent $job bwrap || echo $job)" | head -n 1)
nsenter --target "$inside" --pid --mount --root --wd --setuid 10001 --setgid 10001 env PATH=/opt/epmoe/bin:/usr/bin:/bin \
    sh /usr/local/bin/health.sh >"$work/log" || { cat "$work/log"; fail "unhealthy while it trains"; }
say "healthy: $(grep 'running:\|starting:' "$work/log" || { cat "$work/log" >&2; fail "no word of the run"; })"
kill -TERM "$inside"
code=0
wait $job || code=$?
[ "$code" = 75 ] || { cat "$work/train.log"; fail "SIGTERM to process 1 gave $code instead of 75"; }
step=$(grep -o '"step": [0-9]*' "$out/run/run_status.json" | head -n 1 | grep -o '[0-9]*$')
say "75: stopped after step $step, owned by $(stat --format %u "$out/run/run_status.json")"
ends 0 "resuming from" RANKS=1 -- "${train[@]}" "train.steps=$((step + 2))"

say "what is not right gets one sentence"
ends 2 "remove --user" uid=0 -- doctor
ends 2 "user 4711 cannot write to /out" uid=4711 -- doctor
ends 2 "RANKS=two is not a number" RANKS=two -- "${train[@]}"
ends 2 "/dev/shm has" shm=$((8 << 20)) -- "${train[@]}"
chown root "$out" && chmod 755 "$out"
ends 2 "cannot write to /out" -- "${train[@]}"
fresh
ends 2 "is neither\|no such\|not found\|cannot be read\|does not exist" -- train /configs/nothing.yaml
refused() { # words, arguments of build
    local words=$1
    shift
    if build localhost/refused "$@" >"$work/log" 2>&1; then fail "a build that must not work: $*"; fi
    grep -q "error: .*$words" "$work/log" || { tail -n 30 "$work/log"; fail "no word of '$words'"; }
    say "$(grep -m1 "^error: .*$words" "$work/log" | cut -c1-200)"
}
old=$(buildah from localhost/debian)
printf '#!/bin/sh\nexit 1\n' >"$work/python3" && chmod +x "$work/python3"
buildah copy --quiet "$old" "$work/python3" /usr/local/bin/python3 >/dev/null
buildah commit --quiet "$old" localhost/old >/dev/null
refused "Python 3.11 or newer" --build-arg BASE=localhost/old
sed -i.kept 's/^    "numpy[^"]*",$/    "numpy>=99",/' pyproject.toml
trap 'mv -f pyproject.toml.kept pyproject.toml; clean' EXIT
refused "pyproject.toml asks for numpy>=99" --build-arg BASE=localhost/debian
mv -f pyproject.toml.kept pyproject.toml
trap clean EXIT

say "what is in it"
! ls "$root"/usr/bin/{gcc,g++,cc,c++,clang,nvcc,make}* >/dev/null 2>&1 || fail "a compiler"
! find "$root" -name 'libcud*' -o -name 'libnccl*' | grep . || fail "CUDA libraries"
size=$(du -s --block-size=1M "$root" | cut -f1)
python=$(du -s --block-size=1M --exclude=opt "$root" | cut -f1)
torch=$(awk -F, '{ bytes += $NF } END { print int(bytes / 2^20) }' "$site"/torch-*.dist-info/RECORD)
say "image $size MiB; torch's wheel $torch and Debian with Python $python: $((100 * size / (torch + python)))% of these two"
[ $((10 * size)) -le $((13 * (torch + python))) ] || fail "too large"
