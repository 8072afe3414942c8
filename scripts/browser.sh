#!/usr/bin/env bash
# Puts a Chromium into .references/chromium, without root: Debian's package, and those it needs that
# this machine lacks, unpacked (115 MB to fetch). The test of the attention page clicks through it;
# nothing else needs it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh

home=$PWD/.references/chromium
[ ! -x "$home/browser" ] || { say "Ready: $home/browser"; exit 0; }
command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || {
    say "This takes Debian's or Ubuntu's packages: there is no apt-get or no dpkg-deb here."
    exit 1
}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$scratch/lists/partial" "$scratch/cache/archives/partial" "$scratch/chromium"
# Own lists and cache, no lock and no change of user: none of it needs root.
options=(-q -y -o "Dir::State::lists=$scratch/lists" -o "Dir::Cache=$scratch/cache"
    -o "APT::Sandbox::User=$(id -un)" -o Debug::NoLocking=true)
say "Fetching Chromium"
apt-get "${options[@]}" update >"$scratch/log" 2>&1 &&
    apt-get "${options[@]}" --no-install-recommends --download-only install chromium \
        >>"$scratch/log" 2>&1 || { cat "$scratch/log" >&2; exit 1; }
for package in "$scratch"/cache/archives/*.deb; do
    dpkg-deb -x "$package" "$scratch/chromium"
done
cat >"$scratch/chromium/browser" <<'END'
#!/bin/sh
here=$(dirname "$(readlink -f "$0")")
libraries=$(find "$here/usr/lib" -name '*.so*' -exec dirname {} + | sort -u | paste -sd :)
LD_LIBRARY_PATH="$libraries" exec "$here/usr/lib/chromium/chromium" "$@"
END
chmod +x "$scratch/chromium/browser"
mkdir -p .references
rm -rf "$home"
mv "$scratch/chromium" "$home"
say "Ready: $home/browser"
