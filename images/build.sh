#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds images with buildah, podman or docker, whichever is here: images/build.sh [operator|probe|agent]…
# BUILDER chooses the tool, PREFIX the name before /operator, TAG the tag, BUILD_ARGS more arguments of the tool.
# The context is the commit, and every time in the images is the commit's: the same commit gives the same digest.
set -euo pipefail
cd "$(dirname "$0")/.."

tool=${BUILDER:-$(command -v buildah || command -v podman || command -v docker || true)}
if [ -z "$tool" ]; then
  echo "images/build.sh: install buildah, podman or docker" >&2
  exit 2
fi
commit=$(git rev-parse HEAD)
SOURCE_DATE_EPOCH=$(git log -1 --format=%ct)
export SOURCE_DATE_EPOCH
version=$(sed -n 's/^appVersion: *//p' charts/fedpipe/Chart.yaml)
context=$(mktemp -d)
trap 'rm -rf "$context"' EXIT
git archive "$commit" crds operator edge-agent images constraints.txt | tar -x -C "$context"

case $(basename "$tool") in
  docker) build=("$tool" buildx build --load) ;;
  *) build=("$tool" build --layers=false --timestamp "$SOURCE_DATE_EPOCH") ;;  # intermediate layers show in the digest
esac
for name in "${@:-operator probe agent}"; do
  for image in $name; do
    # shellcheck disable=SC2086  # BUILD_ARGS are several words
    "${build[@]}" --file "$context/images/$image/Containerfile" --tag "${PREFIX:-docker.io/fedpipe}/$image:${TAG:-$version}" \
      --build-arg VERSION="$version" --build-arg REVISION="$commit" \
      --build-arg SOURCE_DATE_EPOCH="$SOURCE_DATE_EPOCH" ${BUILD_ARGS:-} "$context"
  done
done
