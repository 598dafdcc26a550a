#!/usr/bin/env bash
# Fetches ImageNet weights of backbones from torchvision's server, checks them and puts them where torch looks.
#
#   public-scripts/download_backbone.sh [-d DIR] [NAME...]
#
# NAME: resnet18, resnet34, resnet50, resnet101, resnext50_32x4d (the default), resnext101_32x8d, "all", or any
#       other file of that server whose name ends in its hash, such as resnet50-11ad3fa6.pth.
# DIR:  the weights go to DIR/hub/checkpoints. Default: $BACKBONE_DIR, else $TORCH_HOME, else
#       /workspace/ssd_dataset/torch-home. Training finds them with TORCH_HOME=DIR.
# BACKBONE_URL replaces the server, for a mirror.
#
# An interrupted download goes on where it stopped. A file gets its final name only after its hash was right.
set -euo pipefail

readonly URL="${BACKBONE_URL:-https://download.pytorch.org/models}"
dir="${BACKBONE_DIR:-${TORCH_HOME:-/workspace/ssd_dataset/torch-home}}"

declare -rA FILES=(
    [resnet18]=resnet18-f37072fd.pth
    [resnet34]=resnet34-b627a593.pth
    [resnet50]=resnet50-0676ba61.pth
    [resnet101]=resnet101-63fe2227.pth
    [resnext50_32x4d]=resnext50_32x4d-7cdf4587.pth
    [resnext101_32x8d]=resnext101_32x8d-8ba56ff5.pth
)
# The benchmark's own weights have a published SHA-512 too.
declare -rA SHA512=(
    ["resnext50_32x4d-7cdf4587.pth"]=15c9f0bc1c8d64750712f86ffaded3b0bc6a87e77a395dcda3013d8af65b7ebf3ca1c24dd3aae60c0d83e510b4d27731f0526b6f9392c0a85ffc18e5fecd8a13
)

fail() {
    echo "download_backbone.sh: $*" >&2
    exit 1
}

usage() {
    sed -n '2,/^set -euo/{/^#/s/^# \{0,1\}//p}' "$0"
}

# is_right FILE NAME: whether FILE has the hash that NAME ends in, and the published SHA-512 where there is one.
is_right() {
    local file=$1 name=$2 prefix=${2##*-} sum
    prefix=${prefix%.pth}
    sum=$(sha256sum <"$file")
    [[ $sum == "$prefix"* ]] || return 1
    [[ -z ${SHA512[$name]:-} ]] || [[ $(sha512sum <"$file") == "${SHA512[$name]} "* ]]
}

fetch() {
    local name=$1 target="$dir/hub/checkpoints/$1"
    local part="$target.part"
    if [[ -f $target ]] && is_right "$target" "$name"; then
        echo "$target: already there"
        return
    fi
    local options=(--fail --location --retry 5 --connect-timeout 20 --silent --show-error --output "$part")
    echo "$URL/$name -> $target"
    local status=0
    [[ ! -s $part ]] || curl "${options[@]}" --continue-at - "$URL/$name" || status=$?
    # 22 and 33: the server has nothing beyond the part, or cannot resume.
    case $status in
    0 | 22 | 33) ;;
    *) fail "$URL/$name could not be fetched; run again to go on from $part" ;;
    esac
    if [[ ! -s $part ]] || ! is_right "$part" "$name"; then
        rm -f "$part"
        curl "${options[@]}" "$URL/$name" || fail "$URL/$name could not be fetched; run again to try once more"
    fi
    if ! is_right "$part" "$name"; then
        rm -f "$part"
        fail "$URL/$name arrived damaged (wrong hash) and was removed; run again or set BACKBONE_URL to another server"
    fi
    mv -f "$part" "$target"
}

while getopts 'd:h' option; do
    case $option in
    d) dir=$OPTARG ;;
    h)
        usage
        exit 0
        ;;
    *)
        usage >&2
        exit 2
        ;;
    esac
done
shift $((OPTIND - 1))
(($#)) || set -- resnext50_32x4d
[[ $* != all ]] || set -- "${!FILES[@]}"

names=()
for name in "$@"; do
    file=$name
    [[ -z $name ]] || file=${FILES[$name]:-$name}
    [[ $file =~ ^[A-Za-z0-9_.]+-[0-9a-f]{8,64}\.pth$ ]] ||
        fail "unknown backbone '$name'; choose from: ${!FILES[*]}"
    names+=("$file")
done
mkdir -p "$dir/hub/checkpoints" || fail "cannot create $dir/hub/checkpoints; choose another folder with -d"
for name in "${names[@]}"; do
    fetch "$name"
done
