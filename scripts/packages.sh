# For scripts that install what is missing of the system's packages: they set `script`, their name in messages, and read this.

say() { printf '%s: %s\n' "$script" "$*"; }
fail() { printf '%s: %s\n' "$script" "$*" >&2; exit 1; }

# APT, as root: a script may put options for apt-get into `apt`, and a word about the source into `source`.
apt=(apt-get)
source=""

as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        "$@"
    else
        command -v sudo >/dev/null || fail "neither root nor sudo: please run as root: $*"
        sudo "$@"
    fi
}

install_packages() {
    command -v apt-get >/dev/null || fail "please install: $*"
    [ "$(id -u)" -eq 0 ] || command -v sudo >/dev/null || fail "please install as root: apt-get install $*$source"
    say "installing $*$source"
    export DEBIAN_FRONTEND=noninteractive
    if ! as_root "${apt[@]}" install -y -qq --no-install-recommends "$@" >/dev/null; then
        say "package lists are old or empty: apt-get update"
        as_root "${apt[@]}" update -qq
        as_root "${apt[@]}" install -y -qq --no-install-recommends "$@" >/dev/null
    fi
}
